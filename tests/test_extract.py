"""lhact.extraction.extract against NumPy and gradients worked out by hand in float64."""

import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lhact.devices import PRECISIONS
from lhact.extraction import extract as extraction
from lhact.extraction import networks
from lhact.extraction.extract import (
    ExtractionFailed,
    Item,
    UnreadableImage,
    batches,
    fused_normaliser,
    normaliser,
    one_behind,
    worker_ended,
)
from lhact.extraction.fuse import fuse
from lhact.extraction.networks import NetworkSpec
from lhact.records import Perturbation, Preprocessing

CPU = torch.device("cpu")
MEAN, STD = (0.1, 0.4, 0.7), (0.2, 0.5, 0.9)


def normalise(pixels: Tensor) -> Tensor:
    return normaliser(Preprocessing(mean=MEAN, std=STD), CPU)(pixels)


def extract(body, pixels, rows, workers=0, precision="fp32", perturb=None) -> Iterator[np.ndarray]:
    """The activations alone; the digests must be those of the rows."""
    compute = extraction.computation(body, normalise, perturb, CPU, precision)
    found = extraction.extract(compute, pixels, rows, CPU, workers)
    for batch, (activations, digests) in zip(rows, found, strict=True):
        assert digests.tolist() == [[row] * 16 for row in batch]
        yield activations


def odin_perturb(body, head, images, temperature, epsilon) -> Tensor:
    return extraction.odin_perturb(body, head, images, Perturbation(temperature, epsilon))


class Numbered:
    """Item i: a 2 x 2 image and a digest that say i; the lower the number, the longer it takes."""

    def __init__(self, count: int, delay: float = 0.0) -> None:
        self.count, self.delay = count, delay

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Item:
        time.sleep(self.delay * (self.count - row))
        return np.full((2, 2, 3), [row, 2 * row, 255 - row], np.uint8), bytes([row] * 16)


class Broken(Numbered):
    def __getitem__(self, row: int) -> Item:
        return "photographs/7.jpg cannot be read" if row == 7 else super().__getitem__(row)


class Body(nn.Module):
    """The function of (n, 3, h, w) as a network's body; else the mean of each channel, (n, 3)."""

    def __init__(self, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.function = function or (lambda x: x.mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def run(pixels, batch_size=4, workers=0, body=None, precision="fp32", perturb=None) -> np.ndarray:
    body = (body or Body()).to(memory_format=torch.channels_last)
    if precision == "fp32":
        body, _ = fuse(body, (extraction.IMAGES_PER_THREAD, 3, 2, 2))
    rows = batches(len(pixels), batch_size)
    return np.concatenate(list(extract(body, pixels, rows, workers, precision, perturb)))


def means(*rows: int) -> np.ndarray:
    """What `Body()` gives for those images of `Numbered`."""
    values = np.array([[row, 2 * row, 255 - row] for row in rows]) / 255
    return (values - MEAN) / STD


# ---- input ----


def test_normalise_by_scalar_loops():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    before = torch.from_numpy(pixels.copy())
    found = normalise(before)
    assert found.shape == (2, 3, 3, 4)
    assert found.dtype == torch.float32
    assert torch.equal(before, torch.from_numpy(pixels))
    for n, c, y, x in np.ndindex(2, 3, 3, 4):
        wanted = (int(pixels[n, y, x, c]) / 255 - MEAN[c]) / STD[c]
        assert math.isclose(found[n, c, y, x].item(), wanted, rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("images", "size", "start", "wanted"),
    [
        (7, 3, 0, [[0, 1, 2], [3, 4, 5], [6]]),
        (6, 3, 0, [[0, 1, 2], [3, 4, 5]]),
        (7, 3, 3, [[3, 4, 5], [6]]),
        (7, 3, 7, []),
        (2, 64, 0, [[0, 1]]),
        (3, 1, 1, [[1], [2]]),
    ],
)
def test_batches(images, size, start, wanted):
    assert [list(rows) for rows in batches(images, size, start)] == wanted


# ---- order ----


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_row_i_is_image_i(workers, batch_size):
    found = run(Numbered(11, delay=0.002 if workers else 0), batch_size, workers)
    np.testing.assert_allclose(found, means(*range(11)), rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32


def test_only_the_rows_asked_for_in_the_order_asked_for():
    found = list(extract(Body(), Numbered(9), [[5, 6], [8]]))
    assert [batch.shape for batch in found] == [(2, 3), (1, 3)]
    np.testing.assert_allclose(np.concatenate(found), means(5, 6, 8), rtol=1e-5, atol=1e-6)
    assert list(extract(Body(), Numbered(9), [])) == []


def test_on_a_gpu_a_batch_is_handed_out_once_the_next_one_is_in_work():
    asked = []
    late = one_behind(asked.append(i) or i for i in range(3))
    assert [(item, list(asked)) for item in late] == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])]
    assert list(one_behind(iter([]))) == []


