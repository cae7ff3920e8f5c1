"""A job in, a filled cache folder out: the activations of every image set, by one process or by all
that torchrun started."""

import contextlib
import dataclasses
import functools
import hashlib
import platform
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import PIL
import torch
import torchvision
from torch import nn

import lhact
from lhact import cache, cache_writer, identify, imagenet
from lhact.cache_writer import Lock, Place, SetWriter
from lhact.devices import (
    PRECISIONS,
    describe,
    device_line,
    gpu_arithmetic,
    pick_device,
    why_no_gpu,
)
from lhact.extraction import extract, networks, remarks
from lhact.extraction.image_sets import Images, gaussian_noise, unreadable
from lhact.extraction.images import BadImages
from lhact.extraction.labels import first_per_class, labels
from lhact.extraction.networks import Network, NetworkSpec
from lhact.extraction.ranks import Ranks, local_gpu
from lhact.extraction.sources import SourceOptions, open_source
from lhact.messages import InputError, progress_bar, say, shown
from lhact.records import Perturbation, Preprocessing, RecordedPreprocessing, SetInfo

SECONDS_BETWEEN_SYNCS = 10


class BadJob(InputError, ValueError):
    """A job that this machine or this network cannot do; the message says why and the mend."""


@dataclass(frozen=True)
class Job:
    """What get_activation.py is asked for.

    folder: of the cache. sources: image set name -> where its images are, as the user names it;
    own: those sets that are not the benchmark's.
    preprocessing: the steps that were given; default_preprocessing: for a network that says nothing
    of its own. per_class: how many calibration images of each class
    folder, None for all. noise: how many images of Gaussian noise. comparable: whether the ID set
    is that of the published numbers. list_roots: image set name -> what the paths of its list
    start from, unless the options say it.
    """

    folder: Path
    network: NetworkSpec
    sources: Mapping[str, str]
    own: frozenset[str]
    options: SourceOptions
    preprocessing: RecordedPreprocessing
    default_preprocessing: Preprocessing
    per_class: int | None
    perturbation: Perturbation | None
    noise: int
    batch_size: int
    workers: int
    device: str
    precision: str
    overwrite: bool
    comparable: bool
    list_roots: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedSet:
    """One image set to fill: where, of what images, and what its .json will say."""

    place: Place
    images: Images
    info: SetInfo

    @property
    def label(self) -> str:
        return self.place[1] + (" (ODIN)" if self.info.perturbation else "")


@dataclass(frozen=True)
class Setup:
    """What all sets of a run have in common."""

    job: Job
    network: Network
    preprocessing: Preprocessing
    device: torch.device
    forward: nn.Module
    ranks: Ranks
    lock: Lock | None


def build(job: Job, ranks: Ranks) -> None:
    """Fills the cache. Raises BadJob, BadCache, BadImages, BadNetwork, ExtractionFailed, RankFailed
    or OSError, each with one clear line."""
    device = own_device(job.device, ranks)
    say(f"{device_line(job.device, device)}; precision: {job.precision}")
    crop, default = job.preprocessing.crop, job.default_preprocessing.crop
    network = ranks.first_on_machine(lambda: networks.load(job.network, crop, default))
    for remark in network.remarks:
        say(remark)
    preprocessing = choose_preprocessing(job, network)
    with ExitStack() as held, gpu_arithmetic(PRECISIONS[job.precision].tf32):
        # All that takes no time comes before the images are listed: that takes minutes where they
        # are many.
        lock = held.enter_context(cache_writer.lock(job.folder)) if ranks.rank == 0 else None
        if lock and lock.remark:
            say(lock.remark)
        planned = plan(job, network, preprocessing, device)
        fingerprints = "\n".join(part.info.fingerprint for part in planned)
        ranks.agree(hashlib.sha256(fingerprints.encode()).hexdigest(), "images")
        complete = ranks.from_first(lambda: _prepare(job, network, planned))
        forward, reason = extract.forward_on(device, network, preprocessing, job.precision)
        if reason:
            say(f"the network runs slower than it could: {reason}")
        setup = Setup(job, network, preprocessing, device, forward, ranks, lock)
        for number, part in enumerate(planned):
            if number in complete:
                say(f"{part.label}: {part.info.images:,} images, cached already")
            else:
                fill(setup, part)
    say(f"done: {job.folder}")


