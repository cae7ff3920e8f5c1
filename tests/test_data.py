"""`python -m lhact.data`: states of image sets, images that cannot be read, downloads from
127.0.0.1, archives of every bad kind, ImageNet's validation images."""

import hashlib
import io
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision.datasets import imagenet

from lhact import data
from lhact.benchmarks.builtin import BENCHMARKS, Benchmark, ImageSet

PROJECT = Path(data.__file__).parents[1]
IMAGENET = BENCHMARKS["imagenet"]
PART = "ood_data/Birds.tar.gz.lhact-part"
PAGE = b"<html>please log in</html>"


def pack(contents, *links, last=None, mode="w:gz"):
    """A tar of the contents, then members (name, kind, link) without content, then `last`."""
    buffer = io.BytesIO()
    members = [(name, tarfile.REGTYPE, "", content) for name, content in contents.items()]
    members += [(*link, b"") for link in links]
    members += [(name, tarfile.REGTYPE, "", content) for name, content in (last or {}).items()]
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, kind, link, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


PICTURES = {f"images/birds-{i}.jpg": os.urandom(3_000 + i) for i in range(4)}
MEMBERS = {f"Birds/{n}": content for n, content in (PICTURES | {"labels/list.txt": b"x"}).items()}
WHOLE = {f"ood_data/{name}": content for name, content in MEMBERS.items()}
ARCHIVE = pack(MEMBERS)
MD5 = hashlib.md5(ARCHIVE).hexdigest()


