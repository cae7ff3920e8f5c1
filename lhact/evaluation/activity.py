"""A cache and fitted methods in, what is drawn of the activations out: their densities, the mean of
each channel before and after rectifying, and the rectification functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lhact.cache import Activations, Cache
from lhact.evaluation.score import Batches, Progress
from lhact.methods.fit import FittedMethod, FittedStep
from lhact.parallel import map_ordered

BINS = 60
CURVE_POINTS = 1501
# Images of each set from which the range of the histograms is taken.
RANGE_IMAGES = 256
# The range ends there, in percent of those activations: a few may be ten times as high.
RANGE_PERCENT = 99.9

Rectifiers = tuple[FittedStep, ...]


@dataclass(frozen=True)
class Activity:
    """The activations of the ID set and the OOD sets, by the name of the set; all float64.

    edges: (bins + 1,) of the histograms. densities: set -> (bins,) the share of all its
    activations, every channel together, in each bin, divided by the bin's width; what lies beyond
    the edges counts in the whole. means: rectifiers of a method -> set -> (channels,) behind them;
    behind none, (), those of the activations as they are. curves: rectifiers -> (points,) the first
    one's function at `points`, where it acts on each activation by itself.
    """

    edges: np.ndarray
    densities: Mapping[str, np.ndarray]
    means: Mapping[Rectifiers, Mapping[str, np.ndarray]]
    points: np.ndarray
    curves: Mapping[Rectifiers, np.ndarray]


def measure(
    cache: Cache,
    methods: Sequence[FittedMethod],
    device: torch.device,
    progress: Progress = lambda rows: None,
) -> Activity:
    """The activity of a cache and of what these methods' rectifiers make of it; every set is read
    once, all of it. Memory does not depend on the number of images.

    A sample of RANGE_IMAGES images of each set decides the range of the histograms alone. progress:
    is told of the rows done.
    """
    sets = {name: cache.sets[name] for name in ("id", *cache.ood)}
    chains: list[Rectifiers] = list(dict.fromkeys([(), *(m.rectifiers for m in methods)]))
    low, high = _range(sets.values())
    edges = np.linspace(low, high, BINS + 1)
    points = np.linspace(low, high, CURVE_POINTS)

    @torch.inference_mode()
    def part(batch: Tensor) -> tuple[int, np.ndarray, np.ndarray]:
        """Rows, counts (bins,), and sums over the rows (chains, channels)."""
        sums = []
        for chain in chains:
            rectified = batch
            for step in chain:
                rectified = step(activations=rectified)
            sums.append(rectified.sum(dim=0, dtype=torch.float64))
        counts = np.histogram(batch.cpu().numpy(), edges)[0]
        return len(batch), counts, torch.stack(sums).cpu().numpy()

    densities = {}
    means: dict[Rectifiers, dict[str, np.ndarray]] = {chain: {} for chain in chains}
    for name, activations in sets.items():
        counts, sums = np.zeros(BINS), np.zeros((len(chains), activations.channels))
        for rows, more, added in map_ordered(part, Batches(activations, device), device):
            counts += more
            sums += added
            progress(rows)
        values = activations.images * activations.channels
        densities[name] = counts / (values * np.diff(edges))
        for chain, total in zip(chains, sums, strict=True):
            means[chain][name] = total / activations.images
    curves = {
        chain: curve
        for chain in chains[1:]
        if (curve := elementwise_curve(chain[0], points, cache.id.channels, device)) is not None
    }
    return Activity(edges, densities, means, points, curves)


def _range(sets: Iterable[Activations]) -> tuple[float, float]:
    """Where nearly all activations of the samples lie; from 0 where none is negative."""
    samples = [activations.sample(RANGE_IMAGES)[0] for activations in sets]
    high = max(float(np.percentile(rows, RANGE_PERCENT)) for rows in samples)
    low = min(float(np.percentile(rows, 100 - RANGE_PERCENT)) for rows in samples)
    if all(rows.min() >= 0 for rows in samples):
        low = 0.0
    return (low, high) if high > low else (low, low + 1)


def elementwise_curve(
    rectifier: Callable[..., Tensor], points: np.ndarray, channels: int, device: torch.device
) -> np.ndarray | None:
    """The rectifier's function at these activations, (points,) float64; None where what becomes of
    an activation depends on its channel or on the image's others, as for BATS or ASH."""
    ramp = torch.from_numpy(points.astype(np.float32)).to(device)
    # Drawn anew for each place, so that the same activation meets many channels, and always other
    # company.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(points), (64, channels), generator=generator).to(device)
    with torch.inference_mode():
        curve = rectifier(activations=ramp[:, None].repeat(1, channels))[:, 0]
        if not torch.allclose(rectifier(activations=ramp[drawn]), curve[drawn], 1e-4, 1e-6):
            return None
    return curve.double().cpu().numpy()
