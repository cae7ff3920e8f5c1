"""A cache and methods in; scores, and from them results, out: one reading of each cached file for all methods."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lhact import cache, published
from lhact.evaluation import metrics
from lhact.extraction.fuse import linear
from lhact.methods import calibrate
from lhact.methods.compose import BadMethod, Method, Step, bind, parse, percentiles_wanted, resolve
from lhact.methods.rectify import Rectifier
from lhact.parallel import each

# Enough rows for the matrix product to run at full speed, few enough for what is computed from them to stay in the CPU's cache.
CPU_ROWS, GPU_ROWS = 512, 8192
# Rows that a CPU core rectifies at a time.
PIECE = 64
# So many ID images show what network they are of: two of each class, and less than a second's work.
SAMPLE_ROWS = 2000


def _rows(device: torch.device) -> int:
    return CPU_ROWS if device.type == "cpu" else GPU_ROWS


class Cache(NamedTuple):
    """A complete cache, opened: image sets by name (`id`, `calibration` where it is there, then the OOD sets), and the head.
    selected_on: the OOD set that parameters are selected on, which is then not tested on."""

    folder: Path
    sets: dict[str, cache.Activations]
    weight: np.ndarray
    bias: np.ndarray
    selected_on: str | None = None

    @property
    def id(self) -> cache.Activations:
        return self.sets["id"]

    @property
    def calibration(self) -> cache.Activations:
        """The set that thresholds and statistics come from: the ID test images where there is no other."""
        return self.sets.get("calibration", self.id)

    @property
    def ood(self) -> list[str]:
        return [name for name in self.sets if name not in ("id", "calibration", self.selected_on)]

    @property
    def network(self) -> dict[str, Any]:
        unknown = {"arch": None, "weights": None, "checkpoint": None, "sha256": None}
        return {**unknown, **self.id.metadata["network"]}


def open_cache(folder: Path, order: Sequence[str]) -> Cache:
    """All image sets of a folder: OOD sets in the given order, others behind by name.

    Raises BadCache if it is missing, unfinished or damaged, has no ID or no OOD set, or mixes networks, preprocessing or precision.
    """
    names = cache.datasets(folder)
    if "id" not in names or not set(names) - {"id", "calibration"}:
        raise cache.BadCache(f"{folder} has no {'OOD set' if 'id' in names else 'ID set'}; complete it with get_activation.py")
    ordered = [name for name in ("id", "calibration", *order) if name in names]
    sets = {name: cache.open_activations(folder, name) for name in dict.fromkeys([*ordered, *names])}
    network = sets["id"].metadata["network"]
    for name, activations in sets.items():
        check_same_origin(activations, sets["id"], name)
    return Cache(folder, sets, *cache.load_head(folder, network["classes"], network["channels"]))


def check_same_origin(activations: cache.Activations, reference: cache.Activations, name: str) -> None:
    """Raises BadCache unless both are of one network, preprocessing and precision."""
    wanted = {key: reference.metadata[key] for key in ("network", "preprocessing", "precision")}
    if lines := cache.differences(activations.metadata, wanted):
        raise cache.BadCache(
            f"{activations.path} is of something else than the ID set beside it: {name} has {'; '.join(lines)}; "
            "make them again with get_activation.py --overwrite"
        )


class Thresholds(NamedTuple):
    """Where default thresholds come from: published (LHAct's and its relatives' constants) or percentiles. remark: how decided."""

    published: bool
    remark: str


def thresholds(opened: Cache) -> Thresholds:
    """The published constants where they are valid: on ResNet-50 IMAGENET1K_V1, or a ResNet-50 whose activations agree with it."""
    if published.is_v1(opened.network):
        return Thresholds(True, "thresholds: the published constants, of resnet50 IMAGENET1K_V1, which this is by name")
    source = _source(opened)
    if (opened.network["arch"], *opened.weight.shape) != ("resnet50", 1000, 2048):
        return Thresholds(False, f"thresholds: percentiles of the {source}")
    points = list(published.V1_PERCENTILES)
    mean, shares = calibrate.mean_and_shares(_batches(opened.calibration, torch.device("cpu")), points)
    reason = published.disagreement_with_v1(mean, dict(zip(points, shares, strict=True)))
    if reason:
        return Thresholds(False, f"thresholds: percentiles of the {source}, not the published constants ({reason})")
    where = ", ".join(f"{point:.4g} at percentile {share:.1f}" for point, share in zip(points, shares, strict=True))
    return Thresholds(
        True,
        f"thresholds: the published constants, since the {source} are distributed like those of resnet50 IMAGENET1K_V1 "
        f"(mean {mean:.4f}, {where})",
    )


def _source(opened: Cache) -> str:
    if "calibration" in opened.sets:
        return f"calibration activations ({opened.calibration.images} images)"
    return f"ID TEST activations ({opened.id.images} images), for want of a calibration set"


def _batches(activations: cache.Activations, device: torch.device) -> Iterator[Tensor]:
    for chunk in activations.chunks(_rows(device)):
        yield torch.from_numpy(chunk).to(device)


class _Rectified:
    """A calibration set as the steps of a method see it: any number of passes, rectified by the steps before."""

    def __init__(self, activations: cache.Activations, device: torch.device, rectifiers: Sequence[Callable]) -> None:
        self.activations, self.device, self.rectifiers = activations, device, rectifiers

    def __iter__(self) -> Iterator[Tensor]:
        for batch in _batches(self.activations, self.device):
            for rectifier in self.rectifiers:
                batch = rectifier(activations=batch)
            yield batch


class Scored(NamedTuple):
    """methods: with every threshold filled in. scores: for each, dataset -> (images,) float32, higher = more in-distribution.
    left_out: (method, reason) of those that this cache cannot serve. percentiles: whether thresholds came from calibration."""

    methods: list[Method]
    scores: list[dict[str, np.ndarray]]
    left_out: list[tuple[str, str]]
    percentiles: bool


def score(
    opened: Cache,
    methods: Sequence[Method],
    device: torch.device,
    leave_out: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
    datasets: Sequence[str] | None = None,
) -> Scored:
    """Every image's score by every method. `progress` is told of the rows done.

    datasets: the sets to score; by default the ID set and the OOD sets that are tested on. leave_out: leave out what the cache
    cannot serve instead of raising BadMethod.
    """
    datasets = datasets or ["id", *opened.ood]
    percents = percentiles_wanted(methods)
    with torch.inference_mode():
        values = calibrate.percentiles(_Rectified(opened.calibration, device, ()), percents)
        methods = [resolve(method, dict(zip(percents, values, strict=True))) for method in methods]
        planner = _Planner(opened, device, datasets)
        left_out, kept = [], []
        for method in methods:
            try:
                planner.add(method)
                kept.append(method)
            except BadMethod as error:
                if not leave_out:
                    raise
                left_out.append((method.name, str(error)))
        scores = [{} for _ in kept]
        for reads, chains in planner.chains.items():
            _score_sets({dataset: planner.source(reads, dataset) for dataset in datasets}, chains, planner, scores, progress)
    return Scored(kept, scores, left_out, bool(percents))


class _Planner:
    """Which functions run on which activations: methods that begin with the same rectifiers share them and the matrix product."""

    def __init__(self, opened: Cache, device: torch.device, datasets: Sequence[str]) -> None:
        self.opened, self.device, self.datasets = opened, device, datasets
        self.weight = torch.from_numpy(opened.weight).to(device)
        self.bias = torch.from_numpy(opened.bias).to(device)
        self.logits = linear(self.weight, self.bias, _rows(device))
        labels = opened.calibration.metadata["labels"]
        self.labels = None if labels is None else torch.tensor(labels, device=device)
        self.bound: dict[tuple, tuple[Callable, tuple[str, ...]]] = {}
        # What is read -> the rectifiers' keys -> [(number of the method, score function, its inputs)]
        self.chains: dict[str, dict[tuple, list[tuple[int, Callable, tuple[str, ...]]]]] = {}
        self.count = 0

    def source(self, reads: str, dataset: str) -> cache.Activations:
        return self.opened.sets[dataset] if not reads else cache.open_activations(self.opened.folder / reads, dataset)

    def add(self, method: Method) -> None:
        """Raises BadMethod where the cache lacks what the method needs."""
        reads = method.score.entry.reads
        if reads:
            self._check_source(reads, method.name)
        chain = ()
        for step in method.rectifiers:
            self._bind(chain, step, method.name)
            chain = (*chain, _key(step))
        function, inputs = self._bind(chain, method.score, method.name)
        self.chains.setdefault(reads, {}).setdefault(chain, []).append((self.count, function, inputs))
        self.count += 1

    def _check_source(self, reads: str, name: str) -> None:
        try:
            for dataset in self.datasets:
                activations = self.source(reads, dataset)
                check_same_origin(activations, self.opened.id, dataset)
                if activations.metadata["fingerprint"] != self.opened.sets[dataset].metadata["fingerprint"]:
                    raise cache.BadCache(f"{activations.path} is of other files; make it again with get_activation.py --overwrite")
        except cache.BadCache as error:
            raise BadMethod(
                f"{name} needs activations of perturbed images: run get_activation.py again with --{reads} ({error})"
            ) from error

    def _bind(self, chain: tuple, step: Step, name: str) -> tuple[Callable, tuple[str, ...]]:
        key = (*chain, _key(step))
        if key not in self.bound:
            rectifiers = [self.bound[chain[: i + 1]][0] for i in range(len(chain))]
            given = {
                "calibration": _Rectified(self.opened.calibration, self.device, rectifiers),
                "labels": self.labels,
                "weight": self.weight,
                "bias": self.bias,
            }
            try:
                self.bound[key] = bind(step, given)
                if isinstance(step.entry, Rectifier):
                    self._probe(key)
            except ValueError as error:
                raise BadMethod(f"{name}: {error}") from error
        return self.bound[key]

    def _probe(self, key: tuple) -> None:
        """Lets a rectifier see one image, so that it refuses thresholds that it cannot take before the work begins."""
        batch = torch.from_numpy(next(self.opened.calibration.chunks(1))).to(self.device)
        for end in range(1, len(key) + 1):
            batch = self.bound[key[:end]][0](activations=batch)


def _key(step: Step) -> tuple:
    return step.name, tuple(step.parameters.items())


def _score_sets(
    sets: Mapping[str, cache.Activations],
    chains: Mapping[tuple, list[tuple[int, Callable, tuple[str, ...]]]],
    planner: _Planner,
    scores: list[dict[str, np.ndarray]],
    progress: Callable[[int], None],
) -> None:
    rows = _rows(planner.device)
    for dataset, activations in sets.items():
        for scorers in chains.values():
            for number, _, _ in scorers:
                scores[number][dataset] = np.empty(activations.images, np.float32)

    @torch.inference_mode()
    def score_chunk(chunk: tuple[str, int]) -> int:
        dataset, start = chunk
        stop = min(start + rows, sets[dataset].images)
        batch = torch.from_numpy(readers[dataset](start, stop - start)).to(planner.device)
        rectified = {(): batch}
        for chain, scorers in chains.items():
            for end in range(1, len(chain) + 1):
                if chain[:end] not in rectified:
                    rectified[chain[:end]] = _by_pieces(planner.bound[chain[:end]][0], rectified[chain[: end - 1]])
            inputs = {"activations": rectified[chain]}
            if any("logits" in names for _, _, names in scorers):
                inputs["logits"] = planner.logits(rectified[chain])
            for number, function, names in scorers:
                values = function(**{name: inputs[name] for name in names})
                scores[number][dataset][start:stop] = values.cpu().numpy()
        return stop - start

    # The chunks of all sets in one row, so that no core waits at the end of each set.
    chunks = [(dataset, start) for dataset, activations in sets.items() for start in range(0, activations.images, rows)]
    with ExitStack() as opened:
        readers = {dataset: opened.enter_context(activations.reader()) for dataset, activations in sets.items()}
        for done in each(score_chunk, chunks, planner.device):
            progress(done)


def _by_pieces(rectifier: Callable[..., Tensor], activations: Tensor) -> Tensor:
    """The activations rectified; on a CPU a few rows at a time, which stay in the core's cache from step to step."""
    if activations.device.type != "cpu":
        return rectifier(activations=activations)
    rectified = torch.empty_like(activations)
    for rows, room in zip(activations.split(PIECE), rectified.split(PIECE), strict=True):
        room.copy_(rectifier(activations=rows))
    return rectified


def accuracy(activations: cache.Activations, weight: Tensor, bias: Tensor) -> float | None:
    """Top-1 accuracy of the network itself in percent; None where labels are not known."""
    labels = activations.metadata["labels"]
    if labels is None:
        return None
    correct = start = 0
    with torch.inference_mode():
        for batch in _batches(activations, weight.device):
            predicted = torch.addmm(bias, batch, weight.T).argmax(dim=1).cpu()
            correct += int((predicted == torch.tensor(labels[start : start + len(batch)])).sum())
            start += len(batch)
    return 100 * correct / len(labels)


def findings(benchmark: str, activations: cache.Activations, weight: np.ndarray, bias: np.ndarray) -> list[str]:
    """What speaks against comparing these activations of the benchmark's ID images with published numbers, one line each.

    The cache is not believed alone: SAMPLE_ROWS rows are looked at, and the accuracy that it has is checked on them; see
    published.diagnose. Raises BadCache.
    """
    if benchmark != "imagenet":
        return []
    metadata = activations.metadata
    labels, accuracy = metadata.get("labels"), metadata.get("accuracy")
    sample, numbers = activations.sample(SAMPLE_ROWS)
    rows = torch.from_numpy(sample)
    points = list(published.V1_PERCENTILES)
    mean, shares = calibrate.mean_and_shares([rows], points)
    spread = float(rows.mean(dim=0, dtype=torch.float64).std(correction=0))
    statistics = published.Statistics(len(rows), mean, dict(zip(points, shares, strict=True)), spread)
    top1 = counted = None
    if labels is not None:
        chosen = torch.tensor(labels)[numbers]
        predicted = torch.addmm(torch.from_numpy(bias), rows, torch.from_numpy(weight).T).argmax(dim=1)
        counted = published.Top1(100 * float((predicted == chosen).double().mean()), len(rows), len(chosen.unique()))
    if accuracy is not None:
        classes = len(set(labels)) if labels else min(activations.images, 1000)
        top1 = published.Top1(accuracy, activations.images, classes)
    return published.diagnose(metadata["network"], weight.shape, metadata["preprocessing"], statistics, top1, counted)


