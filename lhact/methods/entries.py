"""What an entry of RECTIFIERS or SCORES says of itself, and what values a parameter takes.

A parameter's type and range stand in the signature of the function (or of its `fit`) that takes it:

    def bfact(activations: Tensor, high: Threshold, order: Positive = 2) -> Tensor

A plain `float` means any finite number, a plain `int` a whole number from 1 on, so a new method
needs no edit elsewhere.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, get_args, get_type_hints

from torch import Tensor


@dataclass(frozen=True)
class Percentile:
    """A threshold given as that percentile of all calibration activations, every channel together.

    value: the activation there, once it is known. ValueError for a percentage outside 0 to 100.
    """

    percent: float
    value: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.percent <= 100:
            raise ValueError(f"a percentile must be between 0 and 100, got {self.percent:g}")


# None stands for the rule of the method's paper; `fit` then returns the value used under the
# parameter's name.
Value = float | int | Percentile | None


@dataclass(frozen=True)
class Range:
    """The numbers that a parameter takes. wanted: for messages, as in `k must be a whole number
    from 1 on`."""

    wanted: str
    holds: Callable[[float], bool]


_WHOLE = Range("a whole number from 1 on", lambda value: float(value).is_integer() and value >= 1)
_FINITE = Range("a finite number", math.isfinite)

Threshold = Annotated[float, Range("a number", lambda value: not math.isnan(value))]
Positive = Annotated[float, Range("a number above 0", lambda value: 0 < value < math.inf)]
Percent = Annotated[float, Range("between 0 and 100", lambda value: 0 <= value <= 100)]
Finite = Annotated[float, _FINITE]
Count = Annotated[int, _WHOLE]


@dataclass(frozen=True)
class Rectifier:
    """A function of activations that eval.py can put before any score.

    function: (activations, **parameters) -> activations, a new tensor.
    parameters: defaults on any network; Percentile(p) where the value is that percentile of the
        calibration activations.
    published: the paper's constants, which replace the defaults where the network is the paper's,
        torchvision's ResNet-50 with IMAGENET1K_V1 weights. They mean nothing for another network.
    fit: (calibration, ...) -> further arguments of `function`, by name, and parameters that it
        decided. `calibration` can be iterated any number of times and yields (rows, channels)
        float32 tensors, rectified by the steps before. `labels` (a (rows,) int64 tensor over the
        whole of it), `weight`, `bias` and any parameter are handed in where it names them; a method
        whose fit names `labels` is refused where there are none.
    """

    function: Callable[..., Tensor]
    parameters: Mapping[str, Value] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    fit: Callable[..., Mapping[str, object]] | None = None
    perturbed: ClassVar[bool] = False


@dataclass(frozen=True)
class Score:
    """A function of logits and activations that gives each image one number.

    function: named inputs (`activations`, `logits`, `weight`, `bias`) and parameters -> (images,)
        tensor, higher = more in-distribution.
    parameters, fit: as of a Rectifier.
    perturbed: it scores images that ODIN has perturbed, not the images themselves.
    """

    function: Callable[..., Tensor]
    parameters: Mapping[str, Value] = field(default_factory=dict)
    fit: Callable[..., Mapping[str, object]] | None = None
    perturbed: bool = False
    published: ClassVar[Mapping[str, float]] = {}


Entry = Rectifier | Score


def parameter_range(entry: Entry, name: str) -> Range:
    """What the parameter of that name takes, by the annotation in the entry's function or, where
    that has none, in its fit."""
    for function in (entry.function, entry.fit):
        if function is not None and name in inspect.signature(function).parameters:
            hint = get_type_hints(function, include_extras=True).get(name, float)
            marked = [part for part in get_args(hint) if isinstance(part, Range)]
            return marked[0] if marked else _WHOLE if int in (hint, *get_args(hint)) else _FINITE
    raise KeyError(name)
