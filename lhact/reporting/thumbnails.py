"""Names of cached images and a data root in, small pictures out, or the reason why there is none.

A cache records names relative to a folder, and not the folder.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from lhact.benchmarks.builtin import ImageSet, find
from lhact.messages import shown
from lhact.records import SetInfo

MOST_PIXELS_A_SIDE = 176
JPEG_QUALITY = 80


class NoThumbnail(Exception):
    """An image that cannot be shown; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where the images of a set lie. folder: None where they were not found. note: what the reader
    of a picture must know of that, "" for nothing."""

    folder: Path | None
    note: str = ""


def locate(data_root: Path, image_set: ImageSet | None, info: SetInfo) -> Place:
    """The benchmark's folder for that set, with a note unless the names and sizes of the files in
    it are those of the cache.

    image_set: None for a set of the user's own, whose folder no benchmark knows.
    """
    if image_set is None:
        return Place(
            None,
            "No thumbnails: these images are no set of the benchmark, and no cache says where"
            " its images lie.",
        )
    found = find(data_root, image_set)
    folder = None if found is None else Path(found.source)
    if folder is None or not folder.is_dir():
        wanted = shown(data_root / image_set.places[0])
        return Place(
            None, f"No thumbnails: there is no {wanted}; --data-root says where the images lie."
        )
    if _fingerprint(folder, info) == info.fingerprint:
        return Place(folder)
    return Place(
        folder,
        f"The files in {shown(folder)} were found by name alone: their names and sizes together are"
        " not those that the cache was made of, so a picture may be of another image.",
    )


def _fingerprint(folder: Path, info: SetInfo) -> str | None:
    """What the cache would hold for the files of these names in that folder; None where one is
    gone."""
    from lhact.extraction.image_sets import SIZE, FileReader, Images

    status = np.zeros((info.images, 4), np.uint64)
    try:
        status[:, SIZE] = [os.stat(folder / path).st_size for path in info.paths]
    except (OSError, ValueError):  # ValueError: a name with a null character
        return None
    return Images("", info.paths, FileReader(folder), status).fingerprint()


def thumbnail(folder: Path, path: str) -> bytes:
    """The image as a JPEG of at most MOST_PIXELS_A_SIDE, not cropped, and without its metadata.

    Raises NoThumbnail for a file that is gone, that is no image or too large to be one, and for a
    name that leads out of the folder, since the cache may come from somebody else.
    """
    from lhact.extraction import images  # Pillow, which an evaluation without pictures does without

    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise NoThumbnail("its name leads out of the folder of the set")
    if not os.path.exists(folder / path):
        raise NoThumbnail("the file is gone")
    try:
        picture = images.decode(folder / path)
    except images.BadImages as error:
        raise NoThumbnail("the file cannot be read as an image") from error
    picture.thumbnail((MOST_PIXELS_A_SIDE, MOST_PIXELS_A_SIDE))
    picture.info.clear()  # a comment of any length would be written along
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return jpeg.getvalue()
