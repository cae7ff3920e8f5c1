"""The name of a benchmark or the user's own FILE.toml in, the benchmark out.

    id = "flowers/test"           a SOURCE: a folder, FILE.txt, FILE.npz or torchvision:NAME:SPLIT
    calibration = "flowers/train" may be left out

    [ood]                                in the order of the table
    Insects = "insects"
    Birds = { source = "birds.txt", list_root = "images" }

    [groups]                             may be left out; makes the row `near average`
    near = ["Insects"]

    [network]                            may be left out; weights by name, or a checkpoint
    arch = "my_networks:resnet18"
    arch_args = { num_classes = 10 }
    checkpoint = "resnet18.pth"
    head = "fc"

    [preprocessing]                      each may be left out; comes before what the weights say
    resize = 32
    squash = true                        both sides to `resize`, not the shorter one
    crop = 32
    interpolation = "bilinear"
    mean = [0.5, 0.5, 0.5]
    std = [0.25, 0.25, 0.25]

Paths are relative to the folder of the file; `~` is the home. The sets of torchvision lie under
--data-root. The name of the benchmark, in the cache too, is the file's without `.toml`.
"""

import argparse
import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lhact import cache
from lhact.benchmarks.builtin import BENCHMARKS, UNKNOWN, Benchmark, ImageSet
from lhact.messages import InputError, shown
from lhact.records import Preprocessing, RecordedPreprocessing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What a value must be: the check, and its name in a message.
Rule = tuple[Callable[[Any], bool], str]
TEXT: Rule = (lambda value: isinstance(value, str) and value != "", "a text")
TABLE: Rule = (lambda value: isinstance(value, dict), "a table")
SOURCE: Rule = (
    lambda value: isinstance(value, str | dict),
    'a source such as "images/test", or { source = ..., list_root = ... }',
)
GROUP: Rule = (lambda value: isinstance(value, list) and value != [], "a list of OOD sets")
ARGUMENT: Rule = (
    lambda value: isinstance(value, str | int | float | list),
    "a text, a number, true, false or a list",
)
KEYS = {"id": SOURCE, "calibration": SOURCE}
KEYS |= dict.fromkeys(("ood", "groups", "network", "preprocessing"), TABLE)
SOURCE_KEYS = {"source": TEXT, "list_root": TEXT}
NETWORK_KEYS = dict.fromkeys(("arch", "weights", "checkpoint", "head"), TEXT) | {"arch_args": TABLE}


class BadBenchmark(InputError):
    """A benchmark file that cannot be used; the message names the file and the key."""


def open_benchmark(text: str, cache_dir: Path | None = None) -> Benchmark:
    """The built-in benchmark of that name, or the one in that FILE.toml; as the `type` of a
    command-line option. cache_dir: where any other name may be that of cached features.

    Raises ArgumentTypeError for an unknown name, and BadBenchmark for a file that is not right.
    """
    if text in BENCHMARKS:
        return dataclasses.replace(BENCHMARKS[text], name=text)
    if text.lower().endswith(".toml"):
        return read(Path(os.path.expanduser(text)))
    if cache_dir is not None and Path(text).name == text and (cache_dir / text).is_dir():
        return dataclasses.replace(UNKNOWN, name=text)
    raise argparse.ArgumentTypeError(
        f"{shown(text)!r} is no benchmark{_nearest(text, BENCHMARKS)}; known are "
        f"{', '.join(BENCHMARKS)}, or give a FILE.toml of your own"
    )


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


@dataclass(frozen=True)
class _Table:
    """A table of the file. name: what stands before its keys in a message."""

    file: Path
    name: str
    values: Mapping[str, Any]

    def refuse(self, key: str, problem: str) -> NoReturn:
        raise BadBenchmark(f"{shown(self.file)}: {shown(self.name + key)} {problem}")

    def checked(self, rules: Mapping[str, Rule]) -> "_Table":
        for key, value in self.values.items():
            if key not in rules:
                near = _nearest(key, rules)
                self.refuse(key, f"is no key{near}; known are {', '.join(rules)}")
            is_right, wanted = rules[key]
            if not is_right(value):
                self.refuse(key, f"must be {wanted}, got {shown(repr(value))}")
        return self

    def all_checked(self, rule: Rule) -> "_Table":
        return self.checked(dict.fromkeys(self.values, rule))

    def table(self, key: str) -> "_Table":
        return _Table(self.file, f"{self.name}{key}.", self.values.get(key, {}))

    def path(self, key: str) -> str | None:
        """Absolute; relative ones start from the folder of the file."""
        text = self.values.get(key)
        if text is None:
            return None
        folder = os.path.dirname(os.path.abspath(self.file))
        return os.path.normpath(os.path.join(folder, os.path.expanduser(text)))

    def source(self, key: str) -> ImageSet:
        """A SOURCE, or { source = SOURCE, list_root = DIR }."""
        value = self.values[key]
        given = value if isinstance(value, dict) else {"source": value}
        inner = _Table(self.file, f"{self.name}{key}.", given).checked(SOURCE_KEYS)
        source, list_root = given.get("source"), inner.path("list_root")
        if source is None:
            inner.refuse("source", "is missing; say where the images are")
        if list_root is not None and not source.lower().endswith(".txt"):
            inner.refuse("list_root", f"goes with a list FILE.txt, not with {shown(source)}")
        if not source.startswith("torchvision:"):
            source = str(inner.path("source"))
        return ImageSet((source,), layout="", list_root=list_root)


