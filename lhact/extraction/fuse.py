"""A network in evaluation mode in, the same function in fewer and faster steps out.

Batch norms are folded into the convolutions before them (`fold`, for GPUs). On a CPU, oneDNN then
computes a convolution together with the residual sum and the ReLU behind it, while the result is
still in the core's cache, with weights that are packed once (`fuse`). torch.compile does the same
on a CPU, but it needs a compiler and half a minute. Under autocast, weights are stored in the type
that they are multiplied in (`store_weights`).
"""

import copy
import io
import operator
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval

# fx.Node or None. torch's own type of a node's arguments, a union of some twenty, is of no use.
Node: TypeAlias = Any

SUMS = (operator.add, torch.add)
RELUS = (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_)
# The order of float32 sums may change outputs by this share of the largest one. ResNet-50's change
# by 5e-7 of it.
TOLERANCE = 1e-4
# The same for folding alone. ResNet-50's outputs change by 2e-6; where they change by more than
# this, as efficientnet_b0's do, a GPU's speed is not worth it.
FOLDING_TOLERANCE = 1e-5


class Convolution(nn.Module):
    """A convolution by oneDNN, plus another tensor where one is given, then ReLU where `relu`.

    in_place: the sum may be written into the other tensor's memory.
    input_size: (images, channels, height, width) at which the packed weight is fastest.
    """

    def __init__(
        self, convolution: nn.Conv2d, relu: bool, in_place: bool, input_size: list[int]
    ) -> None:
        super().__init__()
        source: Any = convolution
        self.arguments = (source.padding, source.stride, source.dilation, source.groups)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        self.weight = reorder(source.weight.to_mkldnn(), *self.arguments, input_size)
        self.bias = convolution.bias
        self.relu = "relu" if relu else None
        self.in_place = in_place

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        onednn, settings = torch.ops.mkldnn, (self.weight, self.bias, *self.arguments)
        sum_and_relu: tuple[Any, ...] = ("add", 1.0, self.relu, [], "")
        result: Tensor
        if other is None:
            result = onednn._convolution_pointwise(x, *settings, self.relu or "none", [], "")
        elif self.in_place:
            result = onednn._convolution_pointwise_.binary(other, x, *settings, *sum_and_relu)
        else:
            result = onednn._convolution_pointwise.binary(x, other, *settings, *sum_and_relu)
        return result


def fuse(network: nn.Module, input_size: tuple[int, int, int, int]) -> tuple[nn.Module, str | None]:
    """(the fused network, None), or (the network itself, the reason why it cannot be fused).

    network: float32, on the CPU, in evaluation mode; it is not changed. The fused one takes the
    same inputs without gradients and is fastest at `input_size` (images, channels, height, width).
    Its outputs differ only by the order of sums, which is tried on two images of noise.

    The reasons: there is no oneDNN; the network, its trace or fusing raises an exception; or the
    outputs differ by more than TOLERANCE.
    """
    if not torch.backends.mkldnn.is_available():
        return network, "this torch has no oneDNN"

    change = partial(_fuse_traced, images=input_size[0])
    return _changed(network, _noise(input_size[2]), change, "fused", TOLERANCE)


