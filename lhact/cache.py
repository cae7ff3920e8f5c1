"""Activations to disk and back: one .npy and one .json per image set, and the linear head beside them.

The .json is written last: its presence means that the .npy is whole. A set that a run has begun and not completed has a .rows file,
which says how many rows of its .npy.part are safely on disk; the next run goes on from there.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

FORMAT = 1
SECONDS_BETWEEN_SYNCS = 10
# What decides which number stands in which row. A cache that differs in any of it is of something else.
IDENTITY = ("network", "preprocessing", "precision", "odin", "fingerprint")


class BadCache(Exception):
    """A cache that is missing, damaged, or of something else than was asked for; the message names the file and the mend."""


class Activations(NamedTuple):
    """One image set in the cache: (images, channels) float32 rows at `path`; metadata is its .json."""

    path: Path
    images: int
    channels: int
    metadata: dict[str, Any]

    @contextmanager
    def reader(self) -> Iterator[Callable[[int, int], np.ndarray]]:
        """read(start, count): those rows as a new array, for any number of threads at once.

        It raises BadCache if one of them is not finite, or if the file has become shorter.
        """
        with open(self.path, "rb", buffering=0) as file:
            _read_header(file, self.path)
            first = file.tell()

            def read(start: int, count: int) -> np.ndarray:
                rows = np.empty((count, self.channels), "<f4")
                room = memoryview(rows).cast("B")
                while room:
                    got = os.preadv(file.fileno(), [room], first + 4 * self.channels * (start + count) - len(room))
                    if not got:
                        raise BadCache(f"{self.path} has become shorter while it was read; {_REMAKE}")
                    room = room[got:]
                # Sums are cheaper than a look at each value; only a sum that is off is looked into.
                if not np.isfinite(rows.sum(axis=0)).all() and not np.isfinite(rows).all():
                    row = start + int(np.argmin(np.isfinite(rows).all(axis=1)))
                    raise BadCache(f"{self.path} holds NaN or infinite values in row {row}; {_REMAKE}")
                return rows

            yield read

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        """The rows in order as new arrays of at most `rows` rows. Raises BadCache as `reader` does."""
        with self.reader() as read:
            for start in range(0, self.images, rows):
                yield read(start, min(rows, self.images - start))

    def sample(self, count: int) -> tuple[np.ndarray, list[int]]:
        """At most `count` rows as a new array, and their numbers: one of each of that many equal parts, the same in every run.

        Which one of its part is drawn, since evenly spaced rows of a set whose order has a period are the same few again and again.
        Raises BadCache as `reader` does.
        """
        ends = [i * self.images // min(count, self.images) for i in range(min(count, self.images) + 1)]
        numbers = np.random.default_rng(0).integers(ends[:-1], ends[1:]).tolist()
        with self.reader() as read:
            return np.concatenate([read(number, 1) for number in numbers]), numbers


_REMAKE = "make it again with get_activation.py --overwrite"


def cache_folder(cache_dir: str | Path, benchmark: str, name: str) -> Path:
    """Where the activations of a benchmark lie for a network under that name."""
    return Path(cache_dir, benchmark, name)


def check_name(name: str, what: str) -> str:
    """`name`, if it can be a file name everywhere. Raises BadCache otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._+-]{0,99}", name):
        raise BadCache(f"{what} must be made of letters, digits, '.', '_', '+' and '-' and not start with '.', got {name!r}")
    return name


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process alone; the system lets go of it however the process ends.

    Raises BadCache if another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "wb") as file:
        try:
            # Not flock: its locks pass to child processes, and loader workers outlive a run that is killed by some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # which of them depends on the system
            raise BadCache(f"another run is writing to {folder}; wait for it, or give another --name") from error
        yield


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def save_head(folder: Path, weight: np.ndarray, bias: np.ndarray) -> None:
    """weight (classes, channels) and bias (classes,), float32, to head.npz."""
    content = io.BytesIO()
    np.savez(content, weight=weight.astype("<f4"), bias=bias.astype("<f4"))
    _write_atomically(folder / "head.npz", content.getvalue())


