"""What a user hands to a detector in, tensors that it can work with out, or a ValueError that says
what was wanted."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

AS_TRAINED = "prepared as for the network's training"
# Larger pixel values than any normalisation gives: (1 - mean) / std with std 0.05 is below 20.
LARGEST_PIXEL = 25.0


def check_images(
    images: Any, shape: tuple[int, int, int] | None, dtype: torch.dtype | None = None
) -> None:
    """Raises ValueError for anything but floating-point images (n, channels, height, width) of that
    shape and type, where they are given, in the range of normalised pixels."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be (n, channels, height, width) tensors, got {what}")
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


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    """The images and class numbers in what a DataLoader yields."""
    if isinstance(batch, Mapping):
        keys = [key for key in ("pixel_values", "images", "image") if key in batch]
        if not keys:
            raise ValueError(f"a batch must have 'images' or 'pixel_values', got {sorted(batch)}")
        labels = [batch[key] for key in ("labels", "label") if key in batch]
        batch = (batch[keys[0]], *labels)
    if isinstance(batch, tuple | list):
        images, label = batch[0], batch[1] if len(batch) > 1 else None
        is_label = isinstance(label, Tensor) and label.ndim == 1 and len(label) == len(images)
        return images, label if is_label else None
    return batch, None


def checked_features(values: Tensor | np.ndarray, channels: int) -> Tensor:
    """Activations (n, channels) as float32 in main memory."""
    if not isinstance(values, Tensor):  # an array that cannot be written to becomes none as it is
        values = torch.from_numpy(np.array(values, np.float32))
    rows = values.detach().cpu().float()
    if rows.ndim != 2 or rows.shape[1] != channels or not len(rows):
        raise ValueError(
            f"activations must be (n, {channels}), what enters the head, got {tuple(rows.shape)}"
        )
    if not rows.isfinite().all():
        raise ValueError("activations must be finite, got NaN or infinite values")
    return rows


def checked_labels(values: Tensor | np.ndarray, rows: int, classes: int) -> Tensor:
    """Class numbers (rows,) as int64 in main memory."""
    labels = torch.as_tensor(values).detach().cpu()
    if labels.shape != (rows,) or labels.is_floating_point():
        raise ValueError(
            f"labels must be {rows} class numbers, got {tuple(labels.shape)} {labels.dtype}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    return labels.long()
