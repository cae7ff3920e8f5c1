"""lhact.devices: which device a name is, why there is no GPU, and arithmetic that is put back."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lhact.devices import (
    PRECISIONS,
    describe,
    device_line,
    gpu_arithmetic,
    out_of_memory,
    pick_device,
    why_no_gpu,
)

CPU = torch.device("cpu")
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update"


@pytest.fixture
def machine(monkeypatch):
    """machine(gpus, error): torch finds so many GPUs, or starting CUDA raises the error."""

    def become(gpus: int, error: Exception | None = None) -> None:
        def init() -> None:
            if error:
                raise error

        monkeypatch.setattr(torch.cuda, "init", init)
        # As on a real machine, GPUs are counted by the driver even where CUDA cannot start.
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: error is None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")

    return become


def test_precisions():
    assert {name: tuple(precision) for name, precision in PRECISIONS.items()} == {
        "fp32": (False, None),
        "tf32": (True, None),
        "bf16": (False, torch.bfloat16),
        "fp16": (False, torch.float16),
    }


def test_devices_with_gpus(machine):
    machine(gpus=2)
    assert why_no_gpu() is None
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == CPU
    assert describe(torch.device("cuda:1")) == "GPU of cuda:1"
    for name in ("cuda:2", "cuda:256", "cuda:99999"):  # as a torch device, cuda:256 is cuda:0
        with pytest.raises(ValueError, match=f"device {name}: torch finds 2 GPUs here, .* or cpu"):
            pick_device(name)


ERRORS = [
    RuntimeError(f"{OLD_DRIVER}\n  a trace of C++"),
    AssertionError("Torch not compiled with CUDA enabled"),
    torch.cuda.DeferredCudaCallError("CUDA call failed lazily\n\nat initialization"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_gpu_that_torch_cannot_use(machine, error):
    machine(gpus=8, error=error)
    reason = str(error).splitlines()[0]
    assert why_no_gpu() == reason
    assert pick_device("auto") == pick_device("cpu") == CPU
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"device {name}: torch cannot use a GPU") as caught:
            pick_device(name)
        assert reason in str(caught.value)
        assert str(caught.value).endswith("mend that or take cpu")
        assert len(str(caught.value).splitlines()) == 1


def test_the_line_at_the_start_says_why_auto_took_the_cpu(machine):
    cpu = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    machine(gpus=2)
    assert device_line("auto", torch.device("cuda")) == "device: GPU of cuda"
    machine(gpus=2, error=ERRORS[0])
    assert device_line("auto", CPU) == f"device: {cpu}, since torch cannot use a GPU ({OLD_DRIVER})"
    assert device_line("cpu", CPU) == f"device: {cpu}", "nobody asked for a GPU"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("DataLoader worker is killed: out of memory"), False),
        (ValueError("CUDA out of memory"), False),
    ],
    ids=lambda value: str(value).partition(chr(10))[0][:40],
)
def test_out_of_memory(error, wanted):
    assert out_of_memory(error) == wanted


def test_this_machine():
    usable = torch.cuda.is_available()
    assert (why_no_gpu() is None) == usable
    assert pick_device("auto").type == ("cuda" if usable else "cpu")
    assert describe(CPU) == f"cpu ({torch.backends.cpu.get_cpu_capability()})"


@pytest.mark.parametrize(
    "name", ["gpu", "", "cuda:x", "mps", "cpu:0", "cuda:-1", "CUDA", "cuda:1\n", "tpu"]
)
def test_an_unknown_device_is_refused(name):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        pick_device(name)
    assert str(caught.value) == f"a device must be auto, cuda, cuda:N or cpu, got {name!r}"


@pytest.mark.parametrize("tf32", [False, True])
def test_arithmetic_before_torch_2_9(tf32, monkeypatch):
    cudnn = SimpleNamespace(allow_tf32=not tf32, deterministic=False, benchmark=True)
    matmul = SimpleNamespace(allow_tf32=not tf32)
    before = dict(vars(cudnn)), dict(vars(matmul))
    backends = SimpleNamespace(cudnn=cudnn, cuda=SimpleNamespace(matmul=matmul))
    monkeypatch.setattr(torch, "backends", backends)
    with gpu_arithmetic(tf32):
        assert vars(cudnn) == {"allow_tf32": tf32, "deterministic": True, "benchmark": False}
        assert vars(matmul) == {"allow_tf32": tf32}
    assert (vars(cudnn), vars(matmul)) == before


ARITHMETIC = """
import warnings; warnings.simplefilter("error")
import torch
from lhact.devices import gpu_arithmetic
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
def show():
    if hasattr(matmul, "fp32_precision"):
        return [part.fp32_precision == "tf32" for part in (matmul, cudnn.conv, cudnn.rnn)]
    return [matmul.allow_tf32, cudnn.allow_tf32, cudnn.allow_tf32]
OLD FLAGS
before = show()
for tf32 in (False, True):
    try:
        with gpu_arithmetic(tf32):
            assert show() == [tf32] * 3, show()
            assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
            raise KeyError
    except KeyError:
        assert show() == before, show()
        assert (cudnn.deterministic, cudnn.benchmark) == (False, False)
print(before, matmul.allow_tf32, cudnn.allow_tf32)
"""


OLD_FLAGS = "matmul.allow_tf32, cudnn.allow_tf32 = True, False"
SETTINGS = {
    "by default": ("0", "", "[False, True, True] False True"),
    "in NVIDIA's containers": ("1", "", "[True, True, True] True True"),
    "after the flags of before 2.9": ("0", OLD_FLAGS, "[True, False, False] True False"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_arithmetic_of_this_torch(case):
    """In a process of its own, since torch reads the override when it is imported."""
    override, flags, shown = SETTINGS[case]
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": override}
    command = [sys.executable, "-c", ARITHMETIC.replace("OLD FLAGS", flags)]
    where = {"cwd": Path(__file__).parents[1], "env": environment}
    done = subprocess.run(command, **where, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (shown + "\n", "")
