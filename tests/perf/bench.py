"""Functions in, medians of their times out; beside it the options, limits and reports that the
scripts in this folder share."""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from lhact.evaluation.product import head_product
from lhact.parallel import map_ordered

ROOT = Path(__file__).parents[2]
ROUNDS = 5
MAXRSS_PER_MB = 1024 if sys.platform == "linux" else 1 << 20
CPU = torch.device("cpu")
Work = Callable[[], object]


def options(description: str | None, **defaults: object) -> argparse.ArgumentParser:
    """A parser with an option for each default, of its type."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser


def seconds(work: Work, device: torch.device = CPU) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def medians(*works: Work, device: torch.device = CPU) -> list[float]:
    """Seconds of each, in turn, so that a drift of the machine's speed meets all alike; after one
    turn that does not count."""
    turns = [[seconds(work, device) for work in works] for _ in range(ROUNDS + 1)]
    return [statistics.median(times) for times in zip(*turns[1:], strict=True)]


def packed_products(weight: torch.Tensor, pieces: Iterable[torch.Tensor]) -> Work:
    """The product of each piece with the weight, which oneDNN packs once; one thread for each
    core."""
    product = head_product(weight, torch.rand(len(weight)), 512)

    def run() -> None:
        for _ in map_ordered(product, pieces, CPU):
            pass

    return run


def peak_mb() -> int:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // MAXRSS_PER_MB


def report(figures: Mapping[str, object], *runs: Mapping[str, object]) -> None:
    """Prints a table and, last, one line of JSON. runs: further figures, under `runs`."""
    for group in (figures, *runs):
        for name, value in group.items():
            print(
                f"{name:>32}  {value:.3f}" if isinstance(value, float) else f"{name:>32}  {value}"
            )
    print(json.dumps({**figures, "runs": runs} if runs else figures))
