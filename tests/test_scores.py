"""Every score against its formula written out in float64 with NumPy, SciPy and scikit-learn."""

import functools
import math

import numpy as np
import pytest
import torch
from fitted import CHANNELS, CLASSES, Setup, bound
from numpy.linalg import norm
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, rel_entr, softmax
from scipy.stats import entropy as shannon
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from lhact.methods import scores_by_subspace, statistics
from lhact.methods.scores import SCORES
from lhact.methods.scores_by_class import rmds
from lhact.methods.scores_by_head import fdbd, lts
from lhact.methods.scores_by_neighbours import knn
from lhact.methods.scores_of_logits import energy, entropy, gen, msp, odin

# The oracles: (a Case, parameters) -> scores


class Case:
    """z, l, E, best: activations, logits, energies and predicted classes of the test images; Z, L,
    labels: of the calibration images."""

    def __init__(self, setup):
        self.W, self.b = setup.weight.double().numpy(), setup.bias.double().numpy()
        self.z, self.labels = setup.activations.double().numpy(), setup.labels.numpy()
        self.Z = torch.cat(setup.calibration).double().numpy()
        self.l, self.L = self.z @ self.W.T + self.b, self.Z @ self.W.T + self.b
        self.E, self.best = logsumexp(self.l, axis=1), self.l.argmax(axis=1)

    def class_means(self, numbers):
        return {c: self.Z[numbers == c].mean(axis=0) for c in sorted(set(numbers))}


def unit(rows):
    return rows / norm(rows, axis=1, keepdims=True)


def odds(logits, temperature=1.0, others=1):
    p = softmax(logits / temperature, axis=1).max(axis=1)
    return np.log(p / ((1 - p) / others))


def oracle_gen(logits, gamma, k):
    p = np.sort(softmax(logits, axis=1))[:, -k:]
    return -(p**gamma * (1 - p) ** gamma).sum(axis=1)


def oracle_lts(c, percentile):
    kept = CHANNELS - round(CHANNELS * percentile / 100)
    ratio = c.z.sum(axis=1) / np.sort(c.z)[:, -kept:].sum(axis=1)
    return logsumexp(c.l * ratio[:, None] ** 2, axis=1)


def oracle_dice(c, percentile):
    contribution = c.Z.mean(axis=0) * c.W
    masked = np.where(contribution > np.percentile(contribution, percentile), c.W, 0)
    return logsumexp(c.z @ masked.T + c.b, axis=1)


def oracle_fdbd(c):
    distances = cdist(c.W[c.best], c.W)
    margins = (c.l.max(axis=1, keepdims=True) - c.l) / np.where(distances > 0, distances, 1)
    return margins.sum(axis=1) / (CLASSES - 1) / norm(c.z - c.Z.mean(axis=0), axis=1)


def oracle_nci(c, alpha):
    projection = (c.W[c.best] * unit(c.z - c.Z.mean(axis=0))).sum(axis=1)
    return projection + alpha * np.abs(c.z).sum(axis=1)


def oracle_gradnorm(c):
    """The gradient itself, by automatic differentiation."""
    result = []
    for row in torch.from_numpy(c.z):
        weight = torch.from_numpy(c.W).requires_grad_()
        log_p = (weight @ row + torch.from_numpy(c.b)).log_softmax(dim=0)
        uniform = torch.full_like(log_p, 1 / CLASSES)
        divergence = torch.nn.functional.kl_div(log_p, uniform, reduction="sum")
        result.append(torch.autograd.grad(divergence, weight)[0].abs().sum().item())
    return result


