"""Images in, cached penultimate activations out: of the ID test images, of calibration images and
of the OOD sets."""

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lhact import cache, command, published
from lhact.benchmarks.builtin import BENCHMARKS, DEFAULT_WEIGHTS, Benchmark, locate
from lhact.benchmarks.userfile import open_benchmark
from lhact.devices import PRECISIONS, pick_device
from lhact.extraction import networks
from lhact.extraction.build import BadJob, Job, build
from lhact.extraction.extract import default_workers, worker_ended
from lhact.extraction.images import INTERPOLATIONS
from lhact.extraction.networks import NetworkSpec
from lhact.extraction.ranks import Ranks, join, rank0_prints
from lhact.extraction.sources import SourceOptions
from lhact.options import (
    at_least,
    builder_argument,
    finite,
    name,
    named_source,
    not_negative,
    path,
    positive,
    sources,
)
from lhact.records import Perturbation, RecordedPreprocessing

PROGRAM = "get_activation.py"
ODIN = published.ODIN_PERTURBATION


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    known = f"which image sets: {', '.join(BENCHMARKS)}, or a file of your own"
    add(
        "--benchmark",
        type=open_benchmark,
        default="imagenet",
        metavar="NAME|FILE.toml",
        help=known,
    )
    add("--data-root", type=path, default="datasets", help="where the benchmark's folders lie")
    add("--cache-dir", type=path, default="cache", help="where the activations go")
    add("--name", type=name, help="the name to cache them under (default: the architecture)")
    add = parser.add_argument_group("network (default: the benchmark's)").add_argument
    add("--arch", help="torchvision's name, timm:NAME, or MODULE:FUNCTION of your own")
    key_value: dict[str, Any] = {"type": builder_argument, "action": "append", "default": []}
    add("--arch-arg", **key_value, metavar="KEY=VALUE", help="for its builder")
    add("--head", metavar="NAME", help="the linear layer that makes the logits, if not the found")
    add("--weights", help="published weights by name, such as IMAGENET1K_V1")
    add("--checkpoint", type=path, metavar="FILE", help="a state dict, instead of --weights")
    add = parser.add_argument_group(
        "preprocessing (default: as the weights come with, else the benchmark's)"
    ).add_argument
    shorter_side = "pixels of the shorter side; 0 leaves it alone"
    add("--resize", type=at_least(0), metavar="N", help=shorter_side)
    squash = "resize both sides, whatever the shape, as the ViTs of transformers"
    add("--squash", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=squash)
    add("--crop", type=at_least(1), metavar="N", help="pixels of the centre crop")
    add("--interpolation", choices=INTERPOLATIONS)
    rgb: dict[str, Any] = {"nargs": 3, "metavar": ("R", "G", "B")}
    add("--mean", type=finite, **rgb, help="subtracted from [0, 1]")
    add("--std", type=positive, **rgb, help="then divided by")
    add = parser.add_argument_group(
        "own images (they replace the benchmark's)",
        "SOURCE: a folder, flat or in class folders; a list FILE.txt (path [label] a line); "
        "FILE.npz (images, labels); torchvision:NAME:SPLIT",
    ).add_argument
    add("--id", "--id-dir", metavar="SOURCE", help="ID test images")
    add("--calibration", "--calibration-dir", metavar="SOURCE", help="further ID images")
    name_source: dict[str, Any] = {"type": named_source, "action": "append", "default": []}
    add("--ood", **name_source, metavar="NAME=SOURCE", help="repeatable")
    add("--list-root", type=path, metavar="DIR", help="where the paths of lists begin")
    add("--download", action="store_true", help="fetch torchvision: sets that are not there")
    add = parser.add_argument_group("what to extract, and how").add_argument
    per_class: dict[str, Any] = {"type": _per_class, "default": "10", "metavar": "N|all|0"}
    add("--calibration-per-class", **per_class, help="the first N by name")
    add("--odin", action="store_true", help="also cache ODIN's perturbed images")
    add("--odin-temperature", type=positive, default=ODIN.temperature, help="divides the logits")
    step = "step, in normalised inputs"
    add("--odin-epsilon", type=not_negative, default=ODIN.epsilon, help=step)
    noise: dict[str, Any] = {"type": at_least(0), "default": 0, "metavar": "N"}
    add("--gaussian", **noise, help="also N images of noise to select on")
    add("--batch-size", type=at_least(1), default=64)
    workers = "processes that read images (default: one a core, two cores fewer beside a GPU)"
    add("--workers", type=at_least(0), default=argparse.SUPPRESS, help=workers)
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    add("--precision", choices=PRECISIONS, default="fp32")
    add("--overwrite", action="store_true", help="replace the sets asked for")
    return parser.parse_args(argv)


def _per_class(text: str) -> int | None:
    """None stands for all."""
    if text == "all" or text.isdecimal():
        return None if text == "all" else int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number or all, got {text!r}")


