"""A function and items in, its results in the order of the items out, computed on all CPU cores."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def map_ordered(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> Iterator[Result]:
    """Yield function(item) for each item, in order.

    device: where the function computes. On a CPU, as many items are computed at once as torch has
    threads, each by one thread on one core: this is faster than sharing out every single operation,
    and the results do not depend on the number of threads. On a GPU, the calling thread computes
    one item after the other.

    Items are taken when they are needed, at most two for each thread ahead of the results. Modes
    such as torch.inference_mode hold for one thread only, so the function must set those it needs.
    An exception in the function or in the items ends the iteration at its place, after the items
    that are being computed have ended.

    >>> list(map_ordered(abs, [-3, 1, -2], torch.device("cpu")))
    [3, 1, 2]
    """
    if device.type != "cpu":
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, initializer=_use_one_thread) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                # Two for each thread, so that no thread is idle while the caller uses a result.
                if len(pending) >= 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            # The initializer has also changed the number that threads started later begin with.
            torch.set_num_threads(threads)
