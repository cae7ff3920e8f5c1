"""Many settings of a method in, one out: chosen on images that are not tested on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lhact import cache
from lhact.evaluation import metrics
from lhact.evaluation.score import Cache, check_same_origin, score
from lhact.methods.compose import BadMethod, Method, Step, parse
from lhact.methods.scores import Score

GAUSSIAN = "gaussian"
# What a setting chosen on ID images alone may cost of their top-1 accuracy, in percentage points.
POINTS = 1.0


def hold_out(opened: Cache, choice: str) -> Cache:
    """The cache with the set to select on held out of the test: NAME, one of its OOD sets; NAME=FOLDER, the OOD set of that name in
    another cache folder of the same network, which is then called by the whole of that; or `gaussian`, cached images of noise.

    Raises BadMethod if there is no such set or nothing is left to test on, BadCache if it is of another network.
    """
    name, _, folder = choice.partition("=")
    if name in ("id", "calibration"):
        raise BadMethod(f"--select-on {choice}: settings are selected on an OOD set, {name} is none")
    if folder:
        other = cache.open_activations(Path(folder), name)
        check_same_origin(other, opened.id, name)
        return opened._replace(sets={**opened.sets, choice: other}, selected_on=choice)
    if name == GAUSSIAN and name not in opened.ood:
        if not cache.is_complete(opened.folder / "selection", name):
            raise BadMethod(f"--select-on {name} needs images of noise: run get_activation.py again with --gaussian 1000")
        return hold_out(opened, f"{name}={opened.folder / 'selection'}")
    if name not in opened.ood:
        raise BadMethod(f"--select-on {name}: the cache has no such OOD set; it has {', '.join(opened.ood)}; or give NAME=FOLDER")
    if len(opened.ood) == 1:
        raise BadMethod(f"--select-on {name}: no other OOD set would be left to test on; give NAME=FOLDER of another cache")
    return opened._replace(selected_on=name)


def _contested(methods: Sequence[Method]) -> list[Method]:
    names = [method.name for method in methods]
    return [method for method in methods if names.count(method.name) > 1]


def _best(methods: Sequence[Method], contested: Sequence[Method], ranks: Sequence[tuple]) -> list[Method]:
    """Each method once, in order: of the contested settings the one of the lowest rank, the first of equals."""
    best: dict[str, tuple[tuple, Method]] = {}
    for method, rank in zip(contested, ranks, strict=True):
        if method.name not in best or rank < best[method.name][0]:
            best[method.name] = rank, method
    chosen = {method.name: method for method in methods} | {name: method for name, (_, method) in best.items()}
    return list(chosen.values())


def select(
    opened: Cache, methods: Sequence[Method], device: torch.device, progress: Callable[[int], None] = lambda rows: None
) -> list[Method]:
    """Of each method that comes with several settings, the one with the lowest FPR95 (then the highest AUROC) between the
    calibration images and the held-out OOD set; the ID test images stand in where there is no calibration set."""
    contested = _contested(methods)
    if not contested:
        return list(methods)
    id_name = "calibration" if "calibration" in opened.sets else "id"
    scored = score(opened, contested, device, progress=progress, datasets=[id_name, opened.selected_on])
    pairs = [(scores[id_name], scores[opened.selected_on]) for scores in scored.scores]
    return _best(methods, contested, [(metrics.fpr95(*pair), -metrics.auroc(*pair)) for pair in pairs])


def select_on_id(
    opened: Cache, methods: Sequence[Method], device: torch.device, progress: Callable[[int], None] = lambda rows: None
) -> list[Method]:
    """Of each method that comes with several settings, the strongest that the classifier bears, by calibration images alone: the
    one that changes their energies most on average, among those that cost at most POINTS of their top-1 accuracy; the one that
    costs least where all cost more. No OOD image has a say.

    Raises BadMethod if there is no calibration set with labels.
    """
    contested = _contested(methods)
    labels = opened.sets["calibration"].metadata["labels"] if "calibration" in opened.sets else None
    if labels is None:
        raise BadMethod("--select-on id needs calibration images with labels; make them with get_activation.py --calibration-dir")
    if not contested:
        return list(methods)
    plain = parse("energy")
    settings = [plain, *contested]
    predicting = [method._replace(score=Step("top-1", Score(_predicted), {})) for method in settings]
    energies = [method._replace(score=plain.score) for method in settings]
    scored = score(opened, [*predicting, *energies], device, progress=progress, datasets=["calibration"])
    values = [scores["calibration"] for scores in scored.scores]
    accuracies = [100 * float(np.mean(predicted == labels)) for predicted in values[: len(settings)]]
    changes = [float(np.mean(np.abs(energy - values[len(settings)]))) for energy in values[len(settings) :]]
    costs = [accuracies[0] - accuracy for accuracy in accuracies]
    ranks = [(0.0, -change) if cost <= POINTS else (cost, 0.0) for cost, change in zip(costs, changes, strict=True)]
    return _best(methods, contested, ranks[1:])


def _predicted(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1).float()
