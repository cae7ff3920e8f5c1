"""lhact.extraction.extract against torchvision's own pipeline, NumPy and gradients worked out by
hand in float64."""

import copy
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ARCH
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.models import ShuffleNet_V2_X0_5_Weights

from lhact.devices import PRECISIONS
from lhact.extraction import extract as extraction
from lhact.extraction import networks
from lhact.extraction.extract import (
    ExtractionFailed,
    UnreadableImage,
    batches,
    fused_normaliser,
    normaliser,
    one_behind,
    worker_ended,
)
from lhact.extraction.fuse import fuse
from lhact.extraction.networks import NetworkSpec
from lhact.extraction.sources import open_folder
from lhact.records import Perturbation, Preprocessing

CPU = torch.device("cpu")
MEAN, STD = (0.1, 0.4, 0.7), (0.2, 0.5, 0.9)


class Digested:
    """A dataset of arrays or messages as one of Items: an array comes with its digest."""

    def __init__(self, pixels) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int):
        item = self.pixels[row]
        return (item, bytes(15) + bytes([row % 256])) if isinstance(item, np.ndarray) else item


def normalise(pixels: Tensor, mean, std) -> Tensor:
    return normaliser(Preprocessing(mean=tuple(mean), std=tuple(std)), CPU)(pixels)


def extract(
    forward, pixels, rows, mean, std, device=CPU, workers=0, precision="fp32", perturb=None
) -> Iterator[np.ndarray]:
    """The activations alone; the digests must be those of the rows."""
    preprocessing = Preprocessing(mean=tuple(mean), std=tuple(std))
    compute = extraction.computation(
        forward, normaliser(preprocessing, device), perturb, device, precision
    )
    whole = pixels if hasattr(pixels, "reader") else Digested(pixels)
    found = extraction.extract(compute, whole, rows, device, workers)
    for batch, (activations, digests) in zip(rows, found, strict=True):
        assert digests.shape == (len(batch), 16)
        if isinstance(whole, Digested):
            assert digests[:, -1].tolist() == [row % 256 for row in batch]
        yield activations


def odin_perturb(body, weight, bias, images, temperature, epsilon) -> Tensor:
    perturbation = Perturbation(temperature, epsilon)
    return extraction.odin_perturb(body, (weight, bias), images, perturbation)


class Numbered:
    """Item i: a 2 x 2 image that says i in all its channels; the lower the number, the longer it
    takes."""

    def __init__(self, count: int, delay: float = 0.0) -> None:
        self.count, self.delay = count, delay

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> np.ndarray:
        time.sleep(self.delay * (self.count - row))
        return np.full((2, 2, 3), [row, 2 * row, 255 - row], np.uint8)


class Broken(Numbered):
    def __getitem__(self, row: int) -> np.ndarray | str:
        return (
            "photographs/7.jpg cannot be read as an image: truncated"
            if row == 7
            else super().__getitem__(row)
        )


class Deadly(Numbered):
    """Its third image takes the worker process with it, as a machine short of memory does."""

    def __getitem__(self, row: int) -> np.ndarray:
        if row == 3 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(row)


class Pool(nn.Module):
    """(n, 3, h, w) -> (n, 3)"""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def run(
    pixels, batch_size: int = 4, workers: int = 0, body: nn.Module | None = None, **settings
) -> np.ndarray:
    rows = batches(len(pixels), batch_size)
    body = (body or Pool()).to(memory_format=torch.channels_last)
    precision = settings.get("precision", "fp32")
    if precision == "fp32":
        side = pixels[0][0].shape[0] if isinstance(pixels[0], tuple) else pixels[0].shape[0]
        body, _ = fuse(body, (extraction.IMAGES_PER_THREAD, 3, side, side))
    return np.concatenate(list(extract(body, pixels, rows, MEAN, STD, CPU, workers, **settings)))


# ---- input ----


