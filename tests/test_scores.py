"""Every score against its formula written out in float64 with NumPy or plain Python, and the properties all of them share."""

import inspect
import math
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from lhact.methods import scores
from lhact.methods.scores import SCORES, energy, gen, maxlogit, msp, odin

CHANNELS, CLASSES = 24, 7
# Settings that bite on so small a network; what is not here keeps its default.
SMALL = {
    "energy": {"temperature": 2.5},
    "gen": {"k": 3},
    "lts": {"percentile": 75},
    "knn": {"k": 5},
    "nnguide": {"k": 4, "bank": 30},
    "vim": {"dim": 9},
    "residual": {"dim": 9},
    "neco": {"dim": 5},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On matrices this small, threads take longer to meet than to work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Setup:
    """A linear head, calibration batches of uneven sizes with labels, and test activations."""

    def __init__(self, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(CLASSES, CHANNELS, generator=generator, dtype=torch.float64).to(dtype)
        self.bias = torch.randn(CLASSES, generator=generator, dtype=torch.float64).to(dtype)
        sizes = (61, 1, 100, 18)
        self.labels = torch.randint(CLASSES, (sum(sizes),), generator=generator)
        noise = torch.randn(sum(sizes), CHANNELS, generator=generator, dtype=torch.float64)
        mixing = torch.randn(CHANNELS, CHANNELS, generator=generator, dtype=torch.float64) * 0.2
        rows = (1.5 * self.weight.double()[self.labels] + noise @ mixing + 0.5).clamp(min=0)
        self.calibration = [rows.to(dtype) for rows in rows.split(sizes)]
        self.activations = (torch.randn(12, CHANNELS, generator=generator, dtype=torch.float64) + 0.5).clamp(min=0).to(dtype)

    def arrays(self):
        """(z, logits, Z, labels, W, b) for the oracles, float64."""
        w, b = self.weight.double().numpy(), self.bias.double().numpy()
        z = self.activations.double().numpy()
        return z, z @ w.T + b, torch.cat(self.calibration).double().numpy(), self.labels.numpy(), w, b


def bound(name, setup, **changes):
    """The score as a function of activations and logits, fitted; and its parameters."""
    entry = SCORES[name]
    parameters = {**entry.parameters, **SMALL.get(name, {}), **changes}
    offered = {"weight": setup.weight, "bias": setup.bias, "labels": setup.labels, "calibration": setup.calibration, **parameters}
    if entry.fit:
        offered |= entry.fit(**{key: offered[key] for key in inspect.signature(entry.fit).parameters})
    wanted = inspect.signature(entry.function).parameters
    assert set(wanted) <= {"activations", "logits", *offered}
    function = partial(entry.function, **{key: offered[key] for key in wanted if key in offered})

    def score(activations):
        inputs = {"activations": activations, "logits": activations @ setup.weight.T + setup.bias}
        return function(**{key: value for key, value in inputs.items() if key in wanted})

    return score, parameters


# The oracles: arrays and parameters -> a list of numbers


def logsumexp(values):
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))


def softmax(values):
    return [math.exp(value - logsumexp(values)) for value in values]


def oracle_gen(z, logits, Z, labels, W, b, gamma, k):
    result = []
    for row in logits:
        p = sorted(softmax(row), reverse=True)
        result.append(-math.fsum(value**gamma * (1 - value) ** gamma for value in p[:k]))
    return result


def oracle_lts(z, logits, Z, labels, W, b, percentile):
    result = []
    for row, outputs in zip(z, logits, strict=True):
        kept = sorted(row, reverse=True)[: len(row) - round(len(row) * percentile / 100)]
        result.append(logsumexp(outputs * (math.fsum(row) / math.fsum(kept)) ** 2))
    return result


def oracle_dice(z, logits, Z, labels, W, b, percentile):
    contribution = Z.mean(axis=0) * W
    threshold = np.percentile(contribution, percentile)
    masked = [[w if c > threshold else 0.0 for w, c in zip(ws, cs, strict=True)] for ws, cs in zip(W, contribution, strict=True)]
    return [logsumexp(np.array(masked) @ row + b) for row in z]


def unit(row):
    return row / np.linalg.norm(row)


