"""The same numbers as pytorch-ood where that library has the method and reads its paper alike; skipped without it."""

import inspect

import numpy as np
import pytest
import torch

from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES

detector = pytest.importorskip("pytorch_ood.detector")

CLASSES, CHANNELS, ROWS = 10, 64, 400
LABELS = torch.arange(ROWS) % CLASSES


@pytest.fixture(scope="module")
def data():
    """(test activations, calibration activations, linear head), like those of a ReLU network."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(CHANNELS, CLASSES).requires_grad_(False)
    head.weight.copy_(torch.randn(CLASSES, CHANNELS, generator=generator) * 0.3)
    head.bias.copy_(torch.randn(CLASSES, generator=generator))
    centres = torch.randn(CLASSES, CHANNELS, generator=generator)
    calibration = (centres[LABELS] + torch.randn(ROWS, CHANNELS, generator=generator)).clamp(min=0)
    test = (torch.randn(50, CHANNELS, generator=generator) * 1.2).clamp(min=0)
    return test, calibration, head


def ours(name, data, rectifier=None, **parameters):
    test, calibration, head = data
    if rectifier:
        test = RECTIFIERS[rectifier].function(test, **parameters)
        parameters = {}
    entry = SCORES[name]
    offered = {"activations": test, "logits": head(test), "weight": head.weight, "bias": head.bias, "labels": LABELS}
    offered |= {"calibration": calibration.split(64), **entry.parameters, **parameters}
    if entry.fit:
        offered |= entry.fit(**{key: offered[key] for key in inspect.signature(entry.fit).parameters})
    return entry.function(**{key: offered[key] for key in inspect.signature(entry.function).parameters}).double()


def agree(got, theirs, tolerance=1e-5):
    """Their scores are higher for OOD."""
    torch.testing.assert_close(got, -theirs.double(), rtol=tolerance, atol=tolerance)


def maps(activations):
    return activations[:, :, None, None]


def test_react(data):
    test, calibration, head = data
    theirs = detector.ReAct(torch.nn.Identity(), lambda z: head(z.flatten(1)), percentile=0.9)
    theirs.fit_feature_maps(maps(calibration), LABELS)
    high = float(np.percentile(calibration.numpy(), 90))
    agree(ours("energy", data, "react", high=high), theirs.predict_feature_maps(maps(test)))


@pytest.mark.parametrize("name", ["ash-p", "ash-b", "ash-s"])
@pytest.mark.parametrize("percentile", [60, 65, 90])
def test_ash(name, percentile, data):
    test, _, head = data
    theirs = detector.ASH(torch.nn.Identity(), lambda z: head(z.flatten(1)), variant=name, percentile=percentile / 100)
    agree(ours("energy", data, name, percentile=percentile), theirs.predict_feature_maps(maps(test)))


def test_scale(data):
    test, _, head = data
    theirs = detector.SCALE(torch.nn.Identity(), lambda z: head(z.flatten(1)), percentile=0.85)
    agree(ours("energy", data, "scale", percentile=85), theirs.predict_feature_maps(maps(test)))


def test_vra_differs_only_below_low(data):
    """theirs raises low activations to `low`, as LHAct's first step does, and has one threshold per channel"""
    test, calibration, head = data
    theirs = detector.VRA(torch.nn.Identity(), lambda z: head(z.flatten(1)), lower_percentile=0.6, upper_percentile=0.95)
    theirs.fit_feature_maps(maps(calibration), LABELS)
    low, high = (np.quantile(calibration.numpy(), share, axis=0).astype(np.float32) for share in (0.6, 0.95))
    clipped = RECTIFIERS["react"].function(RECTIFIERS["lhact-low"].function(test, torch.from_numpy(low)), torch.from_numpy(high))
    agree(torch.logsumexp(head(clipped), dim=1).double(), theirs.predict_feature_maps(maps(test)))


def test_lts(data):
    test, _, head = data
    agree(ours("lts", data, percentile=95), detector.LTS(None, head, p=0.05).predict_features(test))


def test_dice(data):
    test, calibration, head = data
    theirs = detector.DICE(None, head.weight, head.bias, p=0.7).fit_features(calibration, LABELS)
    agree(ours("dice", data), theirs.predict_features(test))


def test_knn(data):
    test, calibration, _ = data
    theirs = detector.KNN(None, k=50).fit_features(calibration, LABELS)
    agree(ours("knn", data, k=50), theirs.predict_features(test))


def test_nnguide(data):
    test, calibration, head = data
    theirs = detector.NNGuide(None, head, k=10).fit_features(calibration, LABELS)
    agree(ours("nnguide", data), theirs.predict_features(test))


def test_vim(data):
    test, calibration, head = data
    theirs = detector.ViM(None, d=20, w=head.weight, b=head.bias).fit_features(calibration, LABELS)
    agree(ours("vim", data, dim=20), theirs.predict_features(test), tolerance=3e-5)


def test_fdbd(data):
    test, calibration, head = data
    theirs = detector.fDBD(torch.nn.Identity(), head).fit_features(calibration)
    agree(ours("fdbd", data), theirs.predict_features(test))


def test_gaussians(data):
    """theirs sums the covariance where the papers average it, halves one distance, and adds 1e-6 to the diagonal"""
    test, calibration, _ = data
    theirs = detector.Mahalanobis(None).fit_features(calibration, LABELS).predict_features(test)
    agree(ours("mahalanobis", data), 2 * ROWS * theirs, tolerance=1e-4)
    theirs = detector.RMD(None).fit_features(calibration, LABELS).predict_features(test)
    agree(ours("rmds", data), ROWS * theirs, tolerance=1e-3)


def test_logits_alone(data):
    test, _, head = data
    logits = head(test)
    agree(ours("energy", data), detector.EnergyBased.score(logits))
    agree(ours("maxlogit", data), detector.MaxLogit.score(logits))
    agree(ours("msp", data), detector.MaxSoftmax.score(logits))
    # theirs is the mean over the k
    agree(ours("gen", data, k=5), 5 * detector.GEN.score(logits, M=5))
