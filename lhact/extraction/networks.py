"""A torchvision architecture and its weights in; body, linear head, preprocessing and a description out."""

import hashlib
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet


class BadNetwork(Exception):
    """The architecture, the weights or the checkpoint cannot be used; the message says what was wanted and what came."""


class Network(NamedTuple):
    """body: images (n, 3, h, w) -> the activations (n, channels) that enter the last linear layer; in evaluation mode.
    weight (classes, channels), bias (classes,): that layer, float32. preprocessing: what images.Preprocessing takes.
    description: arch, weights, checkpoint, sha256 (of the state dict), classes, channels."""

    body: nn.Module
    weight: Tensor
    bias: Tensor
    preprocessing: dict[str, Any]
    description: dict[str, Any]


def _resnet10(num_classes: int = 1000) -> nn.Module:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)


# What weights and statistics are stored in; anything else, such as 8-bit floats or quantised integers, needs an interpretation.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Heads that googlenet and inception_v3 have for training alone; a checkpoint may come with or without them.
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}

# Architectures that torchvision has the parts of but no name for.
OWN_ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"resnet10": _resnet10}


def architectures() -> list[str]:
    """Names that `--arch` takes: torchvision's classification networks and the embedded benchmark's."""
    return sorted([*torchvision.models.list_models(module=torchvision.models), *OWN_ARCHITECTURES])


def check_names(arch: str, weights: str | None = None) -> None:
    """Raises BadNetwork for an unknown architecture or weights that it does not have, listing the known ones."""
    if arch not in architectures():
        raise BadNetwork(f"unknown architecture {arch!r}; known: {', '.join(architectures())}")
    known = [published.name for published in _published_weights(arch)]
    if weights is not None and weights not in known:
        raise BadNetwork(f"{arch} has no weights {weights!r}; known: {', '.join(known) or 'none, give --checkpoint'}")


def build(arch: str, classes: int = 1000) -> nn.Module:
    """The architecture with random weights. Raises BadNetwork for an unknown name, listing the known ones."""
    check_names(arch)
    with warnings.catch_warnings():
        # googlenet and inception_v3 announce a change of initialisation; the weights are replaced anyway.
        warnings.simplefilter("ignore", FutureWarning)
        if arch in OWN_ARCHITECTURES:
            return OWN_ARCHITECTURES[arch](num_classes=classes)
        return _without_auxiliary(torchvision.models.get_model(arch, weights=None, num_classes=classes), arch)


def _without_auxiliary(network: nn.Module, arch: str) -> nn.Module:
    for name in AUXILIARY.get(arch, ()):
        setattr(network, name, None)
    return network


def head_name(network: nn.Module, arch: str) -> str:
    """The name of the network's last linear layer. Raises BadNetwork where there is none."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise BadNetwork(f"{arch} does not end in a linear layer, so it has no penultimate activations; take another --arch")
    return names[-1]


def state_dict_sha256(state: Mapping[str, Tensor]) -> str:
    """sha256 over the entries in sorted order: name, dtype, shape and the values' bytes."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_file_of(path: Path, weights: torchvision.models.Weights) -> bool:
    """Whether the file is the published one: torchvision names each after the start of its sha256, resnet50-0676ba61.pth."""
    return _file_sha256(path).startswith(Path(weights.url).stem.rpartition("-")[2])


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a file: bare, or under `state_dict` or `model`, its keys with or without `module.`."""
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of content that are refused here or that are as good as others
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadNetwork(f"no checkpoint at {path}; give the file of a state dict") from error
    except Exception as error:  # a damaged or hostile file makes torch.load raise nearly anything
        raise BadNetwork(
            f"{path} is not a checkpoint that can be loaded safely (wanted a state dict as torch.save writes it, "
            f"tensors only): {_reason(error)}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    wanted = "wanted plain tensors by name, bare or under 'state_dict' or 'model'"
    if not isinstance(content, Mapping) or not content:
        raise BadNetwork(f"{path} holds no state dict ({wanted})")
    odd = next((key for key, value in content.items() if not (isinstance(key, str) and _is_plain(value))), None)
    if odd is not None:
        raise BadNetwork(f"{path} holds no state dict ({wanted}): {_shown(odd)} is not one")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def _check_archive(path: Path) -> None:
    """Raises ValueError for an archive that is compressed, as torch.save's are not: it could take any amount of memory; and for one
    that has changed since it was written, which torch.load does not notice."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # what torch goes by
            return
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > path.stat().st_size:
            raise ValueError(f"it is compressed, from {size} bytes")
        if damaged := archive.testzip():
            raise ValueError(f"it is damaged: the checksum of its member {_shown(damaged)} is another")


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor in main memory, of numbers that are all stored: one that is expanded could be of any size."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and not value.is_nested
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in (*FLOATS, *INTEGERS)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _shown(text: object) -> str:
    """The start of it on one line, whatever its characters."""
    text = str(text)[:120]
    return text if text.isprintable() else ascii(text)[1:-1]