def oracle_knn(z, logits, Z, labels, W, b, k):
    return [-sorted(np.linalg.norm(unit(row) - unit(other)) for other in Z)[k - 1] for row in z]


def oracle_nnguide(z, logits, Z, labels, W, b, k, bank):
    count = min(bank, len(Z))
    chosen = [Z[i * len(Z) // count] for i in range(count)]
    result = []
    for row, outputs in zip(z, logits, strict=True):
        guided = sorted(logsumexp(W @ other + b) * (unit(row) @ unit(other)) for other in chosen)
        result.append(logsumexp(outputs) * np.mean(guided[-k:]))
    return result


def residual_norms(rows, Z, W, b, dim):
    origin = -np.linalg.pinv(W) @ b
    _, _, axes = np.linalg.svd(Z - origin, full_matrices=True)
    return np.linalg.norm((rows - origin) @ axes[dim:].T, axis=1)


def oracle_residual(z, logits, Z, labels, W, b, dim):
    return -residual_norms(z, Z, W, b, dim)


def oracle_vim(z, logits, Z, labels, W, b, dim):
    alpha = (Z @ W.T + b).max(axis=1).sum() / residual_norms(Z, Z, W, b, dim).sum()
    return [logsumexp(outputs) - alpha * norm for outputs, norm in zip(logits, residual_norms(z, Z, W, b, dim), strict=True)]


def oracle_mahalanobis(z, logits, Z, labels, W, b):
    means = {c: Z[labels == c].mean(axis=0) for c in set(labels)}
    precision = np.linalg.inv(sum(np.outer(row - means[c], row - means[c]) for row, c in zip(Z, labels, strict=True)) / len(Z))
    return [-min((row - m) @ precision @ (row - m) for m in means.values()) for row in z]


def oracle_rmds(z, logits, Z, labels, W, b):
    mean = Z.mean(axis=0)
    precision = np.linalg.inv((Z - mean).T @ (Z - mean) / len(Z))
    background = [(row - mean) @ precision @ (row - mean) for row in z]
    return [score + md for score, md in zip(oracle_mahalanobis(z, logits, Z, labels, W, b), background, strict=True)]


def oracle_fdbd(z, logits, Z, labels, W, b):
    result = []
    for row, outputs in zip(z, logits, strict=True):
        best = int(np.argmax(outputs))
        others = [c for c in range(len(W)) if c != best]
        distances = [(outputs[best] - outputs[c]) / np.linalg.norm(W[best] - W[c]) for c in others]
        result.append(np.mean(distances) / np.linalg.norm(row - Z.mean(axis=0)))
    return result


def oracle_neco(z, logits, Z, labels, W, b, dim):
    _, _, axes = np.linalg.svd(Z - Z.mean(axis=0))
    return [np.linalg.norm(axes[:dim] @ row) / np.linalg.norm(row) * max(outputs) for row, outputs in zip(z, logits, strict=True)]


def per_logits(function):
    return lambda z, logits, *arrays, **parameters: [function(list(row), **parameters) for row in logits]


ORACLES = {
    "msp": per_logits(lambda row: max(softmax(row))),
    "odin": per_logits(lambda row, temperature: max(softmax([value / temperature for value in row]))),
    "energy": per_logits(lambda row, temperature: temperature * logsumexp([value / temperature for value in row])),
    "maxlogit": per_logits(max),
    "gen": oracle_gen,
    "lts": oracle_lts,
    "dice": oracle_dice,
    "knn": oracle_knn,
    "nnguide": oracle_nnguide,
    "vim": oracle_vim,
    "residual": oracle_residual,
    "mahalanobis": oracle_mahalanobis,
    "rmds": oracle_rmds,
    "fdbd": oracle_fdbd,
    "neco": oracle_neco,
}

every = pytest.mark.parametrize("name", SCORES)


def test_every_score_has_an_oracle():
    assert set(ORACLES) == set(SCORES)


@every
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_the_formula(name, seed):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        setup = Setup(dtype, seed)
        score, parameters = bound(name, setup)
        wanted = torch.tensor(np.array(ORACLES[name](*setup.arrays(), **parameters)))
        got = score(setup.activations)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@every
@pytest.mark.parametrize("percentile", [0, 37.5, 100])
def test_percentiles_at_and_off_the_ends(name, percentile):
    if "percentile" not in SCORES[name].parameters or (name == "lts" and percentile == 100):
        return
    setup = Setup()
    score, parameters = bound(name, setup, percentile=percentile)
    torch.testing.assert_close(score(setup.activations), torch.tensor(np.array(ORACLES[name](*setup.arrays(), **parameters))))


@every
def test_returns_one_number_per_image_and_leaves_everything_as_it_was(name):
    setup = Setup(torch.float32)
    given = [setup.activations, setup.weight, setup.bias, setup.labels, *setup.calibration]
    copies = [tensor.clone() for tensor in given]
    score, _ = bound(name, setup)
    assert score(setup.activations).shape == (12,)
    assert score(setup.activations[:0]).shape == (0,)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))


