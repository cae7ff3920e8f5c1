"""Features of images as arrays or tensors, and the linear head, in; a cache out, which eval.py
reads as it reads one that get_activation.py made.

    sets = {"id": FeatureSet(z, labels), "calibration": FeatureSet(zc, labels_c), "SVHN": z_svhn}
    write_cache("cache/own/mine", sets, head=(network.fc.weight, network.fc.bias))
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lhact
from lhact import cache_writer, identify
from lhact.cache import CALIBRATION, ID, check_distinct, check_name
from lhact.cache_writer import DIGEST_BYTES, SetWriter
from lhact.extraction.weights import state_dict_sha256
from lhact.messages import InputError, say, shown
from lhact.records import (
    ACTIVATIONS,
    GIVEN,
    LOGITS,
    BadRecord,
    NetworkInfo,
    RecordedPreprocessing,
    SetInfo,
)

Array = np.ndarray | Tensor
Head = tuple[Array, Array | None]

# What a cache calls the precision of features of that dtype.
PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp32"}
ROWS = 4096  # in memory at a time
# The head of a cache of logits is the identity: 576 MB of float32 for so many classes.
MOST_CLASSES_OF_LOGITS = 12_000


class BadFeatures(InputError):
    """Features, labels or a head that a cache cannot be made of; the message names which, with what
    was wanted."""


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The penultimate activations of one image set, or its logits.

    features: (images, channels) of float16, bfloat16, float32 or float64, on any device; further
    axes of length 1 are left out. labels: (images,) class numbers, None where they are not known.
    paths: what the images are called, by default `source/0`, `source/1`, ...; source: where the
    features come from, by default the name of the set.
    """

    features: Array
    labels: Array | Sequence[int] | None = None
    paths: Sequence[str] | None = None
    source: str | None = None


@dataclass(frozen=True)
class Origin:
    """What is known of the network that made the features. weights: the name under which they are
    published; eval.py does not believe it without a look at the features. checkpoint: the name of
    the file that the head is from."""

    arch: str | None = None
    weights: str | None = None
    checkpoint: str | None = None
    preprocessing: RecordedPreprocessing = field(default_factory=RecordedPreprocessing)


@dataclass(frozen=True)
class _Checked:
    """A set that can be written. digests (images, 16): of the content of each row."""

    features: Array
    digests: np.ndarray
    source: str
    info: SetInfo


