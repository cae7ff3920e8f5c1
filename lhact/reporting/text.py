"""A result in, text out: a table for people, Markdown, LaTeX, CSV or JSON."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lhact.evaluation.reproduce import Closest
from lhact.evaluation.results import AVERAGE, MethodResult, Result
from lhact.messages import shown

TITLES = {
    "fpr95": "FPR95",
    "auroc": "AUROC",
    "aupr_id": "AUPR (ID positive)",
    "aupr_ood": "AUPR (OOD positive)",
    "fpr95_ood_positive": "FPR95 (OOD positive)",
}
# Published numbers exist for these, with ID as the positive class; beside any other metric they
# would be taken for it.
COMPARABLE = ("fpr95", "auroc")


@dataclass(frozen=True)
class Line:
    """One row of a table: a label, and for each column the values of the chosen metrics (None: not
    known)."""

    label: str
    cells: Sequence[Sequence[float] | None]
    signed: bool = False


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


def _lines(result: Result, metrics: Sequence[str]) -> list[Line]:
    """Published numbers and the difference follow a method that has them, for the metrics that have
    them."""
    lines = []
    best = _best(result)
    for label, method in zip(labels(result), result.all_methods, strict=True):
        ours = [[row.metrics[metric] for metric in metrics] for row in method.rows]
        lines.append(Line(f"{label} *" if method in best else label, ours))
        known = [row.published for row in method.rows]
        if any(known) and set(metrics) <= set(COMPARABLE):
            theirs = [
                [vars(numbers)[metric] for metric in metrics] if numbers else None
                for numbers in known
            ]
            difference = [
                [x - y for x, y in zip(a, b, strict=True)] if b else None
                for a, b in zip(ours, theirs, strict=True)
            ]
            lines += [Line("  published", theirs), Line("  difference", difference, signed=True)]
    return lines


def _columns(result: Result) -> list[str]:
    return [row.dataset for row in result.methods[0].rows]


def _cell(values: Sequence[float] | None, signed: bool, separator: str) -> str:
    if values is None:
        return "-"
    return separator.join(f"{value:{'+' if signed else ''}.2f}" for value in values)


def _heading(result: Result, metrics: Sequence[str]) -> list[str]:
    about, info = result.about, result.about.info
    network = info.network
    weights = network.weights or network.checkpoint or "unknown weights"
    top1 = "top-1 unknown (no labels)" if info.accuracy is None else f"top-1 {info.accuracy:.2f} %"
    conventions = {
        "fpr95": "; FPR95 keeps 95 % of ID",
        "fpr95_ood_positive": "; FPR95 (OOD positive) catches 95 % of OOD",
    }
    lines = [
        f"{about.benchmark}, {network.arch or 'unknown network'} {weights}, {info.precision}; "
        f"ID: {info.images:,} images, {top1}",
        f"{' / '.join(TITLES[metric] for metric in metrics)} in %; a higher score means ID"
        + "".join(text for metric, text in conventions.items() if metric in metrics),
        *warnings(result),
    ]
    return [shown(line) for line in lines]


def warnings(result: Result) -> list[str]:
    """The findings, as they stand above a table."""
    return comparison_warnings(result.about.findings)


def comparison_warnings(findings: Sequence[str]) -> list[str]:
    return [f"not comparable with the published numbers: {finding}" for finding in findings]


def remarks(result: Result) -> list[str]:
    """What a reader must know of methods whose scores are tied, one line each."""
    return [
        f"{label}: {max(row.tied for row in method.rows):.0f} % of the images of a set score just "
        "the threshold, and FPR95 counts strictly above it: its FPR95 is too low, see its AUROC"
        for label, method in zip(labels(result), result.all_methods, strict=True)
        if method.tied
    ]


def _notes(result: Result, metrics: Sequence[str]) -> list[str]:
    """What each method was run with, one line for each that has parameters, and what else stands
    below a table."""
    lines = [
        f"{label}: {_values(method.parameters)}"
        for label, method in zip(labels(result), result.all_methods, strict=True)
        if method.parameters
    ]
    lines += _comparison(result)
    if result.about.selected_on:
        lines.append(f"settings chosen on {result.about.selected_on}, not on what is tested")
    if _best(result):
        lines.append(
            "*: lowest average FPR95 of that method's settings, chosen on these very test sets"
        )
    lines += remarks(result)
    rows = [row for method in result.methods for row in method.rows]
    if set(metrics) <= set(COMPARABLE):
        sources = dict.fromkeys(row.published.source for row in rows if row.published)
        lines += [f"published: {source}" for source in sources]
    return [shown(line) for line in lines]


def _comparison(result: Result) -> list[str]:
    """How a method does against plain energy on average, in words, whichever wins: where energy was
    scored along, or where the two are all there is."""
    ours, *others = result.all_methods
    plain = result.baseline or (others[0] if len(others) == 1 else None)
    if plain is None or plain.method != "energy":
        return []
    parts = []
    for metric, sign in (("fpr95", -1), ("auroc", 1)):
        mine, other = ours.average.metrics[metric], plain.average.metrics[metric]
        gain = sign * (mine - other)
        word = "better" if gain > 0 else "worse" if gain < 0 else "the same"
        if ours.tied or plain.tied:
            word = "not to be compared"
        parts.append(f"{TITLES[metric]} {mine:.2f} against {other:.2f} ({word})")
    return [f"{ours.method} against plain {plain.method} on average: {', '.join(parts)}"]


def _values(parameters: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.6g}" for key, value in parameters.items())


def table(result: Result, metrics: Sequence[str]) -> str:
    columns = _columns(result)
    images = [
        "" if row.dataset.endswith(AVERAGE) else f"{row.images:,}" for row in result.methods[0].rows
    ]
    grid = [["method", *columns], ["", *images]]
    for line in _lines(result, metrics):
        grid.append([line.label, *(_cell(cell, line.signed, " / ") for cell in line.cells)])
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    text = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in grid
    ]
    text.insert(2, "-" * len(text[0]))
    body = [line.rstrip() for line in text]
    return "\n".join([*_heading(result, metrics), "", *body, "", *_notes(result, metrics)]) + "\n"


def markdown(result: Result, metrics: Sequence[str]) -> str:
    columns = _columns(result)
    rows = [["method", *columns], ["---", *("---:" for _ in columns)]]
    for line in _lines(result, metrics):
        rows.append([line.label.strip(), *(_cell(cell, line.signed, "/") for cell in line.cells)])
    text = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"- {line}" for line in _notes(result, metrics)]
    return "\n".join([*_heading(result, metrics), "", *text, "", *notes]) + "\n"


TEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    **{character: "\\" + character for character in "_%&#${}"},
}


def _tex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in shown(text))


def latex(result: Result, metrics: Sequence[str]) -> str:
    """A tabular of the booktabs package."""
    columns = _columns(result)
    body = []
    for line in _lines(result, metrics):
        cells = [_cell(cell, line.signed, "/") for cell in line.cells]
        body.append(" & ".join([_tex(line.label.strip()), *cells]) + r" \\")
    lines = [
        *(f"% {line}" for line in (*_heading(result, metrics), *_notes(result, metrics))),
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(["method", *map(_tex, columns)]) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def comma_separated(result: Result, metrics: Sequence[str]) -> str:
    """One line per method and dataset, values not rounded; all metrics, whichever are chosen."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    known = ["fpr95", "auroc", "source"]
    writer.writerow(
        ["method", "parameters", "dataset", "images", *TITLES, *(f"published_{k}" for k in known)]
    )
    for method in result.all_methods:
        parameters = " ".join(f"{key}={value!r}" for key, value in method.parameters.items())
        for row in method.rows:
            numbers = vars(row.published) if row.published else {}
            writer.writerow(
                [_csv_text(method.method), parameters, _csv_text(row.dataset), row.images]
                + [repr(row.metrics[metric]) for metric in TITLES]
                + [numbers.get(key, "") for key in known]
            )
    return out.getvalue()


