"""Activations in, one number per image out, higher = more in-distribution: scores by the nearest
calibration images.

activations: (images, channels).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from lhact.methods import statistics
from lhact.methods.entries import Count, Score
from lhact.methods.rectify import l2norm
from lhact.methods.statistics import count_rows, pieces, whole_number
from lhact.methods.topk import largest


def knn(activations: Tensor, neighbours: Iterable[Tensor], k: Count) -> Tensor:
    """-(Euclidean distance to the k-th nearest calibration image), all rows scaled to unit length
    (KNN, Sun et al., ICML 2022).

    neighbours yields the calibration activations in batches. It is read once per call and never
    held as a whole; to trace the function, give a list or tuple of tensors. A row of zeros stays
    zero. The authors' code takes the squared distance, which orders images alike. The products of
    unit rows carry float32's 1e-7, so that distances below about 1e-3, of near-duplicates, are not
    exact.
    """
    queries = l2norm(activations)

    def closeness() -> Iterator[Tensor]:
        for rows in pieces(neighbours):
            unit = l2norm(rows)
            yield torch.addmm(-unit.square().sum(dim=1), queries, unit.T, alpha=2)

    # |q - r|^2 = |q|^2 - closeness
    squared = queries.square().sum(dim=1) - _largest_of(closeness(), int(k)).amin(dim=1)
    return -squared.clamp(min=0).sqrt()


def fit_knn(calibration: Iterable[Tensor], k: int | None) -> dict[str, object]:
    """The calibration set itself, and k.

    k None stands for a thousandth of the calibration images, from 10 to 1000, and at most all of
    them. It is the paper's choice: 1000 for ImageNet's 1.28 million training images, 50 for CIFAR's
    50,000, about 10 for 1 % of ImageNet. ValueError where k is more than there are.
    """
    rows = count_rows(calibration)
    if k is None:
        k = min(max(10, rows // 1000), 1000, rows)
    k = whole_number("knn.k", k, rows, "the number of calibration images")
    return {"neighbours": calibration, "k": k}


def nnguide(activations: Tensor, logits: Tensor, guide: Tensor, k: Count) -> Tensor:
    """E(z) times the mean of the k largest E(z_i) cos(z, z_i) over a bank of ID images (NNGuide,
    Park et al., ICCV 2023).

    E = logsumexp of the logits (images, classes). The k neighbours are those with the largest
    product E(z_i) cos(z, z_i), as in the authors' code, not those with the largest cosine. The
    paper applies it on top of ReAct: `react+nnguide`.
    """
    queries = l2norm(activations)
    products = (queries @ rows.T for rows in torch.split(guide, statistics.PIECE))
    return torch.logsumexp(logits, dim=1) * _largest_of(products, int(k)).mean(dim=1)


def fit_nnguide(
    calibration: Iterable[Tensor], weight: Tensor, bias: Tensor, k: Count, bank: Count
) -> dict[str, object]:
    """guide (bank, channels): E(z_i) z_i / |z_i| of evenly spaced rows of the calibration set;
    bank: how many they are, all rows where fewer than asked for are there; and k.

    The paper's bank is 1 % of ImageNet's training images, drawn at random, hence 12,812 rows.
    Evenly spaced ones of images sorted by class cover the classes alike and are the same in every
    run. ValueError where k is more than the bank.
    """
    rows = count_rows(calibration)
    bank = min(whole_number("nnguide.bank", bank), rows)
    k = whole_number("nnguide.k", k, bank, "the number of images in the bank")
    chosen = torch.arange(bank) * rows // bank
    guide, start = [], 0
    for batch in pieces(calibration):
        inside = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
        picked = batch[inside.to(batch.device)]
        energies = torch.logsumexp(linear(picked, weight, bias), dim=1, keepdim=True)
        guide.append(l2norm(picked) * energies)
        start += len(batch)
    return {"guide": torch.cat(guide), "bank": bank, "k": k}


def _largest_of(blocks: Iterable[Tensor], k: int) -> Tensor:
    """The k largest entries of each row of the blocks side by side, in no particular order. A few
    thousand columns are held at a time."""
    held: list[Tensor] = []
    width = 0
    for block in blocks:
        held.append(block)
        width += block.shape[1]
        # Seldom, since each time costs as much for the k entries kept as for k new ones.
        if width >= k + 2 * statistics.PIECE:
            held, width = [largest(torch.cat(held, dim=1), k)], k
    return largest(torch.cat(held, dim=1), k)


SCORES_BY_NEIGHBOURS = {
    "knn": Score(knn, {"k": None}, fit_knn),
    "nnguide": Score(nnguide, {"k": 10, "bank": 12812}, fit_nnguide),
}
