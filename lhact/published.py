"""Published numbers as data, each with its source and convention, and what is known of the network they were measured on.

All rows are FPR95/AUROC in percent with ID as the positive class, on torchvision's ResNet-50 with IMAGENET1K_V1 weights.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

TABLE6 = "LHAct, Yuan et al., ACM MM 2023, Table 6"
TABLE6_FROM_REACT = TABLE6 + " (ReAct's own numbers)"
REACT = "ReAct, Sun et al., NeurIPS 2021"
ASH = "ASH, Djurisic et al., ICLR 2023"
VRA = "VRA, Xu et al., NeurIPS 2023"
DICE = "DICE, Sun & Li, ECCV 2022"


class Row(NamedTuple):
    """values: dataset (or `average`) -> (FPR95, AUROC). confirmed: seen in the source; the others are from memory of it and are
    never used for a difference."""

    method: str
    source: str
    values: dict[str, tuple[float, float]]
    confirmed: bool = True
    convention: str = "ID positive"


def _row(method: str, source: str, *pairs: tuple[float, float], confirmed: bool = True) -> Row:
    return Row(method, source, dict(zip((*DATASETS, "average"), pairs, strict=True)), confirmed)


def _unconfirmed(method: str, source: str, *pairs: tuple[float, float]) -> Row:
    return _row(method, source, *pairs, confirmed=False)


DATASETS = ("iNaturalist", "SUN", "Places", "Textures")

# The first row of a method is the one that results are compared with.
ROWS = [
    _row("msp", TABLE6_FROM_REACT, (54.99, 87.74), (70.83, 80.86), (73.99, 79.76), (68.00, 79.61), (66.95, 81.99)),
    _row("odin", TABLE6_FROM_REACT, (47.66, 89.66), (60.15, 84.59), (67.89, 81.78), (50.23, 85.62), (56.48, 85.41)),
    _row("energy", TABLE6_FROM_REACT, (55.72, 89.95), (59.26, 85.89), (64.92, 82.86), (53.72, 85.99), (58.41, 86.17)),
    _row("bats", TABLE6, (24.98, 95.51), (25.68, 94.27), (37.34, 91.11), (32.62, 93.47), (30.16, 93.59)),
    _row("react", TABLE6, (19.99, 96.31), (29.60, 93.42), (39.70, 90.95), (41.42, 91.62), (32.68, 93.08)),
    _row("bfact", TABLE6, (20.69, 96.20), (21.02, 95.24), (30.33, 92.62), (54.20, 87.78), (31.56, 92.96)),
    _row("lhact", TABLE6, (11.07, 97.86), (16.87, 96.18), (25.68, 93.87), (33.79, 93.78), (21.85, 95.42)),
    _row("react", REACT, (20.38, 96.22), (24.20, 94.20), (33.85, 91.58), (47.30, 89.80), (31.43, 92.95)),
    _unconfirmed("ash-s", ASH, (11.49, 97.87), (27.98, 94.02), (39.78, 90.98), (11.93, 97.60), (22.80, 95.12)),
    _unconfirmed("ash-b", ASH, (14.21, 97.32), (22.08, 95.10), (33.45, 92.31), (21.17, 95.50), (22.73, 95.06)),
    _unconfirmed("ash-p", ASH, (44.57, 92.51), (52.88, 88.35), (61.79, 85.58), (42.06, 89.70), (50.32, 89.04)),
    Row("scale", "SCALE, Xu et al., ICLR 2024", {"average": (20.05, 95.71)}, confirmed=False),
    _unconfirmed("vra", VRA, (15.70, 97.12), (26.94, 94.25), (37.85, 91.27), (21.47, 95.62), (25.49, 94.57)),
    _unconfirmed("dice", DICE, (25.63, 94.49), (35.15, 90.83), (46.49, 87.48), (31.72, 90.30), (34.75, 90.77)),
    _unconfirmed("react+dice", DICE, (18.64, 96.24), (25.45, 93.94), (36.86, 90.67), (28.07, 92.74), (27.25, 93.40)),
]


def lookup(method: str, dataset: str) -> dict[str, Any] | None:
    """{"fpr95", "auroc", "source"} of the first confirmed row of that method; None if there is none."""
    for row in ROWS:
        if row.method == method and row.confirmed and dataset in row.values:
            fpr95, auroc = row.values[dataset]
            return {"fpr95": fpr95, "auroc": auroc, "source": row.source}
    return None


# What ODIN's published row was measured with, in ReAct's code.
ODIN_PERTURBATION = {"temperature": 1000.0, "epsilon": 0.005}

# Penultimate activations of ResNet-50 IMAGENET1K_V1 on ImageNet images: their mean, and the percentiles at which LHAct's published
# low (0.2194), ReAct's published threshold (1.0) and LHAct's published high (1.3521) lie.
V1_MEAN = 0.4635
V1_PERCENTILES = {0.21940805315971373: 33.0, 1.0: 90.0, 1.3520756840705868: 95.7}
V1_TOP1 = 76.130
V1_SHAPE = (1000, 2048)  # (classes, channels)
V1_PREPROCESSING = {
    "resize": 256,
    "crop": 224,
    "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
V2_TOP1 = 80.858  # torchvision's, of ResNet50_Weights.IMAGENET1K_V2


def is_v1(network: dict[str, Any]) -> bool:
    """Whether the network is the one of the published numbers, by its description in the cache."""
    return network.get("arch") == "resnet50" and network.get("weights") == "IMAGENET1K_V1"


def disagreement_with_v1(mean: float, percentiles: dict[float, float]) -> str | None:
    """Why activations are not distributed like V1's; None if they are.

    They are when the mean is within 6 % of V1's and each of the three published thresholds lies within a few percentiles of where
    it lies for V1: 3 at the low one, 2 at 1.0, 1 at the high one.
    """
    if abs(mean / V1_MEAN - 1) > 0.06:
        return f"the mean activation is {mean:.4f}, V1's {V1_MEAN}"
    for (threshold, wanted), tolerance in zip(V1_PERCENTILES.items(), (3, 2, 1), strict=True):
        if abs(percentiles[threshold] - wanted) > tolerance:
            return f"{threshold:.4f} lies at percentile {percentiles[threshold]:.1f}, V1's at {wanted}"
    return None


# How V1 is told from what is not V1, by ImageNet images' activations. Measured with V1 compressed by product quantisation (Stock et
# al., ICLR 2020), whose activations are distributed like V1's, on 500 ImageNet images of 500 classes:
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
# spread: standard deviation over the channels of their means. Drawing 250 images anew moves the mean by 0.004, the percentiles by
# 0.5, 0.2 and 0.1, and the spread by 0.002 (bootstrap). Images of few classes move them more: 59 images of dogs give mean 0.491,
# percentile 29.4 and spread 0.177. So fewer classes are not judged but by what is beyond doubt.
V1_SPREAD = 0.097
SPREAD_TOLERANCE = 1.2
SCALE = 2  # times V1's mean: beyond it, the inputs are in another scale
ENOUGH = 250  # classes, or images where the classes are not known


class Statistics(NamedTuple):
    """Of the activations of ID images: mean of all, percentage of them below each of V1_PERCENTILES, spread as above."""

    images: int
    mean: float
    percentiles: dict[float, float]
    spread: float


class Top1(NamedTuple):
    """Top-1 accuracy in percent on so many images of so many classes."""

    percent: float
    images: int
    classes: int


def standard_error(percent: float, images: int, classes: int) -> float:
    """Of a top-1 accuracy, in points, where that of all of ImageNet is `percent`.

    It is that of drawing images and, until all 1,000 are there, classes: images of one class are easy or hard together. It takes
    those of a class for all alike, so it is too large rather than too small.
    """
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) * (1 / images + 1 / classes - 1 / 1000))


def top1_disagreement(found: Top1, published: float) -> str | None:
    """Why a top-1 accuracy is not the published one; None where they are within three standard errors of each other."""
    error = standard_error(published, found.images, found.classes)
    if abs(found.percent - published) <= 3 * error:
        return None
    return f"top-1 is {found.percent:.2f} % on {found.images:,} images, published is {published:.2f} % (standard error {error:.2f})"


def diagnose(
    network: Mapping[str, Any],
    shape: tuple[int, int],
    preprocessing: Mapping[str, Any],
    statistics: Statistics,
    top1: Top1 | None,
    counted: Top1 | None = None,
) -> list[str]:
    """What speaks against comparing a network on ImageNet with the published numbers, one line each; [] where nothing does.

    network, preprocessing: as the cache describes them. shape: (classes, channels) of the head. top1: of all ID images, as the
    cache has it; counted: of some of them, counted anew; None where they are not known. A ResNet-50 that does not claim to be V1
    is compared with nothing published; of it only V2 is named.
    """
    if network.get("arch") != "resnet50":
        return []
    if network.get("weights") == "IMAGENET1K_V2":
        return [f"these are IMAGENET1K_V2 weights (top-1 {V2_TOP1:.2f} %); the paper's numbers and constants are of IMAGENET1K_V1"]
    if not is_v1(network):
        unknown = network.get("weights") is None and shape == V1_SHAPE
        return _evidence(statistics, top1) if unknown and _is_better(top1) and _unlike_v1(statistics, top1) else []
    if shape != V1_SHAPE:
        return ["the head has {} classes and {} channels, that of IMAGENET1K_V1 {} and {}".format(*shape, *V1_SHAPE)]
    lines = []
    if difference := _preprocessing_difference(preprocessing):
        lines.append(difference)
    if top1 and counted:
        error = standard_error(V1_TOP1, counted.images, counted.classes)
        if not abs(top1.percent - counted.percent) <= 3 * error:  # also where it is NaN
            lines.append(f"the cache says top-1 {top1.percent:.2f} %, its activations {counted.percent:.2f} %")
            top1 = None
    return [*lines, *_evidence(statistics, top1 or counted)]


def _preprocessing_difference(found: Mapping[str, Any]) -> str | None:
    """What of the recorded preprocessing is not V1's; what is not recorded is not judged."""
    parts = [
        f"{key} {found[key]!r} instead of {wanted!r}"
        for key, wanted in V1_PREPROCESSING.items()
        if key in found and not _same(found[key], wanted)
    ]
    if not parts:
        return None
    missing = ["no resize"] if "resize" in found and not found["resize"] else []
    if "std" in found and found["std"] in (None, [1, 1, 1]) and found.get("mean") in (None, [0, 0, 0]):
        missing.append("no normalisation")
    return f"{' and '.join(missing) or 'other preprocessing'}: {', '.join(parts)}"


