"""Penultimate activations in, rectified activations out: LHAct and its relatives.

A rectifier is a pure function of a (images, channels) tensor. It returns a new tensor of the same
shape and dtype and leaves its argument as it was. What it must know about ID data arrives as
further arguments: thresholds (`low`, `high`), or what the entry's `fit` computes from calibration
activations.

To add one, write the function and an entry of RECTIFIERS; its name is then a method of eval.py.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear, threshold

from lhact.methods.entries import Count, Percent, Percentile, Positive, Rectifier, Threshold
from lhact.methods.statistics import in_dtype_of, mean_and_std, mean_row, pieces, whole_number
from lhact.methods.topk import largest, largest_with_columns

# LHAct's published thresholds, for torchvision's ResNet-50 with IMAGENET1K_V1 weights.
LHACT_LOW, LHACT_HIGH = 0.21940805315971373, 1.3520756840705868


def lhact(activations: Tensor, low: Threshold, high: Threshold, order: Positive = 2) -> Tensor:
    """Raise extremely low activations to `low`, then cap extremely high ones softly (LHAct, Yuan et
    al., ACM MM 2023).

        x' = max(x, low)
        f(x) = x'                                            where x' <  high
        f(x) = x' / sqrt(1 + (x' / high)^(2 order)) + low    where x' >= high

    The upper branch is the gain of a Butterworth filter of that order. f jumps downwards at `high`
    and then decreases towards `low`, as published.

    activations: floating point, any shape. Returns a new tensor of the same shape and dtype.
    ValueError where high <= 0.
    """
    _require_cutoff(high)
    low = cut_to_range(low, activations.dtype)
    # `above` is x' in the upper branch and 0 elsewhere, `rectified` the other way round; then they
    # are added. A comparison and torch.where would cost more than twice as much.
    rectified = activations.clamp(min=low)
    above = threshold(rectified, _just_below(high, activations.dtype), 0)
    rectified.sub_(above)
    if low >= 0:
        rectified.clamp_(min=low)  # the upper branch's + low: nothing in the lower one is below it
    else:
        rectified.add_(above > 0, alpha=low)
    return rectified.addcdiv_(above, _attenuation(above, high, order))


def lhact_low(activations: Tensor, low: Threshold) -> Tensor:
    """max(x, low): LHAct's first step alone, an ablation (activations of any shape)."""
    return activations.clamp(min=cut_to_range(low, activations.dtype))


def lhact_high(activations: Tensor, high: Threshold, order: Positive = 2) -> Tensor:
    """LHAct's second step alone, an ablation. Nothing is raised, so the upper branch adds nothing.

        f(x) = x                                      where x <  high
        f(x) = x / sqrt(1 + (x / high)^(2 order))     where x >= high

    activations: any shape. ValueError where high <= 0.
    """
    return torch.where(activations < high, activations, bfact(activations, high, order))


def bats(activations: Tensor, mean: Tensor, std: Tensor, lambda_: Positive) -> Tensor:
    """Clip each channel to its typical set, mean - lambda std ... mean + lambda std (BATS, Zhu et
    al., NeurIPS 2022).

    activations (images, channels), mean and std (channels,). Two readings exist: the paper derives
    mean and std from the last batch normalisation, the authors' released code reads empirical ones
    of the penultimate activations from a file. This is the latter, since any network has them.
    lambda 1.05 is their setting for ImageNet.
    """
    spread = cut_to_range(lambda_, std.dtype) * std
    return activations.clamp(mean - spread, mean + spread)


def fit_bats(calibration: Iterable[Tensor]) -> dict[str, Tensor]:
    """Per-channel mean and (population) standard deviation, accumulated in float64."""
    mean, std = mean_and_std(calibration)
    return in_dtype_of(calibration, mean=mean, std=std)


def react(activations: Tensor, high: Threshold) -> Tensor:
    """min(x, high) (ReAct, Sun et al., NeurIPS 2021). Its c is the 90th percentile of ID
    activations, 1.0 on ImageNet."""
    return activations.clamp(max=cut_to_range(high, activations.dtype))


