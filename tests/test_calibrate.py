"""Streaming percentiles against numpy's on all values at once, and against exact fractions of order statistics."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from lhact.methods.calibrate import mean_and_shares, percentiles

PERCENTS = [0, 1e-9, 5, 12.5, 25, 33.7, 50, 66.6, 90, 95.5, 99.99, 100]
TINY = np.float32(1e-45)  # the smallest float32 above 0
CHANNELS = 7


class Counting:
    """A calibration set that counts how often it is read."""

    def __init__(self, values, rows=5):
        self.batches = list(torch.from_numpy(np.asarray(values, np.float32).reshape(-1, CHANNELS)).split(rows))
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def cases():
    """name -> (rows, channels) float32 values"""
    generator = np.random.default_rng(11)
    normal = generator.normal(0, 1, (40, CHANNELS))
    mixed = np.concatenate([normal.ravel(), np.zeros(60), -np.zeros(10), [TINY, -TINY, 3e38, -3e38, 1e-38, 1e-40]])
    return {
        "relu, mostly zeros": np.maximum(normal, 0.8) - 0.8,
        "negative and positive": normal,
        "all negative": -np.abs(normal) - 0.5,
        "subnormals": generator.integers(-20, 20, (30, CHANNELS)) * TINY,
        "zeros of both signs": np.where(normal > 0, 0.0, -0.0),
        "extremes of float32": np.resize(mixed, (50, CHANNELS)),
        "neighbours of 1": 1 + np.float32(2**-23) * generator.integers(-3, 3, (30, CHANNELS)),
        "borders of the upper 16 bits": np.array(
            [0x3F80FFFF, 0x3F810000, 0x3F80FFFE, 0xBF80FFFF, 0xBF810000, 0x3F810001, 0], np.uint32
        )
        .view(np.float32)
        .reshape(1, CHANNELS),
        "all equal": np.full((9, CHANNELS), 0.7),
        "many magnitudes": np.exp(generator.uniform(-60, 60, (60, CHANNELS))),
    }


def by_fractions(values, percent):
    """numpy's default definition without rounding until the end: position p (n - 1), linear between its two neighbours."""
    ordered = sorted(values.ravel().tolist())
    position = Fraction(percent) * (len(ordered) - 1) / 100
    below = position.numerator // position.denominator
    above = min(below + 1, len(ordered) - 1)
    return float(Fraction(ordered[below]) + (Fraction(ordered[above]) - Fraction(ordered[below])) * (position - below))


@pytest.mark.parametrize("name", cases())
def test_percentiles_are_numpys(name):
    values = cases()[name].astype(np.float32)
    found = percentiles(Counting(values), PERCENTS)
    exact = [by_fractions(values, percent) for percent in PERCENTS]
    spread = float(values.max()) - float(values.min())
    assert all(type(value) is float for value in found)
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-15 * spread)
    np.testing.assert_allclose(found, np.percentile(values.astype(np.float64), PERCENTS), rtol=1e-12, atol=1e-13 * spread)


@pytest.mark.parametrize("name", cases())
def test_order_statistics_are_exact_to_the_bit(name):
    """At positions that are whole numbers nothing is interpolated: the value itself comes out, as a sort would find it."""
    values = np.resize(cases()[name].astype(np.float32), (101, CHANNELS))
    ordered = np.sort(values.astype(np.float64).ravel())
    # 707 values: ranks 0, 353 and 706
    assert percentiles(Counting(values), [0, 50, 100]) == [ordered[0], ordered[353], ordered[706]]


@pytest.mark.parametrize("seed", range(30))
def test_percentiles_of_random_sets(seed):
    """Sizes, scales, shares of zeros and percentages at random; also many percentages at once, unsorted and repeated."""
    generator = np.random.default_rng(seed)
    values = generator.normal(generator.normal(), 1, (int(generator.integers(1, 60)), CHANNELS)) * 10.0 ** generator.integers(
        -12, 12
    )
    values[generator.random(values.shape) < generator.random()] = 0
    values = values.astype(np.float32)
    percents = [*generator.uniform(0, 100, 8), 50, 50, 100, 0]
    found = percentiles(Counting(values, rows=int(generator.integers(1, 20))), percents)
    exact = np.percentile(values.astype(np.float64), percents)
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-13 * np.ptp(values))
    assert found[8] == found[9]


