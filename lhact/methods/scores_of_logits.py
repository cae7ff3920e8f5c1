"""Logits in, one number per image out, higher = more in-distribution: scores of the logits alone.

logits: (images, classes). Those that measure how sharp the softmax is work with the gaps between
the logits, never with probabilities: float32 rounds a probability near 1 to 1, and what it makes
equal counts as right in FPR95.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lhact.methods.entries import Count, Positive, Score
from lhact.methods.statistics import whole_number
from lhact.methods.topk import largest


def msp(logits: Tensor) -> Tensor:
    """Maximum softmax probability (Hendrycks & Gimpel, ICLR 2017), as the log odds of the top
    class, log(p / (1 - p)).

        -logsumexp over the other classes of (l_c - l_top)

    This is strictly monotone in the probability p, so thresholds and ranks are the same, but it
    does not saturate. ValueError for a single class.
    """
    _require_two_classes(logits)
    _, odds_against = _against_top(logits)
    return -odds_against.squeeze(1)


def odin(logits: Tensor, temperature: Positive) -> Tensor:
    """Maximum softmax probability of logits / temperature, of images that ODIN has perturbed (Liang
    et al., ICLR 2018), as log odds.

        log(p_top / mean of the other p) = -log mean over the others of exp((l_c - l_top) / T)

    This is strictly monotone in p_top, as msp is. The mean where msp has the sum takes off
    log(classes - 1), beside which a high temperature would leave few digits of a float32.
    ValueError for a single class.
    """
    _require_two_classes(logits)
    others = logits.shape[1] - 1
    gaps = (logits - logits.amax(dim=1, keepdim=True)) / _not_zero(temperature, logits.dtype)
    # The top class adds expm1(0) = 0. Near -1, in a sharp softmax, the sum has lost its digits.
    flat = torch.expm1(gaps).sum(dim=1) / others
    _, odds_against = _against_top(gaps)
    sharp = odds_against.squeeze(1) - math.log(others)
    return -torch.where(flat > -0.5, torch.log1p(flat), sharp)


def energy(logits: Tensor, temperature: Positive = 1.0) -> Tensor:
    """temperature * logsumexp(logits / temperature), the negative free energy (Liu et al., NeurIPS
    2020, eq. 4)."""
    if temperature == 1:  # the same, without two more passes over the logits
        return torch.logsumexp(logits, dim=1)
    temperature = _not_zero(temperature, logits.dtype)
    top = logits.amax(dim=1, keepdim=True)
    return top.squeeze(1) + temperature * torch.logsumexp((logits - top) / temperature, dim=1)


def maxlogit(logits: Tensor) -> Tensor:
    """The largest logit (Hendrycks et al., ICML 2022)."""
    return logits.amax(dim=1)


def gen(logits: Tensor, gamma: Positive, k: Count) -> Tensor:
    """Negative generalised entropy, -sum of p^gamma (1 - p)^gamma over the k largest p (GEN, Liu et
    al., CVPR 2023).

    p = softmax(logits); k is the paper's M, and more than there are classes means all of them. This
    is the paper's sum (pytorch-ood takes the mean over p clamped to 1e-7 ... 1 - 1e-7). It is
    computed from log p and log(1 - p): with gamma 0.1, 1 - p = 1e-9 counts as 0.126, and float32
    would have rounded it away. ValueError where k is not a whole number from 1 on.
    """
    k = min(whole_number("gen.k", k), logits.shape[1])
    gaps, odds = _against_top(logits)
    total = softplus(odds)
    log_p = largest(gaps, k - 1) - total
    top = torch.exp(gamma * (odds - 2 * total)).squeeze(1)
    return -(top + torch.exp(gamma * (log_p + torch.log1p(-log_p.exp()))).sum(dim=1))


def entropy(logits: Tensor) -> Tensor:
    """Negative Shannon entropy of the softmax, sum of p log p, as the score -log(entropy).

    This is strictly monotone in the entropy, so thresholds and ranks are the same, but it does not
    saturate where one probability is nearly 1. Used as an OOD score by Chan et al., ICCV 2021.
    ValueError for a single class.
    """
    _require_two_classes(logits)
    log_p = log_softmax(logits)
    _, odds = _against_top(logits)
    # log(-log p_top) = log(log(1 + exp(odds))), which is odds to all digits where exp underflows
    log_top = torch.where(odds < -40, odds, softplus(odds).log())
    is_top = log_p == log_p.amax(dim=1, keepdim=True)
    log_surprise = torch.where(is_top, log_top, (-log_p).log())
    return -torch.logsumexp(log_p + log_surprise, dim=1)


def log_softmax(logits: Tensor) -> Tensor:
    """log p, (images, classes). Other than torch's, it keeps all digits of a p near 1."""
    _, odds = _against_top(logits)
    return logits - logits.amax(dim=1, keepdim=True) - softplus(odds)


def _against_top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(gaps, odds): gaps (images, classes) are l_c - l_top, -inf at the top class itself; odds
    (images, 1) are their logsumexp, log((1 - p_top) / p_top)."""
    top = logits.argmax(dim=1, keepdim=True)
    gaps = (logits - logits.gather(1, top)).scatter_(1, top, -math.inf)
    return gaps, torch.logsumexp(gaps, dim=1, keepdim=True)


def _require_two_classes(logits: Tensor) -> None:
    if logits.shape[1] < 2:
        raise ValueError("needs a head of two or more classes, got one: its probability is 1")


def _not_zero(temperature: float, dtype: torch.dtype) -> float:
    """The temperature, or the closest number that the dtype holds as neither 0 nor infinity."""
    info = torch.finfo(dtype)
    return min(max(temperature, info.tiny), info.max)


SCORES_OF_LOGITS = {
    "msp": Score(msp),
    "odin": Score(odin, {"temperature": 1000}, perturbed=True),
    "energy": Score(energy, {"temperature": 1.0}),
    "maxlogit": Score(maxlogit),
    "gen": Score(gen, {"gamma": 0.1, "k": 100}),
    "entropy": Score(entropy),
}