def fill(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def tree(folder):
    """Relative path -> content of every file below, but for the archive that was fetched."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".gz"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`, with ranges; the first requests by the functions in `server.script`,
    which get the handler and the first byte that is asked for."""

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.asked.append((self.path, start))
        content = self.server.files.get(self.path, b"")
        if self.server.script:
            self.server.script.pop(0)(self, start)
        elif start < len(content):
            self.answer(206 if start else 200, content[start:], range=f"bytes {start}-")
        else:
            self.answer(416 if content else 404)

    def answer(self, status, content=b"", cut=None, **headers):
        """Promises the content, and sends it, or `cut` bytes of it."""
        self.send_response(status)
        for name, value in {"length": str(len(content)), **headers}.items():
            if value:
                self.send_header(f"Content-{name}", value)
        self.end_headers()
        self.wfile.write(content[:cut])

    def log_message(self, *arguments):
        pass


def publish(monkeypatch, archive=ARCHIVE, address="http://127.0.0.1:9"):
    """Makes Birds the only OOD set of the benchmark `imagenet`."""
    folders, md5 = ("ood_data/Birds/images", "ood_data/Birds"), hashlib.md5(archive).hexdigest()
    birds = ImageSet(folders, f"{address}/Birds.tar.gz", len(PICTURES), md5)
    monkeypatch.setitem(BENCHMARKS, "imagenet", replace(IMAGENET, ood={"Birds": birds}))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "outer" / "datasets"


@pytest.fixture
def run(root, capsys, monkeypatch):
    """run(*options): (exit status, stdout, stderr). It waits for no pause and for no disk."""
    pauses = []
    monkeypatch.setattr(data.time, "sleep", pauses.append)
    monkeypatch.setattr(data.os, "sync", lambda: None)

    def run(*options):
        status = data.main(["--data-root", str(root), *map(str, options)])
        out, err = capsys.readouterr()
        return status, out, err

    run.pauses = pauses
    return run


@pytest.fixture
def birds(root, run, monkeypatch):
    """Fetches the set Birds from a server on this machine. download(*options): the exit status and
    the line for the user."""

    def download(*options):
        status, out, err = run("--download", "Birds", *options)
        if status == 0:
            assert out == f"Birds: complete (4): {root}/ood_data/Birds/images\n"
            assert tree(root / "ood_data/Birds").items() >= PICTURES.items()
            return 0, out
        assert out == ""
        line = err.splitlines()[-1]
        assert line.startswith("lhact.data: ")
        assert line.isprintable()
        return status, line

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.handle_error = True, lambda *_: None
        server.files, server.script, server.asked = {"/Birds.tar.gz": ARCHIVE}, [], []
        address = f"http://127.0.0.1:{server.server_port}"
        publish(monkeypatch, address=address)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield SimpleNamespace(server=server, address=address, download=download)
        server.shutdown()
        thread.join()


# --- States. ---


def states(out):
    head, *lines = out.splitlines()
    assert all(line[head.index("state") - 2 :].startswith("  ") for line in lines)
    return {line.split()[0]: line[head.index("state") :] for line in lines}


@pytest.fixture
def small(monkeypatch):
    """The benchmark `imagenet` with two images in each set."""
    ood = {name: replace(image_set, images=2) for name, image_set in IMAGENET.ood.items()}
    fewer = {name: replace(getattr(IMAGENET, name), images=2) for name in ("id", "calibration")}
    monkeypatch.setitem(BENCHMARKS, "imagenet", replace(IMAGENET, ood=ood, **fewer))
    monkeypatch.setitem(data.KNOWN_LISTS, ("Textures", 3), "one of its splits")


def test_states_of_every_kind(root, run, small):
    three = [f"{name}/{i}.jpg" for name in ("Places", "Textures") for i in range(3)]
    others = ["../id_data/imagenet/VAL/1.jpg", "SUN/images/x.txt", "iNaturalist/._1.jpg"]
    fill(root / "ood_data", dict.fromkeys(three + others, b""))
    (root / "ood_data/iNaturalist/gone.jpg").symlink_to("nowhere")
    status, out, err = run()
    found = states(out)
    unreadable = found.pop("iNaturalist")
    assert unreadable.startswith("unreadable: ")
    assert "gone.jpg cannot be read" in unreadable
    assert status == 1
    assert found == {
        "id": "incomplete (1 of 2)",
        "calibration": "missing, optional",
        "SUN": "empty",
        "Places": "unexpected (3 instead of 2)",
        "Textures": "unexpected (3 instead of 2: one of its splits)",
    }
    command = f"python -m lhact.data --data-root {root} "
    assert f"{command}--benchmark imagenet --download iNaturalist SUN Places Textures\n" in err
    assert f"{command}--imagenet-val ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.t" in err
    assert "id comes from: https://www.image-net.org/" in err


def test_well_known_lists():
    # Each of DTD's three splits has 40 images of 47 classes; ViM leaves out 4 classes of 120.
    assert set(data.KNOWN_LISTS) == {("Textures", 40 * 47), ("Textures", (47 - 4) * 120)}


def test_all_that_is_needed_is_there(root, run, small):
    folders = ("id_data/ILSVRC-2012/val/n01", "ood_data/iNaturalist/images", "ood_data/SUN/images")
    for folder in (*folders, "ood_data/Places", "ood_data/dtd/images/banded"):
        fill(root / folder, {"1.jpg": b"", "2.jpg": b""})
    rest = dict.fromkeys(("id", *IMAGENET.ood), "complete (2)")
    status, out, err = run()
    assert (status, states(out), err) == (0, {**rest, "calibration": "missing, optional"}, "")
    train = root / "id_data/ILSVRC-2012/train"
    for name, text in (
        ("1", "incomplete (1 of 2), optional"),
        ("2", "complete (2), flat: no labels"),
    ):
        fill(train, {f"{name}.jpg": b""})
        status, out, _ = run()
        assert (status, states(out)["calibration"]) == (0, text)


def test_any_benchmark(root, run, monkeypatch):
    own = Benchmark(ImageSet(("a",), "a shop"), None, {"B": ImageSet(("b",), "a friend")}, "x")
    monkeypatch.setitem(BENCHMARKS, "own", own)
    fill(root, {"a/x/1.jpg": b""})
    status, out, err = run("--benchmark", "own")
    assert (status, states(out)) == (1, {"id": "complete (1)", "B": "missing"})
    assert err == "B comes from: a friend\n"
    for name, benchmark in BENCHMARKS.items():
        assert set(benchmark.ood) < set(states(run("--benchmark", name)[1]))


def test_as_a_command_on_any_terminal(tmp_path):
    """Bytes that are no UTF-8, letters that are no ASCII, control characters; `~` is the home."""
    folder = os.fsencode(tmp_path) + b"/\xff\x1b[2J\n\xc3\xa9"
    fill(Path(os.fsdecode(folder), "ood_data/SUN/images"), {"\x1b]0;x\x07.jpg": b"no image"})
    environment = {**os.environ, "HOME": os.fsdecode(folder), "PYTHONIOENCODING": "ascii"}
    for options in ([], ["--check-images"]):
        command = [sys.executable, "-m", "lhact.data", "--data-root=~", *options]
        done = subprocess.run(
            command, capture_output=True, cwd=PROJECT, env=environment, timeout=60
        )
        assert done.returncode == 1
        assert rb"\udcff\x1b[2J\n\xe9/ood_data/SUN/images" in done.stdout
        assert done.stdout.replace(b"\n", b"").decode().isprintable()
        assert not any(text in done.stderr for text in (b"Traceback", b"\x1b[2J", b"\x1b]0"))


def test_importing_is_fast():
    code = "import sys, lhact.data; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=60)


# --- Images that cannot be read. ---


def test_every_image_that_cannot_be_read_is_named(root, run):
    assert run("--check-images")[:2] == (1, "0 images can be read, 0 cannot\n")
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "JPEG")
    good, sun, places = buffer.getvalue(), "ood_data/SUN/images", "ood_data/Places/images"
    fill(root / sun, {f"{i:02}.jpg": good for i in range(40)})
    status, out, err = run("--check-images")
    assert (status, out) == (0, "40 images can be read, 0 cannot\n")
    assert "iNaturalist is not there, so it is not checked" in err
    assert "/40 [" in err  # the progress bar
    fill(root / sun, {"03.jpg": good[:-200], "39.jpg": b"", "new.png": PAGE})
    fill(root / places, {"b.jpg": good, "a.jpg": b"text"})
    fill(root, {"ood_data/dtd/images/x.txt": b"no images"})
    status, out, _ = run("--check-images")
    *lines, total = out.splitlines()
    assert (status, total) == (1, "39 images can be read, 5 cannot")
    names = [f"SUN: {root}/{sun}/{name} " for name in ("03.jpg", "39.jpg", "new.png")]
    names += [f"Places: {root}/{places}/a.jpg ", f"Textures: {root}/ood_data/dtd/images holds no"]
    assert [line[: len(name)] for line, name in zip(lines, names, strict=True)] == names


