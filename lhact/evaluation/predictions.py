"""A cache and scored methods in, what the network says of every image out: the predicted class, its
probability, and the energy before and after each method's rectifiers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lhact.cache import Cache
from lhact.evaluation.score import MethodScores, Progress, score_sets
from lhact.methods.compose import DEFAULT_SCORE, parse
from lhact.methods.fit import FittedMethod, FittedStep, Head
from lhact.methods.scores_of_logits import energy, log_softmax

BySet = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Predictions:
    """What the network says of each image, by set, in the order of the cache.

    classes: (images,) int64, the index of the largest logit, the first of equal ones. probability:
    (images,) float32, its softmax, in [0, 1]. energy: (images,) float32, logsumexp of the logits,
    higher = more in-distribution. These three are of the images and activations as they are,
    without a rectifier or ODIN's perturbation.
    rectified_energy: for each method in its order the same as `energy`, behind its rectifiers; of a
    method that scores by the energy, its own scores.
    """

    classes: BySet
    probability: BySet
    energy: BySet
    rectified_energy: tuple[BySet, ...]


def predict(
    cache: Cache,
    scored: Sequence[MethodScores],
    device: torch.device,
    progress: Progress = lambda rows: None,
) -> Predictions:
    """The predictions for the sets that were scored, from one reading of each.

    scored: at least one method. progress: is told of the rows done.
    """
    head = scored[0].fitted.head
    plain = [of_logits(head, (), function) for function in (classes, _probability, energy)]
    known = {m.fitted: m.scores for m in scored if m.fitted.score.name == DEFAULT_SCORE}
    rectified = [
        m.fitted if m.fitted in known else of_logits(head, m.fitted.rectifiers, energy)
        for m in scored
    ]
    sets = {name: cache.sets[name] for name in scored[0].scores}
    wanted = [*plain, *(method for method in rectified if method not in known)]
    found = known | score_sets(sets, wanted, device, progress)
    predicted, probability, energies = (found[method] for method in plain)
    return Predictions(
        {name: values.astype(np.int64) for name, values in predicted.items()},
        probability,
        energies,
        tuple(found[method] for method in rectified),
    )


def of_logits(
    head: Head, rectifiers: tuple[FittedStep, ...], function: Callable[..., Tensor]
) -> FittedMethod:
    """A method that gives each image that function of its logits."""
    step = FittedStep(function.__name__, function, ("logits",), {}, {})
    return FittedMethod(parse(DEFAULT_SCORE), rectifiers, step, head)


def classes(logits: Tensor) -> Tensor:
    """The predicted class, which fits into the float32 of a score up to 16 million classes."""
    return logits.argmax(dim=1)


def _probability(logits: Tensor) -> Tensor:
    return log_softmax(logits).amax(dim=1).exp()
