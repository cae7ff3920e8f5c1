"""Cached activations in, a table of FPR95 and AUROC per OOD set out: LHAct and the methods it is
compared with."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lhact import cache, detector_file, identify
from lhact.benchmarks.builtin import BENCHMARKS, Benchmark
from lhact.benchmarks.userfile import BadBenchmark, open_benchmark
from lhact.devices import gpu_arithmetic, pick_device
from lhact.evaluation import reproduce, results, select
from lhact.evaluation.score import fit_methods, score
from lhact.evaluation.uncertainty import Bootstrap
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
from lhact.reporting import lines, text
from lhact.reporting.output import BadOutput, check_places, write

PROGRAM = "eval.py"
DEFAULT_METHODS = ["lhact", "energy"]
KEEP = 0.95  # the share of ID images that a saved detector lets pass, as FPR95 does
MOST_DIGITS = 9


@dataclass(frozen=True)
class Job:
    """What eval.py is asked for."""

    benchmark: Benchmark
    cache_dir: Path
    names: tuple[str, ...]
    seeds: bool
    methods: tuple[str, ...]
    settings: tuple[Setting, ...]
    sweeps: tuple[tuple[Setting, ...], ...]
    select_on: str | None
    reproduce: bool
    bootstrap: Bootstrap | None
    view: lines.View
    form: str
    output: Path | None
    scores_dir: Path | None
    save_detector: Path | None
    device: torch.device
    extraction: str  # the command that makes a cache, but for its name

    def folder(self, name: str) -> Path:
        return cache.cache_folder(self.cache_dir, self.benchmark.name, name)


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
        default="imagenet",
        metavar="NAME|FILE.toml",
        help=f"whose activations: {', '.join(BENCHMARKS)}, a file of your own, or what "
        "lhact.features was given",
    )
    add("--cache-dir", type=_path, default="cache", help="where get_activation.py wrote them")
    add(
        "--name",
        nargs="+",
        metavar="NAME",
        help="the name they were cached under (default: the benchmark's architecture); several "
        "names: one table of all",
    )
    add("--seeds", action="store_true", help="also the mean and standard deviation over the names")
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
    add(
        "--bootstrap",
        type=int,
        default=0,
        metavar="N",
        help="resamples of the images (1000 are usual) for 95 %% intervals of FPR95 and AUROC, and "
        "of each method's difference from the first; 0: none",
    )
    shown_metrics = ["fpr95", "auroc"]
    add("--metrics", nargs="+", choices=lines.TITLES, default=shown_metrics, help="of a table")
    add(
        "--digits",
        type=_digits,
        default=lines.DECIMALS,
        metavar="auto|N",
        help="decimals of a table's numbers; auto: as many as the intervals of --bootstrap allow",
    )
    add("--format", choices=text.FORMATS, default="table")
    add("--output", type=_path, metavar="FILE", help="write there, not to standard output")
    add("--scores-dir", type=_path, metavar="DIR", help="also write each image's path and score")
    add(
        "--save-detector",
        type=_path,
        metavar="FILE",
        help="also write the first method for lhact.score and Detector.load",
    )
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    args = parser.parse_args(argv)
    try:
        args.benchmark = open_benchmark(args.benchmark, args.cache_dir)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --benchmark: {error}")
    if args.reproduce:
        # It searches settings of its own; what belongs to another question must not be ignored.
        given = {
            "--set": args.set,
            "--sweep": args.sweep,
            "--select-on": args.select_on,
            "--scores-dir": args.scores_dir,
            "--save-detector": args.save_detector,
            "--bootstrap": args.bootstrap,
            "--digits": args.digits != lines.DECIMALS,
            "several names": args.name and len(args.name) > 1,
            "--methods": args.methods != DEFAULT_METHODS,
            f"--format {args.format}": args.format not in ("table", "json"),
        }
        if others := ", ".join(option for option, is_given in given.items() if is_given):
            parser.error(f"--reproduce does not go together with {others}")
    names = args.name or []
    if twice := {name for name in names if names.count(name) > 1}:
        parser.error(f"--name: {', '.join(sorted(twice))} is given twice")
    if args.seeds and len(names) < 2:
        parser.error("--seeds is over several names: give --name at least two")
    if args.save_detector and len(names) > 1:
        parser.error("--save-detector is of one network: give one --name")
    if args.digits is None and not args.bootstrap:
        parser.error("--digits auto follows the intervals: give --bootstrap N as well")
    return args


def _digits(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isdecimal() and int(text) <= MOST_DIGITS:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be auto or 0 to {MOST_DIGITS}, got {text!r}")


def _path(name: str) -> Path:
    return Path(name).expanduser()


def parse_job(argv: Sequence[str] | None) -> Job:
    """The job. Raises ValueError or BadMethod for what is not right on the command line, and
    BadBenchmark for a benchmark file that is not."""
    args = parse_arguments(argv)
    benchmark: Benchmark = args.benchmark
    if not args.name and benchmark.arch is None:
        raise ValueError(
            f"the benchmark {benchmark.spelling} has no network of its own; give --name, as "
            "get_activation.py had it"
        )
    names = args.name or [cache.default_name(benchmark.arch or "")]
    given = {
        "--benchmark": (benchmark.spelling, "imagenet"),
        "--cache-dir": (str(args.cache_dir), "cache"),
    }
    options = [f"{key} {shlex.quote(v)}" for key, (v, default) in given.items() if v != default]
    program = "get_activation.py" if benchmark.ood else "-m lhact.features"
    job = Job(
        benchmark=benchmark,
        cache_dir=args.cache_dir,
        names=tuple(names),
        seeds=args.seeds,
        methods=tuple(args.methods),
        settings=tuple(parse_setting(text) for text in args.set),
        sweeps=tuple(tuple(parse_sweep(text)) for text in args.sweep),
        select_on=args.select_on,
        reproduce=args.reproduce,
        bootstrap=Bootstrap(args.bootstrap) if args.bootstrap else None,
        view=lines.View(tuple(args.metrics), args.digits),
        form=args.format,
        output=args.output,
        scores_dir=args.scores_dir,
        save_detector=args.save_detector,
        device=pick_device(args.device),
        extraction=" ".join([f"python {program}", *options]),
    )
    variants(job.methods, job.settings, job.sweeps, published=False)
    return job


def open_job(job: Job, name: str) -> cache.Cache:
    """The cache of that name. Raises BadCache, naming those that are there, if it is not."""
    folder = job.folder(name)
    if not folder.is_dir():
        names = sorted(path.name for path in folder.parent.glob("*/") if path.is_dir())
        there = f"; there are: {', '.join(names)}" if names else ""
        usual = cache.default_name(job.benchmark.arch or "")
        option = "" if name == usual else f" --name {shlex.quote(name)}"
        raise cache.BadCache(
            f"there is no cache {folder}{there}; make it with: {job.extraction}{option}"
        )
    return cache.open_cache(folder, list(job.benchmark.ood))


def report(job: Job, opened: Mapping[str, cache.Cache]) -> None:
    """Writes the table of the job, or what else it asks for."""
    if job.reproduce:
        (only,) = opened.values()
        write(text.reproduction(find_published(job, only), job.form), job.output)
        return
    evaluated = []
    for name, part in opened.items():
        if len(opened) > 1:
            say(f"{name}:")
        evaluated.append(evaluate(job, name, part))
    spread = results.mean_and_deviation(evaluated) if job.seeds else []
    write(text.FORMATS[job.form]([*evaluated, *spread], job.view), job.output)


def _findings(job: Job, opened: cache.Cache) -> list[str]:
    if not job.benchmark.published:
        return []
    return list(identify.findings(opened.id, opened.weight, opened.bias))


def find_published(job: Job, opened: cache.Cache) -> list[reproduce.Closest]:
    """The settings that come closest to the published rows."""
    decided = identify.thresholds(opened)
    say(decided.remark)
    findings = _findings(job, opened)
    if not identify.is_v1(opened.info.network):
        say(
            "this is not the network of the published rows: the remaining differences are also "
            "the network's"
        )
    for line in lines.comparison_warnings(findings):
        say(line)
    with progress_bar("searching", "image") as bar:
        found = reproduce.reproduce(opened, job.device, decided.published, bar.update)
    opened.check_unchanged()
    return found


def evaluate(job: Job, name: str, opened: cache.Cache) -> results.Result:
    """The result of that name; its scores are written where the job asks for them."""
    decided = identify.thresholds(opened)
    say(decided.remark)
    findings = _findings(job, opened)
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
        benchmark=job.benchmark.name,
        name=name,
        info=opened.info,
        findings=tuple(findings),
        comparable=job.benchmark.published and identify.is_v1(opened.info.network),
        perturbation=opened.perturbed("id").info.perturbation if perturbed else None,
        groups=job.benchmark.groups,
        selected_on=job.select_on,
    )
    asked, baseline_scores = [by_method[m] for m in fitted], by_method[along[0]] if along else None
    resamples = job.bootstrap.resamples if job.bootstrap else None
    with progress_bar("resampling", "resample", resamples) as bar:
        result = results.summarise(about, asked, baseline_scores, job.bootstrap, bar.update)
    opened.check_unchanged()
    other_lists = _other_lists(opened, result, job.benchmark)
    for line in (*lines.warnings(result), *lines.remarks(result), *other_lists):
        say(line)
    if job.benchmark.remark:
        say(job.benchmark.remark)
    if job.scores_dir:
        paths = {name: part.info.paths for name, part in opened.sets.items()}
        folder = job.scores_dir / name if len(job.names) > 1 else job.scores_dir
        text.write_scores(folder, result, scored, paths)
    if job.save_detector:
        first = by_method[fitted[0]]
        saved = detector_file.of_cache(opened, first.fitted, first.scores["id"], KEEP)
        detector_file.write(job.save_detector, saved)
        say(f"{first.fitted.name} saved to {job.save_detector}, for lhact.score and Detector.load")
    return result


def _say_left_out(method: Method, error: Exception) -> None:
    say(f"left out: {method.name} ({error})")


def _other_lists(opened: cache.Cache, result: results.Result, benchmark: Benchmark) -> list[str]:
    """Where published numbers are shown: which sets are not the published image lists."""
    if not any(row.published for method in result.methods for row in method.rows):
        return []
    odd = [
        f"{name} has {opened.sets[name].images:,} images, the published {image_set.images:,}"
        for name, image_set in {"id": benchmark.id, **benchmark.ood}.items()
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
    except BadBenchmark as error:
        return fail(PROGRAM, error, 1)
    try:
        opened = {name: open_job(job, name) for name in job.names}
        check_places(
            {"--output": job.output, "--save-detector": job.save_detector},
            {"--scores-dir": job.scores_dir},
        )
        with gpu_arithmetic(tf32=False):
            report(job, opened)
    except (BadOutput, cache.BadCache, BadMethod) as error:
        return fail(PROGRAM, error, 1)
    except torch.OutOfMemoryError:
        return fail(PROGRAM, f"{job.device} has too little memory; give --device cpu", 1)
    except OSError as error:
        return fail(
            PROGRAM, f"{error.filename or job.folder(job.names[0])}: {error.strerror or error}", 1
        )
    except KeyboardInterrupt:
        return fail(PROGRAM, "interrupted", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
