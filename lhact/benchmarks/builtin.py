"""Which image sets make a benchmark, and where they lie under the data root: data, and the search
for them.

To add one, add an entry to BENCHMARKS; its name is then a choice of --benchmark.
"""

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lhact.messages import InputError
from lhact.records import Preprocessing, RecordedPreprocessing

HUANG_LI = "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset"

DEFAULT_WEIGHTS = "IMAGENET1K_V1"


class MissingData(InputError):
    """Image sets that a benchmark needs are not there; the message lists each with the layout
    wanted and its source."""


@dataclass(frozen=True)
class ImageSet:
    """places: where it may lie under the data root, the documented one first: folders, lists
    (FILE.txt), arrays (FILE.npz), or sets of torchvision as `torchvision:CIFAR10:test`. source:
    where to get it. images: how many the published protocol has, None where there is none. md5: of
    the archive behind `source`, None where it has no archive. layout: of the files in a folder.
    list_root: the folder under the data root that the paths of a list start from; None for the
    list's own.
    """

    places: tuple[str, ...]
    source: str = ""
    images: int | None = None
    md5: str | None = None
    layout: str = "*.jpg"
    list_root: str | None = None


@dataclass(frozen=True)
class Place:
    """Where the images of a set are: a source as `extraction.sources` opens it, and what the paths
    of a list start from where that is not the list's folder."""

    source: str
    list_root: Path | None = None


@dataclass(frozen=True)
class Benchmark:
    """id: the test images that count as in-distribution. calibration: further ID images, never
    tested on; optional on disk. ood: the out-of-distribution sets by name, in the order of the
    report. groups: averages over some of them, by name.

    arch: of the network it is run on where none is given, None where one must be; arch_args and
    head are of that network. Its weights: those in the file `checkpoint` under the data root, or
    `weights` by name. preprocessing: for networks that say nothing of their own;
    given_preprocessing: steps that come before what that network's weights say. published:
    whether published numbers exist for these sets. prepare: makes the image sets under the data
    root, where they are not downloaded. remark: what a reader of the results must know. file: that
    the user wrote, where it is not built in.
    """

    id: ImageSet
    calibration: ImageSet | None
    ood: Mapping[str, ImageSet]
    arch: str | None = None
    checkpoint: str | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    published: bool = False
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None
    weights: str | None = None
    arch_args: Mapping[str, object] = field(default_factory=dict)
    head: str | None = None
    given_preprocessing: RecordedPreprocessing = field(default_factory=RecordedPreprocessing)
    remark: str | None = None
    name: str = ""
    file: Path | None = None

    @property
    def spelling(self) -> str:
        """What stands after --benchmark."""
        return str(self.file or self.name)

    @property
    def sets(self) -> dict[str, ImageSet]:
        known = {"id": self.id, "calibration": self.calibration, **self.ood}
        return {name: image_set for name, image_set in known.items() if image_set}


def _spellings(parents: str, *children: str) -> tuple[str, ...]:
    return tuple(
        f"{parent}/{child}".rstrip("/") for child in children for parent in parents.split()
    )


def _prepare_digits(data_root: Path) -> None:
    from lhact.benchmarks import digits  # needs torchvision, which eval.py does without

    digits.prepare(data_root, BENCHMARKS["digits"].preprocessing)


def _digits(folder: str) -> ImageSet:
    return ImageSet((f"digits/{folder}",), "python get_activation.py --benchmark digits")


# The first spelling is the one of the authors' README; id_data/imagenet is that of their code.
# Letter case is ignored.
_IMAGENET = "id_data/ILSVRC-2012 id_data/imagenet id_data/imagenet-1k id_data/ILSVRC2012"
_IMAGENET_SOURCE = "https://www.image-net.org/challenges/LSVRC/2012/ (needs an account)"
_WNIDS = "<wnid>/*.JPEG"


def _textures(parents: str) -> ImageSet:
    """All of DTD (Cimpoi et al., CVPR 2014), 47 classes x 120, not one of its splits."""
    source = "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"
    md5, places = "fff73e5086ae6bdbea199a49dfb8a4c1", _spellings(parents, "images", "")
    return ImageSet(places, source, 5_640, md5, "<class>/*.jpg")


def _huang_li(name: str, md5: str) -> ImageSet:
    """A subset by Huang & Li, "MOS", CVPR 2021."""
    places = _spellings(f"ood_data/{name}", "images", "")
    return ImageSet(places, f"{HUANG_LI}/{name}.tar.gz", 10_000, md5)