def own_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank: of the GPUs of a machine, each of its ranks takes its own. Raises
    BadJob if there is none."""
    if ranks.size > 1 and name.startswith("cuda:"):
        raise BadJob(
            f"--device {name} is one GPU for {ranks.size} processes; give --device cuda, and each "
            "takes its own"
        )
    try:
        if name in ("auto", "cuda") and why_no_gpu() is None:
            name = f"cuda:{local_gpu(ranks.local, torch.cuda.device_count())}"
        device = pick_device(name)
    except ValueError as error:
        raise BadJob(str(error)) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_preprocessing(job: Job, network: Network) -> Preprocessing:
    """What was given; else what the weights come with; else the benchmark's; it is said."""
    base = network.preprocessing or job.default_preprocessing
    origin = "as the weights come with" if network.preprocessing else "the benchmark's"
    chosen: Preprocessing = job.preprocessing.over(base)
    if given := job.preprocessing.known:
        origin = f"{', '.join(given)} as given, the rest {origin}"
    elif not network.preprocessing:
        origin += ", since a checkpoint does not say its own (--resize --crop --mean --std set it)"
    sides = "both sides" if chosen.squash else "shorter side"
    size = f"{sides} to {chosen.resize}, " if chosen.resize else "size left alone, "
    say(
        f"preprocessing: {size}crop {chosen.crop}, {chosen.interpolation}, mean "
        f"{' '.join(f'{v:g}' for v in chosen.mean)}, std {' '.join(f'{v:g}' for v in chosen.std)} "
        f"({origin})"
    )
    return chosen


def plan(
    job: Job, network: Network, preprocessing: Preprocessing, device: torch.device
) -> list[PlannedSet]:
    """Every set of the job, its images listed: those as they are, then ODIN's, then noise."""
    sets = {name: _open(job, name) for name in job.sources}
    if "calibration" in sets and job.per_class is not None:
        calibration = sets["calibration"]
        sets["calibration"] = calibration.select(first_per_class(calibration, job.per_class))
    # An OOD image has no right class, whatever its folder is called.
    in_distribution = {name: part for name, part in sets.items() if name in ("id", "calibration")}
    labelled = labels(in_distribution, network.info.classes, imagenet.wnids())
    for name, images in sets.items():
        _say_of(name, remarks.left_out_remark(images))
        if name in job.own and not job.preprocessing.known:
            _say_of(name, remarks.size_remark(images, preprocessing))
        if name in labelled:
            _say_of(name, labelled[name].remark)
        if name != "id":
            _say_of(name, remarks.overlap(images, sets["id"]))

    members: list[tuple[Place, Images, Perturbation | None]] = [
        ((job.folder, name), images, None) for name, images in sets.items()
    ]
    if job.perturbation:
        members += [
            ((job.folder / cache.PERTURBED, name), images, job.perturbation)
            for name, images in sets.items()
            if name != "calibration"
        ]
    if job.noise:
        place = (job.folder / cache.SELECTION, "gaussian")
        members.append((place, gaussian_noise(job.noise), None))
    return [
        PlannedSet(
            place,
            images,
            SetInfo(
                network=network.info,
                preprocessing=preprocessing,
                precision=job.precision,
                images=len(images),
                fingerprint=images.fingerprint(),
                paths=images.paths,
                labels=labelled[place[1]].labels if place[1] in labelled else None,
                perturbation=perturbation,
                batch_size=job.batch_size,
                device=describe(device),
                versions=_versions(),
                modified=images.modified(),
            ),
        )
        for place, images, perturbation in members
    ]


def _open(job: Job, name: str) -> Images:
    list_root = job.options.list_root or job.list_roots.get(name)
    options = dataclasses.replace(job.options, list_root=list_root)
    with progress_bar(f"listing {name}", "file") as bar:
        return open_source(job.sources[name], options, bar.update)


def _say_of(name: str, remark: str | None) -> None:
    if remark:
        say(f"{name}: {remark}")


@functools.cache
def _versions() -> dict[str, str]:
    return {
        "lhact": lhact.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
    }


def _prepare(job: Job, network: Network, planned: list[PlannedSet]) -> list[int]:
    """The numbers of the sets that are complete already; the folder is ready for the others."""
    by_place = {part.place: part for part in planned}

    def same_content(place: Place, cached: SetInfo) -> bool:
        part = by_place[place]
        if cached.content is None or cached.modified == part.info.modified:
            return True
        say(f"{part.label}: files bear other times than when they were cached; reading them")
        content = hashlib.sha256()
        with progress_bar(f"comparing {part.label}", "image", part.info.images) as bar:
            for digest in part.images.digests():
                content.update(digest)
                bar.update()
        if content.hexdigest() != cached.content:
            return False
        cache_writer.write_info(*place, dataclasses.replace(cached, modified=part.info.modified))
        return True

    wanted = {part.place: part.info for part in planned}
    complete = cache_writer.prepare(job.folder, wanted, job.overwrite, same_content)
    cache_writer.save_head(job.folder, network.weight.numpy(), network.bias.numpy())
    return [number for number, part in enumerate(planned) if part.place in complete]


