"""Damaged and hostile cache files and checkpoints, by the hundred: refused by our own exception or
read right.

Never another exception, never code run, never more memory than the file warrants. The same cases in
every run.
"""

import functools
import io
import json
import math
import os
import pickle
import re
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ARCH, Writer, fork, make_network, wait
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval as script
from lhact import cache
from lhact.cache import BadCache
from lhact.extraction import networks
from lhact.extraction.networks import NetworkSpec
from lhact.extraction.weights import BadNetwork, state_dict_sha256

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, CHANNELS, CLASSES = 7, 3, 4
VALUES = np.random.default_rng(0).normal(size=(ROWS, CHANNELS)).astype("<f4")
WEIGHT = np.random.default_rng(1).normal(size=(CLASSES, CHANNELS)).astype("<f4")
BIAS = np.random.default_rng(2).normal(size=CLASSES).astype("<f4")
NETWORK = {"arch": "resnet18", "weights": None, "checkpoint": "own.pth", "sha256": "ab"}
NETWORK |= {"classes": CLASSES, "channels": CHANNELS}
METADATA = {
    "network": NETWORK,
    "preprocessing": {"resize": 256, "crop": 224, "interpolation": "bilinear"},
    "precision": "fp32",
    "odin": None,
    "images": ROWS,
    "channels": CHANNELS,
    "fingerprint": "cd",
    "labels": [i % CLASSES for i in range(ROWS)],
    "paths": [f"n{i:02}/{i}.jpg" for i in range(ROWS)],
    "batch_size": 2,
}
SIDECAR = {"format": 1, **METADATA, "accuracy": 50.0}


def cases(count: int) -> settings:
    unhurried = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=count, derandomize=True, **unhurried)


@contextmanager
def warranted(size: int) -> Iterator[None]:
    """No more memory at any time than a small multiple of a file of that size."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50 * size + 2**20, f"{peak} bytes of memory for a file of {size}"


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, last: int | None = None) -> bytes:
    """Bytes changed, cut out, put in, moved or cut off; half of the places lie before `last` or as
    near to the end."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        end = len(content)
        near = min(end, last or end)
        ranges = ((0, near), (end - near, end), (0, end))
        place = draw(st.one_of(*(st.integers(*ends) for ends in ranges)))
        length = draw(st.integers(1, 24))
        match draw(st.sampled_from(["change", "change", "cut off", "cut out", "put in", "move"])):
            case "change":
                content[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case "cut off":
                del content[place:]
            case "cut out":
                del content[place : place + length]
            case "put in":
                content[place:place] = draw(st.binary(min_size=1, max_size=length))
            case "move":
                piece = content[place : place + length]
                place = draw(st.integers(0, len(content)))
                content[place : place + length] = piece
    return bytes(content)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# ---- activations ----


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, version)
    return content.getvalue()


