"""Several methods' scores of the same images in, FPR95 and AUROC of each resample of these images
out: the percentile bootstrap.

Each resample draws as many images of every set as the set has, with replacement, and every method
is measured on the same draws. The difference of two methods is therefore paired: what an easy draw
does to both of them cancels. One draw of the ID images serves all OOD sets, so that an average over
sets varies as it does with another ID sample. (Efron & Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13.)

No resample is ever made: each score is sorted once, and a resample is how often each image is
drawn. The metrics then follow from cumulative counts, exactly as metrics.py defines them.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lhact.evaluation.score import Progress
from lhact.parallel import map_ordered

# What is resampled; the last axis but one of the draws of `resample`.
RESAMPLED = ("fpr95", "auroc")
LEVEL = 95
# With fewer resamples the ends of the interval rest on two or three of them.
FEWEST_RESAMPLES = 100
# Of a set with fewer images a resample is too coarse for an interval: one image is 5 points.
FEWEST_IMAGES = 20
# So that the memory does not grow with the settings of a sweep.
METHODS_AT_A_TIME = 16

Interval = tuple[float, float]


@dataclass(frozen=True)
class Bootstrap:
    """How many resamples, and the seed. Which images draw i takes of a set follows from the seed,
    i, the set's name and its number of images alone. Raises ValueError for too few resamples."""

    resamples: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < FEWEST_RESAMPLES:
            raise ValueError(
                f"a {LEVEL} % interval needs at least {FEWEST_RESAMPLES} resamples, got "
                f"{self.resamples}; 1000 are usual"
            )


@dataclass(frozen=True)
class Uncertainty:
    """How sure one row's FPR95 and AUROC are; the keys are those of RESAMPLED.

    intervals: metric -> the ends of its 95 % interval, in percent. differences: the metric minus
    that of the first method on the same set, in points. difference_intervals: the ends of the 95 %
    interval of that difference, paired. The latter two are empty for the first method itself.
    """

    intervals: Mapping[str, Interval]
    differences: Mapping[str, float]
    difference_intervals: Mapping[str, Interval]


def excludes_zero(interval: Interval) -> bool:
    return interval[0] > 0 or interval[1] < 0


def interval(draws: np.ndarray) -> Interval:
    """The percentile interval of (resamples,) values."""
    low, high = np.percentile(draws, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class _Places:
    """Where one method's scores lie among its ID scores. order: the ID images by score. ood:
    dataset -> for each OOD image, the number of ID scores below its own, and of those that are not
    above it."""

    order: np.ndarray
    ood: Mapping[str, tuple[np.ndarray, np.ndarray]]


def _places(scores: Mapping[str, np.ndarray]) -> _Places:
    order = np.argsort(scores["id"])
    ranked = scores["id"][order]
    ood = {name: values for name, values in scores.items() if name != "id"}
    return _Places(
        order,
        {
            n: (np.searchsorted(ranked, v), np.searchsorted(ranked, v, "right"))
            for n, v in ood.items()
        },
    )


def resample(
    scores: Sequence[Mapping[str, np.ndarray]],
    bootstrap: Bootstrap,
    progress: Progress = lambda resamples: None,
) -> list[dict[str, np.ndarray]]:
    """For each method, OOD set -> (2, resamples) float64: FPR95 and AUROC in percent.

    scores: for each method, dataset ("id" and the OOD sets) -> (images,) finite scores, row i of a
    dataset being the same image for all methods; higher = more in-distribution. progress: is told
    of the resamples done, once for every METHODS_AT_A_TIME methods. Raises ValueError for methods
    with other sets or numbers of images than the first.
    """
    sizes = {name: len(values) for name, values in scores[0].items()}
    for other in scores[1:]:
        if (got := {name: len(values) for name, values in other.items()}) != sizes:
            raise ValueError(f"all methods must have scores of the same images: {sizes}, got {got}")
    shape = (len(sizes) - 1, len(RESAMPLED), bootstrap.resamples)
    drawn = [np.empty(shape) for _ in scores]
    for start in range(0, len(scores), METHODS_AT_A_TIME):
        places = [_places(part) for part in scores[start : start + METHODS_AT_A_TIME]]

        def measure(draw: int, places: Sequence[_Places] = places) -> np.ndarray:
            counts = _counts(sizes, bootstrap.seed, draw)
            return np.array([_measure(place, counts) for place in places])

        draws = range(bootstrap.resamples)
        for draw, values in enumerate(map_ordered(measure, draws, torch.device("cpu"))):
            for number, measured in enumerate(values, start):
                drawn[number][:, :, draw] = measured
            progress(1)
    names = [name for name in sizes if name != "id"]
    return [dict(zip(names, values, strict=True)) for values in drawn]


def _counts(sizes: Mapping[str, int], seed: int, draw: int) -> dict[str, np.ndarray]:
    """dataset -> (images,) how often each image is drawn."""

    def counts(name: str, size: int) -> np.ndarray:
        generator = np.random.default_rng((seed, draw, zlib.crc32(ascii(name).encode())))
        return np.bincount(generator.integers(size, size=size), minlength=size)

    return {name: counts(name, size) for name, size in sizes.items()}


def _measure(places: _Places, counts: Mapping[str, np.ndarray]) -> list[tuple[float, float]]:
    """(FPR95, AUROC) in percent of one resample, for each OOD set."""
    images = len(places.order)
    # cumulative[i]: how many drawn ID images have one of the i lowest scores.
    cumulative = np.zeros(images + 1, np.int64)
    np.cumsum(counts["id"].take(places.order), out=cumulative[1:])
    # The place of the resample's threshold95 among the sorted scores.
    threshold = np.searchsorted(cumulative[1:], round(0.05 * images), "right")
    measured = []
    for name, (below, up_to) in places.ood.items():
        drawn = counts[name]
        pairs = images * len(drawn)
        # An OOD score is above the threshold where more ID scores than the threshold's place are
        # below it.
        passed = int(drawn @ (below > threshold))
        lower = int(drawn @ (cumulative.take(below) + cumulative.take(up_to)))
        measured.append((100 * (passed / len(drawn)), 100 * ((2 * pairs - lower) / (2 * pairs))))
    return measured
