"""Logits (and activations) in, one number per image out: higher means more in-distribution.

Every score is a pure function that returns a (images,) tensor. Its arguments are named after what it reads and are handed in by
name: `logits` (images, classes) of the rectified activations, `activations` (images, channels) after rectification, `weight`
(classes, channels) and `bias` (classes,) of the linear head, the entry's parameters, and what its `fit` computed.

To add one, write the function and add an entry to SCORES; the name is then a method of eval.py, and `RECTIFIER+NAME` too.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from lhact.methods.topk import largest

# Calibration rows and similarity columns in memory at a time: 4096 rows of 2048 channels are 64 MiB in float64.
PIECE = 4096


class Score(NamedTuple):
    """One entry of SCORES.

    function    named inputs and parameters -> (images,) tensor, higher = more in-distribution.
    parameters  defaults.
    fit         (calibration, ...) -> further arguments of `function`, by name. `calibration` can be iterated any number of
                times and yields (rows, channels) float32 tensors, rectified as the test activations will be; `labels` (a
                (rows,) int64 tensor over the whole of it), `weight`, `bias` and any parameter are handed in where `fit` names
                them.
    reads       the cached activations it works on: "" for those of the images themselves, "odin" for those of the images that
                ODIN perturbed.
    """

    function: Callable[..., Tensor]
    parameters: Mapping[str, float] = {}
    fit: Callable[..., dict] | None = None
    reads: str = ""


# Scores of the logits alone


def msp(logits: Tensor) -> Tensor:
    """The largest softmax probability (Hendrycks & Gimpel, ICLR 2017)."""
    return logits.softmax(dim=1).amax(dim=1)


def odin(logits: Tensor, temperature: float) -> Tensor:
    """The largest softmax probability of logits / temperature, of images that ODIN has perturbed (Liang et al., ICLR 2018)."""
    return (logits / temperature).softmax(dim=1).amax(dim=1)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature * logsumexp(logits / temperature), the negative free energy (Liu et al., NeurIPS 2020, eq. 4)."""
    if temperature == 1:  # the same, without two more passes over the logits
        return torch.logsumexp(logits, dim=1)
    return temperature * torch.logsumexp(logits / temperature, dim=1)


def maxlogit(logits: Tensor) -> Tensor:
    """The largest logit (Hendrycks et al., ICML 2022)."""
    return logits.amax(dim=1)


def gen(logits: Tensor, gamma: float, k: float) -> Tensor:
    """Negative generalised entropy, -sum of p^gamma (1 - p)^gamma over the k largest p (GEN, Liu et al., CVPR 2023).

    p = softmax(logits); k is the paper's M, and more than there are classes means all of them. The paper's sum (pytorch-ood takes
    the mean over p clamped to 1e-7 ... 1 - 1e-7). Computed from log p and log(1 - p): with gamma 0.1, 1 - p = 1e-9 counts
    as 0.126, and float32 would have rounded it away. ValueError where k is not a whole number from 1 on.
    """
    k = min(_whole("gen.k", k), logits.shape[1])
    top = logits.argmax(dim=1, keepdim=True)
    others = (logits - logits.gather(1, top)).scatter_(1, top, -math.inf)
    odds = torch.logsumexp(others, dim=1, keepdim=True)  # log of what all others together have per unit of the largest
    total = torch.nn.functional.softplus(odds)
    log_p = largest(others, k - 1) - total
    return -(torch.exp(gamma * (odds - 2 * total)).squeeze(1) + torch.exp(gamma * (log_p + torch.log1p(-log_p.exp()))).sum(dim=1))


# Scores that also read the activations


