"""A cache folder and names of methods in, results out that a notebook shows as a table, and that
come as arrays, as a data frame and as pictures.

    evaluated = lhact.evaluate("cache/imagenet/resnet50", methods=["lhact", "energy"])
    evaluated                       # a table
    evaluated.scores["lhact"]["SUN"]
    evaluated.plot("scores")
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lhact import cache
from lhact.benchmarks.builtin import BENCHMARKS, UNKNOWN
from lhact.devices import gpu_arithmetic, pick_device
from lhact.evaluation.evaluate import Answer, Question
from lhact.evaluation.evaluate import evaluate as answer_of
from lhact.evaluation.results import Result
from lhact.evaluation.uncertainty import Bootstrap
from lhact.methods.compose import parse_setting
from lhact.reporting import lines, text
from lhact.reporting.page import main_table

if TYPE_CHECKING:
    import pandas


class Pictures(list[tuple[str, Any]]):
    """(name, matplotlib Figure) pairs that a notebook shows below each other."""

    def _repr_html_(self) -> str:
        from lhact.reporting.plots import render

        return "\n".join(render(figure, "svg").decode() for _, figure in self)


@dataclass(frozen=True)
class Evaluated:
    """What `lhact.evaluate` found. result: as eval.py reports it; scores: by method and set."""

    answer: Answer

    @property
    def result(self) -> Result:
        return self.answer.result

    @property
    def scores(self) -> dict[str, Mapping[str, np.ndarray]]:
        """Method (with the parameters that vary, where it appears with several settings) -> set ->
        (images,) float32 scores in the order of the cache, higher = more in-distribution."""
        named = zip(lines.labels(self.result), self.answer.scored, strict=True)
        return {label: part.scores for label, part in named}

    def __str__(self) -> str:
        return text.table(lines.Table([self.result]))

    def _repr_html_(self) -> str:
        return main_table(self.result, lines.COMPARABLE)

    def to_pandas(self) -> "pandas.DataFrame":
        """A row for each method and set, all metrics in percent, not rounded; the columns are the
        keys of `eval.py --format json`. ImportError without pandas."""
        import pandas

        content: Any = self.result.to_json()
        return pandas.DataFrame([*content["results"], *content["baseline"]])

    def plot(self, name: str = "scores") -> Pictures:
        """The pictures of that name in lhact.reporting.plots.PLOTS: scores, roc, rectification,
        channels, sweep, comparison, published. ValueError for another name, ImportError without
        matplotlib."""
        from lhact.reporting import plots

        if name not in plots.PLOTS:
            raise ValueError(f"a picture must be one of {', '.join(plots.PLOTS)}, got {name!r}")
        activity = plots.activity_of(self.answer)
        return Pictures(plots.figures(self.result, self.answer.scored, activity, [name]))


def evaluate(
    folder: str | Path,
    methods: Sequence[str] = ("lhact", "energy"),
    settings: Mapping[str, float] | None = None,
    bootstrap: int = 0,
    device: str = "cpu",
) -> Evaluated:
    """What eval.py does with the cache in that folder, cache/<benchmark>/<name>.

    methods, settings: as of --methods and --set, such as {"lhact.order": 3}. bootstrap: resamples
    for 95 % intervals, 0 for none.

    Raises ValueError, BadCache or BadMethod among them, for what eval.py refuses.
    """
    place = Path(os.path.expanduser(folder))
    # The folder lies under the benchmark's name.
    name = place.resolve().parent.name
    benchmark = dataclasses.replace(BENCHMARKS.get(name, UNKNOWN), name=name)
    opened = cache.open_cache(place, list(benchmark.ood))
    question = Question(
        benchmark=benchmark,
        methods=tuple(methods),
        settings=tuple(parse_setting(f"{key}={value}") for key, value in (settings or {}).items()),
        bootstrap=Bootstrap(bootstrap) if bootstrap else None,
        device=pick_device(device),
    )
    with gpu_arithmetic(tf32=False):
        return Evaluated(answer_of(opened, place.resolve().name, question))
