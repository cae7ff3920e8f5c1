"""An opened cache and a question in, the answer out: thresholds decided, methods fitted and scored,
results with what must be said beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lhact import identify
from lhact.benchmarks.builtin import Benchmark
from lhact.cache import Cache
from lhact.evaluation import reproduce, results, select
from lhact.evaluation.results import Result
from lhact.evaluation.score import MethodScores, fit_methods, score
from lhact.evaluation.uncertainty import Bootstrap
from lhact.messages import progress_bar, say
from lhact.methods.compose import DEFAULT_SCORE, Method, Setting, parse, variants


@dataclass(frozen=True)
class Question:
    """methods: names, with settings and sweeps. select_on: where settings are chosen; see
    select.py. with_energy: score plain energy along in any case, to compare with."""

    benchmark: Benchmark
    methods: tuple[str, ...]
    settings: tuple[Setting, ...] = ()
    sweeps: tuple[tuple[Setting, ...], ...] = ()
    select_on: str | None = None
    bootstrap: Bootstrap | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    with_energy: bool = False


@dataclass(frozen=True)
class Answer:
    """result, and the scores it is of, in the order of its all_methods. cache: of the sets that
    were tested on. thresholds: how they were decided. remarks: what else a reader must know."""

    cache: Cache
    result: Result
    scored: list[MethodScores]
    thresholds: str
    remarks: tuple[str, ...]


def findings(benchmark: Benchmark, opened: Cache) -> list[str]:
    """What speaks against a comparison with published numbers, where there are any."""
    return identify.findings(opened.id, opened.weight, opened.bias) if benchmark.published else []


def find_published(
    benchmark: Benchmark, opened: Cache, device: torch.device
) -> list[reproduce.Closest]:
    """The settings that come closest to the published rows."""
    decided = identify.thresholds(opened)
    say(decided.remark)
    if not identify.is_v1(opened.info.network):
        say(
            "this is not the network of the published rows: the remaining differences are also "
            "the network's"
        )
    for finding in findings(benchmark, opened):
        say(results.not_comparable(finding))
    with progress_bar("searching", "image") as bar:
        found = reproduce.reproduce(opened, device, decided.published, bar.update)
    opened.check_unchanged()
    return found


def evaluate(opened: Cache, name: str, question: Question) -> Answer:
    """The answer for the cache of that name. Raises BadMethod for what it cannot serve, BadCache
    where it is damaged or replaced meanwhile."""
    benchmark, device = question.benchmark, question.device
    decided = identify.thresholds(opened)
    say(decided.remark)
    found = findings(benchmark, opened)
    fitted = fit_methods(
        opened,
        variants(question.methods, question.settings, question.sweeps, decided.published),
        device,
        _say_left_out if "all" in question.methods else None,
    )
    if question.select_on:
        considered = len(fitted)
        selection = select.hold_out(opened, question.select_on)
        with progress_bar("selecting", "image") as bar:
            fitted = select.select(selection, fitted, device, bar.update)
        opened = selection.cache
        say(
            f"{considered} settings considered; of each method the one chosen on "
            f"{question.select_on}, without the test sets"
        )
    # With thresholds of one's own the question is always whether they help: plain energy is then
    # scored along.
    asked = len(fitted)
    wanted = question.with_energy or not decided.published
    if wanted and DEFAULT_SCORE not in (method.name for method in fitted):
        fitted += fit_methods(opened, [parse(DEFAULT_SCORE)], device)
    with progress_bar("scoring", "image", images(opened)) as bar:
        scored = score(opened, fitted, device, bar.update)
    perturbed = any(method.perturbed for method in fitted)
    about = results.About(
        benchmark=benchmark.name,
        name=name,
        info=opened.info,
        findings=tuple(found),
        comparable=benchmark.published and identify.is_v1(opened.info.network),
        perturbation=opened.perturbed("id").info.perturbation if perturbed else None,
        groups=benchmark.groups,
        selected_on=question.select_on,
    )
    resamples = question.bootstrap.resamples if question.bootstrap else None
    baseline = scored[asked] if len(fitted) > asked else None
    with progress_bar("resampling", "resample", resamples) as bar:
        result = results.summarise(about, scored[:asked], baseline, question.bootstrap, bar.update)
    opened.check_unchanged()
    remarks = [*_other_lists(opened, result, benchmark), *filter(None, [benchmark.remark])]
    return Answer(opened, result, scored, decided.remark, tuple(remarks))


def images(opened: Cache) -> int:
    """How many images are tested on."""
    return opened.id.images + sum(opened.sets[name].images for name in opened.ood)


def _say_left_out(method: Method, error: Exception) -> None:
    say(f"left out: {method.name} ({error})")


def _other_lists(opened: Cache, result: Result, benchmark: Benchmark) -> Sequence[str]:
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