def oracle_nnguide(c, k, bank):
    chosen = [i * len(c.Z) // bank for i in range(bank)]
    guide = unit(c.Z[chosen]) * logsumexp(c.L[chosen], axis=1)[:, None]
    return np.sort(unit(c.z) @ guide.T)[:, -k:].mean(axis=1) * c.E


def residuals(c, rows, dim):
    origin = -np.linalg.pinv(c.W) @ c.b
    _, _, axes = np.linalg.svd(c.Z - origin, full_matrices=True)
    return norm((rows - origin) @ axes[dim:].T, axis=1)


def oracle_vim(c, dim):
    alpha = c.L.max(axis=1).sum() / residuals(c, c.Z, dim).sum()
    return c.E - alpha * residuals(c, c.z, dim)


def oracle_neco(c, dim):
    leading = PCA(CHANNELS).fit(c.Z).components_[:dim]
    return norm(c.z @ leading.T, axis=1) / norm(c.z, axis=1) * c.l.max(axis=1)


def oracle_neco_resnet(c, dim):
    scaler = StandardScaler().fit(c.Z)
    rows = scaler.transform(c.z)
    components = PCA(c.z.shape[1]).fit(scaler.transform(c.Z))
    return norm(components.transform(rows)[:, :dim], axis=1) / norm(rows, axis=1)


def mahalanobis_distances(c, centred, means):
    precision = np.linalg.pinv(centred.T @ centred / len(c.Z), hermitian=True)
    return cdist(c.z, means, "mahalanobis", VI=precision).min(axis=1) ** 2


def oracle_mahalanobis(c):
    means = c.class_means(c.labels)
    centred = c.Z - np.stack([means[label] for label in c.labels])
    return -mahalanobis_distances(c, centred, np.stack(list(means.values())))


def oracle_rmds(c):
    mean = c.Z.mean(axis=0, keepdims=True)
    return oracle_mahalanobis(c) + mahalanobis_distances(c, c.Z - mean, mean)


def oracle_klm(c):
    p, predicted = softmax(c.L, axis=1), c.L.argmax(axis=1)
    typical = np.stack([p[predicted == k].mean(axis=0) for k in set(predicted)])
    return -rel_entr(softmax(c.l, axis=1)[:, None], typical).sum(axis=2).min(axis=1)


def oracle_she(c):
    right = c.L.argmax(axis=1) == c.labels
    patterns = c.class_means(np.where(right, c.labels, -1))
    best = [max(patterns.keys() - {-1}, key=lambda k: row[k]) for row in c.l]
    return [row @ patterns[k] for row, k in zip(c.z, best, strict=True)]


def oracle_cadref(c):
    means = c.class_means(c.L.argmax(axis=1))
    best = [max(means, key=lambda k: row[k]) for row in c.l]
    error = c.z - np.stack([means[k] for k in best])
    along = np.where(error * c.W[best] > 0, abs(error), 0).sum(axis=1)
    against = abs(error).sum(axis=1) - along
    scaled = along / np.maximum(c.E, 1e-12) + against / logsumexp(c.L, axis=1).mean()
    return -scaled / abs(c.z).sum(axis=1)


ORACLES = {
    "msp": lambda c: odds(c.l),
    "odin": lambda c, temperature: odds(c.l, temperature, CLASSES - 1),
    "energy": lambda c, temperature: temperature * logsumexp(c.l / temperature, axis=1),
    "maxlogit": lambda c: c.l.max(axis=1),
    "gen": lambda c, gamma, k: oracle_gen(c.l, gamma, k),
    "entropy": lambda c: -np.log(shannon(softmax(c.l, axis=1), axis=1)),
    "lts": oracle_lts,
    "dice": oracle_dice,
    "fdbd": oracle_fdbd,
    "nci": oracle_nci,
    "gradnorm": oracle_gradnorm,
    "knn": lambda c, k: -np.sort(cdist(unit(c.z), unit(c.Z)))[:, k - 1],
    "nnguide": oracle_nnguide,
    "vim": oracle_vim,
    "residual": lambda c, dim: -residuals(c, c.z, dim),
    "neco": oracle_neco,
    "neco-resnet": oracle_neco_resnet,
    "mahalanobis": oracle_mahalanobis,
    "rmds": oracle_rmds,
    "klm": oracle_klm,
    "she": oracle_she,
    "cadref": oracle_cadref,
}


def check(name, setup, tolerance=1e-9, **changes):
    method, parameters = bound(name, setup, **changes)
    wanted = torch.tensor(np.array(ORACLES[name](Case(setup), **parameters)))
    got = method(setup.activations).double()
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_the_formula(name, seed):
    check(name, Setup(torch.float64, seed))
    check(name, Setup(torch.float32, seed), 2e-5)


# Sharpness without saturation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sharp_softmax_keeps_its_order(dtype):
    """Two classes `gap` below the top: 1 - p from 3e-8 to 1e-217, where float32's softmax is 1."""
    gaps = [18.0, 20.0, 22.0, 40.0, 110.0, 500.0]
    logits = torch.tensor([[gap + 7, 7.0, 7.0] for gap in gaps], dtype=dtype)
    log_odds = [gap - math.log(2) for gap in gaps]
    assert msp(logits).tolist() == pytest.approx(log_odds, rel=1e-6)
    # The mean of two that are equal.
    assert odin(logits, 0.5).tolist() == pytest.approx([2 * gap for gap in gaps], rel=1e-6)
    # To within 1e-7 of it, the entropy is 2 exp(-gap) (1 + gap).
    surprise = [gap - math.log(2 * (1 + gap)) for gap in gaps]
    assert entropy(logits).tolist() == pytest.approx(surprise, rel=1e-6)
    sums = [-(1 + 2 ** (1 - 0.1)) * (2 * math.exp(-gap)) ** 0.1 for gap in gaps]
    assert gen(logits, 0.1, 100).tolist() == pytest.approx(sums, rel=3e-6)
    assert (gen(logits, 0.1, 3).diff() > 0).all()


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1000.0, 1e9])
def test_odin_orders_images_at_any_temperature(temperature):
    logits = 8 * torch.randn(3000, 100, generator=torch.Generator().manual_seed(0))
    gaps = logits.double().numpy() - logits.double().numpy().max(axis=1, keepdims=True)
    others = np.sort(gaps / temperature, axis=1)[:, :-1]
    flat, sharp = np.expm1(others).mean(axis=1), math.log(99) - logsumexp(others, axis=1)
    exact = -np.log1p(flat) if temperature > 1 else sharp
    got = odin(logits, temperature).numpy()
    assert len(np.unique(got)) > 2990
    np.testing.assert_allclose(rankdata(got), rankdata(exact), atol=2)


