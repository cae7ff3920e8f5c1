"""A result with its scores in, what pictures draw out: which settings of which methods, under which
label, in which look."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lhact.evaluation.activity import Activity
from lhact.evaluation.results import MethodResult, Result, Row
from lhact.evaluation.score import MethodScores
from lhact.methods.compose import DEFAULT_SCORE
from lhact.reporting import plot_style as style


@dataclass(frozen=True)
class Shown:
    """One method as it is drawn: its only setting, or the best of several."""

    label: str
    result: MethodResult
    scores: MethodScores
    look: style.Look


@dataclass(frozen=True)
class View:
    """What is drawn. scored: in the order of result.all_methods. activity: None where there is
    none; the pictures of activations are then left out."""

    result: Result
    scored: Sequence[MethodScores]
    activity: Activity | None = None

    @cached_property
    def shown(self) -> list[Shown]:
        methods = self.result.all_methods
        names = [method.method for method in methods]
        looks = style.looks(names, style.METHOD_COLOURS)
        return [
            Shown(_label(self.result, methods[i]), methods[i], self.scored[i], looks[names[i]])
            for i in pictured(self.result)
        ]

    @cached_property
    def before(self) -> Shown | None:
        """Plain energy, which the scores of a method are drawn beside."""
        found = (shown for shown in self.shown if shown.result.method == DEFAULT_SCORE)
        return next(found, None)

    @cached_property
    def sets(self) -> dict[str, style.Look]:
        names = [name for name in self.scored[0].scores if name != "id"]
        return style.looks(names, style.SET_COLOURS)


def pictured(result: Result) -> list[int]:
    """Which of result.all_methods are drawn method by method: of several settings of one method
    the one with the lowest average FPR95, as the table marks it."""
    settings: dict[str, list[int]] = {}
    for number, method in enumerate(result.all_methods):
        settings.setdefault(method.method, []).append(number)

    def rank(number: int) -> tuple[bool, float]:
        method = result.all_methods[number]
        return method.tied, method.average.metrics["fpr95"]

    return [min(group, key=rank) for group in settings.values()]


def varying(result: Result, method: MethodResult) -> list[str]:
    """Parameters that differ between the settings of that method. A percentile stands for its
    threshold."""
    others = [other for other in result.all_methods if other.method == method.method]
    keys = [
        key
        for key, value in method.parameters.items()
        if any(other.parameters.get(key) != value for other in others)
    ]
    return [key for key in keys if f"{key}_percentile" not in keys]


def _label(result: Result, method: MethodResult) -> str:
    given = [f"{key} {method.parameters[key]:.4g}" for key in varying(result, method)]
    return " ".join([method.method, ", ".join(given)]).strip()


def interval(row: Row, metric: str) -> tuple[float, float] | None:
    """The 95 % interval of that metric, where there is one."""
    return row.uncertainty.intervals.get(metric) if row.uncertainty else None
