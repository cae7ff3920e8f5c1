"""Streaming percentiles against exact fractions of order statistics and against numpy's."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lhact.methods.calibrate import mean_and_shares, percentiles

PERCENTS = [50, 0, 1e-9, 5, 12.5, 25, 33.7, 50, 66.6, 90, 95.5, 99.99, 100, 0]
TINY = np.float32(1e-45)  # the smallest float32 above 0
CHANNELS = 7


class Counting:
    """A calibration set that counts how often it is read."""

    def __init__(self, values, rows=5):
        values = np.asarray(values, np.float32).reshape(-1, CHANNELS)
        self.batches = list(torch.from_numpy(values).split(rows))
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def cases():
    """name -> (rows, channels) values"""
    generator = np.random.default_rng(11)
    normal = generator.normal(0, 1, (40, CHANNELS))
    extremes = [TINY, -TINY, 3e38, -3e38, 1e-38, 1e-40]
    mixed = np.concatenate([normal.ravel(), np.zeros(60), -np.zeros(10), extremes])
    borders = [0x3F80FFFF, 0x3F810000, 0x3F80FFFE, 0xBF80FFFF, 0xBF810000, 0x3F810001, 0]
    return {
        "relu, mostly zeros": np.maximum(normal, 0.8) - 0.8,
        "negative and positive": normal,
        "all negative": -np.abs(normal) - 0.5,
        "subnormals": generator.integers(-20, 20, (30, CHANNELS)) * TINY,
        "zeros of both signs": np.where(normal > 0, 0.0, -0.0),
        "extremes of float32": np.resize(mixed, (50, CHANNELS)),
        "neighbours of 1": 1 + np.float32(2**-23) * generator.integers(-3, 3, (30, CHANNELS)),
        "borders of the upper 16 bits": np.array([borders], np.uint32).view(np.float32),
        "all equal": np.full((9, CHANNELS), 0.7),
        "one value": np.full((1, CHANNELS), -0.25),
        "many magnitudes": np.exp(generator.uniform(-60, 60, (60, CHANNELS))),
    }


def by_fractions(values, percent):
    """numpy's definition, exact to the end: position p (n - 1), linear between its neighbours."""
    ordered = [Fraction(value) for value in sorted(values.ravel().tolist())]
    position = Fraction(percent) * (len(ordered) - 1) / 100
    below = position.numerator // position.denominator
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (position - below))


@pytest.mark.parametrize("name", cases())
def test_percentiles_are_exact(name):
    values = cases()[name].astype(np.float32)
    calibration, before = Counting(values), values.copy()
    found = percentiles(calibration, PERCENTS)
    assert all(type(value) is float for value in found)
    exact = [by_fractions(values, percent) for percent in PERCENTS]
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-15 * np.ptp(values))
    assert calibration.passes == 2
    assert np.array_equal(values.view(np.int32), before.view(np.int32)), "the set was changed"
    # At whole positions, such as ranks 0, 353 and 706 of 707, nothing is interpolated: a sort finds
    # the same value, to the bit.
    values = np.resize(values, (101, CHANNELS))
    ordered = np.sort(values.ravel()).tolist()
    assert percentiles(Counting(values), [0, 50, 100]) == [ordered[0], ordered[353], ordered[706]]


@pytest.mark.parametrize("seed", range(30))
def test_percentiles_of_random_sets(seed):
    """Random sizes, scales, shares of zeros and percents, against numpy."""
    generator = np.random.default_rng(seed)
    values = generator.normal(generator.normal(), 1, (int(generator.integers(1, 60)), CHANNELS))
    values *= 10.0 ** generator.integers(-12, 12)
    values[generator.random(values.shape) < generator.random()] = 0
    values = values.astype(np.float32)
    percents = generator.uniform(0, 100, 8).tolist()
    found = percentiles(Counting(values, rows=int(generator.integers(1, 20))), percents)
    exact = np.percentile(values.astype(np.float64), percents)
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-13 * np.ptp(values))


def test_batches_of_any_size_and_layout():
    values = torch.arange(12.0).reshape(3, 4)
    wanted = np.percentile([*range(12), 0, 2, 4, 6, 8, 10], PERCENTS)
    for batches in ([values.T, values[:, ::2]], [values[:0], *values.split(1), values[:, ::2]]):
        assert percentiles(batches, PERCENTS) == pytest.approx(wanted.tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("batches", "percents", "message"),
    [
        *(([torch.zeros(1, 3)], [50, p], r"in \[0, 100\], got") for p in (-1e-9, 100.5, math.nan)),
        ([], [50], "at least one activation, got none"),
        ([torch.empty(0, 3)], [50], "at least one activation, got none"),
        (iter([]), [50], "calibration is read several times, got a list_iterator, .*; give a list"),
        ((batch for batch in ()), [], "calibration is read several times, got a generator"),
    ],
)
def test_what_has_no_percentiles_is_refused(batches, percents, message):
    with pytest.raises(ValueError, match=message):
        percentiles(batches, percents)


def test_what_can_be_read_again_is_not_read_in_vain():
    counting = Counting(np.zeros(CHANNELS))
    for batches in ([], (), counting, torch.utils.data.DataLoader([1, 2])):
        assert percentiles(batches, []) == []
    assert counting.passes == 0


@pytest.mark.parametrize("second", [[], [torch.ones(2, 3), torch.ones(1, 3)]], ids=len)
def test_a_set_that_changes_between_two_readings_is_refused(second):
    class Changing:
        contents = iter([[torch.ones(2, 3)], second])

        def __iter__(self):
            return iter(next(self.contents))

    with pytest.raises(ValueError, match="other values when it was read again; give batches"):
        percentiles(Changing(), [50])


def test_mean_and_shares():
    values = cases()["relu, mostly zeros"].astype(np.float32)
    thresholds = [0.0, 0.25, float(values.max()), 1e9]
    mean, shares = mean_and_shares(Counting(values, rows=3), thresholds)
    assert mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-12)
    scalars = values.ravel().tolist()
    below = [sum(value < threshold for value in scalars) for threshold in thresholds]
    assert shares == [100 * count / len(scalars) for count in below]
    assert shares[0] == 0 < shares[1] < shares[2] < 100


def test_mean_of_many_small_values_beside_a_large_one():
    """A float32 running sum would lose them: 2e7 + 0.5 is 2e7 there."""
    batches = [torch.full((1, 1), 2.0e7), *[torch.full((100, 1), 0.5)] * 20]
    assert mean_and_shares(batches, [])[0] == pytest.approx((2.0e7 + 1000) / 2001, rel=1e-12)
