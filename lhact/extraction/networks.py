"""The name of a network and its weights in; body, linear head, preprocessing and a description out.

Networks come from torchvision by name, from timm as `timm:NAME`, or from the user's own code as
`MODULE:FUNCTION`. A new kind is a function and an entry of KINDS.
"""

import difflib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from lhact.extraction import checkpoints
from lhact.extraction.head import find, split
from lhact.extraction.weights import (
    BadNetwork,
    fetch,
    file_sha256,
    is_published,
    shown,
    state_dict_sha256,
)
from lhact.records import NetworkInfo, Preprocessing

# Heads that networks have for training alone; a checkpoint may come with or without them.
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


@dataclass(frozen=True)
class NetworkSpec:
    """arch: a name, see the module. weights: published weights by name; checkpoint: a file.
    arguments: of the builder. head: the linear layer that makes the logits, where it is not the one
    that is found."""

    arch: str
    weights: str | None = None
    checkpoint: Path | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)
    head: str | None = None

    @property
    def settings(self) -> dict[str, str] | None:
        """What of it a state dict does not hold, for the record."""
        given = {key: repr(value) for key, value in self.arguments.items()}
        return {**given, **({"head": self.head} if self.head else {})} or None


@dataclass(frozen=True)
class Network:
    """body: normalised images (n, 3, h, w) -> the activations (n, channels) that enter the head, in
    evaluation mode. weight (classes, channels), bias (classes,): the head, float32. preprocessing:
    what the weights come with; None where nothing says it. remarks: what was assumed, a line each.
    """

    body: nn.Module
    weight: Tensor
    bias: Tensor
    preprocessing: Preprocessing | None
    info: NetworkInfo
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """A whole network with its weights. weights: the name of the published ones."""

    network: nn.Module
    weights: str | None
    preprocessing: Preprocessing | None
    remarks: tuple[str, ...] = ()


# Architectures that torchvision has the parts of but no name for.
OWN_ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "resnet10": partial(ResNet, BasicBlock, [1, 1, 1, 1])
}


def architectures() -> list[str]:
    """Names without a colon: torchvision's classification networks and the digits benchmark's."""
    return sorted([*torchvision.models.list_models(module=torchvision.models), *OWN_ARCHITECTURES])


def check_names(spec: NetworkSpec) -> None:
    """Raises BadNetwork for an unknown architecture or weights that it does not have, listing the
    known ones; nothing is built or fetched."""
    if ":" in spec.arch:
        return
    if spec.arch not in architectures():
        raise BadNetwork(
            f"unknown architecture {spec.arch!r}{_near(spec.arch, architectures())}; known: "
            f"{', '.join(architectures())}; or timm:NAME, or MODULE:FUNCTION of your own"
        )
    known = [published.name for published in _published_weights(spec.arch)]
    if spec.weights is not None and spec.weights not in known:
        raise BadNetwork(
            f"{spec.arch} has no weights {spec.weights!r}; known: "
            f"{', '.join(known) or 'none, give --checkpoint'}"
        )


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def load(spec: NetworkSpec, crop: int | None = None, default_crop: int = 224) -> Network:
    """The network ready for extraction.

    crop: pixels a side of its input; None for what its weights come with, else default_crop.

    Raises BadNetwork: unknown names, a file that is no state dict or does not fit the architecture
    exactly, a network that does not end in a linear layer.
    """
    if spec.weights is not None and spec.checkpoint is not None:
        raise BadNetwork("give either the name of published weights or a checkpoint file")
    kind = "timm:" if spec.arch.startswith("timm:") else ":" if ":" in spec.arch else ""
    built = KINDS[kind](spec, crop, default_crop)
    network = built.network.eval().requires_grad_(False)
    sha256 = state_dict_sha256(network.state_dict())
    own_crop = built.preprocessing.crop if built.preprocessing else default_crop
    size = crop or own_crop
    parts = split(network, spec.arch, (3, size, size), spec.head)
    weight = parts.head.weight.detach().float().clone()
    bias = parts.head.bias
    info = NetworkInfo(
        arch=spec.arch,
        weights=built.weights,
        checkpoint=spec.checkpoint.name if spec.checkpoint else None,
        sha256=sha256,
        classes=weight.shape[0],
        channels=weight.shape[1],
        settings=spec.settings,
    )
    return Network(
        parts.body,
        weight,
        torch.zeros(len(weight)) if bias is None else bias.detach().float().clone(),
        built.preprocessing,
        info,
        (*built.remarks, *parts.remarks),
    )


def load_network(
    arch: str,
    weights: str | None = None,
    checkpoint: str | Path | None = None,
    head: str | None = None,
    input_size: int | None = None,
    **arguments: object,
) -> Network:
    """The network of that name with its weights, ready for a Detector; names as of
    get_activation.py's --arch, --weights, --checkpoint, --head, --crop and --arch-arg. input_size:
    pixels a side of the images it takes, where these are not its weights' own or 224. Raises
    BadNetwork, a ValueError, as `load`."""
    file = None if checkpoint is None else Path(os.path.expanduser(checkpoint))
    return load(NetworkSpec(arch, weights, file, arguments, head), input_size)


def _filled(
    state: checkpoints.StateDict,
    make: Callable[..., nn.Module],
    spec: NetworkSpec,
    side: Callable[[nn.Module], int],
    sizes: str | None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """The network that `make` builds, with these weights; remarks.

    side: pixels a side of the images that a network takes. sizes: the argument of `make` that says
    how wide the head is, which becomes the file's width.
    """
    network = make().eval()
    state = checkpoints.fitted_to(state, network, AUXILIARY.get(spec.arch, ()))
    if _shapes(state.tensors) != _shapes(network.state_dict()):  # the head is another one
        name = find(network, spec.arch, (3, side(network), side(network)), spec.head).name
        state = checkpoints.with_head(state, name)
        weight = state.tensors.get(f"{name}.weight")
        head = network.get_submodule(name)
        own: Tensor = head.weight  # type: ignore[assignment]
        if weight is not None and weight.ndim == own.ndim:
            classes, channels = weight.shape[:2]
            if sizes and classes not in (0, len(own)) and weight.shape[1:] == own.shape[1:]:
                network = make(**{sizes: classes})
            if isinstance(head, nn.Linear) and f"{name}.bias" not in state.tensors:
                network.set_submodule(name, nn.Linear(channels, classes, bias=False))
    checkpoints.fill(network, state, spec.arch)
    return network, state.remarks


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@contextmanager
def _arguments_named(spec: NetworkSpec) -> Iterator[None]:
    """Says of arguments that a builder does not take which they are."""
    try:
        yield
    except (TypeError, ValueError, AssertionError) as error:
        if not spec.arguments or isinstance(error, BadNetwork):
            raise
        given = " ".join(f"{key}={value}" for key, value in spec.arguments.items())
        raise BadNetwork(
            f"{spec.arch} cannot be built with --arch-arg {shown(given)}: {shown(error)}"
        ) from error


# ---- torchvision ----


def build(arch: str, classes: int = 1000, **arguments: object) -> nn.Module:
    """A network of torchvision, or resnet10, with random weights. Raises BadNetwork for an unknown
    name, listing the known ones."""
    check_names(NetworkSpec(arch))
    make = OWN_ARCHITECTURES.get(arch) or partial(torchvision.models.get_model, arch, weights=None)
    if arch in AUXILIARY:
        arguments |= {"aux_logits": False, "init_weights": False}
    return make(num_classes=classes, **arguments)


def _torchvision(spec: NetworkSpec, crop: int | None, default_crop: int) -> Built:
    check_names(spec)
    known = _published_weights(spec.arch)
    if spec.checkpoint is not None:
        state = checkpoints.read_state_dict(spec.checkpoint)
        sha256 = file_sha256(spec.checkpoint)
        preset = next((w for w in known if is_published(sha256, w.url)), None)
    elif spec.weights is not None:
        preset = next(w for w in known if w.name == spec.weights)
        state = checkpoints.read_state_dict(fetch(preset.url, f"{preset.name} of {spec.arch}"))
    else:
        raise BadNetwork(f"{spec.arch} needs weights: give --weights NAME or --checkpoint FILE")
    preprocessing = preset and _preset(preset)
    side = preprocessing.crop if preprocessing else default_crop
    # A ViT has a position for each patch, so that it takes images of one size alone.
    fixed = {"image_size": side} if preprocessing and spec.arch.startswith("vit_") else {}

    def make(**sizes: int) -> nn.Module:
        settings: dict[str, Any] = {**fixed, **spec.arguments, **sizes}
        with _arguments_named(spec):
            return build(spec.arch, **settings)

    network, remarks = _filled(state, make, spec, lambda _: crop or side, "classes")
    if hasattr(network, "transform_input") and "transform_input" not in spec.arguments:
        if preset is not None:
            # torchvision's own googlenet and inception_v3 take inputs in another scaling.
            network.transform_input = True  # type: ignore[assignment]
        else:
            remarks += (
                f"{spec.arch}: inputs go in as they are normalised; torchvision's own weights take "
                "them in another scaling, which --arch-arg transform_input=True turns on",
            )
    return Built(network, preset and preset.name, preprocessing, remarks)


def _preset(weights: torchvision.models.Weights) -> Preprocessing:
    """The preprocessing of a torchvision weight set."""
    preset = weights.transforms()
    return Preprocessing(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _published_weights(arch: str) -> list[torchvision.models.Weights]:
    if arch in OWN_ARCHITECTURES or arch not in architectures():
        return []
    return list(torchvision.models.get_model_weights(arch))


def is_resnet50(network: nn.Module) -> bool:
    """Whether its tensors have the names and shapes of torchvision's ResNet-50."""
    with torch.device("meta"):
        wanted = torchvision.models.resnet50(weights=None).state_dict()
    return _shapes(network.state_dict()) == _shapes(wanted)


def published_top1(arch: str | None, name: str | None) -> float | None:
    """The ImageNet-1K top-1 accuracy in percent that torchvision publishes for its weights of that
    name; None where it does not."""
    known = {weights.name: weights for weights in _published_weights(arch or "")}
    metrics = known[name].meta.get("_metrics", {}) if name in known else {}
    top1: float | None = metrics.get("ImageNet-1K", {}).get("acc@1")
    return top1


# ---- timm ----


def _timm(spec: NetworkSpec, crop: int | None, default_crop: int) -> Built:
    name = spec.arch.removeprefix("timm:")
    if spec.weights:
        name = f"{name}.{spec.weights}"
    try:
        import timm
    except ImportError as error:
        raise BadNetwork(
            f"{spec.arch} needs timm; install it with: pip install 'lhact[timm]'"
        ) from error
    if not timm.is_model(name):
        raise BadNetwork(
            f"timm {timm.__version__} has no network {name!r}{_near(name, timm.list_models())}"
        )

    def make(**arguments: object) -> nn.Module:
        settings: dict[str, Any] = {**spec.arguments, **arguments}
        with _arguments_named(spec):
            network: nn.Module = timm.create_model(name, **settings)
        if spec.checkpoint and "num_classes" not in settings and network.num_classes == 0:
            # Published for its features alone; the file says how many classes its head has.
            network = timm.create_model(name, num_classes=1000, **settings)
        return network

    size = spec.arguments.get("img_size")

    def config_of(network: nn.Module) -> dict[str, Any]:
        given = {"img_size": size} if isinstance(size, int) else {}
        config: dict[str, Any] = timm.data.resolve_model_data_config(network, given)
        return config

    def side_of(network: nn.Module) -> int:
        return crop or int(config_of(network)["input_size"][-1])

    remarks: tuple[str, ...] = ()
    if spec.checkpoint is not None:
        state = checkpoints.read_state_dict(spec.checkpoint)
        network, remarks = _filled(state, make, spec, side_of, "num_classes")
    else:
        try:
            network = make(pretrained=True)
        except Exception as error:  # network errors of every kind, and no weights of that name
            reason = " ".join(str(error).split())
            raise BadNetwork(
                f"the weights of {spec.arch} could not be fetched by timm: {reason}; fetch them by "
                "hand and give --checkpoint FILE"
            ) from error
    config = config_of(network)
    side = config["input_size"][-1]
    if config["crop_mode"] not in ("center", "squash"):
        remarks += (f"{name}: timm evaluates it with crop mode {config['crop_mode']}, here center",)
    preprocessing = Preprocessing(
        resize=math.floor(side / config["crop_pct"]),
        crop=side,
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        squash=config["crop_mode"] == "squash",
    )
    pretrained: Any = network.pretrained_cfg
    tag = None if spec.checkpoint else pretrained.get("tag") or "default"
    return Built(network, tag, preprocessing, remarks)


# ---- the user's own ----


def _own(spec: NetworkSpec, crop: int | None, default_crop: int) -> Built:
    module_name, _, function_name = spec.arch.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the user's module lacks something of its own
        raise BadNetwork(
            f"--arch {spec.arch}: there is no module {module_name!r} on the path or in "
            f"{os.getcwd()}; MODULE:FUNCTION names a function that builds the network"
        ) from error
    builder = getattr(module, function_name, None)
    if not callable(builder):
        known = [n for n, value in vars(module).items() if callable(value) and n[:1] != "_"]
        raise BadNetwork(
            f"--arch {spec.arch}: {module_name} has no function {function_name!r}"
            f"{_near(function_name, known)}"
        )

    with _arguments_named(spec), suppress(ValueError):  # some callables show no signature
        inspect.signature(builder).bind(**spec.arguments)

    def make() -> nn.Module:
        network = builder(**spec.arguments)
        if not isinstance(network, nn.Module):
            raise BadNetwork(
                f"--arch {spec.arch} must return a torch.nn.Module, got {type(network).__name__}"
            )
        return network

    if spec.checkpoint is None:
        remark = f"{spec.arch}: no --checkpoint, so its weights are those that the function gives"
        return Built(make(), None, None, (remark,))
    state = checkpoints.read_state_dict(spec.checkpoint)
    network, remarks = _filled(state, make, spec, lambda _: crop or default_crop, None)
    return Built(network, None, None, remarks)


KINDS: dict[str, Callable[[NetworkSpec, int | None, int], Built]] = {
    "": _torchvision,
    "timm:": _timm,
    ":": _own,
}
