"""Penultimate activations in, rectified activations out: LHAct and its relatives.

Every rectifier is a pure function of a (images, channels) tensor; it returns a new tensor of the same shape and dtype and
leaves its argument as it was. What it must know about ID data arrives as further arguments: thresholds (`low`, `high`), which
may be given as percentiles of calibration activations, or what the entry's `fit` computes from them.

To add one, write the function and add an entry to RECTIFIERS; the name is then a method of eval.py.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

from lhact.methods.topk import largest, largest_with_columns


class Rectifier(NamedTuple):
    """One entry of RECTIFIERS.

    function    (activations, **parameters) -> activations.
    parameters  defaults on any network. `X_percentile` stands for the argument `X`: that percentile of all calibration
                activations, every channel together.
    published   the paper's constants, which replace the percentiles where the network is the paper's, torchvision's
                ResNet-50 with IMAGENET1K_V1 weights. They mean nothing for another network.
    fit         (calibration, ...) -> further arguments of `function`, by name. `calibration` can be iterated any number of
                times and yields (rows, channels) float32 tensors; `labels`, `weight` and `bias` and any parameter are handed
                in where `fit` names them.
    """

    function: Callable[..., Tensor]
    parameters: Mapping[str, float] = {}
    published: Mapping[str, float] = {}
    fit: Callable[..., dict] | None = None


def lhact(activations: Tensor, low: float, high: float, order: float = 2) -> Tensor:
    """Raise extremely low activations to `low`, then cap extremely high ones softly (LHAct, Yuan et al., ACM MM 2023).

        x' = max(x, low)
        f(x) = x'                                            where x' <  high
        f(x) = x' / sqrt(1 + (x' / high)^(2 order)) + low    where x' >= high

    The upper branch is the gain of a Butterworth filter of that order; f jumps downwards at `high` and then decreases towards
    `low`, as published.

    activations: floating point, any shape. Returns a new tensor of the same shape and dtype. ValueError where high <= 0.
    """
    # `above` is x' in the upper branch and 0 elsewhere, `rectified` the other way round; then they are added. A comparison and
    # torch.where would say the same at more than twice the cost.
    rectified = activations.clamp(min=low)
    above = threshold(rectified, _just_below(high, activations.dtype), 0)
    rectified.sub_(above)
    if low >= 0:
        rectified.clamp_(min=low)  # the upper branch's + low: nothing in the lower one is below it
    else:
        rectified.add_(above > 0, alpha=low)
    return rectified.addcdiv_(above, _attenuation(above, high, order))


def lhact_low(activations: Tensor, low: float) -> Tensor:
    """max(x, low): LHAct's first step alone, an ablation (activations of any shape)."""
    return activations.clamp(min=low)


def lhact_high(activations: Tensor, high: float, order: float = 2) -> Tensor:
    """LHAct's second step alone, an ablation: nothing is raised, so nothing is added to the upper branch either.

        f(x) = x                                      where x <  high
        f(x) = x / sqrt(1 + (x / high)^(2 order))     where x >= high

    activations: any shape. ValueError where high <= 0.
    """
    return torch.where(activations < high, activations, _butterworth(activations, high, order))


def bats(activations: Tensor, mean: Tensor, std: Tensor, lambda_: float) -> Tensor:
    """Clip each channel to its typical set, mean - lambda std ... mean + lambda std (BATS, Zhu et al., NeurIPS 2022).

    activations (images, channels), mean and std (channels,). Two readings: the paper derives mean and std from the last batch
    normalisation, the authors' released code reads empirical ones of the penultimate activations from a file; the latter is
    taken, since any network has them. lambda 1.05 is their setting for ImageNet.
    """
    return activations.clamp(mean - lambda_ * std, mean + lambda_ * std)


def fit_bats(calibration: Iterable[Tensor]) -> dict[str, Tensor]:
    """Per-channel mean and (population) standard deviation of the calibration activations, accumulated in float64."""
    mean = _mean(calibration)
    # a second pass instead of E[x^2] - mean^2, so that a constant channel has exactly no spread
    std = _mean((batch - mean).square() for batch in calibration).sqrt()
    dtype = next(iter(calibration)).dtype
    return {"mean": mean.to(dtype), "std": std.to(dtype)}


def react(activations: Tensor, high: float) -> Tensor:
    """min(x, high) (ReAct, Sun et al., NeurIPS 2021; its c is the 90th percentile of ID activations, 1.0 on ImageNet)."""
    return activations.clamp(max=high)


def bfact(activations: Tensor, high: float, order: float = 2) -> Tensor:
    """x / sqrt(1 + (x / high)^(2 order)), a Butterworth filter over all activations (BFAct, Kong & Li 2022).

    Unlike LHAct's, it also lowers activations below `high`, and nothing is added. `high` is the 95th percentile of ID
    activations; the published table's own value for ResNet-50 is not in our sources, LHAct's `high` for that network stands in
    for it. Negative activations are filtered by their magnitude. ValueError where high <= 0.
    """
    return _butterworth(activations, high, order)


def vra(activations: Tensor, low: float, high: float) -> Tensor:
    """0 where x < low, x between, `high` where x > high (VRA, Xu et al., NeurIPS 2023).

    Activations below `low` become zero, not `low` (OpenOOD and pytorch-ood clip them up to `low`; the paper and the authors'
    code do not). The authors' commands take 0.5 and 1.0 on ImageNet/ResNet-50, and elsewhere quantiles 0.6 and 0.95 (0.9 for
    CIFAR-10) of each channel by itself; here, as for every rectifier, of all channels together.
    """
    return activations.clamp(max=high).mul_(activations >= low)


