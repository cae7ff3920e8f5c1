"""A cache folder in, its image sets as typed records and arrays out; cache_writer.py is the other
way.

    <folder>/<dataset>.npy     (images, channels) float32, C order
    <folder>/<dataset>.json    what the rows are, see records.SetInfo; its presence means complete
    <folder>/head.npz          weight (classes, channels) and bias (classes,), float32
    <folder>/odin/             the same sets, of images that ODIN has perturbed
    <folder>/selection/        sets that settings are selected on, never tested on

A set that a run has begun and not completed has a .rows file.
"""

import dataclasses
import json
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lhact.files import naming
from lhact.messages import InputError, first_line, shown
from lhact.records import (
    FORMAT,
    BadRecord,
    NetworkInfo,
    Perturbation,
    RecordedPreprocessing,
    SetInfo,
)

ID, CALIBRATION = "id", "calibration"
# Sets that are no OOD sets, and what a table calls the mean over those: names that none may have.
RESERVED = (ID, CALIBRATION, "average", "near average", "far average")
PERTURBED, SELECTION = "odin", "selection"
MOST_HEADER_BYTES = 10_000
REMAKE = "make it again with get_activation.py --overwrite"

Stamp = tuple[int, ...]
Record = NetworkInfo | RecordedPreprocessing | Perturbation


class BadCache(InputError, ValueError):
    """A cache that is missing, damaged, or of something else than was asked for; the message names
    the file and the mend."""