def fold(network: nn.Module, side: int) -> tuple[nn.Module, str | None]:
    """(the network with the batch norms that follow a convolution folded into it, None), or (the
    network itself, the reason why that cannot be done).

    As `fuse`, but the result is plain convolutions, for any device and with gradients, and the
    trial's images are `side` pixels high and wide. A network without batch norms comes back as it
    is, without a reason.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network, None

    what = "with batch norms folded"
    return _changed(network, _noise(side), _fold_batch_norms, what, FOLDING_TOLERANCE)


def store_weights(
    network: nn.Module, dtype: torch.dtype, side: int, device: torch.device
) -> tuple[nn.Module, str | None]:
    """(a copy of the network whose convolutions and linear layers hold their weights in the dtype
    to which autocast would cast them at every call, None), or (the network itself, the reason why
    that cannot be done).

    All others keep their float32, such as norms, in which autocast computes with it. The copy must
    give the same bits under autocast, which is tried on two images of noise of `side` pixels. The
    network is on the device.
    """
    stored = copy.deepcopy(network)
    for module in stored.modules():
        # Not their subclasses: attention reads the weights of its own itself.
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(dtype)
    noise = _noise(side).to(device)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype):
            wanted, found = network(noise.clone()), stored(noise)
            same = torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True)
    except Exception as error:  # the network's own code runs here, which may raise anything
        return network, f"with weights stored in {dtype}, {_in_one_line(error)}"
    return (stored, None) if same else (network, f"with weights stored in {dtype}, outputs change")


def _noise(side: int) -> Tensor:
    """Two images, so that a trace that takes one image for the whole batch is found out."""
    noise = torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(0))
    return noise.contiguous(memory_format=torch.channels_last)


def _in_one_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


def _changed(
    network: nn.Module,
    noise: Tensor,
    change: Callable[[fx.GraphModule, Tensor], None],
    what: str,
    tolerance: float,
) -> tuple[nn.Module, str | None]:
    """(the trace of the network, changed, None), or (the network itself, the reason): it, its trace
    or the change raises an exception, or its outputs on the noise differ by more than that share of
    the largest one. what: names the change, for the reason."""
    try:
        # torch.fx prints the traceback of what it raises.
        with torch.no_grad(), redirect_stderr(io.StringIO()):
            # By the network itself: its trace may compute something else.
            wanted = network(noise.clone())
            changed = fx.symbolic_trace(network)
            change(changed, noise)
            changed.recompile()
            changed.delete_all_unused_submodules()
            found = changed(noise)
    except Exception as error:  # the network's own code runs here, which may raise anything
        return network, _in_one_line(error)
    if found.shape != wanted.shape:
        return network, f"{what}, it gives shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    most, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not most <= tolerance * largest:
        return network, f"{what}, its outputs change by {most:.2g}, the largest is {largest:.2g}"
    return changed, None


def _fuse_traced(traced: fx.GraphModule, noise: Tensor, images: int) -> None:
    ShapeProp(traced).propagate(noise.clone())
    _fold_batch_norms(traced, noise)
    for node in list(traced.graph.nodes):
        if _is_module(traced, node, nn.Conv2d):
            _fuse_from(traced, node, images)


def _is_module(traced: fx.GraphModule, node: Node, kind: type | tuple[type, ...]) -> bool:
    is_module = node is not None and node.op == "call_module"
    return is_module and isinstance(traced.get_submodule(node.target), kind)


def _is_call(node: Node, functions: tuple[Any, ...]) -> bool:
    return node is not None and node.op == "call_function" and node.target in functions


def _only_user(node: Node) -> Node:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace(traced: fx.GraphModule, nodes: list[Node], module: nn.Module, *others: Node) -> None:
    """Replace consecutive nodes by one module, called with the first one's input and `others`."""
    name = f"fused_{nodes[0].name}"
    traced.add_module(name, module)
    with traced.graph.inserting_after(nodes[-1]):
        node = traced.graph.call_module(name, (nodes[0].args[0], *others))
    node.meta = dict(nodes[-1].meta)
    nodes[-1].replace_all_uses_with(node)
    for node in reversed(nodes):
        traced.graph.erase_node(node)


def _fold_batch_norms(traced: fx.GraphModule, _: Tensor) -> None:
    for node in list(traced.graph.nodes):
        user = _only_user(node)
        if _is_module(traced, node, nn.Conv2d) and _is_module(traced, user, nn.BatchNorm2d):
            layers: list[Any] = [traced.get_submodule(part.target) for part in (node, user)]
            convolution, norm = (copy.deepcopy(layer).double() for layer in layers)
            _replace(traced, [node, user], fuse_conv_bn_eval(convolution, norm).float())


def _fuse_from(traced: fx.GraphModule, start: Node, images: int) -> None:
    """Replace a convolution, and the sum and the ReLU that alone read it, by one Convolution."""
    convolution: Any = traced.get_submodule(start.target)
    if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        return
    nodes, others, in_place = [start], [], False
    user = _only_user(start)
    if _is_call(user, SUMS) and _is_plain_sum(user):
        others = [argument for argument in user.args if argument is not start]
        in_place = _may_be_overwritten(traced, others[0], start, user)
        nodes.append(user)
    user = _only_user(nodes[-1])
    relu = _is_module(traced, user, nn.ReLU) or _is_call(user, RELUS)
    if relu:
        nodes.append(user)
    size = [images, *start.args[0].meta["tensor_meta"].shape[1:]]
    _replace(traced, nodes, Convolution(convolution, relu, in_place, size), *others)


def _is_plain_sum(addition: Node) -> bool:
    """Whether it adds two different tensors of the same shape, without a factor."""
    if len(addition.args) != 2 or addition.kwargs:
        return False
    # Numbers have no metadata; nodes that give numbers, such as x.size(0), have none of a tensor.
    metas: list[Any] = [
        getattr(argument, "meta", {}).get("tensor_meta") for argument in addition.args
    ]
    if addition.args[0] is addition.args[1] or None in metas:
        return False
    return bool(metas[0].shape == metas[1].shape)


def _may_be_overwritten(traced: fx.GraphModule, other: Node, start: Node, addition: Node) -> bool:
    """Whether `other` is a convolution's own result that nothing reads from `start` on.

    Only other convolutions before the addition may read it: anything else could return a view.
    """
    convolutions = (nn.Conv2d, Convolution)
    position = {node: number for number, node in enumerate(traced.graph.nodes)}
    readers = [user for user in other.users if user is not addition]
    return _is_module(traced, other, convolutions) and all(
        _is_module(traced, reader, convolutions)
        and reader is not start
        and position[reader] < position[addition]
        for reader in readers
    )