@every
def test_an_image_does_not_depend_on_its_batch(name):
    setup = Setup()
    score, _ = bound(name, setup)
    torch.testing.assert_close(score(setup.activations), torch.cat([score(image) for image in setup.activations.split(1)]))


@every
def test_fit_does_not_depend_on_how_the_calibration_set_is_batched(name, monkeypatch):
    setup = Setup()
    wanted = bound(name, setup)[0](setup.activations)
    # small pieces also make the nearest neighbours of each image come together from many merges
    monkeypatch.setattr(scores, "PIECE", 4)
    for size in (1000, 7, 1):
        setup.calibration = list(torch.cat(setup.calibration).split(size))
        torch.testing.assert_close(bound(name, setup)[0](setup.activations), wanted)


@every
def test_fit_never_holds_the_calibration_set(name):
    class Fresh:
        """Every pass makes its batches anew, and counts those of earlier ones that someone still holds."""

        def __init__(self, batches):
            self.arrays, self.alive, self.most = [batch.numpy() for batch in batches], [], 0

        def __iter__(self):
            for array in self.arrays:
                self.most = max(self.most, sum(reference() is not None for reference in self.alive))
                copy = array.copy()
                self.alive.append(weakref.ref(copy))
                yield torch.from_numpy(copy)

    setup = Setup(torch.float32)
    setup.calibration = Fresh(torch.cat(setup.calibration).split(3))
    score, _ = bound(name, setup)
    score(setup.activations)
    assert setup.calibration.most <= 2


@every
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_rows_of_one_value_stay_finite(name, value):
    setup = Setup(torch.float32)
    score, _ = bound(name, setup)
    assert score(torch.full((2, CHANNELS), value)).isfinite().all()


@every
def test_signed_activations_stay_finite(name):
    setup = Setup(torch.float32)
    setup.calibration = [batch - 1 for batch in setup.calibration]
    score, _ = bound(name, setup)
    assert score(setup.activations - 1).isfinite().all()


@every
def test_higher_means_more_in_distribution(name):
    setup = Setup()
    score, _ = bound(name, setup)
    generator = torch.Generator().manual_seed(5)
    like = torch.cat(setup.calibration) + 0.05 * torch.randn(180, CHANNELS, dtype=torch.float64, generator=generator)
    # the same activations on other channels: as large, but no network would give them
    unlike = torch.stack([row[torch.randperm(CHANNELS, generator=generator)] for row in like])
    wins = (score(like)[:, None] > score(unlike)).double().mean()
    assert wins > 0.7


def test_settings_of_the_papers():
    assert {name: dict(entry.parameters) for name, entry in SCORES.items() if entry.parameters} == {
        "odin": {"temperature": 1000},
        "energy": {"temperature": 1},
        "gen": {"gamma": 0.1, "k": 100},
        "lts": {"percentile": 95},
        "dice": {"percentile": 70},
        "knn": {"k": 1000},
        "vim": {"dim": 0},
        "residual": {"dim": 0},
        "nnguide": {"k": 10, "bank": 12812},
        "neco": {"dim": 0},
    }


def test_calibration_batches_are_cut_to_a_bounded_size(monkeypatch):
    monkeypatch.setattr(scores, "PIECE", 4)
    assert [len(piece) for piece in scores._pieces([torch.zeros(10, 2), torch.zeros(3, 2)])] == [4, 4, 2, 3]


