"""Activations in, a cache folder out, such that a run that ends at any moment loses nothing and
leaves nothing that passes for whole.

A set that has been begun has a .rows file, which says how many of the first rows of its .npy.part
are safely on disk; the next run goes on from there. The .json is written last. Several processes
may write rows of one set, each its own: the first of them prepares, records and finishes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lhact.cache import (
    PERTURBED,
    SELECTION,
    Activations,
    BadCache,
    check_distinct,
    differences,
    is_complete,
    open_set,
    origin_differences,
)
from lhact.files import naming
from lhact.records import SetInfo

DIGEST_BYTES = 16
NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@dataclasses.dataclass(frozen=True)
class Lock:
    """A cache folder that is held by this run. remark: what the file system lacks, if anything."""

    path: Path
    token: bytes
    remark: str | None

    def check(self) -> None:
        """Raises BadCache if another run holds the folder too, which a removed lock file allows."""
        try:
            held = self.path.read_bytes() == self.token
        except OSError:
            held = False
        if not held:
            raise BadCache(
                f"{self.path} was removed or taken over by another run, so this one ends; start it "
                "again when no other is at work"
            )


@contextmanager
def lock(folder: Path) -> Iterator[Lock]:
    """Makes the folder and holds it for this process alone; the system lets go of it however the
    process ends.

    Raises BadCache if another run holds it. Where the file system has no locks, a run that comes
    later takes the folder over and the earlier one ends; see Lock.check.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    remark = None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise BadCache(
            f"{path} cannot be opened: {error.strerror}; remove what lies there"
        ) from error
    with open(descriptor, "r+b", buffering=0) as file:
        try:
            # Not flock: its locks pass to child processes, and loader workers outlive a run that is
            # killed by some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # which of them depends on the system
                raise BadCache(
                    f"another run is writing to {folder}; wait for it, or give another --name"
                ) from error
            if error.errno not in NOT_SUPPORTED:
                raise
            remark = (
                f"the file system of {folder} has no locks ({error.strerror}): let only one run at "
                "a time write there, or give a --cache-dir elsewhere"
            )
        token = f"{os.getpid()} {secrets.token_hex(8)}".encode()
        file.truncate(0)
        file.write(token)
        yield Lock(path, token, remark)