def lts(activations: Tensor, logits: Tensor, percentile: float) -> Tensor:
    """Energy of logits * (s1 / s2)^2 (LTS, Djurisic et al. 2024, arXiv 2409.01175).

    s1 is the sum of the image's activations, s2 that of those left after the lowest `percentile` % are pruned: of n channels
    n - round(n percentile / 100), at least one. Negative activations count as 0, as in the authors' code (the paper assumes
    a ReLU). An image without any positive activation keeps its logits.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"lts.percentile must be between 0 and 100, got {percentile:g}")
    positive = activations.clamp(min=0)
    channels = activations.shape[1]
    kept = max(1, channels - round(channels * percentile / 100))
    after = largest(positive, kept).sum(dim=1, keepdim=True)
    ratio = torch.where(after > 0, positive.sum(dim=1, keepdim=True) / after, 1)
    return torch.logsumexp(logits * ratio.square(), dim=1)


def dice(activations: Tensor, masked_weight: Tensor, bias: Tensor) -> Tensor:
    """Energy of the head with all but its largest contributions removed (DICE, Sun & Li, ECCV 2022)."""
    return torch.logsumexp(linear(activations, masked_weight, bias), dim=1)


def fit_dice(calibration: Iterable[Tensor], weight: Tensor, percentile: float) -> dict[str, Tensor]:
    """The weight, zero where its contribution mean(z) * weight is not above the `percentile`th percentile of all contributions.

    One threshold for the whole matrix and strictly above it, as in the authors' code; their mean is over ImageNet's training
    images, without ReAct even in DICE+ReAct; here it is over whatever the rectifiers before made of the calibration set.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"dice.percentile must be between 0 and 100, got {percentile:g}")
    contribution = (_mean(calibration) * weight).flatten()
    # the interpolated percentile lies between this order statistic and the next: what is above the one is above the other
    rank = int((contribution.numel() - 1) * percentile / 100)
    threshold = contribution.kthvalue(rank + 1).values
    return {"masked_weight": torch.where(contribution.view_as(weight) > threshold, weight, 0)}


def fdbd(activations: Tensor, logits: Tensor, mean: Tensor, inverse_distances: Tensor) -> Tensor:
    """Mean distance to the decision boundaries over the distance to the ID mean (fDBD, Liu & Qin, ICML 2024).

        1 / (classes - 1) * sum over c of (l_max - l_c) / |w_max - w_c|, over |z - mean|

    The mean is over the classes other than the predicted one (the authors' code leaves out the constant factor). Two classes
    with the same weights have no boundary and count as 0.
    """
    largest, predicted = logits.max(dim=1, keepdim=True)
    boundaries = ((largest - logits) * inverse_distances[predicted.squeeze(1)]).sum(dim=1) / max(logits.shape[1] - 1, 1)
    return boundaries / torch.linalg.vector_norm(activations - mean, dim=1).clamp(min=1e-12)


def fit_fdbd(calibration: Iterable[Tensor], weight: Tensor) -> dict[str, Tensor]:
    """The mean activation, and 1 / |w_i - w_j| for all pairs of classes, 0 where that distance is 0."""
    # differences, not products: the distance of equal rows must come out as exactly 0
    distances = torch.cdist(weight.double(), weight.double(), compute_mode="donot_use_mm_for_euclid_dist")
    inverse = torch.where(distances > 0, 1 / distances, 0)
    return {"mean": _mean(calibration).to(weight.dtype), "inverse_distances": inverse.to(weight.dtype)}


# Scores by distance to calibration images


def knn(activations: Tensor, neighbours: Iterable[Tensor], k: float) -> Tensor:
    """-(Euclidean distance to the k-th nearest calibration image), all rows scaled to unit length (KNN, Sun et al., ICML 2022).

    neighbours yields the calibration activations; it is read once per call and never held as a whole. A row of zeros stays
    zero. The authors' code takes the squared distance, which orders images alike. The products of unit rows carry float32's
    1e-7, so that distances below about 1e-3, of near-duplicates, are not exact.
    """
    queries = normalize(activations, dim=1)

    def closeness() -> Iterator[Tensor]:
        for rows in _pieces(neighbours):
            rows = normalize(rows, dim=1)
            yield torch.addmm(-rows.square().sum(dim=1), queries, rows.T, alpha=2)

    # |q - r|^2 = |q|^2 - closeness
    squared = queries.square().sum(dim=1) - _largest(closeness(), int(k)).amin(dim=1)
    return -squared.clamp(min=0).sqrt()


def fit_knn(calibration: Iterable[Tensor], k: float) -> dict:
    """The calibration set itself. k = 1000 is the paper's for all of ImageNet's 1.28 million training images.

    ValueError where k is more than the rows of the calibration set: k goes with their number, none is chosen silently.
    """
    rows = sum(len(batch) for batch in calibration)
    return {"neighbours": calibration, "k": _whole("knn.k", k, rows, "the number of calibration images")}


def nnguide(activations: Tensor, logits: Tensor, guide: Tensor, k: float) -> Tensor:
    """E(z) times the mean of the k largest E(z_i) cos(z, z_i) over a bank of ID images (NNGuide, Park et al., ICCV 2023).

    E = logsumexp of the logits. The k neighbours are those with the largest product E(z_i) cos(z, z_i), as in the authors'
    code, not those with the largest cosine. The paper applies it on top of ReAct: `react+nnguide`.
    """
    queries = normalize(activations, dim=1)
    guidance = _largest((queries @ rows.T for rows in guide.split(PIECE)), int(k)).mean(dim=1)
    return torch.logsumexp(logits, dim=1) * guidance


