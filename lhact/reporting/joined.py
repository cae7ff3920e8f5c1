"""Scores and predictions in, one CSV file per method and image set out, to be joined by path."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lhact.evaluation.predictions import Predictions
from lhact.evaluation.results import Result
from lhact.evaluation.score import MethodScores
from lhact.records import SetInfo
from lhact.reporting.lines import labels
from lhact.reporting.text import csv_text


def write_scores(
    folder: Path,
    result: Result,
    scored: Sequence[MethodScores],
    predictions: Predictions,
    sets: Mapping[str, SetInfo],
) -> None:
    """<folder>/<method>/<dataset>.csv with a line per image, in the order of the cache.

    scored: for each method in the order of the result. sets: by name, for paths and labels; a label
    that is not known is empty. The columns behind `score` are those of Predictions.
    """
    rectified = predictions.rectified_energy
    for label, method, energies in zip(labels(result), scored, rectified, strict=True):
        place = folder / label.replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        for dataset, values in method.scores.items():
            info = sets[dataset]
            columns: dict[str, Iterable[object]] = {
                "path": map(csv_text, info.paths),
                "score": _nine_digits(values),
                "predicted_class": predictions.classes[dataset].tolist(),
                "probability": _nine_digits(predictions.probability[dataset]),
                "label": info.labels or [""] * info.images,
                "rectified_energy": _nine_digits(energies[dataset]),
                "energy": _nine_digits(predictions.energy[dataset]),
            }
            path, bytes_kept = place / f"{dataset}.csv", "surrogateescape"
            with open(path, "w", newline="", encoding="utf-8", errors=bytes_kept) as file:
                # Every path in quotes: a name may hold any character.
                writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))


def _nine_digits(values: np.ndarray) -> list[float]:
    """Nine significant digits give a float32 back exactly."""
    return [float(f"{value:.9g}") for value in values.tolist()]
