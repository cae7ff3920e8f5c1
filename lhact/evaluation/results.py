"""Scores in, the result that is reported out: metrics by method and set, published numbers beside
them where they may stand. Pure: no disk, no device."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lhact import published
from lhact.evaluation.metrics import METRICS, all_metrics, threshold95, tied_share
from lhact.evaluation.score import MethodScores
from lhact.methods.compose import BadMethod, parse
from lhact.methods.fit import FittedMethod
from lhact.published import Numbers
from lhact.records import Perturbation, SetInfo

AVERAGE = "average"
# Percent of the ID or of the OOD images with just the score of the threshold. Beyond it FPR95,
# which counts what lies strictly above, flatters: scores that are all equal get 0.00.
MOST_TIES = 1.0


@dataclass(frozen=True)
class About:
    """What was evaluated.

    info: of the ID set. findings: what speaks against a comparison with published numbers.
    comparable: whether the network and the image sets are those of the published numbers.
    perturbation: of the images that ODIN perturbed, where there are any. groups: names of averages
    over some of the OOD sets -> those sets. selected_on: where settings were chosen.
    """

    benchmark: str
    name: str
    info: SetInfo
    findings: tuple[str, ...] = ()
    comparable: bool = False
    perturbation: Perturbation | None = None
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    selected_on: str | None = None


@dataclass(frozen=True)
class Row:
    """One OOD set, or the mean over several. metrics: by name, in percent, not rounded. threshold:
    the score that keeps 95 % of ID. tied: percent of images with just that score; see MOST_TIES."""

    dataset: str
    images: int
    metrics: Mapping[str, float]
    threshold: float
    tied: float
    published: Numbers | None = None


@dataclass(frozen=True)
class MethodResult:
    """One method on every OOD set, then the averages; the last row is the mean over all sets."""

    method: str
    parameters: Mapping[str, float]
    rows: tuple[Row, ...]

    @property
    def average(self) -> Row:
        return self.rows[-1]

    @property
    def tied(self) -> bool:
        """Whether its FPR95 says little, since too many images score just the threshold."""
        return any(row.tied > MOST_TIES for row in self.rows)


@dataclass(frozen=True)
class Result:
    """What eval.py reports. baseline: plain energy, scored along where it was not asked for."""

    about: About
    methods: tuple[MethodResult, ...]
    baseline: MethodResult | None = None

    @property
    def all_methods(self) -> tuple[MethodResult, ...]:
        return (*self.methods, self.baseline) if self.baseline else self.methods

    def to_json(self) -> dict[str, object]:
        """The schema of `eval.py --format json`."""
        info = self.about.info
        return {
            "benchmark": self.about.benchmark,
            "name": self.about.name,
            "network": info.network.to_json(),
            "preprocessing": info.preprocessing.to_json(),
            "precision": info.precision,
            "id": {"images": info.images, "accuracy": info.accuracy},
            "findings": list(self.about.findings),
            "results": [row for method in self.methods for row in _json_rows(method)],
            "baseline": _json_rows(self.baseline) if self.baseline else [],
            "selected_on": self.about.selected_on,
        }


def _json_rows(result: MethodResult) -> list[dict[str, object]]:
    return [
        {
            "method": result.method,
            "parameters": dict(result.parameters),
            "dataset": row.dataset,
            "images": row.images,
            **row.metrics,
            "threshold": row.threshold,
            "published": row.published and vars(row.published),
        }
        for row in result.rows
    ]


def tied_at_threshold(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Percent of the ID images, beside the one that gives the threshold, or of the OOD images that
    score just the threshold; the larger of the two."""
    threshold = threshold95(id_scores)
    others = tied_share(id_scores, threshold) - 100 / len(id_scores)
    return max(others, tied_share(ood_scores, threshold))


def summarise(
    about: About, scored: Sequence[MethodScores], baseline: MethodScores | None = None
) -> Result:
    """The result of these scores of the ID set and the OOD sets.

    Published numbers stand beside those of the published network on the published sets with the
    published parameters, and are None elsewhere. Raises BadMethod for scores that are not finite.
    """
    return Result(
        about,
        tuple(_method_result(about, scores) for scores in scored),
        _method_result(about, baseline) if baseline else None,
    )


def _method_result(about: About, scored: MethodScores) -> MethodResult:
    fitted = scored.fitted
    id_scores = scored.scores["id"]
    sets = {name: values for name, values in scored.scores.items() if name != "id"}
    known = about.comparable and _as_published(fitted, about.perturbation)
    rows = {name: _row(fitted, id_scores, name, values, known) for name, values in sets.items()}
    averages = []
    for name, members in {**about.groups, AVERAGE: tuple(rows)}.items():
        present = [rows[member] for member in members if member in rows]
        if present:
            whole = known and name == AVERAGE and tuple(rows) == published.DATASETS
            averages.append(_average(name, present, fitted.name if whole else None))
    return MethodResult(fitted.name, fitted.parameters, (*rows.values(), *averages))


def _as_published(fitted: FittedMethod, perturbation: Perturbation | None) -> bool:
    if fitted.perturbed and perturbation != published.ODIN_PERTURBATION:
        return False
    return fitted.method == parse(fitted.name, published=True)


def _row(
    fitted: FittedMethod, id_scores: np.ndarray, dataset: str, scores: np.ndarray, known: bool
) -> Row:
    try:
        values = all_metrics(id_scores, scores)
    except ValueError as error:
        raise BadMethod(f"{fitted.name} on {dataset}: {error}") from error
    return Row(
        dataset,
        len(scores),
        values,
        float(threshold95(id_scores)),
        tied_at_threshold(id_scores, scores),
        published.lookup(fitted.name, dataset) if known else None,
    )


def _average(name: str, rows: Sequence[Row], method: str | None) -> Row:
    """The mean over the rows; with the published average of that method where one is named."""
    return Row(
        name,
        sum(row.images for row in rows),
        {key: math.fsum(row.metrics[key] for row in rows) / len(rows) for key in METRICS},
        rows[0].threshold,
        max(row.tied for row in rows),
        published.lookup(method, AVERAGE) if method else None,
    )
