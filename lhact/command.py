"""The two steps of a command in, its exit status out. What the input, the disk or Ctrl-C can cause
is one line on standard error; anything else is a bug and keeps its traceback."""

from collections.abc import Callable
from typing import TypeVar

from lhact.messages import InputError, say, shown

Job = TypeVar("Job")


def expected_message(error: Exception) -> str | None:
    """What to say of an error that the input, the disk or the device can cause; None for a bug."""
    from lhact.devices import out_of_memory  # imports torch, which lhact.data does without

    if isinstance(error, InputError):
        return str(error)
    if out_of_memory(error):
        return "the device has too little memory; give another --device, such as cpu"
    if isinstance(error, OSError):
        return f"{shown(error.filename or 'a file')}: {error.strerror or error}"
    return None


def run(
    program: str,
    parse: Callable[[], Job],
    work: Callable[[Job], int | None],
    interrupted: str = "interrupted",
    expected: Callable[[Exception], str | None] = expected_message,
) -> int:
    """The exit status: what `work` returns for the job that `parse` returns, 0 for None; 2 where
    the command line is not right, which is a ValueError of `parse`; 1 where something else that was
    given is not right; 130 after Ctrl-C, of which `interrupted` is said.

    expected: what to say of an exception that leaves `work`; None for a bug.
    """
    try:
        job = parse()
    except ValueError as error:
        return fail(program, error, 2)
    except InputError as error:
        return fail(program, error, 1)
    try:
        return work(job) or 0
    except KeyboardInterrupt:
        return fail(program, interrupted, 130)
    except Exception as error:
        message = expected(error)
        if message is None:
            raise
        return fail(program, message, 1)


def fail(program: str, error: object, status: int) -> int:
    """Says why the program ends; the exit status."""
    say(f"{program}: {error}")
    return status