def write_cache(
    folder: str | Path,
    sets: Mapping[str, FeatureSet | Array],
    head: Head | None,
    origin: Origin | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the sets to a cache folder, `cache/<benchmark>/<name>`, as float32.

    sets: `id`, `calibration` where there is one, and the OOD sets by name. head: weight (classes,
    channels) and bias (classes,), None for zeros; None where the arrays are logits (images,
    classes), of which eval.py then serves the methods that read nothing else. overwrite: replace
    these sets where others of the same names are there.

    All arrays are checked before anything is written, and a cache that is there already is only
    added to where it has the same head. Raises BadFeatures, BadCache and OSError.
    """
    folder, origin = Path(folder), origin or Origin()
    given = {
        name: part if isinstance(part, FeatureSet) else FeatureSet(part)
        for name, part in sets.items()
    }
    _check_names(list(given))
    features = {
        name: _floats(part.features, _what(name, part), ("images", "channels"))
        for name, part in given.items()
    }
    _check_alike(features)
    weight, bias = _identity(features[ID].shape[1], origin) if head is None else _linear(head)
    _check_width(weight, features[ID].shape[1])
    tensors = {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}
    network = NetworkInfo(
        arch=origin.arch,
        weights=origin.weights,
        checkpoint=origin.checkpoint,
        sha256=state_dict_sha256(tensors),
        classes=weight.shape[0],
        channels=weight.shape[1],
        settings={GIVEN: LOGITS if head is None else ACTIVATIONS},
    )
    checked = {
        name: _checked(name, part, features[name], network, origin) for name, part in given.items()
    }
    with cache_writer.lock(folder) as lock:
        if lock.remark:
            say(lock.remark)
        wanted = {(folder, name): part.info for name, part in checked.items()}
        complete = cache_writer.prepare(folder, wanted, overwrite, lambda *_: True)
        cache_writer.save_head(folder, weight, bias)
        for name, part in checked.items():
            if (folder, name) in complete:
                say(f"{name}: {part.info.images:,} images, cached already")
            else:
                _write(folder, name, part, tensors)


def _what(name: str, part: FeatureSet) -> str:
    return f"{name} ({shown(part.source)})" if part.source else name


def _check_names(names: Sequence[str]) -> None:
    """Raises BadFeatures or BadCache for sets that make no cache."""
    ood = [name for name in names if name not in (ID, CALIBRATION)]
    if ID not in names or not ood:
        raise BadFeatures(f"a cache has a set {ID!r} and at least one OOD set, got {list(names)}")
    for name in names:
        check_name(name, "the name of an image set")
    check_distinct(names)


def _dtype(values: Array) -> str:
    return values.dtype.name if isinstance(values, np.ndarray) else str(values.dtype)[6:]


def _floats(values: object, what: str, axes: tuple[str, ...]) -> Array:
    """The values without further axes of length 1. Raises BadFeatures unless they are floats of
    that many axes, none of them empty."""
    dense = isinstance(values, np.ndarray) or (
        isinstance(values, Tensor) and values.layout == torch.strided
    )
    if not dense:
        kind = type(values).__name__
        raise BadFeatures(f"{what}: wanted a NumPy array or a dense torch tensor, got {kind}")
    found: Array = values  # type: ignore[assignment]
    if _dtype(found) not in PRECISIONS:
        raise BadFeatures(f"{what}: wanted {', '.join(PRECISIONS)}, got {_dtype(found)}")
    while found.ndim > len(axes) and found.shape[-1] == 1:
        found = found[..., 0]
    if found.ndim != len(axes) or 0 in found.shape:
        raise BadFeatures(
            f"{what}: wanted the shape ({', '.join(axes)}) with at least one of each, got "
            f"{tuple(found.shape)}"
        )
    return found


def _check_alike(features: Mapping[str, Array]) -> None:
    """Raises BadFeatures where sets differ from the ID set in width or precision."""
    first = features[ID]
    for name, values in features.items():
        if values.shape[1] != first.shape[1]:
            raise BadFeatures(
                f"{name} has {values.shape[1]} channels, {ID} {first.shape[1]}; give features of "
                "the same layer of the same network"
            )
        if PRECISIONS[_dtype(values)] != PRECISIONS[_dtype(first)]:
            raise BadFeatures(
                f"{name} is {_dtype(values)}, {ID} {_dtype(first)}: rounding alone could tell them "
                "apart; give all sets in the same precision"
            )


def _identity(classes: int, origin: Origin) -> tuple[np.ndarray, np.ndarray]:
    """(weight, bias) that make logits of logits, to the bit."""
    if origin.weights is not None:
        raise BadFeatures(
            f"that logits are of {origin.weights} cannot be checked; give features, or no weights"
        )
    if classes > MOST_CLASSES_OF_LOGITS:
        raise BadFeatures(
            f"logits of {classes:,} classes are too many, {MOST_CLASSES_OF_LOGITS:,} at most can "
            "be served; give features and the head"
        )
    return np.eye(classes, dtype=np.float32), np.zeros(classes, np.float32)


def _linear(head: Head) -> tuple[np.ndarray, np.ndarray]:
    """(weight, bias) of the head as float32."""
    what = ("the head's weight", "the head's bias")
    # Copies: torch takes no array that is mapped from a file to be read only.
    weight = np.array(_float32(_floats(head[0], what[0], ("classes", "channels"))))
    bias = np.zeros(len(weight), np.float32)
    if head[1] is not None:
        bias = np.array(_float32(_floats(head[1], what[1], ("classes",))))
    if bias.shape != (len(weight),):
        raise BadFeatures(f"{what[1]} is {bias.shape}, its weight {weight.shape}")
    for name, values in zip(what, (weight, bias), strict=True):
        if not np.isfinite(values).all():
            raise BadFeatures(f"{name} holds NaN or infinite values")
    return weight, bias


def _check_width(weight: np.ndarray, channels: int) -> None:
    if weight.shape[1] != channels:
        mend = "transpose it" if len(weight) == channels else "give the head that reads them"
        raise BadFeatures(
            f"the head's weight is {weight.shape}, the features have {channels} channels, so "
            f"(classes, {channels}) is wanted; {mend}"
        )


def _float32(values: Array) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().float().cpu().numpy()
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and that is refused
        return np.ascontiguousarray(values, "<f4")


def _chunks(features: Array) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows as float32) in order."""
    for first in range(0, features.shape[0], ROWS):
        yield first, _float32(features[first : first + ROWS])


def _checked(
    name: str, part: FeatureSet, features: Array, network: NetworkInfo, origin: Origin
) -> _Checked:
    """The set, read once. Raises BadFeatures for a row that is not finite, and for labels or paths
    that do not fit."""
    images, what = features.shape[0], _what(name, part)
    source = part.source or name
    paths = part.paths
    if paths is None:
        paths = [f"{source}/{row}" for row in range(images)]
    labels = None
    if part.labels is not None:
        labels = _labels(part.labels, images, network.classes, f"the labels of {what}")
    digests = _digests(features, what)
    # Labels and paths too: a cache with other ones is another cache.
    named = hashlib.sha256(digests.tobytes())
    named.update(repr((list(paths), labels)).encode())
    info = SetInfo(
        network=network,
        preprocessing=origin.preprocessing,
        precision=PRECISIONS[_dtype(features)],
        images=images,
        fingerprint=named.hexdigest(),
        paths=tuple(paths),
        labels=labels,
        versions={
            "lhact": lhact.__version__,
            "numpy": np.__version__,
            "torch": str(torch.__version__),
        },
    )
    try:
        SetInfo.from_json(info.to_json())  # as eval.py will read it
    except BadRecord as error:
        raise BadFeatures(f"{what}: {error}") from error
    return _Checked(features, digests, source, info)


def _labels(values: Array | Sequence[int], images: int, classes: int, what: str) -> tuple[int, ...]:
    """Class numbers as int. Raises BadFeatures where they are not one class for each image."""
    found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    while found.ndim > 1 and found.shape[-1] == 1:
        found = found[..., 0]
    if found.dtype.kind not in "iuf" or found.shape != (images,):
        raise BadFeatures(
            f"{what}: wanted {images} class numbers, got {found.dtype.name} of shape {found.shape}"
        )
    right = (found >= 0) & (found < classes) & (np.floor(found) == found)
    if not right.all():
        row = int(np.argmin(right))
        raise BadFeatures(
            f"{what}: wanted whole numbers from 0 to {classes - 1}, got {found[row]} in row {row}"
        )
    return tuple(found.astype(np.int64).tolist())


def _digests(features: Array, what: str) -> np.ndarray:
    """(images, 16) uint8 that tell the content of each row as float32."""
    found = []
    for first, rows in _chunks(features):
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise BadFeatures(
                f"{what} holds NaN or infinite values in row {first + int(np.argmin(finite))} (as "
                "float32)"
            )
        found += [hashlib.blake2b(row, digest_size=DIGEST_BYTES).digest() for row in rows]
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, DIGEST_BYTES)


def _write(folder: Path, name: str, part: _Checked, head: Mapping[str, Tensor]) -> None:
    """One set to the disk, the .json last."""
    info = part.info
    writer = SetWriter(folder, name, info)
    writer.prepare()
    with writer:
        for first, rows in _chunks(part.features):
            writer.write(first, rows, part.digests[first : first + len(rows)])
        writer.sync()
        writer.record(info.images)
        accuracy = identify.accuracy(writer.activations(), **head)
        writer.finish(accuracy)
    top1 = "" if accuracy is None else f", top-1 {accuracy:.2f} %"
    say(f"{name}: {info.images:,} images from {shown(part.source)}{top1}")
    if identify.wrong_labels(accuracy, info.images, len(set(info.labels or ()))):
        say(f"{name}: that is no better than guessing: labels, features or head are of another one")