def test_a_process_that_dies_is_not_waited_for(root, run, monkeypatch):
    fill(root, {"ood_data/SUN/images/a.jpg": b""})
    monkeypatch.setattr(data, "_start_process", os.abort)
    status, out, err = run("--check-images")
    assert (status, out) == (1, "")
    assert "lhact.data: a process that read images of SUN was killed" in err


def test_processes_end_with_a_killed_parent(root):
    first = root / "ood_data/SUN/images/0.png"
    fill(root, {"ood_data/SUN/images/0.png": b""})
    Image.new("L", (2_000, 2_000)).save(first)
    for number in range(1, 1_000):
        os.link(first, first.with_name(f"{number}.png"))
    command = [sys.executable, "-m", "lhact.data", "--data-root", str(root), "--check-images"]
    parent = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE)
    while not re.search(rb"[1-9]\d*/1000", os.read(parent.stderr.fileno(), 1_000)):
        assert parent.poll() is None
    parent.kill()
    parent.communicate(timeout=20)  # until nobody holds the other end of the pipe


# --- Downloads. ---


def test_download_places_the_set_once(birds, root):
    assert birds.download()[0] == 0
    assert tree(root) == WHOLE
    assert set(os.listdir(root / "ood_data")) == {"Birds", "Birds.tar.gz"}
    (root / "ood_data/Birds.tar.gz").unlink()
    assert birds.download()[0] == 0
    assert birds.server.asked == [("/Birds.tar.gz", 0)]


@pytest.mark.parametrize("length", ["", str(len(ARCHIVE))], ids=["not told", "told"])
def test_a_server_without_ranges(birds, root, length):
    fill(root, {PART: ARCHIVE[:5_000]})
    birds.server.script = [lambda handler, start: handler.answer(200, ARCHIVE, length=length)]
    assert birds.download()[0] == 0
    assert birds.server.asked == [("/Birds.tar.gz", 5_000)]


def send(content, cut=None):
    return lambda handler, start: handler.answer(
        206 if start else 200, content[start:], cut, range=f"bytes {start}-"
    )


def test_broken_transfers_go_on_where_they_broke_off(birds, run, monkeypatch):
    monkeypatch.setattr(data, "PROGRESS", 100)
    birds.server.script = [send(ARCHIVE, n) for n in (1_000, 1, 1, 1, 100, 1, 1, 1)]
    assert birds.download()[0] == 0
    starts = [0, 1_000, 1_001, 1_002, 1_003, 1_103, 1_104, 1_105, 1_106]
    assert [start for _, start in birds.server.asked] == starts
    assert run.pauses == [1, 2, 4, 8] * 2


