"""Fused networks against the networks themselves: torchvision's, and small ones with traps."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import make_network
from torch import Tensor, nn

from lhact.extraction import fuse
from lhact.extraction.fuse import Convolution

# torchvision's families and their convolutions
FAMILIES = {"resnet18": 20, "resnet50": 53, "resnext50_32x4d": 53, "shufflenet_v2_x0_5": 56}
FAMILIES |= {"mobilenet_v2": 52, "mobilenet_v3_small": 52, "densenet121": 120, "googlenet": 57}
FAMILIES |= {"efficientnet_b0": 81, "regnet_x_400mf": 71, "mnasnet0_5": 52, "convnext_tiny": 22}
FAMILIES |= {"vgg11_bn": 8, "swin_t": 1}


def convolutions(network: nn.Module) -> list[Convolution]:
    return [module for module in network.modules() if isinstance(module, Convolution)]


def norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def fused(network: nn.Module, *input_size: int) -> nn.Module:
    """The network fused, after checking that it was."""
    result, reason = fuse.fuse(network.requires_grad_(False), input_size or (2, 3, 20, 20))
    assert reason is None
    assert result is not network
    return result


def agree(result: nn.Module, network: nn.Module, images: Tensor) -> None:
    """Its error, against the network in float64, is at most a few times the network's own."""
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(images.double())
        plain, found = network(images.clone()), result(images)
        assert torch.equal(result(images), found), "the images were changed"
    assert found.shape == exact.shape
    scale = exact.abs().max()
    assert scale > 1e-3
    own, error = (plain - exact).abs().max(), (found - exact).abs().max()
    assert error <= 4 * own + 1e-6 * scale
    assert error <= 1e-4 * scale, "a network that amplifies rounding shows nothing"


@pytest.mark.parametrize("arch", FAMILIES)
def test_torchvisions_networks(arch):
    side = 224 if arch == "swin_t" else 96
    settings = {"init_weights": False} if arch == "googlenet" else {}
    network = make_network(arch, side=side, **settings)
    result = fused(network, 2, 3, side, side)
    assert len(convolutions(result)) == FAMILIES[arch]
    assert norms(result) == [] or arch == "densenet121"
    agree(result, network, torch.randn(3, 3, side, side))
    if arch != "resnet50":
        return
    # Its 49 ReLU and 16 sums are all part of a convolution, and each sum overwrites the shortcut.
    children = [m for m in result.modules() if m is not result and not isinstance(m, Convolution)]
    rest = {type(module).__name__ for module in children if not list(module.children())}
    assert rest == {"MaxPool2d", "AdaptiveAvgPool2d", "Linear"}
    functions = sum(node.op != "call_module" for node in result.graph.nodes)
    assert functions == 3, "input, flatten, output"
    assert sum(module.relu is not None for module in convolutions(result)) == 49
    assert sum(module.in_place for module in convolutions(result)) == 16


def test_any_size_is_right_and_the_network_stays_as_it_was():
    network = make_network("resnet18")
    before = copy.deepcopy(network.state_dict())
    images = torch.randn(2, 3, 96, 96)
    wanted = network(images)
    result = fused(network, 8, 3, 96, 96)
    for count, *side in ((1, 64, 64), (5, 96, 96), (2, 70, 131)):
        agree(result, network, torch.randn(count, 3, *side))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(network(images), wanted)