def test_normalise_by_scalar_loops():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    before = torch.from_numpy(pixels.copy())
    found = normalise(before, MEAN, STD)
    assert found.shape == (2, 3, 3, 4)
    assert found.dtype == torch.float32
    assert torch.equal(before, torch.from_numpy(pixels))
    for n in range(2):
        for c in range(3):
            for y in range(3):
                for x in range(4):
                    wanted = (int(pixels[n, y, x, c]) / 255 - MEAN[c]) / STD[c]
                    assert math.isclose(
                        found[n, c, y, x].item(), wanted, rel_tol=1e-5, abs_tol=1e-6
                    )


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
    count = 11
    found = run(Numbered(count, delay=0.002 if workers else 0), batch_size, workers)
    values = np.array([[row, 2 * row, 255 - row] for row in range(count)]) / 255
    np.testing.assert_allclose(found, (values - MEAN) / STD, rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32


def test_only_the_rows_asked_for_in_the_order_asked_for():
    found = list(extract(Pool(), Numbered(9), [[5, 6], [8]], (0, 0, 0), (1, 1, 1), CPU))
    assert [batch.shape for batch in found] == [(2, 3), (1, 3)]
    np.testing.assert_allclose(np.concatenate(found)[:, 0] * 255, [5, 6, 8], rtol=1e-5)


def test_no_rows_no_batches():
    assert list(extract(Pool(), Numbered(9), [], MEAN, STD, CPU)) == []


def test_batch_size_and_workers_do_not_change_the_activations(
    network, checkpoint, write_images, tmp_path
):
    write_images(tmp_path, [f"{i}.jpg" for i in range(5)])
    loaded = networks.load(NetworkSpec(ARCH, checkpoint=checkpoint))
    pixels = open_folder(tmp_path).pixels(Preprocessing(64, 64))
    reference = run(pixels, 1, body=loaded.body)
    for batch_size, workers in [(2, 0), (5, 0), (64, 2)]:
        np.testing.assert_allclose(
            run(pixels, batch_size, workers, loaded.body), reference, rtol=1e-5, atol=1e-5
        )
    np.testing.assert_array_equal(run(pixels, 2, 0, loaded.body), run(pixels, 2, 2, loaded.body))


def test_on_a_gpu_a_batch_is_handed_out_once_the_next_one_is_in_work():
    asked = []
    late = one_behind(asked.append(i) or i for i in range(3))
    assert [(item, list(asked)) for item in late] == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])]
    assert list(one_behind(iter([]))) == []


# ---- the whole way against torchvision's ----


