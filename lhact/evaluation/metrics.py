"""Two score vectors in, FPR95, AUROC and AUPR out, in percent.

A higher score means more in-distribution. ID is the positive class wherever a name does not say otherwise: `fpr95` keeps 95 % of
ID and is the share of OOD that passes, as in the papers of ReAct, BATS and LHAct. OpenOOD (from 1.5) and pytorch-ood report the
opposite, here `fpr95_ood_positive`; the two can differ by tens of points on the same scores.

All are counts in sorted scores, so exact whatever the ties, and ten times as fast as scikit-learn's, which give the same numbers.
"""

import numpy as np
from numpy.typing import ArrayLike


def _checked(scores: ArrayLike, name: str) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"{name} must be a vector of at least one score, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name} must be finite, got {np.count_nonzero(~np.isfinite(scores))} NaN or infinite scores")
    return scores


def _sorted(id_scores: ArrayLike, ood_scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    return np.sort(_checked(id_scores, "id_scores")), np.sort(_checked(ood_scores, "ood_scores"))


def _mean_precision(hits: np.ndarray, false_alarms: np.ndarray) -> float:
    """Average precision from the counts at the score of each positive image: every image adds its share of the recall."""
    return 100 * float(np.mean(hits / (hits + false_alarms)))


def fpr95(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Share of OOD above the threshold that keeps 95 % of ID, in percent; lower is better.

    As in the reference code of LHAct: threshold = sorted ID scores [round(0.05 n)], and an OOD image passes when its score is
    strictly greater. ID is the positive class.

    >>> fpr95(id_scores=[3.0, 4.0, 5.0, 6.0], ood_scores=[1.0, 2.0, 3.0, 3.5])
    25.0
    """
    id_scores, ood_scores = _checked(id_scores, "id_scores"), _checked(ood_scores, "ood_scores")
    rank = round(0.05 * len(id_scores))
    threshold = np.partition(id_scores, rank)[rank]
    return 100 * float(np.mean(ood_scores > threshold))


def auroc(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Probability that an ID image scores above an OOD image, a tie counting one half, in percent; higher is better.

    The same whichever class is called positive.

    >>> auroc(id_scores=[2.0, 3.0], ood_scores=[1.0, 2.0])
    87.5
    """
    id_scores, ood_scores = _sorted(id_scores, ood_scores)
    # Of each OOD score: ID scores above it, and those above or equal. Whole numbers until the end.
    above, reached = (
        len(id_scores) * len(ood_scores) - int(np.searchsorted(id_scores, ood_scores, side).sum()) for side in ("right", "left")
    )
    return 100 * ((above + reached) / (2 * len(id_scores) * len(ood_scores)))


def aupr_id(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Average precision with ID as the positive class, in percent; higher is better. Depends on the sizes of the two sets."""
    id_scores, ood_scores = _sorted(id_scores, ood_scores)
    hits, false_alarms = (len(scores) - np.searchsorted(scores, id_scores, "left") for scores in (id_scores, ood_scores))
    return _mean_precision(hits, false_alarms)


def aupr_ood(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Average precision with OOD as the positive class (low scores), in percent; higher is better."""
    id_scores, ood_scores = _sorted(id_scores, ood_scores)
    hits, false_alarms = (np.searchsorted(scores, ood_scores, "right") for scores in (ood_scores, id_scores))
    return _mean_precision(hits, false_alarms)


def fpr95_ood_positive(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Share of ID below or at the threshold that catches at least 95 % of OOD, in percent; lower is better.

    The convention of OpenOOD (from 1.5) and pytorch-ood. Not comparable with `fpr95` nor with the numbers of ReAct's and LHAct's
    papers.
    """
    id_scores, ood_scores = _sorted(id_scores, ood_scores)
    needed = -(-95 * len(ood_scores) // 100)  # rounded up
    return 100 * float(np.searchsorted(id_scores, ood_scores[needed - 1], "right")) / len(id_scores)


METRICS = {
    "fpr95": fpr95,
    "auroc": auroc,
    "aupr_id": aupr_id,
    "aupr_ood": aupr_ood,
    "fpr95_ood_positive": fpr95_ood_positive,
}


def all_metrics(id_scores: ArrayLike, ood_scores: ArrayLike) -> dict[str, float]:
    """Every entry of METRICS by name."""
    return {name: metric(id_scores, ood_scores) for name, metric in METRICS.items()}
