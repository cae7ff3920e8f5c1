"""Several processes, as torchrun starts them, make the cache of one."""

import errno
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import fork, wait, write_images

import get_activation
from lhact import cache
from lhact.cache_writer import SetWriter
from lhact.extraction import build
from lhact.extraction.image_sets import FileReader
from lhact.extraction.ranks import Ranks


def environments(size: int) -> list[dict[str, str]]:
    """What torchrun sets for each of `size` ranks."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    together = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def start(size: int, function: Callable[[int], int]) -> list[int]:
    """Process ids of `size` ranks that run function(rank)."""

    def rank(number: int, environment: dict[str, str]) -> int:
        os.environ.update(environment)
        return function(number)

    return [fork(functools.partial(rank, *both)) for both in enumerate(environments(size))]


def run_ranks(
    size: int, *arguments: object, prepare: Callable[[int], object] = lambda rank: None
) -> list[int]:
    """The exit status of get_activation.py on each of `size` ranks; `prepare` runs before, in each
    rank's own process."""

    def main(rank: int) -> int:
        prepare(rank)
        try:
            return get_activation.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse ends the process itself
            return end.code

    return [wait(process) for process in start(size, main)]


def run_fresh(size: int, *arguments: object) -> list[int]:
    """As `run_ranks`, in new interpreters: a fork of a process that has computed gradients cannot
    compute any, as ODIN has to."""
    script = [sys.executable, get_activation.__file__, *map(str, arguments)]
    started = [subprocess.Popen(script, env={**os.environ, **own}) for own in environments(size)]
    return [process.wait(60) for process in started]


@pytest.fixture
def plain(data_root, checkpoint):
    images = ["--data-root", data_root, "--workers", 0, "--device", "cpu"]
    return [*images, "--arch", "shufflenet_v2_x0_5", "--checkpoint", checkpoint]


@pytest.fixture
def arguments(plain):
    return [*plain, "--batch-size", 1]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def refusals(capfd) -> list[str]:
    """The lines that say why the run ended; all ranks print into one stream."""
    lines = capfd.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("get_activation.py: ")]


# ---- the same bytes ----


@pytest.mark.parametrize(("batch_size", "sizes", "odin"), [(1, (2, 3), ["--odin"]), (2, (3,), [])])
def test_any_number_of_ranks_gives_the_same_bytes(tmp_path, plain, capfd, batch_size, sizes, odin):
    """3 + 4 + 2 + 2 + 2 + 2 images: some ranks have more to do than others, some nothing, and the
    last batch is smaller."""
    arguments = [*plain, "--batch-size", batch_size, *odin]
    run = run_fresh if odin else run_ranks
    assert run(1, *arguments, "--cache-dir", tmp_path / "1") == [0]
    alone = capfd.readouterr().err
    wanted = contents(tmp_path / "1")
    assert len(wanted) == 1 + 2 * 6 + (2 * 5 if odin else 0)  # the head, two files for each set
    for size in sizes:
        assert run(size, *arguments, "--cache-dir", tmp_path / str(size)) == [0] * size
        assert contents(tmp_path / str(size)) == wanted
        assert capfd.readouterr().err.replace(f"{tmp_path}/{size}", f"{tmp_path}/1") == alone, (
            "only the first rank speaks"
        )


def test_each_image_is_read_by_one_rank_alone(tmp_path, arguments):
    def take_notes(rank: int) -> None:
        pixels = FileReader.pixels

        def noted(self: FileReader, path: str, *rest: object) -> object:
            with open(tmp_path / f"read by {rank}", "a") as notes:
                print(self.folder / path, file=notes)
            return pixels(self, path, *rest)

        FileReader.pixels = noted  # in this process alone

    assert run_ranks(2, *arguments, "--cache-dir", tmp_path / "cache", prepare=take_notes) == [0, 0]
    read = [(tmp_path / f"read by {rank}").read_text().splitlines() for rank in range(2)]
    assert len({*read[0], *read[1]}) == 3 + 4 + 2 + 2 + 2 + 2
    assert [len(paths) for paths in read] == [2 + 2 + 4, 1 + 2 + 4]