def bfact(activations: Tensor, high: Threshold, order: Positive = 2) -> Tensor:
    """x / sqrt(1 + (x / high)^(2 order)), a Butterworth filter of all activations (BFAct, Kong & Li
    2022).

    Unlike LHAct's, it also lowers activations below `high`, and nothing is added. `high` is the
    95th percentile of ID activations. The published table's own value for ResNet-50 is not in our
    sources; LHAct's `high` for that network stands in for it. Negative activations are filtered by
    their magnitude. ValueError where high <= 0.
    """
    _require_cutoff(high)
    attenuation = _attenuation(activations, high, order)
    return torch.div(activations, attenuation, out=attenuation)


def vra(activations: Tensor, low: Threshold, high: Threshold) -> Tensor:
    """0 where x < low, x between, `high` where x > high (VRA, Xu et al., NeurIPS 2023).

    Activations below `low` become zero, not `low` (OpenOOD and pytorch-ood clip them up to `low`;
    the paper and the authors' code do not). The authors' commands take 0.5 and 1.0 on
    ImageNet/ResNet-50, elsewhere quantiles 0.6 and 0.95 (0.9 for CIFAR-10) of each channel by
    itself; here, as for every rectifier, they are percentiles of all channels together.
    """
    cut = activations.clamp(max=cut_to_range(high, activations.dtype))
    return cut.mul_(activations >= low)


def ash_p(activations: Tensor, percentile: Percent) -> Tensor:
    """Keep each image's largest activations, zero the lowest `percentile` % (ASH-P, Djurisic et
    al., ICLR 2023).

    activations (images, channels). Exactly `kept_channels` are kept. Of equal activations at the
    border some are kept and others not: keeping all of them would fill whole rows in ASH-B, where
    many activations are 0. Largest means by value, not by magnitude.
    """
    kept = kept_channels(activations, percentile)
    values, channels = largest_with_columns(activations, kept)
    return torch.zeros_like(activations).scatter_(1, channels, values)


def ash_b(activations: Tensor, percentile: Percent) -> Tensor:
    """Prune as ASH-P and give each of the k kept activations the value sum(x) / k, the sum taken
    before pruning (ASH-B)."""
    # torch's own choice among equal activations, as in the authors' code: where fewer than k are
    # positive, zeros are filled too.
    kept = kept_channels(activations, percentile)
    channels = activations.topk(kept, dim=1, sorted=False).indices
    fill = activations.sum(dim=1, keepdim=True) / kept
    return torch.zeros_like(activations).scatter_(1, channels, fill.expand_as(channels))


def ash_s(activations: Tensor, percentile: Percent) -> Tensor:
    """Prune as ASH-P and multiply the kept activations by exp(s1 / s2), s1 the sum before pruning,
    s2 after it (ASH-S).

    An image with s2 <= 0, such as one without any activation, has no such ratio; its kept
    activations stay as they are.
    """
    kept = kept_channels(activations, percentile)
    values, channels = largest_with_columns(activations, kept)
    return torch.zeros_like(activations).scatter_(1, channels, values * _gain(activations, values))


def scale(activations: Tensor, percentile: Percent) -> Tensor:
    """x exp(s1 / s2), nothing pruned (SCALE, Xu et al., ICLR 2024).

    s1 is the image's sum, s2 the sum of the activations that ASH would keep; an image with s2 <= 0
    stays as it is. activations (images, channels).
    """
    kept = largest(activations, kept_channels(activations, percentile))
    return activations * _gain(activations, kept)


def l2norm(activations: Tensor) -> Tensor:
    """x / |x|, each image's activations scaled to unit length; a row of zeros stays zero.

    `l2norm+mahalanobis` is Mahalanobis++ (Mueller & Hein, ICML 2025), and `l2norm` before vim,
    residual, rmds or neco is the normalised form of those. activations (images, channels).
    """
    return activations / lengths(activations).clamp(min=1e-12)


