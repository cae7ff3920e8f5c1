"""`python -m lhact.data`: states of image sets, downloads from 127.0.0.1, archives of every bad kind, ImageNet's validation tar."""

import gzip
import hashlib
import io
import os
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torchvision.datasets import imagenet

from lhact import data
from lhact import imagenet as imagenet_names
from lhact.benchmarks import builtin as benchmarks
from lhact.benchmarks.builtin import BENCHMARKS, ImageSet

WNIDS = imagenet_names.wnids()
PICTURES = {f"birds-{i}.jpg": os.urandom(3_000 + i) for i in range(4)}
MEMBERS = {
    **{f"Birds/images/{name}": content for name, content in PICTURES.items()},
    "Birds/images/._birds-0.jpg": b"Mac",
    "Birds/labels/list.txt": b"birds",
}
VAL = {f"ILSVRC2012_val_0000000{i}.JPEG": os.urandom(500 + i) for i in range(1, 6)}
GROUND_TRUTH = [
    3,
    1,
    3,
    2,
    1,
]  # the devkit's own numbers, 1-based, in the order of the images' names
DEVKIT_WNIDS = {1: WNIDS[500], 2: WNIDS[0], 3: WNIDS[999]}


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


def pack(
    contents: dict[str, bytes],
    *specials: tarfile.TarInfo,
    last: dict[str, bytes] | None = None,
    mode: str = "w:gz",
) -> bytes:
    """A tar of the contents, then members without content, then `last`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in contents.items():
            info = member(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in specials:
            tar.addfile(info)
        for name, content in (last or {}).items():
            info = member(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = pack(MEMBERS)


class Server(ThreadingHTTPServer):
    """files: path -> content. ranges: honour the Range header. cuts: bytes after which to break off, for one request after the
    other. stall: say nothing after the headers. length: send a Content-Length. asked: (path, Range header) of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges, self.length, self.wrong_range = True, True, False
        self.cuts: list[int] = []
        self.stall = threading.Event()
        self.stall.set()
        self.asked: list[tuple[str, str | None]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append((self.path, asked))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = (
            int(asked.removeprefix("bytes=").removesuffix("-"))
            if asked and self.server.ranges
            else 0
        )
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start or self.server.wrong_range else 200)
        if start or self.server.wrong_range:
            shift = 7 if self.server.wrong_range else 0
            self.send_header(
                "Content-Range", f"bytes {start + shift}-{len(content) - 1}/{len(content)}"
            )
        if self.server.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.flush()
        self.server.stall.wait(5)
        self.wfile.write(
            content[start : start + self.server.cuts.pop(0)]
            if self.server.cuts
            else content[start:]
        )

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.stall.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No test waits for the whole machine's disks; the list tells how often one would have."""
    calls: list[int] = []
    monkeypatch.setattr(data.os, "sync", lambda: calls.append(1))
    return calls


def birds(
    archive: bytes, source: str = "http://127.0.0.1:9/Birds.tar.gz", images: int = len(PICTURES)
) -> ImageSet:
    return ImageSet(
        ("ood_data/Birds/images", "ood_data/Birds"),
        source,
        images,
        hashlib.md5(archive).hexdigest(),
    )


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, server: Server):
    """publish(archive): the server has it as Birds.tar.gz, and it is the published one of the benchmark's one OOD set."""

    def publish(archive: bytes = ARCHIVE, **settings: int) -> ImageSet:
        server.files["/Birds.tar.gz"] = archive
        image_set = birds(archive, f"{server.address}/Birds.tar.gz", **settings)
        monkeypatch.setitem(
            BENCHMARKS, "imagenet", BENCHMARKS["imagenet"]._replace(ood={"Birds": image_set})
        )
        return image_set

    return publish


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "outer" / "datasets"


@pytest.fixture
def download(root: Path, capsys: pytest.CaptureFixture):
    """download(*options): (exit status, stdout, stderr) of the download of Birds."""

    def download(*options: str) -> tuple[int, str, str]:
        status = data.main(["--data-root", str(root), "--download", "Birds", *options])
        return status, *capsys.readouterr()

    return download


def tree(folder: Path) -> dict[str, bytes | None]:
    """Relative path -> content of everything below, None for what is not a regular file, except for the lock file."""
    paths = [path for path in folder.rglob("*") if path.name != ".lhact-data.lock"]
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(paths)
    }


def unpacked(root: Path) -> dict[str, bytes | None]:
    return {
        path: content
        for path, content in tree(root).items()
        if content is not None and "tar" not in path
    }


WHOLE = {f"ood_data/{name}": content for name, content in MEMBERS.items()}


def one_line(text: str) -> str:
    """The one line of an error; the remark about checking an MD5 may come before it."""
    *remarks, line = text.splitlines()
    assert all(remark.startswith("checking ") for remark in remarks), text
    assert line.startswith("lhact.data: ")
    return line


# --- States. ---