def _torchvision(name: str, split: str, images: int) -> ImageSet:
    source = "torchvision: get_activation.py --download"
    return ImageSet((f"torchvision:{name}:{split}",), source, images)


def _cifar(name: str) -> Benchmark:
    """The six OOD sets that DICE (Sun & Li, ECCV 2022), ReAct's successors and LHAct test networks
    of CIFAR on. Folders are those of DICE's readme (ood_datasets) and of KNN-OOD's code (ood_data).

    SVHN is all of torchvision's test split; their code draws 10,000 images of it, by no list that
    is published. The mean and deviations are those of both programs, for CIFAR-100 too.
    """

    dropbox = "https://www.dropbox.com/s"
    places365 = "http://data.csail.mit.edu/places/places365/test_256.tar (10,000 images drawn)"
    lsun, resized = "fhtsw1m3qxlwj6h/LSUN.tar.gz", "moqh2wh8696c3yl/LSUN_resize.tar.gz"
    downloaded = {
        "Places365": ("places365/test_subset places365", places365, 10_000, "**/*.jpg"),
        "LSUN-C": ("LSUN", f"{dropbox}/{lsun}", 10_000, "test/*.png"),
        "LSUN-R": ("LSUN_resize", f"{dropbox}/{resized}", 10_000, "**/*.png"),
        "iSUN": ("iSUN", f"{dropbox}/ssz7qxfqae0cca5/iSUN.tar.gz", 8_925, "**/*"),
    }
    parents = "ood_datasets ood_data"
    return Benchmark(
        id=_torchvision(name, "test", 10_000),
        calibration=_torchvision(name, "train", 50_000),
        ood={
            "Textures": _textures("ood_datasets/dtd ood_data/dtd ood_data/Textures"),
            "SVHN": _torchvision("SVHN", "test", 26_032),
            **{
                key: ImageSet(_spellings(parents, *folders.split()), source, images, layout=layout)
                for key, (folders, source, images, layout) in downloaded.items()
            },
        },
        preprocessing=Preprocessing(
            resize=32, crop=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
        ),
    )


def _openood(
    name: str, near: Mapping[str, str], far: Mapping[str, str], **network: Any
) -> Benchmark:
    """A benchmark of OpenOOD v1.5 (Zhang et al., 2023), by its own lists and folders: the data root
    is its `data`. near, far: OOD set -> the list of it, without `test_` and `.txt`.

    Of ImageNet the Textures alone lie in images_classic (configs/datasets/imagenet/imagenet_ood.yml
    there), of CIFAR all sets do.
    """

    def listed(split: str, subset: str) -> ImageSet:
        classic = name != "imagenet" or subset == "textures"
        return ImageSet(
            (f"benchmark_imglist/{name}/{split}_{subset}.txt",),
            "https://github.com/Jingkang50/OpenOOD (scripts/download); --data-root is its `data`",
            list_root="images_classic" if classic else "images_largescale",
        )

    return Benchmark(
        id=listed("test", name),
        calibration=listed("train", name),
        ood={key: listed("test", subset) for key, subset in {**near, **far}.items()},
        groups={"near average": tuple(near), "far average": tuple(far)},
        remark="OpenOOD reports FPR95 with OOD as the positive class since v1.5, which is "
        "--metrics fpr95_ood_positive; `fpr95` has ID as the positive class",
        **network,
    )


def _openood_cifar(name: str, near: Mapping[str, str], preprocessing: Preprocessing) -> Benchmark:
    far = {"MNIST": "mnist", "SVHN": "svhn", "Textures": "texture", "Places365": "places365"}
    return _openood(name, {**near, "TinyImageNet": "tin"}, far, preprocessing=preprocessing)


