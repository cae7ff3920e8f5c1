"""Which image sets make a benchmark, and where they lie under the data root: data, and the search for folders."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

HUANG_LI = "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset"

DEFAULT_WEIGHTS = "IMAGENET1K_V1"


class MissingData(Exception):
    """Image folders that a benchmark needs are not there; the message lists each with the layout wanted and its source."""


class ImageSet(NamedTuple):
    """folders: where it may lie under the data root, the documented place first. source: where to get it. images: how many
    the published protocol has, None where there is none. md5: of the archive behind `source`, None where it has no archive.
    layout: of the files in the folder."""

    folders: tuple[str, ...]
    source: str
    images: int | None = None
    md5: str | None = None
    layout: str = "*.jpg"


class Benchmark(NamedTuple):
    """id: the test images that count as in-distribution. calibration: further ID images, never tested on; optional on disk.
    ood: the out-of-distribution sets by name, in the order of the report. arch: of the network it is run on where none is given,
    with DEFAULT_WEIGHTS or the weights in the file `checkpoint` under the data root. preprocessing: for checkpoints, where it
    differs from the protocol of the ImageNet table."""

    id: ImageSet
    calibration: ImageSet
    ood: Mapping[str, ImageSet]
    arch: str
    checkpoint: str | None = None
    preprocessing: Mapping[str, Any] = {}


def _spellings(parents: str, *children: str) -> tuple[str, ...]:
    return tuple(f"{parent}/{child}".rstrip("/") for child in children for parent in parents.split())


# The first spelling is the one of the authors' README; id_data/imagenet is that of their code. Letter case is ignored.
_IMAGENET = "id_data/ILSVRC-2012 id_data/imagenet id_data/imagenet-1k id_data/ILSVRC2012"
_IMAGENET_SOURCE = "https://www.image-net.org/challenges/LSVRC/2012/ (needs an account)"

BENCHMARKS: dict[str, Benchmark] = {
    # The protocol of ReAct's and LHAct's ImageNet tables. OOD subsets by Huang & Li, "MOS", CVPR 2021; Textures is all of
    # DTD (Cimpoi et al., CVPR 2014), 47 classes x 120, not one of its splits.
    "imagenet": Benchmark(
        id=ImageSet(_spellings(_IMAGENET, "val", "validation"), _IMAGENET_SOURCE, 50_000, layout="<wnid>/*.JPEG"),
        calibration=ImageSet(_spellings(_IMAGENET, "train"), _IMAGENET_SOURCE, 1_281_167, layout="<wnid>/*.JPEG"),
        ood={
            "iNaturalist": ImageSet(
                _spellings("ood_data/iNaturalist", "images", ""),
                f"{HUANG_LI}/iNaturalist.tar.gz",
                10_000,
                "5be6ea8aa027d7b631916427b32cb335",
            ),
            "SUN": ImageSet(
                _spellings("ood_data/SUN", "images", ""),
                f"{HUANG_LI}/SUN.tar.gz",
                10_000,
                "8469c3ada62211477954ec1be53b12d0",
            ),
            "Places": ImageSet(
                _spellings("ood_data/Places", "images", ""),
                f"{HUANG_LI}/Places.tar.gz",
                10_000,
                "b5cb5eba2754ae2a28beea8718db699a",
            ),
            "Textures": ImageSet(
                _spellings("ood_data/dtd ood_data/Textures ood_data/dtd/dtd", "images", ""),
                "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
                5_640,
                "fff73e5086ae6bdbea199a49dfb8a4c1",
                "<class>/*.jpg",
            ),
        },
        arch="resnet50",
    ),
    # Made by digits.py from images that scikit-learn ships; it writes these very folders and the network.
    "digits": Benchmark(
        id=ImageSet(("digits/test",), "python get_activation.py --benchmark digits"),
        calibration=ImageSet(("digits/train",), "python get_activation.py --benchmark digits"),
        ood={
            "HeldOutDigits": ImageSet(("digits/held-out",), "python get_activation.py --benchmark digits"),
            "Photographs": ImageSet(("digits/photographs",), "python get_activation.py --benchmark digits"),
            "Noise": ImageSet(("digits/noise",), "python get_activation.py --benchmark digits"),
        },
        arch="resnet10",
        checkpoint="digits/resnet10.pth",
        preprocessing={"resize": 40, "crop": 40},
    ),
}


def _existing(root: Path, folder: str) -> Iterator[Path]:
    """`root/folder` where it is a directory, whatever the letter case of its components on disk."""
    if not folder:
        yield root
        return
    head, _, rest = folder.partition("/")
    if not root.is_dir():
        return
    names = sorted(os.listdir(root), key=lambda name: (name != head, name))
    for name in names:
        if name.lower() == head.lower() and (root / name).is_dir():
            yield from _existing(root / name, rest)


def find(data_root: Path, image_set: ImageSet) -> Path | None:
    """The first of the set's folders that exists under `data_root`, in the order of its spellings; None if none does."""
    for folder in image_set.folders:
        for path in _existing(data_root, folder):
            return path
    return None


def locate(benchmark: str, data_root: str | Path, replace: Mapping[str, Path | None]) -> dict[str, Path]:
    """Image set name -> folder, in the order of extraction: `id`, `calibration` where it is there, then the OOD sets.

    replace: folders of the user's own, by the same names. Own OOD sets stand in for all of the benchmark's; an own ID set does not
    go with the benchmark's calibration set.
    Raises MissingData, listing every folder that is wanted and not there with the layout and the source.
    """
    wanted: dict[str, ImageSet] = {}
    own = BENCHMARKS[benchmark]
    own_ood = [name for name in replace if name not in ("id", "calibration")]
    if "id" not in replace:
        wanted = {"id": own.id, "calibration": own.calibration}
    if not own_ood:
        wanted |= own.ood
    found = {name: find(Path(data_root), image_set) for name, image_set in wanted.items()}
    missing = [name for name in wanted if found[name] is None and name != "calibration" and name not in replace]
    if missing:
        raise MissingData(_missing_message(benchmark, Path(data_root), {name: wanted[name] for name in missing}))
    folders = {**found, **replace}
    order = ("id", "calibration", *own.ood, *own_ood)
    return {name: folders[name] for name in dict.fromkeys(order) if folders.get(name) is not None}


def _missing_message(benchmark: str, data_root: Path, missing: Mapping[str, ImageSet]) -> str:
    lines = [f"{len(missing)} of the image folders of the benchmark {benchmark!r} are missing under {data_root}:"]
    for name, image_set in missing.items():
        count = f", {image_set.images:,} images" if image_set.images else ""
        lines.append(f"  {name}: {data_root / image_set.folders[0]}/{image_set.layout}{count}; from {image_set.source}")
    lines += [
        "Put them there, or give folders of your own: --data-root DIR, --id-dir DIR, --ood NAME=DIR.",
        "State of each, and downloads: python -m lhact.data",
        "Without any download: python get_activation.py --benchmark digits",
    ]
    return "\n".join(lines)
