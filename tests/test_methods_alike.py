"""What every rectifier and every score holds, whatever it computes: a new one is covered by its
entry alone."""

import math
import weakref

import pytest
import torch
from fitted import CHANNELS, ENTRIES, SMALL, Setup, bound

from lhact.methods import scores, statistics
from lhact.methods.entries import Percentile, parameter_range
from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES

every = pytest.mark.parametrize("name", ENTRIES)
fitting = pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.fit])
scoring = pytest.mark.parametrize("name", SCORES)


# Entries


def test_names_and_their_order():
    first = "msp odin energy maxlogit gen lts dice knn vim residual mahalanobis rmds nnguide fdbd"
    assert list(SCORES)[:15] == [*first.split(), "neco"]
    assert {"entropy", "gradnorm", "klm", "she", "nci", "cadref", "neco-resnet"} <= set(SCORES)
    old = "lhact lhact-low lhact-high bats react bfact vra ash-p ash-b ash-s scale"
    assert list(RECTIFIERS) == [*old.split(), "l2norm", "ras", "optfs"]
    parts = [part for name, part in vars(scores).items() if name.startswith("SCORES_")]
    assert sum(len(part) for part in parts) == len(SCORES), "two files have a score of one name"
    assert [name for name, entry in ENTRIES.items() if entry.perturbed] == ["odin"]


P = Percentile
# Of each parameter, what it takes and its default in each method: the papers' settings.
PARAMETERS = {
    "low": ("a number", {"lhact": P(33.7), "lhact-low": P(33.7), "vra": P(60), "optfs": P(0.1)}),
    "high": (
        "a number",
        {"lhact": P(95.5), "lhact-high": P(95.5), "react": P(90), "bfact": P(95), "vra": P(95)}
        | {"optfs": P(99.9)},
    ),
    "order": ("a number above 0", dict.fromkeys(("lhact", "lhact-high", "bfact"), 2)),
    "bins": ("a whole number from 1 on", {"optfs": 100}),
    "lambda_": ("a number above 0", {"bats": 1.05}),
    "percentile": (
        "between 0 and 100",
        {"ash-p": 60, "ash-b": 65, "ash-s": 90, "scale": 85, "lts": 95, "dice": 70},
    ),
    "temperature": ("a number above 0", {"odin": 1000, "energy": 1}),
    "gamma": ("a number above 0", {"gen": 0.1}),
    "k": ("a whole number from 1 on", {"gen": 100, "knn": None, "nnguide": 10}),
    "bank": ("a whole number from 1 on", {"nnguide": 12812}),
    "dim": (
        "a whole number from 1 on",
        dict.fromkeys(("vim", "residual", "neco", "neco-resnet")),
    ),
    "alpha": ("a finite number", {"nci": 0.001}),
}
LOW, HIGH = 0.21940805315971373, 1.3520756840705868
PUBLISHED = {
    "low": {"lhact": LOW, "lhact-low": LOW, "vra": 0.5},
    "high": {**dict.fromkeys(("lhact", "lhact-high", "bfact"), HIGH), "react": 1, "vra": 1},
}


@every
def test_parameters_are_the_papers_and_their_ranges_stand_in_a_signature(name):
    entry = ENTRIES[name]
    wanted = {p: values[name] for p, (_, values) in PARAMETERS.items() if name in values}
    assert entry.parameters == wanted
    assert entry.published == {p: v[name] for p, v in PUBLISHED.items() if name in v}
    for parameter, default in wanted.items():
        found = parameter_range(entry, parameter)
        assert found.wanted == PARAMETERS[parameter][0]
        assert default is None or isinstance(default, Percentile) or found.holds(default)


# Functions


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_returns_new_numbers_and_leaves_everything_as_it_was(name, dtype):
    setup = Setup(dtype)
    given = [setup.activations, setup.weight, setup.bias, setup.labels, *setup.calibration]
    copies = [tensor.clone() for tensor in given]
    method, _ = bound(name, setup)
    result = method(setup.activations)
    assert result.shape == ((12, CHANNELS) if name in RECTIFIERS else (12,))
    assert method(setup.activations[:0]).shape == (0, *result.shape[1:])
    assert result.dtype == dtype
    assert result.data_ptr() != setup.activations.data_ptr()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))


@every
def test_an_image_does_not_depend_on_its_batch(name):
    setup = Setup()
    method, _ = bound(name, setup)
    one_by_one = torch.cat([method(image) for image in setup.activations.split(1)])
    torch.testing.assert_close(method(setup.activations), one_by_one)
    torch.testing.assert_close(method(setup.activations.T.contiguous().T), one_by_one)


@every
def test_usual_and_unusual_activations_stay_finite(name):
    setup = Setup(torch.float32)
    setup.calibration = [batch - 1 for batch in setup.calibration]
    # A rectifier's own thresholds must stay positive.
    method, _ = bound(name, setup, **({"high": 1.0} if name in ("bfact", "lhact-high") else {}))
    for value in (0.0, 1.0, -1.0):
        assert method(torch.full((2, CHANNELS), value)).isfinite().all()
    assert method(setup.activations - 1).isfinite().all()


