"""Several processes, as torchrun starts them, make the cache of one."""

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fork, wait, write_images

import get_activation
from lhact import cache
from lhact.extraction import images, networks
from lhact.extraction.extract import batches
from lhact.extraction.ranks import TEXT_BYTES, RankFailed, Ranks, collect, first_before_others, join, on_first, share, together


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(size: int, function: Callable[[int], int]) -> list[int]:
    """Process ids of `size` ranks that run function(rank)."""
    environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def rank(number: int) -> int:
        os.environ.update(environment, RANK=str(number), LOCAL_RANK=str(number))
        return function(number)

    return [fork(lambda number=number: rank(number)) for number in range(size)]


def run_ranks(size: int, *arguments: object, prepare: Callable[[int], object] = lambda rank: None) -> list[int]:
    """The exit status of get_activation.py on each of `size` ranks; `prepare` runs before, in each rank's own process."""

    def main(rank: int) -> int:
        prepare(rank)
        try:
            return get_activation.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse ends the process itself
            return end.code

    return [wait(process) for process in start(size, main)]


def on_ranks(size: int, function: Callable[[Ranks], bool]) -> list[int]:
    """0 for each of `size` ranks, connected, for which the function is true."""

    def connected(_: int) -> int:
        with join(False, lambda error: str(error) if isinstance(error, LookupError) else None) as ranks:
            return 0 if function(ranks) else 1

    return [wait(process) for process in start(size, connected)]


@pytest.fixture
def plain(data_root, checkpoint):
    images = ["--data-root", data_root, "--workers", 0, "--device", "cpu"]
    return [*images, "--arch", "shufflenet_v2_x0_5", "--checkpoint", checkpoint]


