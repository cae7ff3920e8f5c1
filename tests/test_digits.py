"""The embedded benchmark: what it writes, that it can be repeated, that half of it never passes for whole."""

import hashlib
import os
import re
import runpy
import shutil
from math import erf, erfc, exp, pi
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from lhact.benchmarks import digits
from lhact.benchmarks.builtin import BENCHMARKS, MissingData
from lhact.extraction import extract, images, networks

COUNTS = {"train": 636, "test": 628, "held-out": 533, "photographs": 320, "noise": 400}
BENCHMARK = BENCHMARKS["digits"]


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory) -> Path:
    """A data root with the embedded benchmark in full, its network trained to the end."""
    root = tmp_path_factory.mktemp("datasets")
    digits.prepare(root)
    return root


@pytest.fixture(scope="module")
def barely_trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("barely-trained")
    digits.prepare(root, epochs=1)
    return root


@pytest.fixture
def own_copy(barely_trained, tmp_path) -> Path:
    """A data root whose files may be moved and removed."""
    shutil.copytree(barely_trained, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def two_threads():
    """The number of threads is the caller's choice, here another than conftest's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def untrained(monkeypatch):
    """For tests of everything but the network."""
    monkeypatch.setattr(digits, "_train", lambda folder, progress, epochs: {})


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_importing_it_draws_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    runpy.run_path(digits.__file__)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(now, before) for now, before in zip(np.random.get_state(), numpy_state, strict=True))


def test_the_folders_are_those_of_the_benchmark(barely_trained):
    folders = {image_set.folders[0] for image_set in (BENCHMARK.id, BENCHMARK.calibration, *BENCHMARK.ood.values())}
    assert folders == {f"digits/{name}" for name in COUNTS}
    assert (barely_trained / BENCHMARK.checkpoint).is_file()
    assert {path.name for path in (barely_trained / "digits").iterdir()} == {*COUNTS, Path(BENCHMARK.checkpoint).name}
    assert [path.name for path in barely_trained.iterdir()] == ["digits"]
    for name, count in COUNTS.items():
        assert len(images.list_images(barely_trained / "digits" / name).paths) == count


def test_every_scan_is_in_one_set_with_its_own_pixels_and_digit(barely_trained):
    scans = load_digits()
    found = {}
    for name in ("train", "test", "held-out"):
        for path in (barely_trained / "digits" / name).rglob("*.png"):
            place = int(path.stem)
            assert place not in found
            found[place] = name
            with Image.open(path) as image:
                assert image.mode == "L"
                # 16 v / 255 rounds back to the value of the scan, and the scale is full: 16 becomes 255.
                written = np.asarray(image).astype(int)
            assert ((written * 16 + 127) // 255).ravel().tolist() == scans.data[place].tolist()
            assert ((scans.data[place].astype(int) * 255 + 8) // 16).tolist() == written.ravel().tolist()
            assert path.parent.name == str(scans.target[place])
            assert (name == "held-out") == (scans.target[place] in (7, 8, 9))
    assert sorted(found) == list(range(1797))
    assert max(place for place, name in found.items() if name == "train") < min(
        place for place, name in found.items() if name == "test"
    )


def test_no_image_is_in_two_sets(barely_trained):
    hashes = {
        name: {hashlib.sha256(path.read_bytes()).digest() for path in (barely_trained / "digits" / name).rglob("*.png")}
        for name in COUNTS
    }
    assert {name: len(found) for name, found in hashes.items()} == COUNTS
    assert len(set().union(*hashes.values())) == sum(COUNTS.values())


def test_photographs_are_where_their_names_say(barely_trained):
    photographs = {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    for path in (barely_trained / "digits/photographs").iterdir():
        name, y, x = re.fullmatch(r"(china|flower)-y(\d{3})-x(\d{3})\.png", path.name).groups()
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert image.size == (40, 40)
            assert np.array_equal(image, photographs[name][int(y) :, int(x) :][:40, :40])


# Variance of a normal variable clipped to half a deviation on both sides, a = 1/2: P(|z| < a) - 2 a pdf(a) + a^2 P(|z| > a).
CLIPPED = (erf(8**-0.5) - exp(-1 / 8) / (2 * pi) ** 0.5 + erfc(8**-0.5) / 4) ** 0.5


@pytest.mark.parametrize(("kind", "deviation"), [("gaussian", CLIPPED), ("uniform", 12**-0.5)])
@pytest.mark.parametrize("side", [8, 40])
def test_noise_has_the_moments_of_its_kind(barely_trained, kind, deviation, side):
    paths = sorted((barely_trained / "digits/noise").glob(f"{kind}-{side}-*.png"))
    assert len(paths) == 100
    values = np.stack([np.asarray(Image.open(path)) for path in paths]) / 255
    assert values.shape == (100, side, side)
    # 6,400 values or more: the standard error of the mean is at most 0.0054, that of the deviation less.
    assert values.mean() == pytest.approx(0.5, abs=0.02)
    assert values.std() == pytest.approx(deviation, abs=0.02)


def test_two_calls_write_the_same_bytes_and_leave_the_callers_torch_as_it_was(barely_trained, tmp_path, two_threads):
    torch.manual_seed(123)
    np.random.seed(123)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    epochs_seen = []

    def progress(epochs):
        for epoch in epochs:
            epochs_seen.append(epoch)
            yield epoch

    digits.prepare(tmp_path, progress, epochs=1)
    assert epochs_seen == [0]
    assert contents(tmp_path) == contents(barely_trained)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(now, before) for now, before in zip(np.random.get_state(), numpy_state, strict=True))


def test_a_second_call_does_nothing(barely_trained, monkeypatch):
    def unexpected(*arguments):
        raise AssertionError("the benchmark was made anew")

    for step in ("_write_scans", "_write_photographs", "_write_noise", "_train"):
        monkeypatch.setattr(digits, step, unexpected)
    before = {path: path.stat().st_mtime_ns for path in barely_trained.rglob("*")}
    digits.prepare(barely_trained)
    assert {path: path.stat().st_mtime_ns for path in barely_trained.rglob("*")} == before


@pytest.mark.parametrize(("step", "error"), [("_write_photographs", OSError), ("_train", KeyboardInterrupt)])
def test_an_interrupted_call_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch, step, error):
    def interrupted(*arguments):
        raise error

    (tmp_path / "id_data").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(digits, "_train", lambda folder, progress, epochs: {})
        patch.setattr(digits, step, interrupted)
        with pytest.raises(error):
            digits.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["id_data"]
    monkeypatch.setattr(digits, "_train", lambda folder, progress, epochs: {})
    digits.prepare(tmp_path)
    assert len(images.list_images(tmp_path / "digits").paths) == sum(COUNTS.values())


def test_an_interruption_of_the_training_leaves_nothing(tmp_path, two_threads):
    def progress(epochs):
        raise KeyboardInterrupt

    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        digits.prepare(tmp_path, progress)
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_killed_call_left_is_neither_taken_for_whole_nor_deleted(tmp_path, untrained):
    left = tmp_path / ".digits-abcdefgh" / "digits" / "train" / "0" / "0000.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half an ima")
    digits.prepare(tmp_path)
    assert left.read_bytes() == b"half an ima"
    assert len(images.list_images(tmp_path / "digits").paths) == sum(COUNTS.values())


def test_a_folder_that_is_not_whole_is_named_and_left_alone(own_copy):
    (own_copy / "digits/noise/uniform-8-0099.png").unlink()
    (own_copy / "digits/train/0/0000.png").rename(own_copy / "digits/test/0/0000.png")
    (own_copy / "digits/resnet10.pth").unlink()
    before = contents(own_copy)
    with pytest.raises(MissingData) as caught:
        digits.prepare(own_copy)
    assert str(caught.value) == (
        f"{own_copy / 'digits'} is not whole: train/ holds 635 images, wanted 636; test/ holds 629 images, wanted 628; "
        "noise/ holds 399 images, wanted 400; resnet10.pth is missing; move it away and it is made anew"
    )
    assert contents(own_copy) == before


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_something_else_of_that_name_is_left_alone(tmp_path, make):
    make(tmp_path / "digits")
    with pytest.raises(MissingData, match="is not whole: train/ holds 0 images, wanted 636"):
        digits.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_files_that_are_no_images_do_not_matter(own_copy):
    (own_copy / "digits/.DS_Store").touch()
    (own_copy / "digits/train/0/._0000.png").touch()
    digits.prepare(own_copy)


@pytest.mark.parametrize("whole", [True, False])
def test_of_two_calls_at_once_one_writes(tmp_path, monkeypatch, whole):
    def other_process(folder, progress, epochs):
        with monkeypatch.context() as patch:
            patch.setattr(digits, "_train", lambda folder, progress, epochs: {"by": torch.tensor(1)})
            digits.prepare(tmp_path)
        if not whole:
            (tmp_path / "digits/resnet10.pth").unlink()
        return {"by": torch.tensor(2)}

    monkeypatch.setattr(digits, "_train", other_process)
    if whole:
        digits.prepare(tmp_path)
        assert torch.load(tmp_path / "digits/resnet10.pth")["by"] == 1
    else:
        with pytest.raises(MissingData, match=re.escape("resnet10.pth is missing")):
            digits.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_rename_that_fails_is_reported(tmp_path, untrained, monkeypatch):
    def full(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space left"):
        digits.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_users_can_read_what_it_writes(barely_trained, tmp_path):
    (tmp_path / "plain").mkdir()
    assert (barely_trained / "digits").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_network_names_the_digits_of_writers_it_never_saw(digits_root):
    network = networks.load(BENCHMARK.arch, checkpoint=digits_root / BENCHMARK.checkpoint, preprocessing=BENCHMARK.preprocessing)
    assert (network.description["classes"], network.description["channels"]) == (7, 512)
    preprocessing = images.Preprocessing(**network.preprocessing)
    test = images.list_images(digits_root / "digits/test")
    pixels = torch.stack([torch.tensor(images.Pixels(test, preprocessing)[i]) for i in range(len(test.paths))])
    with torch.inference_mode():
        activations = network.body(extract.normalise(pixels, preprocessing.mean, preprocessing.std))
    assert (activations >= 0).all()
    predicted = (activations @ network.weight.T + network.bias).argmax(dim=1)
    assert 100 * (predicted == torch.tensor(images.labels(test.paths, 7, []))).float().mean() >= 97
