"""What the tests of methods and evaluation share: a small network with data, methods fitted on it,
and scores and metrics by their definitions."""

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import logsumexp

from lhact.methods.entries import Entry, Percentile
from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES

ENTRIES = {**RECTIFIERS, **SCORES}
CHANNELS, CLASSES = 24, 7
# Settings that bite on so small a network; what is not here keeps its default.
SMALL = {
    "ash-s": {"percentile": 75},
    "optfs": {"bins": 10},
    "energy": {"temperature": 2.5},
    "gen": {"k": 3},
    "lts": {"percentile": 75},
    "knn": {"k": 5},
    "nnguide": {"k": 4, "bank": 30},
    "vim": {"dim": 9},
    "residual": {"dim": 9},
    "neco": {"dim": 5},
    "neco-resnet": {"dim": 5},
}


class Setup:
    """A linear head, calibration batches of uneven sizes with labels, and test activations, as a
    ReLU leaves them."""

    def __init__(self, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weight, self.bias = normal(CLASSES, CHANNELS), normal(CLASSES).to(dtype)
        sizes = (61, 1, 100, 18)
        self.labels = torch.randint(CLASSES, (sum(sizes),), generator=generator)
        noise = normal(sum(sizes), CHANNELS) @ normal(CHANNELS, CHANNELS) * 0.2
        rows = (1.5 * weight[self.labels] + noise + 0.5).clamp(min=0)
        self.weight, self.calibration = weight.to(dtype), list(rows.to(dtype).split(sizes))
        self.activations = (normal(12, CHANNELS) + 0.5).clamp(min=0).to(dtype)


def fit(entry: Entry, setup: Setup, **changes) -> dict:
    """Everything that a function of the entry may ask for beside activations and logits, by name;
    percentiles are NumPy's."""
    names = ("calibration", "labels", "weight", "bias")
    known = {**{name: getattr(setup, name) for name in names}, **entry.parameters, **changes}
    for name, value in known.items():
        if isinstance(value, Percentile):
            everything = torch.cat(list(setup.calibration)).numpy()
            known[name] = float(np.percentile(everything, value.percent))
    if entry.fit:
        wanted = inspect.signature(entry.fit).parameters
        known |= entry.fit(**{name: known[name] for name in wanted})
    return known


def bound(name: str, setup: Setup, **changes):
    """The method fitted, as a function of activations alone; and its parameters' values."""
    entry = ENTRIES[name]
    known = fit(entry, setup, **{**SMALL.get(name, {}), **changes})

    def method(activations):
        logits = activations @ known["weight"].T + known["bias"]
        offered = {**known, "activations": activations, "logits": logits}
        wanted = inspect.signature(entry.function).parameters
        return entry.function(**{key: offered[key] for key in wanted})

    return method, {parameter: known[parameter] for parameter in entry.parameters}


def logits_of(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(rows, classes) in float64."""
    return rows.astype(np.float64) @ weight.astype(np.float64).T + bias.astype(np.float64)


def energies_of(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(rows,) logsumexp of their logits in float64."""
    return logsumexp(logits_of(rows, weight, bias), axis=1)


def fpr95_of(id_scores: Sequence[float], ood_scores: Sequence[float]) -> float:
    """FPR95 = mean(OOD > threshold), in percent, ID being positive."""
    threshold = sorted(id_scores)[round(0.05 * len(id_scores))]
    return 100 * sum(score > threshold for score in ood_scores) / len(ood_scores)


def auroc_of(id_scores: Sequence[float], ood_scores: Sequence[float]) -> float:
    """Wins of ID over OOD among all pairs, in percent; a tie is half a win."""
    wins = sum((x > y) + (x == y) / 2 for x in id_scores for y in ood_scores)
    return 100 * wins / (len(id_scores) * len(ood_scores))
