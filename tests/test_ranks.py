"""Real processes wait for each other, fail together and pass small values."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import fork, wait

from lhact.extraction import ranks as module
from lhact.extraction.ranks import RankFailed, Ranks, join, rank0_prints

NAMES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun's
NO = "no ä\udcff\n" + "x" * 100  # a file name may have such characters


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(module, "PRINTING", 0.0)
    monkeypatch.setattr(module, "LEAVING", 1.5)
    for name in (*NAMES, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def outcomes(tmp_path):
    """outcomes(size, body): what body(ranks) gives on each rank, or its error; None if killed.
    on_each_machine: how many ranks one machine has.

    A rank that hangs is ended by the alarm of `fork`, which fails the test.
    """

    def rank(number, local, environment, body):
        os.environ.update(environment, RANK=str(number), LOCAL_RANK=str(local))
        try:
            with join(lambda error: str(error) if isinstance(error, LookupError) else None) as own:
                outcome = body(own)
        except RankFailed as error:
            outcome = f"heard: {error}"
        except BaseException as error:
            outcome = repr(error)
        (tmp_path / str(number)).write_text(json.dumps(outcome))

    def run(size, body, on_each_machine=10):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        settings = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = [
            fork(lambda r=r: rank(r, r % on_each_machine, settings, body)) for r in range(size)
        ]
        ends = {number: wait(process) for number, process in enumerate(processes)}
        assert set(ends.values()) <= {0, -signal.SIGKILL}
        return [None if ends[r] else json.loads((tmp_path / str(r)).read_text()) for r in ends]

    return run


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_get_the_values(size, outcomes):
    value = {"paths": ["ä\udcff.jpg", "b" * 900_000], "rows": [0, 2**60], "none": None}

    def body(ranks):
        assert ranks.published("rows") == [None] * size
        assert ranks.from_first(lambda: value) == value
        for i in range(100):
            assert ranks.from_first(lambda i=i: (i, ranks.rank)) == [i, 0]
        ranks.agree("the same", "images")
        ranks.publish("rows", 7)
        if ranks.rank != 1:
            ranks.publish("rows", 10 * ranks.rank)
            ranks.publish("some", 5)
        ranks.barrier()
        return [ranks.size, ranks.local, ranks.published("rows"), ranks.published("some")]

    wanted = [[0, 7, 20][:size], [5, None, 5][:size]]
    assert outcomes(size, body) == [[size, rank, *wanted] for rank in range(size)]


def test_barriers_wait_for_all_and_are_fast_and_leave_nothing_behind(outcomes, tmp_path):
    def body(ranks):
        seen = []
        for turn in range(2):  # each rank is the last one in one turn
            time.sleep(0.1 * (turn == ranks.rank))
            (tmp_path / f"{turn} {ranks.rank}").touch()
            ranks.barrier()
            seen.append(len(list(tmp_path.glob(f"{turn} *"))))
        start = time.monotonic()
        for _ in range(5000):
            ranks.barrier()
        return [*seen, time.monotonic() - start < 30, ranks.store.num_keys() < 5]

    assert outcomes(2, body) == [[2, 2, True, True]] * 2


def test_the_first_rank_of_each_machine_goes_before_the_others(outcomes, tmp_path):
    def download(ranks):
        place = tmp_path / f"machine {ranks.rank // 2}"
        if ranks.local == 0:
            time.sleep(0.1)
            place.touch()
        return [ranks.rank, place.exists()]

    def body(ranks):
        return [ranks.local, ranks.first_on_machine(lambda: download(ranks))]

    wanted = [[0, [0, True]], [1, [1, True]], [0, [2, True]]]
    assert outcomes(3, body, on_each_machine=2) == wanted


def look_for_ever(ranks):
    while True:
        ranks.check()
        time.sleep(0.01)


CALLS = {
    "check": look_for_ever,
    "barrier": Ranks.barrier,
    "from_first": lambda ranks: ranks.from_first(lambda: 1),
    "first_on_machine": lambda ranks: ranks.first_on_machine(lambda: 1),
    "agree": lambda ranks: ranks.agree("a", "images"),
    "the end of the body": lambda ranks: None,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("others_wait", [True, False])
def test_one_that_fails_ends_all_with_its_message(call, failing, others_wait, outcomes):
    def body(ranks):
        time.sleep(0.2 * ((ranks.rank == failing) == others_wait))
        if ranks.rank == failing:
            raise LookupError(NO)
        CALLS[call](ranks)

    said = [repr(LookupError(NO)) if rank == failing else f"heard: {NO}" for rank in range(3)]
    assert outcomes(3, body) == said


def fail(ranks, errors):
    with rank0_prints():
        if ranks.rank in errors:
            time.sleep(0.2 + 0.3 * ranks.rank)
            if errors[ranks.rank] is KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            raise errors[ranks.rank]
        ranks.barrier()


KILLED = None
BUG = "heard: process {} of 3 ended with an error that is not the input's; its traceback is above"
OTHER = "heard: process 1 sees other images than process 0; all need the same arguments and folders"
LOST = (
    "heard: the connection to the other processes is lost: the first one, or its torchrun, has "
    "ended; the same command goes on where this run stopped"
)
NO_1, NO_2 = LookupError("no 1"), LookupError("no 2")
LONG = LookupError("\U0001f600" * (1 << 20))  # 12 MB of JSON
CASES = {
    "bug of 0": (lambda ranks: fail(ranks, {0: ValueError("0")}), [BUG.format(0)] * 3, "Error: 0"),
    "bug of 1": (lambda ranks: fail(ranks, {1: ValueError("1")}), [BUG.format(1)] * 3, "Error: 1"),
    "large value": (
        lambda r: r.from_first(lambda: "a" * 2**20),
        [BUG.format(0)] * 3,
        "be small, got",
    ),
    "long message": (
        lambda r: fail(r, {2: LONG}),
        [f"heard: {LONG!s:.524288}"] * 2 + [repr(LONG)],
        "",
    ),
    "disagreement": (lambda ranks: ranks.agree("ab"[ranks.rank == 1], "images"), [OTHER] * 3, ""),
    "two": (
        lambda ranks: fail(ranks, {1: NO_1, 2: NO_2}),
        ["heard: no 1", repr(NO_1), repr(NO_2)],
        "",
    ),
    "killed": (lambda r: fail(r, {1: KILLED, 2: NO_2}), ["heard: no 2", KILLED, repr(NO_2)], ""),
    "0 killed": (lambda ranks: fail(ranks, {0: KILLED}), [KILLED, LOST, LOST], ""),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_ranks_hear(case, outcomes, capfd):
    body, said, traceback = CASES[case]
    assert outcomes(3, body) == said
    shown = capfd.readouterr().err
    assert shown.count("Traceback") == bool(traceback)
    assert traceback in shown


@pytest.mark.parametrize("interrupted", [{0}, {1}, {0, 1}])
def test_ctrl_c_ends_all(interrupted, outcomes):
    def body(ranks):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may ignore it
        ranks.barrier()
        if ranks.rank in interrupted:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            ranks.from_first(lambda: time.sleep(50))  # rank 0 works, rank 1 waits for it
        look_for_ever(ranks)

    said = outcomes(2, body)
    own, heard = "KeyboardInterrupt()", "heard: process {} of 2 was interrupted; the same command "
    for rank in range(2):  # where both are interrupted, one may hear of the other first
        assert said[rank] == own or said[rank].startswith(heard.format(1 - rank))
        assert len(interrupted) == 2 or (said[rank] == own) == (rank in interrupted)
    assert own in said


SCRIPT = """
import os, signal, sys, time
from lhact.extraction.ranks import RankFailed, join, rank0_prints
with rank0_prints():
    try:
        with join(str) as ranks:
            ranks.barrier()
            if ranks.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                FAIL
            time.sleep(0.5)
            ranks.barrier()
            print("all well")
    except (RankFailed, LookupError) as error:
        sys.exit(print("said:", error) or 1)
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(("fail", "said"), [("raise LookupError('no')", "said: no\n"), (KILL, "")])
def test_torchrun_ends_all_once_rank_0_has_spoken_and_may_start_them_again(fail, said, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.replace("FAIL", fail))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, "--max-restarts=1", tmp_path / "script.py"],
        env={**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])},
        timeout=60,
        stdout=subprocess.PIPE,
    )
    assert (run.returncode, run.stdout.decode()) == (0, f"{said}all well\n")


