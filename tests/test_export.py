"""A detector in a file: what other programs compute from it is what the detector gives."""

import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lhact import Detector, export
from lhact.methods.compose import known_methods

onnxruntime = pytest.importorskip("onnxruntime")
# ODIN needs gradients. ASH-B fills some of equal activations, and another program chooses others.
METHODS = [name for name in known_methods() if name not in ("odin", "ash-b")]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


@pytest.fixture(scope="module")
def known(network):
    images = torch.randn(90, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return images, network(images).argmax(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "react+dice", "lhact+knn"])
def test_onnxruntime_computes_the_same(network, known, tmp_path, method):
    detector = Detector(network, method, input_size=8).fit([known])
    detector.export(tmp_path / "detector.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx")
    assert [entry.name for entry in session.get_outputs()] == ["logits", "score", "decision"]
    for count in (1, 7):
        images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
        outputs = session.run(None, {"images": images.numpy()})
        logits, scores = detector(images)
        np.testing.assert_allclose(outputs[0], logits.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(outputs[1], scores.numpy(), rtol=1e-4, atol=1e-5)
        far = ((scores - detector.offset_).abs() > 1e-4).numpy()
        assert (outputs[2] == detector.predict(images).numpy())[far].all()


def test_torch_loads_an_exported_program(network, known, tmp_path):
    detector = Detector(network, "lhact", input_size=8).fit([known])
    detector.export(tmp_path / "detector.pt2")
    program = torch.export.load(tmp_path / "detector.pt2").module()
    images = torch.randn(5, 3, 8, 8)
    logits, scores, decision = program(images)
    torch.testing.assert_close((logits, scores), detector(images))
    assert torch.equal(decision, detector.predict(images))


class Branched(nn.Sequential):
    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)


def test_says_that_torch_cannot_export_the_network(network, known, tmp_path):
    detector = Detector(Branched(*network).eval(), input_size=8).fit([known])
    with pytest.raises(ValueError, match=r"torch cannot export the network .*mend its forward"):
        detector.export(tmp_path / "detector.pt2")


def test_exports_in_the_precision_of_the_network(network, known, tmp_path):
    Detector(network, "lhact", input_size=8).fit([known]).save(tmp_path / "saved")
    detector = Detector.load(tmp_path / "saved", network)
    detector = copy.deepcopy(detector).double()
    detector.export(tmp_path / "detector.pt2")
    program = torch.export.load(tmp_path / "detector.pt2").module()
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(program(images)[:2], detector(images))


def test_refuses_what_no_file_can_hold(network, known, tmp_path, monkeypatch):
    fitted = Detector(network, "knn", input_size=8).fit([known])
    with pytest.raises(ValueError, match=r"must end in \.onnx or \.pt2, got 'detector\.bin'"):
        fitted.export(tmp_path / "detector.bin")
    with pytest.raises(ValueError, match="call fit with ID images first"):
        Detector(network, input_size=8).export(tmp_path / "detector.onnx")
    with pytest.raises(ValueError, match="needs gradients"):
        Detector(network, "odin", input_size=8).fit([known]).export(tmp_path / "detector.onnx")
    features = Detector(network, input_size=8).fit_features(np.ones((4, 16)))
    with pytest.raises(ValueError, match="the shape of an image is not known"):
        features.export(tmp_path / "detector.pt2")
    features.export(tmp_path / "detector.pt2", known[0])
    with pytest.raises(ValueError, match="images must hold at least one example"):
        features.export(tmp_path / "detector.pt2", known[0][:0])
    with pytest.raises(ValueError, match=r"images must be \(3, 8, 8\) as those .* \(3, 9, 9\)"):
        fitted.export(tmp_path / "detector.pt2", torch.zeros(2, 3, 9, 9))
    monkeypatch.setattr(export, "MOST_BYTES", 90 * 16 * 4 - 1)
    with pytest.raises(ValueError, match="knn holds 0 MiB of calibration images"):
        fitted.export(tmp_path / "detector.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"pip install 'lhact\[onnx\]'"):
        features.export(tmp_path / "detector.onnx", known[0])
