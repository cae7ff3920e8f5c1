"""Results in, what stands in a table about them out: headings, lines of numbers, and notes, for
every format alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lhact.evaluation.results import AVERAGE, STD, MethodResult, Result, Row, not_comparable
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

    metrics: Sequence[str] = COMPARABLE
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

    def low(self) -> str:
        """The lower end of its interval; a dash where it has none."""
        return self.show(self.interval[0]) if self.interval else "-"

    def high(self) -> str:
        return self.show(self.interval[1]) if self.interval else "-"

    @property
    def marked(self) -> bool:
        """Whether it is a difference whose interval excludes 0."""
        return self.signed and self.interval is not None and excludes_zero(self.interval)


@dataclass(frozen=True)
class Line:
    """One row of a table. name: of its result. cells: for each column the values of the chosen
    metrics, None where one is not known. indented: it belongs to the method above it."""

    name: str
    label: str
    cells: Sequence[Sequence[Value | None]]
    indented: bool

    @property
    def has_intervals(self) -> bool:
        return any(value.interval for cell in self.cells for value in cell if value)


@dataclass(frozen=True)
class Table:
    """What stands in a table about these results, and above and below it."""

    results: Sequence[Result]
    view: View = View()

    @property
    def several(self) -> bool:
        return len(self.results) > 1

    @cached_property
    def columns(self) -> list[str]:
        """The sets of all results, then the averages."""
        rows = [row.dataset for result in self.results for row in result.methods[0].rows]
        sets = self.set_sizes
        return sorted(dict.fromkeys(rows), key=lambda name: (name not in sets, name == AVERAGE))

    @cached_property
    def set_sizes(self) -> dict[str, int | None]:
        """OOD set -> its number of images; None where that differs from result to result."""
        sizes: dict[str, int | None] = {}
        for result in self.results:
            for row in result.methods[0].rows:
                if row.dataset not in {AVERAGE, *result.about.groups}:
                    same = sizes.get(row.dataset, row.images) == row.images
                    sizes[row.dataset] = row.images if same else None
        return sizes

    @cached_property
    def lines(self) -> list[Line]:
        """Those of all results one after the other, with a cell for each of `columns`."""
        return [line for part in self.results for line in _lines(part, self.view, self.columns)]

    @property
    def values(self) -> list[Value]:
        return [value for line in self.lines for cell in line.cells for value in cell if value]

    @property
    def heading(self) -> list[str]:
        metrics = self.view.metrics
        conventions = {
            "fpr95": "; FPR95 keeps 95 % of ID",
            "fpr95_ood_positive": "; FPR95 (OOD positive) catches 95 % of OOD",
        }
        texts = [
            *_of_each(self.results, lambda result: [_origin(result)]),
            f"{' / '.join(TITLES[metric] for metric in metrics)} in %; a higher score means ID"
            + "".join(text for metric, text in conventions.items() if metric in metrics),
            *_of_each(self.results, warnings),
        ]
        return [shown(text) for text in texts]

    @property
    def notes(self) -> list[str]:
        """What each method was run with, one line for each that has parameters, and what else
        stands below a table."""
        evaluated = [result for result in self.results if not result.about.over]
        texts = _of_each(evaluated, lambda result: _notes(result, self.view))
        if bootstrap := evaluated[0].bootstrap:
            texts.append(
                f"{LEVEL} % intervals: {bootstrap.resamples:,} resamples of the images, the same "
                f"for every method (percentile bootstrap, seed {bootstrap.seed})"
            )
        if any(value.marked for value in self.values):
            texts.append(
                f"{MARK}: the {LEVEL} % interval of the difference from {labels(evaluated[0])[0]} "
                "excludes 0"
            )
        rows = [row for result in evaluated for method in result.methods for row in method.rows]
        if set(self.view.metrics) <= set(COMPARABLE):
            sources = dict.fromkeys(row.published.source for row in rows if row.published)
            texts += [f"published: {source}" for source in sources]
        return [shown(text) for text in texts]


def varying(result: Result, method: MethodResult) -> list[str]:
    """Parameters that differ between the settings of that method. A percentile, which says what was
    asked for, stands for its threshold."""
    settings = [other.parameters for other in result.all_methods if other.method == method.method]
    keys = [
        key
        for key, value in method.parameters.items()
        if any(other.get(key) != value for other in settings)
    ]
    return [key for key in keys if f"{key}_percentile" not in keys]


def labels(result: Result) -> list[str]:
    """A label for each method: its name, with the parameters that vary where one method appears
    with several settings."""
    return [
        method.method
        + "".join(f" {key}={method.parameters[key]!r}" for key in varying(result, method))
        for method in result.all_methods
    ]


def labelled(result: Result) -> list[tuple[str, MethodResult]]:
    return list(zip(labels(result), result.all_methods, strict=True))


def best_settings(result: Result) -> list[int]:
    """For each method the place in result.all_methods of its only setting, or of that with the
    lowest average FPR95: one whose scores are constant, or nearly so, only if all of them are."""
    settings: dict[str, list[int]] = {}
    for number, method in enumerate(result.all_methods):
        settings.setdefault(method.method, []).append(number)

    def rank(number: int) -> tuple[bool, float]:
        method = result.all_methods[number]
        return method.tied, method.average.metrics["fpr95"]

    return [min(group, key=rank) for group in settings.values()]


def uncertainty(row: Row) -> Uncertainty:
    """That of the row, or an empty one."""
    return row.uncertainty or Uncertainty({}, {}, {})


def _starred(result: Result) -> list[MethodResult]:
    """Of each method that appears with several settings the best one."""
    methods = result.all_methods
    names = [method.method for method in methods]
    best = [methods[i] for i in best_settings(result) if names.count(names[i]) > 1]
    return [] if result.about.over else [method for method in best if not method.tied]


def _lines(result: Result, view: View, columns: Sequence[str]) -> list[Line]:
    """Under each method stand the published numbers and the difference from them, where all chosen
    metrics have them, and after a bootstrap the difference from the first method."""
    decimals = _decimals(result, view)
    best, starred = _best_shown(result, decimals), _starred(result)
    comparable = set(view.metrics) <= set(COMPARABLE)

    def values(row: Row, metric: str, contends: bool) -> list[Value | None]:
        """Of the method's own line and of each that may stand under it."""
        ours, digits = row.metrics[metric], decimals[row.dataset, metric]
        sure = uncertainty(row)
        own = Value(ours, digits, interval=sure.intervals.get(metric))
        own = replace(own, best=contends and own.text == best.get((row.dataset, metric)))
        found: list[Value | None] = [own, None, None, None]
        if row.published and comparable:
            theirs = vars(row.published)[metric]
            found[1:3] = Value(theirs, DECIMALS), Value(ours - theirs, digits, signed=True)
        if metric in sure.differences:
            ends = sure.difference_intervals[metric]
            found[3] = Value(sure.differences[metric], digits, signed=True, interval=ends)
        return found

    below = ("published", "difference", f"minus {labels(result)[0]}")
    found = []
    for label, method in labelled(result):
        rows = {row.dataset: row for row in method.rows}
        grid = [
            [
                values(rows[name], metric, not method.tied) if name in rows else [None] * 4
                for metric in view.metrics
            ]
            for name in columns
        ]
        for place, text in enumerate((f"{label} *" if method in starred else label, *below)):
            cells = [[values[place] for values in column] for column in grid]
            if place == 0 or any(value for cell in cells for value in cell):
                found.append(Line(result.about.name, text, cells, indented=place > 0))
    return found


