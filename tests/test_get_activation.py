"""get_activation.py from its arguments to its files and messages: small image trees, a small
network, no connection."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ARCH,
    OOD,
    SETS,
    WNIDS,
    Run,
    fork,
    make_data_root,
    make_network,
    v1_like,
    wait,
    write_image,
)
from torchvision.datasets.folder import default_loader
from torchvision.models import ResNet18_Weights, ResNet50_Weights, ShuffleNet_V2_X0_5_Weights

import get_activation
from lhact import cache, imagenet
from lhact.benchmarks.builtin import BENCHMARKS, locate
from lhact.cache import BadCache
from lhact.devices import describe
from lhact.extraction import build, extract, networks
from lhact.extraction.image_sets import FileReader
from lhact.extraction.sources import open_folder


@pytest.fixture
def offline(monkeypatch, tmp_path) -> None:
    """An empty torch.hub folder, and no way to fetch anything."""

    def no_connection(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no connection")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_connection)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def unlisted(monkeypatch) -> None:
    """Images must not be listed."""
    listed = "images were listed, which can take minutes"
    monkeypatch.setattr(build, "open_source", lambda *_: pytest.fail(listed))


def by_torchvision(network: torch.nn.Module, files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Penultimate activations and logits by torchvision alone: its loader, the weights' transforms,
    its forward in float64."""
    network, seen = copy.deepcopy(network).double(), []
    network.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    transform = ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.transforms()
    with torch.inference_mode():
        logits = network(
            torch.stack([transform(default_loader(str(file))) for file in files]).double()
        )
    return seen[0].numpy(), logits.numpy()


# ---- what comes out ----


