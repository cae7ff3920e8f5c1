"""Every rectifier against its formula read one activation at a time in Python floats."""

import math
from functools import partial

import pytest
import torch
from fitted import Setup, bound

from lhact.methods.rectify import (
    RECTIFIERS,
    ash_b,
    ash_p,
    ash_s,
    bats,
    bfact,
    l2norm,
    lhact,
    lhact_high,
    lhact_low,
    optfs,
    ras,
    react,
    scale,
    vra,
)

LOW, HIGH = 0.21940805315971373, 1.3520756840705868  # LHAct's for ResNet-50 V1

# The oracles: one image as a list of floats, calibration rows, parameters -> a list of floats


def butterworth(x, high, order):
    return x / math.sqrt(1 + (x / high) ** (2 * order))


def oracle_lhact(row, rows, low, high, order):
    raised = [low if x < low else x for x in row]
    return [x if x < high else butterworth(x, high, order) + low for x in raised]


def oracle_bats(row, rows, lambda_):
    result = []
    for x, column in zip(row, zip(*rows, strict=True), strict=True):
        mean = math.fsum(column) / len(column)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in column) / len(column))
        result.append(min(max(x, mean - lambda_ * std), mean + lambda_ * std))
    return result


def kept_by_ash(row, percentile):
    count = len(row) - round(len(row) * percentile / 100)
    return set(sorted(range(len(row)), key=lambda channel: -row[channel])[:count])


def oracle_ash(value_of):
    def oracle(row, rows, percentile):
        kept = kept_by_ash(row, percentile)
        before, after = math.fsum(row), math.fsum(row[channel] for channel in kept)
        values = [value_of(x, before, after, len(kept)) for x in row]
        return [value if channel in kept else 0.0 for channel, value in enumerate(values)]

    return oracle


def oracle_scale(row, rows, percentile):
    after = math.fsum(row[channel] for channel in kept_by_ash(row, percentile))
    return [x * math.exp(math.fsum(row) / after) for x in row]


def oracle_ras(row, rows):
    by_rank = zip(*map(sorted, rows), strict=True)
    profile = [math.fsum(values) / len(rows) for values in by_rank]
    order = sorted(range(len(row)), key=lambda channel: row[channel])
    return [profile[order.index(channel)] for channel in range(len(row))]


def oracle_optfs(row, rows, low, high, bins):
    setup, width = Setup(), (high - low) / bins

    def interval(x):
        found = [i for i in range(bins) if low + i * width <= x < low + (i + 1) * width]
        return found[0] if found else None

    totals = [0.0] * bins
    for image in rows:
        logits = setup.weight @ torch.tensor(image, dtype=torch.float64) + setup.bias
        for x, w in zip(image, setup.weight[logits.argmax()].tolist(), strict=True):
            if interval(x) is not None:
                totals[interval(x)] += w * x
    gains = [1000 * total / math.hypot(*totals) for total in totals]
    return [0.0 if interval(x) is None else gains[interval(x)] * x for x in row]


ORACLES = {
    "lhact": oracle_lhact,
    "lhact-low": lambda row, rows, low: [low if x < low else x for x in row],
    "lhact-high": lambda row, rows, high, order: [
        x if x < high else butterworth(x, high, order) for x in row
    ],
    "bats": oracle_bats,
    "react": lambda row, rows, high: [high if x > high else x for x in row],
    "bfact": lambda row, rows, high, order: [butterworth(x, high, order) for x in row],
    "vra": lambda row, rows, low, high: [0.0 if x < low else high if x > high else x for x in row],
    "ash-p": oracle_ash(lambda x, before, after, k: x),
    "ash-b": oracle_ash(lambda x, before, after, k: before / k),
    "ash-s": oracle_ash(lambda x, before, after, k: x * math.exp(before / after)),
    "scale": oracle_scale,
    "l2norm": lambda row, rows: [x / math.hypot(*row) for x in row],
    "ras": oracle_ras,
    "optfs": oracle_optfs,
}


