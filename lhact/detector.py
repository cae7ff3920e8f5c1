"""A trained classifier in, a detector out that says of each image whether it is out of
distribution: any method of eval.py, live on the network.

    detector = Detector(network, "lhact").fit(id_images)
    logits, scores = detector(images)
    verdicts = detector.predict(images)              # +1 in-distribution, -1 out-of-distribution

Conventions are those of scikit-learn's outlier detectors: a higher score means more
in-distribution, `decision_function` is the score less `offset_`, and `predict` gives +1 and -1.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lhact import cache, detector_file, identify
from lhact.detector_file import BadDetector, SavedDetector, digest
from lhact.detector_inputs import (
    check_images,
    checked_features,
    checked_labels,
    images_and_labels,
)
from lhact.evaluation.metrics import threshold_keeping
from lhact.evaluation.score import fit_methods, score
from lhact.extraction.extract import odin_perturb
from lhact.extraction.head import Parts, split
from lhact.extraction.networks import Network, is_resnet50
from lhact.extraction.weights import BadNetwork, state_dict_sha256
from lhact.methods.compose import BadMethod, Method, Setting, parse_setting, variants
from lhact.methods.fit import Calibration, Head, fit
from lhact.methods.module import MethodModule, content_of
from lhact.published import ODIN_PERTURBATION
from lhact.records import NetworkInfo, RecordedPreprocessing

CPU = torch.device("cpu")
NOT_IN_EVAL_MODE = "the network is in training mode, where it gives other scores; call its eval()"
# Parts of the calibration images that are scored by what the others teach, for the threshold.
FOLDS = 5
KEEP = 0.95


class Detector(nn.Module):
    """A classifier with a method that scores its images; the classifier stays as it is.

    network: any torch classifier in evaluation mode that ends in a linear layer, or what
        `lhact.load_network` gives. Its parameters are shared, not copied.
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
    offset: Tensor

    def __init__(
        self,
        network: nn.Module | Network,
        method: str = "lhact",
        head: str | None = None,
        settings: Mapping[str, float] | None = None,
        input_size: int | tuple[int, int, int] = 224,
    ) -> None:
        super().__init__()
        given = [parse_setting(f"{key}={value}") for key, value in (settings or {}).items()]
        self.method, *others = variants([method], given, [], published=False)
        if others:
            raise BadMethod(f"a detector has one method, got {method!r}, which stands for several")
        self._settings: list[Setting] | None = given
        self.preprocessing: RecordedPreprocessing | None = None
        self.class_names: tuple[str, ...] | None = None
        self.shape: tuple[int, int, int] | None = None
        if isinstance(network, Network):
            self.body, self.info = network.body, network.info
            self.head = _linear(network.weight, network.bias)
            self.preprocessing = network.preprocessing
        else:
            size = (3, input_size, input_size) if isinstance(input_size, int) else input_size
            parts, self.info = _split(network, head, size)
            self.body, self.head = parts.body, parts.head
        self.perturbation = ODIN_PERTURBATION
        self.scoring: MethodModule | None = None
        self.keep = KEEP
        self.register_buffer("offset", torch.tensor(float("nan")), persistent=False)
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
            network takes them, alone or with (n,) class numbers behind. held_out: further ID
            images, for the decision threshold alone. keep: share of ID images that shall count as
            ID. The activations are held in memory, 8 KB for each image of a ResNet-50.

        See `fit_features` for the threshold. Raises ValueError for an empty loader, for images of
        several sizes, and where the method needs labels and none come.
        """
        read = self._read(images, None)
        judged = read if held_out is None else self._read(held_out, read.shape)
        self._learn(read, judged.scored, judged is not read, keep)
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
        if self.method.score.entry.perturbed:  # type: ignore[union-attr]
            raise BadMethod(f"{self.method.name} scores perturbed images; give images to fit")
        classes, channels = self.head.weight.shape
        rows = checked_features(activations, channels)
        numbers = None if labels is None else checked_labels(labels, len(rows), classes)
        read = _Read(rows, rows, numbers, None)
        judged = rows if held_out is None else checked_features(held_out, channels)
        return self._learn(read, judged, held_out is not None, keep)

    def _learn(self, read: "_Read", judged: Tensor, is_held_out: bool, keep: float) -> "Detector":
        """judged: activations of the images that the threshold is of."""
        if self._settings is None:
            raise ValueError("this detector came fitted; make a new one to fit it")
        head = self._head("cpu")
        source = f"calibration activations ({len(read.plain)} images)"
        decided = identify.thresholds_of(self.info, [read.plain], source)
        method = variants([self.method.name], self._settings, [], decided.published)[0]
        learnt = any(step.entry.fit is not None for step in method.steps)
        knows_them = learnt and not is_held_out
        with torch.autocast("cpu", enabled=False):
            fitted = fit(method, Calibration([read.plain], read.labels), head)
            scores = _cross_fitted(method, read, head) if knows_them else fitted(judged)
        threshold = threshold_keeping(scores.numpy(), keep)
        self.method = method
        self._install(MethodModule(content_of(fitted)), threshold, keep)
        return self

    def _install(self, scoring: MethodModule, threshold: float, keep: float) -> None:
        device = self.head.weight.device
        self.scoring = scoring.to(device)
        self.offset = torch.tensor(threshold, device=device)
        self.keep = keep

    def _read(self, loader: Iterable[Any], shape: tuple[int, int, int] | None) -> "_Read":
        """Runs the network over all images of a loader; all have that shape, or that of the
        first."""
        perturbed = getattr(self.method.score.entry, "perturbed", False)
        plain, scored, labels = [], [], []
        for batch in [loader] if isinstance(loader, Tensor) else loader:
            images, label = images_and_labels(batch)
            self._check(images, shape)
            shape = shape or (images.shape[1], images.shape[2], images.shape[3])
            with torch.no_grad():
                images = images.to(self.head.weight.device)
                plain.append(self.body(images).float().cpu())
                if perturbed:
                    scored.append(self.body(self._perturbed(images)).float().cpu())
            if label is not None:
                labels.append(label.cpu())
        if not any(map(len, plain)):
            raise ValueError("the loader is empty; give batches of ID images")
        if labels and len(labels) != len(plain):
            raise ValueError("some batches come with labels and some without; give them with all")
        rows = torch.cat(plain)
        classes = len(self.head.weight)
        numbers = checked_labels(torch.cat(labels), len(rows), classes) if labels else None
        return _Read(rows, torch.cat(scored) if scored else rows, numbers, shape)

    def _perturbed(self, images: Tensor) -> Tensor:
        head = self._head()
        with torch.inference_mode(False):
            images = images.clone()  # made by inference_mode, it could not have a gradient
            return odin_perturb(self.body, (head.weight, head.bias), images, self.perturbation)

    # ---- what it says ----

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scoring, head, kind = self._fitted(), self._head(), images.device.type
        activations = self.body(images)
        if not scoring.perturbed:
            with torch.autocast(kind, enabled=False):
                logits, scores = scoring(activations.float(), head)
            return logits, scores
        others = self.body(self._perturbed(images))
        with torch.autocast(kind, enabled=False):
            return head.logits(activations.float()), scoring(others.float(), head)[1]

    def score_samples(self, images: Tensor) -> Tensor:
        """(n,) float32 scores of images (n, channels, height, width), higher = ID.

        Raises ValueError before `fit`, and for images of another size, type or range than the
        network takes: `fit` has seen the size; values beyond 25 are pixels that were not
        normalised.
        """
        self._fitted()
        self._check(images, self.shape)
        scores: Tensor = self(images.to(self.head.weight.device))[1]
        return scores

    def decision_function(self, images: Tensor) -> Tensor:
        """(n,) scores less `offset_`: positive for in-distribution images. Raises as
        `score_samples`."""
        return self.score_samples(images) - self.offset

    def predict(self, images: Tensor) -> Tensor:
        """(n,) +1 for in-distribution images, those that score above `offset_`, -1 for the others.
        Raises as `score_samples`."""
        return torch.where(self.score_samples(images) > self.offset, 1, -1)

    @property
    def offset_(self) -> float:
        """The decision threshold: `keep` of the ID images score above it."""
        self._fitted()
        return float(self.offset)

    @property
    def parameters_used(self) -> dict[str, float]:
        """The method's parameters, a percentile with the threshold that it gave."""
        return dict(self._fitted().content.parameters)

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
    ) -> "Detector":
        """The method as eval.py fits it to this cache, and the threshold of its ID set: what the
        table measured is what runs. Raises ValueError where the network is not the cache's."""
        opened = cache.open_cache(Path(folder))
        given = [parse_setting(f"{key}={value}") for key, value in (settings or {}).items()]
        published = identify.thresholds(opened).published
        fitted = fit_methods(opened, variants([method], given, [], published), CPU)
        if len(fitted) > 1:
            raise BadMethod(f"a detector has one method, got {method!r}, which is several")
        (scored,) = score(opened, fitted, CPU, datasets=["id"])
        saved = detector_file.of_cache(opened, fitted[0], scored.scores["id"], keep)
        return cls._from_saved(saved, network, f"the cache {folder}")

    def save(self, path: str | Path) -> None:
        """The detector without its network, as one safetensors file; see detector_file.py."""
        saved = SavedDetector(
            self._fitted().content,
            self.offset_,
            self.keep,
            self.info,
            self._digests(),
            self.shape,
            self.preprocessing,
            self.class_names,
            self.perturbation,
        )
        detector_file.write(Path(path), saved)

    @classmethod
    def load(cls, path: str | Path, network: nn.Module | Network) -> "Detector":
        """The detector that `save` or `eval.py --save-detector` wrote, on its network. Raises
        BadDetector, a ValueError, where the network's weights are not those it was fitted on."""
        return cls._from_saved(detector_file.read(Path(path)), network, str(path))

    @classmethod
    def _from_saved(
        cls, saved: SavedDetector, network: nn.Module | Network, origin: str
    ) -> "Detector":
        head = (saved.network.settings or {}).get("head")
        detector = cls(network, saved.method.name, head, None, saved.shape or 224)
        if difference := detector._difference(saved):
            raise BadDetector(
                f"the network is not the one of {origin}: {difference}; give the network with the "
                "weights that the detector was fitted on"
            )
        detector._settings = None
        detector._install(MethodModule(saved.method), saved.threshold, saved.keep)
        detector.info, detector.shape = saved.network, saved.shape
        detector.preprocessing, detector.class_names = saved.preprocessing, saved.class_names
        detector.perturbation = saved.perturbation
        return detector

    def export(self, path: str | Path, images: Tensor | None = None) -> None:
        """Writes an ONNX file (`.onnx`) or a torch.export program (`.pt2`) with the outputs logits,
        score and decision, for any number of images; see export.py. images: an example, noise of
        the known shape where none is given."""
        from lhact import export

        export.write(self, Path(path), images)

    def _digests(self) -> dict[str, str]:
        head = self._head()
        tensors = {**self.body.state_dict(), "head.weight": head.weight, "head.bias": head.bias}
        return {name: digest(tensor) for name, tensor in tensors.items()}

    def _difference(self, saved: SavedDetector) -> str | None:
        """How this network differs from the one of a saved detector."""
        own, wanted = self._digests(), saved.digests
        whole = len(wanted) > 2  # the digests of a cache are of its head alone
        for what, names in {
            "differs": [name for name in wanted if name in own and own[name] != wanted[name]],
            "is missing": [name for name in wanted if name not in own],
            "is not known there": [name for name in own if whole and name not in wanted],
        }.items():
            if names:
                more = f" (and {len(names) - 1} more)" if names[1:] else ""
                return f"{names[0]}{more} {what}"
        hashes = {self.info.sha256, saved.network.sha256}
        if not whole and None not in hashes and len(hashes) > 1:
            return "its head is the same, but other layers or the names of its tensors differ"
        return None

    # ---- what all of it stands on ----

    def _fitted(self) -> MethodModule:
        if self.scoring is None:
            raise ValueError("the detector knows no threshold yet; call fit with ID images first")
        if not torch.compiler.is_compiling():
            self._check_mode()
        return self.scoring

    def _check_mode(self) -> None:
        if any(module.training for module in self.body.modules()):
            raise ValueError(NOT_IN_EVAL_MODE)

    def _head(self, device: str | None = None) -> Head:
        """The linear head in float32; for `fit` on that device and without gradients."""
        weight: Tensor = self.head.weight
        own: Tensor | None = self.head.bias
        bias = weight.new_zeros(len(weight)) if own is None else own
        if device is not None:
            weight, bias = weight.detach().to(device), bias.detach().to(device)
        return Head(weight.float(), bias.float())

    def _check(self, images: Tensor, shape: tuple[int, int, int] | None) -> None:
        """Raises ValueError for images that the network cannot have been made for."""
        self._check_mode()
        first = next(self.body.parameters(), self.head.weight)
        casts = torch.is_autocast_enabled(first.device.type) or not first.is_floating_point()
        check_images(images, shape, None if casts else first.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Detector":
        """Moves and converts the network. The threshold stays float32, as the scores do."""
        offset = self.offset
        super()._apply(fn, recurse)
        self.offset = offset.to(self.offset.device)
        return self


@dataclass(frozen=True)
class _Read:
    """What the network makes of ID images: plain (n, channels) activations; scored: those of the
    images that are scored, which ODIN perturbs; labels (n,), None where there are none; shape: of
    an image."""

    plain: Tensor
    scored: Tensor
    labels: Tensor | None
    shape: tuple[int, int, int] | None


def _split(
    network: nn.Module, head: str | None, shape: tuple[int, int, int]
) -> tuple[Parts, NetworkInfo]:
    if not isinstance(network, nn.Module):
        raise BadNetwork(f"the network must be a torch.nn.Module, got {type(network).__name__}")
    if hasattr(network, "_orig_mod") or isinstance(network, torch.jit.ScriptModule):
        raise BadNetwork("the network is compiled already; give it as it is, compile the detector")
    if any(module.training for module in network.modules()):
        raise BadNetwork(NOT_IN_EVAL_MODE)
    name = "resnet50" if is_resnet50(network) else type(network).__name__
    parts = split(network, name, shape, head)
    classes, channels = parts.head.weight.shape
    sha256 = state_dict_sha256(network.state_dict())
    settings = {"head": head} if head else None
    info = NetworkInfo(name, None, None, sha256, classes, channels, settings)
    return parts, info


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


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
        except (BadMethod, RuntimeError) as error:
            raise BadMethod(
                f"{error}, with {int(rest.sum())} of the {count} images, which the threshold of "
                "the others needs; give more images, or some of them as held_out"
            ) from error
        scores[inside] = fitted(read.scored[inside])
    return scores
