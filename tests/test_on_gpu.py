"""What runs on a GPU against the same on the CPU: on a simulated one, where also the places are
counted at which the program waits for the GPU, and on a real one where there is one."""

import json
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from helpers import ARCH
from simulated_gpu import EVENT, GPU, NUMBER, TO_CPU, TO_GPU, MixedDevices, Unordered, simulated_gpu

import eval as script
from lhact import cache, identify
from lhact.devices import PRECISIONS, device_line, gpu_arithmetic, pick_device
from lhact.evaluation import reproduce, score, select
from lhact.extraction import extract as extraction
from lhact.extraction import networks
from lhact.methods.calibrate import percentiles
from lhact.methods.compose import parse_setting, parse_sweep, variants
from lhact.methods.fit import FittedMethod
from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES
from lhact.records import Perturbation, Preprocessing

CPU = torch.device("cpu")
OOD = ["iNaturalist", "SUN", "Places", "Textures"]
# For so small a cache; what is not here keeps its default.
SETTINGS = ["knn.k=4", "vim.dim=4", "residual.dim=4", "nnguide.bank=20"]
# Rows at a time, so that every set takes several turns.
ROWS = 16
# Between a GPU and the CPU, as a share of the largest number: sums in another order.
TOLERANCE = 2e-5

no_cuda = "needs CUDA, and torch finds no GPU that it can use here"
real = pytest.param(
    "real",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=no_cuda)],
)


@pytest.fixture(params=["simulated", real])
def waits(request):
    """What is counted of a simulated GPU, which is there during the test; None on a real one."""
    if request.param == "real":
        with gpu_arithmetic(tf32=False):
            yield None
    else:
        with simulated_gpu() as counted:
            yield counted


@pytest.fixture
def opened(tmp_path, write_cache, small_sets, small_head, monkeypatch):
    labels = {name: [i % 5 for i in range(len(small_sets[name]))] for name in ("id", "calibration")}
    folder = tmp_path / "cache" / "imagenet" / "resnet50"
    write_cache(folder, small_sets, *small_head, labels=labels)
    perturbed = {name: rows for name, rows in small_sets.items() if name != "calibration"}
    odin = {"temperature": 1000.0, "epsilon": 0.005}
    write_cache(folder / "odin", perturbed, *small_head, labels=labels, odin=odin)
    monkeypatch.setattr(score, "GPU_ROWS", ROWS)
    return cache.open_cache(folder, OOD)


def methods(name: str, *sweeps: str):
    mine = [s for s in map(parse_setting, SETTINGS) if s.target in name.split("+")]
    return variants([name], mine, [parse_sweep(sweep) for sweep in sweeps], published=False)


def turns(images: int) -> int:
    return -(-images // ROWS)


def agree(found: np.ndarray, wanted: np.ndarray, share: float = TOLERANCE) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=share * np.abs(wanted).max())


def rereads_calibration(fitted: FittedMethod) -> bool:
    """Whether its score goes through the calibration images for every batch, as knn does."""
    constants = fitted.score.constants.values()
    return any(isinstance(c, Iterable) and not isinstance(c, torch.Tensor) for c in constants)


# The simulation itself


def test_the_simulation_refuses_a_mix_and_counts_waits():
    rows = torch.arange(6.0).view(2, 3)
    with simulated_gpu() as waits:
        assert pick_device("auto").type == "cuda"
        assert device_line("auto", GPU) == "device: a simulated GPU"
        there = rows.to(GPU)
        assert (there.device, (there * torch.tensor(2.0)).device) == (GPU, GPU)
        assert torch.zeros(2, device=GPU).device == GPU
        assert waits == {TO_GPU: 1}
        for mix in (lambda: there + rows, lambda: there @ rows.T, lambda: torch.cat([there, rows])):
            with pytest.raises(MixedDevices):
                mix()
        waits.clear()
        assert torch.equal((there @ there.T).cpu(), rows @ rows.T)
        assert bool(there.sum() > 1)
        assert float(there.max()) == 5
        assert there[0].tolist() == [0, 1, 2]
        assert there[there > 4].shape == (1,)
        assert there[:, torch.tensor([2])].shape == (2, 1)
        assert waits == {TO_CPU: 2, NUMBER: 2, "index": 1, TO_GPU: 1}
        with pytest.raises(RuntimeError):
            there.numpy()
        with torch.inference_mode():
            there[:, 1:].add_(1)
        side, main = torch.cuda.Stream(GPU), torch.cuda.current_stream(GPU)
        with torch.cuda.stream(side):
            copied = rows.to(GPU)
        for step in (lambda: main.wait_stream(side), lambda: copied.record_stream(main)):
            with pytest.raises(Unordered):
                copied.sum()
            step()
        assert float(copied.sum()) == 15
        assert there.cpu().tolist() == [[0, 2, 3], [3, 5, 6]]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch cannot use a GPU"):
            pick_device("cuda")


