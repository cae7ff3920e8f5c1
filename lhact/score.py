"""Image files and a saved detector in; for each image its class, score and verdict out.

    python -m lhact.score photo.jpg folder/ --model detector.safetensors
    find . -name '*.jpg' | python -m lhact.score --model detector.safetensors --json

The detector is one of `eval.py --save-detector` or `Detector.save`. An image that cannot be read
gets its line, and the others go on. Exit status: 0, 1 if an image or the detector could not be
read, 2 if the command line is not right.
"""

import argparse
import ast
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from lhact import command, detector_file, options
from lhact.detector import Detector
from lhact.detector_file import SavedDetector
from lhact.devices import pick_device
from lhact.extraction import networks
from lhact.extraction.extract import normaliser
from lhact.extraction.images import BadImages, is_hidden, is_image, load
from lhact.extraction.networks import BadNetwork, NetworkSpec
from lhact.files import naming
from lhact.messages import InputError, encodable, shown
from lhact.records import GIVEN, Preprocessing

PROGRAM = "lhact.score"
IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class Job:
    """What lhact.score is asked for. places: files and folders, none: those of standard input. The
    network is the one that the detector was fitted on but for what is given here."""

    places: tuple[str, ...]
    model: Path
    arch: str | None
    weights: str | None
    checkpoint: Path | None
    device: torch.device
    as_json: bool


@dataclass(frozen=True)
class Verdict:
    """One image: its predicted class, its score less the threshold, or why it cannot be read."""

    path: str
    error: str | None = None
    number: int = -1
    name: str | None = None
    score: float = 0.0
    threshold: float = 0.0

    @property
    def word(self) -> str:
        return "ID" if self.score > self.threshold else "OOD"

    def as_text(self) -> str:
        if self.error is not None:
            return f"{shown(self.path)}  unreadable: {self.error}"
        return (
            f"{shown(self.path)}  {self.word}  score {self.score:.4f} "
            f"({self.score - self.threshold:+.4f} from the threshold)  class {self.number}"
            + (f" {shown(self.name)}" if self.name else "")
        )

    def as_json(self) -> str:
        if self.error is not None:
            return json.dumps({"path": self.path, "error": self.error})
        return json.dumps(
            {
                "path": self.path,
                "class": self.number,
                "class_name": self.name,
                "score": self.score,
                "threshold": self.threshold,
                "distance": self.score - self.threshold,
                "verdict": self.word,
            }
        )


def judge(detector: Detector, places: Iterable[str]) -> Iterator[Verdict]:
    """A verdict for each image in those files and folders, in order, and for each folder without.
    Raises ValueError where the detector does not know how images are prepared."""
    preprocessing = detector.preprocessing
    if not isinstance(preprocessing, Preprocessing):
        raise ValueError(
            "the detector does not say how images are prepared; save one with eval.py "
            "--save-detector, or set its preprocessing to lhact.Preprocessing(...) and save it"
        )
    device = detector.device
    normalise = normaliser(preprocessing, device)
    images = _images(places, preprocessing)
    while batch := list(islice(images, IMAGES_AT_ONCE)):
        pixels = [content for _, content in batch if not isinstance(content, str)]
        results: Iterator[tuple[int, float]] = iter(())
        if pixels:
            logits, scores = detector(normalise(torch.from_numpy(np.stack(pixels)).to(device)))
            results = zip(logits.argmax(dim=1).tolist(), scores.tolist(), strict=True)
        for path, content in batch:
            if isinstance(content, str):
                yield Verdict(path, content)
                continue
            number, score = next(results)
            name = detector.class_names[number] if detector.class_names else None
            yield Verdict(path, None, number, name, score, detector.offset_)


def _images(
    places: Iterable[str], preprocessing: Preprocessing
) -> Iterator[tuple[str, np.ndarray | str]]:
    """(path, pixels), or (path, why it cannot be read)."""
    for place in places:
        # isdir does not raise for a name that is too long
        for path, error in _images_below(place) if os.path.isdir(place) else [(place, None)]:
            try:
                yield path, error or load(path, preprocessing)
            except BadImages as reason:
                yield path, str(reason)


