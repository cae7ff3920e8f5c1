"""Whether a GPU gives the CPU's results, and how fast it extracts, in one run of under 8 minutes:
for the first GPU of its kind.

    python tests/perf/gpu.py [--device cuda] [--arch resnet50] [--crop 224] [--minutes 7.5]
                             [--precisions fp32 tf32 bf16 fp16] [--batch-size 64] [--workers N]
                             [--images FOLDER] [--count N]

correctness   every rectifier and score, fitted and scored on a made cache; the activations of every
              precision, and the pixels that ODIN moves, all against float32 on the CPU: one line
              each, PASS or FAIL.
speed         as `extraction.py` measures it, for every precision: the network against its replay as
              one CUDA graph, and extraction from files against the slower of loader and network.
              The target is 0.95 of either.

Prints these lines, a table in Markdown and, last, one line of JSON. Exit status 1 where a check
fails, and where there is no GPU that torch can use. A precision for which no time is left is named,
not measured. `--device cpu` tries the checks alone. Both scripts on the GPU, selection and
--reproduce are tested by `python -m pytest -m gpu`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import extraction
from bench import CPU, options
from helpers import write_cache

from lhact import cache
from lhact.devices import PRECISIONS, describe, gpu_arithmetic, pick_device, why_no_gpu
from lhact.evaluation import score
from lhact.extraction import extract
from lhact.methods.compose import parse_setting, variants
from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES
from lhact.records import Perturbation, Preprocessing

TARGET = 0.95
# Of scores and activations, as shares of the largest score and of the activations' root mean
# square: what another order of sums changes, and what numbers of 11 (tf32, fp16) and 8 bits (bf16)
# change in a network of fifty layers.
SCORE_TOLERANCE = 1e-4
TOLERANCES = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 3e-2, "fp16": 5e-3}
# Of ODIN's pixels, those moved in the same direction; others have a gradient that is as good as 0.
SAME_DIRECTION = {"fp32": 0.99, "tf32": 0.9, "bf16": 0.8, "fp16": 0.9}
ODIN = Perturbation(1000.0, 0.005)
COLUMNS = {
    "precision": "precision",
    "network_limit_per_s": "graph replay, images/s",
    "network_per_s": "network, images/s",
    "network_share_of_limit": "share",
    "loader_per_s": "loader, images/s",
    "whole_per_s": "extraction, images/s",
    "whole_share_of_slower": "share of the slower",
    "peak_gib": "peak GPU memory, GiB",
}


class Check(NamedTuple):
    name: str
    passed: bool
    detail: str


def check_methods(device: torch.device, folder: Path, names: Iterable[str]) -> list[Check]:
    """Each method's scores on the device against the CPU's."""
    opened = _made_cache(folder)
    settings = [parse_setting(text) for text in ("knn.k=20", "nnguide.bank=200")]
    checks = []
    for name in names:
        own = [setting for setting in settings if setting.target == name]
        asked = variants([name], own, [], published=False)
        try:
            here, there = (
                score.score(opened, score.fit_methods(opened, asked, place), place)[0].scores
                for place in (CPU, device)
            )
        except Exception as error:  # one method that fails must not hide the others
            checks.append(Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        worst = max(_largest_share(there[dataset], here[dataset]) for dataset in here)
        checks.append(Check(name, worst <= SCORE_TOLERANCE, f"scores differ by {worst:.1e}"))
    return checks


def _made_cache(folder: Path) -> cache.Cache:
    """A cache of 20 classes with centres of their own, as a ReLU leaves activations."""
    draw, channels, classes = np.random.default_rng(0), 96, 20
    centres = draw.exponential(0.5, (classes, channels))
    labels, sets = {}, {}
    for name, count in {"calibration": 700, "id": 300, "SUN": 150}.items():
        labels[name] = [row * classes // count for row in range(count)]
        centre = centres[labels[name]] if name != "SUN" else 0.3
        noise = draw.normal(0, 0.5, (count, channels))
        sets[name] = np.maximum(centre + noise, 0).astype(np.float32)
    head = draw.normal(0, 0.2, (classes, channels)), draw.normal(0, 0.1, classes)
    del labels["SUN"]
    write_cache(folder, sets, *head, labels=labels)
    perturbed = {name: rows for name, rows in sets.items() if name != "calibration"}
    odin = {"temperature": ODIN.temperature, "epsilon": ODIN.epsilon}
    write_cache(folder / cache.PERTURBED, perturbed, *head, labels=labels, odin=odin)
    return cache.open_cache(folder, ["SUN"])


def _largest_share(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def check_extraction(
    device: torch.device, arch: str, crop: int, precisions: Iterable[str]
) -> list[Check]:
    """Activations, and the pixels that ODIN moves, against float32 on the CPU."""
    shape = (8, crop, crop, 3)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    wanted, moved, _ = _computed(CPU, arch, crop, "fp32", pixels)
    checks = []
    for precision in precisions:
        found, directions, reason = _computed(device, arch, crop, precision, pixels)
        error = float((found - wanted).norm() / wanted.norm())
        detail = f"activations differ by {error:.1e}" + (f"; {reason}" if reason else "")
        checks.append(Check(f"{arch} {precision}", error <= TOLERANCES[precision], detail))
        same = float((directions == moved).double().mean())
        detail = f"{100 * same:.2f} % of the pixels are moved in the same direction"
        checks.append(Check(f"{arch} {precision} ODIN", same >= SAME_DIRECTION[precision], detail))
    return checks


def _computed(
    device: torch.device, arch: str, crop: int, precision: str, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, str | None]:
    """(activations, the sign by which ODIN moves each pixel, why the network is not faster)."""
    torch.manual_seed(0)
    _, network = extraction.random_network(arch, crop)
    preprocessing = Preprocessing(resize=crop, crop=crop)
    signs: list[torch.Tensor] = []

    def perturb(images: torch.Tensor) -> torch.Tensor:
        head = (network.weight.to(device), network.bias.to(device))
        moved = extract.odin_perturb(network.body, head, images, ODIN)
        signs.append((moved - images).sign().cpu())
        return moved

    with gpu_arithmetic(PRECISIONS[precision].tf32):
        forward, reason = extract.forward_on(device, network, preprocessing, precision)
        normalise = extract.normaliser(preprocessing, device)
        plain, odin = (
            extract.computation(forward, normalise, step, device, precision)
            for step in (None, perturb)
        )
        found = plain(pixels).cpu()
        odin(pixels)
    return found, signs[0], reason


def measure(
    args: argparse.Namespace, device: torch.device, left: Callable[[], float]
) -> list[dict[str, Any]]:
    """The figures of `extraction.network` for each precision, while as much time is left as the
    last one took."""
    runs: list[dict[str, Any]] = []
    with extraction.photographs(args) as listed:
        took = 0.0
        for precision in args.precisions:
            if took > left():
                print(f"SKIP {precision}: no time left; give it alone, by --precisions {precision}")
                continue
            began = time.monotonic()
            torch.cuda.reset_peak_memory_stats(device)
            with gpu_arithmetic(PRECISIONS[precision].tf32):
                figures: dict[str, Any] = extraction.network(args, device, precision, listed)
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            runs.append({**figures, "peak_gib": peak})
            took = time.monotonic() - began
    return runs


def check_speed(runs: Iterable[Mapping[str, Any]]) -> list[Check]:
    """Whether each share has reached TARGET."""
    shares = {
        "network_share_of_limit": "network against its graph",
        "whole_share_of_slower": "extraction against the slower of loader and network",
    }
    return [
        Check(f"{run['precision']} {what}", run[key] >= TARGET, f"{run[key]:.2f} of {TARGET}")
        for run in runs
        for key, what in shares.items()
    ]


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown, one row for each precision."""
    rows = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    for run in runs:
        values = (run[key] for key in COLUMNS)
        rows.append(
            [v if isinstance(v, str) else f"{v:,.0f}" if v >= 10 else f"{v:.2f}" for v in values]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def tell(checks: list[Check]) -> list[Check]:
    for name, passed, detail in checks:
        print(f"{'PASS' if passed else 'FAIL'} {name}: {detail}", flush=True)
    return checks


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    given = {"device": "cuda", "arch": "resnet50", "minutes": 7.5, "batch_size": 64}
    parser = options(__doc__, **given)
    add = parser.add_argument
    add("--crop", type=int, default=224, help="of the checks; speed is measured at 224")
    add("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    return extraction.parse_arguments(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    args = parse_arguments(argv)
    args.compile = False
    try:
        device = pick_device(args.device)
    except ValueError as error:
        reason = why_no_gpu()
        said = f"no GPU to check: {reason}" if reason else error
        print(f"gpu.py: {said}", file=sys.stderr)
        return 1
    extraction.complete(args, device)
    print(f"device: {describe(device)}, torch {torch.__version__}, {args.workers} workers")
    with tempfile.TemporaryDirectory() as place, gpu_arithmetic(tf32=False):
        checks = tell(check_methods(device, Path(place, "cache"), [*RECTIFIERS, *SCORES]))
    checks += tell(check_extraction(device, args.arch, args.crop, args.precisions))
    runs = []
    if device.type == "cuda":
        runs = measure(args, device, lambda: 60 * args.minutes - (time.monotonic() - began))
        checks += tell(check_speed(runs))
        print(table(runs))
    failed = [check.name for check in checks if not check.passed]
    print(json.dumps({"device": describe(device), "failed": failed, "runs": runs}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
