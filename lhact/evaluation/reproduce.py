"""A cache and the published rows in, the setting of each method that comes closest to its row out.

Papers differ in settings that their text does not always give: Table 6 of the LHAct paper and
ReAct's own paper print different rows for ReAct on the same network and images.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lhact import published
from lhact.cache import Cache
from lhact.evaluation.metrics import auroc, fpr95
from lhact.evaluation.score import Progress, fit_methods, score
from lhact.methods.compose import BadMethod, Setting, variants

# Where each method's parameters are looked for; then around the best at half and a quarter of the
# first spacing.
AXES: dict[str, dict[str, Sequence[float]]] = {
    "react": {"high": [0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0]},
    "bfact": {"high": [0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0], "order": [1, 2, 3, 4]},
    "bats": {"lambda": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0]},
    "lhact": {"low": [0.0, 0.1, 0.2, 0.3], "high": [1.0, 1.2, 1.4, 1.6], "order": [1, 2, 3]},
}
REFINEMENTS = 2

# Parameter values of one setting; () for the default.
Point = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Measured:
    """One setting on the cache. values: dataset -> (FPR95, AUROC)."""

    parameters: Mapping[str, float]
    values: Mapping[str, tuple[float, float]]

    def differences(self, row: published.Row) -> dict[str, list[float]]:
        """dataset -> [FPR95, AUROC], ours minus published."""
        return {
            dataset: [ours - theirs for ours, theirs in zip(pair, row.values[dataset], strict=True)]
            for dataset, pair in self.values.items()
        }

    def distance(self, row: published.Row) -> float:
        """Root mean square of the differences of FPR95 and AUROC on all sets, in points."""
        points = [value for pair in self.differences(row).values() for value in pair]
        return math.sqrt(math.fsum(point * point for point in points) / len(points))


@dataclass(frozen=True)
class Closest:
    """For one published row, the setting that comes closest to it, and the default setting."""

    row: published.Row
    found: Measured
    default: Measured

    def to_json(self) -> dict[str, object]:
        return {
            "method": self.row.method,
            "source": self.row.source,
            "parameters": dict(self.found.parameters),
            "distance": self.found.distance(self.row),
            "differences": self.found.differences(self.row),
            "default": {
                "parameters": dict(self.default.parameters),
                "distance": self.default.distance(self.row),
            },
        }


def reproduce(
    cache: Cache,
    device: torch.device,
    with_constants: bool,
    progress: Progress = lambda rows: None,
) -> list[Closest]:
    """For each published row of the methods in AXES, the setting that comes closest to it.

    with_constants: whether the default setting takes the published constants. Only sets that are
    both in the cache and in the row count. Raises BadMethod if there are none.
    """
    datasets = [name for name in cache.ood if name in published.DATASETS]
    if not datasets:
        raise BadMethod(
            f"--reproduce needs OOD sets of the published rows ({', '.join(published.DATASETS)}); "
            "the cache has none"
        )

    def measure(name: str, points: Sequence[Point]) -> dict[Point, Measured]:
        methods = [
            variants([name], [Setting(name, *item) for item in point], [], with_constants)[0]
            for point in points
        ]
        fitted = fit_methods(cache, methods, device)
        scored = score(cache, fitted, device, progress, ["id", *datasets])
        return {
            point: Measured(
                part.fitted.parameters,
                {
                    name: (
                        fpr95(part.scores["id"], part.scores[name]),
                        auroc(part.scores["id"], part.scores[name]),
                    )
                    for name in datasets
                },
            )
            for point, part in zip(points, scored, strict=True)
        }

    report = []
    for name, axes in AXES.items():
        measured = measure(name, [(), *_grid(axes)])
        for row in (row for row in published.ROWS if row.method == name):
            for level in range(1, REFINEMENTS + 1):
                centre = _closest(measured, row).parameters
                around = {
                    key: _around(centre[key], values, 2**level) for key, values in axes.items()
                }
                points = [point for point in _grid(around) if point not in measured]
                measured |= measure(name, points)
            report.append(Closest(row, _closest(measured, row), measured[()]))
    return report


def _grid(axes: Mapping[str, Sequence[float]]) -> list[Point]:
    return [tuple(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _around(value: float, values: Sequence[float], divisor: int) -> list[float]:
    """`value` and its neighbours at a part of the axis' spacing; whole steps, as of a filter's
    order, are not divided."""
    if all(isinstance(v, int) for v in values):
        return [value]
    step = (values[1] - values[0]) / divisor
    return [max(0.0, value - step), value, value + step]


def _closest(measured: Mapping[Point, Measured], row: published.Row) -> Measured:
    return min(measured.values(), key=lambda found: found.distance(row))
