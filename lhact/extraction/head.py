"""A classifier in; its body and its linear head out, found by running it on noise and checked
against it. A 1 x 1 convolution of pooled features is a linear layer too."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lhact.devices import out_of_memory
from lhact.extraction.weights import BadNetwork, shown

Shape = tuple[int, int, int]  # of one image: channels, height, width

IMAGES = 2  # of noise
# What another order of the same float32 sums may change, in parts of the largest logit.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parts:
    """body: images (n, 3, h, w) -> activations (n, channels); head: the linear layer that makes the
    logits of them. remarks: what its user should know, a line each."""

    body: nn.Module
    name: str
    head: nn.Linear
    remarks: tuple[str, ...]


class LogitsOf(nn.Module):
    """A network whose output is an object with `.logits` (as in transformers), a mapping, a tuple
    or a list; here it is the tensor alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images))


def logits_of(output: object) -> Tensor:
    """The logits (n, classes) in what a classifier returns. Raises BadNetwork where none are."""
    found = getattr(output, "logits", None)
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple | list) and output:
        found = output[0] if found is None else found
    elif isinstance(output, Tensor):
        found = output
    if not isinstance(found, Tensor) or found.ndim != 2:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise BadNetwork(
            f"the network must return logits (images, classes), as a tensor, as `.logits` or first "
            f"in a tuple, got {what}"
        )
    return found


@dataclass(frozen=True)
class Found:
    """The head's name, and what the whole network makes of noise. plain: it returns a tensor."""

    name: str
    noise: Tensor
    logits: Tensor
    plain: bool