def test_only_odin_reads_perturbed_images():
    assert {name: entry.reads for name, entry in SCORES.items() if entry.reads} == {"odin": "odin"}


# One by one


def test_a_sharp_softmax_keeps_its_order():
    gaps = torch.tensor([18.0, 20.0, 22.0, 40.0])
    logits = torch.stack([gaps, torch.zeros(4), torch.zeros(4)], dim=1)
    # 1 - p from 3e-8 to 8e-18: float32's 1 - softmax is 0 for all of them
    wanted = []
    for gap in gaps.tolist():
        total = 1 + 2 * math.exp(-gap)
        rest, p = 2 * math.exp(-gap) / total, math.exp(-gap) / total
        wanted.append(-((1 / total * rest) ** 0.1 + 2 * (p * (1 - p)) ** 0.1))
    torch.testing.assert_close(gen(logits, 0.1, 100), torch.tensor(wanted), rtol=2e-6, atol=0)
    assert (gen(logits, 0.1, 3).diff() > 0).all()


def test_gen_of_more_classes_than_there_are_takes_all_and_of_one_the_largest():
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    p = softmax([1.0, 3.0, 2.0])
    assert torch.equal(gen(logits, 0.5, 3), gen(logits, 0.5, 100))
    assert gen(logits, 0.5, 100).item() == pytest.approx(-sum(math.sqrt(q * (1 - q)) for q in p))
    assert gen(logits, 0.5, 1).item() == pytest.approx(-math.sqrt(p[1] * (1 - p[1])))
    assert gen(torch.tensor([[4.0]]), 0.5, 1).item() == 0
    # equal logits: each counts once
    assert gen(torch.zeros(1, 4), 1.0, 4).item() == pytest.approx(-4 * 0.25 * 0.75)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0, -1e4], [500.0, 499.0, 0.0]])
    for function in (msp, energy, maxlogit, partial(odin, temperature=1000), partial(gen, gamma=0.1, k=3)):
        assert function(logits).isfinite().all()


def test_lts_counts_negative_activations_as_nothing():
    z, logits = torch.tensor([[3.0, 1.0, -5.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    assert scores.lts(z, logits, 75).item() == pytest.approx(logsumexp([16 / 9, 32 / 9]))
    # nothing positive: the logits as they are
    assert scores.lts(-z.abs(), logits, 75).item() == pytest.approx(logsumexp([1.0, 2.0]))
    assert scores.lts(z.abs() * 0, logits, 75).item() == pytest.approx(logsumexp([1.0, 2.0]))
    # at least one channel is kept
    assert scores.lts(z, logits, 100).item() == pytest.approx(logsumexp([16 / 9, 32 / 9]))


def test_dice_keeps_only_what_is_strictly_above_the_percentile():
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, -6.0]])
    for percentile in (0, 20, 40, 39.9, 50, 90, 100):
        masked = SCORES["dice"].fit([torch.ones(3, 3)], weight, percentile)["masked_weight"]
        wanted = np.where(weight.numpy() > np.percentile(weight.numpy(), percentile), weight.numpy(), 0)
        assert np.array_equal(masked.numpy(), wanted)


def test_knn_of_a_row_of_zeros_is_at_distance_one():
    neighbours = [torch.eye(3), torch.zeros(1, 3)]
    assert scores.knn(torch.zeros(1, 3), neighbours, 1).item() == 0
    assert scores.knn(torch.zeros(1, 3), neighbours, 2).item() == pytest.approx(-1)
    assert scores.knn(torch.tensor([[5.0, 0, 0]]), neighbours, 1).item() == 0
    assert scores.knn(torch.tensor([[5.0, 0, 0]]), neighbours, 2).item() == pytest.approx(-1)
    assert scores.knn(torch.tensor([[5.0, 0, 0]]), neighbours, 3).item() == pytest.approx(-math.sqrt(2))


def test_knn_streams_what_it_was_given():
    setup = Setup()
    assert SCORES["knn"].fit(setup.calibration, 180)["neighbours"] is setup.calibration


