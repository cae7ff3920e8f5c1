"""What several test files share: small images on disk, a small network that has seen data, runs of
get_activation.py on them, caches written by hand."""

import dataclasses
import faulthandler
import io
import json
import os
import signal
import struct
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import get_activation
from lhact.benchmarks import builtin
from lhact.cache_writer import SetWriter
from lhact.records import NetworkInfo, Preprocessing, RecordedPreprocessing, SetInfo

WNIDS = ("n01440764", "n01622779", "n07714990")  # classes 0, 24 and 937 of the 1,000
ARCH = "shufflenet_v2_x0_5"  # the smallest that torchvision has
OOD = ("iNaturalist", "SUN", "Places", "Textures")
SETS = ("id", "calibration", *OOD)


def write_image(path: Path, size: tuple[int, int] = (44, 36)) -> Path:
    """A coloured blotch whose look and time depend on the file's name alone; its format on the
    extension."""
    seed = zlib.crc32(path.name.encode("utf-8", "surrogateescape"))
    coarse = Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    coarse.resize(size, Image.Resampling.BICUBIC).save(path, kind)
    os.utime(path, (seed, seed))
    return path


def write_images(folder: Path, names: Iterable[str]) -> Path:
    for name in names:
        write_image(folder / name)
    return folder


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


def fork(function: Callable[[], object], seconds: int = 60) -> int:
    """Runs the function in a process of its own; its process id. Exit status 0: it returned, or
    what it returned; 99: it raised.

    Nobody waits for ever: after so many seconds it says where it is and ends.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        faulthandler.register(signal.SIGALRM, file=2, chain=True)
        signal.alarm(seconds)
        status = function() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    """The exit status of a process of `fork`; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def make_data_root(place: Path) -> Path:
    """`place`/datasets with the folders of the README: two or three images in each, three of the
    classes."""
    root = place / "datasets"
    imagenet = root / "id_data" / "ILSVRC-2012"
    write_images(
        imagenet / "val", [f"{wnid}/ILSVRC2012_val_0000{i}.JPEG" for i, wnid in enumerate(WNIDS)]
    )
    write_images(
        imagenet / "train", [f"{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS[:2] for i in (2, 10)]
    )
    for name in ("iNaturalist", "SUN", "Places"):
        write_images(
            root / "ood_data" / name / "images", [f"{name.lower()}-{i}.jpg" for i in range(2)]
        )
    write_images(
        root / "ood_data" / "dtd" / "images", ["banded/banded_1.jpg", "zigzagged/zigzagged_1.jpg"]
    )
    return root


def make_network(arch: str, seed: int = 0, side: int = 96, **settings: int) -> torch.nn.Module:
    """The architecture with random weights, such that train and eval mode, and two images, give
    clearly different activations."""
    torch.manual_seed(seed)
    network = torchvision.models.get_model(arch, weights=None, **settings)
    heads = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    torch.nn.init.normal_(heads[-1].weight, std=0.2)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # running statistics become those of the images below
    if norms:
        with torch.no_grad():
            network.train()(torch.randn(4, 3, side, side))
    return network.eval()


def small_classifier(classes: int = 5, channels: int = 16) -> torch.nn.Module:
    """A network of the user's own for images of 8 x 8 pixels, with the same weights each time."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    layers += [nn.Linear(32, channels), nn.ReLU(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers).eval()


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Warnings go to stderr, as they do outside of pytest."""

    def show(
        message: Warning, category: type[Warning], filename: str, line: int, *_: object
    ) -> None:
        if not issubclass(
            category,
            DeprecationWarning | PendingDeprecationWarning | ImportWarning | ResourceWarning,
        ):
            sys.stderr.write(warnings.formatwarning(message, category, filename, line))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


class Run:
    """Runs the script on a small network; `folder` is where its activations go."""

    def __init__(self, root: Path, checkpoint: Path, place: Path) -> None:
        self.root, self.checkpoint, self.caches, self.log = (
            root,
            checkpoint,
            place / "cache",
            place / "log",
        )
        self.folder = self.caches / "imagenet" / ARCH
        self.err = self.out = ""

    def arguments(self, *extra: object, caches: Path | None = None) -> list[str]:
        network = ("--arch", ARCH, "--checkpoint", self.checkpoint)
        places = ("--data-root", self.root, "--cache-dir", caches or self.caches)
        return [
            str(part) for part in (*network, *places, "--workers", 0, "--device", "cpu", *extra)
        ]

    def raw(self, *arguments: object) -> int:
        """The exit status for these arguments alone."""
        out = io.StringIO()
        # As the real one, this stderr takes any file name.
        with (
            self.log.open("w", errors="backslashreplace") as err,
            redirect_stderr(err),
            redirect_stdout(out),
            shown_warnings(),
        ):
            try:
                status = get_activation.main([str(part) for part in arguments])
            except SystemExit as exit:  # argparse ends the process itself
                status = exit.code
        self.out, self.err = out.getvalue(), self.log.read_text()
        assert "Traceback" not in self.err
        assert "Warning" not in self.err, "a library's own warning"
        return status

    def __call__(self, *extra: object, caches: Path | None = None) -> int:
        status = self.raw(*self.arguments(*extra, caches=caches))
        assert self.out == "", "results alone go to stdout, and there are none"
        return status

    def refusal(self, *extra: object) -> str:
        """The one line said when the input is not right."""
        assert self(*extra) == 1
        _, name, line = self.err.partition("get_activation.py: ")
        assert name
        assert len(line.splitlines()) == 1, self.err
        return line

    def sidecar(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())

    def has(self, files: dict[str, bytes]) -> None:
        """Puts these files into the cache, as if a run had made them."""
        self.folder.mkdir(parents=True)
        for name, content in files.items():
            (self.folder / name).write_bytes(content)

    def contents(self, folder: Path | None = None) -> dict[str, bytes]:
        folder = folder or self.folder
        return {
            path.name: path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".npy", ".json", ".npz")
        }


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Images of 32 pixels a side instead of 224, where only time depends on it: 40 times faster."""
    imagenet = builtin.BENCHMARKS["imagenet"]
    small = dataclasses.replace(imagenet, preprocessing=Preprocessing(resize=36, crop=32))
    patch.setitem(builtin.BENCHMARKS, "imagenet", small)


def v1_like(rows: int, seed: int = 0) -> np.ndarray:
    """(rows, 2048) activations whose percentiles and mean are those of the published network to
    within a hair."""
    points = [
        (0, 0),
        (33, 0.21940805315971373),
        (60, 0.42),
        (90, 1.0),
        (95.7, 1.3520756840705868),
        (100, 1.485),
    ]
    shares = (np.arange(rows * 2048) + 0.5) / (rows * 2048) * 100
    values = np.interp(shares, *zip(*points, strict=True)).astype(np.float32)
    return np.random.default_rng(seed).permutation(values).reshape(rows, 2048)


def write_cache(
    folder: Path,
    sets: dict[str, np.ndarray],
    weight: np.ndarray,
    bias: np.ndarray,
    network: dict[str, Any] | None = None,
    labels: dict[str, list[int]] | None = None,
    **fields: Any,
) -> Path:
    """A cache by numpy and json alone, as other tools may write one.

    network and fields replace what the sidecars say. labels: of the sets that have them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "head.npz", weight=weight.astype("<f4"), bias=bias.astype("<f4"))
    description = {"arch": "resnet18", "weights": None, "checkpoint": "own.pth", "sha256": "0" * 64}
    description |= {"classes": weight.shape[0], "channels": weight.shape[1], **(network or {})}
    for name, rows in sets.items():
        np.save(folder / f"{name}.npy", rows.astype("<f4"))
        content = {
            "format": 1,
            "network": description,
            "preprocessing": {"resize": 256, "crop": 224, "interpolation": "bilinear"},
            "precision": "fp32",
            "odin": None,
            "images": rows.shape[0],
            "channels": rows.shape[1],
            "fingerprint": f"the files of {name}",
            "versions": {"numpy": np.__version__},
            "labels": (labels or {}).get(name),
            "paths": [f"{name.lower()}/{i:04}.jpg" for i in range(len(rows))],
            "accuracy": None,
        }
        (folder / f"{name}.json").write_text(json.dumps({**content, **fields}))
    return folder


def set_info(paths: Iterable[str] = (), **changes: Any) -> SetInfo:
    """What a cache says of a set of these images by a network of 5 classes and 12 channels."""
    network = NetworkInfo("resnet18", None, "own.pth", "ab", classes=5, channels=12)
    paths = tuple(paths)
    info = SetInfo(network, RecordedPreprocessing(256, 224), "fp32", len(paths), "f", paths)
    return dataclasses.replace(info, **changes)


class Writer:
    """One process that writes the rows of a set in order, and promises each batch at once."""

    def __init__(self, folder: Path, dataset: str, content: dict[str, Any]) -> None:
        self.info = SetInfo.from_json({"format": 1, **content})
        self.writer = SetWriter(folder, dataset, self.info)

    def __enter__(self) -> "Writer":
        self.rows = self.writer.prepare()
        self.writer.__enter__()
        return self

    def write(self, rows: np.ndarray) -> None:
        self.writer.write(self.rows, rows, np.zeros((len(rows), 16), np.uint8))
        self.rows += len(rows)
        self.writer.sync()
        self.writer.record(self.rows)

    def finish(self, accuracy: float | None) -> None:
        self.writer.finish(accuracy)

    def __exit__(self, *_: object) -> None:
        self.writer.__exit__()
