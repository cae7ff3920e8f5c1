"""A cache and fitted methods in, every image's score by every method out: one reading of each
cached file for all methods."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lhact.cache import Activations, BadCache, Cache
from lhact.evaluation.product import head_product
from lhact.methods.compose import BadMethod, Method
from lhact.methods.fit import (
    Calibration,
    FittedMethod,
    FittedStep,
    Head,
    LeftOut,
    fit_all,
    of_each,
)
from lhact.parallel import map_ordered
from lhact.records import LOGITS

# Enough rows for the matrix product to run at full speed, few enough for what is computed from them
# to stay in the CPU's cache.
CPU_ROWS, GPU_ROWS = 512, 8192
# Rows that a CPU core rectifies at a time.
ROWS_PER_STEP = 64

Progress = Callable[[int], None]


@dataclass(frozen=True)
class MethodScores:
    """One method's scores: dataset -> (images,) float32, higher = more in-distribution."""

    fitted: FittedMethod
    scores: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Batches:
    """A cached set as (rows, channels) float32 tensors on a device, iterable again and again."""

    activations: Activations
    device: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        for chunk in self.activations.chunks(chunk_rows(self.device)):
            yield torch.from_numpy(chunk).to(self.device)


def chunk_rows(device: torch.device) -> int:
    """How many rows are in work at a time."""
    return CPU_ROWS if device.type == "cpu" else GPU_ROWS


def fit_methods(
    cache: Cache, methods: Sequence[Method], device: torch.device, left_out: LeftOut | None = None
) -> list[FittedMethod]:
    """The methods, fitted to the cache's calibration activations.

    left_out: is told of each method that the cache cannot serve, instead of BadMethod being raised.
    """
    labels = cache.calibration.info.labels
    calibration = Calibration(
        Batches(cache.calibration, device),
        None if labels is None else torch.tensor(labels, device=device),
        Batches(cache.calibration, torch.device("cpu")),
    )
    head = Head(*(torch.from_numpy(part).to(device) for part in (cache.weight, cache.bias)))
    served = of_each(methods, functools.partial(_check, cache), left_out)
    with torch.inference_mode():
        return fit_all(served, calibration, head, left_out)


def _check(cache: Cache, method: Method) -> Method:
    """The method. Raises BadMethod where it reads what the cache lacks: perturbed images, or, of a
    cache of logits from elsewhere, more than logits.

    A score's function tells what it reads of an image. What its `fit` reads is not asked: the head
    of a cache of logits is the identity, so the logits of calibration images, as klm makes them,
    are right.
    """
    given_as = cache.info.network.given_as
    if given_as and method.perturbed:
        raise BadMethod(f"{method.name} needs images to perturb; this cache was made without them")
    names = set(inspect.signature(method.score.entry.function).parameters)
    if given_as == LOGITS and (method.rectifiers or names & {"activations", "weight", "bias"}):
        raise BadMethod(
            f"{method.name} needs penultimate activations; this cache holds logits (--methods all "
            "runs what they serve)"
        )
    try:
        for dataset in ("id", *cache.ood) if method.perturbed else ():
            cache.perturbed(dataset)
    except BadCache as error:
        raise BadMethod(
            f"{method.name} needs activations of perturbed images: run get_activation.py again "
            f"with --odin ({error})"
        ) from error
    return method


def score(
    cache: Cache,
    fitted: Sequence[FittedMethod],
    device: torch.device,
    progress: Progress = lambda rows: None,
    datasets: Sequence[str] | None = None,
) -> list[MethodScores]:
    """Every image's score by every method, in the order of the methods.

    datasets: the sets to score; by default the ID set and the OOD sets. progress: is told of the
    rows done.
    """
    datasets = datasets or ["id", *cache.ood]
    scored: dict[FittedMethod, dict[str, np.ndarray]] = {}
    for perturbed in (False, True):
        methods = [method for method in fitted if method.perturbed is perturbed]
        if not methods:
            continue
        sets = {name: cache.perturbed(name) if perturbed else cache.sets[name] for name in datasets}
        scored |= score_sets(sets, methods, device, progress)
    return [MethodScores(method, scored[method]) for method in fitted]


def score_sets(
    sets: Mapping[str, Activations],
    fitted: Sequence[FittedMethod],
    device: torch.device,
    progress: Progress = lambda rows: None,
) -> dict[FittedMethod, dict[str, np.ndarray]]:
    """Method -> dataset -> (images,) float32 scores of those sets."""
    head = fitted[0].head
    rows = chunk_rows(device)
    logits_of = head_product(head.weight, head.bias, rows)
    scores = {
        method: {name: np.empty(part.images, np.float32) for name, part in sets.items()}
        for method in fitted
    }

    def scores_of(
        activations: Tensor, methods: Sequence[FittedMethod], done: int = 0
    ) -> Iterator[tuple[FittedMethod, Tensor]]:
        """Each method's scores; the first `done` rectifiers, which all have, are behind these
        activations. What several methods begin with is computed once."""
        ending = [method for method in methods if len(method.rectifiers) == done]
        inputs = {"activations": activations}
        if any("logits" in method.score.inputs for method in ending):
            inputs["logits"] = logits_of(activations)
        for method in ending:
            yield method, method.score(**inputs)
        following: dict[FittedStep, list[FittedMethod]] = {}
        for method in methods:
            if len(method.rectifiers) > done:
                following.setdefault(method.rectifiers[done], []).append(method)
        # The rectified activations of one setting are let go of before the next are made: a sweep
        # of a thousand settings takes the memory of one.
        for rectifier, group in following.items():
            yield from scores_of(_by_pieces(rectifier, activations), group, done + 1)

    @torch.inference_mode()
    def score_chunk(chunk: tuple[str, int]) -> int:
        dataset, start = chunk
        count = min(rows, sets[dataset].images - start)
        activations = torch.from_numpy(readers[dataset](start, count)).to(device)
        for method, values in scores_of(activations, fitted):
            scores[method][dataset][start : start + count] = values.cpu().numpy()
        return count

    # The chunks of all sets in one row, so that no core waits at the end of each set.
    chunks = [(name, start) for name, part in sets.items() for start in range(0, part.images, rows)]
    with ExitStack() as opened:
        readers = {name: opened.enter_context(part.reader()) for name, part in sets.items()}
        for done in map_ordered(score_chunk, chunks, device):
            progress(done)
    return scores


def _by_pieces(rectifier: FittedStep, activations: Tensor) -> Tensor:
    """The activations rectified; on a CPU a few rows at a time, which stay in the core's cache from
    step to step."""
    if activations.device.type != "cpu":
        return rectifier(activations=activations)
    rectified = torch.empty_like(activations)
    pieces = zip(activations.split(ROWS_PER_STEP), rectified.split(ROWS_PER_STEP), strict=True)
    for rows, out in pieces:
        out.copy_(rectifier(activations=rows))
    return rectified
