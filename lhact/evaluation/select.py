"""Many settings of a method in, one out: chosen on images that are not tested on."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lhact.cache import (
    CALIBRATION,
    ID,
    SELECTION,
    Activations,
    Cache,
    check_same_origin,
    is_complete,
    open_set,
)
from lhact.evaluation.metrics import auroc, fpr95
from lhact.evaluation.predictions import classes, of_logits
from lhact.evaluation.results import MOST_TIES, tied_at_threshold
from lhact.evaluation.score import Progress, score_sets
from lhact.methods.compose import BadMethod
from lhact.methods.fit import FittedMethod, FittedStep
from lhact.methods.scores_of_logits import energy

GAUSSIAN = "gaussian"
# What a setting chosen on ID images alone may cost of their top-1 accuracy, in percentage points.
MOST_POINTS = 1.0

# The lower, the better.
Rank = tuple[float, ...]


@dataclass(frozen=True)
class Selection:
    """What settings are chosen on. cache: without the set that they are chosen on, which is not
    tested on. chosen_on: that OOD set; None: ID images alone."""

    cache: Cache
    chosen_on: Activations | None


def hold_out(cache: Cache, choice: str) -> Selection:
    """The set to choose on, and the cache to test on: `id`; NAME, one of the cache's OOD sets;
    NAME=FOLDER, the OOD set of that name in another cache folder of the same network; or
    `gaussian`, cached images of noise.

    Raises BadMethod if there is no such set or nothing is left to test on, BadCache if it is of
    another network.
    """
    name, _, folder = choice.partition("=")
    if choice == ID:
        return Selection(cache, None)
    if name in (ID, CALIBRATION):
        raise BadMethod(
            f"--select-on {choice}: settings are selected on an OOD set, {name} is none"
        )
    if folder:
        return Selection(cache, _of_same_network(cache, Path(os.path.expanduser(folder)), name))
    if name in cache.ood:
        if len(cache.ood) == 1:
            raise BadMethod(
                f"--select-on {name}: no other OOD set would be left to test on; give NAME=FOLDER "
                "of another cache"
            )
        return Selection(cache.without(name), cache.sets[name])
    if name == GAUSSIAN:
        if not is_complete(cache.folder / SELECTION, name):
            raise BadMethod(
                f"--select-on {name} needs images of noise: run get_activation.py again with "
                "--gaussian 1000"
            )
        return Selection(cache, _of_same_network(cache, cache.folder / SELECTION, name))
    raise BadMethod(
        f"--select-on {name}: the cache has no such OOD set; it has {', '.join(cache.ood)}; or "
        "give NAME=FOLDER"
    )


def _of_same_network(cache: Cache, folder: Path, name: str) -> Activations:
    activations = open_set(folder, name)
    check_same_origin(activations, cache.id, name)
    return activations


def select(
    selection: Selection,
    fitted: Sequence[FittedMethod],
    device: torch.device,
    progress: Progress = lambda rows: None,
) -> list[FittedMethod]:
    """Of each method that comes with several settings, the best one: on an OOD set as
    `rank_on_ood`, on ID images alone as `rank_on_id` says. The first of equals."""
    names = [method.name for method in fitted]
    contested = [method for method in fitted if names.count(method.name) > 1]
    if selection.chosen_on is None:
        ranks = rank_on_id(selection.cache, contested, device, progress)
    else:
        ranks = rank_on_ood(selection, contested, device, progress)
    best: dict[str, FittedMethod] = {}
    for method in fitted:
        held = best.setdefault(method.name, method)
        if method in ranks and ranks[method] < ranks[held]:
            best[method.name] = method
    return list(best.values())


def rank_on_ood(
    selection: Selection,
    contested: Sequence[FittedMethod],
    device: torch.device,
    progress: Progress,
) -> Mapping[FittedMethod, Rank]:
    """The lowest FPR95 (then the highest AUROC) between the calibration images and the held-out OOD
    set is the best; the ID test images stand in where there is no calibration set. A setting with
    constant scores, or nearly so, comes behind all others: its FPR95 says nothing."""
    assert selection.chosen_on is not None
    if not contested:
        return {}
    sets = {"id": selection.cache.calibration, "ood": selection.chosen_on}
    scores = score_sets(sets, contested, device, progress)
    pairs = {method: (scores[method]["id"], scores[method]["ood"]) for method in contested}
    return {
        method: (tied_at_threshold(*pair) > MOST_TIES, fpr95(*pair), -auroc(*pair))
        for method, pair in pairs.items()
    }


def rank_on_id(
    cache: Cache, contested: Sequence[FittedMethod], device: torch.device, progress: Progress
) -> Mapping[FittedMethod, Rank]:
    """The best setting is the strongest that the classifier bears, by calibration images alone: the
    one that changes their energies most on average, among those that cost at most MOST_POINTS of
    their top-1 accuracy; the one that costs least where all cost more. No OOD image has a say.

    Raises BadMethod if there is no calibration set with labels.
    """
    labels = cache.sets[CALIBRATION].info.labels if CALIBRATION in cache.sets else None
    if labels is None:
        raise BadMethod(
            "--select-on id needs calibration images with labels; make them with "
            "get_activation.py --calibration-dir"
        )
    if not contested:
        return {}
    head = contested[0].head
    chains = dict.fromkeys([(), *(setting.rectifiers for setting in contested)])
    methods = {
        chain: [of_logits(head, chain, function) for function in (classes, energy)]
        for chain in chains
    }
    sets = {CALIBRATION: cache.calibration}
    scores = score_sets(sets, [*itertools.chain(*methods.values())], device, progress)

    def top1_and_energies(chain: tuple[FittedStep, ...]) -> tuple[float, np.ndarray]:
        predicted, energies = (scores[method][CALIBRATION] for method in methods[chain])
        return 100 * float(np.mean(predicted == labels)), energies

    plain_top1, plain_energies = top1_and_energies(())
    ranks = {}
    for setting in contested:
        top1, energies = top1_and_energies(setting.rectifiers)
        cost, change = plain_top1 - top1, float(np.mean(np.abs(energies - plain_energies)))
        ranks[setting] = (0.0, -change) if cost <= MOST_POINTS else (cost, 0.0)
    return ranks
