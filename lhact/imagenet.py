"""The names of ImageNet's classes: what every network trained on ILSVRC-2012 numbers alike."""

import functools
from importlib.resources import files


@functools.cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ILSVRC-2012, sorted: the position is the class index of every
    torchvision network."""
    return tuple(files("lhact").joinpath("imagenet_wnids.txt").read_text().split())


@functools.cache
def class_names() -> tuple[str, ...]:
    """`n01440764 tench` and so on: WordNet id and English name of the 1,000 classes, in the same
    order, as torchvision has them."""
    from torchvision.models import ResNet50_Weights  # takes seconds to import

    names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return tuple(f"{wnid} {name}" for wnid, name in zip(wnids(), names, strict=True))
