"""A network's description and its activations in; out, whether it is the network that published
numbers and constants are of, and what speaks against a comparison.

That network is V1, torchvision's ResNet-50 with IMAGENET1K_V1 weights.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lhact.cache import CALIBRATION, Activations, Cache
from lhact.methods.calibrate import mean_and_shares
from lhact.records import LOGITS, NetworkInfo, Preprocessing, RecordedPreprocessing

# So many ID images show what network they are of: two of each class, a second's work at most.
SAMPLE_ROWS = 2000
ROWS = 512  # in memory at a time

# V1's mean activation on ImageNet images, and the percentiles at which LHAct's published low,
# ReAct's published threshold and LHAct's published high lie.
V1_MEAN = 0.4635
V1_PERCENTILES = {0.21940805315971373: 33.0, 1.0: 90.0, 1.3520756840705868: 95.7}
V1_TOLERANCES = (3, 2, 1)
V1_TOP1 = 76.130
V1_SHAPE = (1000, 2048)  # (classes, channels)
V1_PREPROCESSING = Preprocessing()
V2_TOP1 = 80.858  # torchvision's, of ResNet50_Weights.IMAGENET1K_V2

# How V1 is told from what is not V1, by ImageNet images' activations. Measured with V1 compressed
# by product quantisation (Stock et al., ICLR 2020), whose activations are distributed like V1's, on
# 500 ImageNet images of 500 classes:
#
#   inputs                      mean   percentile of 0.2194, 1.0, 1.3521   spread   top-1
#   as published               0.4632           33.7  90.1  95.5            0.097    75.2
#   not normalised             0.4291           37.9  91.1  96.2            0.170    43.0
#   not divided by std         0.4331           37.6  91.0  96.1            0.163    47.4
#   mean not subtracted        0.5111           33.1  87.0  93.8            0.358    16.8
#   mean and std of 0.5        0.4538           35.2  90.2  95.7            0.124    69.0
#   normalised twice           1.957            23.2  49.6  57.2            2.39      0.0
#   0 to 255, normalised       441              16.2  17.9  18.5            547       0.0
#   0 to 255                   97.5             17.7  21.3  22.2            121       0.0
#   0 to 255 minus mean, BGR   47.7             13.4  18.4  19.9            56.3      0.0
#   training mode              24.6              0.4   1.2   1.6            2.64      0.6
#   BGR                        0.4720           32.3  89.8  95.6            0.108    56.8
#   not resized                0.4663           33.6  89.9  95.4            0.099    67.6
#   squashed to a square       0.4606           33.9  90.2  95.6            0.102    72.4
#   resized by nearest pixel   0.4779           32.5  89.3  95.2            0.110    71.6
#   crop 256                   0.4337           33.9  92.1  96.7            0.096    78.6
#   resize 342, crop 299       0.3898           34.9  94.9  98.1            0.093    79.0
#
# spread: standard deviation over the channels of their means. Drawing 250 images anew moves the
# mean by 0.004, the percentiles by 0.5, 0.2 and 0.1, and the spread by 0.002 (bootstrap). Images of
# few classes move them more: 59 images of dogs give mean 0.491, percentile 29.4 and spread 0.177.
# So fewer classes are not judged but by what is beyond doubt.
V1_SPREAD = 0.097
SPREAD_TOLERANCE = 1.2
OTHER_SCALE = 2  # times V1's mean: beyond it, the inputs are in another scale
CLASSES_TO_JUDGE = 250  # or images, where the classes are not known


@dataclass(frozen=True)
class Statistics:
    """Of the activations of ID images: mean of all, percentage of them below each of
    V1_PERCENTILES, spread as above."""

    images: int
    mean: float
    percentiles: dict[float, float]
    spread: float


@dataclass(frozen=True)
class Top1:
    """Top-1 accuracy in percent on so many images of so many classes."""

    percent: float
    images: int
    classes: int


@dataclass(frozen=True)
class Thresholds:
    """Where default thresholds come from: `published` constants, or percentiles. remark: how that
    was decided."""

    published: bool
    remark: str


def is_v1(network: NetworkInfo) -> bool:
    """Whether the network is V1 by its description in the cache."""
    return (network.arch, network.weights) == ("resnet50", "IMAGENET1K_V1")


def thresholds(cache: Cache) -> Thresholds:
    """Those of the cache's calibration set; see `thresholds_of`. Raises BadCache."""
    if cache.info.network.given_as == LOGITS:
        return Thresholds(False, "thresholds: none, since this cache holds logits")
    images = cache.calibration.images
    source = (
        f"calibration activations ({images} images)"
        if CALIBRATION in cache.sets
        else f"ID TEST activations ({images} images), for want of a calibration set"
    )
    batches = (torch.from_numpy(chunk) for chunk in cache.calibration.chunks(ROWS))
    return thresholds_of(cache.info.network, batches, source)


