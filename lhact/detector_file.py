"""A fitted method and its threshold in, a safetensors file out, and back; no pickle anywhere.

The tensors are what the method learnt, `<step>.<argument>` by name; the metadata has one entry,
`lhact`, JSON with all the rest. A file of a later format is refused; format 1 stays readable.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import lhact
from lhact import imagenet
from lhact.cache import BadCache, Cache
from lhact.evaluation.metrics import threshold_keeping
from lhact.files import write_whole
from lhact.messages import InputError
from lhact.methods.compose import BadMethod
from lhact.methods.fit import FittedMethod
from lhact.methods.module import MethodModule, StepModule, module_of
from lhact.published import ODIN_PERTURBATION
from lhact.records import (
    LOGITS,
    NetworkInfo,
    Perturbation,
    Preprocessing,
    RecordedPreprocessing,
)

FORMAT = 1
# What metadata that other hands wrote makes `_from_json` raise; BadRecord is a ValueError.
WRONG_METADATA = (ValueError, LookupError, TypeError, AttributeError)


class BadDetector(InputError, ValueError):
    """A file that holds no detector, or one of another network; the message says what is wrong."""


@dataclass(frozen=True)
class SavedDetector:
    """What a detector is but for its network.

    method: fitted. threshold: an image is ID when it scores above it; keep: the share of ID images
    for which that holds. network: which one it is of. shape: of one image (channels, height,
    width), preprocessing: what makes the network's input of it, None where they are not known.
    digests: of the network's tensors by name, of the head's alone where no others were at hand.
    class_names: in the order of the logits. perturbation: what ODIN does to the images.
    """

    method: MethodModule
    threshold: float
    keep: float
    network: NetworkInfo
    digests: Mapping[str, str]
    shape: tuple[int, int, int] | None = None
    preprocessing: RecordedPreprocessing | None = None
    class_names: tuple[str, ...] | None = None
    perturbation: Perturbation = ODIN_PERTURBATION


def digest(tensor: Tensor) -> str:
    """What tells a tensor from others: its type, its shape and its values."""
    content = tensor.detach().cpu().contiguous()
    start = f"{content.dtype}{tuple(content.shape)}".encode()
    values = content.reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(start + values.data).hexdigest()[:16]


def difference(saved: SavedDetector, info: NetworkInfo, digests: Mapping[str, str]) -> str | None:
    """How another network, with those digests, differs from the one of the detector; None where it
    does not."""
    own, wanted = (f"{i.classes} classes of {i.channels} channels" for i in (info, saved.network))
    if own != wanted:
        return f"its head has {own}, not {wanted}"
    whole = len(saved.digests) > 2  # those of a cache are of its head alone
    kinds = {
        "differs": [n for n, value in saved.digests.items() if digests.get(n, value) != value],
        "is missing": [name for name in saved.digests if name not in digests],
        "is not known there": [name for name in digests if whole and name not in saved.digests],
    }
    for what, names in kinds.items():
        if names:
            more = f" (and {len(names) - 1} more)" if names[1:] else ""
            return f"{names[0]}{more} {what}"
    hashes = {info.sha256, saved.network.sha256}
    # Where features were given, that hash too is of the head alone.
    known = not whole and saved.network.given_as is None and None not in hashes
    if known and len(hashes) > 1:
        return "its head is the same, but other layers or the names of its tensors differ"
    return None


def of_cache(
    opened: Cache, fitted: FittedMethod, id_scores: np.ndarray, keep: float
) -> SavedDetector:
    """The method as it was evaluated on a cache. id_scores: (images,) of its ID set.

    Raises BadCache for a cache of logits, whose head is no layer of a network.
    """
    if opened.info.network.given_as == LOGITS:
        raise BadCache(
            f"the cache {opened.folder} holds logits, and a detector reads the activations that "
            "make them; save one from a cache of features and their head"
        )
    info, size = opened.info, opened.info.preprocessing.crop
    of_imagenet = "imagenet" in opened.folder.resolve().parent.name
    head = {"head.weight": opened.weight, "head.bias": opened.bias}
    return SavedDetector(
        module_of(fitted),
        threshold_keeping(id_scores, keep),
        keep,
        info.network,
        {name: digest(torch.from_numpy(values)) for name, values in head.items()},
        None if size is None else (3, size, size),
        _preprocessing(info.preprocessing),
        imagenet.class_names() if of_imagenet and info.network.classes == 1000 else None,
        (opened.perturbed("id").info.perturbation if fitted.perturbed else None)
        or ODIN_PERTURBATION,
    )


def write(path: Path, saved: SavedDetector) -> None:
    """The detector to the file, which is there with all of it or as it was before."""
    steps = [
        {
            "name": step.name,
            "tensors": [name for name, _ in step.named_buffers()],
            "batches": list(step.batches),
            "numbers": _spelled(step.numbers),
            "of_head": list(step.of_head),
        }
        for step in saved.method.steps
    ]
    content = {
        "format": FORMAT,
        "version": lhact.__version__,
        "method": saved.method.name,
        "parameters": _spelled(saved.method.parameters_used),
        "steps": steps,
        "threshold": saved.threshold,
        "keep": saved.keep,
        "network": saved.network.to_json(),
        "shape": saved.shape,
        "preprocessing": saved.preprocessing and saved.preprocessing.to_json(),
        "digests": saved.digests,
        "class_names": saved.class_names and list(saved.class_names),
        "perturbation": saved.perturbation.to_json(),
    }
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous().clone()
        for number, step in enumerate(saved.method.steps)
        for name, tensor in step.named_buffers()
    }
    write_whole(path, save(tensors, {"lhact": json.dumps(content)}))


def read(path: Path) -> SavedDetector:
    """What `write` wrote. Raises BadDetector where there is no such file."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise BadDetector(
            f"there is no file {path}; give one of Detector.save or eval.py --save-detector"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("lhact")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata is None:
            raise BadDetector(f"{path} holds no detector of lhact, only tensors")
        content = json.loads(metadata)
        if type(content["format"]) is int and content["format"] > FORMAT:
            raise BadDetector(
                f"{path} has format {content['format']}, written by lhact {content['version']}; "
                f"this version reads up to {FORMAT}; update it"
            )
        return _from_json(content, tensors)
    except BadDetector:
        raise
    except BadMethod as error:
        raise BadDetector(f"{path}: {error}") from error
    except (SafetensorError, OSError, RecursionError, *WRONG_METADATA) as error:
        raise BadDetector(
            f"{path} is no detector that can be read ({type(error).__name__}: {error}); save it "
            "again with Detector.save or eval.py --save-detector"
        ) from error