def test_gen_of_more_classes_than_there_are_takes_all_and_of_one_the_largest():
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    assert torch.equal(gen(logits, 0.5, 3), gen(logits, 0.5, 100))
    assert gen(logits, 0.5, 1).item() == pytest.approx(oracle_gen(logits.numpy(), 0.5, 1)[0])
    assert gen(torch.tensor([[4.0]]), 0.5, 1).item() == 0
    # Equal logits: each counts once.
    assert gen(torch.zeros(1, 4), 1.0, 4).item() == pytest.approx(-4 * 0.25 * 0.75)


def test_large_logits_and_extreme_temperatures_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0, -1e4], [500.0, 499.0, 0.0]])
    assert msp(logits).tolist() == pytest.approx([1e4, 1])
    assert energy(logits).tolist() == pytest.approx([1e4, 500 + math.log1p(math.exp(-1))])
    assert energy(logits, 1e-300).tolist() == [1e4, 500]  # the largest logit is the limit
    assert gen(logits, 0.1, 3).isfinite().all()


# One by one


def test_lts_counts_negative_activations_as_nothing():
    for percentile in (0, 37.5, 90):  # nothing negative
        check("lts", Setup(), percentile=percentile)
    z, logits = torch.tensor([[3.0, 1.0, -5.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    for percentile in (75, 100):  # at least one channel is kept
        assert lts(z, logits, percentile).item() == pytest.approx(logsumexp([16 / 9, 32 / 9]))
    for nothing in (-z.abs(), z * 0):  # nothing positive: the logits as they are
        assert lts(nothing, logits, 75).item() == pytest.approx(logsumexp([1.0, 2.0]))


def test_dice_keeps_only_what_is_strictly_above_the_percentile():
    for percentile in (0, 37.5, 90, 100):
        check("dice", Setup(), percentile=percentile)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, -6.0]])
    for percentile in (0, 20, 40, 39.9, 50, 90, 100):
        masked = SCORES["dice"].fit([torch.ones(3, 3)], weight, percentile)["masked_weight"]
        wanted = np.where(weight.numpy() > np.percentile(weight.numpy(), percentile), weight, 0)
        assert np.array_equal(masked.numpy(), wanted)


def test_fdbd_of_two_classes_with_equal_weights():
    weight = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])
    fitted = SCORES["fdbd"].fit([torch.zeros(1, 2)], weight)
    assert fitted["inverse_distances"][0].tolist() == pytest.approx([0, 0, 1 / math.sqrt(2)])
    logits = torch.tensor([[4.0, 3.0, 1.0]])
    score = fdbd(torch.tensor([[0.0, 2.0]]), logits, **fitted).item()
    assert score == pytest.approx(3 / math.sqrt(2) / 2 / 2)


def test_knn_of_a_row_of_zeros_is_at_distance_one():
    neighbours = (torch.eye(3), torch.zeros(1, 3))
    for row, distances in (([0.0, 0, 0], [0, 1]), ([5.0, 0, 0], [0, 1, math.sqrt(2)])):
        found = [-knn(torch.tensor([row]), neighbours, k + 1).item() for k in range(len(distances))]
        assert found == pytest.approx(distances)