# By dataset and metric.
Column = tuple[str, str]


def _decimals(result: Result, view: View) -> dict[Column, int]:
    """The number of decimals of each column: those of the view, or else as many as leave the last
    digit no smaller than a tenth of the half-width of the column's narrowest interval; DECIMALS
    where a metric has no intervals, none where a set is too small for one."""

    def decimals(rows: Sequence[Row], metric: str) -> int:
        if view.decimals is not None:
            return view.decimals
        if metric not in RESAMPLED or result.about.over:
            return DECIMALS
        if rows[0].uncertainty is None:
            return 0
        ends = [row.uncertainty.intervals[metric] for row in rows if row.uncertainty]
        # An interval of no width is as wide as one image counts.
        widths = [(high - low) / 2 or 100 / rows[0].images for low, high in ends]
        return min(DECIMALS, max(0, math.ceil(-math.log10(min(widths)))))

    return {
        (rows[0].dataset, metric): decimals(rows, metric)
        for rows in zip(*(method.rows for method in result.all_methods), strict=True)
        for metric in view.metrics
    }


def _best_shown(result: Result, decimals: Mapping[Column, int]) -> dict[Column, str]:
    """The best number of each column as it is shown: two that look the same are both the best.
    Nothing where there is but one method; tied methods do not count."""
    contenders = [method for method in result.all_methods if not method.tied]
    if len(result.all_methods) < 2 or not contenders or result.about.name == STD:
        return {}
    best = {}
    for (dataset, metric), digits in decimals.items():
        rows = [row for method in contenders for row in method.rows if row.dataset == dataset]
        better = min if metric in LOWER_IS_BETTER else max
        best[dataset, metric] = Value(better(row.metrics[metric] for row in rows), digits).text
    return best