def ras(activations: Tensor, profile: Tensor) -> Tensor:
    """Replace each image's k-th largest activation by `profile`'s k-th largest value, so that every
    image has the same activations and every channel keeps its rank (RAS, Guglielmo & Masana, arXiv
    2604.08572, 2026).

    activations (images, channels), profile (channels,) in ascending order; see `fit_ras`. Of equal
    activations, such as several zeros, a later channel has the higher rank: the paper leaves their
    order open, and this one does not depend on the batch or the device.
    """
    channels = activations.argsort(dim=1, stable=True)
    return torch.empty_like(activations).scatter_(1, channels, profile.expand_as(activations))


def fit_ras(calibration: Iterable[Tensor]) -> dict[str, Tensor]:
    """profile (channels,): the mean over calibration images of their k-th smallest activation."""
    profile = mean_row(calibration, lambda rows: rows.sort(dim=1).values)
    return in_dtype_of(calibration, profile=profile)


def optfs(activations: Tensor, low: Threshold, high: Threshold, gains: Tensor) -> Tensor:
    """x gains[i] where x lies in the i-th of equally wide intervals from `low` to `high`, 0 below
    `low` and from `high` on (OptFS, Zhao et al., ICLR 2024, without OOD data).

    activations (images, channels), gains (bins,); see `fit_optfs`. `optfs` with the energy score is
    the authors' variant for energies. Their other one scores by the product of the shaped
    activations with the weights of the class that was predicted before shaping; `optfs+maxlogit`
    comes close to it: it takes the largest logit after shaping, and adds the bias.
    """
    interval, inside = _intervals(activations, low, high, len(gains))
    return gains[interval].mul_(activations).mul_(inside)


def fit_optfs(
    calibration: Iterable[Tensor],
    weight: Tensor,
    bias: Tensor,
    low: Threshold,
    high: Threshold,
    bins: Count,
) -> dict[str, Tensor]:
    """gains (bins,): proportional to what the activations of each interval add, on average, to the
    logit of the predicted class, and 1000 long as a vector.

        gain_i ~ mean over images of sum over channels with x in interval i of w_pred x

    The length matters to the energy score alone; 1000 is that of the authors' code, as are 100
    intervals from the 0.1th to the 99.9th percentile. ValueError where low >= high, or where no
    activation lies between.
    """
    if not low < high:
        raise ValueError(f"optfs.low must be below optfs.high, got {low:g} and {high:g}")
    bins = whole_number("optfs.bins", bins, 10**6, "a bound on memory")
    totals = weight.new_zeros(bins, dtype=torch.float64)
    for rows in pieces(calibration):
        predicted = linear(rows, weight, bias).argmax(dim=1)
        interval, inside = _intervals(rows, low, high, bins)
        contributions = weight[predicted].mul_(rows).mul_(inside).double()
        totals.index_add_(0, interval.flatten(), contributions.flatten())
    length = torch.linalg.vector_norm(totals)
    if not length > 0:
        raise ValueError(
            f"no calibration activation between low {low:g} and high {high:g} adds to a logit; "
            "choose others with --set optfs.low=X --set optfs.high=X"
        )
    return {"gains": (1000 / length * totals).to(weight.dtype)}


def _intervals(activations: Tensor, low: float, high: float, bins: int) -> tuple[Tensor, Tensor]:
    """Which interval each activation lies in, the nearest one where it lies in none, and whether it
    lies in one."""
    low, high = (cut_to_range(limit, activations.dtype) for limit in (low, high))
    position = (activations - low) * cut_to_range(bins / (high - low), activations.dtype)
    inside = (activations >= low) & (activations < high)
    # Clamped twice: a float may hold neither what is too large for an index nor bins - 1 exactly.
    return position.clamp(0, bins).long().clamp_(max=bins - 1), inside