@pytest.mark.parametrize(
    ("rows", "k"),
    [(10**7, 1000), (1_281_167, 1000), (50_000, 50), (12_811, 12), (10_000, 10), (70, 10), (7, 7)],
)
def test_k_follows_the_size_of_the_bank(rows, k):
    calibration = [torch.zeros(rows, 1)]
    fitted = SCORES["knn"].fit(calibration, None)
    assert fitted == {"neighbours": calibration, "k": k}
    assert fitted["neighbours"] is calibration, "it is streamed"


def test_nnguide_takes_the_whole_of_a_small_set_and_evenly_spaced_rows_of_a_large_one():
    setup = Setup()
    everything = torch.cat(setup.calibration).numpy()
    for bank, rows in ((12812, range(180)), (180, range(180)), (4, (0, 45, 90, 135)), (1, (0,))):
        fitted = SCORES["nnguide"].fit(setup.calibration, setup.weight, setup.bias, 1, bank)
        assert (fitted["bank"], fitted["k"]) == (len(rows), 1)
        np.testing.assert_allclose(
            unit(fitted["guide"].numpy()), unit(everything[list(rows)]), rtol=1e-9
        )


def test_origin_is_that_of_the_pseudo_inverse():
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    for rows, columns, rank in ((7, 24, 7), (24, 7, 7), (9, 9, 9), (12, 20, 5), (20, 12, 5)):
        weight, bias = normal(rows, rank) @ normal(rank, columns), normal(rows)
        found = scores_by_subspace._origin(weight, bias)
        wanted = -torch.linalg.pinv(weight) @ bias
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("channels", "dim", "neco"),
    [(2048, 1000, 100), (1024, 512, 100), (768, 512, 100), (767, 383, 100), (64, 32, 32)],
)
def test_default_dimension_of_the_principal_space(channels, dim, neco, monkeypatch):
    # Only the rule is checked: the decomposition of 2048 channels would take seconds.
    identity = torch.eye(channels, dtype=torch.float64)
    moments = (1, torch.zeros(channels).double(), identity)
    monkeypatch.setattr(scores_by_subspace, "moments", lambda *calibration: moments)
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (matrix.diagonal(), matrix * 1))
    weight = torch.eye(1, channels)
    fitted = SCORES["residual"].fit([], weight, torch.zeros(1), None)
    assert (fitted["null_space"].shape, fitted["dim"]) == ((channels, channels - dim), dim)
    fitted = SCORES["neco"].fit([weight], None)
    assert (fitted["components"].shape, fitted["dim"]) == ((channels, neco), neco)


def test_dead_channels_do_not_matter_to_gaussians_and_are_left_alone_by_neco():
    pad = torch.nn.functional.pad
    for name in ("mahalanobis", "rmds", "neco-resnet"):
        setup = Setup()
        wanted = bound(name, setup)[0](setup.activations)
        dead = pad(torch.zeros(CHANNELS), (0, 2), value=3.0)
        setup.calibration = [pad(batch, (0, 2)) + dead for batch in setup.calibration]
        setup.weight, setup.activations = pad(setup.weight, (0, 2)), pad(setup.activations, (0, 2))
        if name == "neco-resnet":  # as scikit-learn's scaler leaves them
            check(name, setup)
        else:
            torch.testing.assert_close(bound(name, setup)[0](setup.activations), wanted)


def test_gaussians_on_fewer_images_than_channels_use_the_pseudo_inverse():
    setup = Setup()
    setup.calibration, setup.labels = [torch.cat(setup.calibration)[:15]], torch.arange(15) % 3
    check("mahalanobis", setup, 1e-6)
    assert bound("rmds", setup)[0](setup.activations).isfinite().all()
    # One class is its own background.
    setup.labels = torch.zeros_like(setup.labels)
    assert torch.equal(bound("rmds", setup)[0](setup.activations), torch.zeros(12).double())