def find(network: nn.Module, arch: str, shape: Shape, name: str | None = None) -> Found:
    """The linear layer whose output is the output of the network, run on images of that shape;
    name: which one to take instead. Raises BadNetwork where there is none."""
    noise = torch.randn((IMAGES, *shape), generator=torch.Generator().manual_seed(0))
    if (parameter := next(network.parameters(), None)) is not None:
        noise = noise.to(parameter)  # on its device, in its type
    layers = {key: m for key, m in network.named_modules() if _is_linear(m)}
    if name is not None and name not in layers:
        linears = [key for key, m in layers.items() if isinstance(m, nn.Linear)]
        known = ", ".join(map(shown, linears)) or "none"
        raise BadNetwork(f"{arch} has no linear layer {name!r}; it has: {known}")
    outputs: dict[str, list[Tensor]] = {key: [] for key in layers}

    def record(key: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: outputs[key].append(_pooled(output))

    hooks = [module.register_forward_hook(record(key)) for key, module in layers.items()]
    try:
        with torch.no_grad():
            returned = network(noise)
        logits = logits_of(returned)
        if not torch.isfinite(logits).all():
            raise BadNetwork(
                "it gives NaN or infinite logits for noise; the weights are damaged or too large"
            )
    except BadNetwork as error:
        raise BadNetwork(f"{arch}: {error}") from error
    except Exception as error:  # the network's own code
        if out_of_memory(error):
            raise
        raise BadNetwork(
            f"{arch} does not run on images of shape {shape} ({shown(error)}); give the size that "
            "it takes, and a network that takes images alone"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    made = [key for key, values in outputs.items() if len(values) == 1 and _same(values[0], logits)]
    if name is None and not made:
        _refuse_random(network, noise, logits, arch)
        raise BadNetwork(
            f"{arch} does not end in a linear layer, so it has no penultimate activations: "
            f"{_no_head(network, outputs, returned)}"
        )
    return Found(name or made[-1], noise, logits, isinstance(returned, Tensor))


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        own = (layer.kernel_size, layer.stride, layer.padding, layer.groups)
        return own == ((1, 1), (1, 1), (0, 0), 1)
    return isinstance(layer, nn.Linear)


def _pooled(output: Tensor) -> Tensor:
    """Maps (n, channels, h, w) averaged over h and w: a 1 x 1 convolution may stand before or
    behind the pooling, which makes no difference to its result."""
    return output.mean((2, 3)) if output.ndim == 4 else output


def _as_linear(layer: nn.Module) -> nn.Linear:
    """The layer itself, or a linear layer that shares the numbers of a 1 x 1 convolution."""
    if isinstance(layer, nn.Linear):
        return layer
    assert isinstance(layer, nn.Conv2d)
    linear = nn.Linear(layer.in_channels, layer.out_channels, device="meta").eval()
    weight = layer.weight.detach().flatten(1)
    linear.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear


def split(network: nn.Module, arch: str, shape: Shape, name: str | None = None) -> Parts:
    """The body and the head of a network in evaluation mode; see `find`. The network stays as it
    is; body and head share all their parameters with it.

    Raises BadNetwork where head(body(x)) is not what the network computes, or where the features
    are scaled to one length before the head, as in networks with cosine heads.
    """
    found = find(network, arch, shape, name)
    layer = network.get_submodule(found.name)
    head = _as_linear(layer)
    body = _without(network, layer)
    body = body if found.plain else LogitsOf(body).eval()
    try:
        with torch.no_grad():
            activations = body(found.noise)
    except Exception as error:  # the network's own code, run without its last layer
        raise BadNetwork(
            f"{arch} does not run without its layer {found.name!r} ({shown(error)}), so it cannot "
            "be split into a body and a linear head"
        ) from error
    fits = activations.ndim == 2 and activations.shape[1] == head.in_features
    # By its weights, not by calling it: a subclass or a hook may make something else of them.
    if fits:
        made = nn.functional.linear(activations, head.weight, head.bias)
    if not fits or not _same(made, found.logits):
        _refuse_random(network, found.noise, found.logits, arch)
        raise BadNetwork(
            f"{arch} does more than its linear layer {found.name!r} with its features: the layer "
            "alone does not give the network's logits, so scores of its activations would not be "
            "the network's; give another --head, or a network that ends in a linear layer"
        )
    _refuse_unit_length(body, found, arch)
    negative = 100 * float((activations < 0).double().mean())
    remark = (
        f"{negative:.0f} % of its penultimate activations of noise are negative: LHAct and its "
        "relatives were made for activations behind a ReLU, and raise all that are below `low`"
    )
    return Parts(body, found.name, head, (remark,) if negative else ())


def _without(network: nn.Module, head: nn.Module) -> nn.Module:
    """The network with an identity in place of that layer, under all of its names. The modules on
    the way to it are new, all others are the network's own."""
    if network is head:
        return nn.Identity().eval()
    if all(module is not head for module in network.modules()):
        return network
    outer = copy.copy(network)
    outer.__dict__["_modules"] = {
        name: None if module is None else _without(module, head)
        for name, module in network._modules.items()
    }
    return outer


def _refuse_random(network: nn.Module, noise: Tensor, logits: Tensor, arch: str) -> None:
    """Raises BadNetwork where the same images give other logits each time."""
    with torch.no_grad():
        again = logits_of(network(noise))
    if not _same(again, logits):
        raise BadNetwork(
            f"{arch} gives other logits each time it is run on the same images, also in evaluation "
            "mode, as functional dropout without training=self.training does; mend that first"
        )


def _same(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def _no_head(network: nn.Module, outputs: Mapping[str, list[Tensor]], returned: object) -> str:
    """Why no linear layer makes the logits, as far as it can be told."""
    logits = logits_of(returned)
    probabilities = logits if bool((logits >= 0).all()) else logits.exp()
    if bool(((probabilities.sum(dim=1) - 1).abs() < TOLERANCE).all()):
        return (
            "its outputs are probabilities or their logarithms, which sum to 1; give it without "
            "the softmax at its end"
        )
    for number, part in enumerate(returned if isinstance(returned, tuple | list) else ()):
        for key, values in outputs.items():
            if isinstance(part, Tensor) and any(_same(value, part) for value in values):
                return (
                    f"it returns the output of its layer {shown(key)!r} in place {number}, and "
                    "what stands in place 0 is taken for the logits; return the logits first"
                )
    linears = {key: m for key, m in network.named_modules() if isinstance(m, nn.Linear)}
    same_shape = [key for key in linears if any(v.shape == logits.shape for v in outputs[key])]
    if same_shape:
        layers = " and ".join(map(repr, map(shown, same_shape)))
        return (
            f"its logits are not the output of one linear layer, but are made of {layers}; --head "
            "takes one of them if its output alone is the logits"
        )
    for key, layer in linears.items():
        if layer.out_features == logits.shape[1] and not outputs[key]:
            return (
                f"its layer {shown(key)!r} is never called; where its weight is used by "
                "torch.nn.functional.linear, call the layer instead"
            )
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    if convolutions and convolutions[-1].out_channels == logits.shape[1]:
        return "its logits come from a convolution"
    return f"its last module is {type(list(network.modules())[-1]).__name__}"


def _refuse_unit_length(body: nn.Module, found: Found, arch: str) -> None:
    """Raises BadNetwork where features have one length, whatever the images. Noise alone does not
    tell: its features may be of nearly one length by chance, so darker and brighter noise is tried.
    """
    with torch.no_grad():
        activations = torch.cat([body(found.noise), body(3 * found.noise + 1)])
    lengths = torch.linalg.vector_norm(activations, dim=1)
    constant = bool((lengths / lengths.mean() - 1).abs().max() < 1e-4)
    same = bool((activations - activations[0]).abs().max() < 1e-3 * activations.abs().max())
    # A LayerNorm that has not been trained also gives all rows one length, but of mean 0.
    centred = bool((activations.mean(dim=1).abs() < 1e-3 * activations.abs().mean(dim=1)).all())
    if constant and not centred and not same and activations.shape[1] > 1:
        raise BadNetwork(
            f"{arch} scales its features to the length {lengths.mean():.4g} before its layer "
            f"{found.name!r}, as networks with cosine heads do; the methods here need the "
            "activations' own length"
        )