def by_numpy(content: bytes) -> np.ndarray | None:
    """The array that numpy finds in exactly these bytes, if it is what a cache holds."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception:
        return None
    known = version in ((1, 0), (2, 0)) and array.dtype == np.dtype("<f4") and not file.read()
    fits = known and array.shape == (ROWS, CHANNELS) and array.flags["C_CONTIGUOUS"]
    return array if fits and np.isfinite(array).all() else None


def read_activations(folder: Path, content: bytes) -> bool:
    """Whether they are read; in agreement with numpy either way."""
    (folder / "id.json").write_text(json.dumps(SIDECAR))
    (folder / "id.npy").write_bytes(content)
    wanted = by_numpy(content)
    try:
        with warranted(len(content)):
            found = np.concatenate(list(cache.open_set(folder, "id").chunks(4)))
    except BadCache:
        assert wanted is None, "refused, though numpy reads it"
        return False
    assert wanted is not None, "read, though numpy does not"
    np.testing.assert_array_equal(found, wanted)
    return True


@cases(250)
@given(content=st.sampled_from([npy(VALUES), npy(VALUES, (2, 0))]).flatmap(damaged))
def test_damaged_activations(place, content):
    read_activations(place, content)


SIZES = st.one_of(
    st.sampled_from([ROWS, CHANNELS, 0, 1, -1, -ROWS, True, 2**31, 2**62, 2**64, 10**30]),
    st.integers(),
)
SHAPES = st.one_of(
    st.just((ROWS, CHANNELS)),
    st.tuples(SIZES, SIZES),
    st.lists(SIZES, max_size=4).map(tuple),
    st.none(),
    SIZES,
)
TYPES = ["<f4", ">f4", "f4", "=f4", "<f8", "|O", "O", "<i4", "|V4", "|S4", "<U1", "<M8[s]"]
TYPES += [[("a", "<f4")], ("<f4", (2,)), "", "x", None]
TEXTS = st.text("[](){}'\"0123456789<f,: LTrue__import__\\", max_size=60)


def mostly(right: Any, others: st.SearchStrategy) -> st.SearchStrategy:
    return st.integers(0, 3).flatmap(lambda number: others if number == 3 else st.just(right))


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """An .npy file whose header is drawn entry by entry, or is any text."""
    order = draw(mostly(False, st.sampled_from([True, 0, 1, None, "no"])))
    shape, descr = draw(mostly((ROWS, CHANNELS), SHAPES)), draw(st.sampled_from(["<f4", *TYPES]))
    entries = {"descr": descr, "fortran_order": order, "shape": shape}
    if draw(st.integers(0, 9)) == 0:
        entries[draw(st.sampled_from(["shape2", "", "descr "]))] = 1
    text = draw(mostly(repr(entries), TEXTS))
    text = draw(mostly(text, st.sampled_from([f"{text:<20000}", text.replace(",", "L,")]))) + "\n"
    version = draw(mostly((1, 0), st.sampled_from([(2, 0), (3, 0), (4, 0)])))
    encoded = text.encode("latin1")
    length = len(encoded).to_bytes(2 if version == (1, 0) else 4, "little")
    values = VALUES.tobytes()
    data = draw(mostly(values, st.sampled_from([b"", values * 2, pickle.dumps(None)])))
    return b"\x93NUMPY" + bytes(version) + length + encoded + data


@cases(300)
@given(content=headers())
def test_headers_of_every_kind(place, content):
    read_activations(place, content)


def test_both_of_these_find_something(place):
    assert read_activations(place, npy(VALUES, (2, 0)))
    assert not read_activations(place, npy(np.asfortranarray(VALUES)))


# ---- sidecars ----

NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([10**30, -(10**30), 10**400, 2**63, math.nan, math.inf, -0.0, 1e308, 0.5]),
)
WORDS = st.one_of(
    st.sampled_from(["", "a", "../../x", "\ud800", "\udc80", "a\nb", "\x1b[31m", "\0"]),
    st.text(max_size=5),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
PLACES = [*((key,) for key in SIDECAR), *(("network", key) for key in NETWORK)]
PLACES += [("preprocessing", "resize"), ("odin", "x")]
# Nearly right ones, which get further.
ALMOST = [[entry] * ROWS for entry in (0, "a", None, 10**30, "\ud800", [], True)]
ALMOST += [7.0, 3.0, 4.0, 1.0, {}]


@st.composite
def edited(draw: st.DrawFn, entries: dict[str, Any], places: list[tuple[str, ...]]) -> str:
    """The text of a .json with one to three entries gone, of another kind, or there twice."""
    content = json.loads(json.dumps(entries))
    twice = ""
    for _ in range(draw(st.integers(1, 3))):
        *outer, last = draw(st.sampled_from(places))
        target = content
        if outer and isinstance(content.get(outer[0]), dict):
            target = content[outer[0]]
        value = draw(st.one_of(ANYTHING, st.sampled_from(ALMOST)))
        match draw(st.sampled_from(["replace", "replace", "remove", "twice"])):
            case "replace":
                target[last] = value
            case "remove":
                target.pop(last, None)
            case "twice":
                twice += f"{json.dumps(last)}: {json.dumps(value)}, "
    return "{" + twice + json.dumps(content)[1:]


def check_sidecar(folder: Path, content: bytes) -> None:
    (folder / "id.npy").write_bytes(npy(VALUES))
    (folder / "id.json").write_bytes(content)
    try:
        with warranted(len(content)):
            opened = cache.open_set(folder, "id")
    except BadCache:
        return
    wanted = {"labels": None, "accuracy": None, "odin": None, **json.loads(content)}
    info = opened.info
    assert info.network.to_json() == {key: wanted["network"].get(key) for key in NETWORK}
    assert (info.precision, info.fingerprint) == (wanted["precision"], wanted["fingerprint"])
    assert (list(info.paths), info.accuracy) == (wanted["paths"], wanted["accuracy"])
    assert (info.labels and list(info.labels)) == wanted["labels"]
    assert (opened.images, opened.channels) == (ROWS, CHANNELS)
    assert (wanted["images"], wanted["network"]["channels"]) == (ROWS, CHANNELS)
    assert len(wanted["paths"]) == ROWS
    assert set(wanted["labels"] or ()) <= set(range(wanted["network"]["classes"]))


@cases(300)
@given(text=edited(SIDECAR, PLACES))
def test_sidecars_with_other_entries(place, text):
    check_sidecar(place, text.encode())


@cases(150)
@given(content=damaged(json.dumps(SIDECAR, indent=1).encode()))
def test_damaged_sidecars(place, content):
    check_sidecar(place, content)


@cases(60)
@given(text=edited(SIDECAR, PLACES))
def test_eval_answers_or_refuses_whatever_the_sidecars_say(place, text, capsys):
    """All sets say the same, so that none is refused for being of another network."""
    folder = place / "cache" / "imagenet" / "resnet50"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "head.npz").write_bytes(npz(weight=npy(WEIGHT), bias=npy(BIAS)))
    for name in ("id", "SUN"):
        (folder / f"{name}.npy").write_bytes(npy(VALUES))
        (folder / f"{name}.json").write_text(text)
    places = {"--cache-dir": "cache", "--output": "table.txt", "--scores-dir": "scores"}
    options = [text for option, name in places.items() for text in (option, str(place / name))]
    status = script.main(["--device", "cpu", "--methods", "msp", *options])
    err = capsys.readouterr().err.splitlines()
    assert status in (0, 1)
    assert status == 0 or (err[-1].startswith("eval.py: ") and len(err) <= 2)


# ---- the head ----


def npz(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    return archive_of([(f"{name}.npy", data, compression) for name, data in members.items()])


def archive_of(members: list[tuple[str, bytes, int]]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data, compression in members:
            # With the same date in every run.
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return content.getvalue()


def check_head(folder: Path, content: bytes) -> bool:
    (folder / "head.npz").write_bytes(content)
    try:
        with warranted(len(content)):
            found = cache.load_head(folder, CLASSES, CHANNELS)
    except BadCache:
        return False
    # np.load wants the archive at the very start.
    with np.lib.npyio.NpzFile(io.BytesIO(content), allow_pickle=False) as wanted:
        np.testing.assert_array_equal(found[0], wanted["weight.npy"])
        np.testing.assert_array_equal(found[1], wanted["bias.npy"])
    return True


HEADS = [npz(kind, weight=npy(WEIGHT), bias=npy(BIAS)) for kind in (0, zipfile.ZIP_DEFLATED)]


@cases(300)
@given(content=st.sampled_from(HEADS).flatmap(damaged))
def test_damaged_heads(place, content):
    check_head(place, content)


NAMES = ["weight.npy", "bias.npy", "weight", "weight.npy/", "../weight.npy", "/bias.npy"]
NAMES += ["WEIGHT.NPY", "a.npy"]
HEAD_PARTS = [npy(part) for part in (WEIGHT, BIAS, WEIGHT.T.copy(), WEIGHT.astype("<f8"))]
HEAD_PARTS += [npy(WEIGHT * np.nan), bytes(3_000_000), b""]
for n in (6, 13, 30):
    huge = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({CLASSES}, {10**n})}}"
    HEAD_PARTS.append(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + f"{huge:<118}".encode())
COMPRESSIONS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
CONTENTS = st.one_of(st.sampled_from(HEAD_PARTS), headers())
MEMBERS = st.tuples(st.sampled_from(NAMES), CONTENTS, st.sampled_from(COMPRESSIONS))


@cases(250)
@given(
    members=st.lists(MEMBERS, max_size=4),
    right=st.sampled_from([(), (), ("weight",), ("weight", "bias")]),
    first=st.booleans(),
)
def test_archives_of_every_kind(place, members, right, first):
    values = {"weight": npy(WEIGHT), "bias": npy(BIAS)}
    own = [(f"{name}.npy", values[name], zipfile.ZIP_STORED) for name in right]
    check_head(place, archive_of([*own, *members] if first else [*members, *own]))


@pytest.mark.parametrize("content", HEADS, ids=["stored", "deflated"])
def test_a_whole_head_is_read(place, content):
    assert check_head(place, content)


# ---- what an interrupted run leaves ----


class PowerCut(Exception):
    pass


def interrupted(folder: Path) -> tuple[bytes, bytes]:
    """The .npy.part and the .rows of a run that ended after four rows."""
    with pytest.raises(PowerCut), Writer(folder, "cut", METADATA) as writer:  # noqa: PT012
        writer.write(VALUES[:4])
        raise PowerCut
    return (folder / "cut.npy.part").read_bytes(), (folder / "cut.rows").read_bytes()


@cases(150)
@given(data=st.data())
def test_a_run_that_goes_on_from_damaged_files_gives_the_right_rows(place, data, monkeypatch):
    """Damage is everywhere in the record, and in the header or at the end of the rows: rows have no
    checksum."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for path in place.glob("cut.*"):
        path.unlink()
    part, record = interrupted(place)
    header = len(part) - 4 * ROWS * CHANNELS
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, 4 * ROWS * CHANNELS))
        odd = data.draw(damaged(part[:header])) + part[header : len(part) - cut]
        (place / "cut.npy.part").write_bytes(odd)
    else:
        entries = edited(json.loads(record), [("rows",), ("rows",), ("key",)]).map(str.encode)
        (place / "cut.rows").write_bytes(data.draw(st.one_of(damaged(record), entries)))
    with Writer(place, "cut", METADATA) as writer:
        assert writer.rows in (0, 4)
        writer.write(VALUES[writer.rows :])
        writer.finish(None)
    np.testing.assert_array_equal(np.load(place / "cut.npy", allow_pickle=False), VALUES)