@pytest.mark.parametrize("name", RECTIFIERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_agrees_with_the_formula(name, dtype, tolerance):
    setup = Setup(dtype)
    setup.activations[:6] -= 0.3  # some of them signed
    rectify, parameters = bound(name, setup)
    rows = torch.cat(setup.calibration).tolist()
    oracle = [ORACLES[name](row, rows, **parameters) for row in setup.activations.tolist()]
    wanted = torch.tensor(oracle, dtype=dtype)
    torch.testing.assert_close(rectify(setup.activations), wanted, rtol=tolerance, atol=tolerance)


# LHAct, the numbers


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        *((0, 0.2194), (1.35, 1.35), (HIGH, 1.17547), (2, 1.0508), (3, 0.8166), (5, 0.5841)),
        *((10, 0.4022), (-1, 0.2194), (1e30, 0.2194)),
    ],
)
def test_lhact_gives_the_published_values(x, wanted):
    rectified = lhact(torch.tensor([x], dtype=torch.float64), LOW, HIGH)
    assert rectified.item() == pytest.approx(wanted, abs=5e-6 if x == HIGH else 5e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("high", [HIGH, 1.0, 0.1, 3.9999999, 4.0, 1000.1])
def test_lhact_is_strict_at_high(dtype, high):
    """The value at high goes to the upper branch, the next one below it stays as it is."""
    at = torch.tensor(high, dtype=dtype)
    below = torch.nextafter(at, torch.tensor(0, dtype=dtype))
    tolerance = 4 * torch.finfo(dtype).eps
    for function, low in ((partial(lhact, low=0.01), 0.01), (lhact_high, 0.0)):
        wanted = high / math.sqrt(2) + low
        assert function(at, high=high).item() == pytest.approx(wanted, rel=tolerance)
        assert torch.equal(function(below, high=high), below)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [1, 2, 2.5])
@pytest.mark.parametrize(
    ("low", "high"), [(-0.5, 1.0), (-2.0, 0.25), (0.0, 1.0), (0.25, 0.25), (1.5, 1.0), (1.0, 1.0)]
)
def test_lhact_with_thresholds_of_any_sign_and_order(low, high, order, dtype):
    """As a network without ReLU has them, and also where `low` is not below `high`."""
    row = [-3.0, -0.5, -0.1, 0.0, 0.2, 0.25, 0.999, 1.0, 1.001, 1.5, 7.0, 1e9]
    wanted = torch.tensor(oracle_lhact(row, [], low, high, order), dtype=dtype)
    rectified = lhact(torch.tensor(row, dtype=dtype), low, high, order)
    torch.testing.assert_close(rectified, wanted, rtol=2e-6, atol=2e-6)


def test_order_of_the_filter():
    x = torch.tensor([2.0], dtype=torch.float64)
    assert lhact(x, 0.1, 1.0, order=1).item() == pytest.approx(2 / math.sqrt(5) + 0.1)
    assert lhact_high(x, 1.0, order=4).item() == pytest.approx(2 / math.sqrt(257))
    assert bfact(x, 1.0, order=3).item() == pytest.approx(2 / math.sqrt(65))
    # An order that is not whole, and negative activations: filtered by magnitude, not nan.
    assert bfact(-x, 1.0, order=1.25).item() == pytest.approx(-2 / math.sqrt(1 + 2**2.5))


def test_thresholds_that_float32_cannot_hold():
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert lhact(x, -1e300, 1e300).tolist() == react(x, 1e300).tolist() == x.tolist()
    assert lhact_low(x, -math.inf).tolist() == vra(x, -1e300, 1e300).tolist() == x.tolist()
    assert lhact(x, 0.5, 1e-300).tolist() == [0.5, 0.5, 0.5]  # the cap of everything, at 0 + low
    assert bfact(x, 1e-300).tolist() == [0, 0, 0]
    std = torch.tensor([0.0, 1.0, 1.0])
    assert bats(x, torch.zeros(3), std, 1e300).tolist() == [0, 0, 3]


# The others where one activation decides


