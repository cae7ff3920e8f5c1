"""Cached activations in, a table of FPR95 and AUROC per OOD set out: LHAct and the methods it is
compared with."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lhact import cache, command
from lhact.benchmarks.builtin import BENCHMARKS, Benchmark
from lhact.benchmarks.userfile import open_benchmark
from lhact.devices import device_line, gpu_arithmetic, pick_device
from lhact.evaluation import results
from lhact.evaluation.evaluate import Question, evaluate, find_published
from lhact.evaluation.uncertainty import Bootstrap
from lhact.messages import say
from lhact.methods.compose import known_methods, parse_setting, parse_sweep, variants
from lhact.options import path
from lhact.reporting import lines, text
from lhact.reporting.beside import Places, load_plots, write_beside
from lhact.reporting.output import check_places, write

PROGRAM = "eval.py"
MOST_DIGITS = 9
# Options that --reproduce does not follow.
OF_A_TABLE = (
    *("set", "sweep", "select_on", "scores_dir", "plots", "report", "save_detector"),
    *("bootstrap", "digits", "methods"),
)


@dataclass(frozen=True)
class Job:
    """What eval.py is asked for."""

    cache_dir: Path
    names: tuple[str, ...]
    seeds: bool
    question: Question
    reproduce: bool
    view: lines.View
    form: str
    output: Path | None
    places: Places
    device_name: str  # as the user gives it

    def folder(self, name: str) -> Path:
        return cache.cache_folder(self.cache_dir, self.question.benchmark.name, name)


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
    add("--cache-dir", type=path, default="cache", help="where get_activation.py wrote them")
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
        default=["lhact", "energy"],
        metavar="METHOD",
        help="joined by '+': rectifiers, then a score; table6: the paper's table; all: everything "
        f"the cache can serve; known: {', '.join(known_methods())}",
    )
    add("--set", action="append", default=[], metavar="METHOD.PARAM=VALUE", help="repeatable")
    each = "repeatable: every combination"
    add("--sweep", action="append", default=[], metavar="METHOD.PARAM=V1,V2,...", help=each)
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
    metrics = list(lines.COMPARABLE)
    add("--metrics", nargs="+", choices=lines.TITLES, default=metrics, help="of a table")
    add(
        "--digits",
        type=_digits,
        default=lines.DECIMALS,
        metavar="auto|N",
        help="decimals of a table's numbers; auto: as many as the intervals of --bootstrap allow",
    )
    add("--format", choices=text.FORMATS, default="table")
    add("--output", type=path, metavar="FILE", help="write there, not to standard output")
    # What goes somewhere else, beside the table.
    beside = {
        "--scores-dir DIR": "write each image's path, score, predicted class and energies",
        "--plots DIR": "draw scores, ROC curves, rectification functions, channel means, sweeps "
        "and the comparison of all methods there, as PNG and PDF (needs matplotlib)",
        "--report FILE.html": "write one page with the tables, pictures and the most confidently "
        "wrong images",
        "--save-detector FILE": "write the first method for lhact.score and Detector.load",
    }
    for option, what in beside.items():
        option, place = option.split()
        add(option, type=path, metavar=place, help=f"also {what}")
    images = "where the images lie, for the thumbnails of --report"
    add("--data-root", type=path, default="datasets", help=images)
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    args = parser.parse_args(argv)
    try:
        args.benchmark = open_benchmark(args.benchmark, args.cache_dir)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --benchmark: {error}")
    names = args.name = args.name or []
    if args.reproduce:
        # It searches settings of its own; what belongs to another question must not be ignored.
        others = [
            f"--{option.replace('_', '-')}"
            for option in OF_A_TABLE
            if getattr(args, option) != parser.get_default(option)
        ]
        others += ["several names"] * (len(names) > 1)
        others += [f"--format {args.format}"] * (args.format not in ("table", "json"))
        if others:
            parser.error(f"--reproduce does not go together with {', '.join(others)}")
    if twice := {name for name in names if names.count(name) > 1}:
        parser.error(f"--name: {', '.join(sorted(twice))} is given twice")
    if args.seeds and len(names) < 2:
        parser.error("--seeds is over several names: give --name at least two")
    if (args.save_detector or args.report) and len(names) > 1:
        parser.error("--save-detector and --report are of one network: give one --name")
    if args.report and args.output and args.report.resolve() == args.output.resolve():
        parser.error(f"--report and --output both name {args.output}; give them two files")
    if args.digits is None and not args.bootstrap:
        parser.error("--digits auto follows the intervals: give --bootstrap N as well")
    return args


def _digits(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isdecimal() and int(text) <= MOST_DIGITS:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be auto or 0 to {MOST_DIGITS}, got {text!r}")


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
    question = Question(
        benchmark=benchmark,
        methods=tuple(args.methods),
        settings=tuple(parse_setting(text) for text in args.set),
        sweeps=tuple(tuple(parse_sweep(text)) for text in args.sweep),
        select_on=args.select_on,
        bootstrap=Bootstrap(args.bootstrap) if args.bootstrap else None,
        device=pick_device(args.device),
        with_energy=args.plots is not None,
    )
    variants(question.methods, question.settings, question.sweeps, published=False)
    command = shlex.join(["python", PROGRAM, *(sys.argv[1:] if argv is None else argv)])
    return Job(
        cache_dir=args.cache_dir,
        names=tuple(args.name or [cache.default_name(benchmark.arch or "")]),
        seeds=args.seeds,
        question=question,
        reproduce=args.reproduce,
        view=lines.View(tuple(args.metrics), args.digits),
        form=args.format,
        output=args.output,
        places=Places(
            args.scores_dir, args.plots, args.report, args.save_detector, args.data_root, command
        ),
        device_name=args.device,
    )


def open_job(job: Job, name: str) -> cache.Cache:
    """The cache of that name. Raises BadCache, naming those that are there, if it is not."""
    folder, benchmark = job.folder(name), job.question.benchmark
    if not folder.is_dir():
        names = sorted(path.name for path in folder.parent.glob("*/") if path.is_dir())
        there = f"; there are: {', '.join(names)}" if names else ""
        program = ["get_activation.py"] if benchmark.ood else ["-m", "lhact.features"]
        given = {
            "--benchmark": (benchmark.spelling, "imagenet"),
            "--cache-dir": (str(job.cache_dir), "cache"),
            "--name": (name, cache.default_name(benchmark.arch or "")),
        }
        options = [part for key, (v, usual) in given.items() if v != usual for part in (key, v)]
        command = shlex.join(["python", *program, *options])
        raise cache.BadCache(f"there is no cache {folder}{there}; make it with: {command}")
    return cache.open_cache(folder, list(benchmark.ood))


def report(job: Job, opened: Mapping[str, cache.Cache]) -> None:
    """Writes the table of the job, and what is asked for beside it."""
    question = job.question
    say(device_line(job.device_name, question.device))
    if job.reproduce:
        (only,) = opened.values()
        found = find_published(question.benchmark, only, question.device)
        write(text.reproduction(found, job.form), job.output)
        return
    evaluated = []
    for name, part in opened.items():
        if len(opened) > 1:
            say(f"{name}:")
        answer = evaluate(part, name, question)
        evaluated.append(answer.result)
        above = lines.warnings(answer.result) + lines.remarks(answer.result)
        for line in (*above, *answer.remarks):
            say(line)
        places = job.places.of(name) if len(opened) > 1 else job.places
        write_beside(places, answer, question, job.view)
    spread = results.mean_and_deviation(evaluated) if job.seeds else []
    content = lines.Table([*evaluated, *spread], job.view)
    write(text.FORMATS[job.form](content), job.output)


def work(job: Job) -> None:
    """Writes what is asked for, once the caches are open and the places can be written to."""
    if job.places.plots:
        load_plots()  # before any work is done
    opened = {name: open_job(job, name) for name in job.names}
    check_places({"--output": job.output, **job.places.files}, job.places.folders)
    with gpu_arithmetic(tf32=False):
        report(job, opened)


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(PROGRAM, lambda: parse_job(argv), work)


if __name__ == "__main__":
    sys.exit(main())
