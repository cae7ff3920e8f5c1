"""What a checkpoint file holds and a network in, the network with these weights out."""

import difflib
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lhact.extraction.weights import SAVE, BadNetwork, is_plain, read, shown

# Where training programs put the state dict; averaged weights, which are the better ones, first.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema")
PLAIN = ("state_dict", "model", "model_state_dict", "net", "network", "params", "weights", "module")
MOST_NESTED = 3
NOT_WEIGHTS = ("n_averaged",)  # the counter of torch.optim.swa_utils.AveragedModel
SHOWN = 3  # keys in a message

# torchvision's DenseNet files of 2017 have `norm.1`, where its code has had `norm1` since.
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$"
)


@dataclass(frozen=True)
class StateDict:
    """The weights in a file, by name. remarks: what was chosen or left out, a line each."""

    path: Path
    tensors: Mapping[str, Tensor]
    remarks: tuple[str, ...] = ()


def read_state_dict(path: Path) -> StateDict:
    """The state dict in a file: bare, or under any of the keys that are usual.

    Raises BadNetwork for a file that cannot be read safely or holds none.
    """
    content = read(path)
    remarks: list[str] = []
    for _ in range(MOST_NESTED):
        if not isinstance(content, Mapping):
            break
        inner = [key for key in (*AVERAGED, *PLAIN) if isinstance(content.get(key), Mapping)]
        key = next((key for key in inner if content[key]), None)
        if key is None:
            break
        others = [other for other in inner if other in PLAIN]
        if key in AVERAGED and others:
            remarks.append(f"{path.name}: averaged weights taken ({key!r}, not {others[0]!r})")
        content = content[key]
    wanted = f"wanted tensors by name, bare or under {', '.join(map(repr, PLAIN[:4]))} or the like"
    if not isinstance(content, Mapping) or not content:
        kind = "nothing" if content == {} else type(content).__name__
        raise BadNetwork(f"{path} holds no state dict ({wanted}; found {kind}); {SAVE}")
    tensors = {key: value for key, value in content.items() if key not in NOT_WEIGHTS}
    odd = [k for k, value in tensors.items() if not (isinstance(k, str) and is_plain(value))]
    if odd:
        found = type(content[odd[0]]).__name__
        keys = ", ".join(repr(shown(key)) for key in list(content)[:SHOWN])
        raise BadNetwork(
            f"{path} holds no state dict ({wanted}): {shown(odd[0])} is no plain tensor but "
            f"{found}, and its first keys are {keys}; {SAVE}"
        )
    return StateDict(path, tensors, tuple(remarks))


def fitted_to(state: StateDict, network: nn.Module, ignored: tuple[str, ...] = ()) -> StateDict:
    """The state dict with the names that the network has: without the prefix that wrappers such as
    DataParallel, Lightning or torch.compile put before all names, and with today's names.

    ignored: first parts of names of modules that the network does without.
    """
    wanted = network.state_dict()
    tensors = {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.tensors.items()}
    if not any(".module." in key for key in wanted):
        # DataParallel around a part of the network, as torchvision's AlexNet was trained.
        tensors = {key.replace(".module.", "."): value for key, value in tensors.items()}
    prefix = _prefix(tensors, wanted)
    outside = [key for key in tensors if not key.startswith(prefix)]
    inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    inside = {key: v for key, v in inside.items() if key.partition(".")[0] not in ignored}
    remarks = list(state.remarks)
    if outside:
        names = ", ".join(shown(key) for key in outside[:SHOWN])
        remarks.append(
            f"{state.path.name}: {len(outside)} tensors outside of {prefix!r} left out: {names}"
        )
    return replace(state, tensors=inside, remarks=tuple(remarks))


def _prefix(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What stands before the most of the wanted names."""
    found: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                found[".".join(parts[:start]) + ("." if start else "")] += 1
    if not found:
        return ""
    most = max(found.values())
    return min((p for p, count in found.items() if count == most), key=len)


def with_head(state: StateDict, name: str) -> StateDict:
    """The state dict with its head under the name that the network has: a head behind Dropout in a
    Sequential is `fc.1.weight` instead of `fc.weight`."""
    if f"{name}.weight" in state.tensors:
        return state
    inside = re.compile(rf"^({re.escape(name)})\.\d+\.(weight|bias)\Z")
    renamed = {inside.sub(r"\1.\2", key): value for key, value in state.tensors.items()}
    return replace(state, tensors=renamed)


def fill(network: nn.Module, state: StateDict, arch: str) -> None:
    """Puts the weights into the network. Raises BadNetwork where they do not fit it exactly."""
    for key, value in state.tensors.items():
        if not torch.isfinite(value.float()).all():
            raise BadNetwork(
                f"{state.path}: {shown(key)} holds NaN or infinite values; it is damaged"
            )
    tensors = OrderedDict(state.tensors)
    wanted = network.state_dict()
    if problems := _other_shapes(tensors, wanted):
        missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
        problems = _other_names(sorted(missing), sorted(unexpected)) + problems
    else:
        # A network that asks for its version, as MNASNet does, gets today's; its parts get none, so
        # that they take files of earlier versions: BatchNorm without counters, the names that ViTs
        # had.
        version = {"version": getattr(network, "_version", None)}
        tensors._metadata = {"": version}  # type: ignore[attr-defined]
        try:
            left = network.load_state_dict(tensors, strict=False)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise BadNetwork(f"{state.path} is not a checkpoint of {arch}: {reason}") from error
        problems = _other_names(left.missing_keys, left.unexpected_keys)
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise BadNetwork(
            f"{state.path} is not a checkpoint of {arch}: {'; '.join(problems[:SHOWN])}{more}"
        )


def _other_names(missing: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    """A phrase for each name, with the nearest one in the file where one is missing."""
    # torch itself counts from 0 where an old file has no counters of batches.
    missing = [key for key in missing if not key.endswith(".num_batches_tracked")]
    problems = []
    for number, key in enumerate(missing):
        near = difflib.get_close_matches(key, unexpected, n=1) if number < SHOWN else []
        problems.append(f"missing {key}" + (f" (nearest: {shown(near[0])})" if near else ""))
    return problems + [f"unexpected {shown(key)}" for key in unexpected]


def _other_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """A phrase for each tensor of the same name that does not fit."""
    problems = []
    for key in wanted.keys() & found.keys():
        if found[key].shape != wanted[key].shape:
            shapes = f"{tuple(found[key].shape)}, wanted {tuple(wanted[key].shape)}"
            problems.append(f"{key} is {shapes}; give the --arch that it is of")
        elif wanted[key].is_floating_point() and not found[key].is_floating_point():
            problems.append(f"{key} is {found[key].dtype}, wanted {wanted[key].dtype}")
    return problems
