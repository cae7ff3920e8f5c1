"""get_activation.py that ends early, by a signal, a failure or a full disk: nothing half-made
passes for whole, nothing is lost."""

import ctypes
import os
import resource
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from helpers import ARCH, WNIDS, Run, fork, make_network, wait
from kill_runs import ENDS, kill_runs

import get_activation
from lhact import cache
from lhact.benchmarks import digits
from lhact.cache import BadCache
from lhact.cache_writer import SetWriter
from lhact.extraction import build
from lhact.extraction.image_sets import FileReader
from lhact.records import SetInfo


def test_a_run_that_ends_between_two_sets_leaves_the_cache_unfinished(run, reference, monkeypatch):
    def ending(folder: Path, dataset: str, info: SetInfo) -> SetWriter:
        if dataset == "Places":
            raise KeyboardInterrupt
        return SetWriter(folder, dataset, info)

    monkeypatch.setattr(build, "SetWriter", ending)
    assert run() == 130
    with pytest.raises(BadCache, match="is unfinished: Places, Textures; give the same"):
        cache.datasets(run.folder)
    monkeypatch.setattr(build, "SetWriter", SetWriter)
    assert run() == 0
    assert run.contents() == reference


@pytest.fixture
def interrupt_at(monkeypatch) -> Callable[[int], list[str]]:
    """interrupt_at(number): Ctrl-C comes when that image is read; the images read, as they are."""

    def interrupt_at(number: int) -> list[str]:
        load, read = FileReader.pixels, []

        def pixels(reader: FileReader, path: str, *rest: object) -> object:
            read.append(path)
            if len(read) == number:
                raise KeyboardInterrupt
            return load(reader, path, *rest)

        monkeypatch.setattr(FileReader, "pixels", pixels)
        return read

    return interrupt_at


def test_ctrl_c_and_again(run, reference, interrupt_at):
    read = interrupt_at(10)
    assert run("--batch-size", 64) == 130
    assert "interrupted; the same command goes on where it stopped" in run.err
    with pytest.raises(BadCache, match="unfinished"):
        cache.datasets(run.folder)
    assert run() == 0
    total = 3 + 4 + 2 + 2 + 2 + 2
    # id (3) and calibration (4) were complete and iNaturalist (2) too; the tenth image was the
    # first of SUN.
    assert len(read) - 10 == total - 9
    assert run.contents() == reference


def test_a_set_goes_on_in_the_middle(run, tmp_path, interrupt_at):
    assert run("--batch-size", 1) == 0
    read = interrupt_at(3)
    caches = tmp_path / "cut"
    assert run("--batch-size", 1, caches=caches) == 130
    assert run("--batch-size", 1, caches=caches) == 0
    # One batch is still with the device when the next is read, so it may have to be read again.
    assert read.count(read[0]) == 1
    assert run.contents(caches / "imagenet" / ARCH) == run.contents()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed. "), "worker (pid 7) is killed."),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (EOFError(), "EOFError"),
    ],
)
def test_a_worker_that_is_killed_is_told_of_wherever_the_run_is(
    error, line, run, reference, monkeypatch
):
    """torch raises in the main process, in the middle of whatever it does."""
    write = SetWriter.write

    def interrupted(writer: SetWriter, *rows: object) -> None:
        write(writer, *rows)
        raise error

    monkeypatch.setattr(SetWriter, "write", interrupted)
    assert f"{line}); often the machine is out of memory: give fewer --workers" in run.refusal()
    monkeypatch.setattr(SetWriter, "write", write)
    assert run() == 0
    assert run.contents() == reference


def test_ended_at_random_moments_and_started_again(run):
    """By SIGKILL, by Ctrl-C and by the death of a worker process; `python tests/kill_runs.py` does
    the same some hundred times."""
    counts = kill_runs(run, kills=32)
    assert sum(counts[how] for how in ENDS) >= 32
    assert min(counts["kill"], counts["interrupt"]) >= 4
    assert counts["kill a worker"] >= 1
    assert counts["not read again"] > 0


