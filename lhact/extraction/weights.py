"""A file of weights in; what it holds (tensors by name, nothing run, nothing unbounded) out.

Every file is read as if a stranger had written it, published ones too: torch's restricted unpickler
or safetensors reads it, and what would take unbounded memory or time is refused before.
"""

import hashlib
import io
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lhact import messages
from lhact.messages import InputError


class BadNetwork(InputError, ValueError):
    """The architecture, the weights or the checkpoint cannot be used; the message says what was
    wanted, what came, and the mend."""


# What weights and statistics are stored in; anything else, such as 8-bit floats or quantised
# integers, needs an interpretation.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# Objects that training scripts save beside the weights. Nobody reads them here, so each becomes an
# empty object, and the code of these classes does not run.
BESIDE_WEIGHTS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.datetime",
    "datetime.timedelta",
    *(
        f"pathlib.{local}{name}"
        for local in ("", "_local.")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
    ),
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    *(
        f"numpy.dtypes.{name}DType"
        for name in (
            *("Bool", "Int8", "Int16", "Int32", "Int64", "LongLong"),
            *("UInt8", "UInt16", "UInt32", "UInt64", "Float16", "Float32", "Float64"),
        )
    ),
)
# How often the things in a pickle may occur in each other, written out; an optimizer of 10,000
# tensors has a tenth. A pickle of 60 nested pairs, each of the same thing twice, has 2^60.
MOST_OCCURRENCES = 2**22
# Dict keys that an attacker can choose to collide, which makes a dict's time the square of these.
MOST_ODD_KEYS = 4096

SAVE = (
    "the program that made it saves what is needed by "
    'torch.save(network.state_dict(), "state_dict.pth")'
)


class Unread:
    """What stands in for an object beside the weights."""

    def __new__(cls, *_: object) -> "Unread":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read(path: Path) -> object:
    """What torch.save or safetensors wrote into the file: tensors in main memory, in dicts and
    lists. Raises BadNetwork for a file that is not there, damaged, hostile, or of other objects."""
    if not path.exists():
        raise BadNetwork(f"no checkpoint at {path}; give the file of a state dict")
    if not path.is_file():  # opening a named pipe would wait for its other end
        raise BadNetwork(f"{path} is not a checkpoint that can be loaded safely: it is no file")
    try:
        if _is_safetensors(path):
            return safetensors.torch.load_file(path)
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(Unread, name) for name in BESIDE_WEIGHTS]),
        ):
            warnings.simplefilter("ignore")  # kinds of content that are refused, or do no harm
            _check(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes torch.load raise nearly anything
        raise BadNetwork(
            f"{path} is not a checkpoint that can be loaded safely (wanted a state dict, tensors "
            f"by name, as torch.save or safetensors writes it): {reason(error)}; {SAVE}"
        ) from error


def _is_safetensors(path: Path) -> bool:
    """Whether the file starts as a safetensors file does: the length of a JSON object, and it."""
    with open(path, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length <= path.stat().st_size


def _check(path: Path) -> None:
    """Raises ValueError for an archive that is compressed, as torch.save's are not: it could take
    any amount of memory; for one that has changed since it was written, which torch.load does not
    notice; and for a pickle that takes unbounded time to load, see `_check_pickle`."""
    with open(path, "rb") as file:
        if file.peek(4)[:4] != b"PK\x03\x04":  # what torch goes by
            for _ in range(5):  # of its old format: magic number, version, system, content, keys
                _check_pickle(file)
                if not file.peek(1):
                    break
            return
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > path.stat().st_size:
                raise ValueError(f"it is compressed, from {size} bytes")
            if damaged := archive.testzip():
                damaged = shown(damaged)
                raise ValueError(f"it is damaged: the checksum of its member {damaged} is another")
    # By torch's own reader: another one might find another member.
    _check_pickle(io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")))


def _check_pickle(file: IO[bytes]) -> None:
    """Raises ValueError where things occur in each other more often than MOST_OCCURRENCES, or with
    too many keys that are no text and no small number. The next pickle in the file comes next.

    The pickle machine runs here on [occurrences, is it an odd key] instead of values; what each
    instruction takes from the stack and leaves there is known from pickletools.
    """
    stack: list[list[int]] = []
    marks: list[int] = []
    memo: dict[Any, list[int]] = {}
    odd_keys = 0
    argument: Any
    for code, argument, _ in pickletools.genops(file):
        if code.name == "MARK":
            marks.append(len(stack))
        elif code.name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif code.name.endswith("GET"):
            stack.append(memo[argument])
        else:
            takes = len(code.stack_before)
            if pickletools.markobject in code.stack_before:
                takes = len(stack) - marks.pop() + code.stack_before.index(pickletools.markobject)
            first = len(stack) - takes
            taken, stack[first:] = stack[first:], []
            if code.name.startswith("SETITEM"):
                odd_keys += sum(is_odd for _, is_odd in taken[1::2])
            is_odd = not (code.name.endswith("UNICODE") or code.name.startswith("BININT"))
            # What is filled stays the same thing, also where it was put into the memo before.
            thing = taken.pop(0) if code.name in FILLS and taken else [1, is_odd]
            thing[0] += sum(occurrences for occurrences, _ in taken)
            odd_keys += code.name == "LONG1" and abs(argument) >= 2**61
            if thing[0] > MOST_OCCURRENCES or odd_keys > MOST_ODD_KEYS:
                raise ValueError("its parts occur in each other too often to be loaded")
            stack += [thing] * len(code.stack_after)


FILLS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")


def shown(text: object) -> str:
    """A name from a file on one line, whatever its characters; of a very long one its start."""
    text = str(text)
    return messages.shown(text if len(text) <= 120 else f"{text[:120]}...")


def reason(error: BaseException) -> str:
    """The sentence that says why a file is refused, without torch's advice to load it anyway."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    mark = "WeightsUnpickler error: "
    line = next((line for line in lines if mark in line or "unsupported GLOBAL" in line), lines[0])
    return messages.shown((line.partition(mark)[2] or line).split(". Please use")[0].rstrip("."))


def is_plain(value: Any) -> bool:
    """Whether it is a tensor in main memory, of numbers that are all stored: one that is expanded
    could be of any size."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and not value.is_nested
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in (*FLOATS, *INTEGERS)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def state_dict_sha256(state: Mapping[str, Tensor]) -> str:
    """sha256 over the entries in sorted order: name, dtype, shape and the values' bytes."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_published(sha256: str, url: str) -> bool:
    """Whether a file of that sha256 is the published one: torchvision names each after the start of
    its sha256, resnet50-0676ba61.pth."""
    return sha256.startswith(_published_hash(url))


def _published_hash(url: str) -> str:
    return Path(url).stem.rpartition("-")[2]


def fetch(url: str, what: str) -> Path:
    """The published file in torch.hub's folder, downloaded where it is not there, its hash checked.
    what: what the messages call it. Raises BadNetwork."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if path.exists():
        if not (path.is_file() and is_published(file_sha256(path), url)):
            raise BadNetwork(
                f"{path} is not the file that torchvision publishes as {what} (its sha256 does not "
                f"start with {_published_hash(url)}); move it away, and it is fetched anew"
            )
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=_published_hash(url))
    except Exception as error:  # network errors of every kind, and torch.hub's hash check
        raise BadNetwork(
            f"{what} could not be fetched: {error}; fetch {url} by hand and put it at {path}"
        ) from error
    return path