# ---- checkpoints ----


@functools.cache
def state() -> dict[str, torch.Tensor]:
    return make_network(ARCH, num_classes=10).state_dict()


@functools.cache
def whole_checkpoint() -> bytes:
    return saved(state())


def saved(content: Any, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def rewritten(
    content: bytes, compression: int, change: Callable[[str, bytes], bytes] = lambda _, part: part
) -> bytes:
    """The archive with changed members, its checksums right."""
    source = zipfile.ZipFile(io.BytesIO(content))
    parts = ((name, change(name, source.read(name))) for name in source.namelist())
    return archive_of([(*part, compression) for part in parts])


def load(place: Path, content: bytes) -> networks.Network | None:
    """None where it is refused as it should be: in one line that names it, without a library's
    remark beside it."""
    path = place / "some.pth"
    path.write_bytes(content)
    network, line = None, f"{path}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            network = networks.load(NetworkSpec(ARCH, checkpoint=path))
        except BadNetwork as refusal:
            line = str(refusal)
    assert line.startswith(str(path))
    assert line.isprintable()
    assert not [str(warning.message) for warning in said]
    return network


@cases(60)
@given(data=st.data())
def test_damaged_checkpoints(place, data):
    network = load(place, data.draw(damaged(whole_checkpoint(), last=40_000)))
    own = state_dict_sha256(state())
    assert network is None or network.info.sha256 == own, "other weights were taken"


@cases(60)
@given(data=st.data())
def test_checkpoints_with_another_pickle_in_them(place, data):
    """A whole archive, its checksums right, whose pickle is damaged."""

    def change(name: str, content: bytes) -> bytes:
        return data.draw(damaged(content)) if name.endswith("data.pkl") else content

    network = load(place, rewritten(whole_checkpoint(), zipfile.ZIP_STORED, change))
    if network is not None:
        found = network.body.state_dict()
        wanted = {key: value.shape for key, value in state().items() if not key.startswith("fc.")}
        assert {key: value.shape for key, value in found.items()} == wanted
        assert all(torch.isfinite(value.float()).all() for value in found.values())


class Calls:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


WAYS: dict[str, Callable[[Path], Calls]] = {
    "os.system": lambda made: Calls(os.system, f"touch '{made}'"),
    "mkdir": lambda made: Calls(Path.mkdir, made),
    "touch": lambda made: Calls(Path.touch, made),
    "exec": lambda made: Calls(exec, f"open({str(made)!r}, 'w')"),
    "eval": lambda made: Calls(eval, f"open({str(made)!r}, 'w')"),
    "open": lambda made: Calls(open, str(made), "w"),
    "numpy": lambda made: Calls(np.savetxt, str(made), [1.0]),
    "torch.load": lambda made: Calls(torch.save, {}, str(made)),
    "getattr": lambda made: Calls(getattr, Calls(Path, str(made)), "touch"),
}


def hidden(call: Calls, where: str) -> Any:
    some = {"fc.bias": torch.zeros(10)}
    return {
        "alone": call,
        "value": {**some, "fc.weight": call},
        "beside": {"state_dict": some, "epoch": call},
        "key": {**some, Calls(str, call): torch.zeros(1)},
        "list": [some, [call]],
    }[where]


@cases(80)
@given(
    way=st.sampled_from(list(WAYS)),
    where=st.sampled_from(["alone", "value", "beside", "key", "list"]),
    how=st.sampled_from(["archive", "legacy", *range(pickle.HIGHEST_PROTOCOL + 1)]),
)
def test_no_checkpoint_runs_code(place, way, where, how):
    made = place / "made"
    odd = hidden(WAYS[way](made), where)
    content = pickle.dumps(odd, how) if isinstance(how, int) else saved(odd, how == "legacy")
    assert load(place, content) is None
    assert not made.exists()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "getattr"])
def test_these_pickles_do_run_code_where_they_may(way, tmp_path):
    pickle.loads(pickle.dumps(WAYS[way](tmp_path / "made")))
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_whole_checkpoints_are_read(place, legacy):
    assert load(place, saved(state(), legacy)).info.sha256 == state_dict_sha256(state())


def _claims(numbers: int) -> bytes:
    """A file of torch's old format whose storage says that it has so many numbers."""
    content = saved({"fc.weight": torch.zeros(255)}, legacy=True)
    assert content.count(b"K\xff") == 2
    return content.replace(b"K\xff", b"\x8a\x06" + numbers.to_bytes(6, "little"))


EXPANDED = torch.zeros(1).expand(10**12)
# what makes the file, and what is said of it
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "deflated": (
        lambda: rewritten(saved({"a": torch.zeros(50_000_000)}), zipfile.ZIP_DEFLATED),
        "it is compressed, from 20000",
    ),
    "expanded": (lambda: saved({"fc.weight": EXPANDED[:, None], "fc.bias": EXPANDED}), "no plain"),
    "thin": (
        lambda: saved({"fc.weight": torch.zeros(300_000, 1), "fc.bias": torch.zeros(1)}),
        "not a checkpoint of",
    ),
    "old-format": (lambda: _claims(2**33), "loaded safely"),
    "long-text": (lambda: b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"abc", "safely"),
    "deep": (lambda: b"\x80\x02" + b"(" * 300_000 + b"." * 9, "loaded safely"),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_checkpoint_takes_no_memory_that_it_does_not_warrant(kind, place):
    path = place / "bomb.pth"
    make, message = BOMBS[kind]

    def peak() -> int:
        (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(line) * 1024

    def read() -> int:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = peak()
        with pytest.raises(BadNetwork, match=message):
            networks.load(NetworkSpec(ARCH, checkpoint=path))
        return int(peak() - before > 2**27 + 2 * path.stat().st_size)

    assert wait(fork(lambda: path.write_bytes(make()) and 0)) == 0
    assert path.stat().st_size < 2**21
    assert wait(fork(read)) == 0
