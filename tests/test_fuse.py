"""lhact.fuse against the networks themselves: torchvision's of every family, and small ones made to be fused wrongly."""

import copy

import pytest
import torch
from conftest import make_network
from torch import Tensor, nn

from lhact.extraction import fuse
from lhact.extraction.fuse import Convolution

CPU = torch.device("cpu")
FAMILIES = {
    "resnet18": 20,
    "resnet50": 53,
    "resnext50_32x4d": 53,
    "shufflenet_v2_x0_5": 56,
    "mobilenet_v2": 52,
    "mobilenet_v3_small": 52,
    "densenet121": 120,
    "googlenet": 57,
    "efficientnet_b0": 81,
    "regnet_x_400mf": 71,
    "mnasnet0_5": 52,
    "convnext_tiny": 22,
    "vgg11_bn": 8,
    "vit_b_16": 1,
    "swin_t": 1,
}


def convolutions(network: nn.Module) -> list[Convolution]:
    return [module for module in network.modules() if isinstance(module, Convolution)]


def agree(fused: nn.Module, network: nn.Module, images: Tensor) -> None:
    """As near to the network in float64 as the network itself in float32, but for a small factor."""
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(images.double())
        plain, found = network(images.clone()), fused(images)
        assert torch.equal(fused(images), found), "the images were changed"
    assert found.shape == exact.shape
    scale = exact.abs().max()
    assert scale > 1e-3
    own, error = (plain - exact).abs().max(), (found - exact).abs().max()
    assert error <= 4 * own + 1e-6 * scale
    assert error <= 1e-4 * scale, "a network that blows up rounding shows nothing"


@pytest.mark.parametrize("arch", FAMILIES)
def test_torchvisions_networks(arch):
    side = 224 if arch in ("vit_b_16", "swin_t") else 96
    settings = {"init_weights": False} if arch == "googlenet" else {}
    network = make_network(arch, side=side, **settings).requires_grad_(False)
    fused = fuse.fuse(network, (2, 3, side, side))
    assert len(convolutions(fused)) == FAMILIES[arch]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules()) or arch == "densenet121"
    agree(fused, network, torch.randn(3, 3, side, side))


def test_resnet50_is_convolutions_and_little_else():
    """Its 49 ReLU and 16 sums are all part of a convolution, and each sum takes the place of the shortcut."""
    fused = fuse.fuse(make_network("resnet50").requires_grad_(False), (8, 3, 96, 96))
    rest = {type(module).__name__ for name, module in fused.named_modules() if name and not isinstance(module, Convolution)}
    assert rest == {"MaxPool2d", "AdaptiveAvgPool2d", "Linear"}
    assert sum(node.op != "call_module" for node in fused.graph.nodes) == 3, "input, flatten, output"
    assert sum(module.relu is not None for module in convolutions(fused)) == 49
    assert sum(module.in_place for module in convolutions(fused)) == 16


def test_the_network_stays_as_it_was():
    network = make_network("resnet18").requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.randn(2, 3, 96, 96)
    wanted = network(images)
    fused = fuse.fuse(network, (2, 3, 96, 96))
    with torch.no_grad():
        fused(images)
    assert fused is not network
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    torch.testing.assert_close(network(images), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 64, 64), (5, 96, 96), (2, 70, 131)])
def test_any_other_size_is_right_too(size):
    network = make_network("resnet18").requires_grad_(False)
    images, *side = size
    agree(fuse.fuse(network, (8, 3, 96, 96)), network, torch.randn(images, 3, *side))


# Networks of one kind of trap each. x has 3 channels, as what the convolutions make of it.


class Small(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1, **settings) for _ in range(2))
        self.point = nn.Conv2d(3, 3, 1, **settings)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)


class Plain(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.second(self.first(x))))


class SumWithInput(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.first(x) + x)


class SumWithOwnInput(Small):
    """The convolution still reads what the sum would overwrite."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) + y


class SummandReadLater(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(x) + y
        return self.first(y) - z


class SummandReadLaterAsAView(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        view = y.flatten(1)
        z = self.second(x) + y
        return view + z.flatten(1)


class SummandChangedInPlace(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(x)
        y += z
        return y * 2 + self.first(y)


class SumWithOnePixel(Small):
    """Another convolution's result, and nobody reads it again, but it is smaller than the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.first(x) + self.point(nn.functional.adaptive_avg_pool2d(x, 1)))


