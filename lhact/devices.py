"""The name of a device or a precision in, the torch device or the arithmetic settings out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from lhact.messages import first_line


class Precision(NamedTuple):
    """tf32: whether TensorFloat-32 is allowed. autocast: what layers compute in, None: float32."""

    tf32: bool
    autocast: torch.dtype | None


# TF32 has 10 bits of mantissa, an error of about 1e-3. Convolutions on GPUs use it by default.
PRECISIONS = {
    "fp32": Precision(False, None),
    "tf32": Precision(True, None),
    "bf16": Precision(False, torch.bfloat16),
    "fp16": Precision(False, torch.float16),
}


def why_no_gpu() -> str | None:
    """torch's own reason why it cannot use a GPU here, in one line; None where it can.

    Such as a CPU-only torch, no GPU, or a driver that is too old. Starts CUDA where there is one.
    """
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        return first_line(error)
    return None


def pick_device(name: str) -> torch.device:
    """auto, cuda, cuda:N or cpu -> the torch device.

    `auto` is the first GPU that torch can use, else the CPU; `why_no_gpu` then says why.
    Raises ValueError for another name and for a GPU that torch cannot use.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise ValueError(f"a device must be auto, cuda, cuda:N or cpu, got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    reason = why_no_gpu()
    if name == "auto":
        return torch.device("cpu" if reason else "cuda")
    if reason:
        raise ValueError(f"device {name}: torch cannot use a GPU ({reason}); mend that or take cpu")
    gpus = torch.cuda.device_count()
    # Compared before torch reads the name: it takes cuda:256 for cuda:0.
    if int(name.partition(":")[2] or 0) >= gpus:
        raise ValueError(
            f"device {name}: torch finds {gpus} GPUs here, numbered from 0; take one of them or cpu"
        )
    return torch.device(name)


def describe(device: torch.device) -> str:
    """A GPU's model name; for a CPU also the instructions that torch uses there: "cpu (AVX2)".

    The last bits of results depend on them.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"


def device_line(name: str, device: torch.device) -> str:
    """What a run says of its device at the start: `describe`, and torch's reason where `auto` has
    taken the CPU.

    name: what `pick_device` was asked for. device: what it gave.
    """
    line = f"device: {describe(device)}"
    if name != "auto" or device.type != "cpu":
        return line
    return f"{line}, since torch cannot use a GPU ({why_no_gpu()})"


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that a device's memory is used up.

    torch has an exception of its own for it, but the driver and the libraries of CUDA fail with a
    plain RuntimeError where they reserve memory for themselves.
    """
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and re.search("CUDA.*out of memory|_STATUS_ALLOC_FAILED", str(error)) is not None
    )


@contextmanager
def gpu_arithmetic(tf32: bool) -> Iterator[None]:
    """Run the body with deterministic GPU kernels, in TensorFloat-32 or in full float32.

    tf32=False gives full float32 also where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which NVIDIA's
    containers set, has turned TF32 on. torch's settings are put back afterwards.
    """
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    settings: list[tuple[Any, str, Any]] = [
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
    ]
    if hasattr(matmul, "fp32_precision"):  # from torch 2.9 on, which refuses a mix with allow_tf32
        precision = "tf32" if tf32 else "ieee"
        parts = (matmul, cudnn.conv, cudnn.rnn)
        settings += [(part, "fp32_precision", precision) for part in parts]
    else:
        settings += [(part, "allow_tf32", tf32) for part in (matmul, cudnn)]
    before = [getattr(part, name) for part, name, _ in settings]
    try:
        for part, name, value in settings:
            setattr(part, name, value)
        yield
    finally:
        for (part, name, _), value in zip(settings, before, strict=True):
            setattr(part, name, value)
