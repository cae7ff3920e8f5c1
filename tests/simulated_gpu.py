"""A GPU where there is none: tensors that say they lie on cuda:0, while a CPU tensor inside
computes.

    with simulated_gpu() as waits:
        found = function(tensor.to(GPU))

An operation on tensors of both devices raises MixedDevices, where a real GPU would refuse it.
`waits` counts by name what makes the program wait until the GPU has done all that it was told:
copies, numbers that are read, shapes that depend on values. What one stream has made and another
reads without having waited for it raises Unordered. Numbers are the CPU's, so kernels, rounding and
memory of a real GPU show nothing of themselves here.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
WAITS: Counter[str] = Counter()
aten = torch.ops.aten

TO_CPU, TO_GPU, NUMBER, EVENT = "copy to the CPU", "copy to the GPU", "a number read", "an event"
# Their shapes depend on values, or a solver checks its result, so that torch waits.
WAITING = {
    aten.nonzero,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.masked_select,
    aten.equal,
    aten.bincount,
    aten.repeat_interleave,
    aten._linalg_eigh,
    aten._linalg_svd,
    aten.linalg_inv_ex,
}
# What takes an index on the CPU for a tensor on the GPU.
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class MixedDevices(RuntimeError):
    """An operation was given tensors of both devices."""


class Unordered(RuntimeError):
    """A stream reads what another made, without waiting for it or without keeping its memory."""


class Stream:
    """awaited: the streams that have waited for this one, since it last did anything."""

    current: "Stream"

    def __init__(self, device: Any = None) -> None:
        self.awaited: set[Stream] = set()

    def wait_stream(self, other: "Stream") -> None:
        other.awaited.add(self)


Stream.current = Stream()


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    with mock.patch.object(Stream, "current", stream):
        yield


class GpuTensor(torch.Tensor):
    """`inner` is its content. To torch's C++ it lies on the device "meta", for which no driver is
    asked."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "GpuTensor":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, **layout, dtype=inner.dtype, device="meta", requires_grad=False
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner
        self.made_by, self.kept_for = Stream.current, {Stream.current}
        self.made_by.awaited = set()

    def record_stream(self, stream: Stream) -> None:
        self.kept_for.add(stream)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"GpuTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        return compute(operation, args, kwargs or {})


def compute(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The operation on what is inside, with the result on the device where a GPU would have it."""
    copying = operation in (aten._to_copy.default, aten.copy_.default)
    if torch.is_inference_mode_enabled() and not copying:
        with _Operations():  # in this mode operations arrive whole that consist of others
            found = operation.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    for tensor in on_gpu:
        made_by, reader = tensor.made_by, Stream.current
        if reader not in tensor.kept_for or reader not in (made_by, *made_by.awaited):
            raise Unordered(f"{operation}")
    asked, own = kwargs.get("device"), {k: v for k, v in kwargs.items() if k != "pin_memory"}
    target = bool(on_gpu) if asked is None else torch.device(asked).type != "cpu"
    if asked is not None:
        own["device"] = CPU
    _check(operation, args, tensors, on_gpu)
    _count(operation, args, kwargs, bool(on_gpu), target)
    with torch.inference_mode(False), torch.no_grad():
        result = operation(*tree_map(_inside, args), **tree_map(_inside, own))
    if not target:
        return result
    before = {id(tensor.inner): tensor for tensor in on_gpu}  # of operations in place

    def outside(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, GpuTensor):
            return leaf
        with torch.inference_mode(False):  # a view must be of the same kind as what it views
            return before[id(leaf)] if id(leaf) in before else GpuTensor(leaf)

    return args[0] if operation is aten.copy_.default else tree_map(outside, result)


def _inside(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, GpuTensor) else leaf


def _check(operation: Any, args: tuple, tensors: list, on_gpu: list) -> None:
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)]
    if not on_gpu or not on_cpu or operation in (aten._to_copy.default, aten.copy_.default):
        return
    numbers = all(tensor.dim() == 0 for tensor in on_cpu)  # such as one side of a product
    if numbers and torch.Tag.pointwise in operation.tags:
        return
    if operation.overloadpacket in INDEXED and isinstance(args[0], GpuTensor):
        WAITS[TO_GPU] += 1  # allowed, but each index is copied
        return
    shapes = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
    raise MixedDevices(f"{operation}: {shapes}")


def _count(operation: Any, args: tuple, kwargs: dict, from_gpu: bool, to_gpu: bool) -> None:
    packet = operation.overloadpacket
    blocking = not (kwargs.get("non_blocking") or (packet is aten.copy_ and args[2:] == (True,)))
    if packet is aten.copy_:
        from_gpu, to_gpu = (isinstance(args[i], GpuTensor) for i in (1, 0))
    if packet in (aten._to_copy, aten.copy_):
        if from_gpu != to_gpu and blocking:
            WAITS[TO_CPU if from_gpu else TO_GPU] += 1
    elif from_gpu and packet is aten._local_scalar_dense:
        WAITS[NUMBER] += 1
    elif from_gpu and (packet in WAITING or (packet in INDEXED and _by_mask(args[1]))):
        WAITS[packet.__name__] += 1


def _by_mask(indices: list) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


class _Operations(TorchDispatchMode):
    """For operations that have no tensor of the GPU among their arguments: copies to it, new
    tensors."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        return compute(operation, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """For functions that would call a driver before they reach an operation."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        args, kwargs = tree_map(_numbered, (args, kwargs or {}))
        if function is torch.Tensor.pin_memory:
            return args[0].clone()
        if function is torch.Tensor.tolist and isinstance(args[0], GpuTensor):
            return args[0].to(CPU).tolist()
        if function is torch.tensor and torch.device(kwargs.get("device") or CPU).type == "cuda":
            return torch.tensor(*args, **{**kwargs, "device": CPU}).to(GPU)
        return function(*args, **kwargs)


def _numbered(leaf: Any) -> Any:
    """Plain "cuda" is the current GPU, for whose number torch would ask the driver."""
    return GPU if isinstance(leaf, torch.device) and leaf == torch.device("cuda") else leaf


class _Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        WAITS[EVENT] += 1


@contextmanager
def simulated_gpu() -> Iterator[Counter[str]]:
    """torch finds one GPU, cuda:0; yields the counted waits, which begin at none."""
    stubs = {
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "set_device": lambda device: None,
        "get_device_name": lambda device: "a simulated GPU",
        "Event": _Event,
        "Stream": Stream,
        "stream": _stream,
        "current_stream": lambda device: Stream.current,
    }
    if torch.cuda.is_available():
        torch.cuda.init()  # else torch would take the stub below for the start of the real one
    WAITS.clear()
    overwriting = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        # A parameter cannot be made a tensor of another class in its place.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwriting)
        stack.enter_context(_Functions())
        stack.enter_context(_Operations())
        yield WAITS
