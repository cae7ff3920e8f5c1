"""Image sets in, out what their user should know of them, a line each, None where there is nothing
to say."""

import statistics
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from lhact.extraction.image_sets import DEVICE, INODE, SIZE, ArrayReader, FileReader, Images
from lhact.extraction.images import BadImages
from lhact.messages import shown
from lhact.records import Preprocessing

COMPARED = 20  # pairs of files of the same name and size whose contents are compared


def left_out_remark(images: Images) -> str | None:
    """`4 other files left out: .jfif 3, no extension 1`, and hidden folders."""
    parts = []
    for kind, is_folder in (("other files", False), ("hidden folders", True)):
        found = {name: n for name, n in images.left_out.items() if name.endswith("/") is is_folder}
        names = ", ".join(f"{shown(name)} {found[name]:,}" for name in sorted(found))
        parts += [f"{sum(found.values()):,} {kind} left out: {names}"] if found else []
    return "; ".join(parts) or None


def size_remark(images: Images, preprocessing: Preprocessing) -> str | None:
    """A remark where the first 100 images are far smaller than the network's input: they would be
    enlarged to a blur, or get a black border. Those that cannot be read are passed over, because
    extraction names them."""
    sides = []
    for path in images.paths[:100]:
        with suppress(BadImages):
            size = images.reader.size(path)
            sides += [min(size)] if size else []
    side = statistics.median_low(sides) if sides else preprocessing.crop
    resize, crop = preprocessing.resize, preprocessing.crop
    if resize == 0 and side < crop:
        effect = "they get a black border; give a smaller --crop, or --resize"
    elif 2 * side < resize:
        effect = f"they are enlarged {resize / side:.1f} times; give the network's own --resize"
    else:
        return None
    return f"the images have {side} pixels a side, the network's input {crop}: {effect}"


def overlap(first: Images, second: Images) -> str | None:
    """What the two share, to be said after the first one's name.

    Files are the same by device and inode, so links are found. Where none are, files of the same
    name and size are compared by content, a sample of them, so that a copied data set is found;
    copies under other names are not. Arrays are compared by the content of each image.
    """
    readers = (first.reader, second.reader)
    if all(isinstance(reader, FileReader) for reader in readers):
        count, how = _linked(first, second), "the same files"
        if not count:
            count, how = _copied(first, second)
    elif all(isinstance(reader, ArrayReader) for reader in readers):
        known = set(second.digests())
        count, how = sum(digest in known for digest in first.digests()), "the same pixels"
    else:
        return None
    if not count:
        return None
    share = f"all {count:,}" if count == len(first) else f"{count:,} of {len(first):,}"
    return f"{share} images are the same images as in {shown(second.origin)} ({how})"


def _linked(first: Images, second: Images) -> int:
    """How many files of the first set are files of the second."""
    count = 0
    for device in np.intersect1d(first.status[:, DEVICE], second.status[:, DEVICE]):
        own, other = (s.status[s.status[:, DEVICE] == device, INODE] for s in (first, second))
        count += int(np.isin(own[own != 0], other).sum())  # some file systems number no files
    return count


def _copied(first: Images, second: Images) -> tuple[int, str]:
    """(how many files of the first set seem to be copied in the second, how that was found)."""

    def keys(images: Images) -> Iterator[tuple[str, int]]:
        names = (path.rpartition("/")[2] for path in images.paths)
        return zip(names, images.status[:, SIZE].tolist(), strict=True)

    rows = {key: row for row, key in enumerate(keys(first))}
    pairs = [(rows[key], row) for row, key in enumerate(keys(second)) if key in rows]
    sample = pairs[:: -(-len(pairs) // COMPARED) or 1]
    same = 0
    for own, other in sample:
        with suppress(BadImages):  # extraction names the file
            digest = first.reader.digest(first.paths[own])
            same += digest == second.reader.digest(second.paths[other])
    how = f"of the same name and size; {same} of {len(sample)} compared have the same content"
    return len({own for own, _ in pairs}) if same else 0, how
