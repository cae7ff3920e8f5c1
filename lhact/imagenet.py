"""The names of ImageNet's classes: what every network trained on ILSVRC-2012 numbers alike."""

import functools
from importlib.resources import files


@functools.cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ILSVRC-2012, sorted: the position is the class index of every
    torchvision network."""
    return tuple(files("lhact").joinpath("imagenet_wnids.txt").read_text().split())
