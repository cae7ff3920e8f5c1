"""Activations in, one number per image out, higher = more in-distribution: scores by the principal
space of calibration activations.

activations: (images, channels), logits: (images, classes).
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear

from lhact.methods.entries import Score
from lhact.methods.rectify import lengths
from lhact.methods.statistics import (
    in_dtype_of,
    mean_and_std,
    moments,
    pieces,
    rounding_noise,
    whole_number,
)


def vim(
    activations: Tensor, logits: Tensor, origin: Tensor, null_space: Tensor, alpha: float
) -> Tensor:
    """Energy less the virtual logit, E(z) - alpha |residual of z| (ViM, Wang et al., CVPR 2022).

    The residual is what z - origin has outside the principal space; see `fit_vim`.
    """
    return torch.logsumexp(logits, dim=1) + alpha * residual(activations, origin, null_space)


def fit_vim(
    calibration: Iterable[Tensor], weight: Tensor, bias: Tensor, dim: int | None
) -> dict[str, object]:
    """origin, null_space, alpha and dim of ViM.

    origin: -pinv(weight) bias, where all logits are as good as 0.
    null_space (channels, channels - dim): all but the `dim` leading eigenvectors of
        (Z - origin)^T (Z - origin) / rows.
    alpha: sum of the largest logits over the sum of the residuals' lengths, both over the
        calibration set.
    dim: None stands for the authors' rule, 1000 from 2048 channels on, else 512, and for half of
        the channels below 768, where they give none.

    ValueError where the calibration activations span no more than dim dimensions: then nothing is
    left to measure.
    """
    origin, null_space, dim = _null_space(calibration, weight, bias, dim, "vim.dim")
    logits, residuals = 0.0, 0.0
    for rows in pieces(calibration):
        logits += linear(rows, weight, bias).amax(dim=1).sum(dtype=torch.float64).item()
        residuals -= residual(rows, origin, null_space).sum(dtype=torch.float64).item()
    return {"origin": origin, "null_space": null_space, "alpha": logits / residuals, "dim": dim}


def residual(activations: Tensor, origin: Tensor, null_space: Tensor) -> Tensor:
    """-|residual of z|, ViM without the logits (Wang et al., CVPR 2022). null_space (channels,
    channels - dim), orthonormal."""
    return -lengths((activations - origin) @ null_space).squeeze(1)


def fit_residual(
    calibration: Iterable[Tensor], weight: Tensor, bias: Tensor, dim: int | None
) -> dict[str, object]:
    """origin, null_space and dim, as in `fit_vim`."""
    origin, null_space, dim = _null_space(calibration, weight, bias, dim, "residual.dim")
    return {"origin": origin, "null_space": null_space, "dim": dim}


def neco(activations: Tensor, logits: Tensor, components: Tensor) -> Tensor:
    """|P z| / |z| times the largest logit, P on ID activations' leading principal components (NECO,
    Ammar et al., ICLR 2024).

    This is the paper's eq. 6 as it is written, with its calibration by the largest logit; what the
    authors run on a ResNet is `neco_resnet`. A row of zeros scores 0.
    """
    return _share_inside(activations, components) * logits.amax(dim=1)


def fit_neco(calibration: Iterable[Tensor], dim: int | None) -> dict[str, object]:
    """components (channels, dim): the leading eigenvectors of the covariance of the calibration
    activations; and dim.

    dim None stands for 100, the default of the authors' code, or half of the channels below 200.
    ValueError where the calibration activations span fewer than dim dimensions.
    """
    components, dim = _leading(moments(calibration), dim, "neco.dim")
    return {**in_dtype_of(calibration, components=components), "dim": dim}


def neco_resnet(activations: Tensor, mean: Tensor, std: Tensor, components: Tensor) -> Tensor:
    """|P y| / |y| of y = (z - mean) / std, each channel standardised (NECO as its authors' code has
    it for ResNets: without the largest logit as a factor).

    A method of its own beside `neco`, not a parameter of it, since nothing is computed alike: their
    AUROC can be 50 points apart. mean and std (channels,), components (channels, dim).
    """
    return _share_inside((activations - mean) / std, components)


def fit_neco_resnet(calibration: Iterable[Tensor], dim: int | None) -> dict[str, object]:
    """mean and std of each channel, components of the standardised activations, and dim.

    std is 1 for a channel that is constant, as in the authors' use of scikit-learn's scaler. dim
    as in `fit_neco`.
    """
    mean, std = mean_and_std(calibration)
    std = torch.where(std > 0, std, 1)
    standardised = moments(calibration, lambda rows: (rows - mean) / std)
    components, dim = _leading(standardised, dim, "neco-resnet.dim")
    return {**in_dtype_of(calibration, mean=mean, std=std, components=components), "dim": dim}


def _null_space(
    calibration: Iterable[Tensor], weight: Tensor, bias: Tensor, dim: int | None, name: str
) -> tuple[Tensor, Tensor, int]:
    """(origin, null_space, dim); see `fit_vim`. name: of dim, for the message."""
    origin = _origin(weight.double(), bias.double())
    _, mean, moment = moments(calibration)
    shift = torch.outer(mean, origin)
    square = torch.outer(origin, origin)
    eigenvalues, vectors = torch.linalg.eigh(moment - shift - shift.T + square)
    rank = int((eigenvalues > rounding_noise(moment + square)).sum())
    channels = weight.shape[1]
    if dim is None:
        dim = 1000 if channels >= 2048 else 512 if channels >= 768 else channels // 2
    spanned = "below the dimensions that the calibration activations span"
    dim = whole_number(name, dim, rank - 1, spanned)
    null_space = vectors[:, : channels - dim].to(weight.dtype).contiguous()
    return origin.to(weight.dtype), null_space, dim


def _origin(weight: Tensor, bias: Tensor) -> Tensor:
    """-pinv(weight) bias, float64, by the eigenvectors of the smaller Gram matrix (a tenth of the
    time of the SVD in pinv)."""
    wide = weight.shape[0] <= weight.shape[1]
    gram = weight @ weight.T if wide else weight.T @ weight
    eigenvalues, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(eigenvalues > rounding_noise(gram), 1 / eigenvalues, 0)
    solution = vectors @ (inverse * (vectors.T @ (bias if wide else weight.T @ bias)))
    origin: Tensor = weight.T @ solution if wide else solution
    return -origin


def _share_inside(rows: Tensor, components: Tensor) -> Tensor:
    """|P z| / |z| of each row z, (rows,); 0 for a row of zeros."""
    return (lengths(rows @ components) / lengths(rows).clamp(min=1e-12)).squeeze(1)


def _leading(
    statistics: tuple[int, Tensor, Tensor], dim: int | None, name: str
) -> tuple[Tensor, int]:
    """(components, dim); see `fit_neco`. statistics: as `moments` returns them."""
    _, mean, moment = statistics
    eigenvalues, vectors = torch.linalg.eigh(moment - torch.outer(mean, mean))
    rank = int((eigenvalues > rounding_noise(moment)).sum())
    if dim is None:
        dim = min(100, len(mean) // 2)
    dim = whole_number(name, dim, rank, "the dimensions that the calibration activations span")
    return vectors[:, -dim:].contiguous(), dim


SCORES_BY_SUBSPACE = {
    "vim": Score(vim, {"dim": None}, fit_vim),
    "residual": Score(residual, {"dim": None}, fit_residual),
    "neco": Score(neco, {"dim": None}, fit_neco),
    "neco-resnet": Score(neco_resnet, {"dim": None}, fit_neco_resnet),
}
