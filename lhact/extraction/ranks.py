"""One process or many started by torchrun in, one stream of batches in order out, at rank 0.

Every image set is cut into the same batches whoever computes them: rank r of n takes batches r, r + n, r + 2n, ..., and rank 0
receives and writes them in turn, so that the cache does not depend on the number of ranks.

Activations travel from device to device, by nccl between GPUs (which has not been run yet) and by gloo between CPUs; everything
else is text and numbers, by gloo. Nothing is pickled.
"""

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# The first rank may list a million files on a slow disk while the others wait for it. One that has died is not waited for: its
# connections are closed, and torchrun ends the rest.
PATIENCE = timedelta(days=7)
TEXT_BYTES = 1 << 18  # of text at a time


class RankFailed(Exception):
    """A rank has failed, this one or another; the message is that rank's, the same on all of them."""


class Ranks(NamedTuple):
    """This process among those of the run. local: its number on this machine, which is also its GPU's. message: an exception's,
    None for one that nobody expects. buffers: what it exchanges with the others, see `_buffer`."""

    rank: int = 0
    size: int = 1
    local: int = 0
    message: Callable[[Exception], str | None] = str
    buffers: dict[tuple, Tensor] | None = None


@contextmanager
def one_voice() -> Iterator[None]:
    """Lets only the first of the ranks print, whatever its body does; the others are heard when they have a bug."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def join(gpus: bool, message: Callable[[Exception], str | None]) -> Iterator[Ranks]:
    """The ranks that torchrun has started, connected with each other; a single process without torchrun.

    gpus: whether the activations will lie on GPUs. message: what to tell the others of an exception, None where it is a bug.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    with _connected():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")), message, {})
    try:
        yield ranks
        # Torchrun ends all ranks when one has failed: none leaves before the first has said why.
        with suppress(RankFailed):
            _first_failed(ranks, False)
    finally:
        dist.destroy_process_group()
        ranks.buffers.clear()


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise RankFailed(f"a process of this run has ended or cannot be reached ({reason}); start it again to go on") from error


def _buffer(ranks: Ranks, use: str, shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
    """The tensor for that use and shape, the same one every time.

    Only such tensors are exchanged. A thread of gloo lets go of a tensor some time after the exchange; where Python has let go
    before, the thread waits for the interpreter's lock, and destroy_process_group of torch 2.6, which holds it, for the thread
    (pytorch/pytorch#154976).
    """
    if (use, shape) not in ranks.buffers:
        ranks.buffers[use, shape] = torch.zeros(shape, dtype=dtype, device=device)
    return ranks.buffers[use, shape]


def _first_failed(ranks: Ranks, failed: bool) -> int | None:
    """The lowest rank that has failed. Every rank waits here for every other."""
    word = _buffer(ranks, "word", (1,), torch.int64)
    word[0] = ranks.size - ranks.rank if failed else 0
    with _connected():
        dist.all_reduce(word, dist.ReduceOp.MAX)
    return ranks.size - word.item() if word.item() else None


def _tell(ranks: Ranks, value: T, source: int) -> T:
    """The `value` of rank `source`, which must be one that JSON has, on every rank."""
    content = json.dumps(value).encode() if ranks.rank == source else b""
    word = _buffer(ranks, "word", (1,), torch.int64)
    word[0] = len(content)
    piece = _buffer(ranks, "piece", (TEXT_BYTES,), torch.uint8)
    received = bytearray()
    with _connected():
        dist.broadcast(word, source)
        for start in range(0, word.item(), TEXT_BYTES):
            part = content[start : start + TEXT_BYTES]
            piece.numpy()[: len(part)] = np.frombuffer(part, np.uint8)
            dist.broadcast(piece, source)
            if ranks.rank != source:
                received += piece.numpy().tobytes()
    return value if ranks.rank == source else json.loads(received[: word.item()])


def together(ranks: Ranks, function: Callable[[], T]) -> T:
    """Runs `function` on every rank; its result on this one.

    Where it raises on one of several, every rank raises RankFailed with that one's message. One that nobody expects is shown
    there, by the rank that it happened on, with its traceback.
    """
    if ranks.size == 1:
        return function()
    result = error = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    source = _first_failed(ranks, error is not None)
    if source is None:
        return result
    message = None
    if ranks.rank == source:
        message = ranks.message(error)
        if message is None:
            traceback.print_exception(error, file=sys.__stderr__)
            message = f"process {source} of {ranks.size} ended with an error that is not the input's; its traceback is above"
    raise RankFailed(_tell(ranks, message, source)) from error


def on_first(ranks: Ranks, function: Callable[[], T]) -> T:
    """Runs `function` on rank 0 alone; every rank returns its result, which must be one that JSON has, or raises as `together`."""
    result = together(ranks, function if ranks.rank == 0 else lambda: None)
    return result if ranks.size == 1 else _tell(ranks, result, 0)


def first_before_others(ranks: Ranks, function: Callable[[], T]) -> T:
    """Every rank runs `function`, the first of each machine before the others, which then find what it has fetched or written."""
    result = together(ranks, function if ranks.local == 0 else lambda: None)
    others = together(ranks, function if ranks.local > 0 else lambda: None)
    return others if ranks.local > 0 else result


def share(ranks: Ranks, batches: Sequence[T]) -> Sequence[T]:
    """The batches that this rank computes."""
    return batches[ranks.rank :: ranks.size]


@functools.cache
def _exchange_stream(device: torch.device) -> torch.cuda.Stream:
    """Not the one that computes: there a copy would wait for the next batch."""
    return torch.cuda.Stream(device)


def collect(
    ranks: Ranks,
    own: Iterator[np.ndarray],
    sizes: Sequence[int],
    channels: int,
    device: torch.device,
    write: Callable[[np.ndarray], None],
) -> None:
    """Gives all batches of all ranks in order to `write`, at rank 0 alone; every batch is valid until `write` returns.

    own: this rank's batches in the order of its share, (rows, channels) float32. sizes: the rows of every batch of all ranks.
    device: where `own` was computed. Raises RankFailed as `together`.
    """
    if ranks.size == 1:
        for batch in own:
            write(batch)
        return
    stream = torch.cuda.stream(_exchange_stream(device)) if device.type == "cuda" else nullcontext()
    shape = (max(sizes, default=0), channels)
    on_its_way = None

    def arrive() -> None:
        if on_its_way is None:
            return
        work, buffers, first = on_its_way
        with stream, _connected():
            work.wait()
        for buffer, size in zip(buffers, sizes[first:], strict=False):
            with stream:
                rows = buffer[:size].cpu().numpy()
            write(rows)

    def advance() -> np.ndarray | None:
        batch = next(own, None)
        # Only now: the batches of the last round travelled while this one was computed.
        arrive()
        return batch

    for first in range(0, len(sizes), ranks.size):
        batch = together(ranks, advance)
        with stream:
            sent, *received = (
                _buffer(ranks, f"batch {number}", shape, torch.float32, device)
                for number in range(ranks.size + 1 if ranks.rank == 0 else 1)
            )
            if batch is not None:
                sent[: len(batch)].copy_(torch.from_numpy(batch))
            with _connected():
                on_its_way = (dist.gather(sent, received or None, async_op=True), received, first)
    together(ranks, arrive)
