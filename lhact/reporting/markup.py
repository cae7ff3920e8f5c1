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
    """What a cell shows, and the number or text that it is sorted by."""

    shown: str
    value: float | str
    best: bool = False


def number(value: float, form: str = ".2f", best: bool = False) -> Cell:
    return Cell(f"{value:{form}}", value, best)


def table(
    caption: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, Sequence[Cell]]],
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """A table that can be sorted.

    columns: of each its title and what it holds: `words`, or numbers of which the `lowest` or the
    `highest` is first when it is sorted; the first column is that of the rows' names. groups: over
    the columns behind the first, in order: title and number of columns.
    """
    deep = ' rowspan="2"' if groups else ""
    heads = [
        f'<th scope="col" data-column="{i}"{deep if i == 0 else ""}{_kind(kind == "words")}>'
        f'<button type="button" data-first="{"de" if kind == "highest" else "a"}scending">'
        f'{text(title)}<span class="arrow" aria-hidden="true"></span></button></th>'
        for i, (title, kind) in enumerate(columns)
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
    words = isinstance(cell.value, str)
    return f'<td{_kind(words)} data-value="{text(cell.value)}">{content}</td>'


def _kind(words: bool) -> str:
    return ' class="words"' if words else ""