def touch(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        os.close(os.open(f"{folder}/{i}.jpg", os.O_CREAT | os.O_WRONLY))


def states(root: Path, capsys: pytest.CaptureFixture, status: int) -> tuple[dict[str, str], str]:
    assert data.main(["--data-root", str(root)]) == status
    out, err = capsys.readouterr()
    lines = out.splitlines()
    column = lines[0].index("state")
    assert all(line[column - 2 : column] == "  " for line in lines)
    return {line.split()[0]: line[column:] for line in lines[1:]}, err


def test_states_of_every_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ood = BENCHMARKS["imagenet"].ood
    fewer = ood | {
        name: ood[name]._replace(images=10) for name in ("iNaturalist", "Places", "Textures")
    }
    monkeypatch.setitem(data.KNOWN_LISTS, ("Textures", 4), "one of its splits")
    monkeypatch.setitem(BENCHMARKS, "imagenet", BENCHMARKS["imagenet"]._replace(ood=fewer))
    touch(tmp_path / "id_data/imagenet/VAL", 3)
    touch(tmp_path / "ood_data/iNaturalist/images", 8)
    touch(tmp_path / "ood_data/SUN/images", 0)
    touch(tmp_path / "ood_data/Places", 11)
    touch(tmp_path / "ood_data/Textures/images", 4)
    (tmp_path / "ood_data/iNaturalist/images/._0.jpg").touch()
    found, err = states(tmp_path, capsys, 1)
    assert found == {
        "id": "incomplete (3 of 50,000)",
        "calibration": "missing, optional",
        "iNaturalist": "incomplete (8 of 10)",
        "SUN": "empty",
        "Places": "unexpected (11 instead of 10)",
        "Textures": "unexpected (4 instead of 10: one of its splits)",
    }
    for command in (
        "--download iNaturalist SUN Places Textures\n",
        "--imagenet-val ILSVRC2012_img_val.tar --devkit ILSVRC2012_",
    ):
        assert f"python -m lhact.data --data-root {tmp_path} {command}" in err
    assert "https://www.image-net.org/" in err


def test_states_in_words() -> None:
    assert data.describe("Textures", 1_880, 5_640).startswith(
        "unexpected (1,880 instead of 5,640: one split of torchvision's DTD;"
    )
    assert "ViM and OpenOOD" in data.describe("Textures", 5_160, 5_640)
    assert data.describe("Textures", 5_160, 5_640).startswith(
        "unexpected (5,160 instead of 5,640: "
    )
    assert data.describe("Textures", 5_159, 5_640) == "incomplete (5,159 of 5,640)"
    assert data.describe("SUN", 9_998, 10_000) == "incomplete (9,998 of 10,000)"
    assert data.describe("SUN", 1_880, 10_000) == "incomplete (1,880 of 10,000)"
    assert data.describe("Textures", 5_640, 5_640) == "complete (5,640)"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark with two images in each set."""
    real = BENCHMARKS["imagenet"]
    ood = {name: image_set._replace(images=2) for name, image_set in real.ood.items()}
    changed = real._replace(
        id=real.id._replace(images=2), calibration=real.calibration._replace(images=2), ood=ood
    )
    monkeypatch.setitem(BENCHMARKS, "imagenet", changed)


def test_everything_complete_exits_with_0_whether_or_not_train_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture, small: None
) -> None:
    for folder in (
        "id_data/ILSVRC-2012/val",
        "ood_data/iNaturalist/images",
        "ood_data/SUN/images",
        "ood_data/Places",
    ):
        touch(tmp_path / folder, 2)
    touch(tmp_path / "ood_data/dtd/images/banded", 2)
    found, err = states(tmp_path, capsys, 0)
    assert found == {"id": "complete (2)", "calibration": "missing, optional"} | dict.fromkeys(
        ("iNaturalist", "SUN", "Places", "Textures"), "complete (2)"
    )
    assert err == ""
    touch(tmp_path / "id_data/ILSVRC-2012/train/n01440764", 1)
    assert states(tmp_path, capsys, 0)[0]["calibration"] == "incomplete (1 of 2), optional"
    touch(tmp_path / "id_data/ILSVRC-2012/train/n01443537", 1)
    assert states(tmp_path, capsys, 0)[0]["calibration"] == "complete (2)"


def test_unreadable_folder_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture, small: None
) -> None:
    touch(tmp_path / "ood_data/SUN/images", 2)
    (tmp_path / "ood_data/SUN/images/gone.jpg").symlink_to("nowhere")
    found, err = states(tmp_path, capsys, 1)
    assert found["SUN"] == "unreadable"
    assert "SUN: " in err
    assert "gone.jpg cannot be read" in err


def test_data_root_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert set(states(tmp_path / "file", capsys, 1)[0].values()) == {"missing", "missing, optional"}
    assert data.main(["--data-root", str(tmp_path / "file"), "--download", "SUN"]) == 1
    assert one_line(capsys.readouterr().err) == f"lhact.data: {tmp_path / 'file'}: File exists"


def test_as_a_command_in_any_encoding(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    command = [sys.executable, "-m", "lhact.data", "--data-root", folder]
    done = subprocess.run(
        command, capture_output=True, cwd=Path(data.__file__).parent.parent, check=False
    )
    assert done.returncode == 1
    assert b"\nSUN  " in done.stdout
    assert b"Traceback" not in done.stderr


# --- Downloads. ---


def test_download_places_the_set_and_does_nothing_the_second_time(
    server: Server, publish, root: Path, download, syncs: list[int]
) -> None:
    publish()
    status, out, err = download()
    assert status == 0
    assert (
        out
        == f"Birds: complete (4): {root}/ood_data/Birds/images (the archive can go: {root}/ood_data/Birds.tar.gz)\n"
    )
    assert "Traceback" not in err
    assert unpacked(root) == WHOLE
    assert syncs == [1]
    assert set(os.listdir(root / "ood_data")) == {"Birds", "Birds.tar.gz"}
    (root / "ood_data/Birds.tar.gz").unlink()
    before = tree(root)
    status, out, err = download()
    assert (status, out, err) == (
        0,
        f"Birds: complete (4) already: {root}/ood_data/Birds/images\n",
        "",
    )
    assert tree(root) == before
    assert server.asked == [("/Birds.tar.gz", None)]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("length", [True, False])
def test_resume_from_an_earlier_part(
    server: Server, publish, root: Path, download, ranges: bool, length: bool
) -> None:
    publish()
    server.ranges, server.length = ranges, length
    part = root / "ood_data/Birds.tar.gz.lhact-part"
    part.parent.mkdir(parents=True)
    part.write_bytes(ARCHIVE[:5_000])
    assert download()[0] == 0
    assert server.asked == [("/Birds.tar.gz", "bytes=5000-")]
    assert unpacked(root) == WHOLE
    assert not part.exists()


def test_broken_transfers_go_on_where_they_broke_off(
    server: Server, publish, root: Path, download
) -> None:
    publish()
    server.cuts = [4_000, 1, 3_000]
    assert download()[0] == 0
    assert [asked for _, asked in server.asked] == [
        None,
        "bytes=4000-",
        "bytes=4001-",
        "bytes=7001-",
    ]
    assert unpacked(root) == WHOLE


def test_a_transfer_that_brings_nothing_more_ends_with_the_part_kept(
    server: Server, publish, root: Path, download
) -> None:
    publish()
    server.cuts = [4_000, 0]
    status, out, err = download()
    assert (status, out) == (1, "")
    assert f"{server.address}/Birds.tar.gz cannot be fetched: " in one_line(err)
    assert "(4,000 bytes are kept: the same command goes on from there)" in err
    assert (root / "ood_data/Birds.tar.gz.lhact-part").read_bytes() == ARCHIVE[:4_000]
    assert download()[0] == 0
    assert server.asked[-1] == ("/Birds.tar.gz", "bytes=4000-")


def test_broken_transfers_without_ranges_end(server: Server, publish, download) -> None:
    publish()
    server.ranges, server.cuts = False, [4_000] * 9
    status, _, err = download()
    assert status == 1
    assert "the connection ended after 4,000 of" in one_line(err)
    assert len(server.asked) == 2


def test_part_that_is_whole_already(server: Server, publish, root: Path, download) -> None:
    publish()
    part = root / "ood_data/Birds.tar.gz.lhact-part"
    part.parent.mkdir(parents=True)
    part.write_bytes(ARCHIVE)
    assert download()[0] == 0
    assert server.asked == [("/Birds.tar.gz", f"bytes={len(ARCHIVE)}-")]
    assert unpacked(root) == WHOLE


@pytest.mark.parametrize(
    "start", [b"something else", bytes(len(ARCHIVE) + 1)], ids=["other beginning", "too long"]
)
def test_part_of_something_else_is_removed_and_said(
    publish, root: Path, download, start: bytes
) -> None:
    publish()
    part = root / "ood_data/Birds.tar.gz.lhact-part"
    part.parent.mkdir(parents=True)
    part.write_bytes(start)
    status, _, err = download()
    assert status == 1
    assert "is not the published archive" in one_line(err)
    assert tree(root) == {"ood_data": None}
    assert download()[0] == 0


def test_answer_with_another_range_is_not_taken(
    server: Server, publish, root: Path, download
) -> None:
    publish()
    server.wrong_range = True
    status, _, err = download()
    assert status == 1
    assert "another range than asked for" in one_line(err)
    assert tree(root) == {"ood_data": None}


@pytest.mark.parametrize(
    "sent",
    [
        b"<html>gone</html>",
        ARCHIVE[:-4],
        ARCHIVE[:6_000] + bytes([ARCHIVE[6_000] ^ 1]) + ARCHIVE[6_001:],
        pack(MEMBERS, mode="w"),
    ],
    ids=["text", "shorter", "a bit flipped", "other packing"],
)
def test_wrong_md5_is_removed_and_said(
    server: Server, publish, root: Path, download, sent: bytes
) -> None:
    image_set = publish()
    server.files["/Birds.tar.gz"] = sent
    status, out, err = download()
    assert (status, out) == (1, "")
    line = one_line(err)
    assert f"{server.address}/Birds.tar.gz is not the published archive (md5 " in line
    assert (
        f"{len(sent):,} bytes), so it was removed again; give another address with --mirror URL, or put Birds.tar.gz (md5 "
        in line
    )
    assert f"{image_set.md5}) at {root}/ood_data/Birds.tar.gz yourself" in line
    assert tree(root) == {"ood_data": None}


def test_mirror(server: Server, publish, root: Path, download) -> None:
    publish()
    server.files = {"/copies/ood/Birds.tar.gz": ARCHIVE}
    assert download()[0] == 1
    assert download("--mirror", f"{server.address}/copies/ood/")[0] == 0
    assert server.asked[-1] == ("/copies/ood/Birds.tar.gz", None)
    assert unpacked(root) == WHOLE


def test_dead_link(server: Server, publish, root: Path, download) -> None:
    publish()
    server.files.clear()
    status, out, err = download()
    assert (status, out) == (1, "")
    start = (
        f"lhact.data: {server.address}/Birds.tar.gz cannot be fetched: HTTP Error 404: Not Found; "
    )
    assert one_line(err).startswith(
        f"{start}give another address with --mirror URL, or put Birds.tar.gz (md5 "
    )
    assert f"at {root}/ood_data/Birds.tar.gz yourself" in err
    assert tree(root) == {"ood_data": None}


def test_connection_refused(publish, root: Path, download) -> None:
    publish()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        status, _, err = download("--mirror", address)
    assert status == 1
    assert (
        f"{address}/Birds.tar.gz cannot be fetched: [Errno 111] Connection refused; "
        in one_line(err)
    )


def test_server_that_falls_silent(
    server: Server, publish, root: Path, download, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    monkeypatch.setattr(data, "SECONDS_WITHOUT_DATA", 0.1)
    server.stall.clear()
    status, _, err = download()
    assert status == 1
    assert "cannot be fetched: timed out; " in one_line(err)


@pytest.mark.parametrize(
    "address", ["http://a..b", "http://" + "a" * 70 + ".invalid", "http://127.0.0.1/a b\x01"]
)
def test_address_that_cannot_be(publish, download, address: str) -> None:
    publish()
    status, _, err = download("--mirror", address)
    assert status == 1
    assert "cannot be fetched: " in one_line(err)


def test_one_that_fails_does_not_keep_the_others(
    server: Server,
    publish,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    good = publish()
    dead = ImageSet(("ood_data/Dead/images",), f"{server.address}/Dead.tar.gz", 1, "0" * 32)
    monkeypatch.setitem(
        BENCHMARKS, "imagenet", BENCHMARKS["imagenet"]._replace(ood={"Dead": dead, "Birds": good})
    )
    assert data.main(["--data-root", str(root), "--download", "Dead", "Birds"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("Birds: complete (4)")
    assert "Dead.tar.gz cannot be fetched" in err
    assert unpacked(root) == WHOLE


def test_archive_put_there_by_hand_is_used(server: Server, publish, root: Path, download) -> None:
    publish()
    (root / "ood_data").mkdir(parents=True)
    (root / "ood_data/Birds.tar.gz").write_bytes(ARCHIVE)
    assert download()[0] == 0
    assert server.asked == []
    assert unpacked(root) == WHOLE


def test_wrong_archive_put_there_by_hand_is_left_alone(
    server: Server, publish, root: Path, download
) -> None:
    publish()
    (root / "ood_data").mkdir(parents=True)
    (root / "ood_data/Birds.tar.gz").write_bytes(ARCHIVE[:-1])
    status, _, err = download()
    assert status == 1
    assert "Birds.tar.gz is not the published archive (md5 " in one_line(err)
    assert "move it away" in err
    assert (root / "ood_data/Birds.tar.gz").read_bytes() == ARCHIVE[:-1]
    assert server.asked == []


def test_disk_full_while_fetching(server: Server, publish, root: Path, download) -> None:
    publish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        status, _, err = download()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    part = root / "ood_data/Birds.tar.gz.lhact-part"
    assert (
        one_line(err)
        == f"lhact.data: {part} cannot be written: File too large; mend that and give the same command again"
    )
    assert len(server.asked) == 1
    assert part.read_bytes() == ARCHIVE[: part.stat().st_size]
    assert download()[0] == 0
    assert unpacked(root) == WHOLE


def test_disk_that_fails_while_fetching(
    publish, root: Path, download, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, _, err = download()
    assert status == 1
    assert (
        "Birds.tar.gz.lhact-part cannot be written: No space left on device; mend that"
        in one_line(err)
    )
    assert download()[0] == 0


def test_part_that_cannot_be_opened(publish, root: Path, download) -> None:
    publish()
    part = root / "ood_data/Birds.tar.gz.lhact-part"
    (part / "own").mkdir(parents=True)
    status, _, err = download()
    assert status == 1
    assert f"{part} cannot be written: Is a directory; mend that" in one_line(err)
    assert (part / "own").is_dir()


def test_second_run_at_once_stops(publish, root: Path, download) -> None:
    publish()
    with data._alone(root):
        status, _, err = download()
    assert status == 1
    assert f"another run is fetching or unpacking to {root}; wait for it" in one_line(err)
    assert download()[0] == 0


# --- What is there already. ---


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"images/own.jpg": b"1"}, "incomplete (1 of 4)"),
        ({f"images/{i}.jpg": b"1" for i in range(5)}, "unexpected (5 instead of 4)"),
        ({"images/notes.txt": b"1"}, "it holds other files"),
    ],
)
def test_what_lies_at_the_place_is_left_alone(
    server: Server, publish, root: Path, download, there: dict[str, bytes], said: str
) -> None:
    publish()
    for name, content in there.items():
        path = root / "ood_data/Birds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    before = tree(root)
    status, _, err = download()
    assert status == 1
    assert (
        f"Birds: {root}/ood_data/Birds/images is taken: {said}; move it away and start again"
        in one_line(err)
    )
    assert tree(root) == before
    assert server.asked == []


def test_what_lies_beside_the_place_is_left_alone(publish, root: Path, download) -> None:
    publish()
    own = {
        "ood_data/Birds/one.jpg": b"in the wrong place",
        "ood_data/Birds/labels/list.txt": b"own labels",
        "ood_data/Birds.tar.gz.part": b"a browser's",
        "ood_data/.Birds.tmp/x": b"x",
    }
    for name, content in own.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "ood_data/Birds/images").mkdir()
    assert download()[0] == 0
    found = tree(root)
    assert {name: found[name] for name in own} == own
    assert unpacked(root / "ood_data/Birds/images") == {**PICTURES, "._birds-0.jpg": b"Mac"}
    assert (
        benchmarks.find(root, BENCHMARKS["imagenet"].ood["Birds"]) == root / "ood_data/Birds/images"
    )


@pytest.mark.parametrize("kind", ["link", "file"])
def test_workspace_that_is_not_its_own_is_left_alone(
    publish, root: Path, download, kind: str, tmp_path: Path
) -> None:
    publish()
    path = root / "ood_data/.Birds.lhact-unpacking"
    path.parent.mkdir(parents=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/x").touch()
    if kind == "link":
        path.symlink_to(tmp_path / "own")
    else:
        path.touch()
    status, _, err = download()
    assert status == 1
    one_line(err)
    assert path.exists()
    assert (tmp_path / "own/x").exists()


# --- Archives of every bad kind. ---

LINK = tarfile.SYMTYPE
OUTSIDE = "../../../outside"
LONG = "d" * 200
MALICIOUS = {
    "parent": pack(MEMBERS, last={f"{OUTSIDE}/evil.jpg": b"evil"}),
    "parent within a name": pack(MEMBERS, last={"Birds/images/../../../../evil.jpg": b"evil"}),
    "link out": pack(MEMBERS, member("Birds/images/out", LINK, "/etc/passwd")),
    "relative link out": pack(
        MEMBERS, member("Birds/images/out", LINK, "../../../../../outside/secret")
    ),
    "written through a link": pack(
        MEMBERS, member("Birds/out", LINK, OUTSIDE), last={"Birds/out/evil.jpg": b"evil"}
    ),
    "link inside": pack(MEMBERS, member("Birds/images/in", LINK, "birds-0.jpg")),
    "link to the folder": pack(MEMBERS, member("Birds/again", LINK, ".")),
    "chain of long links": pack(
        MEMBERS,
        *(member("/".join([LONG] * i) + "/l", LINK, "/".join([LONG] * 20)) for i in range(1, 4)),
        member("l/l", LINK, ".."),
    ),
    "hard link out": pack(
        MEMBERS, member("Birds/images/out", tarfile.LNKTYPE, "../../../outside/secret")
    ),
    "absolute hard link": pack(MEMBERS, member("Birds/images/out", tarfile.LNKTYPE, "/etc/passwd")),
    "device": pack(MEMBERS, member("Birds/images/null", tarfile.CHRTYPE)),
    "block device": pack(MEMBERS, member("Birds/images/disk", tarfile.BLKTYPE)),
    "pipe": pack(MEMBERS, member("Birds/images/pipe", tarfile.FIFOTYPE)),
    "top folder is a link": pack({}, member("Birds", LINK, OUTSIDE), last=MEMBERS),
}
BROKEN = {
    "empty": b"",
    "text": b"<html>gone</html>",
    "cut in the middle": ARCHIVE[: len(ARCHIVE) // 2],
    "a tar cut in the middle": pack(MEMBERS, mode="w")[:7_000],
    "gzip of text": gzip.compress(b"hello"),
    "no images folder": pack({"Birds/pictures/a.jpg": b"a"}),
    "two images folders": pack({**MEMBERS, "Other/images/a.jpg": b"a"}),
    "images is a file": pack({"Birds/images": b"a"}),
    "images without images": pack({"Birds/images/a.txt": b"a"}),
    "too few": pack(dict(list(MEMBERS.items())[1:])),
    "too many": pack({**MEMBERS, "Birds/images/more.jpg": b"a"}),
    "file over folder": pack({**MEMBERS, "Birds/images/birds-0.jpg/x.jpg": b"a"}),
}


@pytest.mark.parametrize(
    "archive", [*MALICIOUS.values(), *BROKEN.values()], ids=[*MALICIOUS, *BROKEN]
)
def test_bad_archives_leave_nothing_anywhere(publish, root: Path, download, archive: bytes) -> None:
    """Its MD5 fits, as if the published archive itself were bad."""
    publish(archive)
    outside = root.parent / "outside"
    outside.mkdir(parents=True)
    (outside / "secret").write_text("secret")
    status, out, err = download()
    assert (status, out) == (1, "")
    assert (
        "Birds.tar.gz cannot be unpacked: " if archive in MALICIOUS.values() else "Birds.tar.gz "
    ) in one_line(err)
    assert set(tree(root)) == {"ood_data", "ood_data/Birds.tar.gz"}
    assert tree(outside) == {"secret": b"secret"}
    assert set(os.listdir(root.parent)) == {"outside", "datasets"}


@pytest.mark.parametrize(
    "name", ["{outside}/evil.jpg", "//{outside}/evil.jpg", "Birds/images/\0evil.jpg"]
)
def test_odd_names_stay_within(publish, root: Path, download, name: str) -> None:
    outside = root.parent / "outside"
    outside.mkdir(parents=True)
    odd = member("x")
    odd.pax_headers = {"path": name.format(outside=outside)}
    publish(pack(MEMBERS, odd))
    status, _, err = download()
    if status:  # what becomes of such a name differs between versions of Python
        one_line(err)
    assert tree(outside) == {}
    assert set(os.listdir(root.parent)) == {"outside", "datasets"}
    assert not [path for path in tree(root) if "evil" in path]


def test_permissions_of_members_are_tamed(publish, root: Path, download) -> None:
    archive = pack({}, member("Birds/images", tarfile.DIRTYPE, mode=0), last=MEMBERS)
    publish(archive)
    assert download()[0] == 0
    for path in (root / "ood_data/Birds").rglob("*"):
        assert path.stat().st_mode & 0o7022 == 0
        assert os.access(path, os.R_OK)


def test_python_without_safe_unpacking(
    publish, root: Path, download, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    monkeypatch.delattr(tarfile, "data_filter")
    status, _, err = download()
    assert status == 1
    assert "cannot unpack archives safely (wanted 3.10.12, 3.11.4, 3.12 or newer)" in one_line(err)
    assert set(tree(root)) == {"ood_data", "ood_data/Birds.tar.gz"}


def test_disk_full_while_unpacking(
    publish, root: Path, download, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "copyfileobj", full)
        status, _, err = download()
    assert status == 1
    assert (
        "Birds.tar.gz cannot be unpacked: No space left on device (nothing of it was kept)"
        in one_line(err)
    )
    assert set(tree(root)) == {"ood_data", "ood_data/Birds.tar.gz"}
    assert download()[0] == 0


# --- Interruption. ---


def test_interrupted_by_the_user(
    publish, root: Path, download, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "data_filter", interrupt)
        status, _, err = download()
    assert status == 130
    assert one_line(err) == "lhact.data: interrupted; the same command goes on where it stopped"
    assert set(tree(root)) == {"ood_data", "ood_data/Birds.tar.gz"}
    assert download()[0] == 0


def killed_at(step: int, arguments: list[str]) -> bool:
    """Whether main, in a process of its own, got as far as the step-th time it touches the file system, and was killed there."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, _: tuple) -> None:
            nonlocal left
            if event in (
                "open",
                "os.rename",
                "os.mkdir",
                "os.rmdir",
                "os.remove",
                "os.chmod",
                "os.utime",
                "shutil.rmtree",
            ):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            os._exit(data.main(arguments))
        finally:
            os._exit(99)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_any_step_never_passes_for_whole(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    image_set = birds(
        ARCHIVE
    )  # put there by hand: no server, so no thread is there when the process forks
    monkeypatch.setitem(
        BENCHMARKS, "imagenet", BENCHMARKS["imagenet"]._replace(ood={"Birds": image_set})
    )
    arguments = ["--data-root", "", "--download", "Birds"]
    states = []
    for step in range(1, 200, 2):
        here = root / str(step)
        (here / "ood_data").mkdir(parents=True)
        (here / "ood_data/Birds.tar.gz").write_bytes(ARCHIVE)
        arguments[1] = str(here)
        killed = killed_at(step, arguments)
        state = data.look("Birds", image_set, here)
        states.append(state.text)
        assert state.text in ("missing", "empty", "complete (4)")
        if state.complete:
            assert unpacked(state.folder) == {**PICTURES, "._birds-0.jpg": b"Mac"}
        if not killed:
            break
        assert data.main(arguments) == 0
        assert unpacked(here / "ood_data/Birds/images") == {**PICTURES, "._birds-0.jpg": b"Mac"}
        if not state.complete:
            assert set(os.listdir(here / "ood_data")) == {"Birds", "Birds.tar.gz"}
    assert not killed
    assert {"missing", "empty", "complete (4)"} == set(states)


# --- ImageNet's validation images. ---


@pytest.fixture
def val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(validation tar, devkit): five images of three classes, which torchvision and the benchmark take for ImageNet's."""
    tar, devkit = tmp_path / "home/my_val.tar", tmp_path / "home/my_devkit.tar.gz"
    tar.parent.mkdir()
    tar.write_bytes(pack(dict(reversed(VAL.items())), mode="w"))
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    synsets = np.zeros(4, dtype=[(field, object) for field in fields])
    for row, (number, wnid) in enumerate(DEVKIT_WNIDS.items()):
        synsets[row] = (number, wnid, f"word {number}, other", "gloss", 0)
    synsets[3] = (4, "n00000001", "inner node", "gloss", 3)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number}\n" for number in GROUND_TRUTH).encode()
    folder = "ILSVRC2012_devkit_t12/data"
    devkit.write_bytes(
        pack(
            {
                f"{folder}/meta.mat": meta.getvalue(),
                f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth,
            }
        )
    )
    for kind, path in (("val", tar), ("devkit", devkit)):
        meta_entry = (imagenet.ARCHIVE_META[kind][0], hashlib.md5(path.read_bytes()).hexdigest())
        monkeypatch.setitem(imagenet.ARCHIVE_META, kind, meta_entry)
    real = BENCHMARKS["imagenet"]
    monkeypatch.setitem(BENCHMARKS, "imagenet", real._replace(id=real.id._replace(images=len(VAL))))
    return tar, devkit


@pytest.fixture
def unpack(root: Path, capsys: pytest.CaptureFixture):
    """unpack(tar, *options): (exit status, stdout, stderr)."""

    def unpack(tar: Path, *options: object) -> tuple[int, str, str]:
        status = data.main(
            ["--data-root", str(root), "--imagenet-val", str(tar), *map(str, options)]
        )
        return status, *capsys.readouterr()

    return unpack


IN_CLASSES = {
    f"{DEVKIT_WNIDS[number]}/{name}": content
    for number, (name, content) in zip(GROUND_TRUTH, VAL.items(), strict=True)
}


def test_val_flat(root: Path, val: tuple[Path, Path], unpack) -> None:
    target = root / "id_data/ILSVRC-2012/val"
    before = tree(val[0].parent)
    status, out, _ = unpack(val[0])
    assert (status, out) == (0, f"id: complete (5), flat: no labels: {target}\n")
    assert unpacked(target) == VAL
    assert os.listdir(target.parent) == ["val"]
    assert tree(val[0].parent) == before
    assert unpack(val[0]) == (0, f"id: complete (5) already: {target}\n", "")
    status, _, err = unpack(val[0], "--devkit", val[1])
    assert status == 1
    assert "is complete but flat; to have class folders, move it away" in one_line(err)
    assert unpacked(target) == VAL


def test_val_in_class_folders(root: Path, val: tuple[Path, Path], unpack) -> None:
    target = root / "id_data/ILSVRC-2012/val"
    before = tree(val[0].parent)
    status, out, _ = unpack(val[0], "--devkit", val[1])
    assert (status, out) == (0, f"id: complete (5): {target}\n")
    assert unpacked(target) == IN_CLASSES
    assert os.listdir(target.parent) == ["val"]
    assert tree(val[0].parent) == before  # no meta.bin either
    assert unpack(val[0], "--devkit", val[1]) == (0, f"id: complete (5) already: {target}\n", "")


def test_val_with_the_meta_file_of_torchvision(root: Path, val: tuple[Path, Path], unpack) -> None:
    meta = val[0].parent / "meta.bin"
    imagenet.parse_devkit_archive(val[0].parent, val[1].name)
    assert unpack(val[0], "--devkit", meta)[0] == 0
    assert unpacked(root / "id_data/ILSVRC-2012/val") == IN_CLASSES


def test_meta_files_that_are_none(root: Path, val: tuple[Path, Path], unpack) -> None:
    meta = val[0].parent / "meta.bin"
    for content in (
        "missing",
        b"",
        b"text",
        [],
        ({}, 5),
        ({}, ["n01440764"] * 4),
        ({}, ["n0"] * 5),
        ({}, [print] * 5),
    ):
        if isinstance(content, bytes):
            meta.write_bytes(content)
        elif content != "missing":
            torch.save(content, meta)
        status, out, err = unpack(val[0], "--devkit", meta)
        assert (status, out) == (1, "")
        assert str(meta) in one_line(err)
    assert tree(root) == {}


class Hostile:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.folder,)


