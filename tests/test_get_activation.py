"""get_activation.py from its arguments to its files and messages: small image trees, a small
network, no connection."""

import copy
import json
import os
import pickle
import re
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
    png_that_claims,
    v1_like,
    wait,
    write_image,
)
from PIL import Image
from torchvision.datasets.folder import default_loader
from torchvision.models import ResNet18_Weights, ResNet50_Weights, ShuffleNet_V2_X0_5_Weights

import get_activation
from lhact import cache, imagenet
from lhact.benchmarks.builtin import Place
from lhact.cache import BadCache
from lhact.devices import describe
from lhact.extraction import build, extract, networks
from lhact.extraction.image_sets import FileReader, Images

SCRIPT = Path(get_activation.__file__)


@pytest.fixture
def offline(monkeypatch, tmp_path) -> None:
    """An empty torch.hub folder, and no way to fetch anything."""

    def no_connection(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no connection")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_connection)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


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
    assert sorted(
        path.name for path in run.folder.iterdir() if not path.name.startswith(".")
    ) == sorted(["head.npz", *(f"{name}.{kind}" for name in SETS for kind in ("json", "npy"))])
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
        files = sorted(
            (run.root / place).rglob("*.*"),
            key=lambda file: file.relative_to(run.root / place).as_posix(),
        )
        wanted, logits = by_torchvision(network, files)
        found = np.load(run.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        assert found.dtype == np.float32
        # Of the largest: a network of random weights blows up what float32 rounds, torchvision's
        # own forward by 2e-5 in places.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * wanted.max())
        np.testing.assert_allclose(
            found @ weight.T + bias, logits, rtol=0, atol=1e-5 * np.abs(logits).max()
        )
        sidecar = run.sidecar(name)
        assert sidecar["paths"] == [file.relative_to(run.root / place).as_posix() for file in files]
        assert (sidecar["images"], sidecar["channels"]) == found.shape == (len(files), 1024)
        assert sidecar["preprocessing"] == {
            "resize": 256,
            "crop": 224,
            "interpolation": "bilinear",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        }
        assert sidecar["precision"] == "fp32"
        assert sidecar["network"]["arch"] == ARCH
        assert sidecar["network"]["checkpoint"] == "small.pth"
        assert (sidecar["network"]["classes"], sidecar["network"]["channels"]) == (1000, 1024)
        assert len(sidecar["network"]["sha256"]) == len(sidecar["fingerprint"]) == 64
        assert sidecar["batch_size"] == 64
        assert sidecar["device"] == f"cpu ({torch.backends.cpu.get_cpu_capability()})"
        assert sidecar["versions"]["torch"] == torch.__version__
        assert sidecar["versions"]["numpy"] == np.__version__
    assert f"done: {run.folder}" in run.err


def test_labels_come_from_wnids_and_accuracy_from_labels(full_run, network, tmp_path):
    run = full_run
    val = run.root / "id_data" / "ILSVRC-2012" / "val"
    shutil.rmtree(val)
    files = [write_image(tmp_path / f"image-{i}.png") for i in range(5)]
    predicted = by_torchvision(network, files)[1].argmax(axis=1)
    wnids = (SCRIPT.parent / "lhact" / "imagenet_wnids.txt").read_text().split()
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
    ("weights", "published", "lines"),
    [
        (
            ResNet50_Weights.IMAGENET1K_V1,
            "76.13",
            ["id: top-1 is 2.50 % on 40 images, published is 76.13 % (standard error "],
        ),
        (
            ResNet50_Weights.IMAGENET1K_V2,
            "80.86",
            [
                "id: these are IMAGENET1K_V2 weights",
                "id: top-1 is 2.50 % on 40 images, published is 80.86 %",
            ],
        ),
        (
            ResNet18_Weights.IMAGENET1K_V1,
            "69.76",
            ["id: top-1 is 2.50 % on 40 images, published is 69.76 %"],
        ),
    ],
    ids=["V1", "V2", "resnet18"],
)
def test_top1_that_is_not_the_published_one(id_lines, run, weights, published, lines):
    label_40_classes(run.root / "id_data" / "ILSVRC-2012" / "val")
    first, *others = id_lines(weights)
    assert first.endswith(f", top-1 2.50 % (published: {published} %)")
    assert len(others) == len(lines)
    assert all(found.startswith(line) for found, line in zip(others, lines, strict=True))


def test_top1_without_labels(id_lines, run):
    val = run.root / "id_data" / "ILSVRC-2012" / "val"
    shutil.rmtree(val)
    write_image(val / "1.png")
    (line,) = id_lines(ResNet18_Weights.IMAGENET1K_V1)
    assert line.endswith("/val")


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


def test_another_number_of_classes_is_labelled_by_sorted_folders(run, tmp_path):
    run.checkpoint = tmp_path / "three.pth"
    torch.save(make_network(ARCH, num_classes=3).state_dict(), run.checkpoint)
    assert run() == 0
    assert run.sidecar("id")["labels"] == [0, 1, 2]
    assert run.sidecar("calibration")["labels"] == [0, 0, 1, 1]  # numbered with those of id
    assert run.sidecar("id")["network"]["classes"] == 3
    assert np.load(run.folder / "head.npz")["weight"].shape == (3, 1024)


@pytest.mark.parametrize("kind", ["as-many-folders-as-classes", "folders-named-by-wnids"])
def test_ood_images_have_no_labels(kind, run, write_images, tmp_path):
    # ImageNet-O and DTD lie in folders too; what they hold is of no class of the network's.
    folders = WNIDS if kind == "folders-named-by-wnids" else ("banded", "dotted", "woven")
    ood = write_images(tmp_path / "ood", [f"{name}/1.jpg" for name in folders])
    if kind == "as-many-folders-as-classes":
        run.checkpoint = tmp_path / "three.pth"
        torch.save(make_network(ARCH, num_classes=3).state_dict(), run.checkpoint)
    assert run("--calibration-per-class", 0, "--ood", f"odd={ood}") == 0
    assert run.sidecar("odd")["labels"] is None
    assert run.sidecar("odd")["accuracy"] is None
    assert run.sidecar("id")["labels"] is not None


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [("0", None), ("1", ["10", "10"]), ("2", ["10", "2"] * 2), ("all", ["10", "2"] * 2)],
)
def test_calibration_per_class(asked, wanted, run):
    assert run("--calibration-per-class", asked) == 0
    if wanted is None:
        assert not (run.folder / "calibration.json").exists()
        assert not (run.folder / "calibration.npy").exists()
    else:
        found = run.sidecar("calibration")["paths"]
        assert [
            Path(path).stem.partition("_")[2] for path in found
        ] == wanted  # by name: _10 comes before _2
        assert found == sorted(found)


