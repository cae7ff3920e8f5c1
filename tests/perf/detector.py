"""What a Detector costs over the plain forward pass of its network on this machine.

    python tests/perf/detector.py [--arch resnet50] [--batch-sizes 1 64] [--rounds 7]

Each figure is the median over rounds of (detector - network) / network, both timed in turn, on a
CPU; knn has 1,000 calibration images. The weights are random: the speed does not depend on them.
"""

import statistics
from functools import partial

import torch
from bench import options, seconds

from lhact import Detector
from lhact.extraction import networks


def main() -> None:
    parser = options(__doc__, arch="resnet50", rounds=7)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    args = parser.parse_args()
    network = networks.build(args.arch).eval()
    for method in ("lhact", "energy", "knn"):
        detector = Detector(network, method)
        detector.fit_features(torch.rand(1000, detector.head.in_features))
        for size in args.batch_sizes:
            images = torch.randn(size, 3, 224, 224)
            works = [partial(module, images) for module in (network, detector)]
            with torch.no_grad():
                rounds = args.rounds * (8 if size == 1 else 1)
                turns = [[seconds(work) for work in works] for _ in range(rounds + 1)][1:]
            overhead = statistics.median((ours - plain) / plain for plain, ours in turns)
            plain = statistics.median(plain for plain, _ in turns)
            print(f"{method:8} batch {size:3}: {100 * overhead:+.1f} % of {1000 * plain:.1f} ms")


if __name__ == "__main__":
    main()