def test_vra_at_its_thresholds():
    x = torch.tensor([0.4999, 0.5, 0.75, 1.0, 1.0001])
    assert vra(x, 0.5, 1.0).tolist() == pytest.approx([0, 0.5, 0.75, 1, 1])


def test_ash_keeps_exactly_k_of_equal_activations():
    x = torch.ones(3, 10)
    assert (ash_p(x, 60) > 0).sum(dim=1).tolist() == [4, 4, 4]
    # 10 is shared out among the 4 that are kept.
    assert ash_b(x, 60).sum(dim=1).tolist() == pytest.approx([10, 10, 10])
    assert ash_b(x, 60).amax().item() == pytest.approx(2.5)
    assert ash_s(x, 60).amax().item() == pytest.approx(math.exp(10 / 4))
    assert scale(x, 60).amin().item() == pytest.approx(math.exp(10 / 4))


@pytest.mark.parametrize(
    ("channels", "percentile", "kept"),
    [
        *((2048, 90, 205), (2048, 65, 717), (10, 25, 8), (10, 37, 6)),
        *((8, 95, 1), (5, 0, 5), (5, 100, 1)),
    ],
)
def test_ash_keeps_the_authors_number_and_at_least_one(channels, percentile, kept):
    x = torch.rand(2, channels, generator=torch.Generator().manual_seed(0)) + 1
    assert (ash_p(x, percentile) > 0).sum(dim=1).tolist() == [kept, kept]


@pytest.mark.parametrize("function", [ash_s, scale])
def test_rows_without_anything_positive_are_not_scaled(function):
    x = torch.tensor([[0.0, 0, 0, 0], [-1, -2, -3, -4]])
    wanted = x if function is scale else torch.tensor([[0.0, 0, 0, 0], [-1, -2, 0, 0]])
    assert torch.equal(function(x, 50), wanted)


def test_bats_spread_of_a_constant_channel_is_zero():
    fitted = RECTIFIERS["bats"].fit([torch.full((5, 3), 1000.1), torch.full((2, 3), 1000.1)])
    assert torch.equal(fitted["std"], torch.zeros(3))


def test_l2norm_of_nothing_is_nothing():
    assert l2norm(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


def test_ras_ranks_equal_activations_by_channel():
    ranked = ras(torch.tensor([[0.0, 5, 0, -1], [2, 2, 2, 2]]), torch.tensor([1.0, 2, 3, 4]))
    assert ranked.tolist() == [[2, 4, 3, 1], [1, 2, 3, 4]]


def test_optfs_at_the_ends_of_its_intervals():
    x = torch.tensor([[-0.1, 0.9999999, 1.0, 1.5, 2.0, 2.5, 3.9, 4.0, 1e30]])
    shaped = optfs(x, 1.0, 4.0, torch.tensor([10.0, 100.0, 1000.0]))
    assert shaped.tolist() == [pytest.approx([0, 0, 10, 15, 200, 250, 3900, 0, 0])]


# What is refused


@pytest.mark.parametrize("high", [0.0, -1.0, math.nan])
def test_a_filter_needs_a_positive_cutoff(high):
    for refused in (partial(lhact, low=-2.0), lhact_high, bfact):
        with pytest.raises(ValueError, match="high must be above 0"):
            refused(torch.ones(1, 3), high=high)


@pytest.mark.parametrize("percentile", [-1, 100.5, math.nan])
def test_a_percentile_outside_0_to_100_is_refused(percentile):
    for function in (ash_p, ash_b, ash_s, scale):
        with pytest.raises(ValueError, match="percentile must be between 0 and 100"):
            function(torch.ones(1, 3), percentile)


def test_optfs_needs_intervals_with_activations():
    setup = Setup()
    for low, high in ((1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match=r"optfs.low must be below optfs.high"):
            bound("optfs", setup, low=low, high=high)
    with pytest.raises(ValueError, match=r"no calibration activation between .*--set optfs.low=X"):
        bound("optfs", setup, low=1000.0, high=1001.0)
    with pytest.raises(ValueError, match=r"optfs.bins must be a whole number from 1 to 1000000"):
        bound("optfs", setup, bins=10**9)