def test_the_first_ten_of_each_class_by_default(run, write_images):
    train = run.root / "id_data" / "ILSVRC-2012" / "train"
    write_images(train, [f"{WNIDS[2]}/{i:02}.JPEG" for i in range(12)])
    assert run() == 0
    found = run.sidecar("calibration")["paths"]
    assert [path for path in found if path.startswith(WNIDS[2])] == [
        f"{WNIDS[2]}/{i:02}.JPEG" for i in range(10)
    ]
    assert len(found) == 4 + 10


def test_without_train_there_is_no_calibration_set(run):
    shutil.rmtree(run.root / "id_data" / "ILSVRC-2012" / "train")
    assert run() == 0
    assert sorted(path.stem for path in run.folder.glob("*.json")) == sorted(("id", *OOD))


# ---- where the images lie ----


def move(old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)

    return change


def without_level(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / "ood_data" / name / "images").rename(root / "moved")
        (root / "ood_data" / name).rmdir()
        (root / "moved").rename(root / "ood_data" / name)

    return change


def whole_dtd_archive(root: Path) -> None:
    for name in ("imdb/imdb.mat", "labels/train1.txt", "labels/labels_joint_anno.txt"):
        (root / "ood_data" / "dtd" / name).parent.mkdir(exist_ok=True)
        (root / "ood_data" / "dtd" / name).write_text("no image")


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda root: [change(root) for change in changes] and None