@pytest.mark.parametrize("answer", [send(ARCHIVE, 1), lambda handler, _: handler.answer(503)])
def test_requests_that_bring_too_little_are_bounded(birds, root, run, answer):
    fill(root, {PART: ARCHIVE[:1_000]})
    birds.server.script = [answer] * 99
    status, line = birds.download()
    kept = (root / PART).read_bytes()
    assert (status, kept) == (1, ARCHIVE[: max(1_000, len(kept))])
    assert f"; {len(kept):,} bytes are kept, and the same command goes on from there; or " in line
    assert len(birds.server.asked) == 5
    assert run.pauses == [1, 2, 4, 8]


@pytest.mark.parametrize("head", [b"", b"HTTP/1.0 200 OK\r\n\r\n"], ids=["header", "body"])
def test_a_byte_at_a_time(birds, monkeypatch, head):
    def drip(handler, start):
        handler.wfile.write(head)
        while True:  # until the client goes away
            handler.wfile.write(b"H")
            threading.Event().wait(0.01)

    monkeypatch.setattr(data, "PATIENCE", 0.1)
    birds.server.script = [drip] * 99
    begin = time.monotonic()
    assert "cannot be fetched: less than 65,536 bytes came in 0.1 s; " in birds.download()[1]
    assert len(birds.server.asked) == 5
    assert time.monotonic() - begin < 5


NO_HELP = {
    "something else than what is": lambda handler, _: handler.answer(200, PAGE),
    "a web page": lambda handler, _: handler.answer(200, ARCHIVE, type="text/html"),
    "another range": lambda handler, _: handler.answer(206, ARCHIVE, range="bytes 7-"),
    "status 201": lambda handler, _: handler.answer(201, ARCHIVE),
    "answered with status 404": lambda handler, _: handler.answer(404, PAGE),
}


@pytest.mark.parametrize("said", NO_HELP)
def test_answers_that_do_not_help_destroy_nothing(birds, root, said):
    fill(root, {PART: ARCHIVE[:5_000]})
    birds.server.script = [NO_HELP[said]]
    status, line = birds.download()
    assert (status, tree(root)) == (1, {PART: ARCHIVE[:5_000]})
    assert f"{birds.address}/Birds.tar.gz cannot be fetched: the server " in line
    assert said in line
    assert "; 5,000 bytes are kept, and the same command goes on from there; or give ano" in line
    assert f"(md5 {MD5}) at {root}/ood_data/Birds.tar.gz yourself" in line
    assert len(birds.server.asked) == 1
    assert birds.download()[0] == 0


@pytest.mark.parametrize("start", [0, 5_000])
@pytest.mark.parametrize("sent", [PAGE * 300, ARCHIVE[:-4], ARCHIVE[:-1] + b"x"])
def test_what_came_last_is_dropped_when_the_md5_is_wrong(birds, root, start, sent):
    fill(root, {PART: ARCHIVE[:start]})
    birds.server.script = [send(sent)]
    status, line = birds.download()
    assert (status, tree(root)) == (1, {PART: ARCHIVE[:start]})
    found = hashlib.md5(ARCHIVE[:start] + sent[start:]).hexdigest()
    assert f"{birds.address}/Birds.tar.gz: {root}/{PART} is not the published archive" in line
    assert f"(md5 {found}, wanted {MD5}); move it away and start again" in line
    assert birds.download()[0] == 0


@pytest.mark.parametrize(("part", "status"), [(ARCHIVE, 0), (b"something else", 1)])
def test_a_part_that_is_whole_or_of_something_else(birds, root, part, status):
    birds.server.files["/Birds.tar.gz"] = part
    fill(root, {PART: part})
    assert birds.download()[0] == status
    assert birds.server.asked == [("/Birds.tar.gz", len(part))]
    assert status == 0 or tree(root) == {PART: part}


def test_mirror(birds, run):
    birds.server.files = {"/copies/ood/Birds.tar.gz": ARCHIVE}
    assert birds.download()[0] == 1
    with pytest.raises(SystemExit):
        birds.download("--mirror", "here/x")
    for address in ("http://a..b", "http://127.0.0.1/a b\x01"):
        assert "cannot be fetched: " in birds.download("--mirror", address)[1]
    assert run.pauses == []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert "Connection refused" in birds.download("--mirror", address)[1]
    assert birds.download("--mirror", f"{birds.address}/copies/ood/")[0] == 0


