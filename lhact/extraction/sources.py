"""A source of images as the user names it in, its images in a fixed order out.

A source is a folder, a list FILE.txt, arrays FILE.npz, or a set of torchvision such as
`torchvision:CIFAR10:test`. A new kind is a function and an entry of SOURCES.
"""

import contextlib
import functools
import hashlib
import os
import re
import stat
import sys
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lhact.extraction.image_sets import ArrayReader, FileReader, Images, numbered
from lhact.extraction.images import BadImages, NoImages, extension, is_hidden, is_image
from lhact.extraction.npz import Member
from lhact.messages import first_line, shown

Progress = Callable[[int], object]
MAX_COMPRESSED = 2**31  # bytes; each worker has compressed images in its memory


@dataclass(frozen=True)
class SourceOptions:
    """data_root: where torchvision's sets lie. list_root: what the paths of a list are relative to;
    None stands for the folder of the list. download: whether torchvision may fetch a set that is
    not there."""

    data_root: Path
    list_root: Path | None = None
    download: bool = False


def open_source(
    spec: str | Path, options: SourceOptions, progress: Progress = lambda count: None
) -> Images:
    """The images of a source. progress is told how many more have been found.

    Raises BadImages where the source is missing, cannot be read or is not laid out as it should be,
    and NoImages where it is empty.
    """
    text = os.path.expanduser(str(spec))
    for key, open_kind in SOURCES.items():
        is_named = text.startswith(key) if key.endswith(":") else text.lower().endswith(key)
        if is_named and (key.endswith(":") or not os.path.isdir(text)):
            return open_kind(text, options, progress)
    return open_folder(text, progress)


def _numbers(status: os.stat_result) -> tuple[int, int, int, int]:
    """A row of Images.status, which has no negative numbers: dates before 1970 come out huge."""
    modified, device, inode = status.st_mtime_ns, status.st_dev, status.st_ino
    return status.st_size, modified % 2**64, device % 2**64, inode % 2**64


# ---- folders ----


def open_folder(folder: str | Path, progress: Progress = lambda count: None) -> Images:
    """Every image below the folder, at any depth, sorted by relative path by code point. Links are
    followed. What is hidden (see `is_hidden`) is no part of it.

    Raises BadImages where there is no such folder, where it cannot be read or links back to itself,
    and NoImages where it holds no image.
    """
    paths: list[str] = []
    numbers, left_out = array("Q"), Counter[str]()
    try:
        for path, status in _scan(
            str(folder), "", frozenset({_identity(os.stat(folder))}), left_out
        ):
            paths.append(path)
            numbers.extend(_numbers(status))
            progress(1)
    except OSError as error:
        name = shown(error.filename or folder)
        raise BadImages(
            f"{name} cannot be listed: {error.strerror}; give a readable folder"
        ) from error
    if not paths:
        others = ", ".join(f"{shown(name)} {count}" for name, count in left_out.items())
        raise NoImages(
            f"{shown(folder)} holds no images (wanted files ending in .jpg .jpeg .png ..., found "
            f"{others or 'nothing'}); put images there or give another folder"
        )
    order = sorted(range(len(paths)), key=paths.__getitem__)
    return Images(
        str(folder),
        tuple(paths[row] for row in order),
        FileReader(Path(folder)),
        np.asarray(numbers).reshape(-1, 4)[order],
        in_class_folders=True,
        left_out=left_out,
    )


