"""A result in, text out: a table for people, Markdown, LaTeX, CSV or JSON."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence

from lhact.evaluation.reproduce import Closest
from lhact.evaluation.results import MethodResult, Result, Row, uncertainty_fields
from lhact.evaluation.uncertainty import LEVEL
from lhact.reporting.latex import latex
from lhact.reporting.lines import MARK, TITLES, Table, Value, values_text

Cell = Sequence[Value | None]


def table(content: Table) -> str:
    names, sizes = content.columns, content.set_sizes
    images = [f"{sizes[name]:,}" if sizes.get(name) else "" for name in names]
    grid = [["name", "method", *names], ["", "", *images]]
    for line in content.lines:
        indent = "  " * line.indented
        cells = [_text(cell, " / ") for cell in line.cells]
        grid.append(["" if line.indented else line.name, f"{indent}{line.label}", *cells])
        if line.has_intervals:
            for place, end in enumerate(("from", "to")):
                cells = [_end(cell, place) for cell in line.cells]
                grid.append(["", f"{indent}  {LEVEL} % {end}", *cells])
    if not content.several:
        grid = [row[1:] for row in grid]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if place > content.several else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in grid
    ]
    text.insert(2, "-" * len(text[0]))
    body = [line.rstrip() for line in text]
    return "\n".join([*content.heading, "", *body, "", *content.notes]) + "\n"


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


def markdown(content: Table) -> str:
    names = content.columns
    rows = [["name", "method", *names], ["---", "---", *("---:" for _ in names)]]
    for line in content.lines:
        cells = [_text(cell, "/", best="**{}**") for cell in line.cells]
        rows.append([line.name, line.label, *cells])
        if line.has_intervals:
            cells = [_interval(cell) for cell in line.cells]
            rows.append([line.name, f"{LEVEL} % interval", *cells])
    rows = rows if content.several else [row[1:] for row in rows]
    text = ["| " + " | ".join(row) + " |" for row in rows]
    below = [f"- {line}" for line in content.notes]
    return "\n".join([*content.heading, "", *text, "", *below]) + "\n"


def _interval(cell: Cell) -> str:
    texts = [
        "[{}, {}]".format(*map(value.show, value.interval)) if value and value.interval else "-"
        for value in cell
    ]
    return "/".join(texts) if any(text != "-" for text in texts) else "-"


def comma_separated(content: Table) -> str:
    """One line per method and dataset, values not rounded; all metrics, whichever are chosen."""
    lines = [
        _csv_line(result, method, row)
        for result in content.results
        for method in result.all_methods
        for row in method.rows
    ]
    out = io.StringIO()
    # The mean over several names has no intervals, and then these cells stay empty.
    writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_line(result: Result, method: MethodResult, row: Row) -> dict[str, object]:
    parameters = [f"{key}={value!r}" for key, value in method.parameters.items()]
    numbers = vars(row.published) if row.published else {}
    line: dict[str, object] = {
        "method": csv_text(method.method),
        "parameters": " ".join(parameters),
        "dataset": csv_text(row.dataset),
        "images": row.images,
        **{metric: row.metrics[metric] for metric in TITLES},
        **{f"published_{key}": numbers.get(key, "") for key in ("fpr95", "auroc", "source")},
        **{key: csv_text(text or "") for key, text in result.about.origin.items()},
    }
    for key, value in uncertainty_fields(row).items() if result.bootstrap else ():
        if key.endswith("_ci"):
            low, high = value if isinstance(value, tuple) else (None, None)
            line |= {f"{key}_low": low, f"{key}_high": high}
        else:
            line[key] = value
    return line


def csv_text(text: str) -> str:
    """The text such that no spreadsheet takes it for a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text


def as_json(content: Table) -> str:
    """The whole result, of several a list; all metrics, whichever are chosen."""
    contents = [_finite(result.to_json()) for result in content.results]
    return json.dumps(contents if len(contents) > 1 else contents[0], indent=2) + "\n"


def _finite(value: object) -> object:
    """The same with infinite thresholds as the words "inf" and "-inf": JSON has no number for
    them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


FORMATS: dict[str, Callable[[Table], str]] = {
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