SPELLINGS: dict[str, Callable[[Path], object]] = {
    "imagenet": move("id_data/ILSVRC-2012", "id_data/imagenet"),
    "textures": move("ood_data/dtd", "ood_data/Textures"),
    "textures-without-images": both(
        without_level("dtd"), move("ood_data/dtd", "ood_data/Textures")
    ),
    "dtd-without-images": without_level("dtd"),
    "dtd-archive": whole_dtd_archive,
    "dtd-archive-as-textures": both(whole_dtd_archive, move("ood_data/dtd", "ood_data/Textures")),
    "iNaturalist-without-images": without_level("iNaturalist"),
    "SUN-without-images": without_level("SUN"),
    "Places-without-images": without_level("Places"),
    "other-case": both(
        move("ood_data/iNaturalist", "ood_data/inaturalist"), move("ood_data/SUN", "ood_data/sun")
    ),
    "imagenet-elsewhere": lambda root: both(
        move("id_data", "../id"), lambda r: (r / "id_data").symlink_to(r.parent / "id")
    )(root),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_are_found(spelling, run, reference):
    SPELLINGS[spelling](run.root)
    assert run() == 0
    assert run.contents() == reference


def test_a_flat_validation_folder_has_no_labels(run, reference):
    val = run.root / "id_data" / "ILSVRC-2012" / "val"
    for file in [*val.rglob("*.JPEG")]:
        file.rename(val / file.name)
    for folder in [*val.iterdir()]:
        if folder.is_dir():
            folder.rmdir()
    assert run() == 0
    assert run.sidecar("id")["labels"] is None
    assert run.sidecar("id")["accuracy"] is None
    assert run.sidecar("id")["paths"] == [f"ILSVRC2012_val_0000{i}.JPEG" for i in range(3)]
    assert (run.folder / "id.npy").read_bytes() == reference["id.npy"]
    assert "top-1" not in run.err.splitlines()[0]


def test_the_companions_of_a_mac_archive_are_not_images(run, reference):
    for folder in [path for path in run.root.rglob("*") if path.is_dir()]:
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (folder / "._image.jpg").write_bytes(b"\0\5\x16\7")
    assert run() == 0
    assert run.contents() == reference


@pytest.mark.parametrize("nested", [False, True])
def test_own_folders_replace_the_benchmarks(nested, full_run, write_images, network, tmp_path):
    run = full_run
    names = ["b/2.jpg", "a/1.png", "a-b/3.jpeg"] if nested else ["2.jpg", "1.png", "3.jpeg"]
    own = {
        name: write_images(tmp_path / "own" / name, names)
        for name in ("mine", "cal", "birds", "maps")
    }
    run.root = tmp_path / "no benchmark here"
    folders = ("--id-dir", own["mine"], "--calibration-dir", own["cal"])
    assert (
        run(
            *folders,
            "--ood",
            f"birds={own['birds']}",
            "--ood",
            f"old-maps={own['maps']}",
            "--name",
            "mine",
        )
        == 0
    )
    run.folder = run.caches / "imagenet" / "mine"
    assert sorted(path.stem for path in run.folder.glob("*.json")) == [
        "birds",
        "calibration",
        "id",
        "old-maps",
    ]
    for name in ("birds", "calibration", "id", "old-maps"):
        assert run.sidecar(name)["paths"] == sorted(names)
        assert run.sidecar(name)["labels"] is None
    wanted, _ = by_torchvision(network, [own["mine"] / name for name in sorted(names)])
    np.testing.assert_allclose(np.load(run.folder / "id.npy"), wanted, rtol=1e-5, atol=1e-5)


def test_an_own_id_set_does_not_go_with_the_benchmarks_calibration_images(
    run, write_images, tmp_path
):
    own = write_images(tmp_path / "own", ["1.jpg", "2.jpg"])
    assert run("--id-dir", own) == 0
    assert sorted(path.stem for path in run.folder.glob("*.json")) == sorted(("id", *OOD))


def test_images_of_every_kind_go_through(run, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    for mode, name in [
        ("L", "grey.JPEG"),
        ("CMYK", "cmyk.jpg"),
        ("P", "palette.png"),
        ("RGBA", "alpha.png"),
        ("1", "bits.png"),
    ]:
        Image.fromarray(noise).convert(mode).save(odd / name)
    Image.fromarray(noise).save(odd / "really-a-png.JPEG", "PNG")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 200).save(odd / "16-bit.png")
    for name in (b"caf\xe9.png", b"line\nbreak.png"):
        Image.fromarray(noise).save(odd / os.fsdecode(name))
    assert run("--id-dir", odd, "--ood", f"odd={odd}") == 0
    sidecar = run.sidecar("id")
    assert sidecar["paths"] == sorted(os.listdir(odd))
    rows = dict(zip(sidecar["paths"], np.load(run.folder / "id.npy"), strict=True))
    np.testing.assert_array_equal(rows["line\nbreak.png"], rows[os.fsdecode(b"caf\xe9.png")])
    np.testing.assert_allclose(
        rows["really-a-png.JPEG"], rows["line\nbreak.png"], rtol=1e-5, atol=1e-5
    )
    assert np.abs(rows["grey.JPEG"] - rows["line\nbreak.png"]).max() > 0.01


# ---- ODIN ----


def test_odin_caches_the_moved_images_beside_the_plain_ones(run):
    assert run("--odin") == 0
    assert sorted(path.stem for path in (run.folder / "odin").glob("*.json")) == sorted(
        ("id", *OOD)
    )
    for name in ("id", *OOD):
        sidecar = json.loads((run.folder / "odin" / f"{name}.json").read_text())
        assert sidecar["odin"] == {"temperature": 1000.0, "epsilon": 0.005}
        assert run.sidecar(name)["odin"] is None
        assert sidecar["paths"] == run.sidecar(name)["paths"]
        plain, moved = (
            np.load(run.folder / f"{name}.npy"),
            np.load(run.folder / "odin" / f"{name}.npy"),
        )
        assert plain.shape == moved.shape
        assert 1e-4 < np.abs(plain - moved).max() < 5
    assert "odin epsilon 0.005 in the cache, 0.1 now" in run.refusal(
        "--odin", "--odin-epsilon", 0.1
    )


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


def test_odin_that_does_not_move_the_images_changes_nothing(run):
    assert run("--odin", "--odin-epsilon", 0, "--calibration-per-class", 0) == 0
    for name in ("id", *OOD):
        plain, moved = (
            np.load(run.folder / f"{name}.npy"),
            np.load(run.folder / "odin" / f"{name}.npy"),
        )
        np.testing.assert_allclose(moved, plain, rtol=1e-5, atol=1e-5)


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


def test_a_fresh_clone_is_told_what_is_missing_and_what_works_without(run, tmp_path, offline):
    root = tmp_path / "nothing"
    assert run.raw("--data-root", root, "--cache-dir", run.caches) == 1
    lines = run.err.splitlines()
    for folder, source in SOURCES.items():
        assert any(str(root / folder) in line and source in line for line in lines), folder
    for count in ("50,000", "10,000", "5,640"):
        assert count in run.err
    assert "--benchmark digits" in run.err
    assert "train" not in run.err, "calibration images are not required"
    assert not run.caches.exists()


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
    "unknown-option": (["--wieghts", "x"], "unrecognized arguments: --wieghts"),
    "unknown-benchmark": (
        ["--benchmark", "cifar"],
        "'cifar' is no benchmark (did you mean cifar10?); known are imagenet",
    ),
    "unknown-precision": (["--precision", "fp8"], "invalid choice: 'fp8'"),
    "unknown-device": (
        ["--device", "gpu"],
        "a device must be auto, cuda, cuda:N or cpu, got 'gpu'",
    ),
    "absent-device": (["--device", "cuda:77"], "device cuda:77: torch "),
    "weights-and-checkpoint": (
        ["--weights", "IMAGENET1K_V1"],
        "give --weights or --checkpoint, not both",
    ),
    "batch-size-0": (
        ["--batch-size", "0"],
        "--batch-size: must be a whole number, at least 1, got '0'",
    ),
    "batch-size-word": (["--batch-size", "many"], "must be a whole number, at least 1, got 'many'"),
    "workers-negative": (
        ["--workers", "-1"],
        "--workers: must be a whole number, at least 0, got '-1'",
    ),
    "per-class-word": (
        ["--calibration-per-class", "some"],
        "per-class: must be a whole number or all, got 'some'",
    ),
    "per-class-negative": (["--calibration-per-class", "-1"], "--calibration-per-class"),
    "per-class-fraction": (
        ["--calibration-per-class", "1.5"],
        "per-class: must be a whole number or all, got '1.5'",
    ),
    "per-class-odd-digit": (["--calibration-per-class", "²"], "must be a whole number"),
    "ood-without-name": (["--ood", "/somewhere"], "--ood: must be NAME=SOURCE, got '/somewhere'"),
    "ood-without-folder": (["--ood", "name="], "--ood: must be NAME=SOURCE, got 'name='"),
    "ood-empty-name": (["--ood", "=/somewhere"], "--ood: must be NAME=SOURCE"),
    "ood-twice": (["--ood", "a=/x", "--ood", "a=/y"], "--ood a: that name is taken; give another"),
    "ood-case": (["--ood", "a=/x", "--ood", "A=/y"], "A and a differ by letter case alone"),
    "ood-named-id": (["--ood", "id=/x"], "--ood id: that name is taken"),
    "ood-named-calibration": (["--ood", "calibration=/x"], "--ood calibration: that name is taken"),
    "ood-named-Average": (["--ood", "Average=/x"], "an OOD set cannot be called 'Average'"),
    "ood-named-average": (["--ood", "average=/x"], "--ood average: that name is taken"),
    "ood-named-up": (["--ood", "../x=/x"], "must be made of letters, digits"),
    "ood-name-with-slash": (["--ood", "a/b=/x"], "got 'a/b'"),
    "name-up": (["--name", ".."], "must be made of letters, digits"),
    "name-with-slash": (["--name", "a/b"], "got 'a/b'"),
    "name-empty": (["--name", ""], "must be made of letters, digits"),
    "name-with-newline": (["--name", "a\n"], "must be made of letters, digits"),
    "epsilon-word": (["--odin-epsilon", "small"], "must be a number, got 'small'"),
    "temperature-zero": (["--odin", "--odin-temperature", "0"], "--odin-temperature"),
    "unknown-arch": (
        ["--arch", "resnet51"],
        "unknown architecture 'resnet51' (did you mean resnet50 or ",
    ),
    "empty-arch": (["--arch", ""], "unknown architecture ''; known: "),
    "arch-for-detection": (
        ["--arch", "fasterrcnn_resnet50_fpn"],
        "unknown architecture 'fasterrcnn_resnet50_fpn'",
    ),
    "empty-weights": (["--weights", ""], "give --weights or --checkpoint, not both"),
    "calibration-twice": (
        ["--calibration-dir", "x", "--calibration-per-class", "0"],
        "--calibration is not read with",
    ),
    "per-class-of-nothing": (
        ["--id-dir", "x", "--calibration-per-class", "5"],
        "--calibration-per-class is about --calibration,",
    ),
    "temperature-without-odin": (
        ["--odin-temperature", "1"],
        "change nothing without --odin; give it too",
    ),
    "epsilon-without-odin": (
        ["--odin-epsilon", "0.01"],
        "change nothing without --odin; give it too",
    ),
    "gaussian-negative": (
        ["--gaussian", "-1"],
        "--gaussian: must be a whole number, at least 0, got '-1'",
    ),
    "epsilon-nan": (["--odin", "--odin-epsilon", "nan"], "--odin-epsilon"),
}