def test_extraction_is_torchvisions_pipeline_and_forward(
    network, checkpoint, write_images, tmp_path
):
    write_images(tmp_path, ["b/2.jpg", "a/1.png", "a-b/3.JPEG", "a/0.jpg"])
    (tmp_path / "a" / "9.png").write_bytes((tmp_path / "a" / "1.png").read_bytes())
    theirs = ImageFolder(
        str(tmp_path), transform=ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.transforms()
    )
    order = sorted(
        range(len(theirs)),
        key=lambda i: Path(theirs.samples[i][0]).relative_to(tmp_path).as_posix(),
    )
    exact, seen = copy.deepcopy(network).double(), []
    exact.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        logits = exact(torch.stack([theirs[i][0] for i in order]).double())

    loaded = networks.load(NetworkSpec(ARCH, checkpoint=checkpoint))
    preprocessing = Preprocessing()
    listed = open_folder(tmp_path)
    pixels = listed.pixels(preprocessing)
    forward, reason = extraction.forward_on(CPU, loaded, preprocessing, "fp32")
    assert reason is None
    rows = extract(forward, pixels, batches(5, 2), preprocessing.mean, preprocessing.std, CPU, 1)
    found = np.concatenate(list(rows))
    assert list(listed.paths) == ["a-b/3.JPEG", "a/0.jpg", "a/1.png", "a/9.png", "b/2.jpg"]
    found_logits = torch.from_numpy(found) @ loaded.weight.T + loaded.bias
    # Of the largest: a network of random weights blows up what float32 rounds, torchvision's own
    # forward by 2e-5 in places.
    for ours, wanted in ((torch.from_numpy(found), seen[0]), (found_logits, logits)):
        torch.testing.assert_close(
            ours.double(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item()
        )
    assert np.abs(found[0] - found[1]).max() > 0.1, (
        "images that look alike to the network prove nothing"
    )


# ---- what goes wrong ----


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named(workers):
    with pytest.raises(
        UnreadableImage, match=r"^photographs/7\.jpg cannot be read as an image: truncated$"
    ):
        run(Broken(12), 4, workers)


def test_rows_before_an_unreadable_image_are_the_right_ones():
    rows = []
    with pytest.raises(UnreadableImage):
        rows.extend(extract(Pool(), Broken(12), batches(12, 2), (0, 0, 0), (1, 1, 1), CPU))
    np.testing.assert_allclose(
        [batch[0, 0] * 255 for batch in rows], [0, 2, 4][: len(rows)], rtol=1e-5
    )


def test_a_worker_process_that_is_killed_is_reported():
    with pytest.raises(RuntimeError) as ended:
        run(Deadly(9), 2, 2)
    assert "a worker process that reads images ended (DataLoader" in worker_ended(ended.value)


class Raises(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


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
        run(Numbered(3), body=Raises(error), precision="bf16")


def test_a_bug_in_the_network_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(Numbered(3), body=Raises(RuntimeError("shapes do not match")))


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) * self.factor


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(factor):
    with pytest.raises(
        ExtractionFailed,
        match="gives NaN or infinite activations; give --precision fp32 or other weights",
    ):
        run(Numbered(3), body=Times(factor))


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


class Linear(nn.Module):
    def __init__(self, a: np.ndarray) -> None:
        super().__init__()
        self.a = torch.from_numpy(a).float()

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.a.T).relu()


@pytest.fixture
def linear() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(3)
    return (
        rng.normal(size=(6, 12)),
        0.1 * rng.normal(size=(4, 6)),
        rng.normal(size=4),
        rng.normal(size=(5, 12)),
    )


@pytest.mark.parametrize(("temperature", "epsilon"), [(T, EPSILON), (1.0, 0.1), (10.0, 0.0)])
def test_odin_by_hand(linear, temperature, epsilon):
    a, w, b, xs = linear
    inputs = torch.from_numpy(xs).float().view(5, 3, 2, 2)
    weight, bias = torch.from_numpy(w).float(), torch.from_numpy(b).float()
    found = odin_perturb(Linear(a), weight, bias, inputs, temperature, epsilon)
    assert found.shape == inputs.shape
    for i in range(5):
        wanted, gradient = by_hand(a, w, b, xs[i], temperature, epsilon)
        assert np.abs(gradient * temperature).min() > 1e-4  # every sign is certain
        np.testing.assert_allclose(found[i].flatten().numpy(), wanted, rtol=0, atol=1e-6)


def test_odin_raises_the_confidence(linear):
    a, w, b, xs = linear
    inputs = torch.from_numpy(xs).float().view(5, 3, 2, 2)
    weight, bias = torch.from_numpy(w).float(), torch.from_numpy(b).float()

    def confidence(x: Tensor) -> Tensor:
        return (Linear(a)(x) @ weight.T + bias).softmax(dim=1).amax(dim=1)

    assert (
        confidence(odin_perturb(Linear(a), weight, bias, inputs, 1.0, 1e-3)) > confidence(inputs)
    ).all()