def fit_nnguide(calibration: Iterable[Tensor], weight: Tensor, bias: Tensor, k: float, bank: float) -> dict:
    """guide (rows, channels): E(z_i) z_i / |z_i| of at most `bank` evenly spaced rows of the calibration set.

    The paper's bank is 1 % of ImageNet's training images, drawn at random, hence 12,812 rows; evenly spaced ones of images
    sorted by class cover the classes alike and are the same in every run.
    """
    rows = sum(len(batch) for batch in calibration)
    count = min(_whole("nnguide.bank", bank), rows)
    k = _whole("nnguide.k", k, count, "the number of images in the bank")
    chosen = torch.arange(count) * rows // count
    guide, start = [], 0
    for batch in calibration:
        inside = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
        picked = batch[inside.to(batch.device)]
        guide.append(normalize(picked, dim=1) * torch.logsumexp(linear(picked, weight, bias), dim=1, keepdim=True))
        start += len(batch)
    return {"guide": torch.cat(guide), "k": k}


# Scores by the principal space of calibration activations


def vim(activations: Tensor, logits: Tensor, origin: Tensor, null_space: Tensor, alpha: float) -> Tensor:
    """Energy less the virtual logit, E(z) - alpha |residual of z| (ViM, Wang et al., CVPR 2022).

    The residual is what z - origin has outside the principal space; see `fit_vim`.
    """
    return torch.logsumexp(logits, dim=1) + alpha * residual(activations, origin, null_space)


def residual(activations: Tensor, origin: Tensor, null_space: Tensor) -> Tensor:
    """-|residual of z|, ViM without the logits (Wang et al., CVPR 2022). null_space (channels, channels - dim), orthonormal."""
    return -torch.linalg.vector_norm((activations - origin) @ null_space, dim=1)


def fit_vim(calibration: Iterable[Tensor], weight: Tensor, bias: Tensor, dim: float) -> dict:
    """origin, null_space and alpha of ViM.

    origin      -pinv(weight) bias, where all logits are as good as 0.
    null_space  all but the `dim` leading eigenvectors of (Z - origin)^T (Z - origin) / rows. dim 0 stands for the authors' rule,
                1000 for 2048 channels and more, else 512, and for half of the channels below 768, where they give none.
    alpha       sum of the largest logits over the sum of the residuals' norms, both over the calibration set.

    ValueError where the calibration activations span no more than dim dimensions: then nothing is left to measure.
    """
    origin, null_space = _null_space(calibration, weight, bias, dim, "vim.dim")
    logits, residuals = 0.0, 0.0
    for rows in _pieces(calibration):
        logits += linear(rows, weight, bias).amax(dim=1).sum(dtype=torch.float64).item()
        residuals -= residual(rows, origin, null_space).sum(dtype=torch.float64).item()
    return {"origin": origin, "null_space": null_space, "alpha": logits / residuals}


def fit_residual(calibration: Iterable[Tensor], weight: Tensor, bias: Tensor, dim: float) -> dict[str, Tensor]:
    """origin and null_space, as in `fit_vim`."""
    origin, null_space = _null_space(calibration, weight, bias, dim, "residual.dim")
    return {"origin": origin, "null_space": null_space}