def ash_p(activations: Tensor, percentile: float) -> Tensor:
    """Keep each image's largest activations, zero the lowest `percentile` % (ASH-P, Djurisic et al., ICLR 2023).

    activations (images, channels). Of n channels, n - round(n percentile / 100) are kept, as in the authors' code, and at least
    one. It is exactly that number: of equal activations at the border some are kept and others not (keeping all of them would
    fill whole rows in ASH-B, where many activations are 0). Largest means by value, not by magnitude.
    """
    values, channels = largest_with_columns(activations, _kept(activations, percentile))
    return torch.zeros_like(activations).scatter_(1, channels, values)


def ash_b(activations: Tensor, percentile: float) -> Tensor:
    """Prune as ASH-P and give each of the k kept activations the value sum(x) / k, the sum taken before pruning (ASH-B)."""
    # torch's own choice among equal activations, as in the authors' code: where fewer than k are positive, zeros are filled too.
    channels = activations.topk(_kept(activations, percentile), dim=1, sorted=False).indices
    fill = activations.sum(dim=1, keepdim=True) / channels.shape[1]
    return torch.zeros_like(activations).scatter_(1, channels, fill.expand_as(channels))


def ash_s(activations: Tensor, percentile: float) -> Tensor:
    """Prune as ASH-P and multiply the kept activations by exp(s1 / s2), s1 the sum before pruning, s2 after it (ASH-S).

    An image with s2 <= 0, say without any activation, has no such ratio; its kept activations stay as they are.
    """
    values, channels = largest_with_columns(activations, _kept(activations, percentile))
    return torch.zeros_like(activations).scatter_(1, channels, values * _gain(activations, values))


def scale(activations: Tensor, percentile: float) -> Tensor:
    """x exp(s1 / s2), nothing pruned (SCALE, Xu et al., ICLR 2024).

    s1 is the image's sum, s2 the sum of the activations that ASH would keep, their number as in `ash_p`; an image with s2 <= 0
    stays as it is. activations (images, channels).
    """
    return activations * _gain(activations, largest(activations, _kept(activations, percentile)))


def _butterworth(activations: Tensor, high: float, order: float) -> Tensor:
    """x / sqrt(1 + (x / high)^(2 order)) as a new tensor."""
    attenuation = _attenuation(activations, high, order)
    return torch.div(activations, attenuation, out=attenuation)


def _attenuation(activations: Tensor, high: float, order: float) -> Tensor:
    """sqrt(1 + (x / high)^(2 order)) as a new tensor."""
    if not high > 0:
        raise ValueError(f"high must be above 0, the cutoff of a filter; got {high:g}")
    # Squared first: an order that is not whole would make nan of negative activations, and pow(2) is a mere product. In place,
    # since fresh memory costs more here than arithmetic. Root and quotient are cheaper on a CPU than rsqrt and product.
    return (activations * (1 / high)).square_().pow_(order).add_(1).sqrt_()


@lru_cache
def _just_below(value: float, dtype: torch.dtype) -> float:
    """The largest number of that dtype below `value`, so that x > _just_below(value) means x >= value."""
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(-torch.inf, dtype=dtype)).item()


def _kept(activations: Tensor, percentile: float) -> int:
    """How many activations of each image are left after pruning `percentile` %."""
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be between 0 and 100, got {percentile:g}")
    channels = activations.shape[1]
    return max(1, channels - round(channels * percentile / 100))


def _gain(activations: Tensor, kept: Tensor) -> Tensor:
    """exp(sum of all / sum of the kept) per image, (images, 1); 1 where nothing positive was kept."""
    after = kept.sum(dim=1, keepdim=True)
    return torch.where(after > 0, torch.exp(activations.sum(dim=1, keepdim=True) / after), 1)


def _mean(batches: Iterable[Tensor]) -> Tensor:
    """Mean row of all batches, float64, one batch in memory at a time."""
    rows, total = 0, 0.0
    for batch in batches:
        rows += len(batch)
        total += batch.sum(dim=0, dtype=torch.float64)
    if not rows:
        raise ValueError("the calibration set is empty")
    return total / rows


RECTIFIERS = {
    "lhact": Rectifier(
        lhact,
        parameters={"low_percentile": 33.7, "high_percentile": 95.5, "order": 2},
        published={"low": 0.21940805315971373, "high": 1.3520756840705868},
    ),
    "lhact-low": Rectifier(lhact_low, parameters={"low_percentile": 33.7}, published={"low": 0.21940805315971373}),
    "lhact-high": Rectifier(
        lhact_high,
        parameters={"high_percentile": 95.5, "order": 2},
        published={"high": 1.3520756840705868},
    ),
    "bats": Rectifier(bats, parameters={"lambda_": 1.05}, fit=fit_bats),
    "react": Rectifier(react, parameters={"high_percentile": 90}, published={"high": 1.0}),
    "bfact": Rectifier(bfact, parameters={"high_percentile": 95, "order": 2}, published={"high": 1.3520756840705868}),
    "vra": Rectifier(
        vra,
        parameters={"low_percentile": 60, "high_percentile": 95},
        published={"low": 0.5, "high": 1.0},
    ),
    "ash-p": Rectifier(ash_p, parameters={"percentile": 60}),
    "ash-b": Rectifier(ash_b, parameters={"percentile": 65}),
    "ash-s": Rectifier(ash_s, parameters={"percentile": 90}),
    "scale": Rectifier(scale, parameters={"percentile": 85}),
}
