"""What a user hands to a detector in, tensors that it can work with out, or a ValueError that says
what was wanted."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lhact.devices import out_of_memory
from lhact.extraction.head import split
from lhact.extraction.networks import Network, is_resnet50
from lhact.extraction.weights import BadNetwork, state_dict_sha256
from lhact.methods.compose import BadMethod, Method, parse_setting, variants
from lhact.records import NetworkInfo

AS_TRAINED = "prepared as for the network's training"
# Larger pixel values than any normalisation gives: (1 - mean) / std with std 0.05 is below 20.
LARGEST_PIXEL = 25.0


def parts_of(
    network: nn.Module | Network, head: str | None, input_size: int | tuple[int, int, int]
) -> tuple[nn.Module, nn.Linear, NetworkInfo]:
    """The body and the head of a network, and which one it is; see `Detector`. Raises BadNetwork
    where it cannot be split into them."""
    if isinstance(network, Network):
        if head is not None:
            raise BadNetwork("give the name of the head to load_network, which looks for it")
        layer = nn.Linear(network.weight.shape[1], network.weight.shape[0])
        layer.weight = nn.Parameter(network.weight, requires_grad=False)
        layer.bias = nn.Parameter(network.bias, requires_grad=False)
        return network.body, layer, network.info
    while isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        network = network.module
    if not isinstance(network, nn.Module):
        raise BadNetwork(f"the network must be a torch.nn.Module, got {type(network).__name__}")
    if hasattr(network, "_orig_mod") or isinstance(network, torch.jit.ScriptModule):
        raise BadNetwork("the network is compiled already; give it as it is, compile the detector")
    check_eval_mode(network)
    if head is not None and not isinstance(head, str):
        raise BadNetwork(f"head must be the name of a linear layer, got {head!r}")
    state = network.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise BadNetwork("the network is on the meta device, without weights; load them first")
    name = "resnet50" if is_resnet50(network) else type(network).__name__
    parts = split(network, name, _shape(input_size), head)
    classes, channels = parts.head.weight.shape
    settings = {"head": head} if head else None
    info = NetworkInfo(name, None, None, state_dict_sha256(state), classes, channels, settings)
    return parts.body, parts.head, info


def _shape(input_size: Any) -> tuple[int, int, int]:
    sizes = (3, input_size, input_size) if isinstance(input_size, int) else input_size
    is_shape = isinstance(sizes, tuple | list) and len(sizes) == 3
    if not is_shape or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            "input_size must be a number of pixels or (channels, height, width), got "
            f"{input_size!r}"
        )
    return (sizes[0], sizes[1], sizes[2])


def check_eval_mode(network: nn.Module) -> None:
    if any(module.training for module in network.modules()):
        raise BadNetwork(
            "the network is in training mode, where it gives other scores; call its eval()"
        )


def one_method(name: str, settings: Mapping[str, float] | None, published: bool) -> Method:
    """The method of that name with the settings, and the published constants where `published`.
    Raises BadMethod."""
    if not isinstance(name, str):
        raise BadMethod(f"method must be a name such as 'lhact' or 'react+vim', got {name!r}")
    if settings is not None and not isinstance(settings, Mapping):
        raise BadMethod(
            f"settings must be numbers by name, such as {{'lhact.order': 3}}, got {settings!r}"
        )
    given = [parse_setting(f"{key}={value}") for key, value in (settings or {}).items()]
    method, *others = variants([name], given, [], published)
    if others:
        raise BadMethod(f"a detector has one method, got {name!r}, which stands for several")
    return method


def check_images(
    images: Any, shape: tuple[int, int, int] | None, dtype: torch.dtype | None
) -> None:
    """Raises ValueError for anything but floating-point images (n, channels, height, width) of that
    shape and type, where they are given, in the range of normalised pixels."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images must be (n, channels, height, width) tensors, got {what}; give batches, one "
            "image as image[None]"
        )
    _check_dense(images, "images")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point, {AS_TRAINED}, got {images.dtype}")
    if dtype not in (None, images.dtype):
        raise ValueError(
            f"images must be {dtype} as the network's weights, got {images.dtype}; give "
            f"images.to({dtype})"
        )
    if shape is not None and tuple(images.shape[1:]) != shape:
        raise ValueError(
            f"images must be {shape} as those that the detector was fitted on, got "
            f"{tuple(images.shape[1:])}; resize or crop them alike"
        )
    if not len(images):
        return
    largest = float(images.detach().abs().amax())
    if not math.isfinite(largest):
        raise ValueError("images must be finite, got NaN or infinite values")
    if largest > LARGEST_PIXEL:
        raise ValueError(
            f"images must be {AS_TRAINED}, got values up to {largest:g}, as of pixels from 0 to "
            "255; divide them by 255, then normalise"
        )