def thresholds_of(network: NetworkInfo, batches: Iterable[Tensor], source: str) -> Thresholds:
    """The published constants where they are valid: on V1, or on a ResNet-50 whose calibration
    activations are distributed like V1's. Of features from elsewhere a name is no proof. batches:
    (rows, channels) float32 calibration activations; source: what the remark calls them."""
    if is_v1(network) and not network.given_as:
        by_name = "of resnet50 IMAGENET1K_V1, which this is by name"
        return Thresholds(True, f"thresholds: the published constants, {by_name}")
    if (network.arch, network.classes, network.channels) != ("resnet50", *V1_SHAPE):
        return Thresholds(False, f"thresholds: percentiles of the {source}")
    mean, shares = mean_and_shares(batches, list(V1_PERCENTILES))
    percentiles = dict(zip(V1_PERCENTILES, shares, strict=True))
    if reason := disagreement_with_v1(mean, percentiles):
        remark = f"percentiles of the {source}, not the published constants ({reason})"
        return Thresholds(False, f"thresholds: {remark}")
    where = ", ".join(f"{at:.4g} at percentile {share:.1f}" for at, share in percentiles.items())
    return Thresholds(
        True,
        f"thresholds: the published constants, since the {source} are distributed like those of "
        f"resnet50 IMAGENET1K_V1 (mean {mean:.4f}, {where})",
    )


def disagreement_with_v1(mean: float, percentiles: dict[float, float]) -> str | None:
    """Why activations are not distributed like V1's; None if they are.

    They are when the mean is within 6 % of V1's and each of the three published thresholds lies
    within a few percentiles of where it lies for V1: 3 at the low one, 2 at 1.0, 1 at the high one.
    """
    if not abs(mean / V1_MEAN - 1) <= 0.06:
        return f"the mean activation is {mean:.4f}, V1's {V1_MEAN}"
    for (threshold, wanted), tolerance in zip(V1_PERCENTILES.items(), V1_TOLERANCES, strict=True):
        found = percentiles[threshold]
        if abs(found - wanted) > tolerance:
            return f"{threshold:.4f} lies at percentile {found:.1f}, V1's at {wanted}"
    return None


def accuracy(activations: Activations, weight: Tensor, bias: Tensor) -> float | None:
    """Top-1 accuracy of the network itself in percent; None where labels are not known.

    weight (classes, channels), bias (classes,). Raises BadCache.
    """
    labels = activations.info.labels
    if labels is None:
        return None
    correct = start = 0
    with torch.inference_mode():
        for chunk in activations.chunks(ROWS):
            logits = torch.addmm(bias, torch.from_numpy(chunk).to(weight.device), weight.T)
            wanted = torch.tensor(labels[start : start + len(chunk)])
            correct += int((logits.argmax(dim=1).cpu() == wanted).sum())
            start += len(chunk)
    return 100 * correct / len(labels)


def standard_error(percent: float, images: int, classes: int) -> float:
    """Of a top-1 accuracy, in points, where that of all of ImageNet is `percent`.

    It is that of drawing images and, until all 1,000 are there, classes: images of one class are
    easy or hard together. It takes those of a class for all alike, so it is too large rather than
    too small.
    """
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) * (1 / images + 1 / classes - 1 / 1000))


