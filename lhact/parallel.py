"""A function and items in, its results in the order of the items out, computed on all of the CPU's cores."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def _one_thread() -> None:
    torch.set_num_threads(1)


def each(function: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """Yields function(item) for each item, in order. On a CPU as many items are in work as torch has threads, one thread to each;
    on a GPU one after the other.

    Threads that share out items are faster than threads that share out each operation, and what they compute does not depend on
    their number. Items are taken as they are needed, a few ahead. Modes such as torch.inference_mode are a thread's own: the
    function sets those that it needs. An exception ends the iteration; what is in work then is waited for.
    """
    if device.type != "cpu":
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, initializer=_one_thread) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                # One more for each thread, so that none is idle while a result is used.
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            # The initializer has also set what later threads begin with.
            torch.set_num_threads(threads)