def parse_job(argv: Sequence[str] | None) -> tuple[Job, Benchmark]:
    """The job, with the user's own sources alone, and its benchmark. Raises BadJob for arguments
    that do not go together; BadNetwork and ValueError for names that are not right; BadBenchmark
    for a benchmark file that is not."""
    args = parse_arguments(argv)
    benchmark: Benchmark = args.benchmark
    per_class: int | None = args.calibration_per_class
    perturbation = Perturbation(args.odin_temperature, args.odin_epsilon)
    checks = {
        "--calibration is not read with --calibration-per-class 0; give one of them": (
            per_class == 0 and args.calibration is not None
        ),
        "--calibration-per-class is about --calibration, which does not come by itself with --id": (
            per_class not in (10, 0) and args.id and not args.calibration
        ),
        "give --weights or --checkpoint, not both": args.weights is not None and args.checkpoint,
        "--odin-temperature and --odin-epsilon change nothing without --odin; give it too": (
            not args.odin and perturbation != ODIN
        ),
    }
    for message, wrong in checks.items():
        if wrong:
            raise BadJob(message)
    own = sources([("id", args.id), ("calibration", args.calibration)], args.ood)
    asked = NetworkSpec(args.arch, args.weights, args.checkpoint, dict(args.arch_arg), args.head)
    mean, std = (tuple(values) if values else None for values in (args.mean, args.std))
    sides = (args.resize, args.crop, args.interpolation)
    given = RecordedPreprocessing(*sides, mean, std, getattr(args, "squash", None))
    if args.arch in (None, benchmark.arch):
        asked = benchmarks_network(benchmark, asked, args.data_root)
        given = given.over(benchmark.given_preprocessing)
    if asked.weights is None and asked.checkpoint is None and ":" not in asked.arch:
        asked = dataclasses.replace(asked, weights=DEFAULT_WEIGHTS)
    networks.check_names(asked)
    device = pick_device(args.device)
    workers = getattr(args, "workers", default_workers(device))
    job = Job(
        folder=cache.cache_folder(
            args.cache_dir, benchmark.name, args.name or cache.default_name(asked.arch)
        ),
        network=asked,
        sources=own,
        own=frozenset(own),
        options=SourceOptions(args.data_root, args.list_root, args.download),
        preprocessing=given,
        default_preprocessing=benchmark.preprocessing,
        per_class=per_class,
        perturbation=perturbation if args.odin else None,
        noise=args.gaussian,
        batch_size=args.batch_size,
        workers=workers,
        device=args.device,
        precision=args.precision,
        overwrite=args.overwrite,
        comparable=benchmark.published and not args.id,
    )
    return job, benchmark


def benchmarks_network(benchmark: Benchmark, asked: NetworkSpec, data_root: Path) -> NetworkSpec:
    """The benchmark's network, with what is asked for of it. Raises BadJob where it has none."""
    if benchmark.arch is None:
        raise BadJob(
            f"the benchmark {benchmark.spelling} has no network of its own; give --arch, and "
            "--checkpoint or --weights"
        )
    weights, checkpoint = asked.weights, asked.checkpoint
    if weights is None and checkpoint is None:
        weights = benchmark.weights
        checkpoint = data_root / benchmark.checkpoint if benchmark.checkpoint else None
    arguments = {**benchmark.arch_args, **asked.arguments}
    head = asked.head or benchmark.head
    return NetworkSpec(benchmark.arch, weights, checkpoint, arguments, head)


def run(job: Job, benchmark: Benchmark, ranks: Ranks) -> None:
    """Finds the image sets of the benchmark and fills the cache."""
    data_root = job.options.data_root
    if prepare := benchmark.prepare:
        ranks.from_first(lambda: prepare(data_root))
    found = locate(benchmark, data_root, job.sources)
    if job.per_class == 0:
        found.pop("calibration", None)
    sources = {name: place.source for name, place in found.items()}
    list_roots = {name: place.list_root for name, place in found.items() if place.list_root}
    build(dataclasses.replace(job, sources=sources, list_roots=list_roots), ranks)


def expected_message(error: Exception) -> str | None:
    """What to say of an error that the input, the disk or another process can cause; None for any
    other."""
    return worker_ended(error) or command.expected_message(error)


def main(argv: Sequence[str] | None = None) -> int:
    def work(asked: tuple[Job, Benchmark]) -> None:
        with join(expected_message) as ranks:
            run(*asked, ranks)

    with rank0_prints(), warnings.catch_warnings():
        # More workers than cores may well be right: they wait for the disk.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        interrupted = "interrupted; the same command goes on where it stopped"
        return command.run(PROGRAM, lambda: parse_job(argv), work, interrupted, expected_message)


if __name__ == "__main__":
    sys.exit(main())
