"""The same numbers as pytorch-ood where that library has the method and reads its paper alike;
skipped without it."""

import inspect

import numpy as np
import pytest
import torch
from fitted import fit
from torch.nn import Identity, Linear

from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES

detector = pytest.importorskip("pytorch_ood.detector")

CLASSES, CHANNELS, ROWS = 10, 64, 400


class Data:
    """Test and calibration activations, like those of a ReLU network, and a linear head."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.head = Linear(CHANNELS, CLASSES).requires_grad_(False)
        self.weight, self.bias = self.head.weight, self.head.bias
        self.weight.copy_(torch.randn(CLASSES, CHANNELS, generator=generator) * 0.3)
        self.bias.copy_(torch.randn(CLASSES, generator=generator))
        self.labels = torch.arange(ROWS) % CLASSES
        noise = torch.randn(ROWS, CHANNELS, generator=generator)
        self.rows = (3 * self.weight[self.labels] + noise).clamp(min=0)
        self.calibration = self.rows.split(64)
        self.test = (torch.randn(50, CHANNELS, generator=generator) * 1.2).clamp(min=0)
        self.logits = self.head(self.test)

    def head_of_maps(self, maps):
        return self.head(maps.flatten(1))


@pytest.fixture(scope="module")
def data():
    return Data()


def ours(name, data, **parameters):
    """The score's values; of a rectifier, those of the energy behind it."""
    entry = {**RECTIFIERS, **SCORES}[name]
    known = fit(entry, data, **parameters)
    known |= {"activations": data.test, "logits": data.logits}
    wanted = inspect.signature(entry.function).parameters
    result = entry.function(**{key: known[key] for key in wanted})
    return (torch.logsumexp(data.head(result), dim=1) if name in RECTIFIERS else result).double()


def agree(got, theirs, tolerance=1e-5):
    """Their scores are higher for OOD."""
    torch.testing.assert_close(got, -theirs.double(), rtol=tolerance, atol=tolerance)


def maps(activations):
    return activations[:, :, None, None]


def test_react(data):
    theirs = detector.ReAct(Identity(), data.head_of_maps, percentile=0.9)
    theirs.fit_feature_maps(maps(data.rows), data.labels)
    agree(ours("react", data), theirs.predict_feature_maps(maps(data.test)))


@pytest.mark.parametrize("name", ["ash-p", "ash-b", "ash-s"])
@pytest.mark.parametrize("percentile", [60, 65, 90])
def test_ash(name, percentile, data):
    share = percentile / 100
    theirs = detector.ASH(Identity(), data.head_of_maps, variant=name, percentile=share)
    got = ours(name, data, percentile=percentile)
    agree(got, theirs.predict_feature_maps(maps(data.test)))


def test_scale(data):
    theirs = detector.SCALE(Identity(), data.head_of_maps, percentile=0.85)
    agree(ours("scale", data, percentile=85), theirs.predict_feature_maps(maps(data.test)))


def test_vra_differs_only_below_low(data):
    """Theirs raises low activations to `low`, as LHAct's first step does, and has one threshold for
    each channel."""
    limits = {"lower_percentile": 0.6, "upper_percentile": 0.95}
    theirs = detector.VRA(Identity(), data.head_of_maps, **limits)
    theirs.fit_feature_maps(maps(data.rows), data.labels)
    low, high = np.quantile(data.rows.numpy(), (0.6, 0.95), axis=0).astype(np.float32)
    react, raise_low = (RECTIFIERS[name].function for name in ("react", "lhact-low"))
    columns = [
        react(raise_low(column, float(a)), float(b))
        for column, a, b in zip(data.test.split(1, dim=1), low, high, strict=True)
    ]
    got = torch.logsumexp(data.head(torch.cat(columns, dim=1)), dim=1).double()
    agree(got, theirs.predict_feature_maps(maps(data.test)))


@pytest.mark.parametrize(
    ("name", "theirs", "parameters", "tolerance"),
    [
        ("lts", lambda data: detector.LTS(None, data.head, p=0.05), {}, 1e-5),
        ("dice", lambda data: detector.DICE(None, data.weight, data.bias, p=0.7), {}, 1e-5),
        ("fdbd", lambda data: detector.fDBD(Identity(), data.head), {}, 1e-5),
        ("nci", lambda data: detector.NCI(Identity(), data.head, alpha=0.001), {}, 1e-5),
        ("she", lambda data: detector.SHE(Identity(), data.head), {}, 1e-5),
        ("knn", lambda data: detector.KNN(None, k=50), {"k": 50}, 1e-5),
        ("nnguide", lambda data: detector.NNGuide(None, data.head, k=10), {}, 1e-5),
        ("vim", lambda data: detector.ViM(None, 20, data.weight, data.bias), {"dim": 20}, 3e-5),
    ],
)
def test_features(name, theirs, parameters, tolerance, data):
    fitted = theirs(data)
    if hasattr(fitted, "fit_features"):
        fitted.fit_features(data.rows, data.labels)
    got = ours(name, data, **parameters)
    agree(got, fitted.predict_features(data.test), tolerance)


def test_gaussians(data):
    """Theirs sums the covariance where the papers average it, halves one distance, and adds 1e-6 to
    the diagonal."""
    for name, theirs, factor in (("mahalanobis", "Mahalanobis", 2), ("rmds", "RMD", 1)):
        fitted = getattr(detector, theirs)(None).fit_features(data.rows, data.labels)
        agree(ours(name, data), factor * ROWS * fitted.predict_features(data.test), 1e-3)


def test_logits(data):
    logits = data.logits
    agree(ours("energy", data), detector.EnergyBased.score(logits))
    agree(ours("maxlogit", data), detector.MaxLogit.score(logits))
    # Ours are the log odds of that probability, and -log of that entropy.
    agree(ours("msp", data).sigmoid(), detector.MaxSoftmax.score(logits))
    agree(-(-ours("entropy", data)).exp(), detector.Entropy.score(logits))
    # Theirs is the mean over the k.
    agree(ours("gen", data, k=5), 5 * detector.GEN.score(logits, M=5))
    klm = detector.KLMatching(None).fit_logits(data.head(data.rows))
    agree(ours("klm", data), klm.predict_logits(logits))


def test_gradnorm(data):
    theirs = detector.GradNorm(data.head, param_filter=lambda name: name == "weight")
    agree(ours("gradnorm", data), theirs.predict(data.test))
