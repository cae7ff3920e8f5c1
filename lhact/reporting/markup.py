"""Texts, numbers and pictures in, HTML out in which no text from outside can do harm."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lhact.messages import shown


def text(value: object) -> str:
    """The text such that it can stand in an element or an attribute, and turns no text around."""
    return html.escape(shown(value))


def list_of(lines: Iterable[str], kind: str) -> str:
    """kind: its class in page_style.py."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def facts(values: Mapping[str, object]) -> str:
    """A line for each name and its value."""
    lines = "".join(
        f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in values.items()
    )
    return f"<dl>{lines}</dl>" if lines else "<p>not recorded</p>"


def image(content: bytes, kind: str, alternative: str) -> str:
    """A picture of that kind (`jpeg`, `png`, `svg+xml`), and the words for who does not see it."""
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{text(alternative)}">'


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number or text that it is sorted by. lowest_first: whether its
    column begins with the lowest number; a column of words always begins with the first."""

    shown: str
    value: float | str
    best: bool = False
    lowest_first: bool = False


def words(value: str) -> Cell:
    return Cell(value, value)


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Cell]]],
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """A table that can be sorted.

    columns: titles; the first is that of the rows' names. rows: at least one, each its name and the
    cells behind it. groups: over the columns behind the first, in order: title and number of
    columns.
    """
    deep = ' rowspan="2"' if groups else ""
    name, cells = rows[0]
    heads = [
        f'<th scope="col" data-column="{i}"{deep if i == 0 else ""}{_class(cell)}>'
        f'<button type="button" data-first="{_first(cell)}">'
        f'{text(title)}<span class="arrow" aria-hidden="true"></span></button></th>'
        for i, (title, cell) in enumerate(zip(columns, [words(name), *cells], strict=True))
    ]
    if groups:
        over = "".join(
            f'<th scope="colgroup" colspan="{count}">{text(title)}</th>' for title, count in groups
        )
        head = f"<tr>{heads[0]}{over}</tr><tr>{''.join(heads[1:])}</tr>"
    else:
        head = f"<tr>{''.join(heads)}</tr>"
    body = "\n".join(
        f'<tr><th scope="row" data-value="{text(name)}">{text(name)}</th>'
        f"{''.join(map(_cell, cells))}</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}">'
        f"<table><caption><span>{text(caption)}</span></caption><thead>{head}</thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    content = f"<strong>{text(cell.shown)}</strong>" if cell.best else text(cell.shown)
    return f'<td{_class(cell)} data-value="{text(cell.value)}">{content}</td>'


def _class(cell: Cell) -> str:
    return ' class="words"' if isinstance(cell.value, str) else ""


def _first(cell: Cell) -> str:
    first_is_low = cell.lowest_first or isinstance(cell.value, str)
    return "ascending" if first_is_low else "descending"
