"""Names in, methods out: rectifiers and one score joined by `+`, with the parameters of each."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lhact.methods.rectify import RECTIFIERS, Rectifier
from lhact.methods.scores import SCORES, Score

# The rows of Table 6 of the LHAct paper, in its order.
TABLE6 = ("msp", "odin", "energy", "bats", "react", "bfact", "lhact")
DEFAULT_SCORE = "energy"


class BadMethod(Exception):
    """An unknown method or parameter, or a value that it cannot take; the message lists what is known."""


class Step(NamedTuple):
    """A rectifier or a score by name, with its parameters; `X_percentile` still stands for X until `resolve`."""

    name: str
    entry: Rectifier | Score
    parameters: dict[str, Any]


class Method(NamedTuple):
    """rectifiers are applied from left to right, then the score."""

    name: str
    rectifiers: tuple[Step, ...]
    score: Step

    @property
    def steps(self) -> tuple[Step, ...]:
        return (*self.rectifiers, self.score)

    def parameters(self) -> dict[str, Any]:
        """All parameters by name; by `STEP.NAME` where two steps share a name.

        Those of a score that is not named, as energy behind a lone rectifier, only where they are not the defaults.
        """
        named = self.score.name in self.name.split("+") or self.score.parameters != self.score.entry.parameters
        steps = self.steps if named else self.rectifiers
        names = [name for step in steps for name in step.parameters]
        return {
            (f"{step.name}.{name}" if names.count(name) > 1 else name).rstrip("_"): value
            for step in steps
            for name, value in step.parameters.items()
        }


def known_methods() -> list[str]:
    """Names that stand alone: every rectifier (with the energy score) and every score; Table 6's first, in its order."""
    return [*TABLE6, *(name for name in (*RECTIFIERS, *SCORES) if name not in TABLE6)]


def expand(names: Sequence[str]) -> list[str]:
    """`table6` and `all` replaced by the methods they stand for; each method once, where it is named first."""
    groups = {"table6": TABLE6, "all": known_methods()}
    return list(dict.fromkeys(member for name in names for member in groups.get(name, (name,))))


def parse(name: str, published: bool = False) -> Method:
    """The method of that name with its default parameters; with the published constants where `published`.

    Raises BadMethod for a name that is none, listing the known ones.
    """
    parts = name.split("+")
    score = parts.pop() if parts[-1] in SCORES else DEFAULT_SCORE
    for part in parts:
        if part not in RECTIFIERS:
            where = "; a score comes last and once" if part in SCORES else ""
            raise BadMethod(
                f"unknown method {name!r}{where}; rectifiers: {', '.join(RECTIFIERS)}; scores: {', '.join(SCORES)}; "
                "joined by '+': rectifiers, then one score"
            )
    if score == DEFAULT_SCORE and len(parts) == 1:
        name = parts[0]
    return Method(name, tuple(_step(part, RECTIFIERS[part], published) for part in parts), _step(score, SCORES[score], published))


def _step(name: str, entry: Rectifier | Score, published: bool) -> Step:
    parameters = dict(entry.parameters)
    if published:
        for key, value in getattr(entry, "published", {}).items():
            parameters = _replace(parameters, key, value)
    return Step(name, entry, parameters)


