"""How long the bootstrap takes, and how many times as long arrays that are resampled and measured
one by one take in its place.

    python tests/perf/bootstrap.py [--resamples 1000] [--id 50000] [--ood 35640] [--methods 7]

The naive way draws each resample's images once, takes every method's scores of them and gives these
to metrics.py; it is measured on a twentieth of the resamples, before and after the other. Prints a
table and, last, one line of JSON.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from bench import options, peak_mb, seconds

from lhact.evaluation.metrics import auroc, fpr95
from lhact.evaluation.uncertainty import Bootstrap, resample

Scores = Sequence[Mapping[str, np.ndarray]]


def make_scores(id_images: int, ood_images: int, methods: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    share = ood_images * 10 // 36
    sizes = {"id": id_images, "a": share, "b": share, "c": share, "d": ood_images - 3 * share}
    return [
        {name: rng.normal(name == "id", 1, size).astype(np.float32) for name, size in sizes.items()}
        for _ in range(methods)
    ]


def naive(scores: Scores, resamples: int) -> list[list[tuple[float, float]]]:
    rng = np.random.default_rng(0)
    measured = []
    for _ in range(resamples):
        drawn = {name: rng.integers(len(v), size=len(v)) for name, v in scores[0].items()}
        for method in scores:
            taken = {name: values[drawn[name]] for name, values in method.items()}
            ood = [values for name, values in taken.items() if name != "id"]
            measured.append([(fpr95(taken["id"], v), auroc(taken["id"], v)) for v in ood])
    return measured


def main() -> None:
    args = options(__doc__, resamples=1000, id=50_000, ood=35_640, methods=7).parse_args()
    scores = make_scores(args.id, args.ood, args.methods)
    few = max(1, args.resamples // 20)
    before = seconds(lambda: naive(scores, few))
    start_memory = peak_mb()
    ours = seconds(lambda: resample(scores, Bootstrap(args.resamples)))
    memory = peak_mb() - start_memory
    after = seconds(lambda: naive(scores, few))
    slow = (before + after) / 2 * args.resamples / few
    images = f"{args.id:,} + {args.ood:,} images"
    print(f"{args.resamples:,} resamples of {images}, {args.methods} methods")
    print(f"bootstrap  {ours:8.1f} s, {memory} MB on top of the scores")
    print(f"naive      {slow:8.1f} s, {slow / ours:.1f} times as long")
    print(json.dumps({"seconds": ours, "naive_seconds": slow, "ratio": slow / ours}))


if __name__ == "__main__":
    main()