# ---- what goes wrong ----


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named(workers):
    with pytest.raises(UnreadableImage, match=r"^photographs/7\.jpg cannot be read$"):
        run(Broken(12), 4, workers)


class Deadly(Numbered):
    """Its fourth image takes the worker process with it, as a machine short of memory does."""

    def __getitem__(self, row: int) -> Item:
        if row == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(row)


def test_a_worker_process_that_is_killed_is_told_of():
    with pytest.raises(RuntimeError) as ended:
        run(Deadly(9), 2, workers=2)
    assert "a worker process that reads images ended (DataLoader" in worker_ended(ended.value)


def raises(error: Exception) -> Body:
    def fail(_: Tensor) -> Tensor:
        raise error

    return Body(fail)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_says_to_take_a_smaller_batch(error):
    with pytest.raises(
        ExtractionFailed,
        match="cpu has too little memory for this batch; give a smaller --batch-size",
    ):
        run(Numbered(3), body=raises(error), precision="bf16")


def test_a_bug_in_the_network_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(Numbered(3), body=raises(RuntimeError("shapes do not match")))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(factor):
    with pytest.raises(
        ExtractionFailed,
        match="gives NaN or infinite activations; give --precision fp32 or other weights",
    ):
        run(Numbered(3), body=Body(lambda x: x.mean(dim=(2, 3)) * factor))


# ---- ODIN ----

T, EPSILON = 1000.0, 0.005


def by_hand(
    a: np.ndarray, w: np.ndarray, b: np.ndarray, x: np.ndarray, temperature: float, epsilon: float
) -> tuple:
    """ODIN for the body z = relu(A x), one image, in float64: the cross-entropy's gradient is A'
    diag(z > 0) W' (p - y) / T."""
    z = a @ x
    logits = (w @ np.maximum(z, 0) + b) / temperature
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    y = np.zeros(len(b))
    y[logits.argmax()] = 1
    gradient = a.T @ ((z > 0) * (w.T @ ((p - y) / temperature)))
    return x - epsilon * np.sign(gradient), gradient


@pytest.fixture
def linear() -> SimpleNamespace:
    """A body relu(A x), a head and inputs x, as float64 arrays and as what ODIN takes."""
    rng = np.random.default_rng(3)
    a, w = rng.normal(size=(6, 12)), 0.1 * rng.normal(size=(4, 6))
    b, xs = rng.normal(size=4), rng.normal(size=(5, 12))
    return SimpleNamespace(
        arrays=(a, w, b),
        xs=xs,
        body=Body(lambda x: (x.flatten(1) @ torch.from_numpy(a).float().T).relu()),
        head=(torch.from_numpy(w).float(), torch.from_numpy(b).float()),
        inputs=torch.from_numpy(xs).float().view(5, 3, 2, 2),
    )


@pytest.mark.parametrize(("temperature", "epsilon"), [(T, EPSILON), (1.0, 0.1), (10.0, 0.0)])
def test_odin_by_hand(linear, temperature, epsilon):
    """Of each image as if it were alone."""
    found = odin_perturb(linear.body, linear.head, linear.inputs, temperature, epsilon)
    assert found.shape == linear.inputs.shape
    for x, moved in zip(linear.xs, found, strict=True):
        wanted, gradient = by_hand(*linear.arrays, x, temperature, epsilon)
        assert np.abs(gradient * temperature).min() > 1e-4  # every sign is certain
        np.testing.assert_allclose(moved.flatten().numpy(), wanted, rtol=0, atol=1e-6)


def test_odin_through_a_convolution_against_finite_differences():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = torch.randn(5, 4), torch.randn(5)
    inputs = torch.randn(2, 3, 5, 5)
    moved = (odin_perturb(body, head, inputs, T, EPSILON) - inputs) / -EPSILON
    body, weight, bias = body.double(), *(part.double() for part in head)
    for image, signs in zip(inputs.double(), moved, strict=True):

        def confidences(x: Tensor) -> Tensor:
            return ((body(x[None]) @ weight.T + bias)[0] / T).log_softmax(dim=0)

        with torch.no_grad():
            predicted = int(confidences(image).argmax())
            steps = 1e-3 * torch.eye(75, dtype=torch.float64).view(75, 3, 5, 5)
            slopes = [
                float((confidences(image - step) - confidences(image + step))[predicted]) / 2e-3
                for step in steps
            ]
        for slope, sign in zip(slopes, signs.flatten().tolist(), strict=True):
            assert abs(slope) <= 1e-8 or math.isclose(sign, math.copysign(1, slope), abs_tol=1e-3)


