"""Calibration batches in; counts, means and second moments of their rows out, in float64.

`calibration` is what a `fit` receives: it can be iterated any number of times and yields (rows,
channels) tensors. No function here holds more than PIECE of its rows at a time.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lhact.methods.calibrate import require_reiterable

# Rows in memory at a time: 4096 of 2048 channels are 64 MiB in float64.
PIECE = 4096


def pieces(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows in batches of at most PIECE, so that memory does not depend on how the caller
    batches them. ValueError where there are none, and for an iterator, which is empty the second
    time."""
    require_reiterable(batches, "the calibration set")
    rows = 0
    for batch in batches:
        rows += len(batch)
        yield from torch.split(batch, PIECE)
    if not rows:
        raise ValueError("the calibration set is empty")


def count_rows(calibration: Iterable[Tensor]) -> int:
    """How many rows there are."""
    return sum(len(batch) for batch in pieces(calibration))


def in_dtype_of(calibration: Iterable[Tensor], **constants: Tensor) -> dict[str, Tensor]:
    """What a `fit` returns: the constants in the dtype of the calibration set's first batch."""
    dtype = next(iter(calibration)).dtype
    return {name: constant.to(dtype) for name, constant in constants.items()}


def mean_row(
    calibration: Iterable[Tensor], of: Callable[[Tensor], Tensor] = lambda rows: rows
) -> Tensor:
    """(channels,) the mean of of(rows) over all rows."""
    rows, total = 0, torch.zeros(())
    for batch in pieces(calibration):
        rows += len(batch)
        total = total + of(batch).sum(dim=0, dtype=torch.float64)
    return total / rows


def mean_and_std(calibration: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(channels,) mean and (population) standard deviation of each channel."""
    mean = mean_row(calibration)
    # A second pass instead of E[x^2] - mean^2, so that a constant channel has exactly no spread.
    return mean, mean_row(calibration, lambda rows: (rows - mean).square()).sqrt()


def moments(
    calibration: Iterable[Tensor], of: Callable[[Tensor], Tensor] = lambda rows: rows
) -> tuple[int, Tensor, Tensor]:
    """(number of rows, mean row, mean of z z^T) of the rows z = of(rows).

    float32 products would drown the small eigenvalues, which matter most here.
    """
    rows, total, moment = 0, torch.zeros(()), torch.zeros(())
    for batch in pieces(calibration):
        z = of(batch).double()
        total = total + z.sum(dim=0)
        # In place from the second batch on: this is as large as the network is wide, squared.
        moment = moment.add_(z.T @ z) if rows else z.T @ z
        rows += len(z)
    return rows, total / rows, moment / rows


def rounding_noise(moment: Tensor) -> Tensor:
    """What rounding may leave of an eigenvalue that is 0, of a matrix computed from this one."""
    return len(moment) * torch.finfo(moment.dtype).eps * moment.trace()


def whole_number(name: str, value: float, most: float = math.inf, meaning: str = "") -> int:
    """`value` as an int. ValueError where it is not a whole number from 1 to `most`.

    meaning: what `most` is, for the message.
    """
    if not (float(value).is_integer() and 1 <= value <= most):
        limit = f" to {most}, {meaning}" if meaning else " on"
        raise ValueError(
            f"{name} must be a whole number from 1{limit}; got {value}; "
            f"choose another with --set {name}=N"
        )
    return int(value)