def top1_disagreement(found: Top1, published: float) -> str | None:
    """Why a top-1 accuracy is not the published one; None where they are within three standard
    errors of each other."""
    error = standard_error(published, found.images, found.classes)
    if abs(found.percent - published) <= 3 * error:
        return None
    return (
        f"top-1 is {found.percent:.2f} % on {found.images:,} images, published is "
        f"{published:.2f} % (standard error {error:.2f})"
    )


def wrong_labels(accuracy: float | None, images: int, classes: int) -> str | None:
    """Why labels look wrong: the accuracy is no better than chance. None where it is better, or
    the images are too few to tell."""
    if accuracy is None or classes < 2:
        return None
    chance = 1 / classes
    # Three standard errors above chance, of a network that guesses.
    limit = 100 * (chance + 3 * math.sqrt(chance * (1 - chance) / images))
    if accuracy > limit or limit > 90:
        return None
    return (
        f"top-1 is {accuracy:.2f} %, no better than guessing one of {classes} classes: the labels "
        "or the weights are not what they are taken for (label = place of the class folder in the "
        "order named above)"
    )


def findings(activations: Activations, weight: np.ndarray, bias: np.ndarray) -> list[str]:
    """What speaks against comparing these activations of ImageNet's ID images with published
    numbers, one line each.

    The cache is not believed alone: SAMPLE_ROWS rows are looked at, and the accuracy that it has is
    checked on them; see `diagnose`. Raises BadCache.
    """
    info = activations.info
    sample, numbers = activations.sample(SAMPLE_ROWS)
    rows = torch.from_numpy(sample)
    mean, shares = mean_and_shares([rows], list(V1_PERCENTILES))
    spread = float(rows.mean(dim=0, dtype=torch.float64).std(correction=0))
    percentiles = dict(zip(V1_PERCENTILES, shares, strict=True))
    statistics = Statistics(len(rows), mean, percentiles, spread)
    top1 = counted = None
    if info.labels is not None:
        chosen = torch.tensor(info.labels)[numbers]
        logits = torch.addmm(torch.from_numpy(bias), rows, torch.from_numpy(weight).T)
        percent = 100 * float((logits.argmax(dim=1) == chosen).double().mean())
        counted = Top1(percent, len(rows), len(chosen.unique()))
    if info.accuracy is not None:
        classes = len(set(info.labels)) if info.labels else min(activations.images, 1000)
        top1 = Top1(info.accuracy, activations.images, classes)
    return diagnose(info.network, info.preprocessing, statistics, top1, counted)


def diagnose(
    network: NetworkInfo,
    preprocessing: RecordedPreprocessing,
    statistics: Statistics,
    top1: Top1 | None,
    counted: Top1 | None = None,
) -> list[str]:
    """What speaks against comparing a network on ImageNet with the published numbers, one line
    each; [] where nothing does.

    network, preprocessing: as the cache describes them. top1: of all ID images, as the cache has
    it; counted: of some of them, counted anew; None where they are not known. A ResNet-50 that does
    not claim to be V1 is compared with nothing published; of it only V2 is named.
    """
    if network.arch != "resnet50":
        return []
    if network.weights == "IMAGENET1K_V2":
        return [
            f"these are IMAGENET1K_V2 weights (top-1 {V2_TOP1:.2f} %); the paper's numbers and "
            "constants are of IMAGENET1K_V1"
        ]
    shape = (network.classes, network.channels)
    if not is_v1(network):
        unknown = network.weights is None and shape == V1_SHAPE
        suspect = unknown and _is_better(top1) and _unlike_v1(statistics, top1)
        return _evidence(statistics, top1) if suspect else []
    if shape != V1_SHAPE:
        return [
            f"the head has {shape[0]} classes and {shape[1]} channels, that of IMAGENET1K_V1 "
            f"{V1_SHAPE[0]} and {V1_SHAPE[1]}"
        ]
    lines = []
    if difference := _preprocessing_difference(preprocessing):
        lines.append(difference)
    if top1 and counted:
        error = standard_error(V1_TOP1, counted.images, counted.classes)
        if not abs(top1.percent - counted.percent) <= 3 * error:  # also where it is NaN
            lines.append(
                f"the cache says top-1 {top1.percent:.2f} %, its activations "
                f"{counted.percent:.2f} %"
            )
            top1 = None
    return [*lines, *_evidence(statistics, top1 or counted)]


