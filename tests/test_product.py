"""lhact.evaluation.product against a product in float64."""

import pytest
import torch
from torch import Tensor

from lhact.evaluation.product import head_product


@pytest.fixture
def head() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(100, 384, generator=draw), torch.randn(100, generator=draw)


def activations(rows: int) -> Tensor:
    return torch.rand(rows, 384, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [0, 1, 7, 512, 700])
def test_logits_for_any_number_of_rows(rows, head):
    weight, bias = head
    inputs = activations(rows)
    with torch.inference_mode():
        found = head_product(weight, bias, 512)(inputs)
    wanted = inputs.double() @ weight.double().T + bias.double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(inputs, activations(rows)), "the activations were changed"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_the_weight_is_packed_once(head, monkeypatch):
    logits = head_product(*head, 512)
    monkeypatch.setattr(torch, "addmm", lambda *_: pytest.fail("packs the weight at every call"))
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", torch.addmm)
    assert logits(activations(3)).shape == (3, 100)


@pytest.mark.parametrize("case", ["no oneDNN", "oneDNN differs", "another device"])
def test_elsewhere_it_is_a_plain_product(case, head, monkeypatch):
    wanted = torch.addmm(head[1], activations(3), head[0].T)
    fast = torch.ops.mkldnn._linear_pointwise
    if case == "another device":
        found = head_product(*(part.to("meta") for part in head), 512)(activations(3).to("meta"))
        assert (found.device.type, found.shape) == ("meta", (3, 100))
        return
    if case == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        wrong = lambda *arguments: fast(*arguments) * 1.01  # noqa: E731
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", wrong)
    assert torch.equal(head_product(*head, 512)(activations(3)), wanted)
