"""Images in, cached penultimate activations out: of the ID test images, of calibration images and
of the OOD sets."""

import argparse
import ast
import dataclasses
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lhact import cache, published
from lhact.benchmarks.builtin import BENCHMARKS, DEFAULT_WEIGHTS, Benchmark, MissingData, locate
from lhact.benchmarks.userfile import BadBenchmark, open_benchmark
from lhact.devices import PRECISIONS, out_of_memory, pick_device
from lhact.extraction import networks
from lhact.extraction.build import BadJob, Job, build
from lhact.extraction.extract import ExtractionFailed
from lhact.extraction.images import INTERPOLATIONS, BadImages
from lhact.extraction.networks import BadNetwork, NetworkSpec
from lhact.extraction.ranks import RankFailed, Ranks, join, rank0_prints, ranks_on_this_machine
from lhact.extraction.sources import SourceOptions
from lhact.messages import fail, progress_bar, shown
from lhact.records import Perturbation

PROGRAM = "get_activation.py"
ODIN = published.ODIN_PERTURBATION
EXPECTED = (
    BadJob,
    MissingData,
    cache.BadCache,
    ExtractionFailed,
    BadImages,
    BadNetwork,
    RankFailed,
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--benchmark",
        type=open_benchmark,
        default="imagenet",
        metavar="NAME|FILE.toml",
        help=f"which image sets: {', '.join(BENCHMARKS)}, or a file of your own",
    )
    add("--data-root", type=_path, default="datasets", help="where the benchmark's folders lie")
    add("--cache-dir", type=_path, default="cache", help="where the activations go")
    add("--name", help="the name to cache them under (default: the architecture)")
    add = parser.add_argument_group("network (default: the benchmark's)").add_argument
    add("--arch", help="torchvision's name, timm:NAME, or MODULE:FUNCTION of your own")
    add("--arch-arg", action="append", default=[], metavar="KEY=VALUE", help="for its builder")
    add("--head", metavar="NAME", help="the linear layer that makes the logits, if not the found")
    add("--weights", help="published weights by name, such as IMAGENET1K_V1")
    add("--checkpoint", type=_path, metavar="FILE", help="a state dict, instead of --weights")
    add = parser.add_argument_group(
        "preprocessing (default: as the weights come with, else the benchmark's)"
    ).add_argument
    add("--resize", type=int, metavar="N", help="pixels of the shorter side; 0 leaves it alone")
    squash = "resize both sides, whatever the shape, as the ViTs of transformers"
    add("--squash", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=squash)
    add("--crop", type=int, metavar="N", help="pixels of the centre crop")
    add("--interpolation", choices=INTERPOLATIONS)
    add("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="subtracted from [0, 1]")
    add("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="then divided by")
    add = parser.add_argument_group(
        "own images (they replace the benchmark's)",
        "SOURCE: a folder, flat or in class folders; a list FILE.txt (path [label] a line); "
        "FILE.npz (images, labels); torchvision:NAME:SPLIT",
    ).add_argument
    add("--id", "--id-dir", metavar="SOURCE", help="ID test images")
    add("--calibration", "--calibration-dir", metavar="SOURCE", help="further ID images")
    add("--ood", action="append", default=[], metavar="NAME=SOURCE", help="repeatable")
    add("--list-root", type=_path, metavar="DIR", help="where the paths of lists begin")
    add("--download", action="store_true", help="fetch torchvision: sets that are not there")
    add = parser.add_argument_group("what to extract, and how").add_argument
    add("--calibration-per-class", default="10", metavar="N|all|0", help="the first N by name")
    add("--odin", action="store_true", help="also cache ODIN's perturbed images")
    add("--odin-temperature", type=float, default=ODIN.temperature, help="divides ODIN's logits")
    add("--odin-epsilon", type=float, default=ODIN.epsilon, help="step, in normalised inputs")
    add("--gaussian", type=int, default=0, metavar="N", help="also N images of noise to select on")
    add("--batch-size", type=int, default=64)
    workers = "processes that read images (default: one a core, two cores fewer beside a GPU)"
    add("--workers", type=int, default=argparse.SUPPRESS, help=workers)
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    add("--precision", choices=PRECISIONS, default="fp32")
    add("--overwrite", action="store_true", help="replace the sets asked for")
    return parser.parse_args(argv)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def default_workers(device: torch.device) -> int:
    """A process for each core that this one may use: a batch system, a container or taskset may
    allow fewer than the machine has, and the ranks on one machine share them.

    Beside a GPU two cores are left: for the thread that launches its kernels, which must not wait,
    and for the one that hands it the images.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    own = (allowed or 1) // ranks_on_this_machine() - (2 if device.type == "cuda" else 0)
    return max(1, min(16, own))


def parse_job(argv: Sequence[str] | None) -> tuple[Job, Benchmark]:
    """The job, with the user's own sources alone, and its benchmark. Raises BadJob for arguments
    that do not go together; BadCache, BadNetwork and ValueError for names that are not right;
    BadBenchmark for a benchmark file that is not."""
    args = parse_arguments(argv)
    benchmark: Benchmark = args.benchmark
    workers: int | None = getattr(args, "workers", None)
    own = _own_sources({"id": args.id, "calibration": args.calibration}, args.ood)
    per_class = _per_class(args.calibration_per_class)
    chosen = {
        key: getattr(args, key, None) for key in ("resize", "squash", "crop", "interpolation")
    }
    chosen |= {key: getattr(args, key) and tuple(getattr(args, key)) for key in ("mean", "std")}
    perturbation = Perturbation(args.odin_temperature, args.odin_epsilon)
    checks = {
        "--calibration is not read with --calibration-per-class 0; give one of them": (
            per_class == 0 and args.calibration is not None
        ),
        "--calibration-per-class is about --calibration, which does not come by itself with --id": (
            per_class not in (10, 0) and args.id and not args.calibration
        ),
        "--batch-size must be at least 1 and --workers at least 0": (
            args.batch_size < 1 or (workers or 0) < 0
        ),
        f"--gaussian must be at least 0, got {args.gaussian}": args.gaussian < 0,
        "give --weights or --checkpoint, not both": args.weights is not None and args.checkpoint,
        f"--resize must be at least 0, got {args.resize}": (args.resize or 0) < 0,
        f"--crop must be at least 1, got {args.crop}": args.crop is not None and args.crop < 1,
        f"--std must be above 0, got {args.std}": args.std and not all(v > 0 for v in args.std),
        f"--odin-temperature must be a number above 0, got {perturbation.temperature}": (
            not 0 < perturbation.temperature < math.inf
        ),
        f"--odin-epsilon must be a number from 0 on, got {perturbation.epsilon}": (
            not 0 <= perturbation.epsilon < math.inf
        ),
        "--odin-temperature and --odin-epsilon change nothing without --odin; give it too": (
            not args.odin and perturbation != ODIN
        ),
    }
    for message, wrong in checks.items():
        if wrong:
            raise BadJob(message)
    arguments = _builder_arguments(args.arch_arg)
    if args.arch in (None, benchmark.arch):
        spec = _benchmarks_network(args, arguments)
        chosen = {**benchmark.given_preprocessing, **_given(chosen)}
    else:
        spec = NetworkSpec(args.arch, args.weights, args.checkpoint, arguments, args.head)
    spec = _with_default_weights(spec)
    networks.check_names(spec)
    device = pick_device(args.device)
    name = cache.default_name(spec.arch) if args.name is None else args.name
    for text in (name, *own):
        cache.check_name(text, "a name")
    job = Job(
        folder=cache.cache_folder(args.cache_dir, benchmark.name, name),
        network=spec,
        sources=own,
        own=frozenset(own),
        options=SourceOptions(args.data_root, args.list_root, args.download),
        preprocessing=_given(chosen),
        default_preprocessing=benchmark.preprocessing,
        per_class=per_class,
        perturbation=perturbation if args.odin else None,
        noise=args.gaussian,
        batch_size=args.batch_size,
        workers=default_workers(device) if workers is None else workers,
        device=args.device,
        precision=args.precision,
        overwrite=args.overwrite,
        comparable=benchmark.published and not args.id,
    )
    return job, benchmark


def _own_sources(known: Mapping[str, str | None], ood: Sequence[str]) -> dict[str, str]:
    """Image set name -> the source given for it. ood: NAME=SOURCE. Raises BadJob for a name that is
    malformed, reserved or given twice."""
    own = {name: source for name, source in known.items() if source is not None}
    for text in ood:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise BadJob(f"--ood must be NAME=SOURCE, got {text!r}")
        if name in own or name in cache.RESERVED:
            raise BadJob(f"--ood {name}: that name is taken; give another")
        own[name] = source
    return own


def _per_class(text: str) -> int | None:
    """None stands for all. Raises BadJob for anything but a count or `all`."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise BadJob(f"--calibration-per-class must be a number, 'all' or 0, got {text!r}")
    return int(text)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _benchmarks_network(args: argparse.Namespace, arguments: Mapping[str, object]) -> NetworkSpec:
    """The benchmark's own network, with what the command line says of it."""
    benchmark: Benchmark = args.benchmark
    if benchmark.arch is None:
        raise BadJob(
            f"the benchmark {benchmark.spelling} has no network of its own; give --arch, and "
            "--checkpoint or --weights"
        )
    weights, checkpoint = args.weights, args.checkpoint
    if weights is None and checkpoint is None:
        weights = benchmark.weights
        checkpoint = benchmark.checkpoint and args.data_root / benchmark.checkpoint
    return NetworkSpec(
        benchmark.arch,
        weights,
        checkpoint,
        {**benchmark.arch_args, **arguments},
        args.head or benchmark.head,
    )


def _with_default_weights(spec: NetworkSpec) -> NetworkSpec:
    if spec.weights is not None or spec.checkpoint is not None or ":" in spec.arch:
        return spec
    return dataclasses.replace(spec, weights=DEFAULT_WEIGHTS)


def _builder_arguments(texts: Sequence[str]) -> dict[str, object]:
    """KEY=VALUE as Python literals, or as text where they are none."""
    found: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise BadJob(f"--arch-arg must be KEY=VALUE, such as num_classes=10, got {text!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def run(job: Job, benchmark: Benchmark, ranks: Ranks) -> None:
    """Finds the image sets of the benchmark and fills the cache."""
    data_root = job.options.data_root
    if prepare := benchmark.prepare:
        ranks.from_first(lambda: prepare(data_root, _training_bar))
    found = locate(benchmark, data_root, job.sources)
    if job.per_class == 0:
        found.pop("calibration", None)
    sources = {name: place.source for name, place in found.items()}
    list_roots = {name: place.list_root for name, place in found.items() if place.list_root}
    build(dataclasses.replace(job, sources=sources, list_roots=list_roots), ranks)


def _training_bar(epochs: Sequence[int]) -> Iterable[int]:
    with progress_bar("training the network of the digits", "epoch", len(epochs)) as bar:
        for epoch in epochs:
            yield epoch
            bar.update()


def expected_message(error: Exception) -> str | None:
    """What to say of an error that the input, the disk or another process can cause; None for any
    other."""
    if out_of_memory(error):
        return "the device has too little memory for this network; give another --device"
    # A worker that ends is told of wherever the run then is: by torch's signal handler, or by a
    # connection that breaks.
    worker = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    if worker or isinstance(error, ConnectionError | EOFError):
        reason = (str(error) or type(error).__name__).splitlines()[0].strip()
        return (
            f"a worker process that reads images ended ({reason}); often the machine is out of "
            "memory: give fewer --workers"
        )
    if isinstance(error, OSError):
        return f"{shown(error.filename or 'a file')}: {error.strerror or error}"
    return str(error) if isinstance(error, EXPECTED) else None


def main(argv: Sequence[str] | None = None) -> int:
    with rank0_prints(), warnings.catch_warnings():
        # More workers than cores may well be right: they wait for the disk.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        try:
            job, benchmark = parse_job(argv)
        except (BadJob, BadNetwork, cache.BadCache, ValueError) as error:
            return fail(PROGRAM, error, 2)
        except BadBenchmark as error:
            return fail(PROGRAM, error, 1)
        try:
            with join(expected_message) as ranks:
                run(job, benchmark, ranks)
        except KeyboardInterrupt:
            return fail(PROGRAM, "interrupted; the same command goes on where it stopped", 130)
        except Exception as error:
            message = expected_message(error)
            if message is None:
                raise
            return fail(PROGRAM, message, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
