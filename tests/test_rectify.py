"""Every rectifier against its formula read one activation at a time in Python floats, and the properties all of them share."""

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch

from lhact.methods.rectify import RECTIFIERS, ash_b, ash_p, ash_s, bfact, lhact, lhact_high, lhact_low, react, scale, vra

LOW, HIGH = 0.21940805315971373, 1.3520756840705868  # LHAct's for ResNet-50 V1


@pytest.fixture
def activations():
    """Sparse, skewed and partly negative: 9 images of 40 channels."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 40, generator=generator).abs() ** 1.5 - 0.2
    values[values < -0.15] = 0
    return values


@pytest.fixture
def calibration():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(rows, 40, generator=generator) * 2 for rows in (7, 1, 12)]


def bound(name, calibration, **changes):
    """The rectifier as a function of activations alone: percentiles taken by numpy, `fit` run on the calibration batches."""
    entry = RECTIFIERS[name]
    everything = torch.cat(list(calibration)).numpy()
    offered = {}
    for key, value in {**entry.parameters, **changes}.items():
        if key.endswith("_percentile"):
            key, value = key.removesuffix("_percentile"), float(np.percentile(everything, value))
        offered[key] = value
    if entry.fit:
        offered["calibration"] = calibration
        offered |= entry.fit(**{key: offered[key] for key in inspect.signature(entry.fit).parameters})
    wanted = inspect.signature(entry.function).parameters
    return partial(entry.function, **{key: offered[key] for key in wanted if key in offered}), offered


# The oracles: one image as a list of floats -> a list of floats


def oracle_lhact(row, low, high, order, **_):
    raised = [low if x < low else x for x in row]
    return [x if x < high else x / math.sqrt(1 + (x / high) ** (2 * order)) + low for x in raised]


def oracle_lhact_high(row, high, order, **_):
    return [x if x < high else x / math.sqrt(1 + (x / high) ** (2 * order)) for x in row]


def oracle_bats(row, lambda_, calibration, **_):
    columns = list(zip(*(image for batch in calibration for image in batch.tolist()), strict=True))
    result = []
    for x, column in zip(row, columns, strict=True):
        mean = math.fsum(column) / len(column)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in column) / len(column))
        result.append(min(max(x, mean - lambda_ * std), mean + lambda_ * std))
    return result


def kept_by_ash(row, percentile):
    count = len(row) - round(len(row) * percentile / 100)
    return set(sorted(range(len(row)), key=lambda channel: -row[channel])[:count])


def oracle_ash(row, percentile, value_of):
    kept = kept_by_ash(row, percentile)
    before, after = math.fsum(row), math.fsum(row[channel] for channel in kept)
    return [value_of(x, before, after, len(kept)) if channel in kept else 0.0 for channel, x in enumerate(row)]


def oracle_scale(row, percentile, **_):
    after = math.fsum(row[channel] for channel in kept_by_ash(row, percentile))
    return [x * math.exp(math.fsum(row) / after) for x in row]


ORACLES = {
    "lhact": oracle_lhact,
    "lhact-low": lambda row, low, **_: [low if x < low else x for x in row],
    "lhact-high": oracle_lhact_high,
    "bats": oracle_bats,
    "react": lambda row, high, **_: [high if x > high else x for x in row],
    "bfact": lambda row, high, order, **_: [x / math.sqrt(1 + (x / high) ** (2 * order)) for x in row],
    "vra": lambda row, low, high, **_: [0.0 if x < low else high if x > high else x for x in row],
    "ash-p": lambda row, percentile, **_: oracle_ash(row, percentile, lambda x, before, after, k: x),
    "ash-b": lambda row, percentile, **_: oracle_ash(row, percentile, lambda x, before, after, k: before / k),
    "ash-s": lambda row, percentile, **_: oracle_ash(row, percentile, lambda x, before, after, k: x * math.exp(before / after)),
    "scale": oracle_scale,
}

every = pytest.mark.parametrize("name", RECTIFIERS)


def test_every_rectifier_has_an_oracle():
    assert set(ORACLES) == set(RECTIFIERS)


@every
def test_agrees_with_the_formula(name, activations, calibration):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        batches = [batch.to(dtype) for batch in calibration]
        function, parameters = bound(name, batches)
        rectified = function(activations.to(dtype))
        for row, wanted in zip(rectified, activations.to(dtype).tolist(), strict=True):
            wanted = ORACLES[name](wanted, **{**parameters, "calibration": batches})
            torch.testing.assert_close(row, torch.tensor(wanted, dtype=dtype), rtol=tolerance, atol=tolerance)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_returns_a_new_tensor_of_the_same_shape_and_dtype(name, dtype, activations, calibration):
    batches = [batch.to(dtype) for batch in calibration]
    copies = [batch.clone() for batch in batches]
    function, _ = bound(name, batches)
    given = activations.to(dtype)
    before = given.clone()
    rectified = function(given)
    assert rectified.shape == given.shape
    assert rectified.dtype == dtype
    assert rectified.data_ptr() != given.data_ptr()
    assert torch.equal(given, before)
    assert all(torch.equal(batch, copy) for batch, copy in zip(batches, copies, strict=True))


@every
def test_an_image_does_not_depend_on_its_batch(name, activations, calibration):
    function, _ = bound(name, calibration)
    assert torch.equal(function(activations), torch.cat([function(image) for image in activations.split(1)]))
    torch.testing.assert_close(function(activations), function(activations.T.contiguous().T))
    assert function(activations[:0]).shape == (0, 40)


@every
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_rows_of_one_value_stay_finite(name, value, calibration):
    function, _ = bound(name, calibration)
    rectified = function(torch.full((2, 40), value))
    assert rectified.isfinite().all()


@every
def test_signed_activations_stay_finite(name, calibration):
    function, _ = bound(name, calibration)
    assert function(torch.randn(50, 40, generator=torch.Generator().manual_seed(2))).isfinite().all()


# LHAct, the numbers


@pytest.mark.parametrize(
    ("x", "wanted"),
    [(0, 0.2194), (1.35, 1.35), (HIGH, 1.17547), (2, 1.0508), (3, 0.8166), (5, 0.5841), (10, 0.4022), (-1, 0.2194), (1e30, 0.2194)],
)
def test_lhact_gives_the_published_values(x, wanted):
    rectified = lhact(torch.tensor([x], dtype=torch.float64), LOW, HIGH)
    assert rectified.item() == pytest.approx(wanted, abs=5e-6 if x == HIGH else 5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lhact_is_strict_at_high(dtype):
    at = torch.tensor(HIGH, dtype=dtype)
    below = torch.nextafter(at, torch.tensor(0, dtype=dtype))
    # the value at high goes to the upper branch, the next one below it stays as it is
    assert lhact(at, LOW, HIGH).item() == pytest.approx(HIGH / math.sqrt(2) + LOW, rel=1e-6)
    assert torch.equal(lhact(below, LOW, HIGH), below)
    assert lhact_high(at, HIGH).item() == pytest.approx(HIGH / math.sqrt(2), rel=1e-6)
    assert torch.equal(lhact_high(below, HIGH), below)


def test_lhact_at_low():
    around = torch.tensor([LOW - 1e-3, LOW, LOW + 1e-3], dtype=torch.float64)
    assert lhact(around, LOW, HIGH).tolist() == [LOW, LOW, LOW + 1e-3]
    assert lhact_low(around, LOW).tolist() == [LOW, LOW, LOW + 1e-3]


def test_lhact_with_one_threshold_filters_what_was_raised():
    assert lhact(torch.zeros(1, dtype=torch.float64), 1.0, 1.0).item() == pytest.approx(1 / math.sqrt(2) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [1, 2, 2.5])
@pytest.mark.parametrize(("low", "high"), [(-0.5, 1.0), (-2.0, 0.25), (0.0, 1.0), (0.25, 0.25), (1.5, 1.0)])
def test_lhact_with_thresholds_of_any_sign_and_order(low, high, order, dtype):
    """As a network without ReLU has them, and also where `low` is above `high`."""
    row = [-3.0, -0.5, -0.1, 0.0, 0.2, 0.25, 0.999, 1.0, 1.001, 1.5, 7.0, 1e9]
    wanted = torch.tensor(oracle_lhact(row, low, high, order), dtype=dtype)
    torch.testing.assert_close(lhact(torch.tensor(row, dtype=dtype), low, high, order), wanted, rtol=2e-6, atol=2e-6)


def test_lhact_falls_from_high_on():
    rectified = lhact(torch.linspace(HIGH, 50, 1000, dtype=torch.float64), LOW, HIGH)
    assert (rectified.diff() < 0).all()
    assert (rectified > LOW).all()


def test_settings_of_the_papers():
    assert {name: dict(entry.parameters) for name, entry in RECTIFIERS.items()} == {
        "lhact": {"low_percentile": 33.7, "high_percentile": 95.5, "order": 2},
        "lhact-low": {"low_percentile": 33.7},
        "lhact-high": {"high_percentile": 95.5, "order": 2},
        "bats": {"lambda_": 1.05},
        "react": {"high_percentile": 90},
        "bfact": {"high_percentile": 95, "order": 2},
        "vra": {"low_percentile": 60, "high_percentile": 95},
        "ash-p": {"percentile": 60},
        "ash-b": {"percentile": 65},
        "ash-s": {"percentile": 90},
        "scale": {"percentile": 85},
    }


def test_published_constants():
    assert RECTIFIERS["lhact"].published == {"low": LOW, "high": HIGH}
    assert RECTIFIERS["lhact-low"].published == {"low": LOW}
    assert RECTIFIERS["lhact-high"].published == {"high": HIGH}
    assert RECTIFIERS["bfact"].published == {"high": HIGH}
    assert RECTIFIERS["react"].published == {"high": 1.0}
    assert RECTIFIERS["vra"].published == {"low": 0.5, "high": 1.0}
    # each replaces a percentile that is there
    for entry in RECTIFIERS.values():
        assert {f"{key}_percentile" for key in entry.published} <= set(entry.parameters)


def test_order_of_the_filter():
    x = torch.tensor([2.0], dtype=torch.float64)
    assert lhact(x, 0.1, 1.0, order=1).item() == pytest.approx(2 / math.sqrt(5) + 0.1)
    assert lhact_high(x, 1.0, order=4).item() == pytest.approx(2 / math.sqrt(257))
    assert bfact(x, 1.0, order=3).item() == pytest.approx(2 / math.sqrt(65))
    # an order that is not whole, and negative activations: filtered by magnitude, not nan
    assert bfact(-x, 1.0, order=1.25).item() == pytest.approx(-2 / math.sqrt(1 + 2**2.5))


# The others where one activation decides


def test_vra_at_its_thresholds():
    x = torch.tensor([0.4999, 0.5, 0.75, 1.0, 1.0001])
    assert vra(x, 0.5, 1.0).tolist() == pytest.approx([0, 0.5, 0.75, 1, 1])


def test_react_keeps_negative_activations():
    assert react(torch.tensor([-3.0, 0.5, 7.0]), 1.0).tolist() == [-3.0, 0.5, 1.0]


def test_ash_keeps_exactly_k_of_equal_activations():
    x = torch.ones(3, 10)
    assert (ash_p(x, 60) > 0).sum(dim=1).tolist() == [4, 4, 4]
    # 10 is shared out among the 4 that are kept
    assert ash_b(x, 60).sum(dim=1).tolist() == pytest.approx([10, 10, 10])
    assert ash_b(x, 60).amax().item() == pytest.approx(2.5)
    assert ash_s(x, 60).amax().item() == pytest.approx(math.exp(10 / 4))
    assert scale(x, 60).amin().item() == pytest.approx(math.exp(10 / 4))


@pytest.mark.parametrize(
    ("channels", "percentile", "kept"),
    [(2048, 90, 205), (2048, 65, 717), (8, 95, 1), (5, 0, 5), (5, 100, 1), (10, 25, 8), (10, 37, 6)],
)
def test_ash_keeps_the_authors_number_and_at_least_one(channels, percentile, kept):
    x = torch.rand(2, channels, generator=torch.Generator().manual_seed(0)) + 1
    assert (ash_p(x, percentile) > 0).sum(dim=1).tolist() == [kept, kept]


def test_ash_takes_the_sum_before_pruning():
    x = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    assert ash_b(x, 50).tolist() == [[5, 5, 0, 0]]
    assert ash_s(x, 50)[0].tolist() == pytest.approx([4 * math.exp(10 / 7), 3 * math.exp(10 / 7), 0, 0])
    assert scale(x, 50)[0].tolist() == pytest.approx([value * math.exp(10 / 7) for value in (4, 3, 2, 1)])


@pytest.mark.parametrize("function", [ash_s, scale])
def test_rows_without_anything_positive_are_not_scaled(function):
    x = torch.tensor([[0.0, 0, 0, 0], [-1, -2, -3, -4]])
    wanted = x if function is scale else torch.tensor([[0.0, 0, 0, 0], [-1, -2, 0, 0]])
    assert torch.equal(function(x, 50), wanted)


def test_bats_spread_of_a_constant_channel_is_zero(calibration):
    fitted = RECTIFIERS["bats"].fit([torch.full((5, 3), 1000.1), torch.full((2, 3), 1000.1)])
    assert torch.equal(fitted["std"], torch.zeros(3))
    fitted = RECTIFIERS["bats"].fit(calibration)
    everything = torch.cat(calibration).double()
    torch.testing.assert_close(fitted["mean"].double(), everything.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(fitted["std"].double(), everything.std(0, correction=0), rtol=1e-6, atol=0)


# What is refused


@pytest.mark.parametrize("high", [0.0, -1.0, math.nan])
def test_a_filter_needs_a_positive_cutoff(high):
    x = torch.ones(1, 3)
    for refused in (partial(lhact, low=-2.0), lhact_high, bfact):
        with pytest.raises(ValueError, match="high must be above 0"):
            refused(x, high=high)


@pytest.mark.parametrize("percentile", [-1, 100.5])
def test_a_percentile_outside_0_to_100_is_refused(percentile):
    for function in (ash_p, ash_b, ash_s, scale):
        with pytest.raises(ValueError, match="percentile must be between 0 and 100"):
            function(torch.ones(1, 3), percentile)


def test_an_empty_calibration_set_is_refused():
    with pytest.raises(ValueError, match="calibration set is empty"):
        RECTIFIERS["bats"].fit([])
