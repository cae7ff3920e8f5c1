"""lhact.methods.topk against sorting each row in Python, eagerly and exported."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lhact.methods import topk
from lhact.methods.topk import largest, largest_with_columns

KINDS = ["distinct", "many zeros", "all equal", "infinite", "one column", "no rows", "strided"]


def rows(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return {
        "distinct": torch.randn(7, 33),
        "many zeros": torch.randn(7, 33).clamp(min=0),
        "all equal": torch.full((3, 9), 2.5),
        "infinite": torch.randn(4, 12).masked_fill(torch.rand(4, 12) < 0.4, -float("inf")),
        "one column": torch.randn(5, 1),
        "no rows": torch.randn(0, 6),
        "strided": torch.randn(33, 14).T[::2],
        "ResNet-50": torch.randn(3, 2048),
    }[kind].to(dtype)


def by_sorting(values: torch.Tensor, k: int) -> list[list[float]]:
    return [sorted(row, reverse=True)[:k] for row in values.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "ResNet-50"])
def test_the_k_largest(kind, dtype):
    values = rows(kind, dtype)
    before, width = values.clone(), values.shape[1]
    # Of long rows NumPy sorts the surroundings of the border: a border one place off shows at some
    # k alone, so that many are tried.
    for k in range(width + 1) if kind in KINDS else range(1, width, 11):
        plain, (found, columns) = largest(values, k), largest_with_columns(values, k)
        wanted = by_sorting(values, k)
        assert by_sorting(plain, k) == by_sorting(found, k) == wanted
        assert plain.shape == found.shape == columns.shape == (len(values), k)
        assert torch.equal(values.gather(1, columns), found)
        assert all(len(set(row)) == k for row in columns.tolist()), "a column is named twice"
        assert found.dtype == plain.dtype == dtype
    assert torch.equal(values, before)


def test_gradients_pass():
    values = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    (largest(values, 2).sum() + 10 * largest_with_columns(values, 1)[0].sum()).backward()
    assert values.grad.tolist() == [[11, 0, 1]]


class Both(torch.nn.Module):
    """What a rectifier makes of it: values computed from the input, then selected."""

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return largest(values * 2, 205), *largest_with_columns(values * 2, 205)


def check_traced(traced, count: int) -> None:
    values = torch.randn(count, 2048)
    plain, found, columns = traced(values)
    assert by_sorting(plain, 205) == by_sorting(found, 205) == by_sorting(values * 2, 205)
    assert torch.equal((values * 2).gather(1, columns), found)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_any_number_of_rows(strict):
    dynamic = {"values": {0: torch.export.Dim("rows", min=1)}}
    given = (torch.randn(4, 2048),)
    exported = torch.export.export(Both(), given, dynamic_shapes=dynamic, strict=strict).module()
    for count in (1, 9):
        check_traced(exported, count)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_other_traces():
    check_traced(torch.jit.trace(Both(), torch.randn(4, 2048), check_trace=False), 9)
    check_traced(torch.compile(Both(), backend="eager", fullgraph=True), 9)
    with FakeTensorMode():
        assert [found.shape for found in Both()(torch.empty(3, 2048))] == [(3, 205)] * 3


@pytest.mark.parametrize("function", [largest, largest_with_columns])
def test_numpy_selects_where_nothing_traces(function, monkeypatch):
    monkeypatch.setattr(topk.torch.Tensor, "topk", lambda *_, **__: pytest.fail("torch.topk"))
    function(rows("distinct"), 3)
