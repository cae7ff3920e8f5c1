"""A result in, text out: a table for people, Markdown, LaTeX, CSV or JSON."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence

from lhact.evaluation.reproduce import Closest
from lhact.evaluation.results import Result, Row
from lhact.evaluation.uncertainty import LEVEL, RESAMPLED, Uncertainty
from lhact.reporting.latex import latex
from lhact.reporting.lines import (
    MARK,
    TITLES,
    Value,
    View,
    blocks,
    columns,
    heading,
    notes,
    set_sizes,
    values_text,
)

Cell = Sequence[Value | None]
# Further columns of a CSV after a bootstrap.
INTERVAL_COLUMNS = [
    f"{metric}_{key}"
    for metric in RESAMPLED
    for key in ("ci_low", "ci_high", "difference", "difference_ci_low", "difference_ci_high")
]


def table(results: Sequence[Result], view: View) -> str:
    names = columns(results)
    several = len(results) > 1
    sizes = set_sizes(results)
    images = [f"{sizes[name]:,}" if sizes.get(name) else "" for name in names]
    grid = [["method", *names], ["", *images]]
    first = ["name", ""]
    for name, line in blocks(results, view):
        first += ["" if line.indented else name, *[""] * (2 * line.has_intervals)]
        indent = "  " * line.indented
        grid.append([f"{indent}{line.label}", *(_text(cell, " / ") for cell in line.cells)])
        if line.has_intervals:
            for place, end in enumerate(("from", "to")):
                cells = [_end(cell, place) for cell in line.cells]
                grid.append([f"{indent}  {LEVEL} % {end}", *cells])
    if several:
        grid = [[name, *row] for name, row in zip(first, grid, strict=True)]
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    text = [
        "  ".join(
            cell.rjust(width) if place > several else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in grid
    ]
    text.insert(2, "-" * len(text[0]))
    body = [line.rstrip() for line in text]
    return "\n".join([*heading(results, view), "", *body, "", *notes(results, view)]) + "\n"


def _text(cell: Cell, separator: str, best: str = "{}") -> str:
    """The numbers of a cell; best: how the best of a column is written."""
    if not any(cell):
        return "-"
    return separator.join(
        (best if value.best else "{}").format(value.text) + MARK * value.marked if value else "-"
        for value in cell
    )


def _end(cell: Cell, place: int) -> str:
    """The lower (0) or the upper (1) ends of a cell's intervals."""
    ends = [
        value.show(value.interval[place]) if value and value.interval else "-" for value in cell
    ]
    return " / ".join(ends) if any(end != "-" for end in ends) else "-"


def markdown(results: Sequence[Result], view: View) -> str:
    names = columns(results)
    several = len(results) > 1
    rows = [["name", "method", *names], ["---", "---", *("---:" for _ in names)]]
    for name, line in blocks(results, view):
        rows.append([name, line.label, *(_text(cell, "/", best="**{}**") for cell in line.cells)])
        if line.has_intervals:
            rows.append([name, f"{LEVEL} % interval", *(_interval(cell) for cell in line.cells)])
    rows = rows if several else [row[1:] for row in rows]
    text = ["| " + " | ".join(row) + " |" for row in rows]
    below = [f"- {line}" for line in notes(results, view)]
    return "\n".join([*heading(results, view), "", *text, "", *below]) + "\n"


def _interval(cell: Cell) -> str:
    texts = [
        "[{}, {}]".format(*map(value.show, value.interval)) if value and value.interval else "-"
        for value in cell
    ]
    return "/".join(texts) if any(text != "-" for text in texts) else "-"


def comma_separated(results: Sequence[Result], view: View) -> str:
    """One line per method and dataset, values not rounded; all metrics, whichever are chosen."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    known = ["fpr95", "auroc", "source"]
    writer.writerow(
        ["method", "parameters", "dataset", "images", *TITLES]
        + [f"published_{key}" for key in known]
        + list(results[0].about.origin)
        + (INTERVAL_COLUMNS if results[0].bootstrap else [])
    )
    for result, method in ((r, method) for r in results for method in r.all_methods):
        parameters = " ".join(f"{key}={value!r}" for key, value in method.parameters.items())
        for row in method.rows:
            numbers = vars(row.published) if row.published else {}
            writer.writerow(
                [csv_text(method.method), parameters, csv_text(row.dataset), row.images]
                + [repr(row.metrics[metric]) for metric in TITLES]
                + [numbers.get(key, "") for key in known]
                + [csv_text(text or "") for text in result.about.origin.values()]
                + (_intervals(row) if results[0].bootstrap else [])
            )
    return out.getvalue()


def _intervals(row: Row) -> list[str]:
    """The row's values of INTERVAL_COLUMNS, not rounded; empty where there are none."""
    sure = row.uncertainty or Uncertainty({}, {}, {})
    values = [
        value
        for metric in RESAMPLED
        for value in (
            *sure.intervals.get(metric, ("", "")),
            sure.differences.get(metric, ""),
            *sure.difference_intervals.get(metric, ("", "")),
        )
    ]
    return [value if value == "" else repr(value) for value in values]


def csv_text(text: str) -> str:
    """The text such that no spreadsheet takes it for a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text


def as_json(results: Sequence[Result], view: View) -> str:
    """The whole result, of several a list; all metrics, whichever are chosen."""
    contents = [_finite(result.to_json()) for result in results]
    return json.dumps(contents if len(contents) > 1 else contents[0], indent=2) + "\n"


def _finite(value: object) -> object:
    """The same with infinite thresholds as the words "inf" and "-inf": JSON has no number for
    them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


FORMATS: dict[str, Callable[[Sequence[Result], View], str]] = {
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
        default = f"default ({values_text(row.default.parameters)})"
        lines += [
            f"{row.row.method}, as published in {row.row.source}",
            f"  {values_text(row.found.parameters)}: distance {row.found.distance(row.row):.2f}; "
            f"ours minus published: {differences}",
            f"  {default}: distance {row.default.distance(row.row):.2f}",
        ]
    return "\n".join(lines) + "\n"