@every
@pytest.mark.parametrize("size", [1e8, 1e20, 1e30])
def test_huge_activations_overflow_or_are_right(name, size):
    """Never a number that overflow on the way has made wrong."""
    wide = Setup()
    wide.activations[0] *= size
    wide.activations[1, 3] = size
    narrow = Setup(torch.float32)
    wanted = bound(name, wide)[0](wide.activations.float().double())
    got = bound(name, narrow)[0](wide.activations.float())
    finite = got.isfinite()
    torch.testing.assert_close(got[finite].double(), wanted[finite], rtol=2e-4, atol=1e-4)
    if name not in ("mahalanobis", "rmds"):  # their squares overflow where nothing else does
        assert finite.all()


@every
def test_any_value_in_range_gives_numbers_or_a_clear_refusal(name):
    setup = Setup(torch.float32)
    values = (0, 1e-300, 1e-30, 1e30, 1e300, -1e30, -1e300, math.inf, -math.inf, 10**9, 0.5)
    for parameter in ENTRIES[name].parameters:
        for value in filter(parameter_range(ENTRIES[name], parameter).holds, values):
            try:
                result = bound(name, setup, **{parameter: value})[0](setup.activations)
            except ValueError as error:
                assert parameter in str(error)  # noqa: PT017
            else:
                assert len(result) == 12
                assert not result.isnan().any()


@every
def test_can_be_exported(name):
    """torch.export with any number of images, the fitted constants among the exported weights."""
    setup = Setup(torch.float32)

    class Module(torch.nn.Module):
        method = staticmethod(bound(name, setup)[0])

        def forward(self, activations):
            return self.method(activations)

    shapes = ({0: torch.export.Dim("images")},)
    program = torch.export.export(Module(), (setup.activations[:5],), dynamic_shapes=shapes)
    for images in (12, 1):
        activations = setup.activations[:images]
        wanted = Module()(activations)
        torch.testing.assert_close(program.module()(activations), wanted, rtol=1e-5, atol=1e-6)


@scoring
def test_higher_means_more_in_distribution(name):
    setup = Setup()
    method, _ = bound(name, setup)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(180, CHANNELS, dtype=torch.float64, generator=generator)
    like = torch.cat(setup.calibration) + 0.05 * noise
    # The same activations on other channels: as large, but no network would give them.
    unlike = torch.stack([row[torch.randperm(CHANNELS, generator=generator)] for row in like])
    assert (method(like) > method(unlike)).double().mean() > 0.7


# Fits


@fitting
def test_fit_returns_the_value_of_each_parameter_that_it_decides(name):
    setup = Setup()
    entry = ENTRIES[name]
    _, values = bound(name, setup)
    assert values == {**values, **SMALL.get(name, {})}
    undecided = {parameter: None for parameter, value in entry.parameters.items() if value is None}
    _, values = bound(name, setup, **undecided)
    assert all(type(values[parameter]) is int for parameter in undecided)


@fitting
def test_fit_does_not_depend_on_how_the_calibration_set_is_batched(name, monkeypatch):
    setup = Setup()
    wanted = bound(name, setup)[0](setup.activations)
    # Small pieces also make the nearest neighbours of each image come together from many merges.
    monkeypatch.setattr(statistics, "PIECE", 4)
    assert max(len(piece) for piece in statistics.pieces(setup.calibration)) == 4
    for size in (1000, 7, 1):
        setup.calibration = list(torch.cat(setup.calibration).split(size))
        torch.testing.assert_close(bound(name, setup)[0](setup.activations), wanted)


# The percentiles that bound() finds by itself need the whole set at once.
THRESHOLDS = {"optfs": {"low": 0.0, "high": 5.0}}


@fitting
def test_fit_never_holds_the_calibration_set(name):
    class Fresh:
        """Every pass makes its batches anew, and counts those of earlier ones still held."""

        def __init__(self, batches):
            self.arrays, self.alive, self.most = [batch.numpy() for batch in batches], [], 0

        def __iter__(self):
            for array in self.arrays:
                self.most = max(self.most, sum(held() is not None for held in self.alive))
                copy = array.copy()
                self.alive.append(weakref.ref(copy))
                yield torch.from_numpy(copy)

    setup = Setup(torch.float32)
    setup.calibration = Fresh(torch.cat(setup.calibration).split(3))
    method, _ = bound(name, setup, **THRESHOLDS.get(name, {}))
    method(setup.activations)
    assert setup.calibration.most <= 2


@fitting
def test_a_calibration_set_that_is_empty_or_can_be_read_only_once_is_refused(name):
    setup = Setup()
    batches, labels = setup.calibration, setup.labels
    setup.calibration, setup.labels = [], labels[:0]
    with pytest.raises(ValueError, match="calibration set is empty"):
        bound(name, setup, **THRESHOLDS.get(name, {}))
    setup.calibration, setup.labels = iter(batches), labels
    with pytest.raises(ValueError, match="the calibration set is read several times"):
        bound(name, setup, **THRESHOLDS.get(name, {}))
