"""One process, or the many that torchrun starts, in; a `Ranks` that keeps them in step out.

The processes (ranks) exchange no arrays: every rank reads its own images and writes its own rows.
They wait for each other, hear of a failure of any of them, and pass small values. PyTorch's
TCPStore, a table that torchrun or rank 0 serves, is enough for that. A process group is not needed:
gloo has threads, beside which a DataLoader must not fork, and nccl needs a GPU for each rank.
"""

import itertools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistError, HashStore, PrefixStore, Store, rendezvous

from lhact.messages import InputError, first_line

T = TypeVar("T")
CONNECTING = timedelta(minutes=10)  # to import torch takes minutes on some shared file systems
LEAVING = 30.0  # seconds that rank 0 waits for the others at the end
PRINTING = 2.0  # seconds that the others leave rank 0 to print why the run has failed
LONGEST_PAUSE = 0.05  # seconds between two looks at the store
LARGEST = 1 << 20  # characters of a value; TCPStore hangs up on one above 8 MiB
FAILURE = 1 << 40  # more arrivals than there can be
_joins = itertools.count()


class RankFailed(InputError):
    """A rank has failed, this one or another; all ranks raise it with the same message."""


class _ConnectionLost(RankFailed):
    """The store is gone, so nobody can be told."""


@dataclass
class Ranks:
    """This process among those of the run; `Ranks()` is a run of one process, and never waits.

    rank: its number, from 0 to size - 1. local: its number on its machine (LOCAL_RANK, or 0).
    All ranks must call `barrier`, `from_first`, `first_on_machine` and `agree` in the same order.
    Any method raises RankFailed if the store is gone. Waiting has no limit: rank 0 may list a
    million files meanwhile, and torchrun ends all ranks when one is killed.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    store: Store = field(default_factory=HashStore, repr=False)
    _barriers: int = field(default=0, init=False, repr=False)

    def check(self) -> None:
        """Raises RankFailed if a rank has failed. It is one request, of about 0.1 ms."""
        if self._ask("check", ["failed"]):
            raise RankFailed(json.loads(self._ask("get", "failed")))

    def barrier(self) -> None:
        """Waits until all ranks are here. Raises RankFailed once one has failed, wherever it is."""
        self._barriers += 1
        self._ask("add", "arrived", 1)
        self._wait(lambda: self._ask("add", "arrived", 0) >= self._barriers * self.size)
        self.check()

    def from_first(self, function: Callable[[], T]) -> T:
        """Rank 0 runs the function while the others wait; all return its result.

        The result is what JSON gives back: tuples become lists. Raises ValueError on rank 0 if it
        has more than 2^20 characters of JSON.
        """
        # No rank can be two barriers ahead of another that has not read its value yet.
        key = f"value {self._barriers % 2}"
        if self.rank == 0:
            text = json.dumps(function())
            if len(text) > LARGEST:
                raise ValueError(f"a value for all ranks must be small, got {len(text)} characters")
            self._ask("set", key, text)
        self.barrier()
        value: T = json.loads(self._ask("get", key))
        return value

    def first_on_machine(self, function: Callable[[], T]) -> T:
        """All ranks run the function, the first of each machine before the others of that machine.

        The others then find what it has downloaded or written.
        """
        if self.local == 0:
            result = function()
        self.barrier()
        return result if self.local == 0 else function()

    def agree(self, value: str, what: str) -> None:
        """Raises RankFailed on all ranks if a rank has another value of `what` than rank 0."""
        if self.from_first(lambda: value) != value:
            self._post(
                f"process {self.rank} sees other {what} than process 0; "
                "all need the same arguments and folders"
            )
        self.barrier()

    def publish(self, key: str, value: int) -> None:
        """Shows a number to the other ranks, in place of the earlier one under that key."""
        self._ask("set", f"{key} of {self.rank}", str(value))

    def published(self, key: str) -> list[int | None]:
        """The latest number of each rank, by rank; None where there is none yet. No waiting."""
        keys = [f"{key} of {rank}" for rank in range(self.size)]
        return [int(self._ask("get", k)) if self._ask("check", [k]) else None for k in keys]

    def _ask(self, operation: str, *arguments: Any) -> Any:
        try:
            return getattr(self.store, operation)(*arguments)
        except DistError as error:
            raise _ConnectionLost(
                "the connection to the other processes is lost: the first one, or its torchrun, "
                "has ended; the same command goes on where this run stopped"
            ) from error

    def _wait(self, ready: Callable[[], bool], seconds: float = math.inf) -> None:
        """Looks again and again; `Store.wait` is deaf to Ctrl-C and warns when its time is over."""
        end, pause = time.monotonic() + seconds, 1e-4
        while not ready() and time.monotonic() < end:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _post(self, message: str) -> None:
        """Tells all ranks of a failure, unless one has been posted, and ends all waiting."""
        self._ask("compare_set", "failed", "", json.dumps(message[: LARGEST // 2]))
        self._ask("add", "arrived", FAILURE)

    def _leave(self, failed: bool) -> None:
        """Rank 0, which may serve the store, leaves after the last request of the others."""
        if self.rank == 0:
            self._ask("set", "first leaves", "")
            self._wait(lambda: self._ask("add", "left", 0) >= self.size - 1, LEAVING)
            return
        if failed:
            self._wait(lambda: self._ask("check", ["first leaves"]))
        self._ask("add", "left", 1)
        if failed:
            time.sleep(PRINTING)


@contextmanager
def join(message: Callable[[Exception], str | None]) -> Iterator[Ranks]:
    """Connects the ranks that torchrun has started; gives `Ranks()` without torchrun.

    message: what to tell the other ranks of an exception that leaves the body; None for a bug.

    The body ends on all ranks or fails on all. A failed rank raises its own exception; the others
    raise RankFailed with its message, from their next call or at the latest where the body ends.
    Ctrl-C on one rank is a failure too. After a bug every rank raises RankFailed, the failed one
    too, which has written the traceback to its own stderr. Several failures have one message, that
    of the first.

    The caller prints after `join` and then ends the process:

        with rank0_prints():
            try:
                with join(message) as ranks:
                    run(ranks)
            except RankFailed as error:
                print(error, file=sys.stderr)

    Torchrun ends all ranks as soon as one has ended with a failure. Therefore, after a failure, the
    others wait until rank 0 has noticed it, without a limit, and leave `join` two seconds later
    than rank 0 may; rank 0 waits for the others at most 30 seconds.
    """
    if not _started_by_torchrun():
        yield Ranks()
        return
    ranks = _connect()
    try:
        yield ranks
        ranks.barrier()
    except _ConnectionLost:
        raise
    except BaseException as error:
        who = f"process {ranks.rank} of {ranks.size}"
        if isinstance(error, RankFailed):
            text: str | None = str(error)
        elif isinstance(error, Exception):
            text = message(error)
        else:
            text = f"{who} was interrupted; the same command goes on where it stopped"
        bug = text is None
        if text is None:
            traceback.print_exception(error, file=sys.__stderr__)
            text = f"{who} ended with an error that is not the input's; its traceback is above"
        with suppress(_ConnectionLost):
            ranks._post(text)
            ranks._leave(failed=True)
        if bug:
            raise RankFailed(text) from error
        raise
    with suppress(_ConnectionLost):
        ranks._leave(failed=False)


def _connect() -> Ranks:
    try:
        store, rank, size = next(rendezvous("env://", timeout=CONNECTING))
        local = int(os.environ.get("LOCAL_RANK") or 0)
    except (RuntimeError, ValueError) as error:
        raise RankFailed(
            f"the processes cannot be connected ({first_line(error)}); use torchrun"
        ) from error
    # Torchrun may keep its store when it starts the ranks again; so does a second `join`.
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {next(_joins)}"
    return Ranks(rank, size, local, PrefixStore(f"lhact {attempt}", store))


def _started_by_torchrun() -> bool:
    """Whether all its variables are set, for several processes; clusters set WORLD_SIZE alone."""
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names) and os.environ["WORLD_SIZE"] != "1"


@contextmanager
def rank0_prints() -> Iterator[None]:
    """Only rank 0 prints in the body; what the others write to sys.stdout or sys.stderr is lost."""
    if not _started_by_torchrun() or os.environ["RANK"] == "0":
        yield
        return
    with (
        open(os.devnull, "w", errors="replace") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        yield


def ranks_on_this_machine() -> int:
    """How many ranks torchrun has started on this machine, which share its cores; else 1."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() else 1


def local_gpu(local: int, visible: int) -> int:
    """The index of the GPU of the rank with that number on its machine, of the `visible` ones.

    A single visible GPU is the rank's own: Slurm can show each process another one as number 0.
    Raises ValueError if there are several GPUs but fewer than ranks.
    """
    if visible == 1:
        return 0
    if local < visible:
        return local
    raise ValueError(
        f"process {local} of this machine needs a GPU of its own, and there are {visible}; start "
        f"one process for each GPU: torchrun --nproc-per-node {visible}"
    )