def test_nnguide_takes_the_whole_of_a_small_set_and_evenly_spaced_rows_of_a_large_one():
    setup = Setup()
    everything = torch.cat(setup.calibration)
    for bank, rows in ((12812, range(180)), (180, range(180)), (4, (0, 45, 90, 135)), (1, (0,))):
        guide = SCORES["nnguide"].fit(setup.calibration, setup.weight, setup.bias, 1, bank)["guide"]
        directions = guide / guide.norm(dim=1, keepdim=True)
        wanted = everything[list(rows)] / everything[list(rows)].norm(dim=1, keepdim=True)
        torch.testing.assert_close(directions, wanted)


def test_the_origin_is_that_of_the_pseudo_inverse():
    generator = torch.Generator().manual_seed(3)
    for rows, columns, rank in ((5, 9, 5), (9, 5, 5), (6, 6, 6), (6, 9, 4), (9, 6, 4)):
        weight = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
        weight = weight @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)
        bias = torch.randn(rows, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(scores._origin(weight, bias), -torch.linalg.pinv(weight) @ bias, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("channels", "dim"), [(2048, 1000), (1024, 512), (768, 512), (767, 383), (64, 32)])
def test_default_dimension_of_the_principal_space(channels, dim, monkeypatch):
    # only the rule is checked: the decomposition of 2048 channels would take seconds
    identity = torch.eye(channels, dtype=torch.float64)
    monkeypatch.setattr(scores, "_moments", lambda calibration: (1, identity[0], identity))
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (torch.ones_like(matrix[0]), torch.eye(len(matrix)).double()))
    fitted = SCORES["residual"].fit([], torch.ones(1, channels), torch.zeros(1), 0)
    assert fitted["null_space"].shape == (channels, channels - dim)


def test_vim_leaves_out_the_leading_directions():
    # two channels vary strongly, one weakly; the origin is 0
    rows = torch.tensor([[5.0, 0, 0], [-5, 0, 0], [0, 3, 0], [0, -3, 0], [0, 0, 0.5], [0, 0, -0.5]], dtype=torch.float64)
    fitted = SCORES["residual"].fit([rows], torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 2)
    assert scores.residual(torch.tensor([[7.0, 8.0, -2.0]], dtype=torch.float64), **fitted).item() == pytest.approx(-2)


def test_dead_channels_do_not_matter_to_gaussians():
    setup = Setup()
    wanted = {name: bound(name, setup)[0](setup.activations) for name in ("mahalanobis", "rmds")}
    pad = torch.nn.functional.pad
    setup.calibration = [pad(batch, (0, 2)) + pad(torch.zeros(CHANNELS), (0, 2), value=3.0) for batch in setup.calibration]
    setup.weight = pad(setup.weight, (0, 2))
    for name, score in wanted.items():
        torch.testing.assert_close(bound(name, setup)[0](pad(setup.activations, (0, 2), value=1.0)), score)


def test_gaussians_on_fewer_images_than_channels_use_the_pseudo_inverse():
    setup = Setup()
    setup.calibration, setup.labels = [torch.cat(setup.calibration)[:15]], torch.arange(15) % 3
    rows, labels = setup.calibration[0].numpy(), setup.labels.numpy()
    means = np.stack([rows[labels == c].mean(axis=0) for c in range(3)])
    precision = np.linalg.pinv((rows - means[labels]).T @ (rows - means[labels]) / 15, hermitian=True)
    wanted = [-min((row - m) @ precision @ (row - m) for m in means) for row in setup.activations.numpy()]
    got = bound("mahalanobis", setup)[0](setup.activations)
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-6, atol=0)
    assert bound("rmds", setup)[0](setup.activations).isfinite().all()


def test_one_class_is_its_own_background():
    setup = Setup()
    setup.labels = torch.zeros_like(setup.labels)
    assert torch.equal(bound("rmds", setup)[0](setup.activations), torch.zeros(12, dtype=torch.float64))


def test_classes_that_do_not_occur_are_near_to_nothing():
    setup = Setup()
    wanted = bound("mahalanobis", setup)[0](setup.activations)
    setup.labels = 100 * setup.labels + 3
    torch.testing.assert_close(bound("mahalanobis", setup)[0](setup.activations), wanted)


