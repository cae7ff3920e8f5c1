"""Activations or logits in, one number per image out, higher = more in-distribution: scores by what
the calibration images of each class have in common.

activations: (images, channels), logits: (images, classes). A class of which the calibration set
shows nothing plays no part: such a score takes the most probable of the other classes.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from lhact.methods.entries import Score
from lhact.methods.scores_of_logits import log_softmax
from lhact.methods.statistics import count_rows, in_dtype_of, moments, pieces, rounding_noise


def mahalanobis(
    activations: Tensor, mean: Tensor, whitening: Tensor, class_means: Tensor
) -> Tensor:
    """-min over classes of (z - mu_c)^T S^-1 (z - mu_c), one covariance S for all (Mahalanobis, Lee
    et al., NeurIPS 2018).

    Of the penultimate activations alone: neither the paper's input perturbation nor its sum over
    layers. mean (channels,), whitening (channels, rank), class_means (classes, rank): see
    `fit_mahalanobis`.
    """
    z = (activations - mean) @ whitening
    return -(z.square().sum(dim=1) + _nearest(z, class_means))


def fit_mahalanobis(calibration: Iterable[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """mean of all, whitening with whitening whitening^T = S^-1, and the class means in the whitened
    space around that mean.

    S is the mean over all images of (z - mu_c) (z - mu_c)^T (divided by their number, as in the
    paper's eq. 1). Where it has no inverse, with dead channels or fewer images than channels, it is
    the pseudo-inverse, as in the authors' use of scikit-learn. ValueError without one label for
    each image, and where no class has two different images.
    """
    mean, whitening, class_means, _ = _within_classes(calibration, labels)
    return in_dtype_of(calibration, mean=mean, whitening=whitening, class_means=class_means)


def rmds(
    activations: Tensor, mean: Tensor, whitening: Tensor, class_means: Tensor, shares: Tensor
) -> Tensor:
    """-min over classes of MD_c(z) - MD_0(z), MD_0 of one Gaussian for all images (RMDS, Ren et
    al., arXiv 2106.09022, 2021).

    MD as in `mahalanobis`. In coordinates that make the within-class covariance I and the
    covariance of all images diagonal, 1 + d_j, the difference is, per class, sum over j of
    z_j^2 d_j / (1 + d_j) - 2 z_j m_cj + m_cj^2: where the class means do not vary the two distances
    cancel exactly. So only the `classes - 1` directions in which they do are computed, and no two
    large numbers are subtracted. shares (directions,) holds d_j / (1 + d_j).
    """
    z = (activations - mean) @ whitening
    return -(z.square() @ shares + _nearest(z, class_means))


def fit_rmds(calibration: Iterable[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """As `fit_mahalanobis`, rotated and cut down to the directions in which class means vary, with
    `shares`.

    Where the within-class covariance has no inverse, both distances are taken in the space that it
    spans.
    """
    mean, whitening, class_means, frequencies = _within_classes(calibration, labels)
    between, rotation = torch.linalg.eigh(class_means.T @ (frequencies[:, None] * class_means))
    unused = len(between) - min(len(class_means) - 1, len(between))
    between, rotation = between[unused:].clamp(min=0), rotation[:, unused:]
    return in_dtype_of(
        calibration,
        mean=mean,
        whitening=whitening @ rotation,
        class_means=class_means @ rotation,
        shares=between / (1 + between),
    )


def klm(logits: Tensor, log_means: Tensor) -> Tensor:
    """-min over classes k of KL(p, d_k), p the softmax and d_k the mean softmax of the calibration
    images that are predicted as k (KL-Matching, Hendrycks et al., ICML 2022).

    log_means (predicted classes, classes): log d_k. Images whose softmax is much sharper than d_k
    are all at the divergence -log d_k[k], where float32 cannot tell them apart.
    """
    log_p = log_softmax(logits)
    p = log_p.exp()
    return -((p * log_p).sum(dim=1) - (p @ log_means.T).amax(dim=1))


def fit_klm(calibration: Iterable[Tensor], weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """log_means, by sums of logarithms: no d_k becomes 0, which would put all images infinitely far
    from it."""
    log_sums = torch.full((len(weight), len(weight)), -torch.inf).to(weight.device, torch.float64)
    counts = torch.zeros_like(log_sums[:, :1])
    for rows in pieces(calibration):
        log_p = log_softmax(linear(rows, weight, bias).double())
        predicted = log_p.argmax(dim=1)
        for k in torch.unique(predicted).tolist():
            chosen = log_p[predicted == k]
            log_sums[k] = torch.logaddexp(log_sums[k], chosen.logsumexp(dim=0))
            counts[k] += len(chosen)
    seen = counts.squeeze(1) > 0
    return {"log_means": (log_sums - counts.log())[seen].to(weight.dtype)}


def she(activations: Tensor, logits: Tensor, classes: Tensor, patterns: Tensor) -> Tensor:
    """z . mean of the correctly classified calibration activations of the predicted class (SHE,
    simplified Hopfield energy, Zhang et al., ICLR 2023).

    patterns (classes, channels): those means; classes (classes,): whose they are.
    """
    return (activations * patterns[_predicted(logits, classes)]).sum(dim=1)


def fit_she(
    calibration: Iterable[Tensor], labels: Tensor, weight: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    """classes and patterns. labels: the network's own class numbers, one for each image.

    ValueError for another number of labels, and where no image is classified correctly.
    """

    def correct() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, label in _labelled(calibration, labels):
            right = linear(rows, weight, bias).argmax(dim=1) == label
            yield rows[right], label[right]

    classes, patterns, _ = _class_means(correct(), weight)
    if not len(classes):
        raise ValueError(
            "needs calibration images that the network classifies correctly, got none: are their "
            "labels the network's class numbers?"
        )
    return {"classes": classes, "patterns": patterns.to(weight.dtype)}


def cadref(
    activations: Tensor,
    logits: Tensor,
    classes: Tensor,
    class_means: Tensor,
    signs: Tensor,
    mean_energy: float,
) -> Tensor:
    """How far z is from the mean of its predicted class, in the sense of the class's weights and
    against it (CADRef, Ling et al., CVPR 2025), with energy as its logit score.

        r = (z - m_pred) sign(w_pred)
        -(sum of the positive r / E(z)  +  sum of the negative |r| / mean E) / sum of |z|

    m_c is the mean of the calibration activations that are predicted as c, E(z) the image's energy
    and mean E that of the calibration images. An energy that is not positive counts as nearly 0, so
    that its image is OOD; the authors' code divides by it, which would turn the sign.
    class_means and signs (classes, channels); classes (classes,): whose they are.
    """
    predicted = _predicted(logits, classes)
    relative = (activations - class_means[predicted]).mul_(signs[predicted])
    along = relative.clamp(min=0).sum(dim=1) / torch.logsumexp(logits, dim=1).clamp(min=1e-12)
    against = relative.clamp(max=0).sum(dim=1) / -mean_energy
    return -(along + against) / activations.abs().sum(dim=1).clamp(min=1e-12)


def fit_cadref(calibration: Iterable[Tensor], weight: Tensor, bias: Tensor) -> dict[str, object]:
    """classes, class_means, signs and mean_energy; see `cadref`. ValueError where the mean energy
    is not positive."""
    energies = 0.0

    def as_predicted() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal energies
        for rows in pieces(calibration):
            logits = linear(rows, weight, bias)
            energies += torch.logsumexp(logits, dim=1).sum(dtype=torch.float64).item()
            yield rows, logits.argmax(dim=1)

    classes, class_means, counts = _class_means(as_predicted(), weight)
    mean_energy = energies / counts.sum().item()
    if not mean_energy > 0:
        raise ValueError(
            f"needs a positive mean energy of the calibration images, got {mean_energy:g}"
        )
    return {
        "classes": classes,
        "class_means": class_means.to(weight.dtype),
        "signs": weight[classes].sign(),
        "mean_energy": mean_energy,
    }


def _predicted(logits: Tensor, classes: Tensor) -> Tensor:
    """(images,) the position in `classes` of the most probable of them."""
    return logits[:, classes].argmax(dim=1)


def _nearest(z: Tensor, class_means: Tensor) -> Tensor:
    """min over classes of |m_c|^2 - 2 z m_c, which is the squared distance less |z|^2."""
    return torch.addmm(class_means.square().sum(dim=1), z, class_means.T, alpha=-2).amin(dim=1)


def _labelled(calibration: Iterable[Tensor], labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, their labels) in pieces. ValueError where there is not one label for each row."""
    images, start = count_rows(calibration), 0
    if len(labels) != images:
        raise ValueError(
            f"needs one label for each calibration image, got {len(labels)} labels "
            f"and {images} images"
        )
    for rows in pieces(calibration):
        yield rows, labels[start : start + len(rows)].to(rows.device)
        start += len(rows)


def _class_means(
    batches: Iterable[tuple[Tensor, Tensor]], shape: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(classes that occur, their mean rows, how many rows of each), float64. batches: (rows, the
    class of each); shape: a tensor of (classes, channels)."""
    sums = torch.zeros_like(shape, dtype=torch.float64)
    counts = torch.zeros_like(sums[:, :1])
    for rows, label in batches:
        sums.index_add_(0, label, rows.double())
        counts.index_add_(0, label, torch.ones_like(rows[:, :1], dtype=torch.float64))
    classes = counts.squeeze(1).nonzero().squeeze(1)
    return classes, (sums / counts)[classes], counts[classes]


def _within_classes(
    calibration: Iterable[Tensor], labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, whitening, class means in the whitened space, share of the images in each class),
    float64."""
    rows, mean, moment = moments(calibration)
    # Only classes that occur: another class has no mean to be near to.
    numbers, index = torch.unique(labels, return_inverse=True)
    shape = mean.expand(len(numbers), -1)
    _, means, counts = _class_means(_labelled(calibration, index), shape)
    deviations = means - mean
    within = moment - torch.outer(mean, mean) - deviations.T @ (counts / rows * deviations)
    eigenvalues, vectors = torch.linalg.eigh(within)
    spanned = eigenvalues > rounding_noise(moment)
    if not spanned.any():
        raise ValueError(
            "needs the spread within classes, and no class has two different calibration images"
        )
    whitening = vectors[:, spanned] / eigenvalues[spanned].sqrt()
    return mean, whitening, deviations @ whitening, counts.squeeze(1) / rows


SCORES_BY_CLASS = {
    "mahalanobis": Score(mahalanobis, fit=fit_mahalanobis),
    "rmds": Score(rmds, fit=fit_rmds),
    "klm": Score(klm, fit=fit_klm),
    "she": Score(she, fit=fit_she),
    "cadref": Score(cadref, fit=fit_cadref),
}