def _csv_text(text: str) -> str:
    """The text such that no spreadsheet takes it for a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text


def as_json(result: Result, metrics: Sequence[str]) -> str:
    """The whole result; all metrics, whichever are chosen."""
    return json.dumps(_finite(result.to_json()), indent=2) + "\n"


def _finite(value: object) -> object:
    """The same with infinite thresholds as the words "inf" and "-inf": JSON has no number for
    them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


FORMATS: dict[str, Callable[[Result, Sequence[str]], str]] = {
    "table": table,
    "markdown": markdown,
    "latex": latex,
    "csv": comma_separated,
    "json": as_json,
}


def reproduction(found: Sequence[Closest], form: str) -> str:
    """What `--reproduce` found: JSON for that format, text for any other."""
    if form == "json":
        return json.dumps({"reproduce": [row.to_json() for row in found]}, indent=2) + "\n"
    lines = [
        "closest setting to each published row; distance: root mean square of the differences in "
        "FPR95 and AUROC, in points",
        "",
    ]
    for row in found:
        differences = ", ".join(
            f"{name} {fpr95:+.2f}/{auroc:+.2f}"
            for name, (fpr95, auroc) in row.found.differences(row.row).items()
        )
        default = f"default ({_values(row.default.parameters)})"
        lines += [
            f"{row.row.method}, as published in {row.row.source}",
            f"  {_values(row.found.parameters)}: distance {row.found.distance(row.row):.2f}; ours "
            f"minus published: {differences}",
            f"  {default}: distance {row.default.distance(row.row):.2f}",
        ]
    return "\n".join(lines) + "\n"