def test_a_meta_file_that_would_run_code_does_not(
    root: Path, val: tuple[Path, Path], unpack
) -> None:
    meta, made = val[0].parent / "meta.bin", val[0].parent / "made"
    torch.save(({}, [Hostile(made)] * 5), meta)
    status, out, err = unpack(val[0], "--devkit", meta)
    assert (status, out) == (1, "")
    assert str(meta) in one_line(err)
    assert not made.exists()
    torch.load(meta, weights_only=False)  # the trap works
    assert made.exists()


@pytest.mark.parametrize("which", [0, 1], ids=["val", "devkit"])
def test_val_with_another_md5_is_refused(
    root: Path, val: tuple[Path, Path], unpack, which: int
) -> None:
    val[which].write_bytes(val[which].read_bytes() + b"\0")
    status, out, err = unpack(val[0], "--devkit", val[1])
    assert (status, out) == (1, "")
    name, md5 = imagenet.ARCHIVE_META[("val", "devkit")[which]]
    line = one_line(err)
    assert (
        f"{val[which]} is not {name} (md5 {hashlib.md5(val[which].read_bytes()).hexdigest()}, wanted {md5})"
        in line
    )
    assert tree(root) == {}


@pytest.mark.parametrize("which", [0, 1], ids=["val", "devkit"])
def test_val_that_is_not_there(root: Path, val: tuple[Path, Path], unpack, which: int) -> None:
    val[which].unlink()
    status, _, err = unpack(val[0], "--devkit", val[1])
    assert status == 1
    assert one_line(err) == f"lhact.data: {val[which]}: No such file or directory"


