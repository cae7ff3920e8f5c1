"""An image file in, the network's uint8 pixels and a digest of the file out."""

import functools
import hashlib
import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lhact.messages import InputError, shown
from lhact.records import Preprocessing

# Format -> its extensions. PIL tries these formats on every file, whatever its extension: ImageNet
# has a PNG named .JPEG, and downloads have AVIF named .jpg. Their first bytes tell them apart.
FORMATS = {
    "JPEG": (".jpeg", ".jpg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".j2c"),
}
# PIL tries these only on files with the extension, because the bytes of other files can look like
# them. Neither table has formats for which PIL starts another program (PostScript), or which hold
# no photographs (documents, scientific data, films).
FORMATS_BY_EXTENSION = {
    "DDS": (".dds",),
    "DIB": (".dib",),
    "ICO": (".ico",),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".bw", ".rgb", ".rgba"),
    "SUN": (".ras",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
EXTENSIONS = {
    extension: kind
    for kind, extensions in (FORMATS | FORMATS_BY_EXTENSION).items()
    for extension in extensions
}
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
# Thumbnails, waste bins and settings that systems put beside images, in lower case.
SYSTEM_NAMES = {"@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information"}
SYSTEM_NAMES |= {"lost+found", "__macosx", "thumbs.db", "desktop.ini"}
MAX_FILE_BYTES = 2**31  # more than any image has that is below PIL's limit on pixels


class BadImages(InputError, ValueError):
    """A source that cannot be used, or an image that cannot be read; the message names it and says
    what to do."""


class NoImages(BadImages):
    """A source that holds no images."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no part of a data set: its name starts with a dot
    (`.ipynb_checkpoints`, `._name.jpg` of archives made on a Mac), or a system made it."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def extension(name: str) -> str:
    """`.jpg` for `a.b.JPG`, "" where there is none."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def is_image(name: str) -> bool:
    """Whether a file of that name counts as an image."""
    return extension(name) in EXTENSIONS and not is_hidden(name)


def digest(content: bytes) -> bytes:
    """16 bytes that identify the content of a file."""
    return hashlib.blake2b(content, digest_size=16).digest()


@functools.cache
def _readable_formats() -> frozenset[str]:
    """The formats that the installed Pillow reads; older ones have no AVIF."""
    Image.init()
    return frozenset(Image.OPEN)


def _formats(path: str | Path) -> list[str]:
    own = EXTENSIONS.get(extension(os.path.basename(path)))
    kinds = (*FORMATS, *([own] if own in FORMATS_BY_EXTENSION else []))
    return [kind for kind in kinds if kind in _readable_formats()]


@contextmanager
def without_remarks() -> Iterator[None]:
    """Keeps PIL's warnings and log lines to itself. They are about metadata that pixels do not
    depend on, or stand beside an error that says the same; and about sizes from half of PIL's limit
    on, which large photographs have. Where threads decode, it must be around all of them."""
    logger = logging.getLogger("PIL")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _named_errors(path: str | Path) -> Iterator[None]:
    """Turns what goes wrong into a BadImages that names the file."""
    try:
        yield
    except BadImages:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on damaged input
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is in none of the formats {', '.join(_formats(path))}"
        raise _bad(path, reason) from error


def _bad(path: str | Path, reason: str, mend: str = "restore it or leave it out") -> BadImages:
    return BadImages(f"{shown(path)} cannot be read as an image: {reason}; {mend}")


def read(path: str | Path) -> bytes:
    """The content of an image file. Raises BadImages for what is missing, no file or too large."""
    with _named_errors(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise OSError("it is no file")
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(f"it has {status.st_size:,} bytes, more than any image")
        return Path(path).read_bytes()


def decode(path: str | Path, content: bytes | None = None) -> Image.Image:
    """The image as PIL's `convert("RGB")` gives it; an EXIF orientation is not applied, as in the
    published protocol. Of 16-bit grey values the high byte counts, as PIL has it for 16-bit colours
    (its `convert` would make all but the darkest white).

    content: of the file, where it has been read. Raises BadImages for a file that is missing, is no
    image, is truncated, is too large, or holds numbers of no known range.
    """
    content = read(path) if content is None else content
    with (
        _named_errors(path),
        without_remarks(),
        Image.open(io.BytesIO(content), formats=_formats(path)) as image,
    ):
        image.load()
        if image.mode == "F" or image.mode.startswith("I"):
            return _eight_bits(image, path).convert("RGB")
        # Of an RGB image `convert` would make a copy, for a tenth of the time of decoding it.
        return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """A grey image of more than 8 bits -> 8 bits. Raises BadImages where it is not known what its
    values stand for, and where 8-bit values seem to lie in 16 bits: they would be black."""
    # PIL gives 16-bit PNG, PGM and JPEG 2000 their full range. TIFF has numbers of other kinds too.
    tags = getattr(image, "tag_v2", {})
    bits, photometric = tags.get(258, (16,))[0], tags.get(262, 1)  # 0: white is zero
    is_unsigned = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    if (bits, photometric, is_unsigned) != (16, 1, True):
        kind = "floating-point" if image.mode == "F" else f"{bits}-bit"
        reason = f"what its {kind} values stand for is not known"
        raise _bad(path, reason, "convert it to 8 bits")
    values = np.asarray(image)
    if 0 < values.max() < 256:
        reason = f"its 16-bit values end at {values.max()}, which is black"
        raise _bad(path, reason, "convert it to 8 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def size(path: str | Path) -> tuple[int, int]:
    """(width, height) that the file's header gives; the pixels are not read. Raises BadImages."""
    with _named_errors(path), without_remarks():
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is no file")
        with Image.open(path, formats=_formats(path)) as image:
            return image.size


def resize_and_crop(
    image: Image.Image, preprocessing: Preprocessing, path: str | Path
) -> np.ndarray:
    """(crop, crop, 3) uint8 RGB, to the bit the pixels of torchvision's Resize and CenterCrop on
    PIL images. path: what a message calls the image. Raises BadImages where the resized image would
    be larger than PIL's limit."""
    crop = preprocessing.crop
    width, height = image.size
    if preprocessing.resize:
        short, long = min(width, height), max(width, height)
        resize = preprocessing.resize
        other = resize if preprocessing.squash else int(resize * long / short)
        size = (resize, other) if width <= height else (other, resize)
        if size[0] * size[1] > 2 * (Image.MAX_IMAGE_PIXELS or size[0] * size[1]):
            raise _bad(path, f"{width} x {height} pixels are too thin to resize", "leave it out")
        image = image.resize(size, INTERPOLATIONS[preprocessing.interpolation])
    # torchvision rounds half to even where it crops, and down where the crop is larger than the
    # image and is filled with black.
    left, top = (round((n - crop) / 2) if crop <= n else -((crop - n) // 2) for n in image.size)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def load(path: str | Path, preprocessing: Preprocessing) -> np.ndarray:
    """Decode, resize, crop: (crop, crop, 3) uint8 RGB. Raises BadImages as `decode` does."""
    return resize_and_crop(decode(path), preprocessing, path)