def test_odin_through_a_convolution_against_finite_differences():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    weight, bias = torch.randn(5, 4), torch.randn(5)
    inputs = torch.randn(2, 3, 5, 5)
    found = odin_perturb(body, weight, bias, inputs, T, EPSILON)
    exact = body.double()
    moved = (found - inputs).double() / -EPSILON
    for n in range(2):
        image = inputs[n : n + 1].double()
        with torch.no_grad():
            predicted = int((exact(image) @ weight.double().T + bias.double()).argmax())
            for place in range(image.numel()):
                step = torch.zeros_like(image).view(-1)
                step[place] = 1e-3
                step = step.view_as(image)
                loss = [
                    -((exact(image + sign * step) @ weight.double().T + bias.double()) / T)
                    .log_softmax(dim=1)[0, predicted]
                    .item()
                    for sign in (1, -1)
                ]
                slope = (loss[0] - loss[1]) / 2e-3
                if abs(slope) > 1e-8:
                    assert math.isclose(
                        moved[n].flatten()[place].item(), math.copysign(1, slope), abs_tol=1e-3
                    )


def test_odin_does_not_touch_its_inputs_or_need_the_weights_gradient(linear):
    _, w, b, xs = linear
    inputs = torch.from_numpy(xs).float().view(5, 3, 2, 2)
    before = inputs.clone()
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 6)).requires_grad_(False)
    with torch.no_grad():
        found = odin_perturb(
            body, torch.from_numpy(w).float(), torch.from_numpy(b).float(), inputs, T, EPSILON
        )
    assert torch.equal(inputs, before)
    assert not inputs.requires_grad
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in body.parameters())


def test_odin_of_a_batch_is_odin_of_each(linear):
    a, w, b, xs = linear
    inputs = torch.from_numpy(xs).float().view(5, 3, 2, 2)
    head = torch.from_numpy(w).float(), torch.from_numpy(b).float()
    together = odin_perturb(Linear(a), *head, inputs, T, EPSILON)
    for i in range(5):
        torch.testing.assert_close(
            odin_perturb(Linear(a), *head, inputs[i : i + 1], T, EPSILON)[0], together[i]
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_extract_with_odin_gives_the_activations_of_the_moved_images(linear, workers):
    a, w, b, _ = linear
    head = torch.from_numpy(w).float(), torch.from_numpy(b).float()
    perturb = functools.partial(odin_perturb, Linear(a), *head, temperature=T, epsilon=EPSILON)
    found = run(Numbered(7), 3, workers, Linear(a), perturb=perturb)
    for row in range(7):
        channels = (np.array([row, 2 * row, 255 - row]) / 255 - MEAN) / STD
        moved, _ = by_hand(a, w, b, np.repeat(channels, 4), T, EPSILON)
        np.testing.assert_allclose(found[row], np.maximum(a @ moved, 0), rtol=1e-4, atol=1e-5)


# ---- settings ----


def settings() -> tuple:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        (cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark),
        (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
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


def test_threads_do_not_change_a_byte(checkpoint, write_images, tmp_path, threads):
    write_images(tmp_path, [f"{i}.jpg" for i in range(19)])
    body = networks.load(NetworkSpec(ARCH, checkpoint=checkpoint)).body
    pixels = open_folder(tmp_path).pixels(Preprocessing(40, 40))
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run(pixels, 19, body=body).tobytes())
    assert found[0] == found[1] == found[2]


class Company(nn.Module):
    """Gives each image the number of images that came with it, which may change the last bits of a
    sum."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((len(x), 3), len(x))


def test_an_image_keeps_the_same_company_whatever_the_threads(threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run(Numbered(50), 37, body=Company()).tobytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("odin", [False, True])
def test_half_precision_is_handed_out_in_single(odin):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    head = (torch.randn(2, 3), torch.zeros(2))
    perturb = (
        functools.partial(odin_perturb, body, *head, temperature=T, epsilon=EPSILON)
        if odin
        else None
    )
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
    torch.testing.assert_close(found, normalise(pixels, MEAN, STD), rtol=0, atol=5e-7)
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
    perturbation = Perturbation(1000.0, 0.005)
    kind = PRECISIONS[precision].autocast
    with torch.autocast("cpu", dtype=kind):
        moved = extraction.odin_perturb(body, head, images, perturbation)
    exact = extraction.odin_perturb(body, head, images, perturbation)
    assert (moved != images).all()
    assert ((moved - images).sign() == (exact - images).sign()).double().mean() > 0.9
