"""An answer in, what stands beside its table out: files of scores, pictures, a page, a detector."""

import dataclasses
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lhact import detector_file, imagenet
from lhact.evaluation.evaluate import Answer, Question, images
from lhact.evaluation.predictions import predict
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


def write_beside(places: Places, answer: Answer, question: Question, view: lines.View) -> None:
    """Writes all that was asked for."""
    result, scored, opened = answer.result, answer.scored, answer.cache
    pictures = _pictures(places, answer)
    if places.scores_dir or places.report:
        with progress_bar("predicting", "image", images(opened)) as bar:
            predictions = predict(opened, scored, question.device, bar.update)
        opened.check_unchanged()
        sets = {name: part.info for name, part in opened.sets.items()}
        if places.scores_dir:
            joined.write_scores(places.scores_dir, result, scored, predictions, sets)
        if places.report:
            image_sets = {"id": question.benchmark.id, **question.benchmark.ood}
            parts = Parts(
                command=places.command,
                metrics=view.metrics,
                remarks=(answer.thresholds, *lines.remarks(result), *answer.remarks),
                sets=sets,
                places={
                    name: thumbnails.locate(places.data_root, image_sets.get(name), sets[name])
                    for name in ("id", *opened.ood)
                },
                predictions=predictions,
                class_names=imagenet.names() if imagenet.is_labelled_by(opened.info) else (),
                pictures=pictures,
            )
            write(page(result, scored, parts), places.report)
    if places.save_detector:
        fitted = scored[0].fitted
        saved = detector_file.of_cache(opened, fitted, scored[0].scores["id"], KEEP)
        detector_file.write(places.save_detector, saved)
        say(f"{fitted.name} saved to {places.save_detector}, for lhact.score and Detector.load")
        if opened.info.network.given_as:
            say("its features came from elsewhere, so a network is compared by its head alone")


def load_plots() -> ModuleType:
    """lhact.reporting.plots. Raises BadOutput where matplotlib cannot be imported."""
    try:
        return importlib.import_module("lhact.reporting.plots")
    except ImportError as error:
        raise BadOutput(
            f"--plots needs matplotlib ({error}); install it with: pip install 'lhact[plots]'"
        ) from error


def _pictures(places: Places, answer: Answer) -> list[tuple[str, bytes]]:
    """Writes every picture to the folder of --plots. (name, SVG) of each for the page; none where
    there is no matplotlib, which the page says."""
    if not (places.plots or places.report):
        return []
    try:
        plots = load_plots()
    except BadOutput:  # for --plots it was loaded before any work was done
        return []
    with progress_bar("reading activations", "image", images(answer.cache)) as bar:
        activity = plots.activity_of(answer, bar.update)
    pictures = []
    with progress_bar("drawing", "picture") as bar:
        for stem, figure in plots.figures(answer.result, answer.scored, activity):
            if places.plots:
                plots.write(places.plots, stem, figure)
            if places.report:
                pictures.append((stem, plots.render(figure, "svg")))
            bar.update(1)
    return pictures
