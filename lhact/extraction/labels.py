"""Image sets in, the class numbers of their images out."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lhact.extraction.image_sets import Images
from lhact.extraction.images import BadImages
from lhact.messages import shown


@dataclass(frozen=True)
class Labels:
    """labels: the class number of each image, None where they are not known. remark: one line: in
    which order the classes are numbered, or why there are no labels."""

    labels: tuple[int, ...] | None
    remark: str


def labels(sets: Mapping[str, Images], classes: int, wnids: Sequence[str]) -> dict[str, Labels]:
    """The labels of each set. sets: by name, all of the same classes, which have one numbering.

    Labels that came with the images are taken as they are. Class folders that are all ImageNet
    wnids are numbered by their place in `wnids` where the network has as many `classes`, so a set
    with some of the classes is labelled right. Class folders that are all numbers are those
    classes. Others are numbered in sorted order, where all sets together have as many as there are
    classes. Raises BadImages for labels that came with the images and are no class of the network.
    """
    folders = {name: sorted(set(images.class_names or ())) for name, images in sets.items()}
    numbers = {name: _own_numbers(found, classes, wnids) for name, found in folders.items()}
    others = [name for name in sets if folders[name] and numbers[name] is None]
    union = sorted({folder for name in others for folder in folders[name]})
    counted = f"{' and '.join(others)} have {len(union):,} class folders together"
    if len(others) == 1:
        counted = f"it has {len(union):,} class folders"
    if len(union) == classes:
        order = f"sorted order of the class folders, {union[0]} = 0 to {union[-1]} = {classes - 1}"
        by_order = {folder: number for number, folder in enumerate(union)}, f"the {order}"
        numbers |= dict.fromkeys(others, by_order)
    result = {}
    for name, images in sets.items():
        numbering = numbers[name]
        if images.labels is not None:
            result[name] = _given(images, classes)
        elif not folders[name]:
            result[name] = Labels(None, "no labels: not all of its images lie in class folders")
        elif numbering is None:
            remark = f"no labels: {counted}, the network has {classes:,} classes"
            result[name] = Labels(None, remark)
        else:
            result[name] = _numbered(images, *numbering, classes)
    return {name: Labels(found.labels, shown(found.remark)) for name, found in result.items()}


def _own_numbers(
    names: Sequence[str], classes: int, wnids: Sequence[str]
) -> tuple[dict[str, int], str] | None:
    """(number of each class folder, in which order) where the names themselves tell."""
    if not names:
        return None
    if classes == len(wnids) and set(names) <= set(wnids):
        order = f"ImageNet's order, {len(names):,} of {classes:,} classes"
        return {wnid: number for number, wnid in enumerate(wnids)}, order
    if all(name.isascii() and name.isdecimal() for name in names):
        return {name: int(name) for name in names}, "the numbers that the class folders are named"
    return None


def _numbered(images: Images, index: Mapping[str, int], order: str, classes: int) -> Labels:
    folders = images.class_names or []
    used = {folder: index[folder] for folder in folders}
    if len(set(used.values())) < len(used):
        return Labels(None, "no labels: two class folders have the same number")
    if max(used.values()) >= classes:
        return Labels(
            None,
            f"no labels: the class folders are numbered {min(used.values())} to "
            f"{max(used.values())}, the network has the classes 0 to {classes - 1}",
        )
    return Labels(tuple(index[folder] for folder in folders), f"labels by {order}")


def _given(images: Images, classes: int) -> Labels:
    given: list[int] = images.labels.tolist()  # type: ignore[union-attr]
    if max(given) >= classes:
        path = images.paths[given.index(max(given))]
        raise BadImages(
            f"{shown(images.origin)} gives {shown(path)} the label {max(given)}, the network has "
            f"the classes 0 to {classes - 1}; give labels of this network, or -1 for none"
        )
    if min(given) < 0:
        count = f"{given.count(-1):,} of its {len(given):,} images"
        return Labels(None, f"no labels: {count} have none")
    return Labels(tuple(given), "labels as they came with the images")


def first_per_class(images: Images, count: int) -> list[int]:
    """Rows of the first `count` images of each class, in order: of each class folder or label; all
    rows where there are neither."""
    classes: Sequence[str | int] | None = images.class_names
    if images.labels is not None:
        classes = images.labels.tolist()
    if classes is None:
        return list(range(len(images)))
    seen: defaultdict[str | int, Iterator[int]] = defaultdict(itertools.count)
    return [row for row, name in enumerate(classes) if next(seen[name]) < count]