BENCHMARKS: dict[str, Benchmark] = {
    # The protocol of ReAct's and LHAct's ImageNet tables.
    "imagenet": Benchmark(
        id=ImageSet(
            _spellings(_IMAGENET, "val", "validation"), _IMAGENET_SOURCE, 50_000, layout=_WNIDS
        ),
        calibration=ImageSet(
            _spellings(_IMAGENET, "train"), _IMAGENET_SOURCE, 1_281_167, layout=_WNIDS
        ),
        ood={
            "iNaturalist": _huang_li("iNaturalist", "5be6ea8aa027d7b631916427b32cb335"),
            "SUN": _huang_li("SUN", "8469c3ada62211477954ec1be53b12d0"),
            "Places": _huang_li("Places", "b5cb5eba2754ae2a28beea8718db699a"),
            "Textures": _textures("ood_data/dtd ood_data/Textures ood_data/dtd/dtd"),
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
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "openood-imagenet": _openood(
        "imagenet",
        {"SSB-hard": "ssb_hard", "NINCO": "ninco"},
        {"iNaturalist": "inaturalist", "Textures": "textures", "OpenImage-O": "openimage_o"},
        arch="resnet50",
    ),
    "openood-cifar10": _openood_cifar(
        "cifar10",
        {"CIFAR-100": "cifar100"},
        Preprocessing(32, 32, "bilinear", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
    "openood-cifar100": _openood_cifar(
        "cifar100",
        {"CIFAR-10": "cifar10"},
        Preprocessing(32, 32, "bilinear", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ),
}

# Features from elsewhere can be cached under the name of any benchmark; this one stands for all
# that are not known.
UNKNOWN = Benchmark(id=ImageSet(()), calibration=None, ood={})


def _existing(root: Path, place: str) -> Iterator[Path]:
    """`root/place` where it is there, whatever the letter case of its components on disk: a
    directory, or a file where `place` has the ending of one."""
    if not place:
        yield root
        return
    head, _, rest = place.partition("/")
    if not root.is_dir():
        return
    names = sorted(os.listdir(root), key=lambda name: (name != head, name))
    for name in names:
        if name.lower() == head.lower():
            if (root / name).is_dir():
                yield from _existing(root / name, rest)
            elif not rest and Path(head).suffix and (root / name).is_file():
                yield root / name


def find(data_root: Path, image_set: ImageSet) -> Place | None:
    """The first of the set's places that exists under `data_root`, in the order of its spellings;
    None if none does. A set of torchvision counts as there: only opening it can tell."""
    list_root = None if image_set.list_root is None else data_root / image_set.list_root
    for place in image_set.places:
        if place.startswith("torchvision:") or (os.path.isabs(place) and os.path.exists(place)):
            return Place(place, list_root)
        for path in _existing(data_root, place) if not os.path.isabs(place) else ():
            return Place(str(path), list_root)
    return None


def locate(benchmark: Benchmark, data_root: Path, own: Mapping[str, str]) -> dict[str, Place]:
    """Image set name -> where its images are, in the order of extraction: `id`, `calibration` where
    it is there, then the OOD sets.

    own: sources of the user's own, by the same names. Own OOD sets stand in for all of the
    benchmark's; an own ID set does not go with the benchmark's calibration set.
    Raises MissingData, listing every set that is wanted and not there with the layout and the
    source.
    """
    own_ood = [key for key in own if key not in ("id", "calibration")]
    wanted = {
        key: image_set
        for key, image_set in benchmark.sets.items()
        if key not in own
        and not (key == "calibration" and "id" in own)
        and not (key in benchmark.ood and own_ood)
    }
    found = {key: find(data_root, image_set) for key, image_set in wanted.items()}
    missing = [key for key in wanted if found[key] is None and key != "calibration"]
    if missing:
        raise MissingData(_missing_message(benchmark, data_root, missing))
    places = {key: place for key, place in found.items() if place}
    places |= {key: Place(source) for key, source in own.items()}
    order = ("id", "calibration", *benchmark.ood, *own_ood)
    return {key: places[key] for key in dict.fromkeys(order) if key in places}


def _missing_message(benchmark: Benchmark, data_root: Path, missing: Sequence[str]) -> str:
    lines = [f"{len(missing)} of the image sets of the benchmark {benchmark.spelling} are missing:"]
    for name in missing:
        image_set = benchmark.sets[name]
        count = f", {image_set.images:,} images" if image_set.images else ""
        place = str(data_root / image_set.places[0])
        if image_set.list_root is not None:
            place += f", its images in {data_root / image_set.list_root}"
        elif image_set.layout and not Path(place).suffix:
            place += f"/{image_set.layout}"
        origin = f"; from {image_set.source}" if image_set.source else ""
        lines.append(f"  {name}: {place}{count}{origin}")
    if any("torchvision:" in image_set.places[0] for image_set in benchmark.sets.values()):
        lines.append("It also has sets of torchvision, which --download fetches.")
    is_default = benchmark.name == "imagenet"
    chosen = "" if is_default else f" --benchmark {shlex.quote(benchmark.spelling)}"
    lines += [
        "Put them there, or give sources of your own: --data-root DIR, --id SOURCE, "
        "--ood NAME=SOURCE.",
        f"State of each, and downloads: python -m lhact.data{chosen}",
        "Without any download: python get_activation.py --benchmark digits",
    ]
    return "\n".join(lines)
