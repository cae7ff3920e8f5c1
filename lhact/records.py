"""Values of the program in, the .json of a cached image set out, and back: the records that travel
between the rooms.

Each record is a frozen dataclass. `to_json` gives what stands in the file (format 1); `from_json`
takes what a file holds, checks it, and raises BadRecord where a field that readers rely on is
missing or does not fit the rest.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

P = TypeVar("P", bound="RecordedPreprocessing")
Channels = tuple[float, float, float]

FORMAT = 1
# The key in a network's settings, which no argument of a builder can have, where features were
# given instead of extracted; and what was given.
GIVEN = "features given as"
ACTIVATIONS, LOGITS = "activations", "logits"


class BadRecord(ValueError):
    """A field of a .json is missing, of another type, or does not fit the rest; the message names
    it."""


@dataclass(frozen=True)
class RecordedPreprocessing:
    """Preprocessing as far as it is known: what a cache records, where caches of other tools may
    lack a step, or what a user gives. None stands for the rest."""

    resize: int | None = None
    crop: int | None = None
    interpolation: str | None = None
    mean: Channels | None = None
    std: Channels | None = None
    squash: bool | None = None

    @property
    def known(self) -> list[str]:
        """The names of the steps that are known."""
        return [name for name, value in vars(self).items() if value is not None]

    def over(self, other: P) -> P:
        """The steps that are known, and the rest as in the other record, whose type it has."""
        return dataclasses.replace(other, **{name: getattr(self, name) for name in self.known})

    def to_json(self) -> dict[str, object]:
        """What is not known is left out, and so is `squash` where it is not so."""
        values = {name: getattr(self, name) for name in self.known}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not False
        }

    @staticmethod
    def from_json(content: object) -> "RecordedPreprocessing":
        """null stands for a step that was left out: no resize, no mean subtracted, no division by
        std."""
        if not isinstance(content, Mapping):
            raise BadRecord("its 'preprocessing' is missing or is no JSON object")
        left_out = {"resize": 0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "squash": False}
        values = {
            key: left_out.get(key)
            if content[key] is None
            else _preprocessing_value(key, content[key])
            for key in ("resize", "crop", "interpolation", "mean", "std", "squash")
            if key in content
        }
        # Where it is not so, it is left out.
        return RecordedPreprocessing(**{"squash": False, **values})  # type: ignore[arg-type]


def _preprocessing_value(key: str, value: Any) -> int | str | Channels:
    if key == "squash" and isinstance(value, bool):
        return value
    if key in ("resize", "crop") and _is_number(value) and value >= 0 and value % 1 == 0:
        return int(value)
    if key == "interpolation" and isinstance(value, str) and _is_text(value):
        return value
    if (
        key in ("mean", "std")
        and isinstance(value, list)
        and len(value) == 3
        and all(map(_is_number, value))
    ):
        return (float(value[0]), float(value[1]), float(value[2]))
    raise BadRecord(f"its 'preprocessing' has a {key} that is not usable: {ascii(value)[:80]}")


@dataclass(frozen=True)
class Preprocessing(RecordedPreprocessing):
    """From a decoded RGB image to the network's input: shorter side to `resize` pixels (0: the size
    is left alone; with `squash` both sides, whatever the shape), centre crop of `crop` pixels,
    values to [0, 1], minus `mean`, divided by `std` (per RGB channel). The defaults are the
    protocol of the ImageNet table."""

    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"
    mean: Channels = (0.485, 0.456, 0.406)
    std: Channels = (0.229, 0.224, 0.225)
    squash: bool = False


@dataclass(frozen=True)
class NetworkInfo:
    """Which network. weights: the name under which they are published; checkpoint: the file's name;
    sha256: of the state dict. classes and channels: the shape of the linear head. settings: what a
    state dict does not hold, such as arguments of the builder."""

    arch: str | None
    weights: str | None
    checkpoint: str | None
    sha256: str | None
    classes: int
    channels: int
    settings: Mapping[str, str] | None = None

    @property
    def given_as(self) -> str | None:
        """ACTIVATIONS or LOGITS where they come from elsewhere; None where they were extracted."""
        return (self.settings or {}).get(GIVEN)

    def to_json(self) -> dict[str, object]:
        values = dataclasses.asdict(self)
        return values if self.settings else {k: v for k, v in values.items() if k != "settings"}

    @staticmethod
    def from_json(content: object) -> "NetworkInfo":
        content = content if isinstance(content, Mapping) else {}
        texts = {key: content.get(key) for key in ("arch", "weights", "checkpoint", "sha256")}
        counts = {key: content.get(key) for key in ("classes", "channels")}
        right = [text is None or _is_text(text) for text in texts.values()]
        if not all(right) or not all(type(count) is int for count in counts.values()):
            raise BadRecord("its 'network' is missing or does not fit the rest")
        settings = content.get("settings")
        if settings is not None and not (
            isinstance(settings, Mapping) and _are_texts([*settings, *settings.values()])
        ):
            raise BadRecord("its 'network' has settings that are not texts by name")
        return NetworkInfo(**texts, **counts, settings=settings)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Perturbation:
    """What ODIN did to the images: moved by `epsilon` against the gradient of logits /
    `temperature`."""

    temperature: float
    epsilon: float

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(content: object) -> "Perturbation":
        content = content if isinstance(content, Mapping) else {}
        values = [content.get(key) for key in ("temperature", "epsilon")]
        if not all(map(_is_number, values)):
            raise BadRecord("its 'odin' is not a temperature and an epsilon")
        return Perturbation(*values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SetInfo:
    """One cached image set: what decides which number stands in which row, and what is known of the
    images.

    paths: of the images, in the order of the rows. labels: class indices, None where they are not
    known. fingerprint: what identifies the files by name and size; modified: by their modification
    times; content: by what they hold. perturbation: None for the images as they are. accuracy:
    top-1 of the network, in percent.
    """

    network: NetworkInfo
    preprocessing: RecordedPreprocessing
    precision: str
    images: int
    fingerprint: str
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    perturbation: Perturbation | None = None
    batch_size: int | None = None
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    accuracy: float | None = None
    modified: str | None = None
    content: str | None = None

    @property
    def channels(self) -> int:
        return self.network.channels

    def to_json(self) -> dict[str, object]:
        known = {"modified": self.modified, "content": self.content}
        return {
            "format": FORMAT,
            "network": self.network.to_json(),
            "preprocessing": self.preprocessing.to_json(),
            "precision": self.precision,
            "odin": None if self.perturbation is None else self.perturbation.to_json(),
            "images": self.images,
            "channels": self.channels,
            "fingerprint": self.fingerprint,
            "batch_size": self.batch_size,
            "device": self.device,
            "versions": dict(self.versions),
            "labels": None if self.labels is None else list(self.labels),
            "paths": list(self.paths),
            "accuracy": self.accuracy,
            **{key: value for key, value in known.items() if value is not None},
        }

    @staticmethod
    def from_json(content: object) -> "SetInfo":
        if not isinstance(content, Mapping):
            raise BadRecord("it is no JSON object")
        network = NetworkInfo.from_json(content.get("network"))
        perturbation = content.get("odin")
        texts = ("precision", "fingerprint", "modified", "content", "device")
        values = {key: content.get(key) for key in (*texts, "images", "accuracy", "batch_size")}
        paths, labels, versions = (content.get(key) for key in ("paths", "labels", "versions"))
        images, accuracy = values["images"], values["accuracy"]
        right = {
            "format": type(content.get("format")) is int and content["format"] == FORMAT,
            **{key: _is_text(values[key]) for key in ("precision", "fingerprint")},
            **{key: values[key] is None or _is_text(values[key]) for key in texts[2:]},
            "batch_size": values["batch_size"] is None or type(values["batch_size"]) is int,
            "images": type(images) is int,
            "paths": isinstance(paths, list) and len(paths) == images and _are_texts(paths),
            "labels": labels is None
            or (
                isinstance(labels, list)
                and len(labels) == images
                and _are_labels(labels, network.classes)
            ),
            "accuracy": accuracy is None or (_is_number(accuracy) and 0 <= accuracy <= 100),
        }
        for name, is_right in right.items():
            if not is_right:
                raise BadRecord(f"its {name!r} is missing or does not fit the rest")
        return SetInfo(
            network=network,
            preprocessing=RecordedPreprocessing.from_json(content.get("preprocessing")),
            paths=tuple(paths),  # type: ignore[arg-type]
            labels=None if labels is None else tuple(labels),
            perturbation=None if perturbation is None else Perturbation.from_json(perturbation),
            versions=versions if isinstance(versions, Mapping) else {},
            **values,  # type: ignore[arg-type]
        )


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and _are_texts([value])


def _are_texts(values: Iterable[object]) -> bool:
    """Whether they are strings that can be written to a file: file names in any encoding can, half
    a surrogate pair cannot."""
    try:
        "".join(values).encode("utf-8", "surrogateescape")  # type: ignore[arg-type]
    except (TypeError, UnicodeEncodeError):
        return False
    return True


def _are_labels(labels: list[object], classes: int) -> bool:
    return all(type(label) is int and 0 <= label < classes for label in labels)
