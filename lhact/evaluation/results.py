"""Scores in, the result that is reported out: metrics by method and set, published numbers beside
them where they may stand. Pure: no disk, no device."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from lhact import published
from lhact.evaluation.metrics import METRICS, all_metrics, threshold95, tied_share
from lhact.evaluation.score import MethodScores, Progress
from lhact.evaluation.uncertainty import (
    FEWEST_IMAGES,
    RESAMPLED,
    Bootstrap,
    Interval,
    Uncertainty,
    interval,
    resample,
)
from lhact.methods.compose import BadMethod, parse
from lhact.methods.fit import FittedMethod
from lhact.published import Numbers
from lhact.records import Perturbation, SetInfo

AVERAGE = "average"
STD = "std"
# Percent of the ID or of the OOD images with just the score of the threshold. Beyond it FPR95,
# which counts what lies strictly above, flatters: scores that are all equal get 0.00.
MOST_TIES = 1.0


@dataclass(frozen=True)
class About:
    """What was evaluated.

    info: of the ID set. findings: what speaks against a comparison with published numbers.
    comparable: whether the network and the image sets are those of the published numbers.
    perturbation: of the images that ODIN perturbed, where there are any. groups: names of averages
    over some of the OOD sets -> those sets. selected_on: where settings were chosen. over: of a
    mean or a standard deviation over several names, these names.
    """

    benchmark: str
    name: str
    info: SetInfo
    findings: tuple[str, ...] = ()
    comparable: bool = False
    perturbation: Perturbation | None = None
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    selected_on: str | None = None
    over: tuple[str, ...] = ()

    @property
    def origin(self) -> dict[str, str | None]:
        """What tells the rows of several results apart."""
        network = self.info.network
        return {
            "benchmark": self.benchmark,
            "name": self.name,
            "network": network.arch,
            "weights": network.weights or network.checkpoint,
        }


@dataclass(frozen=True)
class Row:
    """One OOD set, or the mean over several. metrics: by name, in percent, not rounded. threshold:
    the score that keeps 95 % of ID. tied: percent of images with just that score; see MOST_TIES.
    uncertainty: None without a bootstrap, and where a set is too small for one."""

    dataset: str
    images: int
    metrics: Mapping[str, float]
    threshold: float
    tied: float
    published: Numbers | None = None
    uncertainty: Uncertainty | None = None


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
    """What eval.py reports. baseline: plain energy, scored along where it was not asked for.
    bootstrap: whose intervals the rows carry."""

    about: About
    methods: tuple[MethodResult, ...]
    baseline: MethodResult | None = None
    bootstrap: Bootstrap | None = None

    @property
    def all_methods(self) -> tuple[MethodResult, ...]:
        return (*self.methods, self.baseline) if self.baseline else self.methods

    @property
    def too_small(self) -> list[str]:
        """Where a bootstrap was asked for, the sets that are too small for an interval."""
        averages = {*self.about.groups, AVERAGE}
        rows = [row for row in self.methods[0].rows if row.dataset not in averages]
        sizes = {"ID": self.about.info.images, **{row.dataset: row.images for row in rows}}
        small = [name for name, images in sizes.items() if images < FEWEST_IMAGES]
        return small if self.bootstrap else []

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
            "results": [row for method in self.methods for row in _json_rows(self, method)],
            "baseline": _json_rows(self, self.baseline) if self.baseline else [],
            "selected_on": self.about.selected_on,
            **({"bootstrap": vars(self.bootstrap)} if self.bootstrap else {}),
            **({"over": list(self.about.over)} if self.about.over else {}),
        }


def _json_rows(result: Result, method: MethodResult) -> list[dict[str, object]]:
    return [
        {
            "method": method.method,
            "parameters": dict(method.parameters),
            "dataset": row.dataset,
            "images": row.images,
            **row.metrics,
            "threshold": row.threshold,
            "published": row.published and vars(row.published),
            **result.about.origin,
            **(uncertainty_fields(row) if result.bootstrap else {}),
        }
        for row in method.rows
    ]


def uncertainty_fields(row: Row) -> dict[str, float | Interval | None]:
    """The row's intervals and differences under their names in JSON; None where there are none."""
    sure = row.uncertainty or Uncertainty({}, {}, {})
    return {
        key: value
        for metric in RESAMPLED
        for key, value in (
            (f"{metric}_ci", sure.intervals.get(metric)),
            (f"{metric}_difference", sure.differences.get(metric)),
            (f"{metric}_difference_ci", sure.difference_intervals.get(metric)),
        )
    }


def not_comparable(finding: str) -> str:
    """A finding of identify.py as a reader sees it."""
    return f"not comparable with the published numbers: {finding}"


