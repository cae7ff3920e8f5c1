"""Results in, what stands in a table about them out: headings, lines of numbers, and notes, for
every format alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lhact.evaluation.results import AVERAGE, STD, MethodResult, Result, not_comparable
from lhact.evaluation.uncertainty import (
    FEWEST_IMAGES,
    LEVEL,
    RESAMPLED,
    Interval,
    Uncertainty,
    excludes_zero,
)
from lhact.messages import shown

TITLES = {
    "fpr95": "FPR95",
    "auroc": "AUROC",
    "aupr_id": "AUPR (ID positive)",
    "aupr_ood": "AUPR (OOD positive)",
    "fpr95_ood_positive": "FPR95 (OOD positive)",
}
LOWER_IS_BETTER = ("fpr95", "fpr95_ood_positive")
# Published numbers exist for these, with ID as the positive class; beside any other metric they
# would be taken for it.
COMPARABLE = ("fpr95", "auroc")
DECIMALS = 2
MARK = "†"


@dataclass(frozen=True)
class View:
    """What of the results a table shows. metrics: names of METRICS. decimals: of every number;
    None: as many as the interval of a column allows, DECIMALS at most."""

    metrics: Sequence[str]
    decimals: int | None = DECIMALS


@dataclass(frozen=True)
class Value:
    """One number of a table. best: whether no other method has a better one in that column."""

    number: float
    decimals: int
    signed: bool = False
    interval: Interval | None = None
    best: bool = False

    def show(self, number: float) -> str:
        return f"{number:{'+' if self.signed else ''}.{self.decimals}f}"

    @property
    def text(self) -> str:
        return self.show(self.number)

    @property
    def marked(self) -> bool:
        """Whether it is a difference whose interval excludes 0."""
        return self.signed and self.interval is not None and excludes_zero(self.interval)


# For each column the values of the chosen metrics; None where one is not known.
Cells = Sequence[Sequence[Value | None]]


@dataclass(frozen=True)
class Line:
    """One row of a table. indented: it belongs to the method above it."""

    label: str
    cells: Cells
    indented: bool = False

    @property
    def has_intervals(self) -> bool:
        return any(value.interval for cell in self.cells for value in cell if value)


def labels(result: Result) -> list[str]:
    """A label for each method: its name, with the parameters that vary where one method appears
    with several settings."""
    found = []
    for method in result.all_methods:
        others = [other for other in result.all_methods if other.method == method.method]
        varying = [
            key
            for key, value in method.parameters.items()
            if any(other.parameters.get(key) != value for other in others)
        ]
        # A percentile says what was asked for; its threshold stands below the table.
        varying = [key for key in varying if f"{key}_percentile" not in varying]
        given = "".join(f" {key}={method.parameters[key]!r}" for key in varying)
        found.append(method.method + given)
    return found


def _best(result: Result) -> list[MethodResult]:
    """Of each method that appears with several settings, the one with the lowest average FPR95.
    Settings whose scores are constant, or nearly so, do not count."""
    settings: dict[str, list[MethodResult]] = {}
    for method in result.all_methods:
        settings.setdefault(method.method, []).append(method)
    contested = [[m for m in group if not m.tied] for group in settings.values() if len(group) > 1]
    return [min(group, key=lambda m: m.average.metrics["fpr95"]) for group in contested if group]


def columns(results: Sequence[Result]) -> list[str]:
    """The sets of all results, then the averages."""
    averages = {AVERAGE, *(name for result in results for name in result.about.groups)}
    rows = [row.dataset for result in results for row in result.methods[0].rows]
    return sorted(dict.fromkeys(rows), key=lambda name: (name in averages, name == AVERAGE))


def set_sizes(results: Sequence[Result]) -> dict[str, int | None]:
    """OOD set -> its number of images; None where that differs from result to result."""
    sizes: dict[str, int | None] = {}
    for result in results:
        averages = {AVERAGE, *result.about.groups}
        for row in result.methods[0].rows:
            if row.dataset not in averages:
                same = sizes.get(row.dataset, row.images) == row.images
                sizes[row.dataset] = row.images if same else None
    return sizes


def blocks(results: Sequence[Result], view: View) -> list[tuple[str, Line]]:
    """(name, line) of all results one after the other, with a cell for each of `columns`."""
    found = []
    for result in results:
        own = [row.dataset for row in result.methods[0].rows]
        for line in lines(result, view):
            cells = dict(zip(own, line.cells, strict=True))
            unknown = [None] * len(view.metrics)
            aligned = [cells.get(name, unknown) for name in columns(results)]
            found.append((result.about.name, replace(line, cells=aligned)))
    return found


def lines(result: Result, view: View) -> list[Line]:
    """Under each method stand the published numbers and the difference from them, where all chosen
    metrics have them, and after a bootstrap the difference from the first method."""
    found = []
    starred = [] if result.about.over else _best(result)
    decimals = _decimals(result, view)
    best = _best_shown(result, view, decimals)
    names = labels(result)
    comparable = set(view.metrics) <= set(COMPARABLE)
    for label, method in zip(names, result.all_methods, strict=True):
        own, published, from_published, from_first = [], [], [], []
        for row, places, top in zip(method.rows, decimals, best, strict=True):
            theirs = vars(row.published) if row.published and comparable else {}
            sure = row.uncertainty or Uncertainty({}, {}, {})
            values = []
            for metric, digits, shown_best in zip(view.metrics, places, top, strict=True):
                value = Value(row.metrics[metric], digits, interval=sure.intervals.get(metric))
                is_best = not method.tied and value.text == shown_best
                values.append(replace(value, best=is_best))
            own.append(values)
            chosen = list(zip(view.metrics, places, strict=True))
            published.append([Value(theirs[m], DECIMALS) if theirs else None for m, _ in chosen])
            from_published.append(
                [
                    Value(row.metrics[m] - theirs[m], digits, signed=True) if theirs else None
                    for m, digits in chosen
                ]
            )
            from_first.append(
                [
                    Value(sure.differences[m], digits, True, sure.difference_intervals[m])
                    if m in sure.differences
                    else None
                    for m, digits in chosen
                ]
            )
        found.append(Line(f"{label} *" if method in starred else label, own))
        below = {
            "published": published,
            "difference": from_published,
            f"minus {names[0]}": from_first,
        }
        for name, cells in below.items():
            if any(value for cell in cells for value in cell):
                found.append(Line(name, cells, indented=True))
    return found


def _decimals(result: Result, view: View) -> list[list[int]]:
    """For each column and metric the number of decimals: those of the view, or else as many as
    leave the last digit no smaller than a tenth of the half-width of the column's narrowest
    interval; DECIMALS where a metric has no intervals, none where a set is too small for one."""

    def places(column: int, metric: str) -> int:
        if view.decimals is not None:
            return view.decimals
        rows = [method.rows[column] for method in result.all_methods]
        if metric not in RESAMPLED or result.about.over:
            return DECIMALS
        if rows[0].uncertainty is None:
            return 0
        ends = [row.uncertainty.intervals[metric] for row in rows if row.uncertainty]
        # An interval of no width is as wide as one image counts.
        widths = [(high - low) / 2 or 100 / rows[0].images for low, high in ends]
        return min(DECIMALS, max(0, math.ceil(-math.log10(min(widths)))))

    return [
        [places(i, metric) for metric in view.metrics] for i in range(len(result.methods[0].rows))
    ]


def _best_shown(
    result: Result, view: View, decimals: Sequence[Sequence[int]]
) -> list[list[str | None]]:
    """For each column and metric the best number as it is shown: two that look the same are both
    the best. None where there is but one method; tied methods do not count."""
    contenders = [method for method in result.all_methods if not method.tied]
    if len(result.all_methods) < 2 or not contenders or result.about.name == STD:
        return [[None] * len(view.metrics) for _ in decimals]
    found = []
    for column, places in enumerate(decimals):
        best: list[str | None] = []
        for metric, digits in zip(view.metrics, places, strict=True):
            numbers = [method.rows[column].metrics[metric] for method in contenders]
            best.append(
                Value(min(numbers) if metric in LOWER_IS_BETTER else max(numbers), digits).text
            )
        found.append(best)
    return found


def heading(results: Sequence[Result], view: View) -> list[str]:
    conventions = {
        "fpr95": "; FPR95 keeps 95 % of ID",
        "fpr95_ood_positive": "; FPR95 (OOD positive) catches 95 % of OOD",
    }
    texts = [
        *_of_each(results, lambda result: [_origin(result)]),
        f"{' / '.join(TITLES[metric] for metric in view.metrics)} in %; a higher score means ID"
        + "".join(text for metric, text in conventions.items() if metric in view.metrics),
        *_of_each(results, warnings),
    ]
    return [shown(text) for text in texts]


def _of_each(results: Sequence[Result], texts: Callable[[Result], Sequence[str]]) -> list[str]:
    """The texts about each result; with its name in front where there are several."""
    return [
        f"{result.about.name}: {text}" if len(results) > 1 else text
        for result in results
        for text in texts(result)
    ]


def _origin(result: Result) -> str:
    about, info = result.about, result.about.info
    if about.over:
        return f"over {', '.join(about.over)}" + "; n - 1" * (about.name == STD)
    network = info.network
    weights = network.weights or network.checkpoint or "unknown weights"
    top1 = "top-1 unknown (no labels)" if info.accuracy is None else f"top-1 {info.accuracy:.2f} %"
    return (
        f"{about.benchmark}, {network.arch or 'unknown network'} {weights}, {info.precision}; "
        f"ID: {info.images:,} images, {top1}"
    )


def warnings(result: Result) -> list[str]:
    """The findings, as they stand above a table."""
    return [not_comparable(finding) for finding in result.about.findings]


def remarks(result: Result) -> list[str]:
    """What a reader must know of methods whose scores are tied, one line each, and of sets that are
    too small for an interval."""
    found = [
        f"{label}: {max(row.tied for row in method.rows):.0f} % of the images of a set score just "
        "the threshold, and FPR95 counts strictly above it: its FPR95 is too low, see its AUROC"
        for label, method in zip(labels(result), result.all_methods, strict=True)
        if method.tied
    ]
    if result.too_small:
        found.append(
            f"too small for an interval, with fewer than {FEWEST_IMAGES} images: "
            + ", ".join(result.too_small)
            + "; averages over these have none either"
        )
    return found


def notes(results: Sequence[Result], view: View) -> list[str]:
    """What each method was run with, one line for each that has parameters, and what else stands
    below a table."""
    evaluated = [result for result in results if not result.about.over]
    texts = _of_each(evaluated, lambda result: _own_notes(result, view))
    texts += _about_intervals(evaluated[0], view)
    rows = [row for result in evaluated for method in result.methods for row in method.rows]
    if set(view.metrics) <= set(COMPARABLE):
        sources = dict.fromkeys(row.published.source for row in rows if row.published)
        texts += [f"published: {source}" for source in sources]
    return [shown(text) for text in texts]


def _own_notes(result: Result, view: View) -> list[str]:
    texts = [
        f"{label}: {values_text(method.parameters)}"
        for label, method in zip(labels(result), result.all_methods, strict=True)
        if method.parameters
    ]
    thresholds = [
        f"{label} {method.average.threshold:.6g}"
        for label, method in zip(labels(result), result.all_methods, strict=True)
    ]
    texts.append(f"threshold, the score that keeps 95 % of ID: {', '.join(thresholds)}")
    texts += _comparison(result, view)
    if result.about.selected_on:
        texts.append(f"settings chosen on {result.about.selected_on}, not on what is tested")
    if _best(result):
        texts.append(
            "*: lowest average FPR95 of that method's settings, chosen on these very test sets"
        )
    return [*texts, *remarks(result)]


def _about_intervals(result: Result, view: View) -> list[str]:
    if not result.bootstrap:
        return []
    texts = [
        f"{LEVEL} % intervals: {result.bootstrap.resamples:,} resamples of the images, the same "
        f"for every method (percentile bootstrap, seed {result.bootstrap.seed})"
    ]
    if any(
        value and value.marked for line in lines(result, view) for c in line.cells for value in c
    ):
        texts.append(
            f"{MARK}: the {LEVEL} % interval of the difference from {labels(result)[0]} excludes 0"
        )
    return texts


def _comparison(result: Result, view: View) -> list[str]:
    """How a method does against plain energy on average, in words, whichever wins: where energy was
    scored along, or where the two are all there is."""
    ours, *others = result.all_methods
    plain = result.baseline or (others[0] if len(others) == 1 else None)
    if plain is None or plain.method != "energy":
        return []
    *_, decimals = _decimals(result, replace(view, metrics=COMPARABLE))
    sure = plain.average.uncertainty
    parts = []
    for metric, sign, digits in zip(COMPARABLE, (-1, 1), decimals, strict=True):
        mine, other = ours.average.metrics[metric], plain.average.metrics[metric]
        gain = sign * (mine - other)
        word = "better" if gain > 0 else "worse" if gain < 0 else "the same"
        if sure and not excludes_zero(sure.difference_intervals[metric]):
            word = "within the noise"
        if ours.tied or plain.tied:
            word = "not to be compared"
        parts.append(f"{TITLES[metric]} {mine:.{digits}f} against {other:.{digits}f} ({word})")
    return [f"{ours.method} against plain {plain.method} on average: {', '.join(parts)}"]


def values_text(parameters: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.6g}" for key, value in parameters.items())
