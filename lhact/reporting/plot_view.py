"""A result with its scores in, what pictures draw out: which settings of which methods, under which
label, in which look."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lhact.evaluation.activity import Activity, measure
from lhact.evaluation.evaluate import Answer
from lhact.evaluation.results import MethodResult, Result, Row
from lhact.evaluation.score import MethodScores, Progress
from lhact.methods.compose import DEFAULT_SCORE
from lhact.reporting import plot_style as style
from lhact.reporting.lines import best_settings, varying


@dataclass(frozen=True)
class Shown:
    """One method as it is drawn: its only setting, or the best of several."""

    label: str
    result: MethodResult
    scores: MethodScores
    look: style.Look

    def row(self, dataset: str) -> Row:
        return next(row for row in self.result.rows if row.dataset == dataset)


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
            for i in best_settings(self.result)
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

    @property
    def colours(self) -> dict[str, str]:
        """Set -> that of its look."""
        return {name: look.colour for name, look in self.sets.items()}


def activity_of(answer: Answer, progress: Progress = lambda rows: None) -> Activity:
    """That of the methods which are drawn."""
    drawn = [answer.scored[number].fitted for number in best_settings(answer.result)]
    return measure(answer.cache, drawn, drawn[0].head.weight.device, progress)


def _label(result: Result, method: MethodResult) -> str:
    given = [f"{key} {method.parameters[key]:.4g}" for key in varying(result, method)]
    return " ".join([method.method, ", ".join(given)]).strip()
