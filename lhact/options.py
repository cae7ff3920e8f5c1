"""Texts of the command line in, checked values out: the `type` of options that several commands
have. What is not right raises ArgumentTypeError, which argparse says after the option's name."""

import ast
import math
import os
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from pathlib import Path

from lhact.cache import RESERVED, BadCache, check_distinct, check_name


def path(text: str) -> Path:
    """`~` is the home. (Path.expanduser raises an error for the home of nobody.)"""
    return Path(os.path.expanduser(text))


def at_least(lowest: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise ArgumentTypeError(f"must be a whole number, at least {lowest}, got {text!r}")
        return value

    return whole_number


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def not_negative(text: str) -> float:
    if (value := finite(text)) < 0:
        raise ArgumentTypeError(f"must be a number from 0 on, got {text!r}")
    return value


def positive(text: str) -> float:
    if (value := finite(text)) <= 0:
        raise ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def name(text: str) -> str:
    """What can be a file name everywhere."""
    try:
        return check_name(text, "a name")
    except BadCache as error:
        raise ArgumentTypeError(str(error)) from error


def named_source(text: str) -> tuple[str, str]:
    """NAME=SOURCE of an OOD set."""
    key, _, source = text.partition("=")
    if not (key and source):
        raise ArgumentTypeError(f"must be NAME=SOURCE, got {text!r}")
    return name(key), source


def builder_argument(text: str) -> tuple[str, object]:
    """KEY=VALUE, the value a Python literal, or the text where it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ArgumentTypeError(f"must be KEY=VALUE, such as num_classes=10, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def sources(
    given: Iterable[tuple[str, str | None]], ood: Iterable[tuple[str, str]]
) -> dict[str, str]:
    """Image set name -> source, of those that are given. Raises ValueError for an OOD set of a name
    that is reserved, or given twice."""
    found = {key: source for key, source in given if source is not None}
    for key, source in ood:
        if key in found or key in RESERVED:
            raise ValueError(f"--ood {key}: that name is taken; give another")
        found[key] = source
    check_distinct(found)
    return found
