"""Calibration activations in, exact percentiles and per-channel statistics out, streaming.

A calibration set is anything that can be iterated again and again and yields (rows, channels) float32 tensors.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lhact.parallel import each

CPU = torch.device("cpu")
# Bins by the upper 16 bits of a float32: those of negative numbers, from the lowest number to -0, then those of the others.
NEGATIVE, BINS = 1 << 15, 1 << 16


def _bits(batch: Tensor) -> Tensor:
    """The float32 values as int32, of which non-negative ones sort as their values do and negative ones in reverse."""
    return batch.cpu().contiguous().view(torch.int32).view(-1)


def _upper_counts(batch: Tensor) -> np.ndarray:
    """How many values fall into each of BINS."""
    counts = torch.bincount((_bits(batch) >> 16).add_(NEGATIVE), minlength=BINS).numpy()
    return np.concatenate([counts[:NEGATIVE][::-1], counts[NEGATIVE:]])


def _lower_counts(batch: Tensor, bins: Iterable[int]) -> dict[int, np.ndarray]:
    """For each of the bins, how many of its values have each of the 65,536 lower halves, in the order of the values."""
    bits = _bits(batch).numpy()
    upper = bits >> 16
    counts = {}
    for index in bins:
        inside = bits[np.flatnonzero(upper == _upper_half(index))] & 0xFFFF
        found = np.bincount(inside, minlength=1 << 16)
        counts[index] = found[::-1] if index < NEGATIVE else found
    return counts


def _upper_half(index: int) -> int:
    """What the values of a bin have in their upper 16 bits, as an int16."""
    return -1 - index if index < NEGATIVE else index - NEGATIVE


def _value(index: int, position: int) -> float:
    """The float32 at that position among the 65,536 of a bin."""
    lower = 0xFFFF - position if index < NEGATIVE else position
    return float(np.uint32((_upper_half(index) & 0xFFFF) << 16 | lower).view(np.float32))


def percentiles(calibration: Iterable[Tensor], percents: Sequence[float]) -> list[float]:
    """Exact percentiles of all values, every channel together, with linear interpolation (numpy's default definition).

    percents: in [0, 100]. Reads the calibration set twice whatever their number, and holds histograms of 65,536 counts: the
    order statistics are found by the upper, then by the lower 16 bits of the float32 values in sorted order.

    Raises ValueError for a percentage outside [0, 100] and for an empty set.
    """
    for percent in percents:
        if not 0 <= percent <= 100:
            raise ValueError(f"a percentile must lie in [0, 100], got {percent}")
    if not percents:
        return []
    upper = np.zeros(BINS, np.int64)
    for counts in each(_upper_counts, calibration, CPU):
        upper += counts
    total = int(upper.sum())
    if total == 0:
        raise ValueError("percentiles need at least one activation, got none")
    # Positions in sorted order, kept as fractions so that 100 million values do not round them.
    positions = [Fraction(percent) * (total - 1) / 100 for percent in percents]
    ranks = sorted({rank for p in positions for rank in (int(p), min(int(p) + 1, total - 1))})
    starts = np.concatenate([[0], np.cumsum(upper)])
    bin_of = {rank: int(np.searchsorted(starts, rank, side="right")) - 1 for rank in ranks}
    lower = {index: np.zeros(1 << 16, np.int64) for index in set(bin_of.values())}
    for of_batch in each(lambda batch: _lower_counts(batch, lower), calibration, CPU):
        for index, counts in of_batch.items():
            lower[index] += counts
    values = {}
    for rank, index in bin_of.items():
        within = np.cumsum(lower[index])
        values[rank] = _value(index, int(np.searchsorted(within, rank - starts[index], side="right")))
    results = []
    for position in positions:
        below = int(position)
        a, b = values[below], values[min(below + 1, total - 1)]
        results.append(a + (b - a) * float(position - below))
    return results


def mean_and_shares(calibration: Iterable[Tensor], thresholds: Sequence[float]) -> tuple[float, list[float]]:
    """(mean of all activations, percentage of them below each threshold): where the thresholds sit as percentiles."""

    def sums(batch: Tensor) -> np.ndarray:
        values = batch.cpu().numpy()
        # Compared by NumPy: it counts what is true at a sixth of torch's cost.
        below = [np.count_nonzero(values < values.dtype.type(threshold)) for threshold in thresholds]
        return np.array([values.sum(dtype=np.float64), values.size, *below])

    total, count, *below = sum(each(sums, calibration, CPU))
    return total / count, [100 * n / count for n in below]
