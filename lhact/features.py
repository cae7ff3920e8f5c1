"""Files of features, labels and a linear head in, a cache out:

python -m lhact.features --name mine --id z.npy --ood SVHN=svhn.pt --head W.npy b.npy

A FILE is .npy, .npz, .pt, .pth or .safetensors. Of several arrays in it the one named `features` or
`activations` is taken (`logits`, `labels`, `weight` or `bias` where those are wanted), the only
one, or NAME of FILE:NAME.
"""

import argparse
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lhact import command, options
from lhact.cache import CALIBRATION, ID, cache_folder
from lhact.extraction.checkpoints import read_state_dict
from lhact.extraction.npz import Member
from lhact.extraction.weights import BadNetwork, is_plain, read, reason
from lhact.from_arrays import Array, BadFeatures, FeatureSet, Head, Origin, write_cache
from lhact.messages import say, shown

PROGRAM = "lhact.features"
EXTENSIONS = (".npy", ".npz", ".pt", ".pth", ".safetensors")
FEATURES, LABELS, LOGITS = ("features", "activations"), ("labels",), ("logits",)
MOST_UNPACKED = 2**34  # bytes of memory for an array of a compressed .npz


class MissingArray(BadFeatures):
    """A file that holds no array of the name that is wanted."""


def read_array(text: str, wanted: Sequence[str]) -> Array:
    """The array in FILE or FILE:NAME; without a NAME one of those wanted, or the only one. Mapped
    from a .npy and an uncompressed .npz, in memory from the others.

    Raises BadFeatures where it cannot be read without running code, and where it is not clear which
    array is meant.
    """
    path, name = _split(text)
    kind = path.suffix.lower()
    if kind not in EXTENSIONS:
        raise BadFeatures(
            f"{shown(text)}: wanted a file {', '.join(EXTENSIONS)}, got {kind or 'no extension'}"
        )
    if not path.is_file():
        raise BadFeatures(f"there is no file {shown(path)}; give the file that holds the array")
    try:
        if kind == ".npz":
            with zipfile.ZipFile(path) as archive:
                names = [member.removesuffix(".npy") for member in archive.namelist()]
                chosen = Member(str(path), archive, _choose(path, names, name, wanted))
                return chosen.opener(MOST_UNPACKED)()
        if kind == ".npy":
            content: Any = {"": np.lib.format.open_memmap(path, mode="r")}
        else:
            content = read(path)
        if not isinstance(content, Mapping):
            content = {"": content}
        array: Array = content[_choose(path, list(content), name, wanted)]
        if not (isinstance(array, np.ndarray) or is_plain(array)):
            raise ValueError(f"wanted an array of numbers, got {type(array).__name__}")
        return array
    except (OSError, MissingArray):
        raise
    except Exception as error:  # NumPy, zipfile and torch raise nearly anything on a damaged file
        why = reason(error.__cause__ or error if isinstance(error, BadNetwork) else error)
        raise BadFeatures(f"{shown(text)} cannot be read: {why}") from error


def _split(text: str) -> tuple[Path, str | None]:
    """FILE or FILE:NAME as the file and the name."""
    extensions = "|".join(re.escape(extension) for extension in EXTENSIONS)
    match = re.fullmatch(rf"(.+(?:{extensions})):(.+)", text, re.IGNORECASE | re.DOTALL)
    if match is None or Path(text).exists():
        return options.path(text), None
    return options.path(match[1]), match[2]


def _choose(path: Path, names: Sequence[object], name: str | None, wanted: Sequence[str]) -> str:
    """The name of the array that is meant, '' for one without a name. Raises MissingArray where it
    is not clear."""
    named = [key for key in names if isinstance(key, str)]
    for key in (name,) if name is not None else wanted:
        if key in named:
            return key
    if name is None and len(named) == 1:
        return named[0]
    there = ", ".join(shown(key) or "one without a name" for key in named[:10]) or "nothing"
    looked_for = " or ".join(map(repr, wanted if name is None else [name]))
    raise MissingArray(
        f"{shown(path)} holds no array {looked_for}, but {there}; name the one as FILE:NAME"
    )


def read_head(texts: Sequence[str]) -> Head:
    """(weight, bias) from one or two files. A file that holds `weight` and `bias`, such as a
    cache's head.npz, gives both; where there is no bias, it is None, and that is said."""
    weight = read_array(texts[0], ("weight",))
    if len(texts) == 2:
        return weight, read_array(texts[1], ("bias",))
    try:
        bias = read_array(f"{_split(texts[0])[0]}:bias", ())
    except MissingArray:
        say(f"head: {shown(texts[0])} has no bias, so zeros are taken")
        return weight, None
    return weight, bias