@pytest.mark.parametrize("kind", COMMAND_LINES)
def test_a_command_line_that_is_not_right(kind, run, monkeypatch):
    arguments, message = COMMAND_LINES[kind]
    listed = "images were listed, which can take minutes"
    monkeypatch.setattr(build, "open_source", lambda *_: pytest.fail(listed))
    assert run(*arguments) == 2
    assert message in run.err
    assert not run.caches.exists()


# ---- the input is not right: exit status 1, one line, nothing that passes for whole ----


SUN = "ood_data/SUN/images/sun-1.jpg"


def nothing(run: Run) -> None:
    pass


def sun(change: Callable[[Path], object]) -> Callable[[Run], None]:
    """Something happens to the second image of SUN."""
    return lambda run: change(run.root / SUN) and None


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def checkpoint_file(make: Callable[[Path, dict], object]) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        state = torch.load(run.checkpoint, weights_only=True)
        run.checkpoint = run.caches.parent / "odd.pth"
        make(run.checkpoint, state)

    return change


def with_values(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Run], None]:
    """A checkpoint with other values under the names, '__' standing for a dot."""

    def make(path: Path, state: dict) -> None:
        for name, change in changes.items():
            state[name.replace("__", ".")] = change(state[name.replace("__", ".")])
        torch.save(state, path)

    return checkpoint_file(make)