def results(opened: Cache, benchmark: str, name: str, scored: Scored, baselines: int = 0) -> dict[str, Any]:
    """The result in the schema of `eval.py --format json`: percent, not rounded.

    Published numbers stand beside those of the published network, by name, benchmark and parameters, and are null elsewhere. What
    `findings` then say against the comparison goes above the table.
    The last `baselines` of the methods go under `baseline` instead of `results`.
    """
    comparable = benchmark == "imagenet" and published.is_v1(opened.network)
    rows: dict[str, list[dict[str, Any]]] = {"results": [], "baseline": []}
    for number, (method, scores) in enumerate(zip(scored.methods, scored.scores, strict=True)):
        place = "baseline" if number >= len(scored.methods) - baselines else "results"
        of_method = []
        for dataset in opened.ood:
            try:
                values = metrics.all_metrics(scores["id"], scores[dataset])
            except ValueError as error:
                raise BadMethod(f"{method.name} on {dataset}: {error}") from error
            of_method.append({"dataset": dataset, "images": opened.sets[dataset].images, **values})
        average = {key: math.fsum(row[key] for row in of_method) / len(of_method) for key in metrics.METRICS}
        of_method.append({"dataset": "average", "images": sum(row["images"] for row in of_method), **average})
        known = comparable and method.parameters() == parse(method.name, published=True).parameters()
        if reads := method.score.entry.reads:
            perturbed = cache.open_activations(opened.folder / reads, "id").metadata[reads]
            known = known and perturbed == published.ODIN_PERTURBATION
        same_sets = tuple(opened.ood) == published.DATASETS
        for row in of_method:
            compared = known and (row["dataset"] != "average" or same_sets)
            row = {"method": method.name, "parameters": method.parameters(), **row}
            row["published"] = published.lookup(method.name, row["dataset"]) if compared else None
            rows[place].append(row)
    return {
        "benchmark": benchmark,
        "name": name,
        "network": opened.network,
        "preprocessing": opened.id.metadata["preprocessing"],
        "precision": opened.id.metadata["precision"],
        "id": {"images": opened.id.images, "accuracy": opened.id.metadata.get("accuracy")},
        "findings": findings(benchmark, opened.id, opened.weight, opened.bias),
        **rows,
    }
