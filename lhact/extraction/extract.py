"""Images and a network's body in, penultimate activations out, batch by batch in the order of the
images, on one device."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lhact.devices import PRECISIONS, out_of_memory
from lhact.extraction.fuse import fold, fuse, store_weights
from lhact.extraction.image_sets import Item, Pixels
from lhact.extraction.networks import Network
from lhact.extraction.ranks import ranks_on_this_machine
from lhact.messages import InputError, first_line
from lhact.parallel import map_ordered
from lhact.records import Perturbation, Preprocessing

T = TypeVar("T")
Compute = Callable[[Tensor], Tensor]

# Images that one CPU thread takes at a time: few enough for their activations to stay in its cache.
IMAGES_PER_THREAD = 8
# What the gradient of ODIN is multiplied by in fp16, whose smallest number is 6e-8. Only its sign
# is used.
FP16_LOSS_SCALE = 2.0**14


class ExtractionFailed(InputError):
    """The device or the network failed; the message says how and what to do."""


class UnreadableImage(Exception):
    """An image that cannot be read; the message names it."""


def normaliser(preprocessing: Preprocessing, device: torch.device) -> Compute:
    """The function (n, h, w, 3) uint8 -> (n, 3, h, w) float32 in channels-last order: to [0, 1],
    minus mean, over std, per RGB channel.

    On a CPU step by step, to the bit as torchvision's ToTensor and Normalize do it; on a GPU as one
    multiplication and addition, which differs by at most 5e-7.
    """
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    if device.type == "cpu":
        return lambda pixels: pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
    return fused_normaliser(mean, std)


def fused_normaliser(mean: Tensor, std: Tensor) -> Compute:
    """The function (n, h, w, 3) uint8 -> (n, 3, h, w) float32 in one operation. mean and std
    (1, 3, 1, 1), on the device of the pixels."""
    scale, shift = 1 / (255 * std), -mean / std
    return lambda pixels: torch.addcmul(shift, pixels.permute(0, 3, 1, 2), scale)


def odin_perturb(
    body: nn.Module, head: tuple[Tensor, Tensor], images: Tensor, perturbation: Perturbation
) -> Tensor:
    """images - epsilon * sign(gradient of the cross-entropy of logits / temperature against the
    predicted class).

    ODIN (Liang, Li & Srikant, ICLR 2018, eq. 2), in the normalised input space as in the code of
    ODIN and ReAct: epsilon is not divided by the standard deviations. head: weight (classes,
    channels) and bias (classes,). images: (n, 3, h, w), normalised. Returns a new tensor like it.
    """
    half = torch.is_autocast_enabled(images.device.type) and (
        torch.get_autocast_dtype(images.device.type) == torch.float16
    )
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        activations = body(images).float()
        with torch.autocast(images.device.type, enabled=False):
            logits = nn.functional.linear(activations, *head) / perturbation.temperature
            # Summed, not averaged: the sign of one image's gradient must not depend on its batch.
            loss = nn.functional.cross_entropy(logits, logits.argmax(dim=1), reduction="sum")
            # Of the images alone: parameters that require gradients keep theirs.
            (gradient,) = torch.autograd.grad(loss * FP16_LOSS_SCALE if half else loss, images)
    return images.detach() - perturbation.epsilon * gradient.sign()


def forward_on(
    device: torch.device, network: Network, preprocessing: Preprocessing, precision: str
) -> tuple[nn.Module, str | None]:
    """The body as it runs on that device, in channels-last order, and why it is not as fast as it
    could be, None where it is.

    For float32 on a CPU its operations are fused. On a GPU its batch norms are folded, in float32
    on the CPU whatever the precision. Under autocast its weights are stored in the type that they
    are multiplied in. `network.body` itself goes to the device too, for ODIN's gradients.
    """
    autocast, side = PRECISIONS[precision].autocast, preprocessing.crop
    folded, reason = (network.body, None) if device.type == "cpu" else fold(network.body, side)
    network.body.to(device).to(memory_format=torch.channels_last)
    if device.type == "cpu" and autocast is None:
        return fuse(network.body, (IMAGES_PER_THREAD, 3, side, side))
    body = folded.to(device).to(memory_format=torch.channels_last)
    if autocast is None:
        return body, reason
    stored, kept = store_weights(body, autocast, side, device)
    return stored, "; ".join(filter(None, (reason, kept))) or None


def computation(
    forward: nn.Module,
    normalise: Compute,
    perturb: Compute | None,
    device: torch.device,
    precision: str,
) -> Compute:
    """The function (n, h, w, 3) uint8 pixels -> (n, channels) float32 activations on the device.

    perturb: what happens to normalised images first, such as `odin_perturb`.
    """
    autocast = PRECISIONS[precision].autocast

    def compute(pixels: Tensor) -> Tensor:
        with (
            torch.set_grad_enabled(False),
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
        ):
            inputs = normalise(pixels.to(device, non_blocking=True))
            return forward(inputs if perturb is None else perturb(inputs)).float()

    return compute


def batches(images: int, batch_size: int, start: int = 0) -> list[range]:
    """The rows of each batch from row `start` on, which must be where a batch begins."""
    return [
        range(first, min(first + batch_size, images)) for first in range(start, images, batch_size)
    ]


def extract(
    compute: Compute,
    pixels: Pixels,
    rows: Sequence[range],
    device: torch.device,
    workers: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, for each of `rows`, the (n, channels) float32 activations of those images and their
    (n, 16) uint8 digests.

    compute: see `computation`.

    Raises UnreadableImage for an image that cannot be read, and ExtractionFailed for a device out
    of memory or activations that are not finite. For a worker process that died see `worker_ended`.
    """
    loader: DataLoader[Item] = DataLoader(
        pixels,  # type: ignore[arg-type]
        batch_sampler=rows,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
    )
    digests: list[np.ndarray] = []
    try:
        pieces = _pieces(loader, device, digests)
        if device.type == "cuda":
            pieces = _uploaded(pieces, device)
        computed = map_ordered(compute, pieces, device)
        if device.type == "cuda":
            # One batch behind, so that the GPU is at work on the next while this one arrives.
            computed = (arrived() for arrived in one_behind(map(_copy, computed)))
        for batch in rows:
            missing, parts = len(batch), []
            while missing:
                parts.append(_to_numpy(next(computed)))
                missing -= len(parts[-1])
            yield np.concatenate(parts), digests.pop(0)
    except RuntimeError as error:
        if out_of_memory(error):
            raise ExtractionFailed(
                f"{device} has too little memory for this batch; give a smaller --batch-size"
            ) from error
        raise