def _same(found: Any, wanted: Any) -> bool:
    if not isinstance(wanted, list):
        return found == wanted
    numbers = isinstance(found, list) and len(found) == len(wanted) and all(isinstance(value, int | float) for value in found)
    # 1e-4: a tool may have kept them as float32.
    return numbers and all(abs(value - other) < 1e-4 for value, other in zip(found, wanted, strict=True))


def _is_better(top1: Top1 | None) -> bool:
    return top1 is not None and top1.percent > V1_TOP1 and top1_disagreement(top1, V1_TOP1) is not None


def _unlike_v1(statistics: Statistics, top1: Top1 | None) -> str | None:
    """Why activations are not V1's on ImageNet; None where they are, or the images are too few to tell."""
    if (top1.classes if top1 else statistics.images) < ENOUGH and statistics.mean < SCALE * V1_MEAN:
        return None
    if reason := disagreement_with_v1(statistics.mean, statistics.percentiles):
        return reason
    if statistics.spread > SPREAD_TOLERANCE * V1_SPREAD:
        return f"the channels' means spread by {statistics.spread:.3f}, V1's by about {V1_SPREAD}"
    return None


def _evidence(statistics: Statistics, top1: Top1 | None) -> list[str]:
    """What top-1 and the activations say against V1, and of what they would be, as far as that can be told."""
    off = top1_disagreement(top1, V1_TOP1) if top1 else None
    unlike = _unlike_v1(statistics, top1)
    enough = (top1.classes if top1 else statistics.images) >= ENOUGH
    if unlike and _is_better(top1):
        cause = f"as with newer weights, such as IMAGENET1K_V2 (top-1 {V2_TOP1:.2f} %), or with a larger crop"
    elif unlike:
        cause = _defect(statistics) or "as with other preprocessing or other images"
        # V2's activations were not at hand to measure: a low top-1 alone rules it out.
        cause += "" if off else ", or with other weights, such as IMAGENET1K_V2"
    elif off and enough and _is_better(top1):
        cause = "as on images that the network was trained on"
    elif off and enough:
        cause = (
            "the activations are distributed like V1's, as they also are without the resize (8 points lower where measured), with "
            "another resize (up to 4), with channels in the order BGR (18), or with wrong labels"
        )
    else:
        cause = None
    lines = [line for line in (off, unlike) if line]
    return [*lines[:-1], f"{lines[-1]}: {cause}"] if cause else lines


def _defect(statistics: Statistics) -> str | None:
    """The error in the inputs that such activations come of, by the table above."""
    if statistics.mean > 10 * V1_MEAN:
        return "as with inputs from 0 to 255 instead of 0 to 1, or with the network in training mode"
    if statistics.mean > SCALE * V1_MEAN:
        return "as with inputs normalised twice"
    if statistics.spread > 1.5 * V1_SPREAD:
        return "as without normalisation" if statistics.mean < V1_MEAN else "as with inputs from which the mean is not subtracted"
    if statistics.spread > SPREAD_TOLERANCE * V1_SPREAD:
        return "as with another normalisation"
    if statistics.mean < V1_MEAN and statistics.percentiles[1.0] > V1_PERCENTILES[1.0] + 1.5:
        return "as with a larger crop"
    return None