def _replace(parameters: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A threshold takes the place of its percentile, and a percentile that of its threshold."""
    twin = key.removesuffix("_percentile") if key.endswith("_percentile") else f"{key}_percentile"
    return {(key if name == twin else name): (value if name in (key, twin) else old) for name, old in parameters.items()}


class Setting(NamedTuple):
    """METHOD.PARAMETER=VALUE as the command line has it: for a rectifier or score wherever it is used, or for one whole method."""

    target: str
    parameter: str
    value: Any

    def __str__(self) -> str:
        return f"{self.target}.{self.parameter}={self.value:g}"


def parse_setting(text: str) -> Setting:
    """Raises BadMethod if the text is not METHOD.PARAMETER=VALUE with a number as the value."""
    left, equals, value = text.partition("=")
    target, dot, parameter = left.rpartition(".")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (equals and dot and target and parameter) or math.isnan(number):
        raise BadMethod(f"wanted METHOD.PARAMETER=NUMBER, such as lhact.high_percentile=95, got {text!r}")
    return Setting(target, parameter, int(number) if number.is_integer() else number)


def parse_sweep(text: str) -> list[Setting]:
    """METHOD.PARAMETER=V1,V2,... as one setting per value. Raises BadMethod as parse_setting does."""
    left, _, values = text.partition("=")
    return [parse_setting(f"{left}={value}") for value in values.split(",")]


def _twins(step: Step, name: str) -> tuple[str, ...]:
    """A threshold and its percentile are two names of one parameter; any other parameter has one."""
    base = name.removesuffix("_percentile")
    return (base, f"{base}_percentile") if f"{base}_percentile" in step.entry.parameters else (name,)


def _settable(step: Step) -> dict[str, str]:
    """What a setting may name -> the function's argument; a Python keyword has an underscore behind it there."""
    return {twin.rstrip("_"): twin for name in step.parameters for twin in _twins(step, name)}


def _check_value(setting: Setting) -> None:
    name, value = setting.parameter, setting.value
    wanted = None
    if name.endswith("percentile") and not 0 <= value <= 100:
        wanted = "between 0 and 100"
    elif name in ("k", "bank") and (not isinstance(value, int) or value < 1):
        wanted = "a whole number from 1 on"
    elif name == "dim" and (not isinstance(value, int) or value < 0):
        wanted = "a whole number from 1 on, or 0 for the paper's choice"
    elif name in ("order", "temperature") and not 0 < value < math.inf:
        wanted = "a number above 0"
    elif name not in ("low", "high") and math.isinf(value):
        wanted = "a finite number"
    if wanted:
        raise BadMethod(f"{setting.target}.{name} must be {wanted}, got {value}")


def apply(method: Method, setting: Setting) -> Method | None:
    """The method with that setting; None where the setting is about another one.

    Raises BadMethod for a parameter that the step does not have or a value that it cannot take.
    """
    whole = setting.target == method.name
    targets = [step for step in method.steps if whole or step.name == setting.target]
    if not targets:
        return None
    matching = [step for step in targets if setting.parameter in _settable(step)]
    if not matching:
        known = ", ".join(name for step in targets for name in _settable(step))
        raise BadMethod(f"{setting.target} has no parameter {setting.parameter!r}; it has: {known or 'none'}")
    if len({step.name for step in matching}) > 1:
        choices = " or ".join(f"{step.name}.{setting.parameter}" for step in matching)
        raise BadMethod(f"{setting.target}.{setting.parameter} could mean {choices}; name the one")
    _check_value(setting)
    changed = [_set(step, setting) if step in matching else step for step in method.steps]
    return method._replace(rectifiers=tuple(changed[:-1]), score=changed[-1])


def _set(step: Step, setting: Setting) -> Step:
    key = _settable(step)[setting.parameter]
    parameters = {
        (key if name in _twins(step, key) else name): (setting.value if name in _twins(step, key) else value)
        for name, value in step.parameters.items()
    }
    return step._replace(parameters=parameters)


def variants(
    names: Sequence[str], settings: Sequence[Setting], sweeps: Sequence[Sequence[Setting]], published: bool
) -> list[Method]:
    """Every named method with the settings applied, and once for each combination of the sweeps that are about it.

    Raises BadMethod for unknown names, for a setting or sweep that is about none of the methods, and for two about one parameter.
    """
    given = [(setting.target, setting.parameter.removesuffix("_percentile")) for setting in (*settings, *(s[0] for s in sweeps))]
    for target, parameter in given:
        if given.count((target, parameter)) > 1:
            raise BadMethod(f"{target}.{parameter} is given twice; give one value, or a sweep of several")
    methods = []
    used = set()
    for name in expand(names):
        versions = [parse(name, published)]
        for position, choices in enumerate([*([setting] for setting in settings), *sweeps]):
            applied = [apply(version, choice) for version in versions for choice in choices]
            if None not in applied:
                versions = applied
                used.add(position)
        methods += versions
    for position, choices in enumerate([*([setting] for setting in settings), *sweeps]):
        if position not in used:
            raise BadMethod(f"{choices[0]} is about none of the methods asked for: {', '.join(expand(names))}")
    for method in methods:
        for step in method.steps:
            _check_order(method.name, step.parameters)
    # The same method may have been named twice: as lhact and as lhact+energy, or by a value given twice.
    return list({(method.name, str(method.parameters())): method for method in methods}.values())


def percentiles_wanted(methods: Sequence[Method]) -> list[float]:
    """The percentiles of calibration activations that stand for thresholds in any of the methods."""
    return sorted({value for method in methods for step in method.steps for _, _, value in _open_thresholds(step)})


def _open_thresholds(step: Step) -> list[tuple[str, str, float]]:
    """(threshold, its percentile's name, that percentile) where the threshold is not known yet."""
    return [
        (name.removesuffix("_percentile"), name, value)
        for name, value in step.parameters.items()
        if name.endswith("_percentile") and name.removesuffix("_percentile") not in step.parameters
    ]


def _check_order(name: str, parameters: Mapping[str, Any]) -> None:
    if parameters.get("low", -math.inf) > parameters.get("high", math.inf):
        raise BadMethod(f"{name}: low {parameters['low']:g} lies above high {parameters['high']:g}")


def resolve(method: Method, values: Mapping[float, float]) -> Method:
    """The method with every percentile's threshold beside it; `values` maps percentile to activation.

    Raises BadMethod if a step's `low` then lies above its `high`.
    """
    steps = []
    for step in method.steps:
        parameters = {}
        thresholds = {percentile_name: name for name, percentile_name, _ in _open_thresholds(step)}
        for name, value in step.parameters.items():
            if name in thresholds:
                parameters[thresholds[name]] = values[value]
            parameters[name] = value
        _check_order(method.name, parameters)
        steps.append(step._replace(parameters=parameters))
    return method._replace(rectifiers=tuple(steps[:-1]), score=steps[-1])


def bind(step: Step, given: Mapping[str, Any]) -> tuple[Callable, tuple[str, ...]]:
    """(function of what changes from image to image, the names of those arguments).

    given: `calibration`, `labels`, `weight` and `bias`. The step's `fit` runs here, once.
    """
    offered = {**given, **step.parameters}
    if step.entry.fit is not None:
        names = inspect.signature(step.entry.fit).parameters
        offered.update(step.entry.fit(**{name: offered[name] for name in names}))
    names = inspect.signature(step.entry.function).parameters
    inputs = tuple(name for name in names if name in ("activations", "logits"))
    constants = {name: offered[name] for name in names if name in offered and name not in inputs}
    return functools.partial(step.entry.function, **constants), inputs