def read_layer(path: Path, layer: str) -> Head:
    """(weight, bias) of the layer of that name in a state dict, whatever wrapper's name stands
    before it. Raises BadNetwork and BadFeatures."""
    state = read_state_dict(path)
    for remark in state.remarks:
        say(remark)
    found = [key for key in state.tensors if f".{key}".endswith(f".{layer}.weight")]
    if f"{layer}.weight" in found:
        found = [f"{layer}.weight"]
    if len(found) != 1:
        # The last ones: a head stands at the end.
        linear = [k for k, v in state.tensors.items() if k.endswith(".weight") and v.ndim == 2]
        known = ", ".join(shown(key.removesuffix(".weight")) for key in (found or linear[-5:]))
        raise BadFeatures(
            f"{path} holds {'several layers' if found else 'no layer'} {layer!r}; --head is one of "
            f"its linear layers, such as {known or 'none'}"
        )
    bias = state.tensors.get(found[0].removesuffix("weight") + "bias")
    if bias is None:
        say(f"head: {layer} of {shown(path.name)} has no bias, so zeros are taken")
    return state.tensors[found[0]], bias


@dataclass(frozen=True)
class Job:
    """What lhact.features is asked for. files, labels: image set name -> FILE. head: files, or the
    name of a layer of `checkpoint`; empty for logits."""

    folder: Path
    files: Mapping[str, str]
    labels: Mapping[str, str]
    head: tuple[str, ...]
    checkpoint: Path | None
    origin: Origin
    overwrite: bool


def parse_job(argv: Sequence[str] | None) -> Job:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", type=options.name, required=True, help="the name to cache them under")
    known = "a known benchmark, or any name; default: own"
    add("--benchmark", type=options.name, default="own", help=known)
    add("--cache-dir", type=options.path, default="cache", help="of the caches; default: cache")
    add("--id", required=True, metavar="FILE", help="features (images, channels) of ID test images")
    add("--id-labels", metavar="FILE", help="their class numbers")
    add("--calibration", metavar="FILE", help="features of further ID images, never tested on")
    add("--calibration-labels", metavar="FILE", help="their class numbers")
    ood: dict[str, Any] = {"type": options.named_source, "action": "append", "required": True}
    add("--ood", **ood, metavar="NAME=FILE", help="features of OOD images; repeatable")
    head_help = "files of weight (classes, channels) and bias; the layer's NAME with --checkpoint"
    add("--head", nargs="+", default=[], metavar="FILE", help=head_help)
    add("--checkpoint", type=options.path, metavar="FILE", help="a state dict that holds the head")
    add("--logits", action="store_true", help="the files hold logits (images, classes); no head")
    add("--arch", help="the network that the features are of")
    add("--weights", help="its published weights by name, which eval.py then checks")
    add("--overwrite", action="store_true", help="replace the sets given")
    args = parser.parse_args(argv)
    wrong = {
        "--head takes one or two files": len(args.head) > 2,
        "--head NAME is one layer of --checkpoint": args.checkpoint and len(args.head) != 1,
        "give --head, or --logits for logits": not args.head and not args.logits,
        "--logits goes without --head and --checkpoint": args.logits and args.head,
        "--logits goes without --weights, which could not be checked": args.logits and args.weights,
        "--weights goes with --arch": args.weights and not args.arch,
        "--calibration-labels goes with --calibration": (
            args.calibration_labels and not args.calibration
        ),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            parser.error(message)
    try:
        files = options.sources([(ID, args.id), (CALIBRATION, args.calibration)], args.ood)
    except ValueError as error:
        parser.error(str(error))
    head_file = args.checkpoint or (Path(args.head[0]) if args.head else None)
    labels = {ID: args.id_labels, CALIBRATION: args.calibration_labels}
    return Job(
        cache_folder(args.cache_dir, args.benchmark, args.name),
        files,
        {name: file for name, file in labels.items() if file},
        tuple(args.head),
        args.checkpoint,
        Origin(args.arch, args.weights, head_file.name if head_file else None),
        args.overwrite,
    )


def run(job: Job) -> None:
    """Fills the cache. Raises BadFeatures, BadNetwork, BadCache or OSError."""
    sets: dict[str, FeatureSet | np.ndarray | Tensor] = {
        name: FeatureSet(
            read_array(file, FEATURES if job.head else LOGITS),
            read_array(job.labels[name], LABELS) if name in job.labels else None,
            source=Path(file).name,
        )
        for name, file in job.files.items()
    }
    head = None
    if job.checkpoint:
        head = read_layer(job.checkpoint, job.head[0])
    elif job.head:
        head = read_head(job.head)
    write_cache(job.folder, sets, head, job.origin, job.overwrite)
    say(f"done: {job.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    interrupted = "interrupted; give the same command again"
    return command.run(PROGRAM, lambda: parse_job(argv), run, interrupted)


if __name__ == "__main__":
    sys.exit(main())
