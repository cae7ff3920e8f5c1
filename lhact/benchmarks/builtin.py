"""Which image sets make a benchmark, and where they lie under the data root: data, and the search
for folders.

To add one, add an entry to BENCHMARKS; its name is then a choice of --benchmark.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lhact.records import Preprocessing

HUANG_LI = "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset"

DEFAULT_WEIGHTS = "IMAGENET1K_V1"

Epochs = Callable[[Sequence[int]], Iterable[int]]


class MissingData(Exception):
    """Image folders that a benchmark needs are not there; the message lists each with the layout
    wanted and its source."""


@dataclass(frozen=True)
class ImageSet:
    """folders: where it may lie under the data root, the documented place first. source: where to
    get it. images: how many the published protocol has, None where there is none. md5: of the
    archive behind `source`, None where it has no archive. layout: of the files in the folder."""

    folders: tuple[str, ...]
    source: str
    images: int | None = None
    md5: str | None = None
    layout: str = "*.jpg"


@dataclass(frozen=True)
class Benchmark:
    """id: the test images that count as in-distribution. calibration: further ID images, never
    tested on; optional on disk. ood: the out-of-distribution sets by name, in the order of the
    report. groups: averages over some of them, by name.

    arch: of the network it is run on where none is given, with DEFAULT_WEIGHTS or the weights in
    the file `checkpoint` under the data root. preprocessing: for checkpoints. published: whether
    published numbers exist for these sets. prepare: makes the image sets under the data root, where
    they are not downloaded; it wraps the epochs that it trains in what it is given.
    """

    id: ImageSet
    calibration: ImageSet
    ood: Mapping[str, ImageSet]
    arch: str
    checkpoint: str | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    published: bool = False
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prepare: Callable[[Path, Epochs], None] | None = None


def _spellings(parents: str, *children: str) -> tuple[str, ...]:
    return tuple(
        f"{parent}/{child}".rstrip("/") for child in children for parent in parents.split()
    )


def _prepare_digits(data_root: Path, progress: Epochs) -> None:
    from lhact.benchmarks import digits  # needs torchvision, which eval.py does without

    digits.prepare(data_root, progress)


def _digits(folder: str) -> ImageSet:
    return ImageSet((f"digits/{folder}",), "python get_activation.py --benchmark digits")


# The first spelling is the one of the authors' README; id_data/imagenet is that of their code.
# Letter case is ignored.
_IMAGENET = "id_data/ILSVRC-2012 id_data/imagenet id_data/imagenet-1k id_data/ILSVRC2012"
_IMAGENET_SOURCE = "https://www.image-net.org/challenges/LSVRC/2012/ (needs an account)"
_WNIDS = "<wnid>/*.JPEG"

BENCHMARKS: dict[str, Benchmark] = {
    # The protocol of ReAct's and LHAct's ImageNet tables. OOD subsets by Huang & Li, "MOS", CVPR
    # 2021; Textures is all of DTD (Cimpoi et al., CVPR 2014), 47 classes x 120, not one of its
    # splits.
    "imagenet": Benchmark(
        id=ImageSet(
            _spellings(_IMAGENET, "val", "validation"), _IMAGENET_SOURCE, 50_000, layout=_WNIDS
        ),
        calibration=ImageSet(
            _spellings(_IMAGENET, "train"), _IMAGENET_SOURCE, 1_281_167, layout=_WNIDS
        ),
        ood={
            "iNaturalist": ImageSet(
                _spellings("ood_data/iNaturalist", "images", ""),
                f"{HUANG_LI}/iNaturalist.tar.gz",
                10_000,
                "5be6ea8aa027d7b631916427b32cb335",
            ),
            "SUN": ImageSet(
                _spellings("ood_data/SUN", "images", ""),
                f"{HUANG_LI}/SUN.tar.gz",
                10_000,
                "8469c3ada62211477954ec1be53b12d0",
            ),
            "Places": ImageSet(
                _spellings("ood_data/Places", "images", ""),
                f"{HUANG_LI}/Places.tar.gz",
                10_000,
                "b5cb5eba2754ae2a28beea8718db699a",
            ),
            "Textures": ImageSet(
                _spellings("ood_data/dtd ood_data/Textures ood_data/dtd/dtd", "images", ""),
                "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
                5_640,
                "fff73e5086ae6bdbea199a49dfb8a4c1",
                "<class>/*.jpg",
            ),
        },
        arch="resnet50",
        published=True,
    ),
    # Made by digits.py from images that scikit-learn ships; it writes these folders and the
    # network.
    "digits": Benchmark(
        id=_digits("test"),
        calibration=_digits("train"),
        ood={
            "HeldOutDigits": _digits("held-out"),
            "Photographs": _digits("photographs"),
            "Noise": _digits("noise"),
        },
        arch="resnet10",
        checkpoint="digits/resnet10.pth",
        preprocessing=Preprocessing(resize=40, crop=40),
        prepare=_prepare_digits,
    ),
}

# Features from elsewhere can be cached under the name of any benchmark; this one stands for all
# that are not known.
UNKNOWN = Benchmark(id=ImageSet((), ""), calibration=ImageSet((), ""), ood={}, arch="")


def _existing(root: Path, folder: str) -> Iterator[Path]:
    """`root/folder` where it is a directory, whatever the letter case of its components on disk."""
    if not folder:
        yield root
        return
    head, _, rest = folder.partition("/")
    if not root.is_dir():
        return
    names = sorted(os.listdir(root), key=lambda name: (name != head, name))
    for name in names:
        if name.lower() == head.lower() and (root / name).is_dir():
            yield from _existing(root / name, rest)


def find(data_root: Path, image_set: ImageSet) -> Path | None:
    """The first of the set's folders that exists under `data_root`, in the order of its spellings;
    None if none does."""
    for folder in image_set.folders:
        for path in _existing(data_root, folder):
            return path
    return None


def locate(name: str, data_root: Path, own: Mapping[str, str]) -> dict[str, str]:
    """Image set name -> where its images are, in the order of extraction: `id`, `calibration` where
    it is there, then the OOD sets.

    own: sources of the user's own, by the same names. Own OOD sets stand in for all of the
    benchmark's; an own ID set does not go with the benchmark's calibration set.
    Raises MissingData, listing every folder that is wanted and not there with the layout and the
    source.
    """
    benchmark = BENCHMARKS[name]
    wanted: dict[str, ImageSet] = {}
    own_ood = [key for key in own if key not in ("id", "calibration")]
    if "id" not in own:
        wanted = {"id": benchmark.id, "calibration": benchmark.calibration}
    if not own_ood:
        wanted |= benchmark.ood
    wanted = {key: image_set for key, image_set in wanted.items() if key not in own}
    found = {key: find(data_root, image_set) for key, image_set in wanted.items()}
    missing = [key for key in wanted if found[key] is None and key != "calibration"]
    if missing:
        raise MissingData(_missing_message(name, data_root, {key: wanted[key] for key in missing}))
    places = {**{key: str(path) for key, path in found.items() if path}, **own}
    order = ("id", "calibration", *benchmark.ood, *own_ood)
    return {key: places[key] for key in dict.fromkeys(order) if key in places}


def _missing_message(benchmark: str, data_root: Path, missing: Mapping[str, ImageSet]) -> str:
    lines = [
        f"{len(missing)} of the image folders of the benchmark {benchmark!r} are missing under "
        f"{data_root}:"
    ]
    for name, image_set in missing.items():
        count = f", {image_set.images:,} images" if image_set.images else ""
        place = f"{data_root / image_set.folders[0]}/{image_set.layout}"
        lines.append(f"  {name}: {place}{count}; from {image_set.source}")
    lines += [
        "Put them there, or give folders of your own: --data-root DIR, --id DIR, --ood NAME=DIR.",
        "State of each, and downloads: python -m lhact.data",
        "Without any download: python get_activation.py --benchmark digits",
    ]
    return "\n".join(lines)