def _preprocessing_difference(recorded: RecordedPreprocessing) -> str | None:
    """What of the recorded preprocessing is not V1's; what is not recorded is not judged."""
    found, wanted = recorded.to_json(), V1_PREPROCESSING.to_json()
    parts = [
        f"{key} {found[key]!r} instead of {wanted.get(key, False)!r}"
        for key in found
        if not _same(found[key], wanted.get(key, False))
    ]
    if not parts:
        return None
    missing = ["no resize"] if recorded.resize == 0 else []
    if recorded.std == (1, 1, 1) and recorded.mean in (None, (0, 0, 0)):
        missing.append("no normalisation")
    return f"{' and '.join(missing) or 'other preprocessing'}: {', '.join(parts)}"


def _same(found: object, wanted: object) -> bool:
    if isinstance(found, list) and isinstance(wanted, list):
        # 1e-4: a tool may have kept them as float32.
        return all(abs(a - b) < 1e-4 for a, b in zip(found, wanted, strict=True))
    return found == wanted


def _is_better(top1: Top1 | None) -> bool:
    """Whether the network names more images right than V1 does, beyond chance."""
    return bool(top1 and top1.percent > V1_TOP1 and top1_disagreement(top1, V1_TOP1))


def _are_enough(statistics: Statistics, top1: Top1 | None) -> bool:
    return (top1.classes if top1 else statistics.images) >= CLASSES_TO_JUDGE


def _unlike_v1(statistics: Statistics, top1: Top1 | None) -> str | None:
    """Why activations are not V1's on ImageNet; None where they are, or the images are too few to
    tell."""
    if not _are_enough(statistics, top1) and statistics.mean < OTHER_SCALE * V1_MEAN:
        return None
    if reason := disagreement_with_v1(statistics.mean, statistics.percentiles):
        return reason
    if statistics.spread > SPREAD_TOLERANCE * V1_SPREAD:
        return f"the channels' means spread by {statistics.spread:.3f}, V1's by about {V1_SPREAD}"
    return None


def _evidence(statistics: Statistics, top1: Top1 | None) -> list[str]:
    """What top-1 and the activations say against V1, and of what they would be, as far as that can
    be told."""
    off = top1_disagreement(top1, V1_TOP1) if top1 else None
    unlike = _unlike_v1(statistics, top1)
    cause = None
    if unlike and _is_better(top1):
        weights = f"newer weights, such as IMAGENET1K_V2 (top-1 {V2_TOP1:.2f} %)"
        cause = f"as with {weights}, or with a larger crop"
    elif unlike:
        # V2's activations were not at hand to measure: a low top-1 alone rules it out.
        other = "" if off else ", or with other weights, such as IMAGENET1K_V2"
        cause = f"as {_defect(statistics)}{other}"
    elif off and _are_enough(statistics, top1) and _is_better(top1):
        cause = "as on images that the network was trained on"
    elif off and _are_enough(statistics, top1):
        cause = (
            "the activations are distributed like V1's, as they also are without the resize (8 "
            "points lower where measured), with another resize (up to 4), with channels in the "
            "order BGR (18), or with wrong labels"
        )
    lines = [line for line in (off, unlike) if line]
    return [*lines[:-1], f"{lines[-1]}: {cause}"] if cause else lines


def _defect(statistics: Statistics) -> str:
    """The error in the inputs that such activations come of, by the table above: the first that
    applies."""
    mean, spread = statistics.mean / V1_MEAN, statistics.spread / V1_SPREAD
    at_one = statistics.percentiles[1.0] - V1_PERCENTILES[1.0]
    scale = "0 to 255 instead of 0 to 1"
    defects = {
        f"with inputs from {scale}, or with the network in training mode": mean > 10,
        "with inputs normalised twice": mean > OTHER_SCALE,
        "without normalisation": spread > 1.5 and mean < 1,
        "with inputs from which the mean is not subtracted": spread > 1.5,
        "with another normalisation": spread > SPREAD_TOLERANCE,
        "with a larger crop": mean < 1 and at_one > 1.5,
        "with other preprocessing or other images": True,
    }
    return next(defect for defect, applies in defects.items() if applies)