def kept_channels(activations: Tensor, percentile: Percent) -> int:
    """How many activations of each image are left after pruning `percentile` %: of n channels
    n - round(n percentile / 100), as in ASH's code, and at least one. ValueError outside 0 to 100.
    """
    channels = activations.shape[1]
    return max(1, channels - round(channels * Percentile(percentile).percent / 100))


def lengths(rows: Tensor) -> Tensor:
    """Euclidean length of each row, (rows, 1), finite also where its square overflows."""
    plain = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    wide = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    return torch.where(plain.isinf(), wide.to(rows.dtype), plain)


def _require_cutoff(high: float) -> None:
    if not high > 0:
        raise ValueError(f"high must be above 0, the cutoff of a filter; got {high:g}")


def _attenuation(activations: Tensor, high: float, order: float) -> Tensor:
    """sqrt(1 + (x / high)^(2 order)) as a new tensor. Where the power overflows it is infinite, and
    x divided by it 0, which is right in the limit."""
    # Squared first: an order that is not whole would make nan of negative activations, and pow(2)
    # is a mere product. In place, since fresh memory costs more here than arithmetic. Root and
    # quotient are cheaper on a CPU than rsqrt and product.
    inverse = cut_to_range(1 / high, activations.dtype)
    return (activations * inverse).square_().pow_(order).add_(1).sqrt_()


def _just_below(value: float, dtype: torch.dtype) -> float:
    """A number that rounds to the largest number of that dtype below `value` as that dtype has it,
    so that x > _just_below(value) means x >= value."""
    info = torch.finfo(dtype)
    value = cut_to_range(value, dtype)
    spacing = info.eps * 2.0 ** (math.frexp(value)[1] - 1)
    return round(value / spacing) * spacing * (1 - info.eps / 2)


def cut_to_range(value: float, dtype: torch.dtype) -> float:
    """`value`, or the closest finite number of that dtype, which clips activations alike. torch
    raises an error for a limit that the dtype cannot hold."""
    info = torch.finfo(dtype)
    return min(max(value, info.min), info.max)


def _gain(activations: Tensor, kept: Tensor) -> Tensor:
    """exp(sum of all / sum of kept) per image, (images, 1); 1 where nothing positive is kept."""
    after = kept.sum(dim=1, keepdim=True)
    return torch.where(after > 0, torch.exp(activations.sum(dim=1, keepdim=True) / after), 1)


RECTIFIERS = {
    "lhact": Rectifier(
        lhact,
        {"low": Percentile(33.7), "high": Percentile(95.5), "order": 2},
        published={"low": LHACT_LOW, "high": LHACT_HIGH},
    ),
    "lhact-low": Rectifier(lhact_low, {"low": Percentile(33.7)}, published={"low": LHACT_LOW}),
    "lhact-high": Rectifier(
        lhact_high, {"high": Percentile(95.5), "order": 2}, published={"high": LHACT_HIGH}
    ),
    "bats": Rectifier(bats, {"lambda_": 1.05}, fit=fit_bats),
    "react": Rectifier(react, {"high": Percentile(90)}, published={"high": 1.0}),
    "bfact": Rectifier(bfact, {"high": Percentile(95), "order": 2}, published={"high": LHACT_HIGH}),
    "vra": Rectifier(
        vra, {"low": Percentile(60), "high": Percentile(95)}, published={"low": 0.5, "high": 1.0}
    ),
    "ash-p": Rectifier(ash_p, {"percentile": 60}),
    "ash-b": Rectifier(ash_b, {"percentile": 65}),
    "ash-s": Rectifier(ash_s, {"percentile": 90}),
    "scale": Rectifier(scale, {"percentile": 85}),
    "l2norm": Rectifier(l2norm),
    "ras": Rectifier(ras, fit=fit_ras),
    "optfs": Rectifier(
        optfs, {"low": Percentile(0.1), "high": Percentile(99.9), "bins": 100}, fit=fit_optfs
    ),
}
