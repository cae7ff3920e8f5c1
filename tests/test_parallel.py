"""lhact.parallel: order, threads, how far it runs ahead, and what an exception leaves behind."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from lhact.parallel import each

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(count, threads):
    threads(count)

    def slow_at_first(item: int) -> int:
        time.sleep(0.001 * (20 - item))
        return item * item

    assert list(each(slow_at_first, range(20), CPU)) == [item * item for item in range(20)]


@pytest.mark.parametrize("items", [[], [7]])
def test_few_items(items):
    assert list(each(str, items, CPU)) == [str(item) for item in items]


def test_so_many_at_once_with_one_thread_each(threads):
    threads(3)
    together = threading.Barrier(3, timeout=20)

    def meet(item: int) -> int:
        together.wait()  # breaks unless three are at it at once
        return torch.get_num_threads()

    assert list(each(meet, range(9), CPU)) == [1] * 9
    assert torch.get_num_threads() == 3


def test_on_a_gpu_everything_runs_here_in_turn(threads):
    threads(3)
    here = threading.get_ident()
    taken = []
    results = each(lambda item: (threading.get_ident(), item), iter(lambda: taken.append(0) or len(taken), 4), GPU)
    assert taken == []
    assert next(results) == (here, 1)
    assert len(taken) == 1
    assert list(results) == [(here, 2), (here, 3)]


def test_items_are_taken_as_they_are_needed(threads):
    """A million batches of activations never lie in memory together."""
    threads(2)
    taken = []
    results = each(lambda item: item, (taken.append(item) or item for item in range(1000)), CPU)
    for used in range(100):
        assert next(results) == used
        assert len(taken) <= used + 1 + 2 * 2
    results.close()
    assert len(taken) <= 104


@pytest.mark.parametrize("where", ["function", "items"])
def test_an_exception_comes_at_its_place_and_leaves_the_settings(where, threads):
    threads(2)

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
    before = threading.active_count()
    with pytest.raises(KeyError, match="5"):
        found.extend(each(function, items(), CPU))
    assert found == list(range(5))
    assert torch.get_num_threads() == 2
    assert threading.active_count() == before


def test_one_that_is_not_read_to_its_end_leaves_the_settings(threads):
    threads(2)
    before = threading.active_count()
    results = each(lambda item: item, range(1000), CPU)
    assert next(results) == 0
    results.close()
    assert torch.get_num_threads() == 2
    assert threading.active_count() == before
