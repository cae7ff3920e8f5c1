"""A trained classifier in, a detector out that says of each image whether it is out of
distribution: any method of eval.py, live on the network.

    detector = Detector(network, "lhact").fit(id_images)
    logits, scores = detector(images)
    verdicts = detector.predict(images)              # +1 in-distribution, -1 out-of-distribution

Conventions are those of scikit-learn's outlier detectors: a higher score means more
in-distribution, `decision_function` is the score less `offset_`, and `predict` gives +1 and -1.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lhact import cache, detector_file, identify
from lhact.detector_file import BadDetector, SavedDetector, difference, digest
from lhact.detector_inputs import (
    batches_of,
    check_eval_mode,
    check_images,
    check_keep,
    checked_features,
    checked_labels,
    images_and_labels,
    named_errors,
    one_method,
    parts_of,
)
from lhact.evaluation.metrics import threshold_keeping
from lhact.evaluation.score import fit_methods, score
from lhact.extraction.extract import odin_perturb
from lhact.extraction.networks import Network
from lhact.methods.compose import BadMethod, Method
from lhact.methods.fit import Calibration, Head, fit, needs_labels
from lhact.methods.module import MethodModule, module_of
from lhact.published import ODIN_PERTURBATION
from lhact.records import RecordedPreprocessing

CPU = torch.device("cpu")
# Parts of the calibration images that are scored by what the others teach, for the threshold.
FOLDS = 5
KEEP = 0.95


class Detector(nn.Module):
    """A classifier with a method that scores its images; the classifier stays as it is.

    network: any torch classifier in evaluation mode that ends in a linear layer, or what
        `lhact.load_network` gives. Its parameters are shared, not copied; a
        DataParallel around it is left out.
    method: a name of eval.py's --methods, such as `lhact`, `knn` or `react+vim`.
    head: the name of the linear layer that makes the logits, where it is not the one found.
    settings: parameters other than the defaults: {"lhact.order": 3, "react.high_percentile": 95}.
    input_size: of the images on which the head is looked for and checked, pixels a side or
        (channels, height, width).

    `fit`, `fit_features`, `from_cache` and `load` give it thresholds and statistics. Then `offset_`
    is the decision threshold and `parameters` are the values used. Raises ValueError: BadNetwork
    where the head cannot be found, BadMethod for names and settings.

    It is an nn.Module: `detector(images)` returns the network's logits (images, classes) and the
    scores (images,) of one forward pass (ODIN takes a backward pass and two more forward), both
    float32 and without gradients; the method is computed in float32 also under autocast. Its state
    dict is the network's weights alone; what `fit` learnt is kept by `save`.
    """

    head: nn.Linear

    def __init__(
        self,
        network: nn.Module | Network,
        method: str = "lhact",
        head: str | None = None,
        settings: Mapping[str, float] | None = None,
        input_size: int | tuple[int, int, int] = 224,
    ) -> None:
        super().__init__()
        self.method = one_method(method, settings, published=False)
        self._settings = dict(settings or {})
        self._came_fitted = False
        self.preprocessing: RecordedPreprocessing | None = None
        self.class_names: tuple[str, ...] | None = None
        self.shape: tuple[int, int, int] | None = None
        self.body, self.head, self.info = parts_of(network, head, input_size)
        if isinstance(network, Network):
            self.preprocessing = network.preprocessing
        self.perturbation = ODIN_PERTURBATION
        self.scoring: MethodModule | None = None
        self._threshold = math.nan
        self.keep = KEEP
        self._digests: Mapping[str, str] = {}
        self.training = False

    # ---- what is learnt ----

    def fit(
        self,
        images: Iterable[Any],
        held_out: Iterable[Any] | None = None,
        keep: float = KEEP,
    ) -> "Detector":
        """Learns thresholds and statistics from ID images, read once.

        images: batches as a DataLoader gives them: (n, channels, height, width), prepared as the
            network takes them, alone or with (n,) class numbers behind, which are looked at where
            the method needs them. held_out: further ID images, for the decision threshold alone.
            keep: share of ID images that shall count as ID. The activations are held in memory,
            8 KB for each image of a ResNet-50.

        See `fit_features` for the threshold. Raises ValueError for an empty loader, for images of
        several sizes, and where the method needs labels and they do not come with all images.
        """
        self._check_may_learn(keep)
        read = self._read(images, None, needs_labels(self.method))
        others = None if held_out is None else self._read(held_out, read.shape, False).scored
        self._learn(read, others, keep)
        self.shape = read.shape
        return self

    def fit_features(
        self,
        activations: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | None = None,
        held_out: Tensor | np.ndarray | None = None,
        keep: float = KEEP,
    ) -> "Detector":
        """Learns from the penultimate activations (n, channels) of ID images; labels (n,): their
        class numbers.

        The decision threshold is the score above which `keep` of the ID images lie: of `held_out`
        (m, channels), where given. Else of these same images; where the method learns more of them
        than thresholds, each is scored by what the other four fifths teach, since a method knows
        its own images too well. Published constants are used where the network is the published
        one, see README. Raises ValueError where the method needs labels and none come.
        """
        self._check_may_learn(keep)
        if self.method.perturbed:
            raise BadMethod(f"{self.method.name} scores perturbed images; give images to fit")
        channels = self.head.weight.shape[1]
        rows = checked_features(activations, channels)
        labelled = needs_labels(self.method)
        numbers = self._class_numbers(labels, len(rows)) if labelled else None
        others = None if held_out is None else checked_features(held_out, channels)
        return self._learn(_Read(rows, rows, numbers, None), others, keep)

    def _check_may_learn(self, keep: float) -> None:
        check_keep(keep)
        if self._came_fitted:
            raise ValueError("this detector came fitted; make a new one to fit it")

    def _learn(self, read: "_Read", held_out: Tensor | None, keep: float) -> "Detector":
        """held_out: activations of the images that the threshold is of, where not those read."""
        own = self._head()
        head = Head(own.weight.cpu(), own.bias.cpu())
        source = f"calibration activations ({len(read.plain)} images)"
        decided = identify.thresholds_of(self.info, [read.plain], source)
        method = one_method(self.method.name, self._settings, decided.published)
        learnt = any(step.entry.fit is not None for step in method.steps)
        with torch.autocast("cpu", enabled=False):
            fitted = fit(method, Calibration([read.plain], read.labels), head)
            if held_out is None and learnt:
                scores = _cross_fitted(method, read, head)
            else:
                scores = fitted(read.scored if held_out is None else held_out)
        self.method = method
        self._install(module_of(fitted), threshold_keeping(scores.numpy(), keep), keep)
        return self

    def _install(self, scoring: MethodModule, threshold: float, keep: float) -> None:
        self.scoring = scoring.to(self.device)
        self._threshold, self.keep = threshold, keep
        self._digests = self._digests_now()  # the network may be trained on before it is saved

    def _read(
        self, loader: Iterable[Any], shape: tuple[int, int, int] | None, labelled: bool
    ) -> "_Read":
        """Runs the network over all images of a loader; all have that shape, or that of the
        first."""
        check_eval_mode(self.body)
        plain, scored, labels = [], [], []
        for batch in batches_of(loader):
            images, label = images_and_labels(batch)
            self.check(images, shape)
            shape = shape or (images.shape[1], images.shape[2], images.shape[3])
            if not len(images):
                continue
            with torch.no_grad(), named_errors(images):
                images = images.to(self.device)
                plain.append(self.body(images).float().cpu())
                if self.method.perturbed:
                    scored.append(self.body(self._perturbed(images)).float().cpu())
            if labelled:
                labels.append(self._class_numbers(label, len(images)))
        if not plain:
            raise ValueError("the loader is empty; give batches of ID images")
        rows = checked_features(torch.cat(plain), self.head.weight.shape[1])
        numbers = torch.cat(labels) if labels else None
        return _Read(rows, torch.cat(scored) if scored else rows, numbers, shape)

    def _class_numbers(self, labels: Any, images: int) -> Tensor:
        """Raises ValueError where they are not there or not one for each image."""
        if labels is None:
            raise BadMethod(
                f"{self.method.name}: needs labels; give the class numbers with all ID images, in "
                "batches (images, labels) or as labels="
            )
        return checked_labels(labels, images, len(self.head.weight))

    def _perturbed(self, images: Tensor) -> Tensor:
        head = self._head()
        with torch.inference_mode(False):
            images = images.clone()  # made by inference_mode, it could not have a gradient
            return odin_perturb(self.body, (head.weight, head.bias), images, self.perturbation)

    # ---- what it says ----

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scoring, head = self.fitted(), self._head()
        activations = self.body(images)
        others = self.body(self._perturbed(images)) if self.method.perturbed else None
        with torch.autocast(images.device.type, enabled=False):
            logits, scores = scoring(activations.float(), head)
            if others is not None:
                scores = scoring(others.float(), head)[1]
        return logits, scores

    def score_samples(self, images: Tensor) -> Tensor:
        """(n,) float32 scores of images (n, channels, height, width), higher = ID.

        Raises ValueError before `fit`, and for images of another size, type or range than the
        network takes: `fit` has seen the size; values beyond 25 are pixels that were not
        normalised.
        """
        self.fitted()
        self.check(images, self.shape)
        with named_errors(images):
            scores: Tensor = self(images.to(self.device))[1]
        return scores

    def decision_function(self, images: Tensor) -> Tensor:
        """(n,) scores less `offset_`: positive for in-distribution images. Raises as
        `score_samples`."""
        return self.score_samples(images) - self.offset_

    def predict(self, images: Tensor) -> Tensor:
        """(n,) +1 for in-distribution images, those that score above `offset_`, -1 for the others.
        Raises as `score_samples`."""
        return torch.where(self.score_samples(images) > self.offset_, 1, -1)

    @property
    def offset_(self) -> float:
        """The decision threshold: `keep` of the ID images score above it."""
        self.fitted()
        return self._threshold

    @property
    def parameters_used(self) -> dict[str, float]:
        """The method's parameters, a percentile with the threshold that it gave."""
        return dict(self.fitted().parameters_used)

    def extra_repr(self) -> str:
        if self.scoring is None:
            return f"method={self.method.name!r}, not fitted"
        values = ", ".join(f"{key}={value:.6g}" for key, value in self.parameters_used.items())
        return f"method={self.method.name!r}, {values}, offset_={self.offset_:.6g}"

    # ---- from and to files ----

    @classmethod
    def from_cache(
        cls,
        folder: str | Path,
        network: nn.Module | Network,
        method: str = "lhact",
        settings: Mapping[str, float] | None = None,
        keep: float = KEEP,
        input_size: int | tuple[int, int, int] | None = None,
    ) -> "Detector":
        """The method as eval.py fits it to this cache, and the threshold of its ID set: what the
        table measured is what runs. input_size: of images, where the cache does not say it.

        Raises ValueError where the network is not the cache's. Of a cache of features from
        elsewhere only the head is known, so the layers below it are taken on trust.
        """
        check_keep(keep)
        opened = cache.open_cache(Path(folder))
        published = identify.thresholds(opened).published
        fitted = fit_methods(opened, [one_method(method, settings, published)], CPU)
        (scored,) = score(opened, fitted, CPU, datasets=["id"])
        saved = detector_file.of_cache(opened, fitted[0], scored.scores["id"], keep)
        return cls._from_saved(saved, network, f"the cache {folder}", input_size)

    def save(self, path: str | Path) -> None:
        """The detector without its network, as one safetensors file; see detector_file.py."""
        saved = SavedDetector(
            self.fitted(),
            self.offset_,
            self.keep,
            self.info,
            self._digests,
            self.shape,
            self.preprocessing,
            self.class_names,
            self.perturbation,
        )
        detector_file.write(Path(path), saved)

    @classmethod
    def load(
        cls,
        path: str | Path,
        network: nn.Module | Network,
        input_size: int | tuple[int, int, int] | None = None,
    ) -> "Detector":
        """The detector that `save` or `eval.py --save-detector` wrote, on its network; input_size:
        of images, where the file does not say it. Raises BadDetector, a ValueError, for any other
        file, and where the network's weights are not those it was fitted on."""
        return cls._from_saved(detector_file.read(Path(path)), network, str(path), input_size)

    @classmethod
    def _from_saved(
        cls,
        saved: SavedDetector,
        network: nn.Module | Network,
        origin: str,
        input_size: int | tuple[int, int, int] | None,
    ) -> "Detector":
        named = None if isinstance(network, Network) else saved.network.settings
        head = (named or {}).get("head")
        size = input_size or saved.shape or 224
        detector = cls(network, saved.method.name, head, None, size)
        detector._install(saved.method, saved.threshold, saved.keep)
        if different := difference(saved, detector.info, detector._digests):
            raise BadDetector(
                f"the network is not the one of {origin}: {different}; give the network with the "
                "weights that the detector was fitted on"
            )
        detector._came_fitted = True
        detector.info, detector.shape = saved.network, saved.shape
        detector.preprocessing, detector.class_names = saved.preprocessing, saved.class_names
        detector.perturbation = saved.perturbation
        return detector

    def export(self, path: str | Path, images: Tensor | None = None) -> None:
        """Writes an ONNX file (`.onnx`) or a torch.export program (`.pt2`) with the outputs logits,
        score and decision, for any number of images; see export.py. images: an example, zeros of
        the known shape where none is given.

        Raises ValueError for a detector that is not fitted, for ODIN, which needs gradients, for a
        bank of more than 256 MiB, for another suffix, and for a network that torch cannot export.
        """
        from lhact import export

        size = sum(buffer.nbytes for buffer in self.fitted().buffers())
        if self.method.perturbed:
            name = self.method.name
            raise ValueError(f"{name} needs gradients of the network, which no file holds")
        if size > export.MOST_BYTES:
            raise ValueError(
                f"{self.method.name} holds {size >> 20:,} MiB of calibration images, more than "
                f"{export.MOST_BYTES >> 20} MiB; fit it to fewer, or take another method"
            )
        if images is None and self.shape is None:
            raise ValueError("the shape of an image is not known; give images, an example of two")
        if images is None:
            images = torch.zeros(2, *self.shape, dtype=self.input_dtype)  # type: ignore[misc]
        self.check(images, self.shape)
        if not len(images):
            raise ValueError("images must hold at least one example, got none")
        export.write(self, self.offset_, images.to(self.device), Path(path))

    def _digests_now(self) -> dict[str, str]:
        head = self._head()
        tensors = {**self.body.state_dict(), "head.weight": head.weight, "head.bias": head.bias}
        return {name: digest(tensor) for name, tensor in tensors.items()}

    # ---- what all of it stands on ----

    def fitted(self) -> MethodModule:
        """What scores the activations. Raises ValueError before `fit`, and where the network is in
        training mode."""
        if self.scoring is None:
            raise ValueError("the detector knows no threshold yet; call fit with ID images first")
        if not torch.compiler.is_compiling():
            check_eval_mode(self.body)
        return self.scoring

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def _head(self) -> Head:
        """The linear head in float32, without gradients."""
        weight = self.head.weight.detach().float()
        own: Tensor | None = self.head.bias
        return Head(weight, torch.zeros_like(weight[:, 0]) if own is None else own.detach().float())

    def check(self, images: Any, shape: tuple[int, int, int] | None) -> None:
        """Raises ValueError for images that the network cannot have been made for."""
        casts = torch.is_autocast_enabled(self.device.type)
        check_images(images, shape, None if casts else self.input_dtype)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The type of the images that the network takes; None where its weights do not tell."""
        first = next(self.body.parameters(), self.head.weight)
        return first.dtype if first.is_floating_point() else None


@dataclass(frozen=True)
class _Read:
    """What the network makes of ID images: plain (n, channels) activations; scored: those of the
    images that are scored, which ODIN perturbs; labels (n,), None where there are none; shape: of
    an image."""

    plain: Tensor
    scored: Tensor
    labels: Tensor | None
    shape: tuple[int, int, int] | None


def _cross_fitted(method: Method, read: _Read, head: Head) -> Tensor:
    """Scores of all images, those of each part by the method fitted to the other parts."""
    count = len(read.plain)
    part = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % FOLDS
    scores = torch.empty(count)
    for number in range(FOLDS):
        inside, rest = part == number, part != number
        labels = None if read.labels is None else read.labels[rest]
        try:
            fitted = fit(method, Calibration([read.plain[rest]], labels), head)
        except (ValueError, RuntimeError) as error:
            raise BadMethod(
                f"{error}, with {int(rest.sum())} of the {count} images, which the threshold of "
                "the others needs; give more images, or some of them as held_out"
            ) from error
        scores[inside] = fitted(read.scored[inside])
    return scores