class Small(nn.Module):
    """forward(x) is steps(self, x). x has 3 channels, like all that the convolutions make of it."""

    def __init__(self, steps: Callable[[nn.Module, Tensor], Tensor], **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps, wide = steps, {"padding": 1, **settings}
        self.first, self.second = (nn.Conv2d(3, 3, 3, **wide) for _ in range(2))
        self.point = nn.Conv2d(3, 3, 1, **settings)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.register_buffer("image", torch.randn(1, 3, 20, 20))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def view_read_later(m: Small, x: Tensor) -> Tensor:
    view = (y := m.first(x)).flatten(1)
    z = m.second(x) + y
    return view + z.flatten(1)


def summand_read_later(m: Small, x: Tensor) -> Tensor:
    z = m.second(x) + (y := m.first(x))
    return m.first(y) - z


def changed_in_place(m: Small, x: Tensor) -> Tensor:
    y, z = m.first(x), m.second(x)
    y += z
    return y * 2 + m.first(y)


def residual(m: Small, x: Tensor) -> Tensor:
    out = m.second(m.first(shortcut := m.relu(m.first(x))))
    out += shortcut
    return m.relu(out)


TRAPS = {
    "plain": lambda m, x: m.relu(m.norm(m.second(m.first(x)))),
    "sum with the input": lambda m, x: m.relu(m.first(x) + x),
    # The convolution still reads what the sum would overwrite.
    "sum with its own input": lambda m, x: m.second(y := m.first(x)) + y,
    "summand read later": summand_read_later,
    "view of the summand read later": view_read_later,
    # The other is a convolution's result that nothing else reads, but smaller than the sum, the
    # second one only for a batch of several images.
    "sum with one pixel": lambda m, x: m.relu(m.first(x) + m.point(x.mean((2, 3), True))),
    "sum with one image": lambda m, x: m.relu(m.first(x) + m.second(m.image)),
    "sum of another shape": lambda m, x: m.relu(m.first(x) + m.second(x).mean((2, 3), True)),
    "sum with itself": lambda m, x: (y := m.first(x)) + y,
    "sum with a factor": lambda m, x: torch.add(m.first(x), x, alpha=3),
    "sum with numbers": lambda m, x: m.first(x) + 1.5 + (m.second(x) + x.size(2)),
    "read twice": lambda m, x: m.norm(y := m.first(x)) + torch.relu(y),
    "functions": lambda m, x: nn.functional.relu(m.second(torch.relu(m.first(x))), inplace=True),
    "changed in place": changed_in_place,
    "residual": residual,
}
SETTINGS = [{}, {"bias": False}, {"groups": 3}, {"padding_mode": "reflect"}, {"padding": "same"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap, settings, monkeypatch):
    # The trial at the end must not be what saves it.
    monkeypatch.setattr(fuse, "TOLERANCE", float("inf"))
    network = Small(TRAPS[trap], **settings)
    result = fused(network)
    fusable = not {"padding", "padding_mode"} & set(settings)
    assert bool(convolutions(result)) == fusable
    # What nobody reads again is overwritten, and nothing else.
    overwritten = {module.in_place for module in convolutions(result)}
    assert (True in overwritten) == (trap in ("residual", "changed in place") and fusable)
    if trap == "functions" and fusable:
        assert [module.relu for module in convolutions(result)] == ["relu", "relu"]
    agree(result, network, torch.randn(3, 3, 20, 20))


def one_tensor_of_two_names(m: Small, x: Tensor) -> Tensor:
    """The trace takes `y` and `z` for two tensors."""
    z = y = m.first(x)
    z += m.second(x)
    return y * 2 + m.first(z)


def no_statistics(m: Small, x: Tensor) -> Tensor:
    m.norm.running_mean = m.norm.running_var = None
    return m.norm(m.first(x))


def fails_when_traced(m: Small, x: Tensor) -> Tensor:
    if type(x) is not Tensor:
        raise ValueError("no tensor\nat all")
    return m.first(x)


# While a network is traced, what it is called with is no Tensor.
UNFUSABLE = {
    "TraceError: symbolically traced": lambda m, x: m.first(x) if x.sum() > 0 else x,
    "fused, its outputs change by ": one_tensor_of_two_names,
    "fused, it gives shape (1, 3, 20, 20), not (2, 3, 20, 20)": lambda m, x: m.first(
        x if type(x) is Tensor else x[:1]
    ),
    "ValueError: no tensor": fails_when_traced,
    "": no_statistics,  # in torch's words, which vary
}


@pytest.mark.parametrize("reason", UNFUSABLE)
def test_what_cannot_be_fused_is_left_alone_and_the_reason_given(reason, capfd):
    network = Small(UNFUSABLE[reason])
    result, found = fuse.fuse(network, (1, 3, 20, 20))
    assert result is network
    assert found.startswith(reason)
    assert len(found.splitlines()) == 1
    assert capfd.readouterr() == ("", ""), "torch.fx shows a traceback"


def test_without_onednn(monkeypatch):
    network = Small(TRAPS["plain"])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fuse.fuse(network, (1, 3, 8, 8)) == (network, "this torch has no oneDNN")


# Folding alone, for GPUs, and weights in the type of autocast


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_folding_leaves_plain_convolutions(arch, monkeypatch):
    """densenet121 normalises before it convolves: only norms behind a convolution are folded."""
    monkeypatch.setattr(fuse, "FOLDING_TOLERANCE", fuse.TOLERANCE)
    network = make_network(arch, side=64).requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    result, reason = fuse.fold(network, 64)
    assert reason is None
    assert len(norms(result)) == (62 if arch == "densenet121" else 0)
    assert not convolutions(result)
    agree(result, network, torch.randn(3, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    result(images).sum().backward()
    assert images.grad.abs().max() > 0, "for ODIN"


@pytest.mark.parametrize("trap", TRAPS)
def test_folding_traps(trap, monkeypatch):
    monkeypatch.setattr(fuse, "FOLDING_TOLERANCE", float("inf"))
    network = Small(TRAPS[trap])
    result, reason = fuse.fold(network, 20)
    assert reason is None
    assert bool(norms(result)) == (trap == "read twice")
    agree(result, network, torch.randn(3, 3, 20, 20))


def test_folding_is_given_up_where_it_costs_too_much(monkeypatch):
    network = Small(TRAPS["plain"])
    monkeypatch.setattr(fuse, "FOLDING_TOLERANCE", 1e-12)
    result, reason = fuse.fold(network, 20)
    assert result is network
    assert reason.startswith("with batch norms folded, its outputs change by ")


def test_without_batch_norms_there_is_nothing_to_fold():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    assert fuse.fold(network, 20) == (network, None)


CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ["resnet18", "efficientnet_b0", "convnext_tiny", "swin_t"])
def test_weights_in_the_type_of_autocast_give_its_bits(arch, dtype):
    """Norms, and whatever else autocast leaves in float32, keep their float32."""
    side = 224 if arch == "swin_t" else 64
    network = make_network(arch, side=side).requires_grad_(False)
    result, reason = fuse.store_weights(network, dtype, side, CPU)
    assert reason is None
    for module in result.modules():
        wanted = dtype if type(module) in (nn.Conv2d, nn.Linear) else torch.float32
        assert {parameter.dtype for parameter in module.parameters(recurse=False)} <= {wanted}
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    images = torch.randn(3, 3, side, side)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        assert torch.equal(result(images.clone()), network(images))


class ReadsItsWeight(nn.Module):
    """What it computes from its weight, autocast would compute in float32."""

    def __init__(self, failing: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.failing = nn.Conv2d(3, 2, 3), failing

    def forward(self, x: Tensor) -> Tensor:
        if self.failing:
            return x.flatten(1) * self.layer.weight.view(torch.int32).sum()
        return x.flatten(1) * self.layer.weight.sum()


@pytest.mark.parametrize(("failing", "said"), [(False, "outputs change"), (True, "RuntimeError: ")])
def test_weights_that_are_read_otherwise_stay_in_float32(failing, said):
    network = ReadsItsWeight(failing)
    if failing:  # as int32 a bfloat16 has another size, so that the view raises
        network.layer.weight = nn.Parameter(network.layer.weight[:, :, :1, :1])
    result, reason = fuse.store_weights(network, torch.bfloat16, 9, CPU)
    assert result is network
    assert reason.startswith("with weights stored in torch.bfloat16, ")
    assert said in reason