def _of_each(results: Sequence[Result], texts: Callable[[Result], Sequence[str]]) -> list[str]:
    """The texts about each result; with its name in front where there are several."""
    return [
        f"{result.about.name}: {text}" if len(results) > 1 else text
        for result in results
        for text in texts(result)
    ]


def network_text(result: Result) -> str:
    origin = result.about.origin
    return f"{origin['network'] or 'unknown network'} {origin['weights'] or 'unknown weights'}"


def id_text(result: Result) -> str:
    info = result.about.info
    top1 = "top-1 unknown (no labels)" if info.accuracy is None else f"top-1 {info.accuracy:.2f} %"
    return f"ID: {info.images:,} images, {top1}"


def _origin(result: Result) -> str:
    about = result.about
    if about.over:
        return f"over {', '.join(about.over)}" + "; n - 1" * (about.name == STD)
    network = f"{network_text(result)}, {about.info.precision}"
    return f"{about.benchmark}, {network}; {id_text(result)}"


def warnings(result: Result) -> list[str]:
    """The findings, as they stand above a table."""
    return [not_comparable(finding) for finding in result.about.findings]


def selection(result: Result) -> list[str]:
    """Where settings were chosen, if they were."""
    place = result.about.selected_on
    return [f"settings chosen on {place}, not on what is tested"] if place else []


def remarks(result: Result) -> list[str]:
    """What a reader must know of methods whose scores are tied, one line each, and of sets that are
    too small for an interval."""
    found = [
        f"{label}: {max(row.tied for row in method.rows):.0f} % of the images of a set score just "
        "the threshold, and FPR95 counts strictly above it: its FPR95 is too low, see its AUROC"
        for label, method in labelled(result)
        if method.tied
    ]
    if result.too_small:
        found.append(
            f"too small for an interval, with fewer than {FEWEST_IMAGES} images: "
            + ", ".join(result.too_small)
            + "; averages over these have none either"
        )
    return found


def _notes(result: Result, view: View) -> list[str]:
    named = labelled(result)
    texts = [
        f"{label}: {values_text(method.parameters)}" for label, method in named if method.parameters
    ]
    thresholds = [f"{label} {method.average.threshold:.6g}" for label, method in named]
    texts.append(f"threshold, the score that keeps 95 % of ID: {', '.join(thresholds)}")
    texts += _comparison(result, view)
    texts += selection(result)
    if _starred(result):
        texts.append(
            "*: lowest average FPR95 of that method's settings, chosen on these very test sets"
        )
    return [*texts, *remarks(result)]


def _comparison(result: Result, view: View) -> list[str]:
    """How a method does against plain energy on average, in words, whichever wins: where energy was
    scored along, or where the two are all there is."""
    ours, *others = result.all_methods
    plain = result.baseline or (others[0] if len(others) == 1 else None)
    if plain is None or plain.method != "energy":
        return []
    decimals = _decimals(result, replace(view, metrics=COMPARABLE))
    sure = plain.average.uncertainty
    parts = []
    for metric, sign in zip(COMPARABLE, (-1, 1), strict=True):
        digits = decimals[AVERAGE, metric]
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
