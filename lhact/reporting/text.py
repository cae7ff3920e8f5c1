"""Results in, text out: a table for people, Markdown, LaTeX, CSV or JSON, and each image's score as a file.

`result` is what evaluate.results returns, in the schema of `--format json`.
"""

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TITLES = {
    "fpr95": "FPR95",
    "auroc": "AUROC",
    "aupr_id": "AUPR (ID positive)",
    "aupr_ood": "AUPR (OOD positive)",
    "fpr95_ood_positive": "FPR95 (OOD positive)",
}


# Published numbers exist for these, with ID as the positive class; beside any other metric they would be taken for it.
COMPARABLE = {"fpr95", "auroc"}


class Line(NamedTuple):
    """One row of a table: a label, and for each column the values of the chosen metrics (None: not known)."""

    label: str
    cells: list[list[float] | None]
    signed: bool = False


def _groups(result: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(label, rows) of each method; parameters are part of the label where one method appears with several."""
    rows = [*result["results"], *result["baseline"]]
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: (row["method"], str(row["parameters"])))]
    names = [rows[0]["method"] for rows in groups]
    labelled = []
    for rows in groups:
        name, parameters = rows[0]["method"], rows[0]["parameters"]
        others = [group[0]["parameters"] for group in groups if group[0]["method"] == name]
        varying = [key for key in parameters if any(other.get(key) != parameters[key] for other in others)]
        # A percentile says what was asked for; the threshold that it gave stands below the table.
        varying = [key for key in varying if f"{key}_percentile" not in varying]
        given = " ".join(f"{key}={parameters[key]!r}" for key in varying)
        labelled.append((f"{name} {given}" if names.count(name) > 1 and given else name, rows))
    return labelled


def _best(result: Mapping[str, Any]) -> list[str]:
    """The label with the lowest average FPR95 of each method that appears with several settings."""
    averages: dict[str, list[tuple[float, str]]] = {}
    for label, rows in _groups(result):
        averages.setdefault(rows[0]["method"], []).append((rows[-1]["fpr95"], label))
    return [min(settings)[1] for settings in averages.values() if len(settings) > 1]


def _lines(result: Mapping[str, Any], metrics: Sequence[str]) -> tuple[list[str], list[Line]]:
    """(column titles, rows); published numbers and the difference follow a method that has them, for the metrics that have them."""
    columns: list[str] = []
    lines = []
    best = _best(result)
    for label, rows in _groups(result):
        columns = [row["dataset"] for row in rows]
        lines.append(Line(f"{label} *" if label in best else label, [[row[metric] for metric in metrics] for row in rows]))
        known = [row["published"] for row in rows]
        if any(known) and set(metrics) <= COMPARABLE:
            published = [values and [values[metric] for metric in metrics] for values in known]
            difference = [
                values and [row[metric] - values[metric] for metric in metrics] for row, values in zip(rows, known, strict=True)
            ]
            lines += [Line("  published", published), Line("  difference", difference, signed=True)]
    return columns, lines


def _cell(values: Sequence[float] | None, signed: bool, separator: str = " / ") -> str:
    return "-" if values is None else separator.join(f"{value:{'+' if signed else ''}.2f}" for value in values)


def _heading(result: Mapping[str, Any], metrics: Sequence[str]) -> str:
    network, accuracy = result["network"], result["id"]["accuracy"]
    weights = network["weights"] or network["checkpoint"] or "unknown weights"
    top1 = "top-1 unknown (no labels)" if accuracy is None else f"top-1 {accuracy:.2f} %"
    return (
        f"{result['benchmark']}, {network['arch'] or 'unknown network'} {weights}, {result['precision']}; "
        f"ID: {result['id']['images']:,} images, {top1}\n"
        f"{' / '.join(TITLES[metric] for metric in metrics)} in %; a higher score means ID"
        + ("; FPR95 keeps 95 % of ID" if "fpr95" in metrics else "")
        + ("; FPR95 (OOD positive) catches 95 % of OOD" if "fpr95_ood_positive" in metrics else "")
        + "".join(f"\n{line}" for line in warnings(result))
    )


def warnings(result: Mapping[str, Any]) -> list[str]:
    """The findings, as they stand above a table."""
    return [f"not comparable with the published numbers: {finding}" for finding in result.get("findings", [])]


def _parameters(result: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """What each method was run with, one line for each that has parameters."""
    lines = []
    for label, rows in _groups(result):
        parameters = rows[0]["parameters"]
        if parameters:
            lines.append(f"{label}: {_values(parameters)}")
    lines += _comparison(result)
    if result.get("selected_on"):
        lines.append(f"settings chosen on {result['selected_on']}, not on what is tested")
    if _best(result):
        lines.append("*: lowest average FPR95 of that method's settings, chosen on these very test sets")
    compared = set(metrics) <= COMPARABLE
    sources = {row["published"]["source"]: None for row in result["results"] if row["published"] and compared}
    return [*lines, *(f"published: {source}" for source in sources)]


def _comparison(result: Mapping[str, Any]) -> list[str]:
    """How the first method does against the baseline on average, in words, whichever wins."""
    if not result["baseline"]:
        return []
    ours, plain = (next(row for row in result[key] if row["dataset"] == "average") for key in ("results", "baseline"))
    parts = []
    for metric, sign in (("fpr95", -1), ("auroc", 1)):
        gain = sign * (ours[metric] - plain[metric])
        word = "better" if gain > 0 else "worse" if gain < 0 else "the same"
        parts.append(f"{TITLES[metric]} {ours[metric]:.2f} against {plain[metric]:.2f} ({word})")
    return [f"{ours['method']} against plain {plain['method']} on average: {', '.join(parts)}"]


def table(result: Mapping[str, Any], metrics: Sequence[str]) -> str:
    columns, lines = _lines(result, metrics)
    images = {row["dataset"]: f"{row['images']:,}" for row in result["results"] if row["dataset"] != "average"}
    grid = [["method", *columns], ["", *(images.get(column, "") for column in columns)]]
    grid += [[line.label, *(_cell(cell, line.signed) for cell in line.cells)] for line in lines]
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    text = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in grid]
    text.insert(2, "-" * len(text[0]))
    return "\n".join([_heading(result, metrics), "", *(line.rstrip() for line in text), "", *_parameters(result, metrics)]) + "\n"


def markdown(result: Mapping[str, Any], metrics: Sequence[str]) -> str:
    columns, lines = _lines(result, metrics)
    rows = [["method", *columns], ["---", *("---:" for _ in columns)]]
    rows += [[line.label.strip(), *(_cell(cell, line.signed, "/") for cell in line.cells)] for line in lines]
    text = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"- {line}" for line in _parameters(result, metrics)]
    return "\n".join([*_heading(result, metrics).splitlines(), "", *text, "", *notes]) + "\n"


def _tex(text: str) -> str:
    return "".join({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "^": r"\^{}", "~": r"\~{}"}.get(c, c) for c in text)


def latex(result: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """A tabular of the booktabs package."""
    columns, lines = _lines(result, metrics)
    body = [
        " & ".join([_tex(line.label.strip()), *(_cell(cell, line.signed, "/") for cell in line.cells)]) + r" \\" for line in lines
    ]
    return (
        "\n".join(
            [
                *(f"% {line}" for line in (*_heading(result, metrics).splitlines(), *_parameters(result, metrics))),
                rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
                r"\toprule",
                " & ".join(["method", *map(_tex, columns)]) + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )
        + "\n"
    )


def comma_separated(result: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """One line per method and dataset, values not rounded; all metrics, whichever are chosen."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["method", "parameters", "dataset", "images", *TITLES, "published_fpr95", "published_auroc", "published_source"]
    )
    for row in [*result["results"], *result["baseline"]]:
        parameters = " ".join(f"{key}={value!r}" for key, value in row["parameters"].items())
        published = row["published"] or {}
        writer.writerow(
            [row["method"], parameters, row["dataset"], row["images"], *(repr(row[metric]) for metric in TITLES)]
            + [published.get(key, "") for key in ("fpr95", "auroc", "source")]
        )
    return out.getvalue()