@pytest.fixture
def arguments(plain):
    return [*plain, "--batch-size", 1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the same bytes ----


@pytest.mark.parametrize(("batch_size", "sizes", "odin"), [(1, (2, 3), ["--odin"]), (2, (3,), [])])
def test_any_number_of_ranks_gives_the_same_bytes(tmp_path, plain, capfd, batch_size, sizes, odin):
    """3 + 4 + 2 + 2 + 2 + 2 images: some ranks have more to do than others, some nothing, and the last batch is smaller."""
    arguments = [*plain, "--batch-size", batch_size, *odin]
    assert run_ranks(1, *arguments, "--cache-dir", tmp_path / "1") == [0]
    alone = capfd.readouterr().err
    wanted = contents(tmp_path / "1")
    assert len(wanted) == 1 + 1 + 2 * 6 + (2 * 5 if odin else 0)  # the head, the lock, and two files for each set
    for size in sizes:
        assert run_ranks(size, *arguments, "--cache-dir", tmp_path / str(size)) == [0] * size
        assert contents(tmp_path / str(size)) == wanted
        assert capfd.readouterr().err.replace(f"{tmp_path}/{size}", f"{tmp_path}/1") == alone, "only the first rank speaks"


def test_ranks_share_the_batches_in_turn():
    rows = list(range(8))
    assert [share(Ranks(rank, 3), rows) for rank in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.parametrize(("size", "count"), [(1, 7), (2, 0), (2, 1), (2, 13), (3, 5), (3, 18), (3, 2)])
def test_batches_arrive_in_order_whoever_is_late(size, count):
    rows = np.random.default_rng(0).normal(size=(count, 5)).astype(np.float32)
    cut = batches(count, 3)

    def computed(own: list[range], draw: random.Random):
        for part in own:
            time.sleep(draw.uniform(0, 0.02))
            yield rows[part.start : part.stop].copy()

    def right(ranks: Ranks) -> bool:
        written = []
        for _ in range(2):  # the second time over the same buffers
            own = computed(share(ranks, cut), random.Random(ranks.rank))
            collect(ranks, own, [len(p) for p in cut], 5, torch.device("cpu"), lambda batch: written.append(batch.copy()))
        if ranks.rank > 0:
            return written == []
        return [len(batch) for batch in written] == [len(p) for p in cut] * 2 and all(
            np.array_equal(batch, rows[p.start : p.stop]) for batch, p in zip(written, cut * 2, strict=True)
        )

    assert on_ranks(size, right) == [0] * size


def test_what_the_first_rank_finds_out_all_know():
    found = {"paths": ["ä/\udcff.jpg", "b" * (2 * TEXT_BYTES)], "rows": [0, 2**40], "none": None}

    def right(ranks: Ranks) -> bool:
        known = [on_first(ranks, lambda: found), on_first(ranks, lambda: "c" * TEXT_BYTES), on_first(ranks, lambda: None)]
        return known == [found, "c" * TEXT_BYTES, None]

    assert on_ranks(2, right) == [0, 0]


def test_the_first_of_a_machine_goes_before_the_others(tmp_path):
    def fetch(ranks: Ranks) -> int:
        if ranks.local == 0:
            time.sleep(0.1)
            (tmp_path / "fetched").touch()
        assert (tmp_path / "fetched").exists()
        return 10 + ranks.rank

    assert on_ranks(3, lambda ranks: first_before_others(ranks, lambda: fetch(ranks)) == 10 + ranks.rank) == [0] * 3


# ---- failures ----


def only(rank: int, owner: object, name: str, replacement: object) -> Callable[[int], None]:
    """Replaces something in the process of that rank alone."""
    return lambda number: setattr(owner, name, replacement) if number == rank else None


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_all_ranks_raise_what_one_has_to_say(failing):
    def right(ranks: Ranks) -> bool:
        for _ in range(2):  # the ranks stay connected
            assert together(ranks, lambda: ranks.rank) == ranks.rank
            with pytest.raises(RankFailed) as raised:
                together(ranks, raising(LookupError("no ä\udcff")) if ranks.rank == failing else lambda: None)
            assert str(raised.value) == "no ä\udcff"
        return True

    assert on_ranks(3, right) == [0] * 3


def test_no_rank_leaves_before_the_first_has_spoken(tmp_path):
    def main(rank: int) -> int:
        with join(False, str) as ranks:
            with pytest.raises(RankFailed):
                together(ranks, raising(LookupError("no")))
            if rank == 0:
                time.sleep(0.3)
                (tmp_path / "spoken").touch()
        return 0 if (tmp_path / "spoken").exists() else 1

    assert [wait(process) for process in start(3, main)] == [0] * 3


def test_an_image_that_cannot_be_read_ends_all(tmp_path, arguments, data_root, capfd):
    """The second image of the ID set is the second rank's."""
    path = sorted((data_root / "id_data/ILSVRC-2012/val").rglob("*.JPEG"))[1]
    path.write_bytes(path.read_bytes()[:200])
    assert run_ranks(2, *arguments, "--cache-dir", tmp_path / "2") == [1, 1]
    message = capfd.readouterr().err
    assert message.startswith(f"get_activation.py: {path} cannot be read as an image")
    assert len(message.splitlines()) == 1


def test_a_network_that_one_rank_cannot_load_ends_all(tmp_path, arguments, capfd):
    fail = only(1, networks, "load", raising(networks.BadNetwork("small.pth is not there")))
    assert run_ranks(2, *arguments, "--cache-dir", tmp_path / "2", prepare=fail) == [1, 1]
    assert capfd.readouterr().err == "get_activation.py: small.pth is not there\n"


@pytest.mark.parametrize("method", ["__enter__", "write", "finish"])
def test_a_full_disk_at_the_first_rank_ends_all(method, tmp_path, arguments, capfd):
    full = raising(OSError(errno.ENOSPC, "No space left on device", "id.npy"))
    assert run_ranks(2, *arguments, "--cache-dir", tmp_path / "2", prepare=only(0, cache.Writer, method, full)) == [1, 1]
    assert capfd.readouterr().err == "get_activation.py: id.npy: No space left on device\n"
    with pytest.raises(cache.BadCache, match="unfinished"):
        cache.datasets(tmp_path / "2" / "imagenet" / "shufflenet_v2_x0_5")
    assert run_ranks(2, *arguments, "--cache-dir", tmp_path / "2") == [0, 0]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_bug_shows_one_traceback_and_ends_all(failing, tmp_path, arguments, capfd):
    bug = only(failing, images, "load", raising(ZeroDivisionError("a bug")))
    assert run_ranks(2, *arguments, "--cache-dir", tmp_path / "2", prepare=bug) == [1, 1]
    message = capfd.readouterr().err
    assert message.count("Traceback") == message.count("ZeroDivisionError: a bug") == 1
    assert f"get_activation.py: process {failing} of 2 ended with an error that is not the input's" in message


def test_what_the_first_rank_refuses_ends_all(tmp_path, arguments, capfd):
    for statuses, precision in (([0, 0], "fp32"), ([1, 1], "bf16")):
        assert run_ranks(2, *arguments, "--cache-dir", tmp_path / "2", "--precision", precision) == statuses
    message = capfd.readouterr().err
    assert message.count("precision 'fp32' in the cache, 'bf16' now") == 1
    assert "Traceback" not in message


@pytest.mark.parametrize(("wrong", "said"), [("0", "--batch-size must be at least 1"), ("many", "invalid int value: 'many'")])
def test_a_wrong_command_line_is_said_once(wrong, said, capfd):
    assert run_ranks(2, "--batch-size", wrong) == [2, 2]
    assert capfd.readouterr().err.count(said) == 1


def test_each_rank_takes_the_gpu_of_its_number(monkeypatch):
    with pytest.raises(get_activation.BadArguments, match=r"--device cuda:0 is one GPU for 2 processes; give --device cuda"):
        get_activation._own_device("cuda:0", Ranks(0, 2, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert get_activation._own_device("auto", Ranks(5, 8, 1)) == torch.device("cuda:1")
    with pytest.raises(get_activation.BadArguments, match=r"torch finds 2 GPUs on this machine.*torchrun --nproc-per-node 2"):
        get_activation._own_device("cuda", Ranks(2, 3, 2))


@pytest.mark.parametrize(("ranks", "workers"), [(1, 16), (3, 8), (24, 1), (100, 1)])
def test_the_ranks_of_a_machine_share_its_cores(ranks, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(24)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert get_activation.parse_arguments([]).workers == workers


def test_ctrl_c_ends_all(tmp_path, arguments, capfd):
    told, tell = os.pipe()
    load = images.load

    def main(rank: int) -> int:
        images.load = lambda *rest: os.write(tell, b"!") and load(*rest)
        return get_activation.main([str(argument) for argument in (*arguments, "--cache-dir", tmp_path / "2")])

    processes = start(2, main)
    os.read(told, 1)
    for process in processes:
        os.kill(process, signal.SIGINT)
    # A rank may learn of it from the other before it learns of it itself.
    assert all(wait(process) in (130, 1) for process in processes)
    message = capfd.readouterr().err
    assert "Traceback" not in message
    assert message.count("get_activation.py: ") == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the ranks that torchrun has started in /proc")
def test_torchrun_ends_all_when_one_is_killed(tmp_path, plain, checkpoint):
    own = ["--id-dir", write_images(tmp_path / "own", [f"{i:03}.png" for i in range(240)]), "--ood", f"few={tmp_path / 'few'}"]
    write_images(tmp_path / "few", ["1.png"])
    arguments = [str(argument) for argument in (*plain, *own, "--batch-size", 1)]
    assert run_ranks(1, *arguments, "--cache-dir", tmp_path / "1") == [0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(Path(get_activation.__file__)), *arguments, "--cache-dir", str(tmp_path / "2")]
    folder = tmp_path / "2" / "imagenet" / "shufflenet_v2_x0_5"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*torchrun, *script], stderr=log, stdout=log, start_new_session=True)
        try:
            part = folder / "id.npy.part"
            while not (part.exists() and part.stat().st_size > 40 * 4096):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.002)
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            second = [pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
            os.kill(int(second[0]), signal.SIGKILL)
            assert process.wait(timeout=60) != 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    with pytest.raises(cache.BadCache, match="unfinished"):
        cache.datasets(folder)
    assert run_ranks(3, *arguments, "--cache-dir", tmp_path / "2") == [0] * 3
    assert contents(tmp_path / "2") == contents(tmp_path / "1")