REDIRECTION = b"HTTP/1.1 302 x\r\nLocation: /Birds.tar.gz\r\n\r\n"


@pytest.mark.parametrize(
    "text", [b"HTTP/1.1 404 \x1b]0;x\x07\x1b[2J\r\n\r\n", b"\x1b[2J" * 9_999, REDIRECTION]
)
def test_what_a_server_says_stays_on_one_line(birds, run, text):
    birds.server.script = [lambda handler, _: handler.wfile.write(text)] * 99
    status, out, err = run("--download", "Birds")
    assert (status, out) == (1, "")
    assert all(line.isprintable() and len(line) < 1_000 for line in err.splitlines())
    assert len(err.splitlines()) in (1, 5)


def test_one_that_fails_does_not_stop_the_others(birds, root, run, monkeypatch):
    dead = ImageSet(("ood_data/Dead/images",), f"{birds.address}/Dead.tar.gz", 1, "0" * 32)
    both = replace(IMAGENET, ood={"Dead": dead, **BENCHMARKS["imagenet"].ood})
    monkeypatch.setitem(BENCHMARKS, "imagenet", both)
    status, out, _ = run("--download", "Dead", "Birds", "Birds")
    assert (status, out) == (1, f"Birds: complete (4): {root}/ood_data/Birds/images\n")


def test_archive_put_there_by_hand(birds, root):
    archive = root / "ood_data/Birds.tar.gz"
    archive.parent.mkdir(parents=True)
    os.mkfifo(archive)
    assert f"{archive} is not a file that is there" in birds.download()[1]
    archive.unlink()
    for content, status in ((ARCHIVE[:-1], 1), (ARCHIVE, 0)):
        archive.write_bytes(content)
        assert birds.download()[0] == status
        assert archive.read_bytes() == content
    assert birds.server.asked == []


def test_disk_full_while_fetching(birds, root):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        assert "File too large" in birds.download()[1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (root / PART).read_bytes() == ARCHIVE[:5_000]
    assert birds.download()[0] == 0


def test_one_run_at_a_time(birds, root, run, monkeypatch):
    root.mkdir(parents=True)
    other = os.open(root, os.O_RDONLY)
    data.fcntl.flock(other, data.fcntl.LOCK_EX)
    assert f"another run writes to {root}; wait for it" in birds.download()[1]
    os.close(other)

    def no_locks(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(data.fcntl, "flock", no_locks)
    status, _, err = run("--download", "Birds")
    assert status == 0
    assert f"{root}: Function not implemented: start no second download there\n" in err


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"images/own.jpg": b"1"}, "incomplete (1 of 4)"),
        ({f"images/{i}.jpg": b"1" for i in range(5)}, "unexpected (5 instead of 4)"),
        ({"images/notes.txt": b"1"}, "empty"),
        ({"images": b"a file"}, "empty"),
    ],
)
def test_what_lies_at_the_place_is_left_alone(birds, root, there, said):
    fill(root / "ood_data/Birds", there)
    line = f"{root}/ood_data/Birds/images is taken ({said}); move it away and start again"
    assert line in birds.download()[1]
    assert tree(root / "ood_data/Birds") == there
    assert birds.server.asked == []


def test_what_lies_beside_the_place_is_left_alone(birds, root):
    own = {"Birds/1.jpg": b"x", "Birds/labels/own.txt": b"x", "Birds.tar.gz.part": b"x"}
    fill(root / "ood_data", own)
    (root / "ood_data/Birds/images").mkdir()
    assert birds.download()[0] == 0
    pictures = {f"Birds/{name}": content for name, content in PICTURES.items()}
    assert tree(root / "ood_data") == own | pictures


@pytest.mark.parametrize("name", [PART, "ood_data/.lhact-unpacking-x"])
def test_planted_links_are_not_followed(birds, root, name):
    fill(root.parent, {"own/x": b"x", "datasets/ood_data/x": b"x"})
    (root / name).symlink_to(root.parent / ("own/x" if name == PART else "own"))
    assert birds.download()[0] == 1
    assert tree(root.parent / "own") == {"x": b"x"}


# --- Archives of every bad kind. Their MD5 is right, as if the published archive were bad. ---

