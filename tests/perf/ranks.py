"""How much faster several processes are than one on the same CPUs, and how many activations they can exchange.

    python tests/perf/ranks.py [--ranks 2] [--images 256] [--arch resnet18] [--batch-size 32]

Starts get_activation.py alone and under torchrun, one thread each, on images of noise in a temporary folder, and times the ID set
from its first image to its last row. A share of 1.0 would be as many times the speed of one process as there are processes; it
takes as many cores, and nobody else at work on them. Then the ranks exchange batches of 64 x 2048 that cost nothing to compute:
more than that the first rank cannot take in. Prints a table and, last, one line of JSON.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

import get_activation
from lhact.extraction.ranks import collect, join, share, together

ROUNDS = 3
EXCHANGED = (400, 64, 2048)  # batches, rows, channels


def make(place: Path, count: int, arch: str) -> None:
    draw = np.random.default_rng(0)
    for name, images in (("id", count), ("few", 1)):
        (place / name).mkdir()
        for number in range(images):
            Image.fromarray(draw.integers(0, 256, (375, 500, 3), dtype=np.uint8)).save(
                place / name / f"{number:05}.jpg"
            )
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(arch, weights=None).state_dict(), place / "network.pth")


def extraction(place: Path, arguments: list[str]) -> float:
    """Images per second that get_activation.py's main takes in for the ID set."""
    seconds = []

    def timed(*parts: object) -> None:
        start = time.perf_counter()
        collect(*parts)
        seconds.append(time.perf_counter() - start)

    get_activation.collect = timed
    data = [
        "--id-dir",
        place / "id",
        "--ood",
        f"few={place / 'few'}",
        "--checkpoint",
        place / "network.pth",
        "--device",
        "cpu",
    ]
    remarks = io.StringIO()
    with contextlib.redirect_stderr(remarks):
        status = get_activation.main(
            [*map(str, data), "--cache-dir", str(place / "cache"), "--overwrite", *arguments]
        )
    assert status == 0, remarks.getvalue()
    return len(list((place / "id").iterdir())) / seconds[0]


def exchange() -> float:
    """Images per second whose activations the first rank receives, one image a row."""
    count, rows, channels = EXCHANGED
    batch = np.ones((rows, channels), np.float32)
    taken = []
    with join(False, str) as ranks:
        together(ranks, lambda: None)
        start = time.perf_counter()
        own = (batch for _ in share(ranks, range(count)))
        collect(
            ranks,
            own,
            [rows] * count,
            channels,
            torch.device("cpu"),
            lambda part: taken.append(part[0, 0]),
        )
        return count * rows / (time.perf_counter() - start)


def start(ranks: int, arguments: list[str]) -> float:
    """What the first of so many processes has measured."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    command = [sys.executable, *launch, __file__, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--measure", help=argparse.SUPPRESS
    )  # what to measure in this process: "exchange", or on which folder
    args = parser.parse_args()
    passed = ["--arch", args.arch, "--batch-size", str(args.batch_size)]
    if args.measure:
        figure = (
            exchange()
            if args.measure == "exchange"
            else extraction(Path(args.measure), [*passed, "--workers", "0"])
        )
        if os.environ.get("RANK", "0") == "0":
            print(figure)
        return
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), args.images, args.arch)
        runs = [
            [start(ranks, ["--measure", place, *passed]) for ranks in (1, args.ranks)]
            for _ in range(ROUNDS)
        ]
    alone, many = (max(run[i] for run in runs) for i in (0, 1))
    figures = {
        "images": args.images,
        "ranks": args.ranks,
        "one_images_per_s": alone,
        "ranks_images_per_s": many,
        "share_of_ranks_times_one": many / alone / args.ranks,
        "exchange_images_per_s": start(args.ranks, ["--measure", "exchange"]),
    }
    figures = {name: round(value, 3) for name, value in figures.items()}
    for name, value in figures.items():
        print(f"{name:>26}  {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