def test_val_with_too_few_images(
    root: Path, val: tuple[Path, Path], unpack, monkeypatch: pytest.MonkeyPatch
) -> None:
    val[0].write_bytes(pack(dict(list(VAL.items())[1:]), mode="w"))
    monkeypatch.setitem(
        imagenet.ARCHIVE_META, "val", ("x", hashlib.md5(val[0].read_bytes()).hexdigest())
    )
    status, _, err = unpack(val[0], "--devkit", val[1])
    assert status == 1
    assert f"{val[0]} must hold 5 images, got 4" in one_line(err)
    assert unpacked(root) == {}
    assert not (root / "id_data/ILSVRC-2012/val").exists()


def test_val_does_not_touch_what_is_there(root: Path, val: tuple[Path, Path], unpack) -> None:
    own = root / "id_data/ILSVRC-2012/val/own.JPEG"
    own.parent.mkdir(parents=True)
    own.touch()
    status, _, err = unpack(val[0])
    assert status == 1
    assert "is taken: incomplete (1 of 5); move it away" in one_line(err)
    assert unpacked(root) == {"id_data/ILSVRC-2012/val/own.JPEG": b""}


def test_real_md5s_are_those_of_torchvision_and_of_the_specification() -> None:
    assert imagenet.ARCHIVE_META["val"] == (
        "ILSVRC2012_img_val.tar",
        "29b22e2961454d5413ddabcf34fc5622",
    )
    ood = BENCHMARKS["imagenet"].ood
    assert {name: image_set.md5 for name, image_set in ood.items()} == {
        "iNaturalist": "5be6ea8aa027d7b631916427b32cb335",
        "SUN": "8469c3ada62211477954ec1be53b12d0",
        "Places": "b5cb5eba2754ae2a28beea8718db699a",
        "Textures": "fff73e5086ae6bdbea199a49dfb8a4c1",
    }
    # Unfinished work and archives lie where no spelling of the set looks for images.
    root = Path("datasets")
    assert [data._outermost(ood[name], root) for name in ("SUN", "Textures")] == [
        root / "ood_data/SUN",
        root / "ood_data/dtd",
    ]
    assert data._outermost(BENCHMARKS["imagenet"].id, root) == root / "id_data/ILSVRC-2012/val"


# --- Command line. ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--download"], "expected at least one argument"),
        (["--download", "birds"], "invalid choice: 'birds'"),
        (["--mirror", "http://127.0.0.1/"], "--mirror goes with --download"),
        (["--devkit", "x.tar.gz"], "--devkit goes with --imagenet-val"),
        (["--download", "SUN", "--mirror", "file:///etc"], "--mirror must be an address"),
        (["--download", "SUN", "--mirror", "example.org/x"], "--mirror must be an address"),
        (["--download", "SUN", "--mirror", "http://[::1"], "--mirror must be an address"),
        (["--download", "SUN", "--mirror", "http://h:port/"], "--mirror must be an address"),
    ],
)
def test_command_lines_that_are_not_right(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit_:
        data.main(arguments)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_several_things_at_once(
    publish, root: Path, val: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    publish()
    arguments = [
        "--data-root",
        str(root),
        "--download",
        "Birds",
        "Birds",
        "--imagenet-val",
        str(val[0]),
    ]
    assert data.main(arguments) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert data.main(["--data-root", str(root)]) == 0
