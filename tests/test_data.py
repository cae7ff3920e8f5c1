"""`python -m lhact.data`: states of image sets, images that cannot be read, downloads from
127.0.0.1, archives of every bad kind, ImageNet's validation images."""

import hashlib
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision.datasets import imagenet

from lhact import data
from lhact.benchmarks.builtin import BENCHMARKS, ImageSet

PROJECT = Path(data.__file__).parents[1]
IMAGENET = BENCHMARKS["imagenet"]
PART = "ood_data/Birds.tar.gz.lhact-part"
PAGE = b"<html>please log in</html>"


def pack(entries, mode="w:gz"):
    """A tar of the entries: name -> content, or (kind, target) of what is no file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, entry in entries.items():
            info, content = tarfile.TarInfo(name), entry if isinstance(entry, bytes) else b""
            info.size = len(content)
            if not isinstance(entry, bytes):
                info.type, info.linkname = entry
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
    """Answers the first requests by the functions in `server.script`, which get the handler and the
    first byte that is asked for; the others by what `server.files` hold."""

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.asked.append((self.path, start))
        content = self.server.files.get(self.path, b"")
        step = self.server.script.pop(0) if self.server.script else send(content)
        step(self, start)

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


def answer(*arguments, **headers):
    return lambda handler, start: handler.answer(*arguments, **headers)


def send(content, cut=None):
    """The bytes from `start` on, as a server with ranges sends them."""

    def answer_from(handler, start):
        status = (206 if start else 200) if start < len(content) else 416 if content else 404
        handler.answer(status, content[start:], cut, range=f"bytes {start}-")

    return answer_from


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
        lines = err.splitlines()
        assert all(line.isprintable() and len(line) < 1_000 for line in lines)
        assert lines[-1].startswith("lhact.data: ")
        return status, lines[-1]

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.handle_error = True, lambda *_: None
        server.files, server.script, server.asked = {"/Birds.tar.gz": ARCHIVE}, [], []
        address = f"http://127.0.0.1:{server.server_port}"
        publish(monkeypatch, address=address)
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        yield SimpleNamespace(server=server, address=address, download=download)
        server.shutdown()


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


def test_all_that_is_needed_is_there(root, run, small):
    folders = ("id_data/ILSVRC-2012/val/n01", "ood_data/iNaturalist/images", "ood_data/SUN/images")
    for folder in (*folders, "ood_data/Places", "ood_data/dtd/images/banded"):
        fill(root / folder, {"1.jpg": b"", "2.jpg": b""})
    rest = dict.fromkeys(("id", *IMAGENET.ood), "complete (2)")
    status, out, err = run()
    assert (status, states(out), err) == (0, {**rest, "calibration": "missing, optional"}, "")
    train = root / "id_data/ILSVRC-2012/train"
    for text in ("incomplete (1 of 2), optional", "complete (2), flat: no labels"):
        fill(train, {f"{text[:5]}.jpg": b""})
        status, out, _ = run()
        assert (status, states(out)["calibration"]) == (0, text)


def test_as_a_command_on_any_terminal(tmp_path):
    """Bytes that are no UTF-8, letters that are no ASCII, control characters; `~` is the home."""
    folder = os.fsencode(tmp_path) + b"/\xff\x1b[2J\n\xc3\xa9"
    fill(Path(os.fsdecode(folder), "ood_data/SUN/images"), {"\x1b]0;x\x07.jpg": b"no image"})
    environment = {**os.environ, "HOME": os.fsdecode(folder), "PYTHONIOENCODING": "ascii"}
    for options in ([], ["--check-images"]):
        command = [sys.executable, "-m", "lhact.data", "--data-root=~", *options]
        done = subprocess.run(command, capture_output=True, cwd=PROJECT, env=environment)
        assert done.returncode == 1
        assert rb"\udcff\x1b[2J\n\xe9/ood_data/SUN/images" in done.stdout
        assert done.stdout.replace(b"\n", b"").decode().isprintable()
        assert not any(text in done.stderr for text in (b"Traceback", b"\x1b[2J", b"\x1b]0"))


def test_importing_is_fast():
    code = "import sys, lhact.data; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=60)


def test_every_image_that_cannot_be_read_is_named(root, run):
    assert run("--check-images")[:2] == (1, "0 images can be read, 0 cannot\n")
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "JPEG")
    good, sun, places = buffer.getvalue(), "ood_data/SUN/images", "ood_data/Places/images"
    fill(root / sun, {f"{i:02}.jpg": good for i in range(40)})
    status, out, err = run("--check-images")
    assert (status, out) == (0, "40 images can be read, 0 cannot\n")
    assert "iNaturalist is not there, so it is not checked" in err
    fill(root / sun, {"03.jpg": good[:-200], "39.jpg": b"", "new.png": PAGE})
    fill(root / places, {"b.jpg": good, "a.jpg": b"text"})
    fill(root, {"ood_data/dtd/images/x.txt": b"no images"})
    status, out, _ = run("--check-images")
    *lines, total = out.splitlines()
    assert (status, total) == (1, "39 images can be read, 5 cannot")
    names = [f"SUN: {root}/{sun}/{name} " for name in ("03.jpg", "39.jpg", "new.png")]
    names += [f"Places: {root}/{places}/a.jpg ", f"Textures: {root}/ood_data/dtd/images holds no"]
    assert [line[: len(name)] for line, name in zip(lines, names, strict=True)] == names


def test_download_places_the_set_once(birds, root):
    assert birds.download()[0] == 0
    assert tree(root) == WHOLE
    assert set(os.listdir(root / "ood_data")) == {"Birds", "Birds.tar.gz"}
    (root / "ood_data/Birds.tar.gz").unlink()
    assert birds.download()[0] == 0
    assert birds.server.asked == [("/Birds.tar.gz", 0)]


def raw(text):
    return lambda handler, start: handler.wfile.write(text)


def drip(head):
    def send_a_byte_at_a_time(handler, start):
        handler.wfile.write(head)
        while True:  # until the client goes away
            handler.wfile.write(b"H")
            threading.Event().wait(0.01)

    return send_a_byte_at_a_time


LATE = "less than 65,536 bytes came in 0.1 s; 0 bytes are kept"
NO_ANSWER, EARLY = [drip(b"")] * 99, [drip(b"HTTP/1.0 200 OK\r\n\r\n")] * 99
CUT = [send(ARCHIVE, n) for n in (1_000, 1, 1, 1, 100, 1, 1, 1)]
FIVE = "; 1,005 bytes are kept, and the same command goes on from there; or give another address"
# Bytes that are there, the first answers, the first byte of each request, the failure.
TRANSFERS = {
    "no ranges": (5_000, [answer(200, ARCHIVE)], [5_000], ""),
    "no length": (5_000, [answer(200, ARCHIVE, length="")], [5_000], ""),
    "all is there": (len(ARCHIVE), [], [len(ARCHIVE)], ""),
    "cut": (0, CUT, [0, 1_000, 1_001, 1_002, 1_003, 1_103, 1_104, 1_105, 1_106], ""),
    "too little": (1_000, [send(ARCHIVE, 1)] * 99, [*range(1_000, 1_005)], FIVE),
    "busy": (1_000, [answer(503)] * 99, [1_000] * 5, "status 503; 1,000 bytes are kept"),
    "slow header": (0, NO_ANSWER, [0] * 5, LATE),
    "slow body": (0, EARLY, [0] * 5, LATE),
    "web page": (5_000, [answer(200, ARCHIVE, type="text/html")], [5_000], "sent a web page"),
    "other": (5_000, [answer(200, PAGE)], [5_000], "something else than what is there so far"),
    "range": (5_000, [answer(206, ARCHIVE, range="bytes 7-")], [5_000], "another range; 5,000"),
    "status": (5_000, [answer(201, ARCHIVE)], [5_000], "sent status 201"),
    "control characters": (0, [raw(b"HTTP/1.1 404 \x1b]0;x\x07\r\n\r\n")], [0], "status 404"),
    "no HTTP": (
        0,
        [raw(b"\x1b[2J" * 9_999)] * 99,
        [0] * 5,
        r"fetched: \x1b[2J",
    ),
    "not found": (5_000, [answer(404, PAGE)], [5_000], "answered with status 404; 5,000 bytes"),
}
for start in (0, 5_000):
    wrong = {"page": PAGE * 300, "short": ARCHIVE[:-4], "changed": ARCHIVE[:-1] + b"x"}
    for kind, sent in wrong.items():
        md5 = hashlib.md5(ARCHIVE[:start] + sent[start:]).hexdigest()
        said = f" is not the published archive (md5 {md5}, wanted {MD5}); move it away and start"
        TRANSFERS[f"{kind} from {start}"] = (start, [send(sent)], [start], PART + said)


@pytest.mark.parametrize(("there", "answers", "asked", "said"), TRANSFERS.values(), ids=TRANSFERS)
def test_transfers(birds, root, run, monkeypatch, there, answers, asked, said):
    """What was there before a failure is there afterwards, and the next run goes on from it."""
    monkeypatch.setattr(data, "PROGRESS", 100)
    monkeypatch.setattr(data, "PATIENCE", 0.1 if said == LATE else 60)
    fill(root, {PART: ARCHIVE[:there]})
    birds.server.script = list(answers)
    begin = time.monotonic()
    status, line = birds.download()
    assert time.monotonic() - begin < 5
    assert status == (1 if said else 0)
    assert [start for _, start in birds.server.asked] == asked
    assert run.pauses == [1, 2, 4, 8] * (len(asked) // 4)
    if said:
        assert said in line
        assert f"{birds.address}/Birds.tar.gz" in line
        by_hand = f"(md5 {MD5}) at {root}/ood_data/Birds.tar.gz yourself"
        assert (by_hand in line) == ("cannot be fetched" in line)
        assert tree(root) == {PART: ARCHIVE[: 1_005 if said == FIVE else there]}
        birds.server.script = []
        assert birds.download()[0] == 0


def test_mirror(birds, run):
    birds.server.files = {"/copies/ood/Birds.tar.gz": ARCHIVE}
    assert birds.download()[0] == 1
    for address in ("http://a..b", "http://127.0.0.1/a b\x01"):
        assert "cannot be fetched: " in birds.download("--mirror", address)[1]
    assert run.pauses == []
    assert "Connection refused" in birds.download("--mirror", "http://127.0.0.1:9")[1]
    assert birds.download("--mirror", f"{birds.address}/copies/ood/")[0] == 0


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
    no_locks = OSError(38, "Function not implemented")
    monkeypatch.setattr(data.fcntl, "flock", Mock(side_effect=no_locks))
    status, _, err = run("--download", "Birds")
    assert status == 0
    assert f"{root}: Function not implemented: start no second download there\n" in err


@pytest.mark.parametrize(
    ("there", "state"),
    [
        ({"images/own.jpg": b"1"}, "incomplete (1 of 4)"),
        ({f"images/{i}.jpg": b"1" for i in range(5)}, "unexpected (5 instead of 4)"),
        ({"images/notes.txt": b"1"}, "empty"),
        ({"images": b"a file"}, "empty"),
    ],
)
def test_what_lies_at_the_place_is_left_alone(birds, root, there, state):
    fill(root / "ood_data/Birds", there)
    line = f"{root}/ood_data/Birds/images is taken ({state}); move it away and start again"
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

LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
UP = {f"{'../' * up}outside/evil.jpg": b"evil" for up in range(1, 5)}
EVIL = {
    "parent": UP,
    "written through": {"Birds/x": (LINK, "../../../.."), "Birds/x/e": b"x"},
    "link inside": {"Birds/images/in": (LINK, "birds-0.jpg")},
    "absolute hard link": {"Birds/images/out": (HARD, "/etc/passwd")},
    "device": {"Birds/images/null": (tarfile.CHRTYPE, "")},
    "two images folders": {"Other/images/a.jpg": b"a"},
    "file over folder": {"Birds/images/birds-0.jpg/x.jpg": b"a"},
}
BAD = {kind: pack(MEMBERS | entries) for kind, entries in EVIL.items()} | {
    "text": PAGE,
    "cut in the middle": ARCHIVE[: len(ARCHIVE) // 2],
    "no images folder": pack({"Birds/pictures/a.jpg": b"a"}),
    "images is a file": pack({"Birds/images": b"a"}),
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
    with monkeypatch.context() as patch:
        patch.delattr(tarfile, "data_filter")
        assert "safe unpacking needs Python 3.10.12, 3.11.4, 3.12 or" in birds.download()[1]
        patch.setattr(tarfile, "data_filter", Mock(side_effect=KeyboardInterrupt), raising=False)
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
    rows = [(number, wnid, f"word {number}, other", "gloss", 0) for number, wnid in WNIDS.items()]
    rows.append((4, "n00000001", "inner node", "gloss", 3))
    synsets = np.array(rows, dtype=[(field, object) for field in fields])
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
    assert tree(root) == {}


def test_real_md5s():
    assert imagenet.ARCHIVE_META["val"][1] == "29b22e2961454d5413ddabcf34fc5622"
    assert {name: image_set.md5 for name, image_set in IMAGENET.ood.items()} == {
        "iNaturalist": "5be6ea8aa027d7b631916427b32cb335",
        "SUN": "8469c3ada62211477954ec1be53b12d0",
        "Places": "b5cb5eba2754ae2a28beea8718db699a",
        "Textures": "fff73e5086ae6bdbea199a49dfb8a4c1",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--download", "expected at least one argument"),
        ("--download birds", "imagenet has iNaturalist, SUN, Places, Textures; got 'birds'"),
        ("--benchmark digits --download Noise", "digits has no archives; got 'Noise'"),
        ("--mirror http://127.0.0.1/", "--mirror goes with --download"),
        ("--download SUN --mirror here/x", "must begin with http:// or https://, got 'here/x'"),
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
