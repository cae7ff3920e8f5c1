"""A result in, text out: a table for people, Markdown, LaTeX, CSV or JSON."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lhact.evaluation.reproduce import Closest
from lhact.evaluation.uncertainty import LEVEL
from lhact.reporting.latex import latex
from lhact.reporting.lines import MARK, Table, Value, values_text


def table(content: Table) -> str:
    names, sizes = content.columns, content.set_sizes
    images = [f"{sizes[name]:,}" if sizes.get(name) else "" for name in names]
    grid = [["name", "method", *names], ["", "", *images]]
    for line in content.lines:
        indent = "  " * line.indented
        cells = [_joined(cell, " / ", _number) for cell in line.cells]
        grid.append(["" if line.indented else line.name, f"{indent}{line.label}", *cells])
        if line.has_intervals:
            for end, show in {"from": Value.low, "to": Value.high}.items():
                cells = [_joined(cell, " / ", show) for cell in line.cells]
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


def _joined(cell: Sequence[Value | None], separator: str, show: Callable[[Value], str]) -> str:
    """The values of a cell as they are shown; one dash where none of them is known."""
    texts = [show(value) if value else "-" for value in cell]
    return separator.join(texts) if set(texts) != {"-"} else "-"


def _number(value: Value) -> str:
    return value.text + MARK * value.marked


def markdown(content: Table) -> str:
    names = content.columns
    rows = [["name", "method", *names], ["---", "---", *("---:" for _ in names)]]
    for line in content.lines:
        cells = [_joined(cell, "/", _bold_number) for cell in line.cells]
        rows.append([line.name, line.label, *cells])
        if line.has_intervals:
            cells = [_joined(cell, "/", _interval) for cell in line.cells]
            rows.append([line.name, f"{LEVEL} % interval", *cells])
    rows = rows if content.several else [row[1:] for row in rows]
    text = ["| " + " | ".join(row) + " |" for row in rows]
    below = [f"- {line}" for line in content.notes]
    return "\n".join([*content.heading, "", *text, "", *below]) + "\n"


def _bold_number(value: Value) -> str:
    return f"**{value.text}**" + MARK * value.marked if value.best else _number(value)


def _interval(value: Value) -> str:
    return f"[{value.low()}, {value.high()}]" if value.interval else "-"


def comma_separated(content: Table) -> str:
    """One line per method and dataset, values not rounded; all metrics, whichever are chosen."""
    contents: list[Any] = [result.to_json() for result in content.results]
    rows = [row for part in contents for row in (*part["results"], *part["baseline"])]
    lines = [_csv_line(row) for row in rows]
    out = io.StringIO()
    # The mean over several names has no intervals, and then these cells stay empty.
    writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_line(row: Mapping[str, Any]) -> dict[str, object]:
    """A row of the JSON, flat and without its threshold."""
    line: dict[str, object] = {}
    for key, value in row.items():
        if key == "parameters":
            line[key] = " ".join(f"{name}={number!r}" for name, number in value.items())
        elif key == "published":
            line |= {f"published_{k}": (value or {}).get(k) for k in ("fpr95", "auroc", "source")}
        elif key.endswith("_ci"):
            line[f"{key}_low"], line[f"{key}_high"] = value or (None, None)
        elif key != "threshold":
            line[key] = csv_text(value) if isinstance(value, str) else value
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
        lines += [
            f"{row.row.method}, as published in {row.row.source}",
            f"  {values_text(row.found.parameters)}: distance {row.found.distance(row.row):.2f}; "
            f"ours minus published: {differences}",
            f"  default ({values_text(row.default.parameters)}): distance "
            f"{row.default.distance(row.row):.2f}",
        ]
    return "\n".join(lines) + "\n"
