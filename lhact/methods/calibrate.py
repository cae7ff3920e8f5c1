"""Calibration activations in, exact percentiles and the mean out, without holding them in memory.

A calibration set is anything that can be iterated repeatedly and yields (rows, channels) float32
tensors: a list of batches, or an object whose __iter__ begins anew each time.
"""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lhact.parallel import map_ordered

CPU = torch.device("cpu")
# float32 values are counted in bins by their upper 16 bits, in sorted order: first the bins of
# negative values, from the lowest number to -0, then those of the others, from 0 to the highest.
NEGATIVE_BINS, BINS = 1 << 15, 1 << 16
VALUES_PER_BIN = 1 << 16  # one for each combination of the lower 16 bits


def require_reiterable(batches: Iterable[Tensor], what: str) -> None:
    """Raise ValueError where `batches` can be read only once: a generator or another iterator.

    what: how the error names them, such as "calibration".
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{what} is read several times, got a {type(batches).__name__}, which is empty after "
            "the first time; give a list of batches or an object whose __iter__ begins anew"
        )


def _bits(batch: Tensor) -> Tensor:
    """The float32 values as int32. Non-negative ones sort as their values do, negative reversed."""
    return batch.cpu().contiguous().view(torch.int32).view(-1)


def _count_upper_halves(batch: Tensor) -> np.ndarray:
    """(BINS,) how many values fall into each bin."""
    bins = (_bits(batch) >> 16).add_(NEGATIVE_BINS)
    counts = torch.bincount(bins, minlength=BINS).numpy()
    return np.concatenate([counts[:NEGATIVE_BINS][::-1], counts[NEGATIVE_BINS:]])


def _count_lower_halves(batch: Tensor, bins: Iterable[int]) -> dict[int, np.ndarray]:
    """For each of the bins, (VALUES_PER_BIN,) counts of its values, in sorted order."""
    bits = _bits(batch).numpy()
    upper = bits >> 16
    counts = {}
    for index in bins:
        inside = bits[np.flatnonzero(upper == _upper_half(index))] & 0xFFFF
        found = np.bincount(inside, minlength=VALUES_PER_BIN)
        counts[index] = found[::-1] if index < NEGATIVE_BINS else found
    return counts


def _upper_half(index: int) -> int:
    """The upper 16 bits that all values of a bin share, as an int16."""
    return -1 - index if index < NEGATIVE_BINS else index - NEGATIVE_BINS


def _value(index: int, position: int) -> float:
    """The float32 value at this position of a bin's VALUES_PER_BIN sorted values."""
    lower = VALUES_PER_BIN - 1 - position if index < NEGATIVE_BINS else position
    return float(np.uint32((_upper_half(index) & 0xFFFF) << 16 | lower).view(np.float32))


def percentiles(calibration: Iterable[Tensor], percents: Sequence[float]) -> list[float]:
    """Exact percentiles of all values, all channels together, as numpy.percentile defines them.

    percents: each in [0, 100]. Between two values the result is interpolated linearly. The set is
    read twice, however many percents there are: the first reading counts values by the upper 16
    bits, the second counts those of the bins that are wanted by the lower 16 bits. Only these
    counts are held in memory.

    Raises ValueError for a percent outside [0, 100], for an empty set, and for a set that cannot be
    read twice or does not give the same values twice.

    >>> percentiles([torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 4.0]])], [50, 100])
    [1.5, 4.0]
    """
    require_reiterable(calibration, "calibration")
    for percent in percents:
        if not 0 <= percent <= 100:
            raise ValueError(f"a percentile must lie in [0, 100], got {percent}")
    if not percents:
        return []
    upper = np.zeros(BINS, np.int64)
    for counts in map_ordered(_count_upper_halves, calibration, CPU):
        upper += counts
    total = int(upper.sum())
    if total == 0:
        raise ValueError("percentiles need at least one activation, got none")
    # Positions in sorted order, as fractions: floats would round them among 100 million values.
    positions = [Fraction(percent) * (total - 1) / 100 for percent in percents]
    ranks = {rank for p in positions for rank in (int(p), min(int(p) + 1, total - 1))}
    starts = np.concatenate([[0], np.cumsum(upper)])
    bin_of = {rank: int(np.searchsorted(starts, rank, side="right")) - 1 for rank in ranks}
    lower = {index: np.zeros(VALUES_PER_BIN, np.int64) for index in set(bin_of.values())}
    for found in map_ordered(lambda batch: _count_lower_halves(batch, lower), calibration, CPU):
        for index, counts in found.items():
            lower[index] += counts
    if any(counts.sum() != upper[index] for index, counts in lower.items()):
        raise ValueError(
            "calibration gave other values when it was read again; "
            "give batches that are the same each time"
        )
    values = {}
    for rank, index in bin_of.items():
        within = np.cumsum(lower[index])
        position = int(np.searchsorted(within, rank - starts[index], side="right"))
        values[rank] = _value(index, position)

    def interpolated(place: Fraction) -> float:
        below = int(place)
        a, b = values[below], values[min(below + 1, total - 1)]
        return a + (b - a) * float(place - below)

    return [interpolated(place) for place in positions]


def mean_and_shares(
    calibration: Iterable[Tensor], thresholds: Sequence[float]
) -> tuple[float, list[float]]:
    """(mean of all activations, percentage of them strictly below each threshold).

    The percentages say at which percentiles the thresholds lie. The set is read once.
    """

    def sums(batch: Tensor) -> np.ndarray:
        values = batch.cpu().numpy()
        # NumPy counts what is true in a sixth of torch's time.
        below = [np.count_nonzero(values < values.dtype.type(point)) for point in thresholds]
        return np.array([values.sum(dtype=np.float64), values.size, *below])

    total, count, *below = np.sum(list(map_ordered(sums, calibration, CPU)), axis=0).tolist()
    return total / count, [100 * n / count for n in below]
