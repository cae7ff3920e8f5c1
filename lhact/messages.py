"""Texts in, lines on standard error out, such that no text and no terminal can do harm."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class InputError(Exception):
    """What the program was given is not right. The message is all that its user reads: it says what
    was wanted, what came, and the mend."""


def first_line(error: BaseException) -> str:
    """The first line of what the error says, or its type where it says nothing."""
    return (str(error) or type(error).__name__).strip().partition("\n")[0]


def shown(text: object) -> str:
    """The text as a message can hold it: on one line, and without control characters, which a
    terminal would obey."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def encodable(text: str, encoding: str | None) -> str:
    """The text with escapes for what that encoding does not have."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: object) -> None:
    """Prints to standard error, above any progress bar. A stderr that cannot be written to is no
    reason to stop the work."""
    with contextlib.suppress(OSError, ValueError):
        line = encodable(str(text), getattr(sys.stderr, "encoding", None))
        tqdm.write(line, file=sys.stderr)


class _Stderr:
    """sys.stderr, but for a bar that it cannot show."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@contextlib.contextmanager
def progress_bar(what: str, unit: str, total: int | None = None, done: int = 0) -> Iterator[tqdm]:
    """A bar on standard error that appears after a second and leaves nothing behind. The unit `B`,
    of bytes, gets prefixes."""
    looks = {"desc": what, "unit": unit, "unit_scale": unit == "B", "delay": 1, "leave": False}
    with tqdm(total=total, initial=done, file=_Stderr(), **looks) as bar:
        yield bar
