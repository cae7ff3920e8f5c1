"""What a Detector costs over the plain forward pass of its network on this machine.

    python tests/perf/detector.py [--arch resnet50] [--batch-sizes 1 64] [--rounds 7]

Each figure is the median over rounds of (detector - network) / network, both timed in turn, on a
CPU; knn has 1,000 calibration images. The weights are random: the speed does not depend on them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lhact import Detector
from lhact.extraction import networks


def seconds(module: torch.nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        module(images)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    network = networks.build(args.arch).eval()
    for method in ("lhact", "energy", "knn"):
        detector = Detector(network, method)
        detector.fit_features(torch.rand(1000, detector.head.in_features))
        for size in args.batch_sizes:
            images = torch.randn(size, 3, 224, 224)
            turns = [
                (seconds(network, images), seconds(detector, images))
                for _ in range(args.rounds * (8 if size == 1 else 1) + 1)
            ][1:]
            overhead = statistics.median((ours - plain) / plain for plain, ours in turns)
            plain = statistics.median(plain for plain, _ in turns)
            print(f"{method:8} batch {size:3}: {100 * overhead:+.1f} % of {1000 * plain:.1f} ms")


if __name__ == "__main__":
    main()