def _sync_folder(folder: Path) -> None:
    """Brings the names in the folder to the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _create(path: Path) -> int:
    """A new file of that name, open for reading and writing. What bore the name is let go of, so
    that no link that lies there is followed and nobody else's file is changed."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def write_atomically(path: Path, content: bytes) -> None:
    """The file is there with all of the content, or as it was before."""
    temporary = path.with_name(path.name + ".part")
    with naming(path), open(_create(temporary), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def save_head(folder: Path, weight: np.ndarray, bias: np.ndarray) -> None:
    """weight (classes, channels) and bias (classes,), float32, to head.npz."""
    content = io.BytesIO()
    np.savez(content, weight=weight.astype("<f4"), bias=bias.astype("<f4"))
    write_atomically(folder / "head.npz", content.getvalue())


Place = tuple[Path, str]


def prepare(
    folder: Path,
    wanted: Mapping[Place, SetInfo],
    overwrite: bool,
    same_content: Callable[[Place, SetInfo], bool],
) -> list[Place]:
    """The (folder, dataset) of those wanted sets that are complete already; the others are marked
    as begun.

    overwrite: make the wanted sets anew, whatever is there. same_content: decides by reading the
    images whether files that bear other modification times are those of a cached set.

    Raises BadCache, before any change, if the folder holds something else: a wanted set of other
    images, or any set of another network, preprocessing or precision; and for names that differ by
    letter case alone.
    """
    there = [path.stem for kind in ("json", "rows") for path in folder.glob(f"*.{kind}")]
    check_distinct([*there, *(dataset for place, dataset in wanted if place == folder)])
    reference = next(iter(wanted.values()))
    complete = []
    for place in (folder, folder / PERTURBED, folder / SELECTION):
        if place.is_symlink() and place != folder:
            raise BadCache(f"{place} is a link; a cache has folders of its own there")
        for path in sorted(place.glob("*.json")):
            key = (place, path.stem)
            if key in wanted and overwrite:
                continue
            if key not in wanted and place != folder and not overwrite:
                continue
            if _agrees(key, wanted.get(key), reference, overwrite, same_content):
                complete.append(key)
    for place in {place for place, _ in wanted}:
        place.mkdir(exist_ok=True)
    if overwrite:
        for place, dataset in wanted:
            _clear(place, dataset)
    for place, dataset in wanted:
        _begin(place, dataset)
    return complete


def _agrees(
    key: Place,
    wanted: SetInfo | None,
    reference: SetInfo,
    overwrite: bool,
    same_content: Callable[[Place, SetInfo], bool],
) -> bool:
    """Whether the cached set is the wanted one. Raises BadCache if it is of something else."""
    place, dataset = key
    activations = open_set(place, dataset)
    lines = (
        differences(activations.info, wanted)
        if wanted
        else origin_differences(activations.info, reference)
    )
    if lines and overwrite:
        raise BadCache(
            f"{activations.path} is of something else ({'; '.join(lines)}), and this run does not "
            "make it anew; ask for that set too, or give another --name"
        )
    if not lines and wanted and not same_content(key, activations.info):
        lines = ["other files: the same names and sizes, but other content"]
    if lines:
        raise BadCache(
            f"{activations.path} is of something else: {'; '.join(lines)}; give --overwrite to "
            "replace it, or another --name"
        )
    return wanted is not None


def _begin(folder: Path, dataset: str) -> None:
    """Marks an image set as unfinished until it is complete, so that a run that ends early never
    passes for whole."""
    record = folder / f"{dataset}.rows"
    if is_complete(folder, dataset):
        # What a run left that ended while it tidied up, the record last.
        (folder / f"{dataset}.digests").unlink(missing_ok=True)
        record.unlink(missing_ok=True)
    elif not record.exists():
        write_atomically(record, b"{}")


def _clear(folder: Path, dataset: str) -> None:
    """Removes an image set. Ended half-way, it leaves a set that is marked as unfinished."""
    write_atomically(folder / f"{dataset}.rows", b"{}")
    for suffix in ("json", "npy", "npy.part", "digests"):
        (folder / f"{dataset}.{suffix}").unlink(missing_ok=True)


def write_info(folder: Path, dataset: str, info: SetInfo) -> None:
    """The .json of a set whose rows are all on the disk under their name."""
    text = json.dumps(info.to_json(), indent=1)
    write_atomically(folder / f"{dataset}.json", text.encode())


class SetWriter:
    """The rows of one image set on their way to disk, in any order, by one process or several.

    The first process calls `prepare`, then every process uses it as a context manager and writes
    its rows. What `sync` has brought to the disk, `record` may promise, at the first process alone;
    `finish` makes the set complete.

    A run goes on from an unfinished one only where all of `info` is the same: other batches,
    another device or another library could give other last bits, and files that were changed in
    between other rows.
    """

    def __init__(self, folder: Path, dataset: str, info: SetInfo) -> None:
        self.folder, self.dataset, self.info = folder, dataset, info
        self.description = json.dumps(info.to_json(), sort_keys=True)
        header = io.BytesIO()
        shape = (info.images, info.channels)
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        self.header = header.getvalue()
        self.row_bytes = 4 * info.channels
        self.part = folder / f"{dataset}.npy.part"
        self.digests = folder / f"{dataset}.digests"
        self.record_path = folder / f"{dataset}.rows"
        self.failed = False
        self.recorded = 0

    def prepare(self) -> int:
        """Makes the files that the rows go to; the number of first rows that are there already."""
        rows = self._rows_on_disk()
        sizes = {
            self.part: (len(self.header), self.row_bytes),
            self.digests: (0, DIGEST_BYTES),
        }
        for path, (start, width) in sizes.items():
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW) if rows else _create(path)
            with naming(path), open(descriptor, "r+b") as file:
                if not rows:
                    file.write(self.header if start else b"")
                # What lies behind the promised rows goes; then the file gets its whole length.
                file.truncate(start + width * rows)
                file.truncate(start + width * self.info.images)
                file.flush()
                os.fsync(file.fileno())
        self.record(rows)
        return rows

    def _key(self, rows: int) -> str:
        """What the record of that many rows of just this set says; a damaged one says another."""
        return hashlib.sha256(f"{rows} {self.description}".encode()).hexdigest()

    def _rows_on_disk(self) -> int:
        whole = self.folder / f"{self.dataset}.npy"
        try:
            promise = json.loads(self.record_path.read_bytes())
            rows = promise["rows"]
            if type(rows) is not int or promise["key"] != self._key(rows):
                return 0
            if rows == self.info.images and whole.exists() and not self.part.exists():
                # The last run ended between giving the rows their name and writing the .json.
                os.replace(whole, self.part)
            if not all(_is_own_file(path) for path in (self.part, self.digests)):
                return 0
            with open(self.part, "rb") as file:
                # To the byte: a damaged header could be a right one of another length, and every
                # row would be moved.
                fits = file.read(len(self.header)) == self.header
            there = (self.part.stat().st_size - len(self.header)) // self.row_bytes
            there = min(there, self.digests.stat().st_size // DIGEST_BYTES)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return 0
        return rows if fits and 0 <= rows <= min(there, self.info.images) else 0

    def __enter__(self) -> "SetWriter":
        self.files = [
            os.open(path, os.O_RDWR | os.O_NOFOLLOW) for path in (self.part, self.digests)
        ]
        return self

    def write(self, first: int, rows: np.ndarray, digests: np.ndarray) -> None:
        """Rows `first` and following: (n, channels) float32, and (n, 16) bytes that tell the
        content of each image."""
        places = (
            (self.files[0], rows.astype("<f4", order="C", copy=False), len(self.header)),
            (self.files[1], np.ascontiguousarray(digests), 0),
        )
        for descriptor, values, start in places:
            buffer = values.data.cast("B")
            place = start + len(buffer) // len(values) * first
            with naming(self.part):
                while buffer:
                    written = os.pwrite(descriptor, buffer, place)
                    buffer, place = buffer[written:], place + written

    def sync(self) -> None:
        """Brings what this process has written to the disk. After a failure it fails for good: the
        system forgets what it could not write, and a second fsync would succeed."""
        if self.failed:
            raise OSError(errno.EIO, "an earlier write has failed", str(self.part))
        try:
            with naming(self.part):
                for descriptor in self.files:
                    os.fsync(descriptor)
        except OSError:
            self.failed = True
            raise

    def record(self, rows: int) -> None:
        """Promises that the first `rows` rows are on the disk, where they are."""
        if not self.failed:
            promise = {"rows": rows, "key": self._key(rows)}
            write_atomically(self.record_path, json.dumps(promise).encode())
            self.recorded = rows

    def activations(self) -> Activations:
        """All rows, to be read back before the set is finished."""
        return Activations(self.part, self.info)

    def content(self) -> str:
        """sha256 over the digests of all images, in order."""
        return hashlib.sha256(self.digests.read_bytes()).hexdigest()

    def finish(self, accuracy: float | None) -> None:
        """The set is complete, all rows being recorded: the .npy gets its name, then the .json
        appears."""
        if self.failed or self.recorded != self.info.images:
            raise RuntimeError(
                f"{self.part} has {self.recorded} rows on the disk, wanted {self.info.images}"
            )
        info = dataclasses.replace(self.info, accuracy=accuracy, content=self.content())
        os.replace(self.part, self.folder / f"{self.dataset}.npy")
        _sync_folder(self.folder)
        write_info(self.folder, self.dataset, info)
        self.digests.unlink()
        self.record_path.unlink()

    def __exit__(self, *_: object) -> None:
        for descriptor in self.files:
            os.close(descriptor)


def _is_own_file(path: Path) -> bool:
    """Whether it is a file under this name alone, not a link to another one."""
    status = os.lstat(path)
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1