def tied_at_threshold(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Percent of the ID images, beside the one that gives the threshold, or of the OOD images that
    score just the threshold; the larger of the two."""
    threshold = threshold95(id_scores)
    others = tied_share(id_scores, threshold) - 100 / len(id_scores)
    return max(others, tied_share(ood_scores, threshold))


def summarise(
    about: About,
    scored: Sequence[MethodScores],
    baseline: MethodScores | None = None,
    bootstrap: Bootstrap | None = None,
    progress: Progress = lambda resamples: None,
) -> Result:
    """The result of these scores of the ID set and the OOD sets.

    Published numbers stand beside those of the published network on the published sets with the
    published parameters, and are None elsewhere. bootstrap: gives every row its intervals, and the
    difference from the first method. progress: is told of the resamples done. Raises BadMethod for
    scores that are not finite.
    """
    every = [*scored, *([baseline] if baseline else [])]
    methods = [_method_result(about, scores) for scores in every]
    if bootstrap:
        methods = _with_uncertainty(about, methods, every, bootstrap, progress)
    count = len(scored)
    return Result(about, tuple(methods[:count]), methods[count] if baseline else None, bootstrap)


def _with_uncertainty(
    about: About,
    methods: Sequence[MethodResult],
    scored: Sequence[MethodScores],
    bootstrap: Bootstrap,
    progress: Progress,
) -> list[MethodResult]:
    """The methods with an Uncertainty in each row, but for the sets with fewer than FEWEST_IMAGES
    images and the averages over these; nowhere where the ID set has fewer."""
    sizes = {name: len(values) for name, values in scored[0].scores.items()}
    sets = [name for name in sizes if name != "id"]
    members = {
        row: names
        for row, names in {**{name: (name,) for name in sets}, **_averages(about, sets)}.items()
        if min(sizes[name] for name in ("id", *names)) >= FEWEST_IMAGES
    }
    if not members:
        return list(methods)
    draws = [
        {row: np.mean([by_set[name] for name in names], axis=0) for row, names in members.items()}
        for by_set in resample([part.scores for part in scored], bootstrap, progress)
    ]

    def uncertainty(number: int, row: Row, reference: Row) -> Uncertainty | None:
        if row.dataset not in members:
            return None
        ours, first = draws[number][row.dataset], draws[0][row.dataset]
        intervals = dict(zip(RESAMPLED, map(interval, ours), strict=True))
        if number == 0:
            return Uncertainty(intervals, {}, {})
        return Uncertainty(
            intervals,
            {name: row.metrics[name] - reference.metrics[name] for name in RESAMPLED},
            dict(zip(RESAMPLED, map(interval, ours - first), strict=True)),
        )

    compared = [zip(method.rows, methods[0].rows, strict=True) for method in methods]
    rows = [
        tuple(replace(row, uncertainty=uncertainty(number, row, first)) for row, first in pairs)
        for number, pairs in enumerate(compared)
    ]
    return [replace(method, rows=part) for method, part in zip(methods, rows, strict=True)]


def _averages(about: About, sets: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Name of each average -> which of the sets it is over; the last is over all."""
    groups = {**about.groups, AVERAGE: tuple(sets)}
    present = {name: tuple(m for m in members if m in sets) for name, members in groups.items()}
    return {name: members for name, members in present.items() if members}


def _method_result(about: About, scored: MethodScores) -> MethodResult:
    fitted = scored.fitted
    id_scores = scored.scores["id"]
    sets = {name: values for name, values in scored.scores.items() if name != "id"}
    known = about.comparable and _as_published(fitted, about.perturbation)
    rows = {name: _row(fitted, id_scores, name, values, known) for name, values in sets.items()}
    averages = []
    for name, members in _averages(about, tuple(rows)).items():
        whole = known and name == AVERAGE and tuple(rows) == published.DATASETS
        over = [rows[member] for member in members]
        averages.append(_average(name, over, fitted.name if whole else None))
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


def mean_and_deviation(results: Sequence[Result]) -> list[Result]:
    """Two results, named "mean" and STD: over the names of these, for every method and set, the
    mean and the standard deviation with n - 1 in its denominator. They keep what all have alike,
    of the parameters and of the network. Raises BadMethod where names differ in methods or sets.
    """
    first = results[0]
    shapes = [[(m.method, [r.dataset for r in m.rows]) for m in r.all_methods] for r in results]
    for result, shape in zip(results, shapes, strict=True):
        if shape != shapes[0]:
            raise BadMethod(
                f"a mean over names needs the same methods and sets under all of them; "
                f"{first.about.name} and {result.about.name} differ"
            )
    networks = [asdict(result.about.info.network) for result in results]
    counts = {key: networks[0][key] for key in ("classes", "channels")}
    alike = {**dict.fromkeys(networks[0]), **_alike(networks), **counts}
    network = replace(first.about.info.network, **alike)
    known = [r.about.info.accuracy for r in results if r.about.info.accuracy is not None]
    found = []
    for name, statistic in (("mean", statistics.fmean), (STD, statistics.stdev)):
        accuracy = statistic(known) if len(known) == len(results) else None
        about = About(
            first.about.benchmark,
            name,
            replace(first.about.info, network=network, accuracy=accuracy),
            groups=first.about.groups,
            selected_on=first.about.selected_on,
            over=tuple(result.about.name for result in results),
        )
        methods = [
            _over_names(group, statistic)
            for group in zip(*(result.all_methods for result in results), strict=True)
        ]
        count = len(first.methods)
        found.append(
            Result(about, tuple(methods[:count]), methods[count] if first.baseline else None)
        )
    return found


def _over_names(
    group: Sequence[MethodResult], statistic: Callable[[Sequence[float]], float]
) -> MethodResult:
    """One method under several names -> the statistic of each number."""
    parameters = _alike([method.parameters for method in group])
    rows = [
        Row(
            same[0].dataset,
            same[0].images,
            {key: statistic([row.metrics[key] for row in same]) for key in METRICS},
            statistic([row.threshold for row in same]),
            max(row.tied for row in same),
        )
        for same in zip(*(method.rows for method in group), strict=True)
    ]
    return MethodResult(group[0].method, parameters, tuple(rows))


def _alike(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those items that all have."""
    first, *others = values
    return {k: v for k, v in first.items() if all(k in o and o[k] == v for o in others)}
