"""A network in evaluation mode, or its linear head, in; the same function in fewer and faster steps for a CPU out.

Batch norms are folded into the convolutions before them, and the residual sum and the ReLU behind a convolution are computed while
its result is still in the core's cache, by oneDNN, with weights that are laid out for it once. It is what torch.compile makes of
a network on a CPU, without its compiler and its half minute.
"""

import copy
import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval

SUMS = (operator.add, torch.add)
RELUS = (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_)
# What another order of the same float32 sums may change, in parts of the largest activation; seen in ResNet-50: 5e-7.
TOLERANCE = 1e-4


class Convolution(nn.Module):
    """A convolution, then the sum with another tensor where one is given, then ReLU where `relu`.

    in_place: the sum may take the other tensor's place.
    """

    def __init__(self, convolution: nn.Conv2d, relu: bool, in_place: bool, input_size: list[int]) -> None:
        super().__init__()
        self.arguments = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(convolution.weight.to_mkldnn(), *self.arguments, input_size)
        self.bias = convolution.bias
        self.relu = "relu" if relu else None
        self.in_place = in_place

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        settings = (self.weight, self.bias, *self.arguments)
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *settings, self.relu or "none", [], "")
        if self.in_place:
            return torch.ops.mkldnn._convolution_pointwise_.binary(other, x, *settings, "add", 1.0, self.relu, [], "")
        return torch.ops.mkldnn._convolution_pointwise.binary(x, other, *settings, "add", 1.0, self.relu, [], "")


def fuse(network: nn.Module, input_size: tuple[int, int, int, int]) -> nn.Module:
    """The network for float32 inputs on a CPU, without gradients; best at `input_size` (images, channels, height, width).

    Its outputs agree with the network's own but for the order of sums, which is tried on one image of noise. Where they do not, or
    there is no oneDNN, or the network cannot be traced, the network itself is returned.
    """
    if not torch.backends.mkldnn.is_available():
        return network
    try:
        traced = fx.symbolic_trace(network)
    except Exception:  # the network's own code runs on stand-ins for tensors, which may raise anything
        return network
    noise = torch.randn((1, *input_size[1:]), generator=torch.Generator().manual_seed(0))
    noise = noise.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        # The network's own, not the traced one's: tracing, too, may get it wrong.
        wanted = network(noise.clone())
        ShapeProp(traced).propagate(noise.clone())
        _fold_batch_norms(traced)
        for node in list(traced.graph.nodes):
            if _is(traced, node, nn.Conv2d):
                _fuse_from(traced, node, input_size[0])
        traced.recompile()
        traced.delete_all_unused_submodules()
        agrees = (traced(noise) - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    return traced if agrees else network


def linear(weight: Tensor, bias: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """The function z -> z W^T + b of float32 rows z (n, channels) on one device; best on a CPU at n = `rows`.

    weight (classes, channels), bias (classes,). A matrix product lays its weight out anew at each call, which takes a twentieth of
    the time of 512 rows; oneDNN takes a weight that has been laid out. Where there is no oneDNN, it is torch.addmm.
    """

    def plain(activations: Tensor) -> Tensor:
        return torch.addmm(bias, activations, weight.T)

    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return plain
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def fast(activations: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(activations, laid_out, bias, "none", [], "")

    noise = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
    wanted = plain(noise)
    return fast if (fast(noise) - wanted).abs().max() <= TOLERANCE * wanted.abs().max() else plain


def _is(traced: fx.GraphModule, node: fx.Node | None, kind: type | tuple[type, ...]) -> bool:
    return node is not None and node.op == "call_module" and isinstance(traced.get_submodule(node.target), kind)


def _calls(node: fx.Node | None, functions: tuple) -> bool:
    return node is not None and node.op == "call_function" and node.target in functions


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace(traced: fx.GraphModule, nodes: list[fx.Node], module: nn.Module, *others: fx.Node) -> None:
    """Puts one module, called with the input of the first node and `others`, in the place of nodes that follow each other."""
    name = f"fused_{nodes[0].name}"
    traced.add_module(name, module)
    with traced.graph.inserting_after(nodes[-1]):
        node = traced.graph.call_module(name, (nodes[0].args[0], *others))
    node.meta = dict(nodes[-1].meta)
    nodes[-1].replace_all_uses_with(node)
    for node in reversed(nodes):
        traced.graph.erase_node(node)


def _fold_batch_norms(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        user = _only_user(node)
        if _is(traced, node, nn.Conv2d) and _is(traced, user, nn.BatchNorm2d):
            pair = (copy.deepcopy(traced.get_submodule(part.target)).double() for part in (node, user))
            _replace(traced, [node, user], fuse_conv_bn_eval(*pair).float())


def _fuse_from(traced: fx.GraphModule, start: fx.Node, images: int) -> None:
    """One Convolution in the place of a convolution and of the sum and the ReLU behind it that nothing else reads from."""
    convolution = traced.get_submodule(start.target)
    if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        return
    nodes, others, in_place = [start], [], False
    user = _only_user(start)
    if _calls(user, SUMS) and _is_plain_sum(user):
        others = [argument for argument in user.args if argument is not start]
        in_place = _may_be_overwritten(traced, others[0], start, user)
        nodes.append(user)
    user = _only_user(nodes[-1])
    relu = _is(traced, user, nn.ReLU) or _calls(user, RELUS)
    if relu:
        nodes.append(user)
    size = [images, *start.args[0].meta["tensor_meta"].shape[1:]]
    _replace(traced, nodes, Convolution(convolution, relu, in_place, size), *others)


def _is_plain_sum(addition: fx.Node) -> bool:
    """Whether another tensor of the same shape is added, without a factor."""
    if len(addition.args) != 2 or addition.kwargs:
        return False
    metas = [argument.meta.get("tensor_meta") if isinstance(argument, fx.Node) else None for argument in addition.args]
    return addition.args[0] is not addition.args[1] and None not in metas and metas[0].shape == metas[1].shape


def _may_be_overwritten(traced: fx.GraphModule, other: fx.Node, start: fx.Node, addition: fx.Node) -> bool:
    """Whether `other` is a convolution's result that nobody reads during or after the convolution `start`, nor a view of it."""
    convolutions = (nn.Conv2d, Convolution)
    position = {node: number for number, node in enumerate(traced.graph.nodes)}
    readers = [user for user in other.users if user is not addition]
    return _is(traced, other, convolutions) and all(
        _is(traced, reader, convolutions) and reader is not start and position[reader] < position[addition] for reader in readers
    )