def read(file: Path) -> Benchmark:
    """The benchmark in a file that is laid out as this module says.

    Raises BadBenchmark where it cannot be read, is no TOML, has an unknown key or a value of
    another type, lacks `id` or OOD sets, or has a name that a cache cannot have.
    """
    try:
        with open(file, "rb") as content:
            top = _Table(file, "", tomllib.load(content)).checked(KEYS)
    except OSError as error:
        raise BadBenchmark(
            f"{shown(file)} cannot be read: {error.strerror}; give a readable file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadBenchmark(f"{shown(file)} is no TOML: {shown(error)}; correct it") from error
    name = _checked_name(file)
    if "id" not in top.values:
        top.refuse("id", 'is missing; say where the ID test images are, such as id = "images/test"')
    ood = _ood(top.table("ood"))
    if not ood:
        top.refuse("ood", 'has no sets; name one at least, such as Birds = "images/birds"')
    network = top.table("network").checked(NETWORK_KEYS)
    given = _preprocessing(top.table("preprocessing"))
    if network.values and "arch" not in network.values:
        network.refuse("arch", "is missing; name the architecture")
    if {"weights", "checkpoint"} <= network.values.keys():
        network.refuse("weights", "and network.checkpoint exclude each other; give one of them")
    return Benchmark(
        id=top.source("id"),
        calibration=top.source("calibration") if "calibration" in top.values else None,
        ood=ood,
        groups=_groups(top.table("groups"), ood),
        arch=network.values.get("arch"),
        arch_args=_arguments(network.table("arch_args")),
        weights=network.values.get("weights"),
        checkpoint=network.path("checkpoint"),
        head=network.values.get("head"),
        preprocessing=given.over(Preprocessing()),
        given_preprocessing=given,
        name=name,
        file=file,
    )


def _checked_name(file: Path) -> str:
    try:
        cache.check_name(file.stem, "its name without .toml, which the cache has too,")
    except cache.BadCache as error:
        raise BadBenchmark(f"{shown(file)}: {error}; rename the file") from error
    if file.stem.lower() in BENCHMARKS:
        raise BadBenchmark(
            f"{shown(file)}: a benchmark {file.stem.lower()} is built in; rename the file"
        )
    return file.stem


def _ood(table: _Table) -> dict[str, ImageSet]:
    for name in table.values:
        if name.lower() in cache.RESERVED:
            table.refuse(name, "is a name that no OOD set may have; give another")
        _check_name(table, name)
    try:
        cache.check_distinct(table.values)
    except cache.BadCache as error:
        raise BadBenchmark(f"{shown(table.file)}: {error}") from error
    return {name: table.source(name) for name in table.all_checked(SOURCE).values}


def _check_name(table: _Table, name: str) -> None:
    try:
        cache.check_name(name, "is no name that can be used: it")
    except cache.BadCache as error:
        table.refuse(name, str(error))


def _groups(table: _Table, ood: Collection[str]) -> dict[str, tuple[str, ...]]:
    for name, members in table.all_checked(GROUP).values.items():
        _check_name(table, name)
        for member in members:
            if not isinstance(member, str) or member not in ood:
                near = _nearest(str(member), ood)
                known = ", ".join(ood)
                table.refuse(name, f"has no OOD set {shown(repr(member))}{near}; there are {known}")
        if len(set(members)) < len(members):
            table.refuse(name, "names a set twice; name each once")
    return {f"{name} average": tuple(members) for name, members in table.values.items()}


def _arguments(table: _Table) -> dict[str, object]:
    for name in table.values:
        if not name.isidentifier():
            table.refuse(name, "is no name of a Python argument")
    return dict(table.all_checked(ARGUMENT).values)


def _preprocessing(table: _Table) -> RecordedPreprocessing:
    """The steps that are given."""
    from lhact.extraction.images import INTERPOLATIONS  # needs PIL, which eval.py does without

    names = list(INTERPOLATIONS)
    checked = table.checked(
        {
            "resize": (lambda v: type(v) is int and v >= 0, "pixels, 0 to leave the size alone"),
            "squash": (lambda v: isinstance(v, bool), "true or false"),
            "crop": (lambda v: type(v) is int and v >= 1, "pixels, at least 1"),
            "interpolation": (lambda v: v in names, f"one of {', '.join(names)}"),
            "mean": (_are_channels, "three numbers"),
            "std": (lambda v: _are_channels(v) and min(v) > 0, "three numbers above 0"),
        }
    )
    values: dict[str, Any] = {
        key: tuple(map(float, value)) if isinstance(value, list) else value
        for key, value in checked.values.items()
    }
    return RecordedPreprocessing(**values)


def _are_channels(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(v) in (int, float) and math.isfinite(v) for v in value)
    )