def test_relative_distance_does_not_drown_in_the_distances():
    """1 of 200 directions separates the classes: both distances are near 200, their difference is a
    few units."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 200, generator=generator, dtype=torch.float64) + 1000
    labels = torch.arange(2000) % 2
    rows[:, 0] += 3 * labels
    wide, narrow = (SCORES["rmds"].fit([batch], labels) for batch in (rows, rows.float()))
    test = rows[:50].float()
    got, exact = rmds(test, **narrow).double(), rmds(test.double(), **wide)
    torch.testing.assert_close(got, exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["mahalanobis", "she", "klm", "cadref"])
def test_classes_that_do_not_occur_play_no_part(name):
    setup = Setup()
    setup.labels = torch.arange(180) % 5  # hardly what the network predicts
    predicted = (torch.cat(setup.calibration) @ setup.weight.T + setup.bias).argmax(dim=1)
    kept = (predicted != 2) & (predicted != 5)
    setup.calibration, setup.labels = [torch.cat(setup.calibration)[kept]], setup.labels[kept]
    if name == "mahalanobis":  # whose labels may be any numbers
        setup.labels = 100 * setup.labels + 3
    check(name, setup)
    assert {2, 5} & set((setup.activations @ setup.weight.T + setup.bias).argmax(dim=1).tolist())


def test_klm_of_a_class_that_the_network_is_sure_of_stays_finite():
    """The mean softmax of such a class is 0 elsewhere, also in float64."""
    setup = Setup(torch.float32)
    setup.weight, setup.bias = 200 * setup.weight, 200 * setup.bias
    assert bound("klm", setup)[0](setup.activations).isfinite().all()


def test_cadref_holds_an_energy_below_zero_for_ood():
    setup, entry = Setup(), SCORES["cadref"]
    fitted = entry.fit(setup.calibration, setup.weight, setup.bias)
    usual, low = (
        entry.function(setup.activations, setup.activations @ setup.weight.T + shift, **fitted)
        for shift in (setup.bias, -1000)
    )
    assert (low < usual.amin()).all()


# What is refused

SHARP = ("msp", "odin", "entropy")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        *((n, {"classes": 1}, r"needs a head of two or more classes, got one") for n in SHARP),
        ("knn", {"k": 181}, r"knn.k must be a whole number from 1 to 180, .*--set knn.k=N"),
        ("knn", {"k": 0}, r"knn.k must .* from 1 to 180, the number of calibration images; got 0"),
        ("knn", {"k": math.nan}, r"knn.k must be a whole number"),
        ("nnguide", {"bank": 3}, r"nnguide.k must be .* from 1 to 3, .*--set nnguide.k=N"),
        ("nnguide", {"bank": 0}, r"nnguide.bank must be a whole number from 1 on; got 0"),
        ("gen", {"k": 0}, r"gen.k must be a whole number from 1 on; got 0; .*--set gen.k=N"),
        ("gen", {"k": 1.5}, r"gen.k must be a whole number from 1 on; got 1.5"),
        ("lts", {"percentile": 100.5}, r"percentile must be between 0 and 100, got 100.5"),
        ("dice", {"percentile": -1}, r"percentile must be between 0 and 100, got -1"),
        ("dice", {"percentile": math.nan}, r"percentile must be between 0 and 100"),
        ("rmds", {"labels": torch.zeros(179)}, r"got 179 labels and 180 images"),
        ("mahalanobis", {"labels": torch.arange(180)}, r"no class has two different calibration"),
        ("she", {"labels": torch.full((180,), CLASSES)}, r"classifies correctly, got none"),
        ("cadref", {"bias": torch.full((7,), -999.0).double()}, r"positive mean energy .*, got -9"),
    ],
)
def test_what_cannot_be_scored_is_refused(name, changes, message):
    setup, changes = Setup(), dict(changes)
    classes = changes.pop("classes", CLASSES)
    setup.weight, setup.bias = setup.weight[:classes], setup.bias[:classes]
    with pytest.raises(ValueError, match=message):
        bound(name, setup, **changes)[0](setup.activations)


@pytest.mark.parametrize(
    ("name", "short"), [("vim", 1), ("residual", 1), ("neco", 0), ("neco-resnet", 0)]
)
def test_a_principal_space_must_fit_into_what_the_activations_span(name, short):
    setup = Setup()
    for most in (CHANNELS - short, 7):
        bound(name, setup, dim=most)
        message = rf"{name}.dim must be a whole number from 1 to {most}, .*--set {name}.dim=N"
        with pytest.raises(ValueError, match=message):
            bound(name, setup, dim=most + 1)
        setup.calibration = [torch.cat(setup.calibration)[:8]]  # which span 8 dimensions, or 7


def test_the_nearest_neighbours_may_come_long_before_the_last(monkeypatch):
    """The k nearest all lie in the first piece; more follows than is held at a time."""
    monkeypatch.setattr(statistics, "PIECE", 4)
    generator = np.random.default_rng(3)
    queries, near, far = (generator.normal(m, 0.1, (n, 6)) for m, n in ((1, 5), (1, 3), (-1, 40)))
    bank = np.concatenate([near, far])
    found = knn(torch.from_numpy(queries), [torch.from_numpy(bank)], k=3)
    wanted = -np.sort(cdist(unit(queries), unit(bank)), axis=1)[:, 2]
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