def cut(path: Path, state: dict) -> None:
    torch.save(state, path)
    os.truncate(path, 100_000)


def without_bias(path: Path, state: dict) -> None:
    del state["conv1.1.bias"]
    torch.save(state, path)


def empty_places(run: Run) -> None:
    for file in (run.root / "ood_data/Places/images").iterdir():
        file.unlink()


class Hostile:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.folder,)


UNSAFE = "odd.pth is not a checkpoint that can be loaded safely"
INPUTS: dict[str, tuple[Callable[[Run], object], list[str], str]] = {
    "empty-image": (
        sun(lambda path: path.write_bytes(b"")),
        [],
        "sun-1.jpg cannot be read as an image",
    ),
    "text-image": (
        sun(lambda path: path.write_text("words")),
        [],
        "sun-1.jpg cannot be read as an image",
    ),
    "image-cut-in-its-header": (
        sun(lambda path: os.truncate(path, 20)),
        [],
        "sun-1.jpg cannot be read as an image",
    ),
    "image-cut-in-its-tables": (
        sun(lambda path: os.truncate(path, 200)),
        [],
        "sun-1.jpg cannot be read as an image",
    ),
    "image-cut-near-its-end": (
        sun(lambda path: os.truncate(path, path.stat().st_size - 99)),
        [],
        "image file is truncated",
    ),
    "image-bomb": (
        sun(lambda path: path.write_bytes(png_that_claims(60_000, 60_000))),
        [],
        "could be decompression bomb",
    ),
    "image-bomb-that-pil-warns-of": (
        sun(lambda path: path.write_bytes(png_that_claims(10_000, 10_000))),
        [],
        "sun-1.jpg cannot be read as an image",
    ),
    "image-is-a-web-page": (
        sun(lambda path: path.write_text("<html>404</html>")),
        [],
        "sun-1.jpg cannot be read as an image: it is in none of the formats",
    ),
    "image-is-postscript": (
        sun(lambda path: Image.new("L", (9, 9)).save(path, "EPS")),
        [],
        "sun-1.jpg cannot be read as an image: it is in none of the formats",
    ),
    "image-is-a-thread": (
        sun(lambda path: Image.new("L", (1, 150_000)).save(path, "PNG")),
        [],
        "too thin to resize",
    ),
    "folder-named-like-an-image": (
        sun(instead(Path.mkdir)),
        ["--ood", "x={root}/" + SUN],
        "sun-1.jpg holds no images",
    ),
    "dangling-link": (
        sun(instead(lambda path: path.symlink_to("gone"))),
        [],
        "sun-1.jpg cannot be read: No such file",
    ),
    "link-to-itself": (sun(instead(lambda path: path.symlink_to(path))), [], "symbolic links"),
    "link-loop": (
        sun(instead(lambda path: path.symlink_to(".."))),
        [],
        "links back to a folder that holds it; remove that link",
    ),
    "empty-folder": (empty_places, [], "Places/images holds no images"),
    "no-id-folder": (
        nothing,
        ["--id-dir", "{root}/nowhere"],
        "nowhere cannot be listed: No such file or directory",
    ),
    "id-folder-is-a-file": (
        nothing,
        ["--id-dir", "{root}/" + SUN],
        "sun-1.jpg cannot be listed: Not a directory",
    ),
    "no-ood-folder": (
        nothing,
        ["--ood", "mine={root}/nowhere"],
        "nowhere cannot be listed: No such file or directory",
    ),
    "no-calibration-folder": (
        nothing,
        ["--calibration-dir", "{root}/nowhere"],
        "nowhere cannot be listed",
    ),
    "no-checkpoint": (checkpoint_file(lambda path, _: None), [], "no checkpoint at"),
    "checkpoint-is-text": (checkpoint_file(lambda path, _: path.write_text("words")), [], UNSAFE),
    "checkpoint-runs-code": (
        checkpoint_file(lambda path, _: torch.save(Hostile(path.with_suffix(".made")), path)),
        [],
        UNSAFE,
    ),
    "checkpoint-is-cut": (checkpoint_file(cut), [], UNSAFE),
    "checkpoint-is-empty": (checkpoint_file(lambda path, _: path.touch()), [], UNSAFE),
    "checkpoint-is-a-folder": (checkpoint_file(lambda path, _: path.mkdir()), [], UNSAFE),
    "checkpoint-is-an-image": (
        checkpoint_file(lambda path, _: Image.new("L", (9, 9)).save(path, "PNG")),
        [],
        UNSAFE,
    ),
    "checkpoint-is-a-bare-pickle": (
        checkpoint_file(
            lambda path, _: path.write_bytes(pickle.dumps(Hostile(path.with_suffix(".made"))))
        ),
        [],
        UNSAFE,
    ),
    "checkpoint-is-a-network": (
        checkpoint_file(lambda path, _: torch.save(torch.nn.Linear(2, 2), path)),
        [],
        UNSAFE,
    ),
    "checkpoint-is-a-tensor": (
        checkpoint_file(lambda path, _: torch.save(torch.zeros(3), path)),
        [],
        "odd.pth holds no state dict",
    ),
    "checkpoint-of-integers": (
        with_values(fc__bias=lambda v: v.to(torch.int8)),
        [],
        "fc.bias is torch.int8, wanted torch.float32",
    ),
    "checkpoint-expanded": (
        with_values(fc__bias=lambda v: v[:1].expand(10**12)),
        [],
        "fc.bias is no plain tensor",
    ),
    "checkpoint-infinite": (
        with_values(fc__bias=lambda v: v / 0),
        [],
        "odd.pth: fc.bias holds NaN or infinite",
    ),
    "arch-without-head": (
        nothing,
        ["--arch", "squeezenet1_0"],
        "squeezenet1_0 does not end in a linear layer",
    ),
    "checkpoint-of-another": (
        nothing,
        ["--arch", "mobilenet_v2"],
        "small.pth is not a checkpoint of mobilenet_v2",
    ),
    "checkpoint-without-a-key": (
        checkpoint_file(without_bias),
        [],
        "odd.pth is not a checkpoint of shufflenet_v2_x0_5: missing conv1.1.bias",
    ),
    "checkpoint-with-nan": (
        with_values(fc__bias=lambda v: v * float("nan")),
        [],
        "odd.pth: fc.bias holds NaN",
    ),
    "head-of-another-width": (
        with_values(fc__weight=lambda v: v[:, :9]),
        [],
        "fc.weight is (1000, 9), wanted (1000, 1024)",
    ),
    "activations-overflow": (
        with_values(conv5__1__weight=lambda v: v + 1e38, conv5__1__bias=lambda v: v + 3.3e38),
        [],
        "gives NaN or infinite logits",
    ),
    "cache-dir-is-a-file": (lambda run: run.caches.write_text("a file"), [], "cache"),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_an_input_that_is_not_right(kind, run):
    change, arguments, message = INPUTS[kind]
    change(run)
    assert message in run.refusal(*(argument.format(root=run.root) for argument in arguments))
    with pytest.raises(BadCache):
        cache.datasets(run.folder)
    assert not run.checkpoint.with_suffix(".made").exists()


@pytest.mark.parametrize(
    ("workers", "image", "unfinished"),
    [
        (0, "dtd/images/zigzagged/zigzagged_1.jpg", "Textures"),
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
    assert not (run.folder / "Textures.json").exists()
    path.write_bytes(whole)
    os.utime(path, (times.st_atime, times.st_mtime))
    assert run("--workers", workers) == 0
    assert run.contents() == reference


@pytest.mark.parametrize("name", ["line\nbreak.jpg", os.fsdecode(b"caf\xe9.jpg")])
def test_an_unreadable_image_with_an_odd_name_is_named_on_one_line(name, run):
    (run.root / "ood_data" / "SUN" / "images" / name).write_bytes(b"words")
    assert "cannot be read as an image" in run.refusal()


def test_unknown_names_list_the_known_ones(run):
    assert run("--arch", "resnet51") == 2
    assert "resnet50," in run.err
    assert (
        run.raw(
            "--data-root",
            run.root,
            "--cache-dir",
            run.caches,
            "--arch",
            "resnet18",
            "--weights",
            "V9",
        )
        == 2
    )
    assert "resnet18 has no weights 'V9'; known: IMAGENET1K_V1" in run.err
    # torchvision's name for whatever is newest: another network after an update, and not the
    # published one.
    assert run.raw("--data-root", run.root, "--cache-dir", run.caches, "--weights", "DEFAULT") == 2
    assert "resnet50 has no weights 'DEFAULT'; known: IMAGENET1K_V1, IMAGENET1K_V2" in run.err
    assert not [*run.caches.rglob("*.npy")]


@pytest.mark.parametrize("what", ["image", "image folder", "cache folder", "checkpoint"])
def test_no_permission(what, checkpoint, public_folder, unprivileged):
    log = public_folder / "log"
    log.touch()
    log.chmod(0o666)
    shutil.copy(checkpoint, public_folder / "small.pth")
    root = make_data_root(public_folder)
    run = Run(root, public_folder / "small.pth", public_folder)
    if what != "cache folder":
        run.caches.mkdir()
        run.caches.chmod(0o777)
    locked = {
        "image": root / "ood_data/SUN/images/sun-1.jpg",
        "image folder": root / "ood_data/SUN/images",
        "cache folder": run.caches,
        "checkpoint": run.checkpoint,
    }[what]
    if what != "cache folder":
        locked.chmod(0)
    unprivileged()
    line = run.refusal()
    assert "Permission denied" in line
    assert str(locked) in line


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in INPUTS
        if "checkpoint" in kind or kind in ("arch-without-head", "cache-dir-is-a-file")
    ],
)
def test_what_takes_no_time_is_refused_before_images_are_listed(kind, run, monkeypatch):
    change, arguments, message = INPUTS[kind]
    change(run)
    listed = "images were listed, which can take minutes"
    monkeypatch.setattr(build, "open_source", lambda *_: pytest.fail(listed))
    assert message in run.refusal(*arguments)


def test_an_image_that_vanished_after_listing(run, monkeypatch):
    listing = build.open_source

    def then_removed(*arguments: Any) -> Images:
        found = listing(*arguments)
        (run.root / SUN).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(build, "open_source", then_removed)
    monkeypatch.setattr(
        get_activation, "locate", lambda *_: {"id": Place(str((run.root / SUN).parent))}
    )
    assert (
        "sun-1.jpg cannot be read as an image: No such file or directory; restore it or leave"
        in run.refusal()
    )


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
    monkeypatch.setattr(FileReader, "pixels", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
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


def _edit(**changes: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        sidecar = run.sidecar("SUN")
        for key, value in changes.items():
            sidecar[key] = {**sidecar[key], **value} if isinstance(value, dict) else value
        (run.folder / "SUN.json").write_text(json.dumps(sidecar))

    return change


def _other_weights(run: Run) -> None:
    state = torch.load(run.checkpoint, weights_only=True)
    state["conv1.0.weight"][0, 0, 0, 0] += 1e-3
    run.checkpoint = run.caches.parent / "small.pth"
    torch.save(state, run.checkpoint)


def array(change: Callable[[Path], object]) -> Callable[[Run], None]:
    return lambda run: change(run.folder / "SUN.npy") and None


CACHES: dict[str, tuple[Callable[[Run], object], list[str], list[str]]] = {
    "other-weights": (
        _other_weights,
        [],
        ["Places.npy is of something else: network sha256", "--overwrite", "another --name"],
    ),
    "other-precision": (
        nothing,
        ["--precision", "bf16"],
        ["precision 'fp32' in the cache, 'bf16' now", "--overwrite"],
    ),
    "other-resize": (
        _edit(preprocessing={"resize": 232}),
        [],
        ["SUN.npy", "preprocessing resize 232 in the cache, 36 now"],
    ),
    "other-mean": (
        _edit(preprocessing={"mean": [0.5, 0.5, 0.5]}),
        [],
        ["SUN.npy", "preprocessing mean"],
    ),
    "other-architecture": (
        _edit(network={"arch": "resnet18"}),
        [],
        ["SUN.npy", "network arch 'resnet18' in the cache"],
    ),
    "one-more-file": (
        sun(lambda path: write_image(path.with_name("new.jpg"))),
        [],
        ["SUN.npy", "files: 1 new, such as new.jpg"],
    ),
    "one-file-less": (sun(Path.unlink), [], ["SUN.npy", "other files: 1 gone, such as sun-1.jpg"]),
    "one-renamed": (
        sun(lambda path: path.rename(path.with_name("z.jpg"))),
        [],
        ["1 gone, such as sun-1.jpg and 1 new, such as z.jpg"],
    ),
    "one-changed": (
        sun(lambda path: write_image(path, (60, 60))),
        [],
        ["SUN.npy", "the same names, but other file sizes"],
    ),
    "one-replaced": (
        sun(lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?")),
        [],
        ["SUN.npy", "the same names and sizes, but other content"],
    ),
    "other-calibration-images": (
        nothing,
        ["--calibration-per-class", "1"],
        ["calibration.npy", "other files: 2 gone"],
    ),
    "other-ood-folder": (
        nothing,
        ["--ood", "SUN={root}/ood_data/Places/images"],
        ["SUN.npy", "gone, such as sun-0.jpg"],
    ),
    "array-cut": (
        array(lambda path: os.truncate(path, 3000)),
        [],
        ["SUN.npy has 3000 bytes, wanted", "--overwrite"],
    ),
    "array-object": (
        array(lambda path: np.save(path, np.full((2, 1024), None), allow_pickle=True)),
        [],
        ["SUN.npy holds object", "--overwrite"],
    ),
    "array-fortran": (
        array(lambda path: np.save(path, np.zeros((1024, 2), "<f4").T)),
        [],
        ["SUN.npy holds float32(2, 1024) in Fortran order", "--overwrite"],
    ),
    "array-of-another-shape": (
        array(lambda path: np.save(path, np.zeros((3, 1024), "<f4"))),
        [],
        ["SUN.npy has shape (3, 1024), its .json says (2, 1024)", "--overwrite"],
    ),
    "array-missing": (array(Path.unlink), [], ["SUN.npy cannot be read", "--overwrite"]),
    "array-double": (
        array(lambda path: np.save(path, np.zeros((2, 1024)))),
        [],
        ["SUN.npy holds float64", "--overwrite"],
    ),
    "newer-format": (_edit(format=2), [], ["SUN.json has format 2", "update this program"]),
    "sidecar-with-other-paths": (
        _edit(paths=["a.jpg"]),
        [],
        ["SUN.json is damaged: its 'paths'", "--overwrite"],
    ),
    "sidecar-with-other-count": (
        _edit(images=3),
        [],
        ["SUN.json is damaged: its 'paths'", "--overwrite"],
    ),
    "sidecar-with-other-channels": (
        _edit(network={"channels": 7}),
        [],
        ["SUN.npy has shape (2, 1024), its .json says (2, 7)"],
    ),
    "sidecar-cut": (
        lambda run: os.truncate(run.folder / "SUN.json", 50),
        [],
        ["SUN.json cannot be read", "--overwrite"],
    ),
    "sidecar-empty": (
        lambda run: os.truncate(run.folder / "SUN.json", 0),
        [],
        ["SUN.json cannot be read", "--overwrite"],
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_of_something_else_is_refused_and_left_alone(kind, run, reference):
    change, arguments, messages = CACHES[kind]
    run.has(reference)
    change(run)
    before = run.contents()
    line = run.refusal(*(argument.format(root=run.root) for argument in arguments))
    for message in messages:
        assert message in line
    assert run.contents() == before


@pytest.mark.parametrize("kind", ["other-weights", "other-precision", "array-cut", "newer-format"])
def test_overwrite_replaces_all_of_it(kind, run, reference, tmp_path):
    change, arguments, _ = CACHES[kind]
    run.has(reference)
    change(run)
    assert run("--overwrite", *arguments) == 0
    assert run(*arguments, caches=tmp_path / "fresh") == 0
    assert run.contents() == run.contents(tmp_path / "fresh" / "imagenet" / ARCH)
    assert "cached already" not in run.err


def test_overwrite_leaves_nothing_of_another_network(run):
    assert run("--odin") == 0
    _other_weights(run)
    line = run.refusal("--overwrite")
    assert "odin/" in line
    assert "ask for that set too, or give another --name" in line
    assert run("--overwrite", "--odin") == 0
    now = run.sidecar("id")["network"]["sha256"]
    for sidecar in run.folder.rglob("*.json"):
        assert json.loads(sidecar.read_text())["network"]["sha256"] == now, sidecar


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 98.00 MiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_device_too_small_for_the_network_is_one_line(run, monkeypatch, error):
    def exhausted(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch.nn.Module, "to", exhausted)
    line = run.refusal("--calibration-per-class", 0)
    assert line == "the device has too little memory; give another --device, such as cpu\n"


def test_another_name_is_another_cache(run, reference):
    run.has(reference)
    before = run.contents()
    _other_weights(run)
    assert run("--name", "changed") == 0
    assert run.contents() == before
    assert run.contents(run.caches / "imagenet" / "changed")["id.npy"] != before["id.npy"]


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


# ---- the script as users start it ----


def test_the_plain_command_on_a_fresh_clone(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for folder, source in SOURCES.items():
        assert f"datasets/{folder}" in done.stderr
        assert source in done.stderr
    assert "python get_activation.py --benchmark digits" in done.stderr
    assert [*tmp_path.iterdir()] == []
