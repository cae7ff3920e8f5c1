"""Cached activations in, a table of FPR95 and AUROC per OOD set out: LHAct and the methods it is compared with."""

import argparse
import errno
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lhact import cache, published
from lhact.benchmarks.builtin import BENCHMARKS
from lhact.devices import pick_device
from lhact.evaluation import reproduce, select
from lhact.evaluation import score as evaluate
from lhact.methods import compose as methods
from lhact.reporting import text as report


class BadOutput(Exception):
    """A place that results cannot be written to."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="imagenet", help="whose activations")
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"), help="where get_activation.py wrote them")
    parser.add_argument("--name", help="the name they were cached under (default: the benchmark's architecture)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["lhact"],
        metavar="METHOD",
        help="joined by '+': rectifiers, then a score; table6: the paper's table; all: everything the cache can serve; "
        f"known: {', '.join(methods.known_methods())}",
    )
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.PARAM=VALUE", help="repeatable")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="METHOD.PARAM=V1,V2,...", help="repeatable: every combination"
    )
    parser.add_argument(
        "--select-on",
        metavar="NAME|NAME=FOLDER|gaussian|id",
        help="choose each method's setting of the sweep without the test sets: on an OOD set of this cache, which is then not "
        "tested on, or of another cache folder; on Gaussian noise; or on ID calibration images alone",
    )
    parser.add_argument(
        "--reproduce", action="store_true", help="find the settings that come closest to the published rows, instead of a table"
    )
    parser.add_argument("--metrics", nargs="+", choices=report.TITLES, default=["fpr95", "auroc"], help="what table formats show")
    parser.add_argument("--format", choices=report.FORMATS, default="table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to standard output")
    parser.add_argument("--scores-dir", type=Path, metavar="DIR", help="also write each image's path and score there, as CSV")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    args = parser.parse_args(argv)
    if args.reproduce:
        # It searches settings of its own; what belongs to another question must not be ignored silently.
        others = {"--set": args.set, "--sweep": args.sweep, "--select-on": args.select_on, "--scores-dir": args.scores_dir}
        given = [name for name, value in others.items() if value]
        given += ["--methods"] if args.methods != ["lhact"] else []
        given += [f"--format {args.format}"] if args.format not in ("table", "json") else []
        if given:
            parser.error(f"--reproduce does not go together with {', '.join(given)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    benchmark = BENCHMARKS[args.benchmark]
    name = args.name or benchmark.arch
    try:
        device = pick_device(args.device)
        settings = [methods.parse_setting(text) for text in args.set]
        sweeps = [methods.parse_sweep(text) for text in args.sweep]
        methods.variants(args.methods, settings, sweeps, published=False)
    except (ValueError, methods.BadMethod) as error:
        return _fail(error, 2)
    try:
        folder = cache.cache_folder(args.cache_dir, args.benchmark, name)
        if not folder.is_dir():
            return _fail(f"there is no cache {folder}; make it with: {_extraction(args)}", 1)
        opened = evaluate.open_cache(folder, list(benchmark.ood))
        _check_places(args)
        thresholds = evaluate.thresholds(opened)
        _remark(thresholds.remark)
        if args.reproduce:
            if not published.is_v1(opened.network):
                _remark("this is not the network of the published rows: the remaining differences are also the network's")
            found = evaluate.findings(args.benchmark, opened.id, opened.weight, opened.bias)
            for line in report.warnings({"findings": found}):
                _remark(line)
            with tqdm(unit="image", delay=1, leave=False, desc="searching") as bar:
                rows = reproduce.reproduce(opened, device, thresholds.published, bar.update)
            _write(report.reproduction(rows, args.format), args.output)
            return 0
        chosen = methods.variants(args.methods, settings, sweeps, thresholds.published)
        if args.select_on:
            considered = len(chosen)
            with tqdm(unit="image", delay=1, leave=False, desc="selecting") as bar:
                if args.select_on == "id":
                    chosen = select.select_on_id(opened, chosen, device, bar.update)
                else:
                    opened = select.hold_out(opened, args.select_on)
                    chosen = select.select(opened, chosen, device, bar.update)
            _remark(f"{considered} settings considered; of each method the one chosen on {args.select_on}, without the test sets")
        # With thresholds of one's own the question is always whether they help: plain energy is then scored along.
        along = not thresholds.published and "energy" not in (method.name for method in chosen)
        baseline = [methods.parse(methods.DEFAULT_SCORE)] if along else []
        total = opened.id.images + sum(opened.sets[dataset].images for dataset in opened.ood)
        with tqdm(total=total, unit="image", delay=1, leave=False, desc="scoring") as bar:
            scored = evaluate.score(opened, [*chosen, *baseline], device, "all" in args.methods, bar.update)
        result = evaluate.results(opened, args.benchmark, name, scored, len(baseline))
        result["selected_on"] = args.select_on
        for line in report.warnings(result):
            _remark(line)
        if scored.left_out:
            _remark("left out: " + "; ".join(f"{method} ({reason})" for method, reason in scored.left_out))
        if any(row["published"] for row in result["results"]):
            protocol = {"id": benchmark.id, **benchmark.ood}
            odd = [
                f"{dataset} has {opened.sets[dataset].images:,} images, the published {image_set.images:,}"
                for dataset, image_set in protocol.items()
                if dataset in opened.sets and opened.sets[dataset].images != image_set.images
            ]
            if odd:
                _remark(f"the published numbers are of other image lists, so the differences mean little: {'; '.join(odd)}")
        if args.scores_dir:
            paths = {dataset: activations.metadata["paths"] for dataset, activations in opened.sets.items()}
            report.write_scores(args.scores_dir, result, scored.scores, paths)
        _write(report.FORMATS[args.format](result, args.metrics), args.output)
    except (BadOutput, cache.BadCache, methods.BadMethod) as error:
        return _fail(error, 1)
    except OSError as error:
        return _fail(f"{error.filename or args.cache_dir}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _extraction(args: argparse.Namespace) -> str:
    """The command that makes the cache that these arguments are about."""
    given = [
        ("--benchmark", args.benchmark, "imagenet"),
        ("--cache-dir", str(args.cache_dir), "cache"),
        ("--name", args.name, None),
    ]
    return " ".join(["python get_activation.py", *(f"{key} {value}" for key, value, default in given if value != default)])


def _check_places(args: argparse.Namespace) -> None:
    """Raises BadOutput where results could not be written, before the minutes that they may take."""
    for option, path, check in (("--output", args.output, _check_file), ("--scores-dir", args.scores_dir, _check_folder)):
        try:
            if path is not None:
                check(path)
        except OSError as error:
            raise BadOutput(f"{path}: {error.strerror or error}; give {option} a place that can be written to") from error


def _check_file(path: Path) -> None:
    if path.is_fifo():  # its reader would take this for the end
        return
    there = os.path.lexists(path)
    open(path, "ab").close()
    if not there:
        path.unlink()


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


def _write(text: str, output: Path | None) -> None:
    if output is None:
        try:
            # A file name that is not text can stand in the result; it is shown with escapes.
            sys.stdout.write(text.encode("utf-8", "backslashreplace").decode())
            sys.stdout.flush()
        except OSError as error:
            # What is left in the buffer would fail once more when Python ends, with a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise OSError(error.errno, error.strerror, "standard output") from error
        return
    try:
        output.write_bytes(text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error


def _remark(text: object) -> None:
    print(str(text).encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def _fail(error: object, status: int) -> int:
    _remark(f"eval.py: {error}")
    return status


if __name__ == "__main__":
    sys.exit(main())
