"""The embedded benchmark: what it writes, the same every time, and only complete ones are used."""

import functools
import hashlib
import os
import re
import shutil
from contextlib import contextmanager
from math import erf, erfc, exp, pi
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from torchvision import transforms

from lhact.benchmarks import digits
from lhact.benchmarks.builtin import BENCHMARKS
from lhact.extraction import networks
from lhact.messages import InputError

COUNTS = {"train": 636, "test": 628, "held-out": 533, "photographs": 320, "noise": 400}
BENCHMARK = BENCHMARKS["digits"]
prepare = functools.partial(digits.prepare, preprocessing=BENCHMARK.preprocessing)


@pytest.fixture(scope="module")
def barely_trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("barely-trained")
    prepare(root, epochs=1)
    return root


@pytest.fixture
def own_copy(barely_trained, tmp_path) -> Path:
    """A data root whose files may be moved and removed."""
    shutil.copytree(barely_trained, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    return tmp_path


@contextmanager
def unchanged():
    """With another number of threads than conftest's; both random states and it must stay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), torch_state)
    pairs = zip(np.random.get_state(), numpy_state, strict=True)
    assert all(np.array_equal(now, before) for now, before in pairs)


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_the_folders_are_those_of_the_benchmark(barely_trained, tmp_path):
    sets = (BENCHMARK.id, BENCHMARK.calibration, *BENCHMARK.ood.values())
    assert {image_set.places[0] for image_set in sets} == {f"digits/{name}" for name in COUNTS}
    assert (barely_trained / BENCHMARK.checkpoint).is_file()
    names = {path.name for path in (barely_trained / "digits").iterdir()}
    assert names == {*COUNTS, Path(BENCHMARK.checkpoint).name}
    assert [path.name for path in barely_trained.iterdir()] == ["digits"]
    (tmp_path / "plain").mkdir()
    modes = [folder.stat().st_mode for folder in (barely_trained / "digits", tmp_path / "plain")]
    assert modes[0] == modes[1], "other users cannot read it"


def test_every_scan_is_in_one_set_with_its_own_pixels_and_digit(barely_trained):
    scans = load_digits()
    found = {}
    for name in ("train", "test", "held-out"):
        for path in (barely_trained / "digits" / name).rglob("*.png"):
            index = int(path.stem)
            assert index not in found
            found[index] = name
            with Image.open(path) as image:
                assert image.mode == "L"
                written = np.asarray(image).astype(int).ravel()
            # The nearest integer to 255/16 of the scan's 0 to 16; a half never occurs.
            assert ((scans.data[index].astype(int) * 255 + 8) // 16).tolist() == written.tolist()
            assert path.parent.name == str(scans.target[index])
            assert (name == "held-out") == (scans.target[index] in (7, 8, 9))
    assert sorted(found) == list(range(1797))
    # The other writers begin with the eighth series; its first 0 is lost, so 1, 2, 3 come first.
    assert scans.target[906:909].tolist() == [1, 2, 3]
    assert max(index for index, name in found.items() if name == "train") < 906
    assert min(index for index, name in found.items() if name == "test") >= 906


def test_no_image_is_in_two_sets(barely_trained):
    hashes = {}
    for name in COUNTS:
        paths = (barely_trained / "digits" / name).rglob("*.png")
        hashes[name] = {hashlib.sha256(path.read_bytes()).digest() for path in paths}
    assert {name: len(found) for name, found in hashes.items()} == COUNTS
    assert len(set().union(*hashes.values())) == sum(COUNTS.values())


def test_photographs_are_where_their_names_say(barely_trained):
    photographs = {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    for path in (barely_trained / "digits/photographs").iterdir():
        parts = re.fullmatch(r"(china|flower)-y(\d{3})-x(\d{3})\.png", path.name).groups()
        y, x = (int(part) for part in parts[1:])
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("RGB", (40, 40))
            assert np.array_equal(image, photographs[parts[0]][y : y + 40, x : x + 40])


# Deviation of a normal variable z clipped to half a deviation on both sides. With a = 1/2 its
# variance is P(|z| < a) - 2 a pdf(a) + a^2 P(|z| > a).
CLIPPED = (erf(8**-0.5) - exp(-1 / 8) / (2 * pi) ** 0.5 + erfc(8**-0.5) / 4) ** 0.5


@pytest.mark.parametrize(("kind", "deviation"), [("gaussian", CLIPPED), ("uniform", 12**-0.5)])
@pytest.mark.parametrize("side", [8, 40])
def test_noise_has_the_moments_of_its_kind(barely_trained, kind, deviation, side):
    paths = sorted((barely_trained / "digits/noise").glob(f"{kind}-{side}-*.png"))
    values = np.stack([np.asarray(Image.open(path)) for path in paths]) / 255
    assert values.shape == (100, side, side)
    # Of 6,400 values or more, the standard errors of both are at most 0.005.
    assert values.mean() == pytest.approx(0.5, abs=0.01)
    assert values.std() == pytest.approx(deviation, abs=0.01)


def test_two_calls_write_the_same_bytes_whatever_the_random_state(barely_trained, tmp_path):
    torch.manual_seed(123)
    np.random.seed(123)
    with unchanged():
        prepare(tmp_path, epochs=1)
    assert contents(tmp_path) == contents(barely_trained)


def test_a_second_call_does_nothing(own_copy, monkeypatch):
    for step in ("_write_scans", "_write_photographs", "_write_noise", "_train"):
        monkeypatch.setattr(digits, step, lambda *_: pytest.fail("the benchmark was made anew"))
    # Files that are no images do not count.
    (own_copy / "digits/.DS_Store").touch()
    (own_copy / "digits/train/0/._0000.png").touch()
    before = {path: path.stat().st_mtime_ns for path in own_copy.rglob("*")}
    prepare(own_copy)
    assert {path: path.stat().st_mtime_ns for path in own_copy.rglob("*")} == before


@pytest.mark.parametrize(
    ("module", "name", "error", "said"),
    [
        (
            digits,
            "_write_photographs",
            OSError(28, "No space left"),
            "[Errno 28] No space left: '{}'",
        ),
        (digits.functional, "cross_entropy", KeyboardInterrupt("stop"), "stop"),
        (Path, "rename", OSError("no space left on device"), "no space left on device"),
    ],
)
def test_a_call_that_fails_leaves_nothing_and_can_be_repeated(
    tmp_path, monkeypatch, module, name, error, said
):
    (tmp_path / "id_data").mkdir()
    with monkeypatch.context() as patch, unchanged():
        patch.setattr(module, name, Mock(side_effect=error))
        with pytest.raises(type(error), match=re.escape(said.format(tmp_path / "digits"))):
            prepare(tmp_path, epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["id_data"]
    monkeypatch.setattr(digits, "_train", lambda *_: {})
    prepare(tmp_path)
    assert len(list((tmp_path / "digits").rglob("*.png"))) == sum(COUNTS.values())


def test_what_a_killed_call_left_is_neither_used_nor_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "_train", lambda *_: {})
    left = tmp_path / ".digits-abcdefgh" / "digits" / "train" / "0" / "0000.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half an ima")
    prepare(tmp_path)
    assert left.read_bytes() == b"half an ima"
    assert len(list((tmp_path / "digits").rglob("*.png"))) == sum(COUNTS.values())


def test_an_incomplete_folder_is_named_and_left_alone(own_copy):
    folder = own_copy / "digits"
    (folder / "noise/uniform-8-0099.png").unlink()
    (folder / "train/0/0000.png").rename(folder / "test/0/0000.png")
    (folder / "resnet10.pth").unlink()
    before = contents(own_copy)
    with pytest.raises(InputError) as caught:
        prepare(own_copy)
    assert str(caught.value) == (
        f"{folder} is not complete: train/ holds 635 images, wanted 636; "
        "test/ holds 629 images, wanted 628; noise/ holds 399 images, wanted 400; "
        "resnet10.pth is missing; move it away, and the next run makes it anew"
    )
    assert contents(own_copy) == before


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_something_else_of_that_name_is_left_alone(tmp_path, make):
    make(tmp_path / "digits")
    with pytest.raises(InputError, match="is not complete: train/ holds 0 images, wanted 636"):
        prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


@pytest.mark.parametrize("whole", [True, False])
def test_of_two_calls_at_once_one_writes(tmp_path, monkeypatch, whole):
    def other_process(folder, preprocessing, epochs):
        with monkeypatch.context() as patch:
            patch.setattr(digits, "_train", lambda *_: {"by": torch.tensor(1)})
            prepare(tmp_path)
        if not whole:
            (tmp_path / "digits/resnet10.pth").unlink()
        return {"by": torch.tensor(2)}

    monkeypatch.setattr(digits, "_train", other_process)
    if whole:
        prepare(tmp_path)
        assert torch.load(tmp_path / "digits/resnet10.pth")["by"] == 1
    else:
        with pytest.raises(InputError, match=re.escape("resnet10.pth is missing")):
            prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_the_network_names_the_digits_of_writers_it_never_saw(tmp_path):
    prepare(tmp_path)
    checkpoint = tmp_path / BENCHMARK.checkpoint
    network = networks.build(BENCHMARK.arch, classes=7).eval()
    network.load_state_dict(torch.load(checkpoint))
    # The benchmark's preprocessing, by torchvision: 40 pixels, ImageNet's mean and deviations.
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    preprocess = transforms.Compose([transforms.Resize(40), transforms.ToTensor(), normalise])
    paths = list((tmp_path / "digits/test").rglob("*.png"))
    inputs = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in paths])
    with torch.inference_mode():
        predicted = network(inputs).argmax(dim=1)
    wanted = torch.tensor([int(path.parent.name) for path in paths])
    assert 100 * (predicted == wanted).float().mean() >= 97