def _reason(error: Exception) -> str:
    """Why torch.load refuses a file, without its advice to load it all the same."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return _shown(next((line for line in lines if line.startswith("WeightsUnpickler error")), lines[0]))


def _fill(arch: str, state: dict[str, Tensor], path: Path) -> nn.Module:
    """The architecture with these weights, its head as wide as theirs. Raises BadNetwork where they do not fit exactly."""
    network = build(arch)
    head = head_name(network, arch)
    weight = state.get(f"{head}.weight")
    if weight is None or weight.ndim != 2 or len(weight) == 0:
        raise BadNetwork(f"{path} is not a checkpoint of {arch}: it has no matrix {head}.weight; give its own --arch")
    linear = network.get_submodule(head)
    if len(weight) != linear.out_features and weight.shape[1] == linear.in_features:
        network = build(arch, classes=len(weight))
    state = {key: value for key, value in state.items() if key.partition(".")[0] not in AUXILIARY.get(arch, ())}
    wanted = network.state_dict()
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [f"unexpected {_shown(key)}" for key in state if key not in wanted]
    problems += [
        f"{key} is {tuple(state[key].shape)}, wanted {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    problems += [
        f"{key} is {state[key].dtype}, wanted {wanted[key].dtype}"
        for key in wanted
        if key in state and wanted[key].is_floating_point() and not state[key].is_floating_point()
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BadNetwork(f"{path} is not a checkpoint of {arch}: {'; '.join(problems[:3])}{more}; give its own --arch")
    for key, value in state.items():
        if not torch.isfinite(value.float()).all():
            raise BadNetwork(f"{path}: {key} holds NaN or infinite values; the checkpoint is damaged")
    network.load_state_dict(state, strict=True)
    return network


def _preset(weights: torchvision.models.Weights) -> dict[str, Any]:
    """The preprocessing of a torchvision weight set, as plain values."""
    preset = weights.transforms()
    return {
        "resize": preset.resize_size[0],
        "crop": preset.crop_size[0],
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
    }


def _published_weights(arch: str) -> list[torchvision.models.Weights]:
    return [] if arch in OWN_ARCHITECTURES else list(torchvision.models.get_model_weights(arch))


def published_top1(arch: str, name: str | None) -> float | None:
    """The ImageNet-1K top-1 accuracy in percent that torchvision publishes for its weights of that name; None where it does not."""
    known = {weights.name: weights for weights in _published_weights(arch)}
    metrics = known[name].meta.get("_metrics", {}) if name in known else {}
    return metrics.get("ImageNet-1K", {}).get("acc@1")


def _from_torchvision(arch: str, name: str) -> tuple[nn.Module, torchvision.models.Weights]:
    check_names(arch, name)
    weights = next(weights for weights in _published_weights(arch) if weights.name == name)
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    # torch.hub checks the hash of what it downloads, but not of a file that is already there.
    if file.exists() and not _is_file_of(file, weights):
        raise BadNetwork(f"{file} is not the file that torchvision publishes as {name} (its sha256 differs); delete it")
    try:
        return _without_auxiliary(torchvision.models.get_model(arch, weights=weights), arch), weights
    except Exception as error:  # network errors of every kind, and torch.hub's hash check
        raise BadNetwork(
            f"{name} of {arch} could not be fetched: {error}; fetch {weights.url} by hand and put it at {file}"
        ) from error


def load(
    arch: str,
    weights: str | None = None,
    checkpoint: str | Path | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Network:
    """The network ready for extraction, from torchvision's `weights` (by name) or from a `checkpoint` file; one of the two.

    Preprocessing: that of the weight set; for a checkpoint that is the very file of one of the architecture's weight sets (by the
    hash in its name), that set's too; for any other checkpoint `preprocessing`, or else the protocol's defaults.

    Raises BadNetwork: unknown names, a file that is no state dict or does not fit the architecture exactly, an architecture that
    does not end in a linear layer.
    """
    if (weights is None) == (checkpoint is None):
        raise BadNetwork("give either the name of torchvision weights or a checkpoint file")
    preset = None
    if weights is not None:
        network, preset = _from_torchvision(arch, weights)
    else:
        checkpoint = Path(checkpoint)
        network = _fill(arch, _read_checkpoint(checkpoint), checkpoint)
        preset = next((known for known in _published_weights(arch) if _is_file_of(checkpoint, known)), None)
        if preset is not None and hasattr(network, "transform_input"):
            network.transform_input = True  # torchvision's own googlenet and inception_v3 take inputs in another scaling
    network.eval().requires_grad_(False)
    sha256 = state_dict_sha256(network.state_dict())
    name = head_name(network, arch)
    head = network.get_submodule(name)
    weight = head.weight.float().clone()
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias.float().clone()
    network.set_submodule(name, nn.Identity())
    return Network(
        network,
        weight,
        bias,
        dict(preprocessing or {}) if preset is None else _preset(preset),
        {
            "arch": arch,
            "weights": preset.name if preset else None,
            "checkpoint": checkpoint.name if checkpoint else None,
            "sha256": sha256,
            "classes": weight.shape[0],
            "channels": weight.shape[1],
        },
    )