# Evaluation

NAMES = [*RECTIFIERS, *SCORES, *(f"scale+{name}" for name in SCORES)]
CLASSES = 5


@pytest.mark.parametrize("name", NAMES)
def test_every_method(name, opened, waits):
    on_cpu = score.score(opened, score.fit_methods(opened, methods(name), CPU), CPU)
    counted = Counter() if waits is None else waits
    counted.clear()
    fitted = score.fit_methods(opened, methods(name), GPU)
    in_fit = Counter(counted)
    counted.clear()
    on_gpu = score.score(opened, fitted, GPU)
    for found, wanted in zip(on_gpu, on_cpu, strict=True):
        assert found.fitted.parameters == pytest.approx(wanted.fitted.parameters)
        for dataset in ("id", *OOD):
            agree(found.scores[dataset], wanted.scores[dataset])
    if waits is None:
        return
    chunks = sum(turns(opened.sets[dataset].images) for dataset in ("id", *OOD))
    batches = turns(opened.calibration.images)
    copies = chunks * (1 + batches if rereads_calibration(fitted[0]) else 1)
    assert waits == {TO_GPU: copies, TO_CPU: chunks}, "each chunk is copied there, its scores back"
    # The labels and the head, then the calibration images in a few readings.
    assert in_fit.pop(TO_GPU) <= 3 + 5 * batches
    # klm takes up the classes one by one, whose numbers it reads.
    by_class = batches * (2 + CLASSES) if name.endswith("klm") else 0
    assert in_fit[TO_CPU] <= by_class
    assert in_fit.total() <= 4 + 3 * batches + by_class


def test_percentiles_are_counted_without_the_gpu(opened, waits):
    """Each is exact, so that both devices have the same."""
    if waits is not None:
        waits.clear()
    (fitted,) = score.fit_methods(opened, methods("react"), GPU)
    rows = np.load(opened.folder / "calibration.npy").astype(np.float64)
    assert fitted.parameters["high"] == pytest.approx(np.percentile(rows, 90), rel=1e-12)
    if waits is not None:
        # The labels, the weight, the bias, and one batch for a trial of the threshold.
        assert waits == {TO_GPU: 4}


def test_percentiles_of_activations_on_the_gpu(waits):
    rows = torch.randn(40, 7)
    wanted = percentiles(list(rows.split(9)), [0, 33.7, 95.5])
    assert percentiles(list(rows.to(GPU).split(9)), [0, 33.7, 95.5]) == wanted


def test_accuracy(opened, waits):
    weight, bias = (torch.from_numpy(part) for part in (opened.weight, opened.bias))
    wanted = identify.accuracy(opened.id, weight, bias)
    assert identify.accuracy(opened.id, weight.to(GPU), bias.to(GPU)) == wanted
    assert waits is None or waits[TO_CPU] == 1, "of one chunk"


@pytest.mark.parametrize("choice", ["SUN", "id"])
def test_selection(choice, opened, waits):
    asked = methods("lhact", "lhact.high_percentile=80,90,95", "lhact.order=1,2")
    selection = select.hold_out(opened, choice)
    chosen = {}
    for device in (CPU, GPU):
        fitted = score.fit_methods(opened, asked, device)
        (best,) = select.select(selection, fitted, device)
        chosen[device] = best.parameters
    assert chosen[GPU] == chosen[CPU]


def test_reproduce(opened, waits, monkeypatch):
    monkeypatch.setattr(reproduce, "AXES", {"react": {"high": [0.5, 1.0, 2.0]}})
    found = {device: reproduce.reproduce(opened, device, False) for device in (CPU, GPU)}
    for on_gpu, on_cpu in zip(found[GPU], found[CPU], strict=True):
        assert on_gpu.found.parameters == on_cpu.found.parameters
        distances = (part.found.distance(part.row) for part in (on_gpu, on_cpu))
        assert next(distances) == pytest.approx(next(distances), abs=1e-6)


