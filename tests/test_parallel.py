"""lhact.parallel: the order, the threads, how far it reads ahead, and what an exception leaves."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lhact.parallel import map_ordered

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[2], autouse=True)
def threads(request) -> Iterator[int]:
    """The number of torch's threads; the test must leave neither another number nor a thread."""
    before, running = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(request.param)
    yield request.param
    assert threading.active_count() == running
    assert torch.get_num_threads() == request.param
    with ThreadPoolExecutor(1) as pool:  # a new thread begins with what was set last
        assert pool.submit(torch.get_num_threads).result() == request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("count", [0, 1, 20])
def test_results_have_the_order_of_the_items(threads, count):
    def slow_at_first(item: int) -> int:
        time.sleep(0.001 * (count - item))
        return item * item

    assert list(map_ordered(slow_at_first, range(count), CPU)) == [i * i for i in range(count)]


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_as_many_items_at_once_as_threads_and_one_thread_for_each(threads):
    barrier = threading.Barrier(3, timeout=20)

    def meet(item: int) -> int:
        barrier.wait()  # raises unless three items are computed at once
        return torch.get_num_threads()

    assert list(map_ordered(meet, range(9), CPU)) == [1] * 9


def test_on_a_gpu_the_calling_thread_computes_item_by_item():
    here, taken = threading.get_ident(), []
    items = (taken.append(item) or item for item in range(3))
    results = map_ordered(lambda item: (threading.get_ident(), item), items, GPU)
    assert taken == []
    assert next(results) == (here, 0)
    assert taken == [0]
    assert list(results) == [(here, 1), (here, 2)]


def test_items_are_taken_when_they_are_needed():
    """A million batches of activations must never be in memory together."""
    taken = []
    items = (taken.append(item) or item for item in range(1000))
    results = map_ordered(lambda item: item, items, CPU)
    for used in range(100):
        assert next(results) == used
        assert len(taken) <= used + 2 * 2
    results.close()
    assert len(taken) <= 103


@pytest.mark.parametrize("where", ["function", "items"])
def test_an_exception_comes_at_its_place(where):
    def function(item: int) -> int:
        if where == "function" and item == 5:
            raise KeyError(item)
        return item

    def items() -> Iterator[int]:
        for item in range(1000):
            if where == "items" and item == 8:
                raise KeyError(5)
            yield item

    found = []
    with pytest.raises(KeyError, match="5"):
        found.extend(map_ordered(function, items(), CPU))
    assert found == list(range(5))


def test_after_the_end_no_further_item_is_computed():
    begun, release = [], threading.Event()

    def function(item: int) -> int:
        begun.append(item)
        return item if item == 0 or release.wait(20) else -1

    results = map_ordered(function, range(1000), CPU)
    assert next(results) == 0
    # Items 1 and 2 are being computed, 3 waits for a thread.
    timer = threading.Timer(0.2, release.set)
    timer.start()
    results.close()
    timer.join()
    assert 3 not in begun
