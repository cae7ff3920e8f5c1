"""Methods, calibration activations and the linear head in; fitted methods out: functions from
activations to scores, with the parameters that they use.

    fitted = fit(parse("lhact+vim"), Calibration(batches, labels), Head(weight, bias))
    scores = fitted(activations)          # (images,), higher = more in-distribution
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lhact.methods.calibrate import percentiles, require_reiterable
from lhact.methods.compose import BadMethod, Method, Step, check_order, spell
from lhact.methods.entries import Percentile, Rectifier, Value

Result = TypeVar("Result")
# What a function may read that changes from image to image.
INPUTS = ("activations", "logits")


@dataclass(frozen=True, eq=False)
class Head:
    """The linear layer that makes the logits: weight (classes, channels), bias (classes,)."""

    weight: Tensor
    bias: Tensor

    def logits(self, activations: Tensor) -> Tensor:
        return torch.addmm(self.bias, activations, self.weight.T)


@dataclass(frozen=True, eq=False)
class Calibration:
    """ID images to learn from. batches: (rows, channels) float32 tensors, iterable any number of
    times. labels: (rows,) int64 over all of them, None where they are not known. on_cpu: the same
    rows in main memory, where percentiles are counted; None: those of `batches`, copied there."""

    batches: Iterable[Tensor]
    labels: Tensor | None = None
    on_cpu: Iterable[Tensor] | None = None


@dataclass(frozen=True, eq=False)
class FittedStep:
    """A rectifier or a score that knows all it needs. inputs: the names of what changes from image
    to image (`activations`, `logits`). parameters: those used, a percentile with its threshold."""

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[str, ...]
    constants: Mapping[str, object]
    parameters: Mapping[str, Value]

    def __call__(self, **inputs: Tensor) -> Tensor:
        return self.function(**{name: inputs[name] for name in self.inputs}, **self.constants)


@dataclass(frozen=True, eq=False)
class FittedMethod:
    """Activations (images, channels) -> scores (images,), higher = more in-distribution.

    method: what was asked for. Fitted together, methods that begin with the same rectifiers hold
    the same FittedStep objects.
    """

    method: Method
    rectifiers: tuple[FittedStep, ...]
    score: FittedStep
    head: Head

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def perturbed(self) -> bool:
        """Whether it scores images that ODIN has perturbed."""
        return self.method.perturbed

    @property
    def parameters(self) -> dict[str, float]:
        """Those used, by the names of the command line and JSON."""
        shown = len(self.method.shown_steps)
        return spell(
            {step.name: step.parameters for step in (*self.rectifiers, self.score)[:shown]}
        )

    def __call__(self, activations: Tensor) -> Tensor:
        for rectifier in self.rectifiers:
            activations = rectifier(activations=activations)
        inputs = {"activations": activations}
        if "logits" in self.score.inputs:
            inputs["logits"] = self.head.logits(activations)
        return self.score(**inputs)


def needs_labels(method: Method) -> bool:
    """Whether it learns from the class numbers of calibration images."""
    fits = [step.entry.fit for step in method.steps if step.entry.fit is not None]
    return any("labels" in inspect.signature(function).parameters for function in fits)


def fit(method: Method, calibration: Calibration, head: Head) -> FittedMethod:
    """The method with its thresholds and statistics, learnt from the calibration activations.

    Raises BadMethod where it needs what is not there, such as labels, or cannot take a threshold.
    """
    return fit_all([method], calibration, head)[0]


def fit_all(
    methods: Sequence[Method],
    calibration: Calibration,
    head: Head,
    left_out: Callable[[Method, BadMethod], None] | None = None,
) -> list[FittedMethod]:
    """Every method, as `fit` does it; all percentiles come from one reading of the calibration
    set, and each step that several methods begin with is fitted once.

    left_out: is told of each method that cannot be fitted, instead of BadMethod being raised. Those
    that lack labels come first, before any work is done.
    """
    fitter = _Fitter(calibration, head)

    def attempt(function: Callable[[Method], Result], method: Method) -> Result | None:
        try:
            return function(method)
        except BadMethod as error:
            if left_out is None:
                raise
            left_out(method, error)
            return None

    checked = [method for method in methods if attempt(fitter.check, method)]
    fitter.read_percentiles(checked)
    return [fitted for method in checked if (fitted := attempt(fitter.fit, method)) is not None]


@dataclass(frozen=True)
class _Rectified:
    """A calibration set as a step sees it: rectified by the steps before."""

    batches: Iterable[Tensor]
    rectifiers: tuple[FittedStep, ...]

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            for rectifier in self.rectifiers:
                batch = rectifier(activations=batch)
            yield batch


class _Fitter:
    """Remembers the steps that are fitted already, and the percentiles."""

    def __init__(self, calibration: Calibration, head: Head) -> None:
        require_reiterable(calibration.batches, "calibration activations")
        self.calibration, self.head = calibration, head
        self.thresholds: dict[float, float] = {}
        self.steps: dict[tuple[object, ...], FittedStep] = {}

    def check(self, method: Method) -> Method:
        """Raises BadMethod where the method needs labels and there are none."""
        if self.calibration.labels is None and needs_labels(method):
            raise BadMethod(
                f"{method.name}: needs labels: calibration images in one folder for each class"
            )
        return method

    def read_percentiles(self, methods: Sequence[Method]) -> None:
        """Finds the thresholds of all methods in one reading of the calibration set."""
        values = [
            v for method in methods for step in method.steps for v in step.parameters.values()
        ]
        percents = sorted({value.percent for value in values if isinstance(value, Percentile)})
        found = percentiles(self.calibration.on_cpu or self.calibration.batches, percents)
        self.thresholds = dict(zip(percents, found, strict=True))

    def fit(self, method: Method) -> FittedMethod:
        rectifiers: tuple[FittedStep, ...] = ()
        for step in method.rectifiers:
            rectifiers = (*rectifiers, self._fit_step(step, rectifiers, method.name))
        score = self._fit_step(method.score, rectifiers, method.name)
        return FittedMethod(method, rectifiers, score, self.head)

    def _fit_step(self, step: Step, before: tuple[FittedStep, ...], name: str) -> FittedStep:
        key = (before, step.name, tuple(step.parameters.items()))
        if key not in self.steps:
            try:
                self.steps[key] = self._fitted(step, before, name)
            except BadMethod:
                raise
            except ValueError as error:
                raise BadMethod(f"{name}: {error}") from error
        return self.steps[key]

    def _fitted(self, step: Step, before: tuple[FittedStep, ...], name: str) -> FittedStep:
        shown = {key: self._with_value(value) for key, value in step.parameters.items()}
        values = {key: v.value if isinstance(v, Percentile) else v for key, v in shown.items()}
        check_order(name, values)
        offered: dict[str, object] = {
            "calibration": _Rectified(self.calibration.batches, before),
            "labels": self.calibration.labels,
            "weight": self.head.weight,
            "bias": self.head.bias,
            **values,
        }
        if step.entry.fit is not None:
            wanted = inspect.signature(step.entry.fit).parameters
            learnt = step.entry.fit(**{key: offered[key] for key in wanted})
            offered |= learnt
            # A parameter that was left to the method's rule shows the value that the rule gave.
            shown |= {key: learnt[key] for key in shown if key in learnt}  # type: ignore[misc]
        names = inspect.signature(step.entry.function).parameters
        inputs = tuple(key for key in names if key in INPUTS)
        constants = {key: offered[key] for key in names if key in offered and key not in inputs}
        fitted = FittedStep(step.name, step.entry.function, inputs, constants, shown)
        if isinstance(step.entry, Rectifier):
            # It sees one image, so that thresholds that it cannot take are refused before the work.
            fitted(activations=next(iter(_Rectified([self._first_row], before))))
        return fitted

    @functools.cached_property
    def _first_row(self) -> Tensor:
        return next(iter(self.calibration.batches))[:1]

    def _with_value(self, value: Value) -> Value:
        if not isinstance(value, Percentile):
            return value
        return dataclasses.replace(value, value=self.thresholds[value.percent])