LINK, HARD, LONG = tarfile.SYMTYPE, tarfile.LNKTYPE, "d" * 200
UP = {f"{'../' * up}outside/evil.jpg": b"evil" for up in range(1, 5)}
CHAIN = [("/".join([LONG] * i) + "/l", LINK, "/".join([LONG] * 20)) for i in range(1, 4)]
BAD = {
    "parent": pack(MEMBERS, last=UP),
    "parent within a name": pack(MEMBERS, last={f"Birds/images/../../{n}": b"x" for n in UP}),
    "written through": pack(MEMBERS, ("Birds/x", LINK, "../../../.."), last={"Birds/x/e": b"x"}),
    "link inside": pack(MEMBERS, ("Birds/images/in", LINK, "birds-0.jpg")),
    "chain of long links": pack(MEMBERS, *CHAIN, ("l/l", LINK, "..")),
    "absolute hard link": pack(MEMBERS, ("Birds/images/out", HARD, "/etc/passwd")),
    "device": pack(MEMBERS, ("Birds/images/null", tarfile.CHRTYPE, "")),
    "text": PAGE,
    "cut in the middle": ARCHIVE[: len(ARCHIVE) // 2],
    "no images folder": pack({"Birds/pictures/a.jpg": b"a"}),
    "two images folders": pack({**MEMBERS, "Other/images/a.jpg": b"a"}),
    "images is a file": pack({"Birds/images": b"a"}),
    "file over folder": pack({**MEMBERS, "Birds/images/birds-0.jpg/x.jpg": b"a"}),
}


@pytest.mark.parametrize("archive", BAD.values(), ids=BAD)
def test_bad_archives_leave_nothing_anywhere(root, birds, archive, monkeypatch):
    publish(monkeypatch, archive)
    fill(root.parent, {"outside/secret": b"secret", "datasets/ood_data/Birds.tar.gz": archive})
    assert birds.download()[0] == 1
    assert os.listdir(root / "ood_data") == ["Birds.tar.gz"]
    assert tree(root.parent) == {"outside/secret": b"secret"}
    assert set(os.listdir(root.parent)) == {"outside", "datasets"}


def test_a_set_that_comes_incomplete_is_no_success(root, run, monkeypatch):
    archive = pack(dict(list(MEMBERS.items())[1:]))
    publish(monkeypatch, archive)
    fill(root, {"ood_data/Birds.tar.gz": archive})
    line = f"Birds: incomplete (3 of 4): {root}/ood_data/Birds/images\n"
    assert run("--download", "Birds")[:2] == (1, line)


def test_failures_while_unpacking(birds, root, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.delattr(tarfile, "data_filter")
        assert "safe unpacking needs Python 3.10.12, 3.11.4, 3.12 or" in birds.download()[1]
        patch.setattr(tarfile, "data_filter", interrupt, raising=False)
        line = "lhact.data: interrupted; a download goes on where it stopped"
        assert birds.download() == (130, line)
    assert os.listdir(root / "ood_data") == ["Birds.tar.gz"]
    assert birds.download()[0] == 0


def killed_at(step, arguments):
    """Whether main, in a process of its own, touched the file system `step` times, and was killed
    at the last of them."""
    left = iter(range(step - 1, -1, -1))
    events = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.utime")

    def count(event, _):
        if event in events and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        sys.addaudithook(count)
        os._exit(data.main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_step_never_passes_for_whole(root, run, monkeypatch):
    publish(monkeypatch)
    seen, killed, step = set(), True, 1
    while killed:
        here = root / str(step)
        fill(here, {"ood_data/Birds.tar.gz": ARCHIVE})
        arguments = ["--data-root", str(here), "--download", "Birds"]
        killed = killed_at(step, arguments)
        state = data.look("Birds", BENCHMARKS["imagenet"].ood["Birds"], here)
        seen.add(state.text)
        assert not state.complete or tree(Path(state.place).parent).items() >= PICTURES.items()
        assert data.main(arguments) == 0
        assert tree(here) == WHOLE
        step += 2
    assert seen == {"missing", "empty", "complete (4)"}


# --- ImageNet's validation images. ---

VAL = {f"ILSVRC2012_val_0000000{i}.JPEG": os.urandom(500 + i) for i in range(1, 6)}
WNIDS = {1: "n01440764", 2: "n15075141", 3: "n02979186"}  # the devkit's own numbers
GROUND_TRUTH = [3, 1, 3, 2, 1]
IN_CLASSES = {f"{WNIDS[n]}/{v}": VAL[v] for n, v in zip(GROUND_TRUTH, VAL, strict=True)}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's home with val.tar and devkit.tar: five images of three classes, which
    torchvision and the benchmark take for ImageNet's."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    synsets = np.zeros(4, dtype=[(field, object) for field in fields])
    for row, (number, wnid) in enumerate(WNIDS.items()):
        synsets[row] = (number, wnid, f"word {number}, other", "gloss", 0)
    synsets[3] = (4, "n00000001", "inner node", "gloss", 3)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number}\n" for number in GROUND_TRUTH).encode()
    files = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
    devkit = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in files.items()}
    archives = {"val": pack(dict(reversed(VAL.items())), mode="w"), "devkit": pack(devkit)}
    for kind, content in archives.items():
        fill(tmp_path / "home", {f"{kind}.tar": content})
        entry = ("its name", hashlib.md5(content).hexdigest())
        monkeypatch.setitem(imagenet.ARCHIVE_META, kind, entry)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    five = replace(IMAGENET, id=replace(IMAGENET.id, images=5))
    monkeypatch.setitem(BENCHMARKS, "imagenet", five)
    return tmp_path / "home"


BOTH = ("--imagenet-val", "~/val.tar", "--devkit", "~/devkit.tar")


@pytest.mark.parametrize(
    ("options", "note", "wanted"), [(BOTH[:2], ", flat: no labels", VAL), (BOTH, "", IN_CLASSES)]
)
def test_val(root, home, run, options, note, wanted):
    target, before = root / "id_data/ILSVRC-2012/val", tree(home)
    for _ in range(2):  # the second time nothing is done
        assert run(*options)[:2] == (0, f"id: complete (5){note}: {target}\n")
        assert tree(target) == wanted
        assert os.listdir(target.parent) == ["val"]
        assert tree(home) == before


@pytest.mark.parametrize("kind", ["val", "devkit"])
def test_val_of_another_kind(root, home, run, kind):
    fill(home, {f"{kind}.tar": b"another"})
    status, out, err = run(*BOTH)
    assert (status, out) == (1, "")
    md5s = f"(md5 {hashlib.md5(b'another').hexdigest()}, wanted {imagenet.ARCHIVE_META[kind][1]})"
    assert f"{home}/{kind}.tar is not the published archive {md5s}" in err
    (home / f"{kind}.tar").unlink()
    assert f"{home}/{kind}.tar is not a file that is there" in run(*BOTH)[2]
    assert tree(root) == {}


def test_real_md5s():
    assert imagenet.ARCHIVE_META["val"][1] == "29b22e2961454d5413ddabcf34fc5622"
    assert {name: image_set.md5 for name, image_set in IMAGENET.ood.items()} == {
        "iNaturalist": "5be6ea8aa027d7b631916427b32cb335",
        "SUN": "8469c3ada62211477954ec1be53b12d0",
        "Places": "b5cb5eba2754ae2a28beea8718db699a",
        "Textures": "fff73e5086ae6bdbea199a49dfb8a4c1",
    }


# --- Command line. ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--download", "expected at least one argument"),
        ("--download birds", "imagenet has iNaturalist, SUN, Places, Textures; got 'birds'"),
        ("--benchmark digits --download Noise", "digits has no archives; got 'Noise'"),
        ("--benchmark nothing", "'nothing' is no benchmark"),
        ("--mirror http://127.0.0.1/", "--mirror goes with --download"),
        ("--devkit x.tar.gz", "--devkit goes with --imagenet-val"),
        ("--imagenet-val x --benchmark digits", "--imagenet-val goes with --benchmark imagenet"),
        ("--check", "unrecognized arguments: --check"),
    ],
)
def test_command_lines_that_are_not_right(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        data.main(arguments.split())
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_several_things_at_once(home, run):
    status, out, _ = run(*BOTH, "--check-images")
    assert (status, out.count(".JPEG cannot be read as an image")) == (1, len(VAL))
    assert out.startswith("id: complete (5): ")


def test_data_root_that_is_a_file(root, run):
    fill(root.parent, {root.name: b""})
    assert set(states(run()[1]).values()) == {"missing", "missing, optional"}
    assert run("--download", "SUN")[2] == f"lhact.data: [Errno 17] File exists: '{root}'\n"