def test_odin_does_not_touch_its_inputs_or_need_the_weights_gradient(linear):
    before = linear.inputs.clone()
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 6)).requires_grad_(False)
    with torch.no_grad():
        found = odin_perturb(body, linear.head, linear.inputs, T, EPSILON)
    assert torch.equal(linear.inputs, before)
    assert not linear.inputs.requires_grad
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in body.parameters())


@pytest.mark.parametrize("workers", [0, 1])
def test_extract_with_odin_gives_the_activations_of_the_moved_images(linear, workers):
    perturb = functools.partial(
        odin_perturb, linear.body, linear.head, temperature=T, epsilon=EPSILON
    )
    found = run(Numbered(7), 3, workers, linear.body, perturb=perturb)
    for row, channels in enumerate(means(*range(7))):
        moved, _ = by_hand(*linear.arrays, np.repeat(channels, 4), T, EPSILON)
        wanted = np.maximum(linear.arrays[0] @ moved, 0)
        np.testing.assert_allclose(found[row], wanted, rtol=1e-4, atol=1e-5)


# ---- settings ----


def settings() -> tuple:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        (cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
    )


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("pixels", [Numbered(5), Broken(12)], ids=["whole", "broken"])
def test_extraction_leaves_the_settings_as_they_were(pixels, count, threads):
    threads(count)
    before = settings()
    try:
        run(pixels, 2, precision="bf16")
    except UnreadableImage:
        assert isinstance(pixels, Broken)
    assert settings() == before


def test_an_image_keeps_the_same_company_whatever_the_threads(threads):
    """How many images come with it may change the last bits of a sum."""
    company = Body(lambda x: x.new_full((len(x), 3), len(x)))
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run(Numbered(50), 37, body=company).tobytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("odin", [False, True])
def test_half_precision_is_handed_out_in_single(odin):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    head = (torch.randn(2, 3), torch.zeros(2))
    perturb = functools.partial(odin_perturb, body, head, temperature=T, epsilon=EPSILON)
    perturb = perturb if odin else None
    full = run(Numbered(5), body=body, perturb=perturb)
    half = run(Numbered(5), body=body, perturb=perturb, precision="bf16")
    assert half.dtype == np.float32
    assert not np.array_equal(half, full)
    np.testing.assert_array_equal(half, torch.from_numpy(half).bfloat16().float())
    np.testing.assert_allclose(half, full, rtol=0.02, atol=0.02)


def test_normalising_in_one_operation_is_the_same_to_a_rounding():
    """As a GPU does it, here on the CPU: 5e-7 off at the most, in channels-last order."""
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    found = fused_normaliser(mean, std)(pixels)
    torch.testing.assert_close(found, normalise(pixels), rtol=0, atol=5e-7)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_bf16_does_not_compute_in_float32(tmp_path):
    """A network of convolutions, which on a CPU is fused for float32 alone."""
    torch.manual_seed(0)
    path = tmp_path / "ten.pth"
    torch.save(networks.build("resnet10", classes=3).state_dict(), path)
    preprocessing = Preprocessing(resize=32, crop=32)
    x = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    found = {}
    for precision in ("fp32", "bf16"):
        network = networks.load(NetworkSpec("resnet10", checkpoint=path), 32)
        forward, _ = extraction.forward_on(CPU, network, preprocessing, precision)
        compute = extraction.computation(
            forward, normaliser(preprocessing, CPU), None, CPU, precision
        )
        found[precision] = compute(x)
        kinds = {type(m): m.weight.dtype for m in forward.modules() if isinstance(m, nn.Conv2d)}
        assert kinds == ({} if precision == "fp32" else {nn.Conv2d: torch.bfloat16})
        assert {value.dtype for value in network.body.parameters()} == {torch.float32}
    difference = (found["fp32"] - found["bf16"]).abs().max() / found["fp32"].abs().max()
    assert 1e-3 < difference < 0.1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_odin_moves_every_pixel_in_half_precision(precision):
    """The gradient of a confident prediction over a temperature of 1000 underflows fp16, whose
    smallest number is 6e-8; the head stays in float32."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).float()
    head = (torch.randn(5, 8) * 1e-3, torch.zeros(5))
    images = torch.randn(6, 3, 2, 2)
    with torch.autocast("cpu", dtype=PRECISIONS[precision].autocast):
        moved = odin_perturb(body, head, images, T, EPSILON)
    exact = odin_perturb(body, head, images, T, EPSILON)
    assert (moved != images).all()
    assert ((moved - images).sign() == (exact - images).sign()).double().mean() > 0.9