def test_the_whole_run(full_run, network):
    run = full_run
    assert run() == 0
    files = {path.name for path in run.folder.iterdir() if not path.name.startswith(".")}
    assert files == {"head.npz", *(f"{name}.{kind}" for name in SETS for kind in ("json", "npy"))}
    folders = {
        "id": "id_data/ILSVRC-2012/val",
        "calibration": "id_data/ILSVRC-2012/train",
        "iNaturalist": "ood_data/iNaturalist/images",
        "SUN": "ood_data/SUN/images",
        "Places": "ood_data/Places/images",
        "Textures": "ood_data/dtd/images",
    }
    with np.load(run.folder / "head.npz", allow_pickle=False) as head:
        weight, bias = head["weight"], head["bias"]
    np.testing.assert_array_equal(weight, network.fc.weight.detach())
    np.testing.assert_array_equal(bias, network.fc.bias.detach())
    for name, place in folders.items():
        folder = run.root / place
        paths = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.*"))
        wanted, logits = by_torchvision(network, [folder / path for path in paths])
        found = np.load(run.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        assert (found.dtype, found.shape) == (np.float32, (len(paths), 1024))
        # Of the largest: a network of random weights blows up what float32 rounds, torchvision's
        # own forward by 2e-5 in places.
        for ours, theirs in ((found, wanted), (found @ weight.T + bias, logits)):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
        sidecar = run.sidecar(name)
        facts = {
            "images": len(paths),
            "channels": 1024,
            "paths": paths,
            "preprocessing": {
                "resize": 256,
                "crop": 224,
                "interpolation": "bilinear",
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
            },
            "precision": "fp32",
            "batch_size": 64,
            "device": f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        }
        assert {key: sidecar[key] for key in facts} == facts
        described = {"arch": ARCH, "checkpoint": "small.pth", "classes": 1000, "channels": 1024}
        assert sidecar["network"].items() >= described.items()
        assert len(sidecar["network"]["sha256"]) == len(sidecar["fingerprint"]) == 64
        versions = {"torch": torch.__version__, "numpy": np.__version__}
        assert sidecar["versions"].items() >= versions.items()
    assert f"done: {run.folder}" in run.err


def test_labels_come_from_wnids_and_accuracy_from_labels(full_run, network, tmp_path):
    run = full_run
    val = run.root / "id_data" / "ILSVRC-2012" / "val"
    shutil.rmtree(val)
    files = [write_image(tmp_path / f"image-{i}.png") for i in range(5)]
    predicted = by_torchvision(network, files)[1].argmax(axis=1)
    wnids = (Path(cache.__file__).parent / "imagenet_wnids.txt").read_text().split()
    wanted = {}
    for i, (file, label) in enumerate(zip(files, predicted, strict=True)):
        label = int(label) if i < 3 else (int(label) + 1) % 1000
        wanted[f"{wnids[label]}/{file.name}"] = label
        (val / wnids[label]).mkdir(parents=True, exist_ok=True)
        file.rename(val / wnids[label] / file.name)
    assert run("--calibration-per-class", 0) == 0
    sidecar = run.sidecar("id")
    assert dict(zip(sidecar["paths"], sidecar["labels"], strict=True)) == wanted
    assert sidecar["accuracy"] == pytest.approx(60.0)
    assert "top-1 60.00 %" in run.err


class Constant(torch.nn.Module):
    """Has the activations of ResNet-50 V1, the same for every image, and takes each for class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("activations", torch.from_numpy(v1_like(1)))
        self.fc = torch.nn.Linear(2048, 1000)
        torch.nn.init.zeros_(self.fc.weight)
        torch.nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.activations + 0 * x.mean((1, 2, 3))[:, None])


@pytest.fixture
def id_lines(run, monkeypatch) -> Callable[..., list[str]]:
    """id_lines(weights, ...): what is said of the ID set when torchvision's network of that name is
    a Constant."""

    def id_lines(weights: Any, *extra: object) -> list[str]:
        built = networks.Built(Constant(), weights.name, networks._preset(weights))
        arch = "resnet18" if "18" in weights.url else "resnet50"
        network = ("--arch", arch, "--weights", weights.name)
        places = ("--data-root", run.root, "--cache-dir", run.caches, "--calibration-per-class", 0)
        with monkeypatch.context() as patch:
            patch.setitem(networks.KINDS, "", lambda spec, *sizes: built)
            assert run.raw(*network, *places, "--workers", 0, "--device", "cpu", *extra) == 0
        lines = [line for line in run.err.splitlines() if line.startswith("id")]
        return [
            line for line in lines if not re.match(r"id: (no )?labels|id: all \d+ images are", line)
        ]

    return id_lines


def label_40_classes(folder: Path) -> None:
    shutil.rmtree(folder)
    for number, wnid in enumerate(imagenet.wnids()[:40]):
        write_image(folder / wnid / f"{number}.png")


def test_top1_stands_beside_the_published_one(id_lines, run):
    """Of the test images, not of those to calibrate on. Three images: whatever is right of them
    agrees with it."""
    (line,) = id_lines(ResNet50_Weights.IMAGENET1K_V1, "--calibration-per-class", 1)
    assert line.endswith(", top-1 33.33 % (published: 76.13 %)")
    assert "calibration: 2 images" in run.err
    assert run.err.count("published") == 1
    perturbed = id_lines(ResNet50_Weights.IMAGENET1K_V1, "--odin")[1]
    assert perturbed.startswith("id (ODIN): 3 images from ")
    assert perturbed.endswith(", top-1 33.33 %")


def test_another_benchmark_has_no_published_top1(id_lines, run, write_images, monkeypatch):
    monkeypatch.setattr("lhact.benchmarks.digits.prepare", lambda *_: None)
    for name in ("test", "held-out", "photographs", "noise"):
        write_images(run.root / "digits" / name, ["n01440764/1.png"])
    (line,) = id_lines(ResNet50_Weights.IMAGENET1K_V2, "--benchmark", "digits")
    assert line.endswith("/test, top-1 100.00 %")


@pytest.mark.parametrize(
    ("weights", "published", "cause"),
    [
        (ResNet50_Weights.IMAGENET1K_V1, "76.13", []),
        (ResNet50_Weights.IMAGENET1K_V2, "80.86", ["id: these are IMAGENET1K_V2 weights"]),
        (ResNet18_Weights.IMAGENET1K_V1, "69.76", []),
    ],
    ids=["V1", "V2", "resnet18"],
)
def test_top1_that_is_not_the_published_one(id_lines, run, weights, published, cause):
    label_40_classes(run.root / "id_data" / "ILSVRC-2012" / "val")
    first, *others = id_lines(weights)
    assert first.endswith(f", top-1 2.50 % (published: {published} %)")
    wanted = [*cause, f"id: top-1 is 2.50 % on 40 images, published is {published} %"]
    assert len(others) == len(wanted)
    assert all(found.startswith(line) for found, line in zip(others, wanted, strict=True))


def test_own_images_and_own_weights_have_no_published_top1(id_lines, run, tmp_path):
    label_40_classes(run.root / "id_data" / "ILSVRC-2012" / "val")
    own = run.root / "id_data" / "ILSVRC-2012" / "val"
    enlarged, line, remark = id_lines(ResNet50_Weights.IMAGENET1K_V1, "--id-dir", own)
    assert "the images have 36 pixels a side, the network's input 224" in enlarged
    assert line.endswith("/val, top-1 2.50 %")
    assert "no better than guessing one of 40 classes" in remark
    assert run() == 0
    assert ", top-1 " in run.err
    assert "published" not in run.err


def test_another_number_of_classes_is_labelled_by_sorted_folders(run, write_images, tmp_path):
    """No OOD set is: ImageNet-O and DTD lie in folders too, which are no classes of the network."""
    run.checkpoint = tmp_path / "three.pth"
    torch.save(make_network(ARCH, num_classes=3).state_dict(), run.checkpoint)
    odd = write_images(tmp_path / "odd", ["banded/1.jpg", "dotted/1.jpg", "woven/1.jpg"])
    assert run("--ood", f"odd={odd}") == 0
    assert run.sidecar("id")["labels"] == [0, 1, 2]
    assert run.sidecar("calibration")["labels"] == [0, 0, 1, 1]  # numbered with those of id
    assert (run.sidecar("odd")["labels"], run.sidecar("odd")["accuracy"]) == (None, None)
    assert run.sidecar("id")["network"]["classes"] == 3
    assert np.load(run.folder / "head.npz")["weight"].shape == (3, 1024)


FIRST, THIRD = ["10", "2"], [f"{i:02}" for i in range(12)]  # by name: _10 comes before _2


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (["--calibration-per-class", 0], None),
        (["--calibration-per-class", 1], [*FIRST[:1] * 2, *THIRD[:1]]),
        ([], [*FIRST * 2, *THIRD[:10]]),
        (["--calibration-per-class", "all"], [*FIRST * 2, *THIRD]),
    ],
)
def test_calibration_per_class(asked, wanted, run, write_images):
    train = run.root / "id_data" / "ILSVRC-2012" / "train"
    write_images(train, [f"{WNIDS[2]}/x_{number}.JPEG" for number in THIRD])
    assert run(*asked) == 0
    if wanted is None:
        assert not [*run.folder.glob("calibration.*")]
    else:
        found = run.sidecar("calibration")["paths"]
        assert [Path(path).stem.partition("_")[2] for path in found] == wanted
        assert found == sorted(found)


def test_without_train_there_is_no_calibration_set(run):
    shutil.rmtree(run.root / "id_data" / "ILSVRC-2012" / "train")
    assert run() == 0
    assert sorted(path.stem for path in run.folder.glob("*.json")) == sorted(("id", *OOD))


# ---- where the images lie ----


# What is moved where, one after the other. A folder may take the place of an empty one.
SPELLINGS = {
    "imagenet": ["id_data/ILSVRC-2012 id_data/imagenet"],
    "textures": ["ood_data/dtd ood_data/Textures"],
    "textures-without-images": [
        "ood_data/dtd/images moved",
        "moved ood_data/dtd",
        "ood_data/dtd ood_data/Textures",
    ],
    "dtd-without-images": ["ood_data/dtd/images moved", "moved ood_data/dtd"],
    "dtd-archive": [],
    "dtd-archive-as-textures": ["ood_data/dtd ood_data/Textures"],
    "iNaturalist-without-images": [
        "ood_data/iNaturalist/images moved",
        "moved ood_data/iNaturalist",
    ],
    "SUN-without-images": ["ood_data/SUN/images moved", "moved ood_data/SUN"],
    "Places-without-images": ["ood_data/Places/images moved", "moved ood_data/Places"],
    "other-case": ["ood_data/iNaturalist ood_data/inaturalist", "ood_data/SUN ood_data/sun"],
    "imagenet-elsewhere": ["id_data ../id"],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_are_found(spelling, data_root):
    def listed() -> dict[str, tuple[str, ...]]:
        found = locate(BENCHMARKS["imagenet"], data_root, {})
        return {name: open_folder(place.source).paths for name, place in found.items()}

    wanted = listed()
    if "archive" in spelling:
        for name in ("imdb/imdb.mat", "labels/train1.txt", "labels/labels_joint_anno.txt"):
            (data_root / "ood_data" / "dtd" / name).parent.mkdir(exist_ok=True)
            (data_root / "ood_data" / "dtd" / name).write_text("no image")
    for old, new in map(str.split, SPELLINGS[spelling]):
        (data_root / old).rename(data_root / new)
    if spelling == "imagenet-elsewhere":
        (data_root / "id_data").symlink_to(data_root.parent / "id")
    assert set(wanted) == set(SETS)
    assert listed() == wanted


def test_a_flat_validation_folder_has_no_labels(run, reference):
    val = run.root / "id_data" / "ILSVRC-2012" / "val"
    for file in [*val.rglob("*.JPEG")]:
        file.rename(val / file.name)
        file.parent.rmdir()
    assert run("--calibration-per-class", 0) == 0
    sidecar = run.sidecar("id")
    assert (sidecar["labels"], sidecar["accuracy"]) == (None, None)
    assert sidecar["paths"] == [f"ILSVRC2012_val_0000{i}.JPEG" for i in range(3)]
    assert (run.folder / "id.npy").read_bytes() == reference["id.npy"]
    assert "top-1" not in run.err


def test_own_folders_replace_the_benchmarks(run, write_images, tmp_path):
    names = ["b/2.jpg", "a/1.png", "a-b/3.jpeg"]
    own = {
        name: write_images(tmp_path / "own" / name, names)
        for name in ("id", "calibration", "birds", "old-maps")
    }
    run.root = tmp_path / "no benchmark here"
    folders = ("--id-dir", own["id"], "--calibration-dir", own["calibration"])
    ood = ("--ood", f"birds={own['birds']}", "--ood", f"old-maps={own['old-maps']}")
    assert run(*folders, *ood, "--name", "mine") == 0
    run.folder = run.caches / "imagenet" / "mine"
    assert {path.stem for path in run.folder.glob("*.json")} == set(own)
    for name in own:
        assert run.sidecar(name)["paths"] == sorted(names)
        assert run.sidecar(name)["labels"] is None


def test_an_own_id_set_does_not_go_with_the_benchmarks_calibration_images(
    run, write_images, tmp_path
):
    own = write_images(tmp_path / "own", ["1.jpg", "2.jpg"])
    assert run("--id-dir", own) == 0
    assert sorted(path.stem for path in run.folder.glob("*.json")) == sorted(("id", *OOD))


# ---- ODIN ----


def test_odin_caches_the_moved_images_beside_the_plain_ones(run):
    assert run("--odin") == 0
    odin = run.folder / "odin"
    assert {path.stem for path in odin.glob("*.json")} == {"id", *OOD}
    for name in ("id", *OOD):
        sidecar = json.loads((odin / f"{name}.json").read_text())
        assert sidecar["odin"] == {"temperature": 1000.0, "epsilon": 0.005}
        assert run.sidecar(name)["odin"] is None
        assert sidecar["paths"] == run.sidecar(name)["paths"]
        plain, moved = (np.load(folder / f"{name}.npy") for folder in (run.folder, odin))
        assert plain.shape == moved.shape
        assert 1e-4 < np.abs(plain - moved).max() < 5
    line = run.refusal("--odin", "--odin-epsilon", 0.1)
    assert "odin epsilon 0.005 in the cache, 0.1 now" in line


def test_odin_moves_images_by_the_logits_of_the_whole_network(run, network, tmp_path):
    """The gradient is that of class 7, which every image gets by the bias of the head alone."""
    biased = copy.deepcopy(network)
    with torch.no_grad():
        biased.fc.bias[7] = 500
    run.checkpoint = tmp_path / "biased.pth"
    torch.save(biased.state_dict(), run.checkpoint)
    assert run("--odin", "--calibration-per-class", 0) == 0
    sidecar = run.sidecar("id")
    folder = run.root / "id_data" / "ILSVRC-2012" / "val"
    transform = ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.transforms(resize_size=36, crop_size=32)
    images = torch.stack([transform(default_loader(folder / path)) for path in sidecar["paths"]])
    images.requires_grad_()
    logits = biased(images)
    assert logits.argmax(dim=1).tolist() == [7] * len(images)
    assert 7 not in (logits - biased.fc.bias).argmax(dim=1).tolist()
    loss = torch.nn.functional.cross_entropy(logits / 1000, logits.argmax(dim=1), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)
    seen = []
    biased.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        biased(images - 0.005 * gradient.sign())
    moved, plain = (np.load(run.folder / place / "id.npy") for place in ("odin", "."))
    # The gradient's sign turns where it is as good as 0, so the last bits are not asked for.
    difference = np.abs(moved - seen[0].numpy()).max()
    assert difference < 0.02 * np.abs(moved - plain).max()


def test_odin_can_be_added_to_a_finished_cache(run, reference):
    run.has(reference)
    assert run("--odin") == 0
    assert "cached already" in run.err
    odin = run.contents(run.folder / "odin")
    shutil.rmtree(run.folder / "odin")
    assert run.contents() == reference
    assert run("--odin", caches=run.caches.parent / "at-once") == 0
    assert run.contents(run.caches.parent / "at-once" / "imagenet" / ARCH / "odin") == odin


# ---- arithmetic ----


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_tensorfloat_is_on_where_it_is_asked_for_alone(precision, tf32, run, monkeypatch):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    seen = set()

    def fill(*_: object) -> None:
        if hasattr(matmul, "fp32_precision"):  # from torch 2.9 on
            seen.update(part.fp32_precision == "tf32" for part in (matmul, cudnn.conv, cudnn.rnn))
        else:
            seen.update(part.allow_tf32 for part in (matmul, cudnn))

    monkeypatch.setattr(build, "fill", fill)
    assert run("--precision", precision) == 0
    assert seen == {tf32}


# ---- no data ----

SOURCES = {
    "id_data/ILSVRC-2012/val": "image-net.org",
    "ood_data/iNaturalist/images": "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/iNaturalist.tar.gz",
    "ood_data/SUN/images": "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/SUN.tar.gz",
    "ood_data/Places/images": "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/Places.tar.gz",
    "ood_data/dtd/images": "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
}


def test_the_plain_command_on_a_fresh_clone_says_what_is_missing_and_what_works_without(tmp_path):
    done = subprocess.run(
        [sys.executable, get_activation.__file__],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    for folder, source in SOURCES.items():
        assert any(f"datasets/{folder}" in line and source in line for line in lines), folder
    for said in ("50,000", "10,000", "5,640", "python get_activation.py --benchmark digits"):
        assert said in done.stderr
    assert "train" not in done.stderr, "calibration images are not required"
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("folder", SOURCES)
def test_only_what_is_missing_is_listed(folder, run):
    shutil.rmtree(run.root / "ood_data" / "dtd" if "dtd" in folder else (run.root / folder).parent)
    assert run() == 1
    assert str(run.root / folder) in run.err
    assert sum(str(run.root / other) in run.err for other in SOURCES) == 1
    assert "1 of the image sets" in run.err
    assert not run.caches.exists()


def test_own_folders_need_no_benchmark_and_part_of_them_only_the_rest(run, write_images, tmp_path):
    own = write_images(tmp_path / "own", ["1.jpg"])
    run.root = tmp_path / "nothing"
    assert run("--id-dir", own) == 1
    assert "ILSVRC" not in run.err
    assert "Places" in run.err
    assert run("--ood", f"own={own}") == 1
    assert "ILSVRC-2012/val" in run.err
    assert "Places" not in run.err


def test_the_default_network_is_resnet50_v1_and_is_not_made_up_without_a_connection(run, offline):
    assert run.raw("--data-root", run.root, "--cache-dir", run.caches, "--workers", 0) == 1
    assert "IMAGENET1K_V1 of resnet50 could not be fetched" in run.err
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in run.err
    assert not [*run.caches.rglob("*.npy")]


# ---- the command line is not right: exit status 2 ----

COMMAND_LINES = {
    "--wieghts x": "unrecognized arguments: --wieghts",
    "--benchmark cifar": "'cifar' is no benchmark (did you mean cifar10?); known are imagenet",
    "--precision fp8": "invalid choice: 'fp8'",
    "--device gpu": "a device must be auto, cuda, cuda:N or cpu, got 'gpu'",
    "--device cuda:77": "device cuda:77: torch ",
    "--weights IMAGENET1K_V1": "give --weights or --checkpoint, not both",
    "--weights ''": "give --weights or --checkpoint, not both",
    "--batch-size 0": "--batch-size: must be a whole number, at least 1, got '0'",
    "--batch-size many": "must be a whole number, at least 1, got 'many'",
    "--workers -1": "--workers: must be a whole number, at least 0, got '-1'",
    "--calibration-per-class some": "per-class: must be a whole number or all, got 'some'",
    "--calibration-per-class -1": "--calibration-per-class",
    "--calibration-per-class 1.5": "per-class: must be a whole number or all, got '1.5'",
    "--calibration-per-class ²": "must be a whole number",
    "--calibration-dir x --calibration-per-class 0": "--calibration is not read with",
    "--id-dir x --calibration-per-class 5": "--calibration-per-class is about --calibration,",
    "--ood /somewhere": "--ood: must be NAME=SOURCE, got '/somewhere'",
    "--ood name=": "--ood: must be NAME=SOURCE, got 'name='",
    "--ood =/somewhere": "--ood: must be NAME=SOURCE",
    "--ood a=/x --ood a=/y": "--ood a: that name is taken; give another",
    "--ood a=/x --ood A=/y": "A and a differ by letter case alone",
    "--ood id=/x": "--ood id: that name is taken",
    "--ood calibration=/x": "--ood calibration: that name is taken",
    "--ood Average=/x": "an OOD set cannot be called 'Average'",
    "--ood average=/x": "--ood average: that name is taken",
    "--ood ../x=/x": "must be made of letters, digits",
    "--ood a/b=/x": "got 'a/b'",
    "--name ..": "must be made of letters, digits",
    "--name a/b": "got 'a/b'",
    "--name ''": "must be made of letters, digits",
    "--name 'a\n'": "must be made of letters, digits",
    "--arch resnet51": "unknown architecture 'resnet51' (did you mean resnet50 or ",
    "--arch ''": "unknown architecture ''; known: ",
    "--arch fasterrcnn_resnet50_fpn": "unknown architecture 'fasterrcnn_resnet50_fpn'",
    "--odin-epsilon small": "must be a number, got 'small'",
    "--odin-epsilon 0.01": "change nothing without --odin; give it too",
    "--odin-temperature 1": "change nothing without --odin; give it too",
    "--odin --odin-epsilon nan": "--odin-epsilon",
    "--odin --odin-temperature 0": "--odin-temperature",
    "--gaussian -1": "--gaussian: must be a whole number, at least 0, got '-1'",
}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command_line_that_is_not_right(line, run, unlisted):
    assert run(*shlex.split(line)) == 2
    assert COMMAND_LINES[line] in run.err
    assert not run.caches.exists()


# ---- the input is not right: exit status 1, one line, nothing that passes for whole ----


SUN = "ood_data/SUN/images/sun-1.jpg"


def nothing(run: Run) -> None:
    pass


def sun(change: Callable[[Path], object]) -> Callable[[Run], object]:
    """Something happens to the second image of SUN."""
    return lambda run: change(run.root / SUN)


def odd_checkpoint(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Run], None]:
    """Something else stands in the checkpoint, or in a part of it."""

    def save(run: Run) -> None:
        state = torch.load(run.checkpoint, weights_only=True)
        run.checkpoint = run.caches.parent / "odd.pth"
        torch.save(change(state), run.checkpoint)

    return save


def overflowing(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    large = {"conv5.1.weight": 1e38, "conv5.1.bias": 3.3e38}
    return state | {name: state[name] + value for name, value in large.items()}


# What happens before the run, the arguments, what is said.
# What happens before the run, the arguments, what is said.
INPUTS: dict[str, tuple[Callable[[Run], object], str, str]] = {
    "image-cut": (
        sun(lambda path: os.truncate(path, path.stat().st_size - 99)),
        "",
        "sun-1.jpg cannot be read as an image: image file is truncated",
    ),
    "link-loop": (
        sun(lambda path: path.unlink() or path.symlink_to("..")),
        "",
        "links back to a folder that holds it; remove that link",
    ),
    "empty-folder": (
        lambda run: [path.unlink() for path in (run.root / "ood_data/Places/images").iterdir()],
        "",
        "Places/images holds no images",
    ),
    "no-id-folder": (nothing, "--id-dir nowhere", "nowhere cannot be listed: No such file or"),
    "no-ood-folder": (nothing, "--ood mine=nowhere", "nowhere cannot be listed: No such file or"),
    "no-calibration-folder": (nothing, "--calibration nowhere", "nowhere cannot be listed"),
}
EARLY: dict[str, tuple[Callable[[Run], object], str, str]] = {
    "no-checkpoint": (nothing, "--checkpoint nowhere.pth", "no checkpoint at"),
    "text": (odd_checkpoint(lambda _: "words"), "", "odd.pth holds no state dict"),
    "another": (nothing, "--arch mobilenet_v2", "small.pth is not a checkpoint of mobilenet_v2"),
    "no-head": (nothing, "--arch squeezenet1_0", "squeezenet1_0 does not end in a linear layer"),
    "overflow": (odd_checkpoint(overflowing), "", "gives NaN or infinite logits"),
    "cache-dir-is-a-file": (lambda run: run.caches.write_text("a file"), "", "cache"),
}


@pytest.mark.parametrize("kind", [*INPUTS, *EARLY])
def test_an_input_that_is_not_right(kind, run, request):
    """What takes no time is refused before images are listed."""
    if kind in EARLY:
        request.getfixturevalue("unlisted")
    change, arguments, message = (INPUTS | EARLY)[kind]
    change(run)
    assert message in run.refusal(*arguments.split())
    with pytest.raises(BadCache):
        cache.datasets(run.folder)


def test_all_images_that_cannot_be_read_are_named(run):
    for name in ("sun-0.jpg", "sun-1.jpg"):
        (run.root / SUN).with_name(name).write_bytes(b"words")
    assert run("--workers", 1) == 1
    first, *others = run.err[run.err.index("get_activation.py: ") :].splitlines()
    assert first == "get_activation.py: 2 images cannot be read:"
    assert [re.search(r"sun-\d\.jpg cannot be read as an image", line)[0] for line in others] == [
        f"sun-{i}.jpg cannot be read as an image" for i in range(2)
    ]


@pytest.mark.parametrize(
    ("workers", "image", "unfinished"),
    [
        (2, "dtd/images/zigzagged/zigzagged_1.jpg", "Textures"),
        (0, "iNaturalist/images/inaturalist-0.jpg", "Places, SUN, Textures, iNaturalist"),
    ],
)
def test_an_unreadable_image_leaves_the_cache_unfinished(
    workers, image, unfinished, run, reference
):
    path = run.root / "ood_data" / image
    whole, times = path.read_bytes(), path.stat()
    path.write_bytes(whole[:-300])
    line = run.refusal("--workers", workers)
    assert str(path) in line
    assert "restore it or leave it out" in line
    with pytest.raises(BadCache, match=f"is unfinished: {unfinished}; give the same"):
        cache.datasets(run.folder)
    path.write_bytes(whole)
    os.utime(path, (times.st_atime, times.st_mtime))
    assert run("--workers", workers) == 0
    assert run.contents() == reference


def test_default_weights_are_no_name(run):
    """torchvision's name for whatever is newest: another network after an update, and not the
    published one."""
    assert run.raw("--data-root", run.root, "--cache-dir", run.caches, "--weights", "DEFAULT") == 2
    assert "resnet50 has no weights 'DEFAULT'; known: IMAGENET1K_V1, IMAGENET1K_V2" in run.err


@pytest.mark.parametrize("what", ["cache folder", "checkpoint"])
def test_no_permission(what, checkpoint, public_folder, unprivileged):
    log = public_folder / "log"
    log.touch()
    log.chmod(0o666)
    shutil.copy(checkpoint, public_folder / "small.pth")
    run = Run(make_data_root(public_folder), public_folder / "small.pth", public_folder)
    locked = run.caches  # to make it, the public folder would have to be everybody's
    if what == "checkpoint":
        locked = run.checkpoint
        locked.chmod(0)
    unprivileged()
    line = run.refusal()
    assert "Permission denied" in line
    assert str(locked) in line


def test_as_many_workers_as_this_process_may_use_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert extract.default_workers(torch.device("cpu")) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert extract.default_workers(torch.device("cpu")) == 16
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert extract.default_workers(torch.device("cpu")) == 7


def test_more_workers_than_cores_are_no_reason_for_a_remark(run, monkeypatch):
    monkeypatch.setattr(
        os, "sched_getaffinity", lambda pid: {0}, raising=False
    )  # what torch counts
    assert run("--workers", 2) == 0


def test_a_bug_in_the_program_keeps_its_traceback(run, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(FileReader, "pixels", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        get_activation.main(run.arguments())


# ---- a cache that is there already ----


def test_what_is_complete_is_not_computed_again(run, reference, monkeypatch):
    run.has(reference)
    stamps = {path.name: path.stat().st_mtime_ns for path in run.folder.glob("*.npy")}

    monkeypatch.setattr(FileReader, "pixels", lambda *_: pytest.fail("an image was read again"))
    assert run() == 0
    assert run.err.count("cached already") == len(SETS)
    assert run.contents() == reference
    assert {path.name: path.stat().st_mtime_ns for path in run.folder.glob("*.npy")} == stamps


def test_what_is_missing_is_computed_and_the_rest_is_not(run, reference, monkeypatch):
    assert run("--calibration-per-class", 0) == 0
    (run.folder / "SUN.json").unlink()
    read = []
    load = FileReader.pixels

    def pixels(self: FileReader, path: str, *rest: Any) -> Any:
        read.append(Path(path).name)
        return load(self, path, *rest)

    monkeypatch.setattr(FileReader, "pixels", pixels)
    assert run() == 0
    assert sorted(read) == sorted(
        ["sun-0.jpg", "sun-1.jpg", *(f"{wnid}_{i}.JPEG" for wnid in WNIDS[:2] for i in (2, 10))]
    )
    assert run.contents() == reference


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Run], None]:
    def edited(run: Run) -> None:
        sidecar = run.sidecar("SUN")
        change(sidecar)
        (run.folder / "SUN.json").write_text(json.dumps(sidecar))

    return edited


_other_weights = odd_checkpoint(lambda state: state | {"fc.bias": state["fc.bias"] + 1e-3})


# What happens to the cache or the images, the arguments, what is said.
# What happens to the cache or the images, the arguments, what is said.
CACHES: dict[str, tuple[Callable[[Run], object], str, str]] = {
    "weights": (
        _other_weights,
        "",
        r"Places\.npy is of something else: .*network sha256 .* --name",
    ),
    "precision": (nothing, "--precision bf16", "precision 'fp32' in the cache, 'bf16' now"),
    "preprocessing": (
        _edit(lambda sidecar: sidecar["preprocessing"].update(resize=232)),
        "",
        r"SUN\.npy .*preprocessing resize 232 in the cache, 36 now.* --overwrite",
    ),
    "renamed": (
        sun(lambda path: path.rename(path.with_name("z.jpg"))),
        "",
        r"SUN\.npy .*other files: 1 gone, such as sun-1\.jpg and 1 new, such as z\.jpg",
    ),
    "size": (sun(lambda path: write_image(path, (60, 60))), "", r"SUN\.npy .*other file sizes"),
    "content": (
        sun(lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?")),
        "",
        r"SUN\.npy .*the same names and sizes, but other content",
    ),
    "calibration": (nothing, "--calibration-per-class 1", r"calibration\.npy .*files: 2 gone"),
    "array-cut": (
        lambda run: os.truncate(run.folder / "SUN.npy", 3000),
        "",
        r"SUN\.npy has 3000 bytes, wanted .* --overwrite",
    ),
    "newer-format": (
        _edit(lambda sidecar: sidecar.update(format=2)),
        "",
        r"SUN\.json has format 2, .*update this program",
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_of_something_else_is_refused_and_left_alone(kind, run, reference):
    change, arguments, message = CACHES[kind]
    run.has(reference)
    change(run)
    before = run.contents()
    assert re.search(message, run.refusal(*arguments.split()))
    assert run.contents() == before


@pytest.mark.parametrize("kind", ["weights", "precision", "array-cut", "newer-format"])
def test_overwrite_replaces_all_of_it(kind, run, reference, tmp_path):
    change, arguments, _ = CACHES[kind]
    run.has(reference)
    change(run)
    assert run("--overwrite", *arguments.split()) == 0
    assert run(*arguments.split(), caches=tmp_path / "fresh") == 0
    assert run.contents() == run.contents(tmp_path / "fresh" / "imagenet" / ARCH)
    assert "cached already" not in run.err


def test_a_device_too_small_for_the_network_is_one_line(run, monkeypatch):
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 98.00 MiB")

    monkeypatch.setattr(torch.nn.Module, "to", exhausted)
    line = run.refusal("--calibration-per-class", 0)
    assert line == "the device has too little memory; give another --device, such as cpu\n"


# ---- the same bytes ----


def test_the_sidecar_tells_the_devices_apart(run, monkeypatch):
    """Two kinds of CPU or GPU may differ in the last bits."""
    assert run("--calibration-per-class", 0) == 0
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "of another kind")
    (run.folder / "SUN.json").unlink()
    assert run() == 0
    assert run.sidecar("SUN")["device"] == "cpu (of another kind)"
    assert run.sidecar("Places")["device"] != run.sidecar("SUN")["device"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert describe(torch.device("cuda:1")) == "GPU 1"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workers", "1"],
        ["--workers", "2"],
        ["--device", "auto"] if not torch.cuda.is_available() else ["--workers", "3"],
    ],
)
def test_workers_do_not_change_a_byte(arguments, run, reference):
    assert run(*arguments) == 0
    assert run.contents() == reference


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_byte(threads, run, reference):
    def main() -> (
        int
    ):  # in a process of its own: threads do not survive a fork, and later tests fork
        torch.set_num_threads(threads)
        return get_activation.main(run.arguments())

    assert wait(fork(main)) == 0
    assert run.contents() == reference


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_batch_size_does_not_change_rows_or_their_order(batch_size, run, reference):
    assert run("--batch-size", batch_size) == 0
    for name in SETS:
        found = np.load(run.folder / f"{name}.npy")
        wanted = np.frombuffer(reference[f"{name}.npy"][-found.nbytes :], "<f4").reshape(
            found.shape
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert run.sidecar(name)["paths"] == json.loads(reference[f"{name}.json"])["paths"]