def only(rank: int, owner: object, name: str, replacement: object) -> Callable[[int], None]:
    """Replaces something in the process of that rank alone."""
    return lambda number: setattr(owner, name, replacement) if number == rank else None


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_an_image_that_cannot_be_read_ends_all(tmp_path, arguments, data_root, capfd):
    """The second image of the ID set is the second rank's."""
    path = sorted((data_root / "id_data/ILSVRC-2012/val").rglob("*.JPEG"))[1]
    path.write_bytes(path.read_bytes()[:200])
    assert run_ranks(2, *arguments, "--cache-dir", tmp_path / "2") == [1, 1]
    (message,) = refusals(capfd)
    assert message.startswith(f"get_activation.py: {path} cannot be read as an image")


@pytest.mark.parametrize("method", ["prepare", "__enter__", "write", "finish"])
def test_a_full_disk_at_the_first_rank_ends_all(method, tmp_path, arguments, capfd):
    full = raising(OSError(errno.ENOSPC, "No space left on device", "id.npy"))
    fail = only(0, SetWriter, method, full)
    assert run_ranks(2, *arguments, "--cache-dir", tmp_path / "2", prepare=fail) == [1, 1]
    assert refusals(capfd) == ["get_activation.py: id.npy: No space left on device"]
    with pytest.raises(cache.BadCache, match="unfinished"):
        cache.datasets(tmp_path / "2" / "imagenet" / "shufflenet_v2_x0_5")
    assert run_ranks(2, *arguments, "--cache-dir", tmp_path / "2") == [0, 0]


def test_what_the_first_rank_refuses_ends_all(tmp_path, arguments, capfd):
    arguments = (*arguments, "--cache-dir", tmp_path / "2")
    assert run_ranks(2, *arguments) == [0, 0]
    assert run_ranks(2, *arguments, "--precision", "bf16") == [1, 1]
    message = capfd.readouterr().err
    assert message.count("precision 'fp32' in the cache, 'bf16' now") == 1
    assert "Traceback" not in message


def test_a_wrong_command_line_is_said_once(capfd):
    assert run_ranks(2, "--batch-size", "many") == [2, 2]
    assert capfd.readouterr().err.count("whole number, at least 1, got 'many'") == 1


def test_each_rank_takes_the_gpu_of_its_number(monkeypatch):
    with pytest.raises(build.BadJob, match="cuda:0 is one GPU for 2 processes; give --device cuda"):
        build.own_device("cuda:0", Ranks(0, 2, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert build.own_device("auto", Ranks(5, 8, 1)) == torch.device("cuda:1")
    with pytest.raises(build.BadJob, match=r"there are 2; .*torchrun --nproc-per-node 2"):
        build.own_device("cuda", Ranks(2, 3, 2))


@pytest.mark.parametrize(
    ("device", "ranks", "workers"),
    [
        *(("cpu", *row) for row in [(1, 16), (3, 8), (24, 1), (100, 1)]),
        *(("cuda", *row) for row in [(1, 16), (2, 10), (3, 6), (8, 1), (24, 1), (100, 1)]),
    ],
)
def test_the_ranks_of_a_machine_share_its_cores(device, ranks, workers, monkeypatch):
    """Beside a GPU, each rank leaves two of its cores to the thread that launches kernels."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(24)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(get_activation, "pick_device", torch.device)
    job, _ = get_activation.parse_job(["--device", device])
    assert job.workers == workers
    given, _ = get_activation.parse_job(["--device", device, "--workers", "5"])
    assert given.workers == 5


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="finds the ranks that torchrun has started in /proc"
)
def test_torchrun_ends_all_when_one_is_killed(tmp_path, plain):
    own = write_images(tmp_path / "own", [f"{i:03}.png" for i in range(240)])
    few = write_images(tmp_path / "few", ["1.png"])
    arguments = [*plain, "--id-dir", own, "--ood", f"few={few}", "--batch-size", 1]
    assert run_ranks(1, *arguments, "--cache-dir", tmp_path / "1") == [0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [get_activation.__file__, *arguments, "--cache-dir", tmp_path / "2"]
    folder = tmp_path / "2" / "imagenet" / "shufflenet_v2_x0_5"
    with open(tmp_path / "log", "w") as log:
        command = [*torchrun, *map(str, script)]
        process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
        try:
            part = folder / "id.npy.part"
            while not (part.exists() and part.stat().st_size > 40 * 4096):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.002)
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            second = next(
                pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
            )
            os.kill(int(second), signal.SIGKILL)
            assert process.wait(timeout=60) != 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    with pytest.raises(cache.BadCache, match="unfinished"):
        cache.datasets(folder)
    assert run_ranks(3, *arguments, "--cache-dir", tmp_path / "2") == [0] * 3
    assert contents(tmp_path / "2") == contents(tmp_path / "1")
