"""A detector in a file: what other programs compute from it is what the detector gives."""

import sys

import numpy as np
import pytest
import torch
from helpers import small_classifier
from torch import nn

from lhact import Detector, export
from lhact.methods.compose import known_methods

onnxruntime = pytest.importorskip("onnxruntime")
# ODIN needs gradients. ASH-B fills some of equal activations, and another program chooses others.
METHODS = [name for name in known_methods() if name not in ("odin", "ash-b")]


def make(method: str = "lhact") -> Detector:
    return Detector(small_classifier(), method, input_size=8)


@pytest.fixture(scope="module")
def known():
    images = torch.randn(90, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return images, small_classifier()(images).argmax(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "react+dice", "lhact+knn"])
def test_onnxruntime_computes_the_same(known, tmp_path, method):
    detector = make(method).fit([known])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_loads_an_exported_program(known, tmp_path, dtype):
    """In the precision of the network, where no example of the images is given."""
    make().fit([known]).save(tmp_path / "saved")
    detector = Detector.load(tmp_path / "saved", small_classifier()).to(dtype)
    detector.export(tmp_path / "detector.pt2")
    program = torch.export.load(tmp_path / "detector.pt2").module()
    images = torch.randn(5, 3, 8, 8, dtype=dtype)
    logits, scores, decision = program(images)
    torch.testing.assert_close((logits, scores), detector(images))
    assert torch.equal(decision, detector.predict(images))


class Branched(nn.Sequential):
    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)


def test_refuses_what_no_file_can_hold(known, tmp_path, monkeypatch):
    fitted = make("knn").fit([known])
    features = make().fit_features(np.ones((4, 16)))
    branched = Detector(Branched(*small_classifier()).eval(), input_size=8).fit([known])
    refused = [
        (fitted, "bin", None, r"must end in \.onnx or \.pt2, got 'detector\.bin'"),
        (make(), "onnx", None, "call fit with ID images first"),
        (make("odin").fit([known]), "onnx", None, "needs gradients"),
        (features, "pt2", None, "the shape of an image is not known"),
        (features, "pt2", known[0][:0], "images must hold at least one example"),
        (fitted, "pt2", torch.zeros(2, 3, 9, 9), r"must be \(3, 8, 8\) as those .* \(3, 9, 9\)"),
        (branched, "pt2", None, r"torch cannot export the network .*mend its forward"),
    ]
    for detector, suffix, images, message in refused:
        with pytest.raises(ValueError, match=message):
            detector.export(tmp_path / f"detector.{suffix}", images)
    features.export(tmp_path / "detector.pt2", known[0])
    monkeypatch.setattr(export, "MOST_BYTES", 90 * 16 * 4 - 1)
    with pytest.raises(ValueError, match="knn holds 0 MiB of calibration images"):
        fitted.export(tmp_path / "detector.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"pip install 'lhact\[onnx\]'"):
        features.export(tmp_path / "detector.onnx", known[0])