def _from_json(content: Any, tensors: Mapping[str, Tensor]) -> SavedDetector:
    steps = [
        StepModule(
            step["name"],
            {name: tensors[f"{number}.{name}"] for name in step["tensors"]},
            tuple(step["batches"]),
            _read_numbers(step["numbers"]),
            tuple(step["of_head"]),
        )
        for number, step in enumerate(content["steps"])
    ]
    method = MethodModule(str(content["method"]), _read_numbers(content["parameters"]), steps)
    preprocessing, shape, names = (
        content[key] for key in ("preprocessing", "shape", "class_names")
    )
    threshold = float(content["threshold"])
    if not math.isfinite(threshold):
        raise ValueError(f"its threshold is {threshold}")
    return SavedDetector(
        method,
        threshold,
        float(content["keep"]),
        NetworkInfo.from_json(content["network"]),
        {str(key): str(value) for key, value in content["digests"].items()},
        None if shape is None else (int(shape[0]), int(shape[1]), int(shape[2])),
        preprocessing and _preprocessing(RecordedPreprocessing.from_json(preprocessing)),
        None if names is None else tuple(map(str, names)),
        Perturbation.from_json(content["perturbation"]),
    )


def _preprocessing(recorded: RecordedPreprocessing) -> RecordedPreprocessing:
    """As Preprocessing where all of it is known."""
    values = vars(recorded)
    return recorded if None in values.values() else Preprocessing(**values)


def _spelled(numbers: Mapping[str, float | int | None]) -> dict[str, object]:
    """JSON has no number for what is infinite."""
    infinite = {key: str(n) for key, n in numbers.items() if n is not None and math.isinf(n)}
    return {**numbers, **infinite}


def _read_numbers(spelled: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(n) if isinstance(n, str) else n for key, n in spelled.items()}
