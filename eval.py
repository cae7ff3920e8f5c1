"""Cached activations in, a table of FPR95 and AUROC per OOD set out: LHAct and the methods it is
compared with."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lhact import cache, identify
from lhact.benchmarks.builtin import BENCHMARKS, Benchmark
from lhact.devices import device_line, gpu_arithmetic, out_of_memory, pick_device
from lhact.evaluation import reproduce, results, select
from lhact.evaluation.score import fit_methods, score
from lhact.messages import fail, progress_bar, say
from lhact.methods.compose import (
    DEFAULT_SCORE,
    BadMethod,
    Method,
    Setting,
    known_methods,
    parse,
    parse_setting,
    parse_sweep,
    variants,
)
from lhact.reporting import text
from lhact.reporting.output import BadOutput, check_places, write

PROGRAM = "eval.py"
DEFAULT_METHODS = ["lhact", "energy"]


@dataclass(frozen=True)
class Job:
    """What eval.py is asked for."""

    benchmark: str
    folder: Path
    name: str
    methods: tuple[str, ...]
    settings: tuple[Setting, ...]
    sweeps: tuple[tuple[Setting, ...], ...]
    select_on: str | None
    reproduce: bool
    metrics: tuple[str, ...]
    form: str
    output: Path | None
    scores_dir: Path | None
    device_name: str  # as the user gives it
    device: torch.device
    extraction: str  # the command that makes the cache

    @property
    def protocol(self) -> Benchmark:
        return BENCHMARKS[self.benchmark]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--benchmark", choices=BENCHMARKS, default="imagenet", help="whose activations")
    add("--cache-dir", type=_path, default="cache", help="where get_activation.py wrote them")
    add("--name", help="the name they were cached under (default: the benchmark's architecture)")
    add(
        "--methods",
        nargs="+",
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help="joined by '+': rectifiers, then a score; table6: the paper's table; all: everything "
        f"the cache can serve; known: {', '.join(known_methods())}",
    )
    add("--set", action="append", default=[], metavar="METHOD.PARAM=VALUE", help="repeatable")
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="METHOD.PARAM=V1,V2,...",
        help="repeatable: every combination",
    )
    add(
        "--select-on",
        metavar="NAME|NAME=FOLDER|gaussian|id",
        help="choose each method's setting of the sweep without the test sets: on an OOD set of "
        "this cache, which is then not tested on, or of another cache folder; on Gaussian noise; "
        "or on ID calibration images alone",
    )
    add(
        "--reproduce",
        action="store_true",
        help="find the settings that come closest to the published rows, instead of a table",
    )
    shown_metrics = ["fpr95", "auroc"]
    add("--metrics", nargs="+", choices=text.TITLES, default=shown_metrics, help="of a table")
    add("--format", choices=text.FORMATS, default="table")
    add("--output", type=_path, metavar="FILE", help="write there, not to standard output")
    add("--scores-dir", type=_path, metavar="DIR", help="also write each image's path and score")
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    args = parser.parse_args(argv)
    if args.reproduce:
        # It searches settings of its own; what belongs to another question must not be ignored.
        given = {
            "--set": args.set,
            "--sweep": args.sweep,
            "--select-on": args.select_on,
            "--scores-dir": args.scores_dir,
            "--methods": args.methods != DEFAULT_METHODS,
            f"--format {args.format}": args.format not in ("table", "json"),
        }
        if others := ", ".join(option for option, is_given in given.items() if is_given):
            parser.error(f"--reproduce does not go together with {others}")
    return args


def _path(name: str) -> Path:
    return Path(name).expanduser()


def parse_job(argv: Sequence[str] | None) -> Job:
    """The job. Raises ValueError or BadMethod for what is not right on the command line."""
    args = parse_arguments(argv)
    name = args.name
    if name is None:
        name = cache.default_name(BENCHMARKS[args.benchmark].arch)
    given = {
        "--benchmark": (args.benchmark, "imagenet"),
        "--cache-dir": (str(args.cache_dir), "cache"),
        "--name": (args.name, None),
    }
    options = [f"{key} {shlex.quote(v)}" for key, (v, default) in given.items() if v != default]
    job = Job(
        benchmark=args.benchmark,
        folder=cache.cache_folder(args.cache_dir, args.benchmark, name),
        name=name,
        methods=tuple(args.methods),
        settings=tuple(parse_setting(text) for text in args.set),
        sweeps=tuple(tuple(parse_sweep(text)) for text in args.sweep),
        select_on=args.select_on,
        reproduce=args.reproduce,
        metrics=tuple(args.metrics),
        form=args.format,
        output=args.output,
        scores_dir=args.scores_dir,
        device_name=args.device,
        device=pick_device(args.device),
        extraction=" ".join(["python get_activation.py", *options]),
    )
    variants(job.methods, job.settings, job.sweeps, published=False)
    return job


def open_job(job: Job) -> cache.Cache:
    """The cache of the job. Raises BadCache, naming those that are there, if it is not."""
    if not job.folder.is_dir():
        names = sorted(path.name for path in job.folder.parent.glob("*/") if path.is_dir())
        there = f"; there are: {', '.join(names)}" if names else ""
        raise cache.BadCache(
            f"there is no cache {job.folder}{there}; make it with: {job.extraction}"
        )
    return cache.open_cache(job.folder, list(job.protocol.ood))


def evaluate(job: Job, opened: cache.Cache) -> None:
    """Writes the table of the job, or what else it asks for."""
    say(device_line(job.device_name, job.device))
    decided = identify.thresholds(opened)
    say(decided.remark)
    findings = (
        identify.findings(opened.id, opened.weight, opened.bias) if job.protocol.published else []
    )
    if job.reproduce:
        if not identify.is_v1(opened.info.network):
            say(
                "this is not the network of the published rows: the remaining differences are also "
                "the network's"
            )
        for line in text.comparison_warnings(findings):
            say(line)
        with progress_bar("searching", "image") as bar:
            found = reproduce.reproduce(opened, job.device, decided.published, bar.update)
        opened.check_unchanged()
        write(text.reproduction(found, job.form), job.output)
        return
    methods = variants(job.methods, job.settings, job.sweeps, decided.published)
    # With thresholds of one's own the question is always whether they help: plain energy is then
    # scored along.
    alone = decided.published or DEFAULT_SCORE in (method.name for method in methods)
    baseline = None if alone else parse(DEFAULT_SCORE)
    left_out = _say_left_out if "all" in job.methods else None
    fitted = fit_methods(opened, methods, job.device, left_out)
    if job.select_on:
        considered = len(fitted)
        selection = select.hold_out(opened, job.select_on)
        with progress_bar("selecting", "image") as bar:
            fitted = select.select(selection, fitted, job.device, bar.update)
        opened = selection.cache
        say(
            f"{considered} settings considered; of each method the one chosen on {job.select_on}, "
            "without the test sets"
        )
    along = fit_methods(opened, [baseline], job.device) if baseline else []
    total = opened.id.images + sum(opened.sets[name].images for name in opened.ood)
    with progress_bar("scoring", "image", total) as bar:
        scored = score(opened, [*fitted, *along], job.device, bar.update)
    by_method = {part.fitted: part for part in scored}
    perturbed = any(method.perturbed for method in fitted)
    about = results.About(
        benchmark=job.benchmark,
        name=job.name,
        info=opened.info,
        findings=tuple(findings),
        comparable=job.protocol.published and identify.is_v1(opened.info.network),
        perturbation=opened.perturbed("id").info.perturbation if perturbed else None,
        groups=job.protocol.groups,
        selected_on=job.select_on,
    )
    result = results.summarise(
        about, [by_method[m] for m in fitted], by_method[along[0]] if along else None
    )
    opened.check_unchanged()
    for line in (*text.warnings(result), *text.remarks(result), *_other_lists(opened, result)):
        say(line)
    if job.scores_dir:
        paths = {name: part.info.paths for name, part in opened.sets.items()}
        text.write_scores(job.scores_dir, result, scored, paths)
    write(text.FORMATS[job.form](result, job.metrics), job.output)


def _say_left_out(method: Method, error: Exception) -> None:
    say(f"left out: {method.name} ({error})")


def _other_lists(opened: cache.Cache, result: results.Result) -> list[str]:
    """Where published numbers are shown: which sets are not the published image lists."""
    if not any(row.published for method in result.methods for row in method.rows):
        return []
    protocol = BENCHMARKS[result.about.benchmark]
    odd = [
        f"{name} has {opened.sets[name].images:,} images, the published {image_set.images:,}"
        for name, image_set in {"id": protocol.id, **protocol.ood}.items()
        if name in opened.sets and opened.sets[name].images != image_set.images
    ]
    if not odd:
        return []
    return [
        "the published numbers are of other image lists, so the differences mean little: "
        + "; ".join(odd)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    try:
        job = parse_job(argv)
    except (ValueError, BadMethod) as error:
        return fail(PROGRAM, error, 2)
    try:
        opened = open_job(job)
        check_places({"--output": job.output}, {"--scores-dir": job.scores_dir})
        with gpu_arithmetic(tf32=False):
            evaluate(job, opened)
    except (BadOutput, cache.BadCache, BadMethod) as error:
        return fail(PROGRAM, error, 1)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return fail(PROGRAM, f"{job.device} has too little memory; give --device cpu", 1)
    except OSError as error:
        return fail(PROGRAM, f"{error.filename or job.folder}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return fail(PROGRAM, "interrupted", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
