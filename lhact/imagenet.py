"""The names of ImageNet's classes: what every network trained on ILSVRC-2012 numbers alike."""

import functools
from importlib.resources import files

from lhact.records import SetInfo


@functools.cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ILSVRC-2012, sorted: the position is the class index of every
    torchvision network."""
    return tuple(files("lhact").joinpath("imagenet_wnids.txt").read_text().split())


@functools.cache
def names() -> tuple[str, ...]:
    """What torchvision calls the 1,000 classes, in the order of `wnids`: `tench`, `goldfish`,
    ..."""
    from torchvision.models import ResNet50_Weights  # of all of eval.py, only its page needs it

    return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def is_labelled_by(info: SetInfo) -> bool:
    """Whether the network's classes are ImageNet's 1,000: every image of the set lies in the class
    folder of its label."""
    if info.network.classes != len(wnids()) or info.labels is None:
        return False
    return all(
        path.startswith(f"{wnids()[label]}/")
        for path, label in zip(info.paths, info.labels, strict=True)
    )


@functools.cache
def class_names() -> tuple[str, ...]:
    """`n01440764 tench` and so on: WordNet id and name of the 1,000 classes, in the same order."""
    return tuple(f"{wnid} {name}" for wnid, name in zip(wnids(), names(), strict=True))
