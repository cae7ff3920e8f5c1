"""lhact.topk against sorting each row in Python."""

import pytest
import torch

from lhact.methods.topk import largest, largest_with_columns


def rows(kind: str, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(1)
    return {
        "distinct": torch.randn(7, 33),
        "many zeros": torch.randn(7, 33).clamp(min=0),
        "all equal": torch.full((3, 9), 2.5),
        "infinite": torch.randn(4, 12).masked_fill(torch.rand(4, 12) < 0.4, -float("inf")),
        "one column": torch.randn(5, 1),
        "no rows": torch.randn(0, 6),
    }[kind].to(dtype)


KINDS = ["distinct", "many zeros", "all equal", "infinite", "one column", "no rows"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_k_largest(kind, dtype):
    values = rows(kind, dtype)
    before = values.clone()
    for k in range(values.shape[1] + 1):
        wanted = [sorted(row, reverse=True)[:k] for row in values.tolist()]
        found, columns = largest_with_columns(values, k)
        assert [sorted(row, reverse=True) for row in largest(values, k).tolist()] == wanted
        assert [sorted(row, reverse=True) for row in found.tolist()] == wanted
        assert torch.equal(values.gather(1, columns), found)
        assert all(len(set(row)) == k for row in columns.tolist()), "a column is named twice"
        assert found.dtype == largest(values, k).dtype == dtype
    assert torch.equal(values, before)


def test_gradients_pass():
    values = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    largest(values, 2).sum().backward()
    assert values.grad.tolist() == [[1, 0, 1]]
    values.grad = None
    largest_with_columns(values, 1)[0].sum().backward()
    assert values.grad.tolist() == [[1, 0, 0]]


def test_rows_that_are_not_contiguous():
    values = rows("distinct", torch.float32).T
    wanted = [sorted(row, reverse=True)[:3] for row in values.tolist()]
    assert [sorted(row, reverse=True) for row in largest(values, 3).tolist()] == wanted