def worker_ended(error: Exception) -> str | None:
    """What to say of an error that comes of the end of a worker process; None for any other.

    It comes up wherever the main process then is: by torch's signal handler, or by a connection
    that breaks.
    """
    of_loader = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    if not of_loader and not isinstance(error, ConnectionError | EOFError):
        return None
    return (
        f"a worker process that reads images ended ({first_line(error)}); often the machine is out "
        "of memory: give fewer --workers"
    )


def default_workers(device: torch.device) -> int:
    """A process for each core that this one may use: a batch system, a container or taskset may
    allow fewer than the machine has, and the ranks on one machine share them.

    Beside a GPU two cores are left: for the thread that launches its kernels, which must not wait,
    and for the one that hands it the images.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    own = (allowed or 1) // ranks_on_this_machine() - (2 if device.type == "cuda" else 0)
    return max(1, min(16, own))


def _collate(items: list[Item]) -> tuple[np.ndarray, np.ndarray] | str:
    """One batch as NumPy arrays: workers hand these over through a pipe. Tensors would go through
    shared memory, which is as good as absent in many containers."""
    for item in items:
        if isinstance(item, str):
            return item
    pixels, digests = zip(*items, strict=True)
    return np.stack(pixels), np.frombuffer(b"".join(digests), np.uint8).reshape(len(items), -1)


def _pieces(
    loader: Iterable[tuple[np.ndarray, np.ndarray] | str],
    device: torch.device,
    digests: list[np.ndarray],
) -> Iterator[Tensor]:
    """Batches for a GPU; for a CPU what one thread takes at a time, the same cuts whatever the
    number of threads. The digests of each batch are appended to the list."""
    for batch in loader:
        if isinstance(batch, str):
            raise UnreadableImage(batch)
        pixels = torch.from_numpy(batch[0])
        digests.append(batch[1])
        yield from (
            pixels.split(IMAGES_PER_THREAD) if device.type == "cpu" else [pixels.pin_memory()]
        )


def _uploaded(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The batches on the GPU, each copied by a stream of its own while the one before it is in
    work."""
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for pixels in batches:
        with torch.cuda.stream(copying):
            uploaded = pixels.to(device, non_blocking=True)
        computing.wait_stream(copying)
        # Else its memory could take the next copy while it is still being read.
        uploaded.record_stream(computing)
        yield uploaded


def _copy(activations: Tensor) -> Callable[[], Tensor]:
    """Begins to copy a GPU's activations to main memory, right behind their computation; the
    function returned waits for them."""
    rows = activations.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> Tensor:
        copied.synchronize()
        return rows

    return arrived


def one_behind(items: Iterator[T]) -> Iterator[T]:
    """The same items, each only after the next one has been asked for."""
    for waiting in items:
        for item in items:
            yield waiting
            waiting = item
        yield waiting


def _to_numpy(activations: Tensor) -> np.ndarray:
    rows = activations.numpy()
    if not np.isfinite(rows).all():
        raise ExtractionFailed(
            "the network gives NaN or infinite activations; give --precision fp32 or other weights"
        )
    return rows
