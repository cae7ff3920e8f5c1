"""An answer in, what stands beside its table out: files of scores, pictures, a page, a detector."""

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lhact import detector_file, imagenet
from lhact.benchmarks.builtin import Benchmark
from lhact.evaluation.activity import measure
from lhact.evaluation.evaluate import Answer, images
from lhact.evaluation.predictions import Predictions, predict
from lhact.messages import progress_bar, say
from lhact.reporting import joined, lines, thumbnails
from lhact.reporting.output import BadOutput, write
from lhact.reporting.page import Parts, page

KEEP = 0.95  # the share of ID images that a saved detector lets pass, as FPR95 does


@dataclass(frozen=True)
class Places:
    """Where it goes; None where it was not asked for. data_root: where the images lie, for the
    page; command: the one that was given."""

    scores_dir: Path | None
    plots: Path | None
    report: Path | None
    save_detector: Path | None
    data_root: Path
    command: str

    @property
    def files(self) -> dict[str, Path | None]:
        return {"--report": self.report, "--save-detector": self.save_detector}

    @property
    def folders(self) -> dict[str, Path | None]:
        return {"--scores-dir": self.scores_dir, "--plots": self.plots}

    def of(self, name: str) -> "Places":
        """Folders of its own for one of several networks."""
        return dataclasses.replace(
            self,
            scores_dir=self.scores_dir and self.scores_dir / name,
            plots=self.plots and self.plots / name,
        )


def write_beside(
    places: Places,
    answer: Answer,
    benchmark: Benchmark,
    view: lines.View,
    device: torch.device,
) -> None:
    """Writes all that was asked for."""
    result, scored, opened = answer.result, answer.scored, answer.cache
    if places.plots:
        plots = load_plots()
        for stem, figure in _figures(plots, answer, device):
            plots.write(places.plots, stem, figure)
    if places.scores_dir or places.report:
        with progress_bar("predicting", "image", images(opened)) as bar:
            predictions = predict(opened, scored, device, bar.update)
        opened.check_unchanged()
        sets = {name: part.info for name, part in opened.sets.items()}
        if places.scores_dir:
            joined.write_scores(places.scores_dir, result, scored, predictions, sets)
        if places.report:
            parts = _parts(places, answer, benchmark, view, predictions)
            parts = dataclasses.replace(parts, pictures=_pictures(answer, device))
            write(page(result, scored, parts), places.report)
    if places.save_detector:
        fitted = scored[0].fitted
        saved = detector_file.of_cache(opened, fitted, scored[0].scores["id"], KEEP)
        detector_file.write(places.save_detector, saved)
        say(f"{fitted.name} saved to {places.save_detector}, for lhact.score and Detector.load")


def load_plots() -> ModuleType:
    """lhact.reporting.plots. Raises BadOutput where matplotlib cannot be imported."""
    try:
        return importlib.import_module("lhact.reporting.plots")
    except ImportError as error:
        raise BadOutput(
            f"--plots needs matplotlib ({error}); install it with: pip install 'lhact[plots]'"
        ) from error


def _figures(plots: ModuleType, answer: Answer, device: torch.device) -> Iterator[tuple[str, Any]]:
    """(name, figure) of every picture."""
    result, scored, opened = answer.result, answer.scored, answer.cache
    drawn = [scored[number].fitted for number in plots.pictured(result)]
    with progress_bar("reading activations", "image", images(opened)) as bar:
        activity = measure(opened, drawn, device, bar.update)
    with progress_bar("drawing", "picture") as bar:
        for stem, figure in plots.figures(result, scored, activity):
            yield stem, figure
            bar.update(1)


def _pictures(answer: Answer, device: torch.device) -> Sequence[tuple[str, bytes]]:
    """(name, SVG) of every picture for the page; none where there is no matplotlib, which the page
    says."""
    try:
        plots = load_plots()
    except BadOutput:
        return ()
    figures = _figures(plots, answer, device)
    return [(stem, plots.render(figure, "svg")) for stem, figure in figures]


def _parts(
    places: Places,
    answer: Answer,
    benchmark: Benchmark,
    view: lines.View,
    predictions: Predictions,
) -> Parts:
    """What the page shows beside the result, but for pictures."""
    known, opened = {"id": benchmark.id, **benchmark.ood}, answer.cache
    return Parts(
        command=places.command,
        metrics=view.metrics,
        remarks=(answer.thresholds, *lines.remarks(answer.result), *answer.remarks),
        sets={name: part.info for name, part in opened.sets.items()},
        places={
            name: thumbnails.locate(places.data_root, known.get(name), opened.sets[name].info)
            for name in ("id", *opened.ood)
        },
        predictions=predictions,
        class_names=imagenet.names() if imagenet.is_labelled_by(opened.info) else (),
        pictures=(),
    )