@dataclass(frozen=True)
class Activations:
    """One image set in the cache: (images, channels) float32 rows at `path`, and what they are.

    stamp: what the file system said of the file when it was opened; see `stamp_of`.
    """

    path: Path
    info: SetInfo
    stamp: Stamp | None = None

    @property
    def images(self) -> int:
        return self.info.images

    @property
    def channels(self) -> int:
        return self.info.channels

    @contextmanager
    def reader(self) -> Iterator[Callable[[int, int], np.ndarray]]:
        """read(start, count): those rows as a new array, for any number of threads at once.

        It raises BadCache if one of them is not finite, if the file has become shorter, or if it is
        not the one that was opened.
        """
        with open_regular(self.path) as file:
            if self.stamp is not None and stamp_of(file.fileno()) != self.stamp:
                raise BadCache(f"{self.path} was replaced after it had been opened; start again")
            _read_header(file, self.path)
            first = file.tell()

            def read(start: int, count: int) -> np.ndarray:
                rows = np.empty((count, self.channels), "<f4")
                buffer = rows.data.cast("B")
                end = first + 4 * self.channels * (start + count)
                while buffer:
                    with naming(self.path):
                        got = os.preadv(file.fileno(), [buffer], end - len(buffer))
                    if not got:
                        raise _damaged(self.path, "has become shorter while it was read")
                    buffer = buffer[got:]
                # A sum is cheaper than a look at each value; only one that is off is looked into.
                if not np.isfinite(rows.sum(axis=0)).all() and not np.isfinite(rows).all():
                    row = start + int(np.argmin(np.isfinite(rows).all(axis=1)))
                    raise _damaged(self.path, f"holds NaN or infinite values in row {row}")
                return rows

            yield read

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        """The rows in order as new arrays of at most `rows` rows. Raises BadCache as `reader`."""
        with self.reader() as read:
            for start in range(0, self.images, rows):
                yield read(start, min(rows, self.images - start))

    def sample(self, count: int) -> tuple[np.ndarray, list[int]]:
        """At most `count` rows as a new array, and their numbers: one of each of that many equal
        parts, the same in every run. Raises BadCache as `reader`.

        The row within its part is drawn, since evenly spaced rows of a set whose order has a period
        are the same few again and again.
        """
        parts = min(count, self.images)
        ends = [i * self.images // parts for i in range(parts + 1)]
        numbers = np.random.default_rng(0).integers(ends[:-1], ends[1:]).tolist()
        with self.reader() as read:
            return np.concatenate([read(number, 1) for number in numbers]), numbers


@dataclass(frozen=True)
class Cache:
    """A complete cache, opened.

    sets: `id`, `calibration` where it is there, then the OOD sets in the order of the report.
    weight (classes, channels), bias (classes,): the head, float32.
    stamps: of the files that were read when it was opened.
    """

    folder: Path
    sets: Mapping[str, Activations]
    weight: np.ndarray
    bias: np.ndarray
    stamps: Mapping[Path, Stamp]

    @property
    def id(self) -> Activations:
        return self.sets[ID]

    @property
    def info(self) -> SetInfo:
        """That of the ID set; all sets have its network, preprocessing and precision."""
        return self.id.info

    @property
    def calibration(self) -> Activations:
        """The set that thresholds and statistics come from: the ID test images where there is no
        other."""
        return self.sets.get(CALIBRATION, self.id)

    @property
    def ood(self) -> list[str]:
        return [name for name in self.sets if name not in (ID, CALIBRATION)]

    def without(self, name: str) -> "Cache":
        """The cache without that set."""
        return dataclasses.replace(
            self, sets={other: self.sets[other] for other in self.sets if other != name}
        )

    def perturbed(self, name: str) -> Activations:
        """The activations of the set's images as ODIN has perturbed them.

        Raises BadCache where they are not there or are of other images or another network.
        """
        perturbed = open_set(self.folder / PERTURBED, name)
        check_same_origin(perturbed, self.id, name)
        if perturbed.info.fingerprint != self.sets[name].info.fingerprint:
            raise _damaged(perturbed.path, "is of other files")
        return perturbed

    def check_unchanged(self) -> None:
        """Raises BadCache if a file that was read has been replaced since the cache was opened."""
        for path, stamp in self.stamps.items():
            try:
                changed = stamp_of(path) != stamp
            except OSError:
                changed = True
            if changed:
                raise BadCache(f"{path} was replaced while it was evaluated; start again")


def _damaged(path: Path, what: str) -> BadCache:
    return BadCache(f"{path} {what}; {REMAKE}")


def cache_folder(cache_dir: str | Path, benchmark: str, name: str) -> Path:
    """Where the activations of a benchmark lie for a network under that name."""
    return Path(cache_dir, benchmark, name)


def default_name(arch: str) -> str:
    """The name that a network's activations are cached under where none is given."""
    return re.sub(r"[^A-Za-z0-9._+-]", "-", arch)


def check_name(name: str, what: str) -> str:
    """`name`, if it can be a file name everywhere. Raises BadCache otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._+-]{0,99}", name):
        raise BadCache(
            f"{what} must be made of letters, digits, '.', '_', '+' and '-' and not start with "
            f"'.', got {name!r}"
        )
    return name


def check_distinct(names: Iterable[str]) -> None:
    """Raises BadCache for image sets whose files would be the same on some systems, and for OOD
    sets of a reserved name."""
    known: dict[str, str] = {}
    for name in sorted(set(names)):
        if name.lower() in RESERVED and name not in (ID, CALIBRATION):
            raise BadCache(f"an OOD set cannot be called {name!r}; give it another name")
        if (other := known.setdefault(name.lower(), name)) != name:
            raise BadCache(f"{other} and {name} differ by letter case alone; give another name")


def stamp_of(file: int | Path) -> Stamp:
    """What changes when a file is replaced: device, inode, size and modification time."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_regular(path: Path) -> BinaryIO:
    """The file, opened for reading. Raises OSError for a pipe or a device, which could be waited
    for without end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is no regular file", str(path))
    return open(descriptor, "rb", buffering=0)


def open_cache(folder: Path, order: Sequence[str] = ()) -> Cache:
    """All image sets of a folder: OOD sets in the given order, others behind by name.

    Raises BadCache if it is missing, unfinished or damaged, has no ID or no OOD set, or mixes
    networks, preprocessing or precision.
    """
    names = datasets(folder)
    if ID not in names or not set(names) - {ID, CALIBRATION}:
        lacking = "OOD set" if ID in names else "ID set"
        raise BadCache(f"{folder} has no {lacking}; complete it with get_activation.py")
    ordered = [name for name in (ID, CALIBRATION, *order) if name in names]
    head = folder / "head.npz"
    stamps = {head: stamp_of(head)} if head.exists() else {}
    sets = {name: open_set(folder, name) for name in dict.fromkeys([*ordered, *names])}
    network = sets[ID].info.network
    for name, activations in sets.items():
        check_same_origin(activations, sets[ID], name)
        stamps[activations.path] = activations.stamp or ()
    return Cache(folder, sets, *load_head(folder, network.classes, network.channels), stamps)


def datasets(folder: Path) -> list[str]:
    """Names of the image sets, sorted.

    Raises BadCache if there are none, if a run has not completed all it set out to do, or if the
    .json of one is gone.
    """
    names = sorted(path.stem for path in folder.glob("*.json"))
    bare = sorted(path.stem for path in folder.glob("*.npy") if path.stem not in names)
    unfinished = sorted(path.stem for path in folder.glob("*.rows"))
    if unfinished:
        raise BadCache(
            f"{folder} is unfinished: {', '.join(map(shown, unfinished))}; give the same "
            "get_activation.py command again (or that of lhact.features), it goes on where it "
            "stopped"
        )
    if bare:
        # Left out without a word, a set would change every average.
        raise BadCache(
            f"{folder / shown(bare[0])}.npy has no .json beside it; give the same "
            "get_activation.py command again"
        )
    if not names:
        raise BadCache(f"{folder} holds no activations; make them with get_activation.py")
    for name in names:
        check_name(name, f"the name of an image set in {folder}")
    return names


def is_complete(folder: Path, dataset: str) -> bool:
    """Whether the image set is there and whole."""
    return (folder / f"{dataset}.json").exists()


def open_set(folder: Path, dataset: str) -> Activations:
    """A complete image set. Raises BadCache if it is not complete, damaged, or its two files do not
    belong together."""
    info = _read_info(folder / f"{dataset}.json")
    path = folder / f"{dataset}.npy"
    wanted = (info.images, info.channels)
    try:
        with open_regular(path) as file:
            shape = _read_header(file, path)
            size = file.tell() + 4 * shape[0] * shape[1]
            stamp = stamp_of(file.fileno())
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error
    if shape != wanted:
        raise _damaged(path, f"has shape {shape}, its .json says {wanted}")
    found = stamp[2]
    if found != size:
        raise _damaged(path, f"has {found} bytes, wanted {size} for shape {shape}")
    return Activations(path, info, stamp)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _read_info(path: Path) -> SetInfo:
    """The .json of an image set, checked for the fields and types that readers rely on."""
    try:
        with open_regular(path) as file:
            content = json.loads(file.read(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise BadCache(
            f"{path} is missing, so {path.stem} is not complete; run get_activation.py to complete "
            "it"
        ) from error
    except (ValueError, RecursionError, OSError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    number = content.get("format") if isinstance(content, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise BadCache(
            f"{path} has format {number}, this version reads up to {FORMAT}; update this program"
        )
    try:
        return SetInfo.from_json(content)
    except BadRecord as error:
        raise _damaged(path, f"is damaged: {error}") from error


def _read_header(file: BinaryIO, path: Path) -> tuple[int, int]:
    """Moves to the first value; the shape. Raises BadCache for anything but little-endian float32
    (images, channels) in C order."""
    try:
        version = np.lib.format.read_magic(file)
        start = file.tell()
        length = int.from_bytes(file.read(4), "little")
        if version != (1, 0) and length > MOST_HEADER_BYTES:  # it may promise 4 GB
            raise ValueError(f"its header has {length} bytes, wanted {MOST_HEADER_BYTES} at most")
        file.seek(start)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers of Python 2, and odd escapes
            shape, fortran_order, dtype = read(file)
    except Exception as error:  # numpy's parser raises nearly anything on a damaged header
        what = f"is not an .npy file that can be read ({first_line(error)})"
        raise _damaged(path, what) from error
    right = len(shape) == 2 and min(shape) > 0 and not fortran_order and dtype == np.dtype("<f4")
    if not right:
        found = f"{dtype}{shape} in {'Fortran' if fortran_order else 'C'} order"
        raise _damaged(path, f"holds {found}, wanted float32 (images, channels) in C order")
    return shape[0], shape[1]


def load_head(folder: Path, classes: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """(weight, bias) from head.npz. Raises BadCache if it is missing, damaged or of another
    shape."""
    path = folder / "head.npz"
    wanted = {"weight": (classes, channels), "bias": (classes,)}
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as archive:
                # What it would take unpacked, before any memory is taken for it.
                size = sum(member.file_size for member in archive.infolist())
            most = 4 * classes * (channels + 1) + 4096
            if size > most:
                raise ValueError(f"{size} bytes unpacked, wanted {most} at most")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                # numpy gives a member that is no array as bytes.
                arrays = {name: np.asarray(archive[name]) for name in wanted}
    except FileNotFoundError as error:
        raise _damaged(path, "is missing") from error
    except Exception as error:  # zipfile and numpy raise nearly anything on damaged input
        raise _damaged(path, f"is damaged ({first_line(error)})") from error
    for name, array in arrays.items():
        if array.shape != wanted[name] or array.dtype != np.dtype("<f4"):
            found = f"{name} {array.dtype}{array.shape}"
            raise _damaged(path, f"holds {found}, wanted float32{wanted[name]}")
        if not np.isfinite(array).all():
            raise _damaged(path, "holds NaN or infinite values")
    return np.ascontiguousarray(arrays["weight"]), np.ascontiguousarray(arrays["bias"])


def check_same_origin(activations: Activations, reference: Activations, name: str) -> None:
    """Raises BadCache unless both are of one network, preprocessing and precision."""
    if lines := origin_differences(activations.info, reference.info):
        raise BadCache(
            f"{activations.path} is of something else than the ID set beside it: {name} has "
            f"{'; '.join(lines)}; {REMAKE}"
        )


def origin_differences(found: SetInfo, wanted: SetInfo) -> list[str]:
    """What of network, preprocessing and precision differs, in words."""
    lines = [
        *_field_differences("network", found.network, wanted.network),
        *_field_differences("preprocessing", found.preprocessing, wanted.preprocessing),
    ]
    if found.precision != wanted.precision:
        lines.append(f"precision {found.precision!r} in the cache, {wanted.precision!r} now")
    return lines


def differences(found: SetInfo, wanted: SetInfo) -> list[str]:
    """What differs of all that decides which number stands in which row, in words."""
    lines = origin_differences(found, wanted)
    lines += _field_differences("odin", found.perturbation, wanted.perturbation)
    if found.fingerprint != wanted.fingerprint:
        same_names = found.network.given_as and found.paths == wanted.paths
        difference = _file_difference(found.paths, wanted.paths)
        lines.append("other features or labels" if same_names else f"other files: {difference}")
    return lines


def _field_differences(name: str, found: Record | None, wanted: Record | None) -> list[str]:
    old, new = (record.to_json() if record else {} for record in (found, wanted))
    keys = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    return [
        shown(f"{name} {key} {old.get(key)!r} in the cache, {new.get(key)!r} now") for key in keys
    ]


def _file_difference(cached: Sequence[str], now: Sequence[str]) -> str:
    gone, new = sorted(set(cached) - set(now)), sorted(set(now) - set(cached))
    if not gone and not new:
        return "the same names, but other file sizes"
    return " and ".join(
        f"{len(paths)} {word}, such as {shown(paths[0])}"
        for paths, word in ((gone, "gone"), (new, "new"))
        if paths
    )
