"""Images and a network's body in, penultimate activations out, batch by batch in the order of the images, on one device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lhact.extraction.fuse import fuse
from lhact.parallel import each


class ExtractionFailed(Exception):
    """An image, a worker process or the device failed; the message says which and what to do."""


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float32 in channels-last order: to [0, 1], minus mean, over std, per RGB channel."""
    values = pixels.permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (mean, std))
    return values.sub_(mean).div_(std)


def odin_perturb(body: nn.Module, weight: Tensor, bias: Tensor, images: Tensor, temperature: float, epsilon: float) -> Tensor:
    """images - epsilon * sign(gradient of the cross-entropy of logits / temperature against the predicted class).

    ODIN (Liang, Li & Srikant, ICLR 2018, eq. 2), in the normalised input space as in the code of ODIN and ReAct: epsilon is not
    divided by the standard deviations. images: (n, 3, h, w), normalised. Returns a new tensor like it.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = nn.functional.linear(body(images).float(), weight, bias) / temperature
        # Summed, not averaged: the sign of the gradient of one image must not depend on its batch.
        nn.functional.cross_entropy(logits, logits.argmax(dim=1), reduction="sum").backward()
    return images.detach() - epsilon * images.grad.sign()


def _collate(items: list[np.ndarray | str]) -> Tensor | str:
    message = next((item for item in items if isinstance(item, str)), None)
    return message or torch.from_numpy(np.stack(items))


def batches(images: int, batch_size: int, start: int = 0) -> list[range]:
    """The rows of each batch from row `start` on, which must be where a batch begins."""
    return [range(first, min(first + batch_size, images)) for first in range(start, images, batch_size)]


# Images that one CPU thread takes at a time: few enough for their activations to stay in its cache.
IMAGES_PER_THREAD = 8


def forward_on(device: torch.device, body: nn.Module, crop: int, autocast: torch.dtype | None) -> nn.Module:
    """The body as `extract` runs it on that device, for images of crop x crop pixels: in channels-last order, and for float32 on a
    CPU with its operations fused."""
    body = body.to(device, memory_format=torch.channels_last)
    if device.type == "cpu" and autocast is None:
        return fuse(body, (IMAGES_PER_THREAD, 3, crop, crop))
    return body


def extract(
    forward: Callable[[Tensor], Tensor],
    pixels: Any,
    rows: Sequence[Sequence[int]],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    workers: int = 0,
    autocast: torch.dtype | None = None,
    perturb: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[np.ndarray]:
    """Yields, for each of `rows`, the (len, channels) float32 activations of those images.

    forward: normalised images (n, 3, h, w) -> (n, channels), on the device; see `forward_on`. pixels: a map-style dataset; item i
    is image i as (h, w, 3) uint8, or a message why it cannot be read. autocast: the type that layers compute in, None for float32.
    perturb: what happens to normalised images first, such as `odin_perturb`.

    Raises ExtractionFailed: an image that cannot be read, a worker process that died, a device out of memory, activations that are
    not finite.
    """

    def activations(batch: Tensor) -> Tensor:
        with torch.set_grad_enabled(False), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            inputs = normalise(batch.to(device, non_blocking=True), mean, std)
            return forward(inputs if perturb is None else perturb(inputs)).float()

    loader = DataLoader(pixels, batch_sampler=rows, num_workers=workers, collate_fn=_collate, pin_memory=device.type == "cuda")
    try:
        computed = each(activations, _pieces(loader, device), device)
        if device.type == "cuda":
            # One batch late, so that the GPU is at work on the next while this one arrives and is written.
            computed = (arrived() for arrived in _late(map(_copy, computed)))
        for batch in rows:
            missing, parts = len(batch), []
            while missing:
                parts.append(_to_numpy(next(computed)))
                missing -= len(parts[-1])
            yield np.concatenate(parts)
    except torch.OutOfMemoryError as error:
        raise ExtractionFailed(f"{device} has too little memory for this batch; give a smaller --batch-size") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ExtractionFailed(
            f"a worker process that reads images ended ({str(error).splitlines()[0]}); often the machine is out of memory: "
            "give fewer --workers"
        ) from error


def _pieces(loader: Iterable[Tensor | str], device: torch.device) -> Iterator[Tensor]:
    """Batches for a GPU; for a CPU what one thread takes at a time, the same cuts whatever the number of threads."""
    for batch in loader:
        if isinstance(batch, str):
            raise ExtractionFailed(batch)
        yield from batch.split(IMAGES_PER_THREAD) if device.type == "cpu" else [batch]


def _copy(activations: Tensor) -> Callable[[], Tensor]:
    """Begins to copy a GPU's activations to main memory, right behind their computation; the function returned waits for them."""
    rows = activations.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> Tensor:
        copied.synchronize()
        return rows

    return arrived


def _late(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each only after the next one has been asked for."""
    waiting = next(items, None)
    for item in items:
        yield waiting
        waiting = item
    if waiting is not None:
        yield waiting


def _to_numpy(activations: Tensor) -> np.ndarray:
    rows = activations.numpy()
    if not np.isfinite(rows).all():
        raise ExtractionFailed("the network gives NaN or infinite activations; give --precision fp32 or other weights")
    return rows
