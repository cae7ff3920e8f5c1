"""Files, arrays or noise in; images in a fixed order out: their names, what identifies them, and a
dataset that reads them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from lhact.extraction import images
from lhact.extraction.images import BadImages, without_remarks
from lhact.messages import shown
from lhact.records import Preprocessing

Result = TypeVar("Result")
Item = tuple[np.ndarray, bytes] | str
# Columns of Images.status.
SIZE, MODIFIED, DEVICE, INODE = range(4)


class Reader(Protocol):
    """How the images of a set are read, each by its path. It is pickled to worker processes."""

    def pixels(self, path: str, preprocessing: Preprocessing) -> tuple[np.ndarray, bytes]:
        """(crop, crop, 3) uint8 RGB, and 16 bytes that identify what was read. Raises BadImages."""

    def digest(self, path: str) -> bytes:
        """The same 16 bytes, without decoding. Raises BadImages."""

    def size(self, path: str) -> tuple[int, int] | None:
        """(width, height), without decoding; None for what has no size of its own. Raises
        BadImages."""


@dataclass(frozen=True)
class FileReader:
    folder: Path

    def pixels(self, path: str, preprocessing: Preprocessing) -> tuple[np.ndarray, bytes]:
        file = self.folder / path
        content = images.read(file)
        image = images.decode(file, content)
        return images.resize_and_crop(image, preprocessing, file), images.digest(content)

    def digest(self, path: str) -> bytes:
        return images.digest(images.read(self.folder / path))

    def size(self, path: str) -> tuple[int, int]:
        return images.size(self.folder / path)


@dataclass(frozen=True)
class ArrayReader:
    """open: gives the (n, h, w) or (n, h, w, 1 or 3) uint8 array, from memory or mapped from its
    file; image `000007` is its row 7. origin: what a message calls the array."""

    open: Callable[[], np.ndarray]
    origin: str

    def _row(self, path: str) -> np.ndarray:
        try:
            return np.ascontiguousarray(self.open()[int(path)])
        except (OSError, ValueError) as error:
            raise BadImages(
                f"image {path} of {shown(self.origin)} cannot be read: {error}; restore the file"
            ) from error

    def pixels(self, path: str, preprocessing: Preprocessing) -> tuple[np.ndarray, bytes]:
        row = self._row(path)
        grey = row.ndim == 3 and row.shape[2] == 1
        image = Image.fromarray(row[..., 0] if grey else row).convert("RGB")
        pixels = images.resize_and_crop(image, preprocessing, f"{self.origin} image {path}")
        return pixels, images.digest(row.tobytes())

    def digest(self, path: str) -> bytes:
        return images.digest(self._row(path).tobytes())

    def size(self, path: str) -> tuple[int, int]:
        height, width = self._row(path).shape[:2]
        return width, height


@dataclass(frozen=True)
class NoiseReader:
    """Noise as ODIN's (Liang et al., ICLR 2018): each RGB value is drawn from N(0.5, 1) and clipped
    to [0, 1]. Image `000007` is that of the seed 7, the same in every run."""

    def pixels(self, path: str, preprocessing: Preprocessing) -> tuple[np.ndarray, bytes]:
        shape = (preprocessing.crop, preprocessing.crop, 3)
        values = np.random.default_rng([int(path), 0]).normal(0.5, 1, shape)
        return np.rint(255 * values.clip(0, 1)).astype(np.uint8), self.digest(path)

    def digest(self, path: str) -> bytes:
        return images.digest(path.encode())

    def size(self, path: str) -> None:
        return None


@dataclass(frozen=True, eq=False)
class Images:
    """Images in a fixed order.

    origin: where they are from, as the user named it. paths: a unique name of each; of files
    relative to a folder, with forward slashes. status: (n, 4) uint64: of each file the size in
    bytes, the modification time in ns, the device and the inode; 0 for what is no file. labels:
    class indices that came with the images, (n,) int64, -1 where the class is not known; None where
    none came. in_class_folders: the first folder of a path is named after the class. left_out: what
    of a folder is no image: suffix (`.txt`) or folder (`@eaDir/`) -> how many. identity: what
    identifies the set beside names, sizes and labels. version: changes whenever what is read may
    have changed, where modification times do not tell.
    """

    origin: str
    paths: tuple[str, ...]
    reader: Reader
    status: np.ndarray
    labels: np.ndarray | None = None
    in_class_folders: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)
    identity: str = ""
    version: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def class_names(self) -> list[str] | None:
        """The class folder of each image; None where some image lies in none."""
        if not self.in_class_folders or not all("/" in path for path in self.paths):
            return None
        return [path[: path.index("/")] for path in self.paths]

    def fingerprint(self) -> str:
        """sha256 over names, sizes and labels, in order: it stands in the .json of a cached set."""
        result = hashlib.sha256(self.identity.encode("utf-8", "surrogateescape"))
        labels = repeat("") if self.labels is None else (f"\0{n}" for n in self.labels.tolist())
        sizes = self.status[:, SIZE].tolist()
        for path, size, label in zip(self.paths, sizes, labels, strict=False):
            result.update(f"{path}\0{size}{label}\n".encode("utf-8", "surrogateescape"))
        return result.hexdigest()

    def modified(self) -> str:
        """sha256 over when the files were last modified, in order. Where it and the fingerprint are
        as they were, the images are the same, and none needs to be read."""
        times = self.status[:, MODIFIED].tobytes()
        return hashlib.sha256(self.version.encode() + times).hexdigest()

    def digests(self) -> Iterator[bytes]:
        """The digest of each image as `pixels` gives it, without decoding. Raises BadImages."""
        return map_threads(lambda row: self.reader.digest(self.paths[row]), len(self), 8)

    def pixels(self, preprocessing: Preprocessing) -> "Pixels":
        return Pixels(self.reader, self.paths, preprocessing)

    def select(self, rows: Sequence[int]) -> "Images":
        """The images of those rows, in that order."""
        chosen = np.asarray(rows, int)
        labels = None if self.labels is None else self.labels[chosen]
        paths = tuple(self.paths[row] for row in rows)
        return replace(self, paths=paths, status=self.status[chosen], labels=labels)


@dataclass(frozen=True)
class Pixels:
    """A map-style dataset for torch's DataLoader. Item i is what the reader gives for image i:
    (crop, crop, 3) uint8 RGB and the 16 bytes of its digest. It is a message instead where the
    image cannot be read, because a worker process can hand back an exception only together with
    its traceback."""

    reader: Reader
    paths: tuple[str, ...]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Item:
        try:
            return self.reader.pixels(self.paths[row], self.preprocessing)
        except BadImages as error:
            return str(error)


def numbered(
    origin: str, count: int, reader: Reader, identity: str = "", version: str = ""
) -> Images:
    """Images that are no files: `000000`, `000001`, ..."""
    names = tuple(f"{number:06}" for number in range(count))
    status = np.zeros((count, 4), np.uint64)
    return Images(origin, names, reader, status, identity=identity, version=version)


def gaussian_noise(count: int) -> Images:
    return numbered("Gaussian noise", count, NoiseReader())


def map_threads(function: Callable[[int], Result], count: int, threads: int) -> Iterator[Result]:
    """Yields function(0), ..., function(count - 1), computed by that many threads. They run side by
    side, because Python is free while PIL decodes and hashlib hashes."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        step = 32 * max(1, threads)  # few at a time, so that an exception ends it soon
        for start in range(0, count, step):
            yield from pool.map(function, range(start, min(start + step, count)))


def unreadable(
    image_set: Images,
    preprocessing: Preprocessing,
    workers: int,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[str]:
    """The message of each image that cannot be read, in order; all of them are decoded. progress is
    told of each image."""
    with without_remarks():
        pixels = image_set.pixels(preprocessing)
        for item in map_threads(pixels.__getitem__, len(pixels), workers):
            progress(1)
            if isinstance(item, str):
                yield item