def _scan(
    folder: str, prefix: str, ancestors: frozenset[tuple[int, int]], left_out: Counter[str]
) -> Iterator[tuple[str, os.stat_result]]:
    """(path, status) of each image, in the order of the system; the rest is counted in left_out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_dir():
                if is_hidden(name):
                    left_out[name + "/"] += 1
                    continue
                identity = _identity(entry.stat())
                if identity in ancestors:
                    path = shown(entry.path)
                    raise BadImages(
                        f"{path} links back to a folder that holds it; remove that link"
                    )
                yield from _scan(entry.path, prefix + name + "/", ancestors | {identity}, left_out)
            elif is_image(name):
                try:
                    status = entry.stat()
                except OSError as error:
                    path = shown(entry.path)
                    raise BadImages(
                        f"{path} cannot be read: {error.strerror}; restore it or leave it out"
                    ) from error
                if stat.S_ISREG(status.st_mode):
                    yield prefix + name, status
                else:
                    left_out["pipe or device"] += 1
            elif not is_hidden(name):
                left_out[extension(name) or "no extension"] += 1


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


# ---- lists ----

_LABELLED = re.compile(r"(.*\S)\s+(-?[0-9]{1,18})")


def open_list(spec: str, options: SourceOptions, progress: Progress) -> Images:
    """The files that a list names, in its order: `path label` or `path` a line, as OpenOOD has
    them; -1 stands for no label. Paths are relative to `options.list_root` or the list's folder.

    Raises BadImages with the number of the line for a file that is not there, for a path that leads
    out of that folder or stands there twice, and for a label below -1.
    """
    _status_of_file(spec)
    root = Path(os.path.expanduser(options.list_root or Path(spec).parent))
    bases = [os.path.join(base, "") for base in (os.path.abspath(root), os.path.realpath(root))]
    name = shown(spec)
    line_of: dict[str, int] = {}  # path -> where it stands
    labels = array("q")
    with open(spec, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            match = _LABELLED.fullmatch(line.strip())
            path, label = (match[1], int(match[2])) if match else (line.strip(), -1)
            if not path:
                continue
            where = f"{name} line {number}: "
            inside = _inside(path, bases)
            if inside is None:
                raise BadImages(
                    f"{where}{shown(path)} lies outside of {shown(root)}; "
                    "give the folder that holds all of its images as --list-root"
                )
            if not -1 <= label < 2**31:
                raise BadImages(
                    f"{where}the label {label} is no class number; "
                    "give numbers from 0, or -1 where the class is not known"
                )
            if line_of.setdefault(inside, number) != number:
                raise BadImages(
                    f"{where}{shown(inside)} stands in line {line_of[inside]} already; "
                    "name each image once"
                )
            labels.append(label)
    if not line_of:
        raise NoImages(f"{shown(spec)} lists no images; give a list of them, one a line")
    paths = tuple(line_of)
    status, missing = _status(root, paths, progress)
    if missing:
        some = "; ".join(
            f"line {line_of[paths[row]]}: {shown(paths[row])}" for row, _ in missing[:5]
        )
        raise BadImages(
            f"{shown(spec)} names {len(missing):,} of {len(paths):,} files that cannot be found in "
            f"{shown(root)} ({some}{'; ...' if len(missing) > 5 else ''}; {missing[0][1]}); "
            "restore them, or give the folder that its paths start from as --list-root"
        )
    return _with_labels(Images(spec, paths, FileReader(root), status), np.asarray(labels))


def _inside(path: str, bases: Sequence[str]) -> str | None:
    """The path relative to the folder that both bases are; None where it leads out of it."""
    path = os.path.normpath(path)
    if os.path.isabs(path):
        base = next((base for base in bases if path.startswith(base)), None)
        return None if base is None else path[len(base) :]
    return None if path == ".." or path.startswith("../") else path


def _status(
    root: Path, paths: Iterable[str], progress: Progress
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """(Images.status, [(row, reason)] of the paths that are no files)."""
    numbers, missing = array("Q"), []
    for row, path in enumerate(paths):
        try:
            status = os.stat(os.path.join(root, path))
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is no file")
            numbers.extend(_numbers(status))
        except (OSError, ValueError) as error:  # ValueError also for a null character
            missing.append((row, getattr(error, "strerror", None) or str(error)))
        progress(1)
    return np.asarray(numbers).reshape(-1, 4), missing


def _status_of_file(spec: str) -> os.stat_result:
    """Raises BadImages unless it is a file that can be opened; a pipe would be waited for."""
    try:
        status = os.stat(spec)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no file")
        with open(spec, "rb"):
            return status
    except OSError as error:
        name = shown(spec)
        raise BadImages(f"{name} cannot be read: {error.strerror}; give a readable file") from error


def _with_labels(images: Images, labels: object) -> Images:
    """Labels are class numbers or -1, as many as images. Raises ValueError where they are not."""
    given = np.asarray(labels)
    if given.dtype.kind not in "iu" or given.shape != (len(images),):
        raise ValueError(
            f"its labels are {given.dtype}{given.shape}, wanted integers, one for each image"
        )
    if given.min() < -1 or given.max() >= 2**31:
        raise ValueError(
            f"its labels go from {given.min()} to {given.max()}, wanted class numbers from 0, "
            "and -1 where the class is not known"
        )
    return images if (given < 0).all() else replace(images, labels=given.astype(np.int64))


# ---- arrays ----


def open_arrays(spec: str, options: SourceOptions, progress: Progress) -> Images:
    """The images of an .npz: `images` (n, h, w) or (n, h, w, 3) uint8 and, where it is there,
    `labels` (n,) integers, -1 for no label. They are named `000000`, `000001`, ...

    Images that numpy.savez wrote stay on disk; compressed ones are read into memory. Raises
    BadImages for other shapes and types, and for a damaged file.
    """
    status = _status_of_file(spec)
    try:
        with zipfile.ZipFile(spec) as archive:
            values = Member(spec, archive, "images")
            shape = values.shape
            if values.dtype != np.uint8 or not _are_images(shape):
                raise ValueError(
                    f"its images are {values.dtype}{shape}, wanted uint8 (n, h, w) or (n, h, w, 3)"
                )
            open_values = values.opener(MAX_COMPRESSED)
            identity = f"{shape} {status.st_size}\n"
            reader = ArrayReader(open_values, spec)
            version = str(status.st_mtime_ns)
            images = numbered(spec, len(open_values()), reader, identity, version)
            if "labels.npy" in archive.namelist():
                images = _with_labels(images, Member(spec, archive, "labels").read())
    except Exception as error:  # zipfile and the decompressors raise nearly anything on damage
        raise BadImages(
            f"{shown(spec)} cannot be used: {shown(str(error))}; write it with "
            "numpy.savez(FILE, images=..., labels=...)"
        ) from error
    progress(len(images))
    return images


def _are_images(shape: tuple[int, ...]) -> bool:
    """Three grey images of a width up to 4 would look like (h, w, channels) of one."""
    is_grey, is_colour = len(shape) == 3 and shape[2] > 4, len(shape) == 4 and shape[3] in (1, 3)
    return (is_grey or is_colour) and min(shape) > 0


# ---- sets of torchvision ----


@dataclass(frozen=True)
class TorchvisionSet:
    """A class of torchvision.datasets. splits: name -> the arguments that choose it. images: its
    attribute that holds an array or the files. labels: the one that holds the labels; None where
    `images` holds pairs of file and label."""

    splits: Mapping[str, Mapping[str, object]]
    images: str
    labels: str | None


def _splits(*names: str) -> dict[str, dict[str, object]]:
    return {name: {"split": name} for name in names}


_ARRAYS = TorchvisionSet({"train": {"train": True}, "test": {"train": False}}, "data", "targets")
_FILES = TorchvisionSet(_splits("train", "val", "test"), "_image_files", "_labels")
# Its photographs as they are, and at 256 x 256.
_PLACES = {
    name + ("-256" if small else ""): {"split": name, "small": small}
    for name in ("train-standard", "train-challenge", "val", "test")
    for small in (False, True)
}
TORCHVISION = {
    "CIFAR10": _ARRAYS,
    "CIFAR100": _ARRAYS,
    "MNIST": _ARRAYS,
    "FashionMNIST": _ARRAYS,
    "KMNIST": _ARRAYS,
    "SVHN": TorchvisionSet(_splits("train", "test", "extra"), "data", "labels"),
    "STL10": TorchvisionSet(_splits("train", "test", "unlabeled"), "data", "labels"),
    "DTD": _FILES,
    "Flowers102": _FILES,
    "Food101": TorchvisionSet(_splits("train", "test"), "_image_files", "_labels"),
    "GTSRB": TorchvisionSet(_splits("train", "test"), "_samples", None),
    "Places365": TorchvisionSet(_PLACES, "imgs", None),
}


def open_torchvision(spec: str, options: SourceOptions, progress: Progress) -> Images:
    """`torchvision:CIFAR10:test`: images and labels of that split, in torchvision's order, from
    `options.data_root`, where torchvision lays its sets out and checks the MD5 of most.

    Raises BadImages for an unknown name, and where the set is not there and is not to be fetched.
    """
    _, name, split = [*spec.split(":", 2), ""][:3]
    if name not in TORCHVISION:
        raise BadImages(f"{shown(spec)} is not known; known sets are {', '.join(TORCHVISION)}")
    entry = TORCHVISION[name]
    if split not in entry.splits:
        known = ", ".join(f"torchvision:{name}:{split}" for split in entry.splits)
        raise BadImages(f"{shown(spec)} is not known; known splits are {known}")
    root = Path(os.path.expanduser(options.data_root))
    try:
        dataset = _torchvision_dataset(name, root, options.download, entry.splits[split])
        found = getattr(dataset, entry.images)
        labels = getattr(dataset, entry.labels) if entry.labels else [label for _, label in found]
        if isinstance(found, list):
            files = found if entry.labels else [file for file, _ in found]
            paths = tuple(os.path.relpath(file, root) for file in files)
            status, missing = _status(root, paths, progress)
            if missing:
                first = paths[missing[0][0]]
                raise ValueError(
                    f"{len(missing):,} of {len(paths):,} files are missing, such as {first}"
                )
            images = Images(spec, paths, FileReader(root), status)
        else:
            images = _torchvision_array(spec, np.asarray(found))
            progress(len(images))
        return _with_labels(images, [-1 if label is None else int(label) for label in labels])
    except Exception as error:  # torchvision raises nearly anything on what is not whole
        reason = first_line(error).partition(" You can ")[0]
        raise BadImages(
            f"{shown(spec)} cannot be read in {shown(root)}: {shown(reason).rstrip('.')}; give the "
            "folder that holds it as --data-root, or --download to fetch it"
        ) from error


def _torchvision_dataset(
    name: str, root: Path, download: bool, arguments: Mapping[str, object]
) -> Any:
    """The set as it is on disk; where it is not whole, downloaded if that is allowed."""
    import torchvision.datasets

    build = functools.partial(getattr(torchvision.datasets, name), root, **arguments)
    with contextlib.redirect_stdout(sys.stderr):  # results alone go to stdout
        try:
            return build(download=False)
        except Exception:
            if not download:
                raise
            return build(download=True)


def _torchvision_array(spec: str, values: np.ndarray) -> Images:
    if values.ndim == 4 and values.shape[1] == 3:  # SVHN and STL10 have the channels first
        values = values.transpose(0, 2, 3, 1)
    # The array is in memory, so its content is as quick to have as the dates of its files.
    version = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
    reader = ArrayReader(functools.partial(np.asarray, values), spec)
    return numbered(spec, len(values), reader, f"{spec} {values.shape}\n", version)


# How a source is spelled -> the function that opens it; all else is a folder. A key that ends in a
# colon is how the source begins, one that begins with a dot is how it ends.
SOURCES: dict[str, Callable[[str, SourceOptions, Progress], Images]] = {
    "torchvision:": open_torchvision,
    ".txt": open_list,
    ".npz": open_arrays,
}