def test_relative_distance_does_not_drown_in_the_distances():
    """1 of 200 directions separates the classes: both distances are near 200, their difference is a few units."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 200, generator=generator, dtype=torch.float64) + 1000
    labels = torch.arange(2000) % 2
    rows[:, 0] += 3 * labels
    wide = SCORES["rmds"].fit([rows], labels)
    narrow = SCORES["rmds"].fit([rows.float()], labels)
    test = rows[:50]
    exact = scores.rmds(test.float().double(), **wide)
    torch.testing.assert_close(scores.rmds(test.float(), **narrow).double(), exact, rtol=0, atol=2e-3)


def test_fdbd_of_two_classes_with_equal_weights():
    weight = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])
    fitted = SCORES["fdbd"].fit([torch.zeros(1, 2)], weight)
    assert fitted["inverse_distances"][0].tolist() == pytest.approx([0, 0, 1 / math.sqrt(2)])
    logits = torch.tensor([[4.0, 3.0, 1.0]])
    assert scores.fdbd(torch.tensor([[0.0, 2.0]]), logits, **fitted).item() == pytest.approx(3 / math.sqrt(2) / 2 / 2)


# What is refused


@pytest.mark.parametrize("k", [181, 0, 2.5, math.inf, math.nan])
def test_knn_needs_as_many_images_as_k(k):
    with pytest.raises(ValueError, match=r"knn.k must be a whole number from 1 to 180, .*--set knn.k=N"):
        bound("knn", Setup(), k=k)


def test_nnguide_needs_a_bank_of_k_images():
    with pytest.raises(ValueError, match=r"nnguide.k must be a whole number from 1 to 3, .*--set nnguide.k=N"):
        bound("nnguide", Setup(), bank=3)
    with pytest.raises(ValueError, match=r"nnguide.bank must be a whole number from 1 on"):
        bound("nnguide", Setup(), bank=0)


@pytest.mark.parametrize("k", [0, 1.5])
def test_gen_needs_a_whole_number_of_classes(k):
    with pytest.raises(ValueError, match=r"gen.k must be a whole number from 1 on; got .*--set gen.k=N"):
        gen(torch.zeros(1, 3), 0.1, k)


@pytest.mark.parametrize(("name", "most"), [("vim", CHANNELS - 1), ("residual", CHANNELS - 1), ("neco", CHANNELS)])
def test_a_principal_space_must_fit_into_what_the_activations_span(name, most):
    bound(name, Setup(), dim=most)
    with pytest.raises(ValueError, match=rf"{name}.dim must be a whole number from 1 to {most}, .*--set {name}.dim=N"):
        bound(name, Setup(), dim=most + 1)
    setup = Setup()
    setup.calibration = [torch.cat(setup.calibration)[:8]]
    few = 7
    with pytest.raises(ValueError, match=rf"{name}.dim must be a whole number from 1 to {few},"):
        bound(name, setup, dim=8)


@pytest.mark.parametrize("name", ["lts", "dice"])
@pytest.mark.parametrize("percentile", [-1, 100.5])
def test_a_percentile_outside_0_to_100_is_refused(name, percentile):
    setup = Setup()
    with pytest.raises(ValueError, match=rf"{name}.percentile must be between 0 and 100"):
        bound(name, setup, percentile=percentile)[0](setup.activations)


@pytest.mark.parametrize("name", ["mahalanobis", "rmds"])
def test_gaussians_need_labels_and_spread(name):
    setup = Setup()
    setup.labels = None
    with pytest.raises(ValueError, match="needs labels: calibration images in one folder for each class"):
        bound(name, setup)
    setup.labels = torch.zeros(179, dtype=torch.int64)
    with pytest.raises(ValueError, match="got 179 labels and 180 images"):
        bound(name, setup)
    setup.labels = torch.arange(180)
    with pytest.raises(ValueError, match="no class has two different calibration images"):
        bound(name, setup)


@pytest.mark.parametrize("name", [name for name, entry in SCORES.items() if entry.fit])
def test_an_empty_calibration_set_is_refused(name):
    setup = Setup()
    setup.calibration = []
    with pytest.raises(ValueError, match=r"calibration set is empty|from 1 to 0"):
        bound(name, setup)
