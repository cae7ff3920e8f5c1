"""Settings of every test run, and fixtures that several test files use."""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ARCH,
    Run,
    make_data_root,
    make_network,
    shrink,
    v1_like,
    write_cache,
    write_images,
)
from tqdm import tqdm

import eval as eval_script
from lhact import imagenet

# One thread: the sums are the same on every machine, and a test may fork (a pool of threads does
# not survive that).
torch.set_num_threads(1)
# For the same reason no thread that watches progress bars, and no lock of theirs that a killed
# process could keep for ever.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())


@pytest.fixture(scope="session", name="write_images")
def _write_images() -> Callable[[Path, Iterable[str]], Path]:
    """write_images(folder, names): small JPEG and PNG files, each of them other than the rest."""
    return write_images


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that everybody can enter; pytest's own are for their owner alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def unprivileged(public_folder: Path) -> Iterator[Callable[[], None]]:
    """unprivileged(): from here on the test runs as somebody whom file permissions bind, also where
    the suite runs as root."""
    was = os.geteuid()
    imagenet.wnids()  # read while it can be: the checkout may be for its owner alone
    yield lambda: os.seteuid(was or 65534)
    os.seteuid(was)


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    return make_data_root(tmp_path)


@pytest.fixture(scope="session")
def network() -> torch.nn.Module:
    return make_network(ARCH)


@pytest.fixture(scope="session")
def checkpoint(network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state dict of `network` in a file."""
    path = tmp_path_factory.mktemp("checkpoint") / "small.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def run_eval(capsys) -> Callable[..., tuple[int, str, str]]:
    """run_eval(*arguments) -> (status, stdout, stderr) of eval.py on the CPU."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = eval_script.main(["--device", "cpu", *map(str, arguments)])
        except SystemExit as end:  # argparse
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session", name="write_cache")
def _write_cache() -> Callable[..., Path]:
    return write_cache


@pytest.fixture
def full_run(data_root, checkpoint, tmp_path) -> Run:
    return Run(data_root, checkpoint, tmp_path)


@pytest.fixture
def run(full_run, monkeypatch) -> Run:
    shrink(monkeypatch)
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: None
    )  # no power is cut here, and it is slow
    return full_run


@pytest.fixture(scope="session")
def reference(checkpoint, tmp_path_factory) -> dict[str, bytes]:
    """The files of a plain run that nothing disturbs, by name."""
    place = tmp_path_factory.mktemp("reference")
    plain = Run(make_data_root(place), checkpoint, place)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert plain() == 0
    return plain.contents()


@pytest.fixture(scope="session")
def v1_sets() -> dict[str, np.ndarray]:
    """Activations of six image sets, the ID ones distributed like the published network's; the OOD
    sets' are smaller."""
    rows = {"id": 61, "calibration": 40, "iNaturalist": 30, "SUN": 25, "Places": 20, "Textures": 15}
    return {
        name: v1_like(count, seed) * np.float32(1 if name in ("id", "calibration") else 0.7)
        for seed, (name, count) in enumerate(rows.items())
    }


@pytest.fixture(scope="session")
def v1_head() -> tuple[np.ndarray, np.ndarray]:
    """(weight, bias) of the shape of ResNet-50's, for `v1_sets`."""
    rng = np.random.default_rng(4)
    return rng.normal(0, 0.05, (1000, 2048)).astype(np.float32), rng.normal(0, 1, 1000).astype(
        np.float32
    )


@pytest.fixture
def small_sets() -> dict[str, np.ndarray]:
    """Non-negative activations of 12 channels, many of them 0, of six image sets; the OOD sets' are
    smaller."""
    rng = np.random.default_rng(3)
    shapes = {
        "id": (61, 0.8),
        "calibration": (40, 0.8),
        "iNaturalist": (30, 0.2),
        "SUN": (25, 0.3),
        "Places": (20, 0.4),
    }
    shapes["Textures"] = (15, 0.1)
    return {
        name: np.maximum(rng.normal(mean, 1, (rows, 12)), 0).astype(np.float32)
        for name, (rows, mean) in shapes.items()
    }


@pytest.fixture
def small_head() -> tuple[np.ndarray, np.ndarray]:
    """(weight, bias) of 5 classes for `small_sets`."""
    rng = np.random.default_rng(4)
    return rng.normal(0, 1, (5, 12)).astype(np.float32), rng.normal(0, 1, 5).astype(np.float32)