def _images_below(folder: str) -> list[tuple[str, str | None]]:
    """(path, None) for each image, as extraction finds them; (path, why) for a folder that holds
    none or cannot be listed."""
    found: list[tuple[str, str | None]] = []

    def failed(error: OSError) -> None:
        found.append((str(error.filename), f"cannot be listed: {error.strerror}"))

    for place, folders, files in os.walk(folder, onerror=failed, followlinks=True):
        above = [
            path for path in (Path(place), *Path(place).parents) if path.is_relative_to(folder)
        ]
        # A link back to a folder that holds it would be followed without end.
        seen = {os.path.realpath(path) for path in above}
        folders[:] = [
            name
            for name in folders
            if not is_hidden(name) and os.path.realpath(os.path.join(place, name)) not in seen
        ]
        found += [(os.path.join(place, name), None) for name in files if is_image(name)]
    return sorted(found, key=lambda item: item[0]) or [
        (folder, "it holds no images, such as .jpg or .png")
    ]


def network_spec(job: Job, saved: SavedDetector) -> NetworkSpec:
    """The network of the job; what it does not say is as the detector was fitted on. Raises
    BadNetwork where that is not enough."""
    known = saved.network
    settings = dict(known.settings or {})
    settings.pop(GIVEN, None)
    head = settings.pop("head", None)
    try:
        arguments = {key: ast.literal_eval(value) for key, value in settings.items()}
    except (ValueError, SyntaxError) as error:
        raise BadNetwork(
            f"the detector's network was built with {settings}, which no file can give back; build "
            "it in a program of your own, for Detector.load"
        ) from error
    arch = job.arch or known.arch
    weights = job.weights
    if not weights and not job.checkpoint:
        weights = known.weights
        if weights is None and ":" not in (arch or ""):
            raise BadNetwork(
                f"the detector was fitted on {arch or 'a network'} with the weights in "
                f"{known.checkpoint or 'a file'}; give it with --checkpoint FILE, or --weights NAME"
            )
    if arch is None:
        raise BadNetwork("the detector does not know its network by name; give --arch")
    return NetworkSpec(arch, weights, job.checkpoint, arguments, head)


def parse_job(argv: Sequence[str] | None) -> Job:
    """The job of the command line. Raises ValueError for a device that cannot be used."""
    description = "Says of each image whether it is out of distribution."
    parser = argparse.ArgumentParser(f"python -m {PROGRAM}", None, description, allow_abbrev=False)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE|FOLDER", help="none: paths from standard input")
    add("--model", type=options.path, required=True, metavar="FILE", help="the saved detector")
    add("--arch", help="of its network, where the detector does not say it")
    add("--weights", help="published weights by name")
    add("--checkpoint", type=options.path, metavar="FILE", help="the state dict it was fitted on")
    add("--device", default="cpu", help="auto, cuda, cuda:N or cpu; default: cpu")
    add("--json", action="store_true", help="a JSON object a line")
    args = parser.parse_args(argv)
    network = (args.arch, args.weights, args.checkpoint)
    return Job(tuple(args.images), args.model, *network, pick_device(args.device), args.json)


def run(job: Job) -> int:
    """Prints a line for each image; the exit status. Raises ValueError where the detector or its
    network cannot be used, OSError where standard output cannot be written to."""
    if sys.stdout is None or (sys.stdin is None and not job.places):
        raise InputError("standard output or input is closed; give it a place")
    saved = detector_file.read(job.model)
    network = networks.load(network_spec(job, saved), saved.shape and saved.shape[-1])
    detector = Detector.load(job.model, network).to(job.device)
    places = job.places or (line.rstrip("\r\n") for line in sys.stdin)
    status = 0
    for verdict in judge(detector, filter(None, places)):
        line = verdict.as_json() if job.as_json else verdict.as_text()
        with naming("standard output"):
            print(encodable(line, sys.stdout.encoding), flush=True)
        status = 1 if verdict.error is not None else status
    return status


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(PROGRAM, lambda: parse_job(argv), run)


if __name__ == "__main__":
    sys.exit(main())