def table(cache_dir, capsys, *arguments: str) -> list[dict]:
    options = ["--cache-dir", str(cache_dir), "--format", "json", "--methods", "all"]
    assert script.main([*options, *arguments]) == 0
    return json.loads(capsys.readouterr().out)["results"]


def test_eval(opened, waits, capsys):
    settings = [text for setting in SETTINGS for text in ("--set", setting)]
    cache_dir = opened.folder.parents[1]
    wanted = table(cache_dir, capsys, "--device", "cpu", *settings)
    found = table(cache_dir, capsys, "--device", "cuda", *settings)
    assert len(found) > 100
    for on_gpu, on_cpu in zip(found, wanted, strict=True):
        key = [(row["method"], row["dataset"]) for row in (on_gpu, on_cpu)]
        assert key[0] == key[1]
        # One of so few images may change its place among equals.
        assert on_gpu["auroc"] == pytest.approx(on_cpu["auroc"], abs=0.1)


# Extraction


@pytest.mark.slow
def test_get_activation(run, waits):
    """Every set of the benchmark, ODIN's images and noise."""
    options = ["--odin", "--gaussian", 3, "--batch-size", 2]
    assert run(*options) == 0
    on_cpu = {path: np.load(path) for path in run.folder.rglob("*.npy")}
    assert len(on_cpu) == 12
    assert run("--device", "cuda", "--name", "there", *options) == 0
    assert "device: cpu" not in run.err
    for path, wanted in on_cpu.items():
        found = np.load(run.caches / "imagenet" / "there" / path.relative_to(run.folder))
        # The gradient's sign turns where the gradient is as good as 0, and ODIN's pixel with it.
        agree(found, wanted, 0.05 if path.parent.name == "odin" else 1e-4)


class Ready:
    def __init__(self, images: int) -> None:
        shape = (images, 32, 32, 3)
        self.pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int):
        return self.pixels[row], bytes(16)


def extracted(checkpoint, device, precision, odin=False, waits=None) -> np.ndarray:
    """The activations of seven images in batches of three; `waits` counts from the first on."""
    preprocessing = Preprocessing(resize=32, crop=32)
    network = networks.load(networks.NetworkSpec(ARCH, checkpoint=checkpoint), 32)
    with gpu_arithmetic(PRECISIONS[precision].tf32):
        forward, reason = extraction.forward_on(device, network, preprocessing, precision)
        assert reason is None
        head = (network.weight.to(device), network.bias.to(device))

        def perturb(images):
            return extraction.odin_perturb(network.body, head, images, Perturbation(1000.0, 0.005))

        normalise = extraction.normaliser(preprocessing, device)
        change = perturb if odin else None
        compute = extraction.computation(forward, normalise, change, device, precision)
        if waits is not None:
            waits.clear()
        parts = extraction.extract(compute, Ready(7), extraction.batches(7, 3), device)
        return np.concatenate([activations for activations, _ in parts])


@pytest.mark.parametrize("odin", [False, True])
def test_extraction_waits_once_a_batch(odin, checkpoint, waits):
    """For the activations, one batch behind, by an event: neither images nor ODIN's gradient."""
    wanted = extracted(checkpoint, CPU, "fp32", odin)
    agree(extracted(checkpoint, GPU, "fp32", odin, waits), wanted, 0.05 if odin else 1e-4)
    assert waits is None or waits == {EVENT: len(extraction.batches(7, 3))}


def test_on_a_gpu_batch_norms_are_folded(checkpoint, waits):
    network = networks.load(networks.NetworkSpec(ARCH, checkpoint=checkpoint), 32)
    forward, reason = extraction.forward_on(GPU, network, Preprocessing(32, 32), "fp32")
    assert reason is None
    norms = [module for module in forward.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms == []
    for body in (forward, network.body):
        assert {parameter.device for parameter in body.parameters()} == {GPU}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=no_cuda)
@pytest.mark.parametrize(("precision", "share"), [("tf32", 0.02), ("bf16", 0.2), ("fp16", 0.02)])
def test_precisions(precision, share, checkpoint):
    """Near float32, and with other bits: the precision is used."""
    found = {kind: extracted(checkpoint, GPU, kind) for kind in ("fp32", precision)}
    agree(found[precision], found["fp32"], share)
    assert not np.array_equal(found[precision], found["fp32"])