def _check_dense(values: Tensor, what: str) -> None:
    if values.is_meta or values.layout != torch.strided:
        kind = "on the meta device" if values.is_meta else values.layout
        raise ValueError(f"{what} must be a dense tensor that holds values, got one {kind}")


@contextmanager
def named_errors(images: Tensor) -> Iterator[None]:
    """Turns what the network raises on images of another size or kind into a ValueError."""
    try:
        yield
    except (RuntimeError, AssertionError, IndexError, TypeError) as error:
        if out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the network does not run on images of shape {tuple(images.shape[1:])} ({reason}); "
            f"give them {AS_TRAINED}"
        ) from error


def check_keep(keep: Any) -> None:
    if not isinstance(keep, int | float | np.floating) or not 0 < keep < 1:
        raise ValueError(f"keep must be a share between 0 and 1, such as 0.95, got {keep!r}")


def batches_of(loader: Any) -> Iterable[Any]:
    """What a user gives to learn from, as batches: a tensor is one."""
    if isinstance(loader, Tensor):
        return [loader]
    if not isinstance(loader, Iterable):
        raise ValueError(
            "give batches of ID images, such as a DataLoader or a list of tensors, got "
            f"{type(loader).__name__}"
        )
    return loader


def images_and_labels(batch: Any) -> tuple[Any, Any]:
    """The images in what a DataLoader yields, and what stands where class numbers belong, or
    None."""
    if isinstance(batch, Mapping):
        keys = [key for key in ("pixel_values", "images", "image") if key in batch]
        if not keys:
            raise ValueError(f"a batch must have 'images' or 'pixel_values', got {list(batch)}")
        labels = [batch[key] for key in ("labels", "label") if key in batch]
        batch = (batch[keys[0]], *labels)
    if isinstance(batch, tuple | list) and batch:
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def checked_features(values: Any, channels: int) -> Tensor:
    """Activations (n, channels) as float32 in main memory."""
    if not isinstance(values, Tensor):
        try:  # a copy: an array that cannot be written to becomes no tensor as it is
            values = torch.from_numpy(np.array(values, np.float32))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"activations must be a tensor or array (n, {channels}), got "
                f"{type(values).__name__}: {error}"
            ) from error
    _check_dense(values, "activations")
    rows = values.detach().cpu().float()
    if rows.ndim != 2 or rows.shape[1] != channels or not len(rows):
        raise ValueError(
            f"activations must be (n, {channels}), what enters the head, got {tuple(rows.shape)}"
        )
    if not rows.isfinite().all():
        raise ValueError("activations must be finite, got NaN or infinite values")
    return rows


def checked_labels(values: Any, rows: int, classes: int) -> Tensor:
    """Class numbers (rows,) as int64 in main memory."""
    try:
        labels = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"labels must be {rows} class numbers, got {type(values).__name__}: {error}"
        ) from error
    is_whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != (rows,) or not is_whole:
        raise ValueError(
            f"labels must be {rows} class numbers, got {tuple(labels.shape)} {labels.dtype}"
        )
    labels = labels.long()
    if rows and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    return labels