class SumOfOne(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + y


class SumWithFactor(Small):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.first(x), x, alpha=3)


class SumWithNumber(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + 1.5


class SumOfOtherShape(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.first(x) + self.second(x).mean(dim=(2, 3), keepdim=True))


class ReadTwice(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.norm(y) + torch.relu(y)


class FunctionalRelu(Small):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.second(torch.relu(self.first(x))), inplace=True)


class Residual(Small):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.relu(self.first(x))
        out = self.second(self.first(shortcut))
        out += shortcut
        return self.relu(out)


TRAPS = [Plain, SumWithInput, SumWithOwnInput, SummandReadLater, SummandReadLaterAsAView, SummandChangedInPlace, SumOfOne]
TRAPS += [SumWithOnePixel]
TRAPS += [SumWithFactor, SumWithNumber, SumOfOtherShape, ReadTwice, FunctionalRelu, Residual]


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"groups": 3}, {"padding_mode": "reflect"}], ids=str)
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap, settings, monkeypatch):
    # The trial at the end must not be what saves it.
    monkeypatch.setattr(fuse, "TOLERANCE", float("inf"))
    network = trap(**settings).eval().requires_grad_(False)
    fused = fuse.fuse(network, (2, 3, 20, 20))
    assert fused is not network
    assert bool(convolutions(fused)) == ("padding_mode" not in settings)
    agree(fused, network, torch.randn(2, 3, 20, 20))


def test_what_nobody_reads_again_is_overwritten_and_nothing_else():
    counts = {trap: sum(m.in_place for m in convolutions(fuse.fuse(trap().eval(), (2, 3, 20, 20)))) for trap in TRAPS}
    assert {trap for trap, count in counts.items() if count} == {Residual, SummandChangedInPlace}


class Branching(nn.Module):
    """Cannot be traced: what it does depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.sum() > 0 else x


class ChangedInPlace(Small):
    """Traced wrongly: `y` and `z` are one tensor, which the trace takes for two."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = y
        z += self.second(x)
        return y * 2 + self.first(z)


def test_what_is_traced_wrongly_is_left_alone():
    network = ChangedInPlace().eval()
    assert fuse.fuse(network, (1, 3, 8, 8)) is network


def test_what_cannot_be_traced_is_left_alone():
    network = Branching()
    assert fuse.fuse(network, (1, 3, 8, 8)) is network


def test_without_onednn_the_network_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    network = Plain().eval()
    assert fuse.fuse(network, (1, 3, 8, 8)) is network


def test_what_does_not_agree_is_not_used(monkeypatch):
    network = Plain().eval()
    assert fuse.fuse(network, (1, 3, 8, 8)) is not network
    forward = Convolution.forward
    monkeypatch.setattr(Convolution, "forward", lambda *arguments: forward(*arguments) * 1.01)
    assert fuse.fuse(network, (1, 3, 8, 8)) is network


# ---- the head ----


@pytest.fixture
def head() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(100, 384, generator=draw), torch.randn(100, generator=draw)


@pytest.mark.parametrize("rows", [1, 7, 512, 700])
def test_linear_gives_the_logits_for_any_number_of_rows(rows, head):
    weight, bias = head
    activations = torch.rand(rows, 384, generator=torch.Generator().manual_seed(1))
    before = activations.clone()
    wanted = activations.double() @ weight.double().T + bias.double()
    with torch.inference_mode():
        found = fuse.linear(weight, bias, 512)(activations)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert torch.equal(activations, before)


def test_linear_lays_the_weight_out_once(head, monkeypatch):
    logits = fuse.linear(*head, 512)
    monkeypatch.setattr(torch, "addmm", lambda *_: pytest.fail("a product that lays the weight out anew"))
    assert logits(torch.rand(3, 384)).shape == (3, 100)


def test_linear_without_onednn_or_where_that_does_not_agree_is_a_plain_product(head, monkeypatch):
    activations = torch.rand(3, 384, generator=torch.Generator().manual_seed(1))
    wanted = torch.addmm(head[1], activations, head[0].T)
    fast = torch.ops.mkldnn._linear_pointwise
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *arguments: fast(*arguments) * 1.01)
        assert torch.equal(fuse.linear(*head, 512)(activations), wanted)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert torch.equal(fuse.linear(*head, 512)(activations), wanted)
