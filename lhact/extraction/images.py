"""A folder in, its images in a fixed order out; an image file in, the network's uint8 pixels out."""

import hashlib
import logging
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
# What those extensions stand for. PIL goes by the content, and would hand PostScript in a .jpg to another program.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class BadImages(Exception):
    """A folder that holds no images, or an image that cannot be read; the message names it and says what to do."""


class NoImages(BadImages):
    """A folder that holds no images."""


def shown(path: str | Path) -> str:
    """The path as a message can hold it: on one line, whatever its characters and encoding."""
    return str(path) if str(path).isprintable() else ascii(str(path))[1:-1]


class Preprocessing(NamedTuple):
    """From a decoded RGB image to the network's input: shorter side to `resize`, centre crop of `crop` pixels, values to [0, 1],
    minus `mean`, divided by `std` (per RGB channel). The defaults are the protocol of the ImageNet table."""

    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class ImageList(NamedTuple):
    """The images of a folder. paths: relative to it, with forward slashes, sorted by code point. sizes: of the files, in bytes."""

    folder: Path
    paths: list[str]
    sizes: list[int]

    def fingerprint(self) -> str:
        """sha256 over the relative paths and file sizes, in order: another file, another name or another size changes it."""
        digest = hashlib.sha256()
        for path, size in zip(self.paths, self.sizes, strict=True):
            digest.update(f"{path}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def select(self, rows: Sequence[int]) -> "ImageList":
        return ImageList(self.folder, [self.paths[i] for i in rows], [self.sizes[i] for i in rows])


def is_image(name: str) -> bool:
    """By extension; the AppleDouble companions (`._name.jpg`) of archives made on a Mac are not images."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith("._")


def _scan(folder: str, prefix: str, ancestors: frozenset) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if entry.is_dir():
                status = entry.stat()
                identity = (status.st_dev, status.st_ino)
                if identity in ancestors:
                    raise BadImages(f"{shown(entry.path)} links back to a folder that holds it; remove that link")
                yield from _scan(entry.path, path + "/", ancestors | {identity})
            elif is_image(entry.name):
                try:
                    yield path, entry.stat().st_size
                except OSError as error:
                    raise BadImages(f"{shown(entry.path)} cannot be read: {error.strerror}; restore or remove it") from error


def list_images(folder: str | Path, progress: Callable[[int], None] = lambda count: None) -> ImageList:
    """Every image below `folder`, at any depth, sorted by relative path. `progress` is told of each 1,000 files found.

    Raises BadImages if there is no such folder, if it holds no image or cannot be read.
    """
    folder = Path(folder)
    found = []
    try:
        status = os.stat(folder)
        for item in _scan(str(folder), "", frozenset({(status.st_dev, status.st_ino)})):
            found.append(item)
            if len(found) % 1000 == 0:
                progress(1000)
    except OSError as error:
        raise BadImages(f"{shown(error.filename or folder)} cannot be listed: {error.strerror}; give a readable folder") from error
    if not found:
        raise NoImages(
            f"{shown(folder)} holds no images (wanted files ending in {' '.join(EXTENSIONS)}); "
            "put images there or give another folder"
        )
    progress(len(found) % 1000)
    found.sort()
    return ImageList(folder, [path for path, _ in found], [size for _, size in found])


def class_folders(paths: Sequence[str]) -> list[str] | None:
    """The top-level folder of each relative path: its class in the usual layout. None if some image lies in no folder."""
    folders = [path.partition("/")[0] if "/" in path else None for path in paths]
    return None if None in folders else folders


def labels(paths: Sequence[str], classes: int, wnids: Sequence[str]) -> list[int] | None:
    """Class index of each image, from the name of its top-level folder.

    Folders that are all ImageNet wnids are numbered by their place in `wnids` where the network has as many `classes`, so that a
    set with only some of the classes is labelled right. Otherwise, when there are as many folders as classes, by their sorted
    order. None where neither holds: the labels are then not known.
    """
    folders = class_folders(paths)
    if folders is None:
        return None
    names = set(folders)
    if classes == len(wnids) and names <= set(wnids):
        order = wnids
    elif len(names) == classes:
        order = sorted(names)
    else:
        return None
    index = {name: i for i, name in enumerate(order)}
    return [index[folder] for folder in folders]


def first_per_class(paths: Sequence[str], count: int) -> list[int]:
    """Positions of the first `count` images of each top-level folder, in order; of all images where there are no folders."""
    folders = class_folders(paths)
    if folders is None:
        return list(range(len(paths)))
    taken: dict[str, int] = {}
    rows = []
    for row, folder in enumerate(folders):
        taken[folder] = taken.get(folder, 0) + 1
        if taken[folder] <= count:
            rows.append(row)
    return rows


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Keeps PIL's warnings and log lines to itself. They are about metadata that pixels do not depend on, or stand beside an error
    that says the same; and about sizes from half of PIL's limit on, which large photographs have."""
    logger = logging.getLogger("PIL")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def decode(path: str | Path) -> Image.Image:
    """The image as PIL's `convert("RGB")` gives it; an EXIF orientation is not applied, as in the published protocol.

    Raises BadImages for a file that is missing, is no image, is truncated or is too large to be one.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise OSError("it is no file")
        with _without_remarks(), Image.open(path, formats=FORMATS) as image:
            image.load()
            # Of an RGB image `convert` would make a copy, for a tenth of the time of decoding it.
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # PIL's decoders raise nearly anything on damaged input
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it has no image format that PIL knows"
        raise BadImages(f"{shown(path)} cannot be read as an image: {reason}; restore or remove it") from error


def load(path: str | Path, resize: int, crop: int, interpolation: str) -> np.ndarray:
    """Decode, resize, crop: (crop, crop, 3) uint8 RGB, to the bit the pixels of torchvision's Resize and CenterCrop on PIL images.

    Raises BadImages as `decode` does.
    """
    image = decode(path)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(resize * long / short)
    size = (resize, other) if width <= height else (other, resize)
    if size[0] * size[1] > 2 * Image.MAX_IMAGE_PIXELS:  # PIL's own limit on what it decodes
        raise BadImages(f"{shown(path)} cannot be read as an image: {width} x {height} pixels are too thin to resize; remove it")
    image = image.resize(size, INTERPOLATIONS[interpolation])
    # torchvision rounds half to even where it crops, and down where the crop is larger than the image and is filled with black.
    left, top = (round((n - crop) / 2) if crop <= n else -((crop - n) // 2) for n in size)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def gaussian_list(count: int) -> ImageList:
    """Stands for `count` images of Gaussian noise that lie in no folder; GaussianNoise makes them."""
    return ImageList(Path("gaussian"), [f"{number:06}" for number in range(count)], [0] * count)


class GaussianNoise:
    """Map-style dataset of images of noise: each RGB value is drawn from N(0.5, 1) and clipped to [0, 1], as ODIN's are (Liang et
    al., ICLR 2018). Image i is the same in every run."""

    def __init__(self, images: ImageList, preprocessing: Preprocessing) -> None:
        self.images, self.crop = images, preprocessing.crop

    def __len__(self) -> int:
        return len(self.images.paths)

    def __getitem__(self, row: int) -> np.ndarray:
        values = np.random.default_rng([row, 0]).normal(0.5, 1, (self.crop, self.crop, 3))
        return np.rint(255 * values.clip(0, 1)).astype(np.uint8)


class Pixels:
    """Map-style dataset of an image list: item i is `load`ed image i, or the message why it cannot be read.

    A message, because a worker process can hand back an exception only together with its traceback.
    """

    def __init__(self, images: ImageList, preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self.images.paths)

    def __getitem__(self, row: int) -> np.ndarray | str:
        path = self.images.folder / self.images.paths[row]
        try:
            return load(path, self.preprocessing.resize, self.preprocessing.crop, self.preprocessing.interpolation)
        except BadImages as error:
            return str(error)