def fill(setup: Setup, part: PlannedSet) -> None:
    """Extracts one set; every rank writes the rows of its own batches."""
    ranks, job, info = setup.ranks, setup.job, part.info
    writer = SetWriter(*part.place, info)
    start = ranks.from_first(writer.prepare)
    rows = extract.batches(info.images, job.batch_size, start)
    own = rows[ranks.rank :: ranks.size]
    compute = extract.computation(
        setup.forward,
        extract.normaliser(setup.preprocessing, setup.device),
        _perturbation(setup, info),
        setup.device,
        job.precision,
    )
    pixels = part.images.pixels(setup.preprocessing)
    extracted = extract.extract(compute, pixels, own, setup.device, job.workers)
    with writer, progress_bar(part.label, "image", info.images, start) as bar:
        done = 0

        def checkpoint() -> None:
            """What this rank has written is on the disk; rank 0 records how far all ranks are."""
            writer.sync()
            key = f"{part.place[0]}/{part.place[1]}"
            ranks.publish(key, own[done].start if done < len(own) else info.images)
            if setup.lock:
                setup.lock.check()
                first_rows = [row for row in ranks.published(key) if row is not None]
                if len(first_rows) == ranks.size:
                    writer.record(min(first_rows))

        synced = time.monotonic()
        try:
            for batch, (activations, digests) in zip(own, extracted, strict=True):
                ranks.check()
                writer.write(batch.start, activations, digests)
                done += 1
                bar.update(min(len(batch) * ranks.size, info.images - bar.n))
                if time.monotonic() - synced > SECONDS_BETWEEN_SYNCS:
                    checkpoint()
                    synced = time.monotonic()
        except BaseException as error:
            # What is there is worth keeping, but the error is what counts.
            with contextlib.suppress(Exception):
                checkpoint()
            if isinstance(error, extract.UnreadableImage):
                raise _unreadable(setup, part) from error
            raise
        checkpoint()
        ranks.barrier()
        if setup.lock:
            setup.lock.check()
            writer.record(info.images)
            _finish(setup, part, writer)


def _perturbation(setup: Setup, info: SetInfo) -> extract.Compute | None:
    if info.perturbation is None:
        return None
    network, perturbation = setup.network, info.perturbation
    head = (network.weight.to(setup.device), network.bias.to(setup.device))
    return lambda images: extract.odin_perturb(network.body, head, images, perturbation)


def _unreadable(setup: Setup, part: PlannedSet) -> BadImages:
    """An error that names every image of the set that cannot be read, not the first alone."""
    with progress_bar(f"checking {part.label}", "image", part.info.images) as bar:
        lines = list(unreadable(part.images, setup.preprocessing, setup.job.workers, bar.update))
    if len(lines) == 1:
        return BadImages(lines[0])
    return BadImages("\n".join([f"{len(lines)} images cannot be read:", *lines]))


def _finish(setup: Setup, part: PlannedSet, writer: SetWriter) -> None:
    """Rank 0 completes the set and says what it found."""
    network, info = setup.network, part.info
    activations = writer.activations()
    accuracy = identify.accuracy(activations, network.weight, network.bias)
    is_id = part.place == (setup.job.folder, "id")
    published: float | None = None
    lines: list[str] = []
    if is_id and setup.job.comparable:
        published, lines = _compare(activations, accuracy, network)
    classes = len(set(info.labels or ()))
    if is_id and not lines and (line := identify.wrong_labels(accuracy, info.images, classes)):
        lines = [line]
    writer.finish(accuracy)
    top1 = "" if accuracy is None else f", top-1 {accuracy:.2f} %"
    top1 += f" (published: {published:.2f} %)" if top1 and published else ""
    say(f"{part.label}: {info.images:,} images from {shown(part.images.origin)}{top1}")
    for line in lines:
        say(f"{part.label}: {line}")


def _compare(
    activations: cache.Activations, accuracy: float | None, network: Network
) -> tuple[float | None, list[str]]:
    """(the top-1 accuracy that is published for these weights, what the ImageNet activations say
    against their being the published network). The first is None for weights of one's own."""
    info = dataclasses.replace(activations.info, accuracy=accuracy)
    published = networks.published_top1(network.info.arch, network.info.weights)
    activations = dataclasses.replace(activations, info=info)
    lines = identify.findings(activations, network.weight.numpy(), network.bias.numpy())
    if published is not None and accuracy is not None and not identify.is_v1(network.info):
        # V1's is among the findings already.
        found = identify.Top1(accuracy, info.images, len(set(info.labels or ())))
        if line := identify.top1_disagreement(found, published):
            lines = [*lines, line]
    return published, lines
