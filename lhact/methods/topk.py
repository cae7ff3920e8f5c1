"""Rows of numbers in, the k largest of each row out.

On a CPU, NumPy selects them with vector instructions: for 2048 float32 it takes a fifth to an
eighth of the time of torch.topk. Where torch traces or differentiates, torch.topk selects.
"""

import numpy as np
import torch
from torch import Tensor


def _numpy_can_select(values: Tensor) -> bool:
    """Whether `values` are real numbers in memory that no trace or gradient has to follow."""
    return (
        type(values) is Tensor  # not a subclass such as FakeTensor, which holds no numbers
        and values.device.type == "cpu"
        and values.dtype in (torch.float32, torch.float64)
        and not values.requires_grad
        and not torch.compiler.is_compiling()  # true under torch.compile and torch.export
        # A trace would keep these numbers as a constant.
        and not torch.jit.is_tracing()
    )


def largest(values: Tensor, k: int) -> Tensor:
    """The k largest of each row, in no particular order: (rows, columns) -> (rows, k).

    Can be traced by torch.export. 0 <= k <= columns.

    >>> largest(torch.tensor([[1.0, 4.0, 2.0]]), 1)
    tensor([[4.]])
    """
    columns = values.shape[1]
    if k in (0, columns) or not _numpy_can_select(values):
        return values.topk(k, dim=1, sorted=False).values
    return torch.from_numpy(np.partition(values.numpy(), columns - k, axis=1)[:, columns - k :])


def largest_with_columns(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`largest` and the columns they come from, both (rows, k), the columns as int64.

    Of equal values at the border some are taken and others not, so that there are k; which ones
    may differ between NumPy and torch.
    """
    columns = values.shape[1]
    if k in (0, columns) or not _numpy_can_select(values):
        chosen_values, chosen = values.topk(k, dim=1, sorted=False)
        return chosen_values, chosen
    order = np.argpartition(values.numpy(), columns - k, axis=1)
    chosen = torch.from_numpy(order[:, columns - k :])
    return values.gather(1, chosen), chosen
