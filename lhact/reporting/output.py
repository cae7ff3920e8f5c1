"""Text in, a file or standard output out, so that nothing is lost on the way."""

import errno
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lhact.files import naming, write_whole
from lhact.messages import InputError, encodable


class BadOutput(InputError):
    """A place that results cannot be written to."""


def check_places(files: Mapping[str, Path | None], folders: Mapping[str, Path | None]) -> None:
    """Raises BadOutput where results could not be written, before the minutes that they may take.

    files, folders: option of the command line -> place, None where it is not given.
    """
    for option, path in {**files, **folders}.items():
        try:
            if path is not None:
                (_try_file if option in files else _try_folder)(path)
        except OSError as error:
            raise BadOutput(
                f"{path}: {error.strerror or error}; give {option} a place that can be written to"
            ) from error


def _try_file(path: Path) -> None:
    if path.is_fifo():  # its reader would take this for the end
        return
    there = os.path.lexists(path)
    open(path, "ab").close()
    if not there:
        path.unlink()


def _try_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


def write(content: str, output: Path | None) -> None:
    """The text to the file, which keeps what it held where that fails, or to standard output."""
    if output is not None:
        write_whole(output, content.encode("utf-8", "surrogateescape"))
        return
    with naming("standard output"):
        try:
            # A file name that is not text can stand in the result; it is shown with escapes.
            sys.stdout.write(encodable(content, sys.stdout.encoding))
            sys.stdout.flush()
        except OSError:
            # What is left in the buffer would fail once more when Python ends, with a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise
