"""lhact.cache: what is written comes back, what is not whole or not right is refused, whatever
moment a run ends at."""

import errno
import io
import json
import os
import random
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Writer, fork, wait

from lhact import cache, cache_writer
from lhact.cache import BadCache
from lhact.cache_writer import SetWriter
from lhact.records import SetInfo

IMAGES, CHANNELS, CLASSES = 7, 3, 4


def metadata(images: int = IMAGES, **changes: Any) -> dict[str, Any]:
    return {
        "network": {
            "arch": "resnet50",
            "weights": None,
            "checkpoint": "own.pth",
            "sha256": "ab",
            "classes": CLASSES,
            "channels": CHANNELS,
        },
        "preprocessing": {
            "resize": 256,
            "crop": 224,
            "interpolation": "bilinear",
            "mean": [0.1, 0.2, 0.3],
            "std": [1, 1, 1],
        },
        "precision": "fp32",
        "odin": None,
        "images": images,
        "channels": CHANNELS,
        "fingerprint": "cd",
        "labels": [i % CLASSES for i in range(images)],
        "paths": [f"n{i:02}/{i}.jpg" for i in range(images)],
        "batch_size": 2,
        **changes,
    }


def info(images: int = IMAGES, **changes: Any) -> SetInfo:
    return SetInfo.from_json({"format": 1, **metadata(images, **changes)})


def values(images: int = IMAGES, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(images, CHANNELS)).astype(np.float32)


def write(
    folder: Path, name: str = "id", rows: np.ndarray | None = None, batch: int = 2, **changes: Any
) -> Path:
    """A complete image set; its .npy."""
    rows = values() if rows is None else rows
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(folder, name, metadata(len(rows), **changes)) as writer:
        for start in range(writer.rows, len(rows), batch):
            writer.write(rows[start : start + batch])
        writer.finish(accuracy=50.0)
    return folder / f"{name}.npy"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".npy", ".json", ".npz", ".rows")
    }


# ---- round trip ----


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_what_is_written_comes_back(batch, chunk, tmp_path):
    write(tmp_path, batch=batch)
    opened = cache.open_set(tmp_path, "id")
    assert (opened.images, opened.channels) == (IMAGES, CHANNELS)
    chunks = list(opened.chunks(chunk))
    assert [len(part) for part in chunks] == [
        min(chunk, IMAGES - start) for start in range(0, IMAGES, chunk)
    ]
    np.testing.assert_array_equal(np.concatenate(chunks), values())
    content = json.loads((tmp_path / "id.json").read_text())
    known = {**metadata(), "accuracy": 50.0}
    assert {key: content[key] for key in known} == known
    assert opened.info.to_json() == content
    chunks[0][:] = 0  # chunks are the reader's own
    np.testing.assert_array_equal(next(opened.chunks(chunk)), values()[:chunk])


def test_any_tool_can_open_it(tmp_path):
    opened = np.load(write(tmp_path), mmap_mode="r", allow_pickle=False)
    np.testing.assert_array_equal(opened, values())
    assert opened.dtype == np.dtype("<f4")
    assert opened.flags["C_CONTIGUOUS"]
    sidecar = json.loads((tmp_path / "id.json").read_text(encoding="ascii"))
    assert sidecar["paths"][3] == "n03/3.jpg"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["id.json", "id.npy"]


def test_rows_are_stored_as_little_endian_single_precision_whatever_comes(tmp_path):
    rows = np.asfortranarray(values().astype(">f8"))
    np.testing.assert_array_equal(np.load(write(tmp_path, rows=rows, batch=3)), values())


@pytest.mark.parametrize(
    "name", [b"caf\xe9.jpg", b"line\nbreak.jpg", "ümläut 猫.jpg".encode(), b'quo"te\\.jpg']
)
def test_names_of_every_kind_come_back(name, tmp_path):
    paths = [os.fsdecode(name), *metadata()["paths"][1:]]
    write(tmp_path, paths=paths)
    assert list(cache.open_set(tmp_path, "id").info.paths) == paths


def test_head_comes_back(tmp_path):
    weight, bias = np.arange(12.0).reshape(4, 3), np.arange(4.0)
    cache_writer.save_head(tmp_path, weight, bias)
    for found, wanted in zip(cache.load_head(tmp_path, 4, 3), (weight, bias), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)
    with np.load(tmp_path / "head.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["bias", "weight"]
    assert [path.name for path in tmp_path.iterdir()] == ["head.npz"]


def test_two_runs_write_the_same_bytes(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        write(folder)
        cache_writer.save_head(folder, np.ones((4, 3)), np.ones(4))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_datasets_lists_what_is_complete(tmp_path):
    for name in ("SUN", "id", "Places"):
        write(tmp_path, name)
    (tmp_path / "odin").mkdir()
    assert cache.datasets(tmp_path) == ["Places", "SUN", "id"]


# ---- the order of writing, and a run that ends early ----


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    # Otherwise a power cut could leave the name, or the promise of rows, and not what it stands
    # for.
    on_disk: dict[str, int] = {}
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor):
        fsync(descriptor)
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        on_disk[name] = os.fstat(descriptor).st_size
        if name == tmp_path.name:
            named.append(name)

    def naming(source, target):
        assert on_disk[Path(source).name] == os.path.getsize(source)
        if str(target).endswith(".rows"):
            promised = json.loads(Path(source).read_text())["rows"]
            assert on_disk["id.npy.part"] >= 128 + 4 * CHANNELS * promised
        if str(target).endswith(".json"):
            np.testing.assert_array_equal(np.load(tmp_path / "id.npy"), values())
            # The name of the .npy, too, is on the disk before the .json appears.
            assert tmp_path.name in named[named.index("id.npy") + 1 :]
        replace(source, target)
        named.append(Path(target).name)

    named: list[str] = []
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", naming)
    write(tmp_path)
    assert named.count("id.rows") >= 4
    assert [name for name in named if name != tmp_path.name][-2:] == ["id.npy", "id.json"]
    assert named[-1] == tmp_path.name


def test_no_name_for_rows_that_are_not_all_there(tmp_path):
    with Writer(tmp_path, "id", metadata()) as writer:
        writer.write(values()[:2])
        with pytest.raises(RuntimeError, match="has 2 rows on the disk, wanted 7"):
            writer.finish(None)
    assert not (tmp_path / "id.npy").exists()
    assert not (tmp_path / "id.json").exists()


class PowerCut(Exception):
    pass


def stop_after(folder: Path, rows: int, **changes: Any) -> None:
    with pytest.raises(PowerCut), Writer(folder, "id", metadata(**changes)) as writer:  # noqa: PT012
        for start in range(writer.rows, rows, 2):
            writer.write(values()[start : start + 2])
        raise PowerCut


@pytest.mark.parametrize("rows", [0, 2, 4, 6])
def test_a_second_run_goes_on_where_the_first_ended(rows, tmp_path):
    write(tmp_path / "whole")
    folder = tmp_path / "cut"
    folder.mkdir()
    stop_after(folder, rows)
    with pytest.raises(
        BadCache, match=r"cut is unfinished: id; give the same get_activation.py command again"
    ):
        cache.datasets(folder)
    with pytest.raises(BadCache, match=r"id\.json is missing, so id is not complete"):
        cache.open_set(folder, "id")
    with Writer(folder, "id", metadata()) as writer:
        assert writer.rows == rows
    write(folder)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 4},
        {"device": "cpu (AVX2)"},
        {"versions": {"torch": "9"}},
        {"precision": "bf16"},
        {"fingerprint": "other"},
        {"network": {**metadata()["network"], "sha256": "other"}},
    ],
)
def test_a_run_of_another_kind_starts_over(changes, tmp_path):
    stop_after(tmp_path, 4)
    with Writer(tmp_path, "id", metadata(**changes)) as writer:
        assert writer.rows == 0
        writer.write(-values())
        writer.finish(None)
    np.testing.assert_array_equal(np.load(tmp_path / "id.npy"), -values())


def test_rows_that_were_never_promised_are_written_again(tmp_path):
    # Killed after rows went to disk and before they were counted; the file is longer than the
    # record says.
    stop_after(tmp_path, 4)
    with (tmp_path / "id.npy.part").open("ab") as file:
        file.write(b"\xff" * 30)
    with Writer(tmp_path, "id", metadata()) as writer:
        assert writer.rows == 4
    np.testing.assert_array_equal(np.load(write(tmp_path)), values())


KEY = "the key of the run before"
RECORDS: dict[str, Any] = {
    "empty": b"",
    "text": b"words",
    "list": b"[]",
    "null": b"null",
    "nothing": b"{}",
    "cut": b'{"rows": 4, "ke',
    "too-many": {"rows": 10**9, "key": KEY},
    "more-than-images": {"rows": IMAGES + 1, "key": KEY},
    "negative": {"rows": -1, "key": KEY},
    "fraction": {"rows": 1.5, "key": KEY},
    "words": {"rows": "4", "key": KEY},
    "missing-rows": {"key": KEY},
    "other-key": {"rows": 4, "key": "x"},
    "deep": b"[" * 100_000,
    "not-utf8": b"\xff\xfe\xfd",
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_record_of_progress_means_starting_over(kind, tmp_path):
    stop_after(tmp_path, 4)
    record = RECORDS[kind]
    if isinstance(record, dict):
        key = json.loads((tmp_path / "id.rows").read_text())["key"]
        record = json.dumps(record).replace(KEY, key).encode()
    (tmp_path / "id.rows").write_bytes(record)
    with Writer(tmp_path, "id", metadata()) as writer:
        assert writer.rows == 0
    np.testing.assert_array_equal(np.load(write(tmp_path)), values())


@pytest.mark.parametrize(
    "damage",
    [
        "header-of-another-length",
        "missing",
        "empty",
        "cut-header",
        "cut-rows",
        "other-shape",
        "text",
    ],
)
def test_a_damaged_unfinished_file_means_starting_over(damage, tmp_path):
    stop_after(tmp_path, 4)
    part = tmp_path / "id.npy.part"
    whole = part.read_bytes()
    if damage == "missing":
        part.unlink()
    elif damage == "other-shape":
        np.save(part.open("wb"), values(9))
    else:
        shorter = whole[:8] + bytes([whole[8] - 8]) + whole[9:]  # it ends eight blanks earlier
        part.write_bytes(
            {
                "header-of-another-length": shorter,
                "empty": b"",
                "cut-header": whole[:50],
                "cut-rows": whole[: 128 + 4 * CHANNELS * 3],
                "text": b"words" * 99,
            }[damage]
        )
    with Writer(tmp_path, "id", metadata()) as writer:
        assert writer.rows == 0
    np.testing.assert_array_equal(np.load(write(tmp_path)), values())


SETS = ("id", "SUN")


def run_all(folder: Path, overwrite: bool = False) -> None:
    """What get_activation.py does with the cache, with one row a batch."""
    with cache_writer.lock(folder):
        wanted = {(folder, name): info(3) for name in SETS}
        cache_writer.prepare(folder, wanted, overwrite, lambda place, cached: True)
        cache_writer.save_head(folder, np.ones((CLASSES, CHANNELS)), np.ones(CLASSES))
        for i, name in enumerate(SETS):
            if not (folder / f"{name}.json").exists():
                write(folder, name, values(3, seed=i), batch=1)


def ends_at(step: int, function: Callable[[], object]) -> Callable[[], int]:
    """The function in a process that is gone before the given line of lhact.cache_writer is run; as
    with SIGKILL, nothing is flushed.

    Its exit status is 3 if that is what happened, 0 if the function came to its end first.
    """

    def body() -> int:
        left = step

        def trace(frame, event, _):
            nonlocal left
            if frame.f_code.co_filename != cache_writer.__file__:
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    os._exit(3)
            return trace

        sys.settrace(trace)
        function()
        sys.settrace(None)
        return 0

    return body


def passes_for_whole(folder: Path) -> bool:
    try:
        names = cache.datasets(folder)
    except BadCache:
        return False
    assert set(names) == set(SETS), "a cache that lacks an image set passes for whole"
    return True


def leave_unfinished(folder: Path) -> None:
    """Other rows under the same names, of `SUN` one alone."""
    write(folder, "id", values(3, seed=9), batch=1)
    with pytest.raises(PowerCut), Writer(folder, "SUN", metadata(3)) as writer:  # noqa: PT012
        writer.write(values(3, seed=9)[:1])
        raise PowerCut


BEFORE: dict[str, Callable[[Path], None] | None] = {
    "nothing": None,
    "the same cache": run_all,
    "an unfinished cache": leave_unfinished,
}


@pytest.mark.parametrize("before", BEFORE)
def test_a_run_that_ends_at_any_line_leaves_nothing_that_passes_for_whole(
    before, tmp_path, monkeypatch
):
    """What is there before it is overwritten."""
    # It is slow, and no power is cut here.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    run_all(tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    make, others = BEFORE[before], before == "an unfinished cache"
    step = ended = went_on = 0
    while True:
        folder = tmp_path / str(step)
        if make:
            make(folder)
        end = ends_at(step, lambda folder=folder: run_all(folder, overwrite=make is not None))
        status = wait(fork(end))
        assert status in (0, 3)
        if folder.exists() and passes_for_whole(folder):
            assert contents(folder) == wanted
        for name in () if others else SETS:
            if (folder / f"{name}.json").exists():
                assert (folder / f"{name}.npy").read_bytes() == wanted[f"{name}.npy"]
        if (folder / "id.rows").exists() and not (folder / "id.json").exists():
            with Writer(folder, "id", metadata(3)) as writer:
                went_on += writer.rows > 0
        run_all(folder, overwrite=others)
        assert contents(folder) == wanted
        if status == 0:
            break
        ended += 1
        # The first lines of `_clear` are where an overwritten cache is left half done.
        step += 2 if make and step < 50 else 7
    assert ended > 30
    assert went_on > 3


# ---- one run at a time ----


def test_a_folder_is_held_by_a_run_and_not_by_what_it_leaves_behind(tmp_path):
    """Loader workers live on for some seconds when their run is killed."""
    folder = tmp_path / "imagenet" / "resnet50"
    ready, tell = os.pipe()

    def hold() -> None:
        with cache_writer.lock(folder):
            worker = fork(signal.pause)
            os.write(tell, worker.to_bytes(8, "little"))
            signal.pause()

    pid = fork(hold)
    worker = int.from_bytes(os.read(ready, 8), "little")
    held = r"another run is writing to .*imagenet/resnet50; wait for it"
    try:
        with pytest.raises(BadCache, match=held), cache_writer.lock(folder):
            pass
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        os.kill(worker, 0)  # it is still there
        with cache_writer.lock(folder):
            write(folder)
    finally:
        os.kill(worker, signal.SIGKILL)


# ---- files that are not right ----


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, version, allow_pickle=True)
    return content.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    text = text + " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


def shaped(shape: str, data: bytes = b"") -> bytes:
    return header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}", data)


GOOD = npy(values())
UNREADABLE = "not an .npy file that can be read"
OTHER_SIZE = r"has \d+ bytes, wanted \d+ for shape \(7, 3\)"
TOO_LARGE = "bytes unpacked, wanted .* at most"
ARRAYS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "cannot be read"),
    "empty": (b"", UNREADABLE),
    "text": (b"these are words" * 20, UNREADABLE),
    "npz": (b"PK\x03\x04" + b"\0" * 300, UNREADABLE),
    "cut-magic": (GOOD[:5], UNREADABLE),
    "cut-header": (GOOD[:40], UNREADABLE),
    "cut-rows": (GOOD[:-1], OTHER_SIZE),
    "no-rows": (GOOD[:-84], OTHER_SIZE),
    "too-long": (GOOD + b"\0", OTHER_SIZE),
    "object": (npy(values().astype(object)), "wanted float32"),
    "float64": (
        npy(values().astype(np.float64)),
        r"holds float64\(7, 3\) in C order, wanted float32 \(images, channels\)",
    ),
    "float16": (npy(values().astype(np.float16)), "holds float16"),
    "int32": (npy(values().astype(np.int32)), "holds int32"),
    "big-endian": (npy(values().astype(">f4")), "wanted float32"),
    "structured": (npy(np.zeros(7, [("a", "<f4", 3)])), "wanted float32"),
    "fortran": (npy(np.asfortranarray(values())), "in Fortran order, wanted"),
    "vector": (npy(values().ravel()), r"holds float32\(21,\)"),
    "cube": (npy(values()[None]), r"holds float32\(1, 7, 3\)"),
    "scalar": (npy(np.float32(3)), r"holds float32\(\)"),
    "too-few-images": (npy(values(6)), r"has shape \(6, 3\), its \.json says \(7, 3\)"),
    "too-many-images": (npy(values(8)), r"has shape \(8, 3\), its \.json says \(7, 3\)"),
    "transposed": (npy(values().T.copy()), r"has shape \(3, 7\), its \.json says \(7, 3\)"),
    "no-images": (npy(np.zeros((0, 3), np.float32)), r"holds float32\(0, 3\)"),
    "version-3": (npy(values(), (3, 0)), UNREADABLE),
    "version-9": (GOOD[:6] + b"\x09" + GOOD[7:], UNREADABLE),
    "huge": (shaped("(1000000000000, 3)"), r"has shape \(1000000000000, 3\)"),
    "negative": (shaped("(-7, 3)", GOOD[-84:]), r"\(-7, 3\)"),
    "header-is-code": (header("__import__('os').mkdir('made')"), UNREADABLE),
    "header-is-cut": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (7,"), UNREADABLE),
    "header-is-a-list": (header("[1, 2, 3]"), UNREADABLE),
    "header-is-deep": (header("(" * 9000), UNREADABLE),
    "header-of-another-shape": (shaped("'ab'"), UNREADABLE),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_is_not_right_is_refused_by_name(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    content, message = ARRAYS[kind]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadCache, match=message) as refusal:
        cache.open_set(tmp_path, "id")
    assert str(refusal.value).startswith(str(path))
    assert str(refusal.value).endswith("; make it again with get_activation.py --overwrite")
    assert len(str(refusal.value).splitlines()) == 1
    assert not (tmp_path / "made").exists()


def test_later_headers_are_read_unless_they_promise_gigabytes(tmp_path):
    path, content = write(tmp_path), npy(values(), (2, 0))
    path.write_bytes(content)
    np.testing.assert_array_equal(next(cache.open_set(tmp_path, "id").chunks(100)), values())
    path.write_bytes(content[:8] + (2**32 - 1).to_bytes(4, "little") + content[12:])
    with pytest.raises(BadCache, match="its header has 4294967295 bytes, wanted 10000 at most"):
        cache.open_set(tmp_path, "id")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("row", "chunk"), [(0, 100), (5, 100), (5, 2), (6, 1)])
def test_values_that_are_not_finite_are_refused_with_their_row(value, row, chunk, tmp_path):
    rows = values()
    rows[row, 1] = value
    write(tmp_path, rows=rows)
    with pytest.raises(
        BadCache, match=rf"id\.npy holds NaN or infinite values in row {row}; make it again"
    ):
        list(cache.open_set(tmp_path, "id").chunks(chunk))


@pytest.mark.filterwarnings("ignore")
def test_infinities_of_both_signs_are_found_and_huge_values_are_not_taken_for_them(tmp_path):
    rows = np.full((IMAGES, CHANNELS), 3e38, np.float32)
    write(tmp_path, rows=rows)
    np.testing.assert_array_equal(next(cache.open_set(tmp_path, "id").chunks(100)), rows)
    rows[2, 0], rows[4, 0] = np.inf, -np.inf
    write(tmp_path / "other", rows=rows)
    with pytest.raises(BadCache, match="in row 2;"):
        list(cache.open_set(tmp_path / "other", "id").chunks(100))


def test_an_array_cut_while_it_is_read_is_refused(tmp_path):
    path = write(tmp_path)
    chunks = cache.open_set(tmp_path, "id").chunks(2)
    next(chunks)
    os.truncate(path, len(GOOD) - 30)
    with pytest.raises(BadCache, match=r"id\.npy"):
        list(chunks)


# ---- some of the rows ----


@pytest.mark.parametrize("count", [1, 2, 3, 7, 2000])
def test_a_sample_has_one_row_of_each_part(count, tmp_path):
    write(tmp_path)
    rows, numbers = cache.open_set(tmp_path, "id").sample(count)
    count = min(count, IMAGES)
    assert len(numbers) == count
    assert all(
        i * IMAGES // count <= number < (i + 1) * IMAGES // count
        for i, number in enumerate(numbers)
    )
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, values()[numbers])
    assert cache.open_set(tmp_path, "id").sample(count)[1] == numbers


def test_a_sample_does_not_repeat_the_period_of_the_order(tmp_path):
    """A thousand times the same ten images, and a hundred of them drawn: all ten are there."""
    rows = np.tile(np.repeat(np.arange(10, dtype=np.float32)[:, None], CHANNELS, axis=1), (1000, 1))
    write(tmp_path, rows=rows, batch=10_000)
    found, _ = cache.open_set(tmp_path, "id").sample(100)
    assert set(found[:, 0].tolist()) == set(range(10))


def test_a_sample_of_a_set_that_is_not_finished_yet(tmp_path):
    with Writer(tmp_path, "id", metadata()) as writer:
        writer.write(values())
        rows, numbers = writer.writer.activations().sample(2)
        np.testing.assert_array_equal(rows, values()[numbers])


def test_a_sample_of_an_array_cut_after_it_was_opened(tmp_path):
    path = write(tmp_path)
    opened = cache.open_set(tmp_path, "id")
    os.truncate(path, len(GOOD) - 30)
    with pytest.raises(BadCache, match=r"id\.npy was replaced after it had been opened"):
        opened.sample(7)


def without(field: str) -> Callable[[dict], dict]:
    return lambda content: {key: value for key, value in content.items() if key != field}


def having(**changes: Any) -> Callable[[dict], dict]:
    return lambda content: {**content, **changes}


SIDECARS: dict[str, tuple[bytes | Callable[[dict], Any], str]] = {
    "empty": (b"", "cannot be read"),
    "text": (b"words", "cannot be read"),
    "cut": (b'{"format": 1, "images": 7, "pa', "cannot be read"),
    "not-utf8": (b'{"format": 1, "name": "caf\xe9"}', "cannot be read"),
    "deep": (b"[" * 100_000, "cannot be read"),
    "long-number": (b'{"format": ' + b"1" * 10_000 + b"}", "cannot be read"),
    "list": (lambda content: [content], "damaged: it is no JSON object"),
    "null": (lambda content: None, "damaged: it is no JSON object"),
    "newer": (having(format=2), "has format 2, this version reads up to 1; update this program"),
    "no-format": (without("format"), "its 'format' is missing"),
    "format-in-words": (having(format="1"), "its 'format'"),
    "older": (having(format=0), "its 'format'"),
    "no-network": (without("network"), "its 'network' is missing"),
    "network-in-words": (having(network="resnet50"), "its 'network'"),
    "network-without-channels": (having(network={"classes": 4}), "its 'network'"),
    "network-without-classes": (having(network={"channels": 3}), "its 'network'"),
    "no-preprocessing": (without("preprocessing"), "its 'preprocessing'"),
    "no-precision": (without("precision"), "its 'precision'"),
    "no-fingerprint": (without("fingerprint"), "its 'fingerprint'"),
    "no-images": (without("images"), "its 'images'"),
    "images-in-words": (having(images="7"), "its 'images'"),
    "images-a-fraction": (having(images=7.0), "its 'images'"),
    "no-paths": (without("paths"), "its 'paths'"),
    "too-few-paths": (having(paths=["a"] * 6), "its 'paths'"),
    "paths-not-words": (having(paths=[1] * 7), "its 'paths'"),
    "format-a-truth-value": (having(format=True), "its 'format'"),
    "paths-half-a-surrogate": (having(paths=["\ud800"] * 7), "its 'paths'"),
    "paths-not-all-words": (having(paths=["a"] * 6 + [None]), "its 'paths'"),
    "arch-half-a-surrogate": (
        having(network={"classes": 4, "channels": 3, "arch": "\ud800"}),
        "its 'network'",
    ),
    "arch-a-number": (having(network={"classes": 4, "channels": 3, "arch": 0}), "its 'network'"),
    "precision-half-a-surrogate": (having(precision="\udfff"), "its 'precision'"),
    "accuracy-not-a-number": (having(accuracy=float("nan")), "NaN is no JSON"),
    "accuracy-above-100": (having(accuracy=101), "its 'accuracy'"),
    "accuracy-beyond-all": (having(accuracy=10**400), "its 'accuracy'"),
    "accuracy-a-truth-value": (having(accuracy=True), "its 'accuracy'"),
    "accuracy-in-words": (having(accuracy="76"), "its 'accuracy'"),
    "too-few-labels": (having(labels=[0] * 6), "its 'labels'"),
    "labels-out-of-range": (having(labels=[0] * 6 + [4]), "its 'labels'"),
    "labels-negative": (having(labels=[0] * 6 + [-1]), "its 'labels'"),
    "labels-a-fraction": (having(labels=[0.5] * 7), "its 'labels'"),
    "other-images": (
        having(images=6, paths=["a"] * 6, labels=None),
        r"has shape \(7, 3\), its \.json says \(6, 3\)",
    ),
    "other-channels": (
        having(network={"classes": 4, "channels": 5}),
        r"has shape \(7, 3\), its \.json says \(7, 5\)",
    ),
    "negative-channels": (having(network={"classes": 4, "channels": -3}), r"\(7, -3\)"),
}


@pytest.mark.parametrize("kind", SIDECARS)
def test_a_sidecar_that_is_not_right_is_refused_by_name(kind, tmp_path):
    write(tmp_path)
    path = tmp_path / "id.json"
    content, message = SIDECARS[kind]
    path.write_bytes(
        content
        if isinstance(content, bytes)
        else json.dumps(content(json.loads(path.read_text()))).encode()
    )
    with pytest.raises(BadCache, match=message) as refusal:
        cache.open_set(tmp_path, "id")
    assert str(tmp_path / "id.") in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_missing_sidecar_means_not_complete(tmp_path):
    write(tmp_path)
    (tmp_path / "id.json").unlink()
    with pytest.raises(
        BadCache, match=r"id\.json is missing, so id is not complete; run get_activation\.py"
    ):
        cache.open_set(tmp_path, "id")


def test_labels_may_be_unknown(tmp_path):
    write(tmp_path, labels=None)
    assert cache.open_set(tmp_path, "id").info.labels is None


@pytest.mark.filterwarnings("ignore")
def test_bytes_changed_anywhere_are_refused_or_read_without_a_crash(tmp_path):
    path = write(tmp_path)
    draw = random.Random(0)
    for file, size in ((path, 128), (tmp_path / "id.json", None)):
        whole = file.read_bytes()
        refused = 0
        for place in range(size) if size else range(0, len(whole), 3):
            for byte in draw.sample(range(256), 1 if size is None else 2):
                file.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
                try:
                    list(cache.open_set(tmp_path, "id").chunks(4))
                except BadCache:
                    refused += 1
        assert refused > 50
        file.write_bytes(whole)


# ---- the head ----


def npz(**arrays: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def compressed(**arrays: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def archive(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return content.getvalue()


W, B = np.ones((4, 3), np.float32), np.ones(4, np.float32)
HEADS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "is missing"),
    "empty": (b"", "is damaged"),
    "text": (b"words" * 50, "is damaged"),
    "cut": (npz(weight=W, bias=B)[:-30], "is damaged"),
    "cut-in-the-middle": (npz(weight=W, bias=B)[:300], "is damaged"),
    "npy": (npy(W), "is damaged"),
    "no-bias": (npz(weight=W), "is damaged"),
    "no-weight": (npz(bias=B), "is damaged"),
    "object": (archive(weight=npy(W.astype(object)), bias=npy(B)), "head.npz is damaged"),
    "lzma-bomb": (archive(zipfile.ZIP_LZMA, weight=bytes(10**7), bias=npy(B)), TOO_LARGE),
    "bzip2-bomb": (archive(zipfile.ZIP_BZIP2, weight=bytes(10**7), bias=npy(B)), TOO_LARGE),
    "bomb": (compressed(weight=np.zeros((3000, 3000), np.float32), bias=B), TOO_LARGE),
    "not-arrays": (archive(weight=b"words", bias=b"words"), "head.npz"),
    "promises-too-much": (
        archive(weight=shaped("(1000000000, 1000000000)"), bias=npy(B)),
        "head.npz",
    ),
    "promises-more-than-memory": (
        archive(weight=shaped("(4, 9000000000000)"), bias=npy(B)),
        "head.npz",
    ),
    "member-cut": (archive(weight=npy(W)[:-4], bias=npy(B)), "is damaged"),
    "transposed": (
        npz(weight=W.T, bias=B),
        r"holds weight float32\(3, 4\), wanted float32\(4, 3\)",
    ),
    "other-classes": (
        npz(weight=np.ones((5, 3), np.float32), bias=np.ones(5, np.float32)),
        r"weight float32\(5, 3\)",
    ),
    "other-channels": (npz(weight=np.ones((4, 2), np.float32), bias=B), r"weight float32\(4, 2\)"),
    "bias-of-others": (npz(weight=W, bias=np.ones(5, np.float32)), r"bias float32\(5,\)"),
    "bias-a-column": (npz(weight=W, bias=B[:, None]), r"bias float32\(4, 1\)"),
    "float64": (npz(weight=W.astype(float), bias=B), "weight float64"),
    "float16": (npz(weight=W, bias=B.astype(np.float16)), "bias float16"),
    "nan": (npz(weight=W * np.nan, bias=B), "NaN or infinite"),
    "infinite": (npz(weight=W, bias=B * np.inf), "NaN or infinite"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_is_not_right_is_refused_by_name(kind, tmp_path):
    path = tmp_path / "head.npz"
    content, message = HEADS[kind]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadCache, match=message) as refusal:
        cache.load_head(tmp_path, 4, 3)
    assert str(refusal.value).startswith(str(path))
    assert str(refusal.value).endswith("; make it again with get_activation.py --overwrite")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pack", [npz, compressed])
def test_bytes_changed_anywhere_in_the_head_are_refused_or_read_right(pack, tmp_path):
    rng = np.random.default_rng(0)
    weight, bias = (
        rng.normal(size=(40, 30)).astype(np.float32),
        rng.normal(size=40).astype(np.float32),
    )
    whole = pack(weight=weight, bias=bias)
    path = tmp_path / "head.npz"
    draw = random.Random(0)
    middle = {
        *range(0, 300, 2),
        *range(len(whole) - 400, len(whole), 2),
        *draw.sample(range(len(whole)), 50),
    }
    refused = 0
    for place in sorted(middle):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ draw.randint(1, 255)]) + whole[place + 1 :]
        )
        try:
            found = cache.load_head(tmp_path, 40, 30)
        except BadCache:
            refused += 1
        else:
            np.testing.assert_array_equal(found[0], weight)
            np.testing.assert_array_equal(found[1], bias)
    assert refused > 100


# ---- folders ----


def test_a_folder_without_activations_is_refused(tmp_path):
    with pytest.raises(
        BadCache, match=r"holds no activations; make them with get_activation.py"
    ) as refusal:
        cache.datasets(tmp_path / "resnet50")
    assert str(tmp_path / "resnet50") in str(refusal.value)


def test_an_array_without_its_sidecar_is_not_left_out_silently(tmp_path):
    for name in ("id", "SUN", "Places"):
        write(tmp_path, name)
    (tmp_path / "SUN.json").unlink()
    with pytest.raises(
        BadCache,
        match=r"SUN\.npy has no \.json beside it; give the same get_activation\.py command again",
    ):
        cache.datasets(tmp_path)
    write(tmp_path, "SUN")
    assert cache.datasets(tmp_path) == ["Places", "SUN", "id"]


def prepare(folder: Path, *names: str, overwrite: bool = False, **changes: Any) -> list[Any]:
    wanted = {(folder, name): info(**changes) for name in names}
    return cache_writer.prepare(folder, wanted, overwrite, lambda place, cached: True)


def test_prepare_marks_what_is_not_complete(tmp_path):
    write(tmp_path, "id")
    assert prepare(tmp_path, "id", "SUN", "Places") == [(tmp_path, "id")]
    with pytest.raises(BadCache, match="is unfinished: Places, SUN; give the same"):
        cache.datasets(tmp_path)
    write(tmp_path, "SUN")
    with pytest.raises(BadCache, match="is unfinished: Places; give the same"):
        cache.datasets(tmp_path)
    write(tmp_path, "Places")
    assert cache.datasets(tmp_path) == ["Places", "SUN", "id"]


def test_prepare_keeps_the_progress_of_an_unfinished_set(tmp_path):
    stop_after(tmp_path, 4)
    assert prepare(tmp_path, "id") == []
    with Writer(tmp_path, "id", metadata()) as writer:
        assert writer.rows == 4


def test_overwrite_replaces_the_sets_asked_for_and_nothing_else(tmp_path):
    write(tmp_path, "SUN")
    write(tmp_path, "id")
    (tmp_path / "notes.txt").write_text("mine")
    whole = contents(tmp_path)
    assert prepare(tmp_path, "id", overwrite=True) == []
    assert not (tmp_path / "id.npy").exists()
    assert (tmp_path / "SUN.npy").read_bytes() == whole["SUN.npy"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["", "odin", "selection"])
def test_overwrite_leaves_nothing_of_another_network_beside_the_new(place, tmp_path):
    write(tmp_path, "id")
    write(tmp_path / place, "noise", network={**metadata()["network"], "sha256": "other"})
    before = contents(tmp_path)
    with pytest.raises(BadCache, match="this run does not make it anew; ask for that set too"):
        prepare(tmp_path, "id", overwrite=True)
    assert contents(tmp_path) == before


def test_other_content_under_the_same_names_is_refused(tmp_path):
    write(tmp_path, "id")
    with pytest.raises(BadCache, match="the same names and sizes, but other content"):
        cache_writer.prepare(tmp_path, {(tmp_path, "id"): info()}, False, lambda place, old: False)


# ---- several processes, failures of the disk, links ----


def test_rows_in_any_order_from_two_writers_are_the_bytes_of_one(tmp_path):
    write(tmp_path / "one")
    (tmp_path / "two").mkdir()
    first, second = (SetWriter(tmp_path / "two", "id", info()) for _ in range(2))
    assert first.prepare() == 0
    digests = np.zeros((2, 16), np.uint8)
    with first, second:
        second.write(4, values()[4:6], digests)
        first.write(6, values()[6:], digests[:1])
        second.write(2, values()[2:4], digests)
        first.write(0, values()[:2], digests)
        second.sync()
        first.sync()
        first.record(IMAGES)
        first.finish(50.0)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_failed_fsync_is_never_followed_by_a_promise(tmp_path, monkeypatch):
    """The system forgets what it could not write: a second fsync would succeed."""
    writer = SetWriter(tmp_path, "id", info())
    writer.prepare()
    fsync, failures = os.fsync, [OSError(5, "Input/output error")]

    def fails_once(descriptor: int) -> None:
        if failures and descriptor in writer.files:
            raise failures.pop()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_once)
    with writer:
        writer.write(0, values(), np.zeros((IMAGES, 16), np.uint8))
        with pytest.raises(OSError, match="Input/output error"):
            writer.sync()
        with pytest.raises(OSError, match="an earlier write has failed"):
            writer.sync()
        writer.record(IMAGES)
        with pytest.raises(RuntimeError, match="has 0 rows on the disk"):
            writer.finish(None)
    assert json.loads((tmp_path / "id.rows").read_text())["rows"] == 0


@pytest.mark.parametrize("name", ["id.npy.part", "id.digests", "id.rows.part", "head.npz.part"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_planted_in_a_cache_are_not_followed(name, link, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "cache"
    folder.mkdir()
    stop_after(folder, 2)
    (folder / name).unlink(missing_ok=True)
    link(precious, folder / name)
    cache_writer.save_head(folder, np.ones((CLASSES, CHANNELS)), np.ones(CLASSES))
    write(folder)
    assert precious.read_text() == "precious"
    np.testing.assert_array_equal(np.load(folder / "id.npy"), values())


def test_a_lock_that_was_removed_or_taken_over_ends_the_run(tmp_path):
    with cache_writer.lock(tmp_path) as held:
        held.check()
        (tmp_path / ".lock").unlink()
        with pytest.raises(BadCache, match="was removed or taken over"):
            held.check()
        (tmp_path / ".lock").write_bytes(b"another")
        with pytest.raises(BadCache, match="was removed or taken over"):
            held.check()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_gets_a_remark(error, tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(cache_writer.fcntl, "lockf", no_locks)
    with cache_writer.lock(tmp_path) as held:
        assert "has no locks" in held.remark
        held.check()


@pytest.mark.parametrize("name", ["id.npy", "id.json", "head.npz"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(name, tmp_path):
    write(tmp_path)
    write(tmp_path, "SUN")
    cache_writer.save_head(tmp_path, np.ones((CLASSES, CHANNELS)), np.ones(CLASSES))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadCache, match=name):
        cache.open_cache(tmp_path)


def test_a_cache_that_is_replaced_while_it_is_read(tmp_path):
    for name in ("id", "SUN"):
        write(tmp_path, name)
    cache_writer.save_head(tmp_path, np.ones((CLASSES, CHANNELS)), np.ones(CLASSES))
    opened = cache.open_cache(tmp_path)
    opened.check_unchanged()
    cache_writer.save_head(tmp_path, np.zeros((CLASSES, CHANNELS)), np.ones(CLASSES))
    with pytest.raises(BadCache, match=r"head\.npz was replaced while it was evaluated"):
        opened.check_unchanged()


@pytest.mark.parametrize("name", ["resnet50", "my-net_2.1+x", "a", "_x", "9" * 100])
def test_names_that_are_good(name):
    assert cache.check_name(name, "a name") == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "../up", "a b", "a\n", "é", "a\\b", "a:b", "x" * 101, "a\0"],
)
def test_names_that_are_not(name):
    with pytest.raises(BadCache, match="a name must be made of letters, digits"):
        cache.check_name(name, "a name")


# ---- what differs ----


def test_no_difference():
    assert cache.differences(info(accuracy=3), info(batch_size=9)) == []


def read_back(changes: dict[str, Any]) -> SetInfo:
    content = metadata(**changes)
    return SetInfo.from_json(
        {"format": 1, **content, "images": len(content["paths"]), "labels": None}
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"precision": "bf16"}, ["precision 'fp32' in the cache, 'bf16' now"]),
        (
            {"network": {**metadata()["network"], "sha256": "ef", "weights": "IMAGENET1K_V2"}},
            [
                "network weights None in the cache, 'IMAGENET1K_V2' now",
                "network sha256 'ab' in the cache, 'ef' now",
            ],
        ),
        (
            {"preprocessing": {**metadata()["preprocessing"], "resize": 232}},
            ["preprocessing resize 256 in the cache, 232 now"],
        ),
        (
            {"odin": {"temperature": 10, "epsilon": 0.1}},
            ["odin temperature None in the cache, 10 now", "odin epsilon None in the cache, 0.1"],
        ),
        ({"fingerprint": "ef"}, ["other files: the same names, but other file sizes"]),
        (
            {"fingerprint": "ef", "paths": [*metadata()["paths"][1:], "x.jpg", "y.jpg"]},
            ["other files: 1 gone, such as n00/0.jpg and 2 new, such as x.jpg"],
        ),
        (
            {"fingerprint": "ef", "paths": metadata()["paths"][:3]},
            ["other files: 4 gone, such as n03/3.jpg"],
        ),
        (
            {"fingerprint": "ef", "precision": "tf32"},
            ["precision 'fp32' in the cache, 'tf32' now", "other files: the same names"],
        ),
    ],
)
def test_differences_are_named(changes, wanted, tmp_path):
    write(tmp_path)
    found = cache.differences(cache.open_set(tmp_path, "id").info, read_back(changes))
    assert len(found) == len(wanted)
    for line, start in zip(found, wanted, strict=True):
        assert line.startswith(start)
