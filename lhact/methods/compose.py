"""Names and settings in, methods out: rectifiers and one score joined by `+`, with the parameters
of each. What must be learnt from ID data is not known yet; see fit.py."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lhact.methods.entries import Entry, Percentile, Rectifier, Value, parameter_range
from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES

# The rows of Table 6 of the LHAct paper, in its order.
TABLE6 = ("msp", "odin", "energy", "bats", "react", "bfact", "lhact")
DEFAULT_SCORE = "energy"
# What OpenOOD and pytorch-ood call the same methods.
NAMES_OF_PEERS = {
    "ebo": "energy",
    "mls": "maxlogit",
    "max_logit": "maxlogit",
    "mds": "mahalanobis",
    "ash": "ash-b",
    "kl_matching": "klm",
}
PERCENTILE = "_percentile"


class BadMethod(ValueError):
    """An unknown method or parameter, a value that it cannot take, or a cache that cannot serve it;
    the message says what is known or wanted."""


@dataclass(frozen=True)
class Step:
    """A rectifier or a score by name, with its parameters."""

    name: str
    entry: Entry
    parameters: Mapping[str, Value]


@dataclass(frozen=True)
class Method:
    """The rectifiers are applied from left to right, then the score. Two methods are equal when
    they compute the same."""

    name: str
    rectifiers: tuple[Step, ...]
    score: Step

    @property
    def steps(self) -> tuple[Step, ...]:
        return (*self.rectifiers, self.score)

    @property
    def perturbed(self) -> bool:
        """Whether it scores images that ODIN has perturbed."""
        return getattr(self.score.entry, "perturbed", False)

    @property
    def shown_steps(self) -> tuple[Step, ...]:
        """The steps whose parameters are shown: a score that is not named, as energy behind a lone
        rectifier, only where they are not the defaults."""
        named = self.score.name in self.name.split("+")
        return (
            self.steps if named or self.score != default_step(self.score.name) else self.rectifiers
        )

    def parameters(self) -> dict[str, float]:
        """What was asked for, spelled as on the command line; see `spell`."""
        return spell({step.name: step.parameters for step in self.shown_steps})


def spell(steps: Mapping[str, Mapping[str, Value]]) -> dict[str, float]:
    """Parameters by step as one mapping, as the command line and JSON name them.

    A percentile is spelled `NAME_percentile`, behind `NAME` where its value is known; a name that
    two steps share is `STEP.NAME`. A parameter that is left to its method's rule has no value yet
    and is left out.
    """
    spelled: list[tuple[str, str, float]] = []
    for step, parameters in steps.items():
        for argument, value in parameters.items():
            name = argument.rstrip("_")  # a Python keyword has an underscore behind it
            number = value.value if isinstance(value, Percentile) else value
            if number is not None:
                spelled.append((step, name, number))
            if isinstance(value, Percentile):
                spelled.append((step, name + PERCENTILE, value.percent))
    names = [name for _, name, _ in spelled]
    return {
        f"{step}.{name}" if names.count(name) > 1 else name: value for step, name, value in spelled
    }


def known_methods() -> list[str]:
    """Names that stand alone: every rectifier (with the energy score) and every score; Table 6's
    first, in its order."""
    return [*TABLE6, *(name for name in (*RECTIFIERS, *SCORES) if name not in TABLE6)]


def expand(names: Sequence[str]) -> list[str]:
    """`table6` and `all` replaced by the methods they stand for; each method once, where it is
    named first."""
    groups = {"table6": TABLE6, "all": known_methods()}
    return list(dict.fromkeys(member for name in names for member in groups.get(name, (name,))))


def default_step(name: str, published: bool = False) -> Step:
    """The rectifier or score of that name with its default parameters, or the published ones."""
    entry: Entry = RECTIFIERS[name] if name in RECTIFIERS else SCORES[name]
    constants = entry.published if published and isinstance(entry, Rectifier) else {}
    return Step(name, entry, {**entry.parameters, **constants})


def parse(name: str, published: bool = False) -> Method:
    """The method of that name with its default parameters; with the published constants where
    `published`.

    Raises BadMethod for a name that is none, listing the known ones.
    """
    parts = name.split("+")
    score = parts.pop() if parts[-1] in SCORES else DEFAULT_SCORE
    for part in parts:
        if part not in RECTIFIERS:
            raise BadMethod(_unknown(name, part))
    if score == DEFAULT_SCORE and len(parts) == 1:
        name = parts[0]
    rectifiers = tuple(default_step(part, published) for part in parts)
    return Method(name, rectifiers, default_step(score, published))


def _unknown(name: str, part: str) -> str:
    known = [*RECTIFIERS, *SCORES]
    near = NAMES_OF_PEERS.get(part.lower()) or next(
        iter(difflib.get_close_matches(part.lower().rstrip("0123456789@"), known, n=1, cutoff=0.6)),
        "",
    )
    near = f"did you mean {near!r}? " if near and part not in SCORES else ""
    place = "a score comes last and once; " if part in SCORES else ""
    return (
        f"unknown method {name!r}; {place}{near}rectifiers: {', '.join(RECTIFIERS)}; "
        f"scores: {', '.join(SCORES)}; joined by '+': rectifiers, then one score"
    )


@dataclass(frozen=True)
class Setting:
    """METHOD.PARAMETER=VALUE as the command line has it: for a rectifier or score wherever it is
    used, or for one whole method."""

    target: str
    parameter: str
    value: float | Percentile

    @property
    def spelled(self) -> str:
        return self.parameter + (PERCENTILE if isinstance(self.value, Percentile) else "")

    @property
    def number(self) -> float:
        return self.value.percent if isinstance(self.value, Percentile) else self.value

    def __str__(self) -> str:
        return f"{self.target}.{self.spelled}={self.number:g}"


def parse_setting(text: str) -> Setting:
    """Raises BadMethod if the text is not METHOD.PARAMETER=VALUE with a number as the value."""
    left, equals, value = text.partition("=")
    target, dot, parameter = left.rpartition(".")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (equals and dot and target and parameter) or math.isnan(number):
        raise BadMethod(
            f"wanted METHOD.PARAMETER=NUMBER, such as lhact.high_percentile=95, got {text!r}"
        )
    number = int(number) if number.is_integer() else number
    base = parameter.removesuffix(PERCENTILE)
    if base == parameter or not base:
        return Setting(target, parameter, number)
    if not 0 <= number <= 100:
        raise BadMethod(f"{left} must be between 0 and 100, got {number}")
    return Setting(target, base, Percentile(number))


def parse_sweep(text: str) -> list[Setting]:
    """METHOD.PARAMETER=V1,V2,... as one setting per value. Raises BadMethod as parse_setting."""
    left, _, values = text.partition("=")
    return [parse_setting(f"{left}={value}") for value in values.split(",")]


def _settable(step: Step) -> list[str]:
    """The spellings that a setting may use; a threshold is a number or a percentile."""
    names = []
    for name, default in step.entry.parameters.items():
        names.append(name.rstrip("_"))
        if isinstance(default, Percentile):
            names.append(name + PERCENTILE)
    return names


def apply(method: Method, setting: Setting) -> Method | None:
    """The method with that setting; None where the setting is about another one.

    Raises BadMethod for a parameter that the step does not have or a value that it cannot take.
    """
    targets = [
        step
        for step in method.steps
        if setting.target == method.name or step.name == setting.target
    ]
    if not targets:
        return None
    matching = {step.name for step in targets if setting.spelled in _settable(step)}
    if not matching:
        known = ", ".join(name for step in targets for name in _settable(step))
        raise BadMethod(
            f"{setting.target} has no parameter {setting.spelled!r}; it has: {known or 'none'}"
        )
    if len(matching) > 1:
        choices = " or ".join(
            f"{step.name}.{setting.spelled}" for step in targets if step.name in matching
        )
        raise BadMethod(f"{setting.target}.{setting.spelled} could mean {choices}; name the one")
    changed = [_set(step, setting) if step.name in matching else step for step in method.steps]
    return dataclasses.replace(method, rectifiers=tuple(changed[:-1]), score=changed[-1])


def _set(step: Step, setting: Setting) -> Step:
    name = next(name for name in step.parameters if name.rstrip("_") == setting.parameter)
    value = setting.value
    if not isinstance(value, Percentile):
        wanted = parameter_range(step.entry, name)
        if not wanted.holds(value):
            raise BadMethod(
                f"{setting.target}.{setting.parameter} must be {wanted.wanted}, got {value}"
            )
    return dataclasses.replace(step, parameters={**step.parameters, name: value})


def variants(
    names: Sequence[str],
    settings: Sequence[Setting],
    sweeps: Sequence[Sequence[Setting]],
    published: bool,
) -> list[Method]:
    """Every named method with the settings applied, and once for each combination of the sweeps
    that are about it.

    Raises BadMethod for unknown names, for a setting or sweep that is about none of the methods,
    and for two about one parameter.
    """
    choices = [*([setting] for setting in settings), *sweeps]
    given = [(choice[0].target, choice[0].parameter) for choice in choices]
    for target, parameter in given:
        if given.count((target, parameter)) > 1:
            raise BadMethod(
                f"{target}.{parameter} is given twice; give one value, or a sweep of several"
            )
    methods: list[Method] = []
    used = set()
    for name in expand(names):
        versions = [parse(name, published)]
        for position, choice in enumerate(choices):
            applied = [apply(version, setting) for version in versions for setting in choice]
            if None not in applied:
                versions = [version for version in applied if version is not None]
                used.add(position)
        methods += versions
    for position, choice in enumerate(choices):
        if position not in used:
            raise BadMethod(
                f"{choice[0]} is about none of the methods asked for: {', '.join(expand(names))}"
            )
    for method in methods:
        for step in method.steps:
            check_order(method.name, step.parameters)
    # The same method may have been named twice: as lhact and as lhact+energy, or by a value given
    # twice.
    return list({(method.name, str(method.parameters())): method for method in methods}.values())


def check_order(name: str, parameters: Mapping[str, Value]) -> None:
    """Raises BadMethod if the step's `low` lies above its `high`, where both are numbers."""
    low, high = parameters.get("low"), parameters.get("high")
    if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
        raise BadMethod(f"{name}: low {low:g} lies above high {high:g}")
