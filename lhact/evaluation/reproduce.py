"""A cache and the published rows in, the setting of each method that comes closest to its row out.

Papers differ in settings that their text does not always give: Table 6 of the LHAct paper and ReAct's own paper print different
rows for ReAct on the same network and images.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lhact import published
from lhact.evaluation import metrics
from lhact.evaluation.score import Cache, score
from lhact.methods.compose import BadMethod, Setting, variants

# Where each method's parameters are looked for; then around the best at half and a quarter of the first spacing.
AXES: dict[str, dict[str, Sequence[float]]] = {
    "react": {"high": [0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0]},
    "bfact": {"high": [0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0], "order": [1, 2, 3, 4]},
    "bats": {"lambda": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0]},
    "lhact": {"low": [0.0, 0.1, 0.2, 0.3], "high": [1.0, 1.2, 1.4, 1.6], "order": [1, 2, 3]},
}
REFINEMENTS = 2

# Parameter values -> (all parameters of the method, dataset -> (FPR95, AUROC)).
Point = tuple[tuple[str, float], ...]
Measured = dict[Point, tuple[dict[str, Any], dict[str, tuple[float, float]]]]


def reproduce(
    opened: Cache, device: torch.device, with_constants: bool, progress: Callable[[int], None] = lambda rows: None
) -> list[dict[str, Any]]:
    """For each published row of the methods in AXES, the setting that comes closest to it on this cache.

    Returns for each row: `method`, `source`, `parameters`, `distance` (root mean square over the differences of FPR95 and AUROC on
    all sets, in points), `differences` (dataset -> [FPR95, AUROC], ours minus published), and `default` with the `parameters` and
    the `distance` of the default setting. with_constants: whether that takes the published constants. Only sets that are both in
    the cache and in the row count.

    Raises BadMethod if there are none.
    """
    datasets = [name for name in opened.ood if name in published.DATASETS]
    if not datasets:
        raise BadMethod(f"--reproduce needs OOD sets of the published rows ({', '.join(published.DATASETS)}); the cache has none")

    def measure(name: str, points: Sequence[Point]) -> Measured:
        methods = [variants([name], [Setting(name, *item) for item in point], [], with_constants)[0] for point in points]
        scored = score(opened, methods, device, progress=progress, datasets=["id", *datasets])
        return {
            point: (method.parameters(), {dataset: _pair(scores["id"], scores[dataset]) for dataset in datasets})
            for point, method, scores in zip(points, scored.methods, scored.scores, strict=True)
        }

    report = []
    for name, axes in AXES.items():
        measured = measure(name, [(), *_grid(axes)])
        for row in (row for row in published.ROWS if row.method == name and row.confirmed):
            for level in range(1, REFINEMENTS + 1):
                centre = measured[_closest(measured, row)][0]
                around = {key: _around(centre[key], values, 2**level) for key, values in axes.items()}
                measured |= measure(name, [point for point in _grid(around) if point not in measured])
            parameters, pairs = measured[_closest(measured, row)]
            default_parameters, default_pairs = measured[()]
            report.append(
                {
                    "method": name,
                    "source": row.source,
                    "parameters": parameters,
                    "distance": _distance(pairs, row),
                    "differences": _differences(pairs, row),
                    "default": {"parameters": default_parameters, "distance": _distance(default_pairs, row)},
                }
            )
    return report


def _pair(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[float, float]:
    return metrics.fpr95(id_scores, ood_scores), metrics.auroc(id_scores, ood_scores)


def _grid(axes: Mapping[str, Sequence[float]]) -> list[Point]:
    return [tuple(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _around(value: float, values: Sequence[float], divisor: int) -> list[float]:
    """`value` and its neighbours at a part of the axis' spacing; whole steps, as of a filter's order, are not divided."""
    if all(isinstance(v, int) for v in values):
        return [value]
    step = (values[1] - values[0]) / divisor
    return [max(0.0, value - step), value, value + step]


def _differences(pairs: Mapping[str, tuple[float, float]], row: published.Row) -> dict[str, list[float]]:
    return {dataset: [ours - theirs for ours, theirs in zip(pairs[dataset], row.values[dataset], strict=True)] for dataset in pairs}


def _distance(pairs: Mapping[str, tuple[float, float]], row: published.Row) -> float:
    points = [difference for pair in _differences(pairs, row).values() for difference in pair]
    return math.sqrt(math.fsum(point * point for point in points) / len(points))


def _closest(measured: Measured, row: published.Row) -> Point:
    return min(measured, key=lambda point: _distance(measured[point][1], row))
