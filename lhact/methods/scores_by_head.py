"""Activations, their logits and the linear head in, one number per image out, higher = more
in-distribution: scores of the activations as the head sees them.

activations: (images, channels), logits: (images, classes), weight: (classes, channels).
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear

from lhact.methods.entries import Finite, Percent, Percentile, Score
from lhact.methods.rectify import cut_to_range, kept_channels, lengths
from lhact.methods.statistics import mean_row
from lhact.methods.topk import largest


def lts(activations: Tensor, logits: Tensor, percentile: Percent) -> Tensor:
    """Energy of logits * (s1 / s2)^2 (LTS, Djurisic et al. 2024, arXiv 2409.01175).

    s1 is the sum of the image's activations, s2 that of those left after the lowest `percentile` %
    are pruned as in ASH. Negative activations count as 0, as in the authors' code (the paper
    assumes a ReLU). An image without any positive activation keeps its logits.
    """
    kept = kept_channels(activations, percentile)
    positive = activations.clamp(min=0)
    after = largest(positive, kept).sum(dim=1, keepdim=True)
    ratio = torch.where(after > 0, positive.sum(dim=1, keepdim=True) / after, 1)
    return torch.logsumexp(logits * ratio.square(), dim=1)


def dice(activations: Tensor, masked_weight: Tensor, bias: Tensor) -> Tensor:
    """Energy of the head with all but its largest contributions removed (DICE, Sun & Li, ECCV
    2022)."""
    return torch.logsumexp(linear(activations, masked_weight, bias), dim=1)


def fit_dice(
    calibration: Iterable[Tensor], weight: Tensor, percentile: Percent
) -> dict[str, Tensor]:
    """The weight, zero where its contribution mean(z) * weight is not above the `percentile`th
    percentile of all contributions.

    One threshold holds for the whole matrix and is exceeded strictly, as in the authors' code.
    Their mean is over ImageNet's training images, without ReAct even in DICE+ReAct; this one is
    over whatever the rectifiers before made of the calibration set.
    """
    percent = Percentile(percentile).percent
    contribution = (mean_row(calibration) * weight).flatten()
    # The interpolated percentile lies between this order statistic and the next: what is above the
    # one is above the other.
    rank = int((contribution.numel() - 1) * percent / 100)
    threshold = contribution.kthvalue(rank + 1).values
    return {"masked_weight": torch.where(contribution.view_as(weight) > threshold, weight, 0)}


def fdbd(activations: Tensor, logits: Tensor, mean: Tensor, inverse_distances: Tensor) -> Tensor:
    """Mean distance to the decision boundaries over the distance to the ID mean (fDBD, Liu & Qin,
    ICML 2024).

        1 / (classes - 1) * sum over c of (l_max - l_c) / |w_max - w_c|, over |z - mean|

    The mean is over the classes other than the predicted one (the authors' code leaves out the
    constant factor). Two classes with the same weights have no boundary and count as 0.
    """
    top, predicted = logits.max(dim=1, keepdim=True)
    distances = (top - logits) * inverse_distances[predicted.squeeze(1)]
    boundaries = distances.sum(dim=1) / max(logits.shape[1] - 1, 1)
    return boundaries / lengths(activations - mean).squeeze(1).clamp(min=1e-12)


def fit_fdbd(calibration: Iterable[Tensor], weight: Tensor) -> dict[str, Tensor]:
    """The mean activation, and 1 / |w_i - w_j| for all pairs of classes, 0 where that distance is
    0."""
    wide = weight.double()
    # Differences, not products: the distance of equal rows must come out as exactly 0.
    distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    inverse = torch.where(distances > 0, 1 / distances, 0)
    return {"inverse_distances": inverse.to(weight.dtype), **fit_nci(calibration, weight)}


def nci(activations: Tensor, logits: Tensor, weight: Tensor, mean: Tensor, alpha: Finite) -> Tensor:
    """How well z - mean points along the predicted class's weights, plus how large z is (NCI, Liu &
    Qin, CVPR 2025).

        w_pred . (z - mean) / |z - mean|  +  alpha * sum of |z|

    alpha 0.001 is for ImageNet/ResNet-50; it goes with the size of a network's activations, and the
    authors select it for each. mean (channels,) is that of the calibration activations.
    """
    centred = activations - mean
    projection = (weight[logits.argmax(dim=1)] * centred).sum(dim=1)
    proximity = projection / lengths(centred).squeeze(1).clamp(min=1e-12)
    return proximity + cut_to_range(alpha, logits.dtype) * activations.abs().sum(dim=1)


def fit_nci(calibration: Iterable[Tensor], weight: Tensor) -> dict[str, Tensor]:
    """mean: the mean activation."""
    return {"mean": mean_row(calibration).to(weight.dtype)}


def gradnorm(activations: Tensor, logits: Tensor) -> Tensor:
    """L1 norm of the gradient, by the head's weight, of the divergence KL(uniform, softmax)
    (GradNorm, Huang et al., NeurIPS 2021), temperature 1.

        sum over channels of |z|  *  sum over classes of |p_c - 1 / classes|

    This is the gradient's norm in closed form. The authors' code sums where the divergence has a
    mean over classes, which makes it `classes` times as large.
    """
    p = logits.softmax(dim=1)
    return activations.abs().sum(dim=1) * (p - 1 / logits.shape[1]).abs().sum(dim=1)


SCORES_BY_HEAD = {
    "lts": Score(lts, {"percentile": 95}),
    "dice": Score(dice, {"percentile": 70}, fit_dice),
    "fdbd": Score(fdbd, fit=fit_fdbd),
    "gradnorm": Score(gradnorm),
    "nci": Score(nci, {"alpha": 0.001}, fit_nci),
}