def load_head(folder: Path, classes: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """(weight, bias) from head.npz. Raises BadCache if it is missing, damaged or of another shape."""
    path = folder / "head.npz"
    try:
        with zipfile.ZipFile(path) as archive:
            weight = _read_member(archive, path, "weight", (classes, channels))
            bias = _read_member(archive, path, "bias", (classes,))
    except BadCache:
        raise
    except FileNotFoundError as error:
        raise BadCache(f"{path} is missing; {_REMAKE}") from error
    except Exception as error:  # zipfile, too, raises nearly anything on damaged input
        raise BadCache(f"{path} is damaged ({_first_line(error)}); {_REMAKE}") from error
    if not np.isfinite(weight).all() or not np.isfinite(bias).all():
        raise BadCache(f"{path} holds NaN or infinite values; {_REMAKE}")
    return weight, bias


def _read_member(archive: zipfile.ZipFile, path: Path, name: str, wanted: tuple[int, ...]) -> np.ndarray:
    """One array of an .npz, its header looked at before any memory is taken for what it promises."""
    if f"{name}.npy" not in archive.namelist():
        raise BadCache(f"{path} is damaged (it has no array {name!r}); {_REMAKE}")
    if archive.getinfo(f"{name}.npy").compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # numpy writes no other, and of the others zipfile unpacks more at once than it is asked for.
        raise BadCache(f"{path} is damaged ({name!r} is compressed in a way that numpy does not use); {_REMAKE}")
    size = 4 * math.prod(wanted)
    with archive.open(f"{name}.npy") as file:
        shape = _read_header(file, path, wanted, f"{name} ")
        content = file.read(size + 1)
    if len(content) != size:
        raise BadCache(f"{path} is damaged ({name!r} has not the {size} bytes of its shape {shape}); {_REMAKE}")
    return np.frombuffer(content, "<f4").reshape(shape).copy()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_header(file: BinaryIO, path: Path, wanted: tuple[int, ...] | None = None, what: str = "") -> tuple[int, ...]:
    """Moves to the first value; the shape. Raises BadCache for anything but little-endian float32 in C order, of the shape wanted
    or, by default, of any (images, channels)."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers of Python 2, and literals with odd escapes
            shape, fortran_order, dtype = read(file)
    except Exception as error:  # the header is a Python literal, and its parser raises nearly anything on damaged ones
        raise BadCache(f"{path} is not an .npy file that can be read ({_first_line(error)}); {_REMAKE}") from error
    fits = shape == wanted if wanted else len(shape) == 2 and all(size > 0 for size in shape)
    if not fits or fortran_order or dtype != np.dtype("<f4"):
        order = "Fortran" if fortran_order else "C"
        raise BadCache(
            f"{path} holds {what}{dtype}{shape} in {order} order, "
            f"wanted float32{wanted or ' (images, channels)'} in C order; {_REMAKE}"
        )
    return shape


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _are_texts(values: Iterable[Any]) -> bool:
    """Whether they are strings that can be written to a file: names of files in any encoding can, half a surrogate pair cannot."""
    try:
        "".join(values).encode("utf-8", "surrogateescape")
    except (TypeError, UnicodeEncodeError):
        return False
    return True


def _read_metadata(path: Path) -> dict[str, Any]:
    """The .json of an image set, checked for the fields and types that readers rely on."""
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise BadCache(f"{path} is missing, so {path.stem} is not complete; run get_activation.py to complete it") from error
    except (ValueError, RecursionError, OSError) as error:
        raise BadCache(f"{path} cannot be read ({error}); {_REMAKE}") from error
    if not isinstance(content, dict):
        raise BadCache(f"{path} is damaged (wanted a JSON object); {_REMAKE}")
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise BadCache(f"{path} has format {content['format']}, this version reads up to {FORMAT}; update this program")
    network = content.get("network")
    classes = network.get("classes") if isinstance(network, dict) else None
    images, paths, labels, accuracy = (content.get(key) for key in ("images", "paths", "labels", "accuracy"))
    problems = {
        "format": type(content.get("format")) is int and content["format"] == FORMAT,
        "network": type(classes) is int
        and type(network.get("channels")) is int
        and _are_texts(network[key] for key in ("arch", "weights", "checkpoint", "sha256") if network.get(key) is not None),
        "preprocessing": isinstance(content.get("preprocessing"), dict),
        "precision": _are_texts([content.get("precision")]),
        "fingerprint": isinstance(content.get("fingerprint"), str),
        "images": type(images) is int,
        "paths": isinstance(paths, list) and len(paths) == images and _are_texts(paths),
        "labels": labels is None
        or (
            isinstance(labels, list)
            and len(labels) == images
            and type(classes) is int
            and all(type(label) is int and 0 <= label < classes for label in labels)
        ),
        "accuracy": accuracy is None or (type(accuracy) in (int, float) and 0 <= accuracy <= 100),
    }
    for field, right in problems.items():
        if not right:
            raise BadCache(f"{path} is damaged: its {field!r} is missing or does not fit the rest; {_REMAKE}")
    return {"labels": None, "accuracy": None, "odin": None, **content}


def is_complete(folder: Path, dataset: str) -> bool:
    """Whether the image set is there and whole."""
    return (folder / f"{dataset}.json").exists()


def open_activations(folder: Path, dataset: str) -> Activations:
    """A complete image set. Raises BadCache if it is not complete, damaged, or its two files do not belong together."""
    metadata = _read_metadata(folder / f"{dataset}.json")
    path = folder / f"{dataset}.npy"
    wanted = (metadata["images"], metadata["network"]["channels"])
    try:
        with open(path, "rb") as file:
            shape = _read_header(file, path)
            size = file.tell() + 4 * shape[0] * shape[1]
            found = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BadCache(f"{path} cannot be read ({error.strerror}); {_REMAKE}") from error
    if shape != wanted:
        raise BadCache(f"{path} has shape {shape}, its .json says {wanted}; {_REMAKE}")
    if found != size:
        raise BadCache(f"{path} has {found} bytes, wanted {size} for shape {shape}; {_REMAKE}")
    return Activations(path, *shape, metadata)


def datasets(folder: Path) -> list[str]:
    """Names of the image sets, sorted. Raises BadCache if there are none, if a run has not completed all it set out to do, or if
    the .json of one is gone."""
    names = sorted(path.stem for path in folder.glob("*.json"))
    bare = sorted(path.stem for path in folder.glob("*.npy") if path.stem not in names)
    unfinished = sorted(path.stem for path in folder.glob("*.rows"))
    if unfinished:
        raise BadCache(
            f"{folder} is unfinished: {', '.join(unfinished)}; give the same get_activation.py command again, "
            "it goes on where it stopped"
        )
    if bare:
        # Left out without a word, a set would change every average.
        raise BadCache(f"{folder / bare[0]}.npy has no .json beside it; give the same get_activation.py command again")
    if not names:
        raise BadCache(f"{folder} holds no activations; make them with get_activation.py")
    return names


def begin(folder: Path, names: Iterable[str]) -> None:
    """Marks image sets as unfinished until each is complete, so that a run that ends early never passes for whole."""
    for name in names:
        record = folder / f"{name}.rows"
        if is_complete(folder, name):
            record.unlink(missing_ok=True)
        elif not record.exists():
            _write_atomically(record, b"{}")


def clear(folder: Path) -> None:
    """Removes every image set of the folder, and nothing else. Ended half-way, it leaves sets that are marked as unfinished."""
    names = {path.stem for suffix in ("json", "rows", "npy") for path in folder.glob(f"*.{suffix}")}
    for name in names:
        _write_atomically(folder / f"{name}.rows", b"{}")
    for suffix in ("json", "npy", "npy.part", "rows"):
        for name in names:
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What of IDENTITY differs, in words, where `wanted` has it."""
    lines = []
    paths = wanted.get("paths", [])
    wanted = {key: json.loads(json.dumps(wanted[key])) for key in IDENTITY if key in wanted}
    for key in wanted:
        if found.get(key) == wanted[key]:
            continue
        if key == "fingerprint":
            lines.append("other files: " + _file_difference(found.get("paths", []), paths))
        elif isinstance(wanted[key], Mapping) and isinstance(found.get(key), Mapping):
            lines += [
                f"{key} {field} {found[key].get(field)!r} in the cache, {value!r} now"
                for field, value in wanted[key].items()
                if found[key].get(field) != value
            ]
        else:
            lines.append(f"{key} {found.get(key)!r} in the cache, {wanted[key]!r} now")
    return lines


def _file_difference(cached: list[str], now: list[str]) -> str:
    gone, new = sorted(set(cached) - set(now)), sorted(set(now) - set(cached))
    if not gone and not new:
        return "the same names, but other file sizes"
    return " and ".join(f"{len(some)} {word}, such as {_shown(some[0])}" for some, word in ((gone, "gone"), (new, "new")) if some)


def _shown(path: str) -> str:
    """The path as a message can hold it: on one line, whatever its characters and encoding."""
    return path if path.isprintable() else ascii(path)[1:-1]


class Writer:
    """The rows of one image set on their way to disk, in order. A context manager; `finish` makes the set complete.

    rows: how many are there already, from a run of the same kind that did not finish; go on with the next one.
    metadata: all of the .json but what `finish` adds. A run goes on from an unfinished one only where all of that is the same:
    other batches, another device or another library could give other last bits.
    """

    def __init__(self, folder: Path, dataset: str, metadata: Mapping[str, Any]) -> None:
        self.folder, self.dataset = folder, dataset
        self.metadata = {"format": FORMAT, **metadata}
        self.key = hashlib.sha256(json.dumps(self.metadata, sort_keys=True).encode()).hexdigest()
        self.shape = (metadata["images"], metadata["network"]["channels"])
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": self.shape})
        self.header = header.getvalue()
        self.part = folder / f"{dataset}.npy.part"
        self.record = folder / f"{dataset}.rows"
        self.rows = 0

    def __enter__(self) -> "Writer":
        self.rows = self._rows_on_disk()
        self.file = open(self.part, "r+b" if self.rows else "wb")
        if not self.rows:
            self.file.write(self.header)
        self.file.seek(len(self.header) + 4 * self.rows * self.shape[1])
        self.file.truncate()
        self._sync()
        return self

    def _rows_on_disk(self) -> int:
        try:
            record = json.loads(self.record.read_bytes())
            rows = record["rows"]
            if record["key"] != self.key or type(rows) is not int or not 0 <= rows <= self.shape[0]:
                return 0
            whole = self.folder / f"{self.dataset}.npy"
            if rows == self.shape[0] and whole.exists() and not self.part.exists():
                # The last run ended between giving the rows their name and writing the .json.
                os.replace(whole, self.part)
            with open(self.part, "rb") as file:
                # To the byte: a damaged header could be a right one of another length, and every row would be moved.
                fits = file.read(len(self.header)) == self.header
                there = (os.fstat(file.fileno()).st_size - file.tell()) // (4 * self.shape[1])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, BadCache):
            return 0
        return rows if fits and rows <= there else 0

    def write(self, rows: np.ndarray) -> None:
        """Appends (n, channels) float32 rows."""
        self.file.write(np.ascontiguousarray(rows, "<f4").data)
        self.rows += len(rows)
        if time.monotonic() - self.synced > SECONDS_BETWEEN_SYNCS:
            self._sync()

    def _sync(self) -> None:
        """First the rows, then the number of them: whenever the power goes, no row is promised that is not there."""
        self.file.flush()
        os.fsync(self.file.fileno())
        _write_atomically(self.record, json.dumps({"rows": self.rows, "key": self.key}).encode())
        self.synced = time.monotonic()

    def activations(self) -> Activations:
        """All rows, to be read back before the set is finished."""
        self._sync()
        return Activations(self.part, *self.shape, self.metadata)

    def finish(self, **results: Any) -> None:
        """The set is complete: the .npy gets its name, then the .json appears. results: further entries of the .json."""
        if self.rows != self.shape[0]:
            raise RuntimeError(f"{self.dataset} has {self.rows} rows, wanted {self.shape[0]}")
        self._sync()
        self.file.close()
        os.replace(self.part, self.folder / f"{self.dataset}.npy")
        _sync_folder(self.folder)
        _write_atomically(self.folder / f"{self.dataset}.json", json.dumps({**self.metadata, **results}, indent=1).encode())
        self.record.unlink()

    def __exit__(self, *_: object) -> None:
        if not self.file.closed:
            try:
                self._sync()
            finally:
                self.file.close()