def as_json(result: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """The whole result; all metrics, whichever are chosen."""
    return json.dumps(_finite(result), indent=2) + "\n"


def _finite(value: Any) -> Any:
    """The same with infinite thresholds as the words "inf" and "-inf": JSON has no number for them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


FORMATS: dict[str, Callable[[Mapping[str, Any], Sequence[str]], str]] = {
    "table": table,
    "markdown": markdown,
    "latex": latex,
    "csv": comma_separated,
    "json": as_json,
}


def reproduction(rows: Sequence[Mapping[str, Any]], form: str) -> str:
    """What reproduce.reproduce found: JSON for that format, text for any other."""
    if form == "json":
        return json.dumps({"reproduce": rows}, indent=2) + "\n"
    lines = [
        "closest setting to each published row; distance: root mean square of the differences in FPR95 and AUROC, in points",
        "",
    ]
    for row in rows:
        default = row["default"]
        differences = ", ".join(f"{name} {fpr95:+.2f}/{auroc:+.2f}" for name, (fpr95, auroc) in row["differences"].items())
        lines += [
            f"{row['method']}, as published in {row['source']}",
            f"  {_values(row['parameters'])}: distance {row['distance']:.2f}; ours minus published: {differences}",
            f"  default ({_values(default['parameters'])}): distance {default['distance']:.2f}",
        ]
    return "\n".join(lines) + "\n"


def _values(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:.6g}" for key, value in parameters.items())


def write_scores(
    folder: Path, result: Mapping[str, Any], scores: Sequence[Mapping[str, np.ndarray]], paths: Mapping[str, Sequence[str]]
) -> None:
    """<folder>/<method>/<dataset>.csv with the columns path and score, a line per image in the order of the cache.

    scores: for each method in the order of the result, dataset -> (images,). paths: dataset -> the images' relative paths.
    """
    for (label, _), of_method in zip(_groups(result), scores, strict=True):
        method = folder / label.replace(" ", "_")
        method.mkdir(parents=True, exist_ok=True)
        for dataset, values in of_method.items():
            with open(method / f"{dataset}.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                # Every path in quotes: a name may hold any character.
                writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
                writer.writerow(["path", "score"])
                # Nine significant digits give a float32 back exactly.
                writer.writerows((path, float(f"{value:.9g}")) for path, value in zip(paths[dataset], values.tolist(), strict=True))