def test_two_runs_at_once(run, reference, monkeypatch, tmp_path):
    ready, tell = os.pipe()
    go, release = os.pipe()
    load = FileReader.pixels

    def slow(*arguments):
        os.write(tell, b"!")
        os.read(go, 1)
        return load(*arguments)

    def first() -> int:
        monkeypatch.setattr(FileReader, "pixels", slow)
        return get_activation.main(run.arguments())

    pid = fork(first)
    assert os.read(ready, 1) == b"!"
    before = run.contents()
    assert f"another run is writing to {run.folder}; wait for it" in run.refusal()
    assert "another run is writing to" in run.refusal("--overwrite")
    assert run.contents() == before
    os.write(release, b"!" * 100)
    assert wait(pid) == 0
    assert run.contents() == reference


@pytest.fixture
def few_classes(run, write_images, tmp_path) -> Run:
    """A head of 40 kB and an ID set of 80 kB."""
    run.checkpoint = tmp_path / "ten.pth"
    torch.save(make_network(ARCH, num_classes=10).state_dict(), run.checkpoint)
    write_images(
        run.root / "id_data" / "ILSVRC-2012" / "val" / WNIDS[0], [f"{i}.png" for i in range(17)]
    )
    return run


def said(log: Path, reason: str) -> str:
    """The last line that a run has said, which must be the only one that says why it ended."""
    text = log.read_text()
    assert reason in text
    assert text.count("get_activation.py: ") == 1
    assert "Traceback" not in text
    return text.splitlines()[-1]


def limited(room: int, log: Path, *arguments: object) -> int:
    """The exit status of a run that can write no more than so many bytes to any file."""

    def main() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with log.open("w") as err, redirect_stderr(err):
            return get_activation.main([str(argument) for argument in arguments])

    log.touch()
    return wait(fork(main))


@pytest.mark.parametrize("room", [1_000, 20_000, 60_000])
def test_a_file_that_cannot_grow(room, few_classes, tmp_path):
    run = few_classes
    assert limited(room, tmp_path / "log", *run.arguments()) == 1
    line = said(tmp_path / "log", "File too large")
    assert line.startswith(f"get_activation.py: {run.caches}")
    with pytest.raises(BadCache):
        cache.datasets(run.folder)
    assert run() == 0
    assert run(caches=tmp_path / "fresh") == 0
    assert run.contents() == run.contents(tmp_path / "fresh" / "imagenet" / ARCH)


@pytest.mark.parametrize("room", [16, 56, 96, 120])
def test_a_file_system_too_small_for_the_result(room, few_classes, tmp_path):
    run = few_classes
    run.caches.mkdir()
    log = tmp_path / "log"
    assert run(caches=tmp_path / "fresh") == 0
    wanted = run.contents(tmp_path / "fresh" / "imagenet" / ARCH)

    def mount(options: str, flags: int = 0) -> bool:
        libc = ctypes.CDLL(None, use_errno=True)
        return libc.mount(b"none", str(run.caches).encode(), b"tmpfs", flags, options.encode()) == 0

    def main() -> int:
        # A file system of its own, which nobody else sees and which goes with this process.
        new_namespace, private_recursively, remount = 0x20000, 0x44000, 32
        libc = ctypes.CDLL(None)
        if (
            libc.unshare(new_namespace)
            or libc.mount(b"none", b"/", None, private_recursively, None)
            or not mount(f"size={room}k")
        ):
            return 77
        with log.open("w") as err, redirect_stderr(err):
            assert get_activation.main(run.arguments()) == 1
        try:
            cache.datasets(run.folder)
        except BadCache:
            pass
        else:
            return 2
        assert mount("size=10m", remount)
        assert get_activation.main(run.arguments()) == 0
        return 0 if run.contents() == wanted else 3

    status = wait(fork(main))
    if status == 77:
        pytest.skip("this system lets nobody mount a file system of their own")
    assert status == 0
    assert said(log, "No space left on device").startswith("get_activation.py: ")


@pytest.mark.parametrize("room", [1_000, 200_000])
def test_no_room_for_the_embedded_benchmark(room, tmp_path, monkeypatch):
    """For its larger images, and for its network."""
    monkeypatch.setattr(digits, "_train", lambda *_: {"weight": torch.zeros(10**5)})
    log, data = tmp_path / "log", tmp_path / "data"
    places = ("--data-root", data, "--cache-dir", tmp_path / "cache")
    assert limited(room, log, "--benchmark", "digits", "--workers", 0, *places) == 1
    assert log.read_text() == f"get_activation.py: {data / 'digits'}: File too large\n"
    assert [*data.iterdir()] == []