def _null_space(calibration: Iterable[Tensor], weight: Tensor, bias: Tensor, dim: float, name: str) -> tuple[Tensor, Tensor]:
    origin = _origin(weight.double(), bias.double())
    _, mean, moment = _moments(calibration)
    shift = torch.outer(mean, origin)
    square = torch.outer(origin, origin)
    eigenvalues, vectors = torch.linalg.eigh(moment - shift - shift.T + square)
    rank = int((eigenvalues > _noise(moment + square)).sum())
    channels = weight.shape[1]
    dim = dim or (1000 if channels >= 2048 else 512 if channels >= 768 else channels // 2)
    dim = _whole(name, dim, rank - 1, "below the dimensions that the calibration activations span")
    return origin.to(weight.dtype), vectors[:, : channels - dim].to(weight.dtype).contiguous()


def _origin(weight: Tensor, bias: Tensor) -> Tensor:
    """-pinv(weight) bias, float64, by the eigenvectors of the smaller Gram matrix (a tenth of the time of the SVD in pinv)."""
    wide = weight.shape[0] <= weight.shape[1]
    gram = weight @ weight.T if wide else weight.T @ weight
    eigenvalues, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(eigenvalues > _noise(gram), 1 / eigenvalues, 0)
    solution = vectors @ (inverse * (vectors.T @ (bias if wide else weight.T @ bias)))
    return -(weight.T @ solution if wide else solution)


def neco(activations: Tensor, logits: Tensor, components: Tensor) -> Tensor:
    """|P z| / |z| times the largest logit, P on ID activations' leading principal components (NECO, Ammar et al., ICLR 2024).

    The paper's eq. 6 as it is written, with its calibration by the largest logit. The authors' code differs: there each channel
    is standardised first, and for ResNets the ratio stands alone. A row of zeros scores 0.
    """
    inside = torch.linalg.vector_norm(activations @ components, dim=1)
    length = torch.linalg.vector_norm(activations, dim=1).clamp(min=1e-12)
    return inside / length * logits.amax(dim=1)


def fit_neco(calibration: Iterable[Tensor], dim: float) -> dict[str, Tensor]:
    """components (channels, dim): the leading eigenvectors of the covariance of the calibration activations.

    dim 0 stands for 100, the default of the authors' code, or half of the channels below 200. ValueError where the calibration
    activations span fewer than dim dimensions.
    """
    _, mean, moment = _moments(calibration)
    eigenvalues, vectors = torch.linalg.eigh(moment - torch.outer(mean, mean))
    rank = int((eigenvalues > _noise(moment)).sum())
    dim = dim or min(100, len(mean) // 2)
    dim = _whole("neco.dim", dim, rank, "the dimensions that the calibration activations span")
    return {"components": vectors[:, -dim:].to(next(iter(calibration)).dtype).contiguous()}


# Scores by Gaussians around class means


def mahalanobis(activations: Tensor, mean: Tensor, whitening: Tensor, class_means: Tensor) -> Tensor:
    """-min over classes of (z - mu_c)^T S^-1 (z - mu_c), one covariance S for all (Mahalanobis, Lee et al., NeurIPS 2018).

    Of the penultimate activations alone: neither the paper's input perturbation nor its sum over layers.
    mean (channels,), whitening (channels, rank), class_means (classes, rank): see `fit_mahalanobis`.
    """
    z = (activations - mean) @ whitening
    return -(z.square().sum(dim=1) + _nearest(z, class_means))


def fit_mahalanobis(calibration: Iterable[Tensor], labels: Tensor | None) -> dict[str, Tensor]:
    """mean of all, whitening with whitening whitening^T = S^-1, and the class means in the whitened space around that mean.

    S is the mean over all images of (z - mu_c) (z - mu_c)^T (divided by their number, as in the paper's eq. 1). Where it has no
    inverse, with dead channels or fewer images than channels, it is the pseudo-inverse, as in the authors' use of scikit-learn.
    ValueError without labels, and where no class has two different images.
    """
    mean, whitening, class_means, _ = _within_classes(calibration, labels)
    dtype = next(iter(calibration)).dtype
    return {"mean": mean.to(dtype), "whitening": whitening.to(dtype), "class_means": class_means.to(dtype)}


def rmds(activations: Tensor, mean: Tensor, whitening: Tensor, class_means: Tensor, shares: Tensor) -> Tensor:
    """-min over classes of MD_c(z) - MD_0(z), MD_0 of one Gaussian for all images (RMDS, Ren et al., arXiv 2106.09022, 2021).

    MD as in `mahalanobis`. In coordinates that make the within-class covariance I and the covariance of all images diagonal,
    1 + d_j, the difference is, per class, sum over j of z_j^2 d_j / (1 + d_j) - 2 z_j m_cj + m_cj^2: where the class means do
    not vary the two distances cancel exactly. So only the `classes - 1` directions in which they do are computed, and no two
    large numbers are subtracted. shares (directions,) holds d_j / (1 + d_j).
    """
    z = (activations - mean) @ whitening
    return -(z.square() @ shares + _nearest(z, class_means))


def fit_rmds(calibration: Iterable[Tensor], labels: Tensor | None) -> dict[str, Tensor]:
    """As `fit_mahalanobis`, rotated and cut down to the directions in which class means vary, with `shares`.

    Where the within-class covariance has no inverse, both distances are taken in the space that it spans.
    """
    mean, whitening, class_means, frequencies = _within_classes(calibration, labels)
    between, rotation = torch.linalg.eigh(class_means.T @ (frequencies[:, None] * class_means))
    directions = min(len(class_means) - 1, len(between))
    between, rotation = between[len(between) - directions :].clamp(min=0), rotation[:, len(rotation) - directions :]
    dtype = next(iter(calibration)).dtype
    return {
        "mean": mean.to(dtype),
        "whitening": (whitening @ rotation).to(dtype),
        "class_means": (class_means @ rotation).to(dtype),
        "shares": (between / (1 + between)).to(dtype),
    }


def _nearest(z: Tensor, class_means: Tensor) -> Tensor:
    """min over classes of |m_c|^2 - 2 z m_c, which is the squared distance less |z|^2."""
    return torch.addmm(class_means.square().sum(dim=1), z, class_means.T, alpha=-2).amin(dim=1)


def _within_classes(calibration: Iterable[Tensor], labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, whitening, class means in the whitened space, share of the images in each class), float64."""
    if labels is None:
        raise ValueError("needs labels: calibration images in one folder for each class")
    rows, mean, moment = _moments(calibration)
    if len(labels) != rows:
        raise ValueError(f"needs one label for each calibration image, got {len(labels)} labels and {rows} images")
    # only classes that occur: another class has no mean to be near to
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = mean.new_zeros(len(classes), len(mean))
    start = 0
    for batch in _pieces(calibration):
        sums.index_add_(0, index[start : start + len(batch)].to(batch.device), batch.double())
        start += len(batch)
    counts = counts.to(sums)[:, None]
    deviations = sums / counts - mean
    within = moment - torch.outer(mean, mean) - deviations.T @ (counts / rows * deviations)
    eigenvalues, vectors = torch.linalg.eigh(within)
    spanned = eigenvalues > _noise(moment)
    if not spanned.any():
        raise ValueError("needs the spread within classes, and no class has two different calibration images")
    whitening = vectors[:, spanned] / eigenvalues[spanned].sqrt()
    return mean, whitening, deviations @ whitening, counts.squeeze(1) / rows


# What several of them need


def _whole(name: str, value: float, most: float = math.inf, meaning: str = "") -> int:
    """value as an int. ValueError where it is not a whole number from 1 to `most`."""
    if not (float(value).is_integer() and 1 <= value <= most):
        limit = f" to {most}, {meaning}" if meaning else " on"
        raise ValueError(f"{name} must be a whole number from 1{limit}; got {value:g}; choose another with --set {name}=N")
    return int(value)


def _pieces(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows in batches of at most PIECE, so that memory does not depend on how the caller batches them."""
    for batch in batches:
        yield from batch.split(PIECE)


def _mean(calibration: Iterable[Tensor]) -> Tensor:
    """Mean row, float64."""
    rows, total = 0, 0.0
    for batch in _pieces(calibration):
        rows += len(batch)
        total += batch.sum(dim=0, dtype=torch.float64)
    if not rows:
        raise ValueError("the calibration set is empty")
    return total / rows


def _moments(calibration: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
    """(rows, mean row, mean of z z^T), float64: float32 products would drown the small eigenvalues, which matter most here."""
    rows, total, moment = 0, 0.0, 0.0
    for batch in _pieces(calibration):
        batch = batch.double()
        rows += len(batch)
        total += batch.sum(dim=0)
        moment += batch.T @ batch
    if not rows:
        raise ValueError("the calibration set is empty")
    return rows, total / rows, moment / rows


def _noise(moment: Tensor) -> Tensor:
    """What rounding may leave of an eigenvalue that is 0, of a float64 matrix computed from this one."""
    return len(moment) * torch.finfo(moment.dtype).eps * moment.trace()


def _largest(blocks: Iterable[Tensor], k: int) -> Tensor:
    """The k largest entries of each row of the blocks side by side, in no order; a few thousand columns are held at a time."""
    held, width = [], 0
    for block in blocks:
        held.append(block)
        width += block.shape[1]
        # seldom, since each time costs as much for the k entries kept as for k new ones
        if width >= k + 2 * PIECE:
            held, width = [largest(torch.cat(held, dim=1), k)], k
    return largest(torch.cat(held, dim=1), k)


SCORES = {
    "msp": Score(msp),
    "odin": Score(odin, {"temperature": 1000}, reads="odin"),
    "energy": Score(energy, {"temperature": 1.0}),
    "maxlogit": Score(maxlogit),
    "gen": Score(gen, {"gamma": 0.1, "k": 100}),
    "lts": Score(lts, {"percentile": 95}),
    "dice": Score(dice, {"percentile": 70}, fit_dice),
    "knn": Score(knn, {"k": 1000}, fit_knn),
    "vim": Score(vim, {"dim": 0}, fit_vim),
    "residual": Score(residual, {"dim": 0}, fit_residual),
    "mahalanobis": Score(mahalanobis, fit=fit_mahalanobis),
    "rmds": Score(rmds, fit=fit_rmds),
    "nnguide": Score(nnguide, {"k": 10, "bank": 12812}, fit_nnguide),
    "fdbd": Score(fdbd, fit=fit_fdbd),
    "neco": Score(neco, {"dim": 0}, fit_neco),
}