def test_float32_values_are_interpolated_in_float64():
    values = np.array([1, 1 + 2**-23] + [2] * 5, np.float32)
    # position 0.5 of 6: half way between two neighbouring float32
    assert percentiles(Counting(values), [100 / 12]) == [pytest.approx(1 + 2**-24, abs=1e-15)]


@pytest.mark.parametrize("rows", [1, 2, 3, 39, 40, 1000])
def test_batches_do_not_matter(rows):
    values = cases()["negative and positive"]
    assert percentiles(Counting(values, rows), PERCENTS) == percentiles(Counting(values, 7), PERCENTS)


def test_empty_batches_do_not_matter():
    batch = torch.tensor([[1.0, 2.0, 4.0]])
    assert percentiles([batch[:0], batch, batch[:0]], [0, 25, 50, 100]) == [1, 1.5, 2, 4]


def test_one_value():
    assert percentiles([torch.tensor([[-0.25]])], [0, 33.7, 100]) == [-0.25] * 3


def test_batches_that_are_not_contiguous():
    values = torch.arange(12.0).reshape(3, 4)
    assert (
        percentiles([values.T, values[:, ::2]], [0, 50, 100])
        == np.percentile([*range(12), 0, 2, 4, 6, 8, 10], [0, 50, 100]).tolist()
    )


@pytest.mark.parametrize("percents", [[50], PERCENTS, list(range(101))], ids=len)
def test_number_of_readings_does_not_grow_with_the_percentages(percents):
    calibration = Counting(cases()["relu, mostly zeros"])
    percentiles(calibration, percents)
    assert 1 <= calibration.passes <= 4


def test_nothing_asked_for_is_nothing_read():
    calibration = Counting(cases()["all equal"])
    assert percentiles(calibration, []) == []
    assert calibration.passes == 0


def test_calibration_activations_stay_as_they_are():
    calibration = Counting(cases()["zeros of both signs"])
    before = [batch.clone().view(torch.int32) for batch in calibration.batches]
    percentiles(calibration, [50])
    mean_and_shares(calibration, [0.5])
    assert all(torch.equal(batch.view(torch.int32), copy) for batch, copy in zip(calibration.batches, before, strict=True))


@pytest.mark.parametrize("percent", [-1e-9, 100.5, float("nan"), float("inf")])
def test_percentage_out_of_range(percent):
    with pytest.raises(ValueError, match=r"must lie in \[0, 100\], got"):
        percentiles(Counting(np.zeros(CHANNELS)), [50, percent])


@pytest.mark.parametrize("empty", [[], [torch.empty(0, 3)]], ids=["no batches", "no rows"])
def test_empty_set(empty):
    with pytest.raises(ValueError, match="at least one activation, got none"):
        percentiles(empty, [50])


def test_mean_and_shares():
    values = cases()["relu, mostly zeros"].astype(np.float32)
    thresholds = [0.0, 0.25, float(values.max()), 1e9]
    mean, shares = mean_and_shares(Counting(values, rows=3), thresholds)
    assert mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-12)
    scalars = [float(value) for value in values.ravel()]
    assert shares == [100 * sum(value < threshold for value in scalars) / len(scalars) for threshold in thresholds]
    assert shares[0] == 0
    assert shares[2] < 100


def test_mean_of_many_small_values_beside_large_ones():
    """A float32 running sum would lose them: 2e7 + 0.5 is 2e7 there."""
    batches = [torch.full((1, 1), 2.0e7), *[torch.full((100, 1), 0.5)] * 20]
    assert mean_and_shares(batches, [])[0] == pytest.approx((2.0e7 + 1000) / 2001, rel=1e-12)