@pytest.mark.parametrize("given", [{}, {0: "2"}, {0: "2", 1: "1"}, {0: "2", 1: "1", 2: "x", 3: ""}])
def test_one_process_without_all_of_torchruns_variables(given, monkeypatch, capsys):
    for place, value in given.items():
        monkeypatch.setenv(NAMES[place], value)
    with rank0_prints(), join(str) as ranks:
        print(ranks)
    assert capsys.readouterr().out == "Ranks(rank=0, size=1, local=0)\n"


@pytest.mark.parametrize(("rank", "local"), [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")])
def test_of_all_machines_one_process_prints(rank, local, monkeypatch, capsys):
    """Four processes, two on each machine."""
    values = ("4", rank, "127.0.0.1", "1")
    for name, value in zip((*NAMES, "LOCAL_RANK"), (*values, local), strict=True):
        monkeypatch.setenv(name, value)
    with rank0_prints():
        print("a table")
        print("a remark", file=sys.stderr)
    assert tuple(capsys.readouterr()) == (("a table\n", "a remark\n") if rank == "0" else ("", ""))


def test_variables_that_are_no_numbers(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "two")
    with pytest.raises(RankFailed, match=r"cannot be connected \(invalid literal .*two"), join(str):
        pass


@pytest.mark.parametrize(("text", "ranks"), [("", 1), ("3", 3), ("0", 1), ("two", 1)])
def test_ranks_on_this_machine(text, ranks, monkeypatch):
    assert module.ranks_on_this_machine() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    assert module.ranks_on_this_machine() == ranks


def test_each_rank_takes_the_gpu_of_its_number():
    pairs = {(0, 1): 0, (3, 1): 0, (0, 2): 0, (1, 2): 1}
    assert {pair: module.local_gpu(*pair) for pair in pairs} == pairs
    with pytest.raises(ValueError, match=r"process 2 of .*there are 2; .*--nproc-per-node 2$"):
        module.local_gpu(2, 2)
