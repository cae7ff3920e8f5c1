"""A data root in, the state of each image set of a benchmark out; also fetches and checks images.

Nothing of the user's is overwritten or deleted: a set is unpacked beside its place, then renamed.
"""

import argparse
import fcntl
import os
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from lhact import command
from lhact.benchmarks.builtin import BENCHMARKS, Benchmark, ImageSet, Place, find
from lhact.benchmarks.userfile import open_benchmark
from lhact.extraction.image_sets import Images, unreadable
from lhact.extraction.images import BadImages, NoImages
from lhact.extraction.sources import TORCHVISION, SourceOptions, open_source
from lhact.messages import InputError, encodable, progress_bar, say, shown
from lhact.options import path
from lhact.records import Preprocessing

PROGRAM = "lhact.data"
# (image set, images found) -> the well-known list that it is. DTD has 47 classes.
KNOWN_LISTS = {
    ("Textures", 40 * 47): "one split of torchvision's DTD; published numbers are for all of it",
    # Wang et al., "ViM", CVPR 2022: without bubbly, cobwebbed, honeycombed and spiralled.
    ("Textures", 120 * 43): "the list of ViM and OpenOOD, without 4 classes that ImageNet has too",
}
# A download ends after REQUESTS in a row that bring less than PROGRESS bytes each. The pause before
# the next one is PAUSE seconds at first, and doubles.
REQUESTS, PROGRESS, PAUSE = 5, 1 << 20, 1.0
# A request ends when the next CHUNK bytes take longer than PATIENCE seconds.
CHUNK, PATIENCE = 1 << 16, 60.0
# Of checked images. More threads would wait for each other, since a tenth of the time is Python's.
THREADS, DECODED_ALONE = 16, Preprocessing(resize=0, crop=1)


class BadData(InputError):
    """An archive that cannot be fetched or is not the published one, or a place that is taken."""


class State(NamedTuple):
    """place: where a set lies or should lie. complete: it has as many images as published, and all
    that its list names."""

    place: str
    text: str
    complete: bool = False


def look(name: str, image_set: ImageSet, data_root: Path) -> State:
    """The state of an image set, as `get_activation.py` would find it."""
    place, wanted = find(data_root, image_set), image_set.images
    if place is None:
        return State(str(data_root / image_set.places[0]), "missing")
    try:
        images = _open(name, place, data_root)
    except NoImages:
        return State(place.source, "empty")
    except BadImages as error:
        if _is_torchvisions(place.source):
            fetch = "get_activation.py --download fetches it"
            return State(place.source, f"not there, or not whole; {fetch}")
        return State(place.source, f"unreadable: {error}")
    count, note = len(images), KNOWN_LISTS.get((name, len(images)))
    if wanted is None or count == wanted:
        is_labelled = images.labels is not None or images.class_names is not None
        flat = name in ("id", "calibration") and not is_labelled
        return State(place.source, f"complete ({count:,})" + ", flat: no labels" * flat, True)
    if count < wanted and not note:
        return State(place.source, f"incomplete ({count:,} of {wanted:,})")
    text = f"unexpected ({count:,} instead of {wanted:,}"
    return State(place.source, f"{text}: {note})" if note else f"{text})")


def _open(name: str, place: Place, data_root: Path) -> Images:
    """The images of a set as it is on disk; nothing is fetched. Raises BadImages."""
    with progress_bar(f"counting {name}", "file") as bar:
        return open_source(place.source, SourceOptions(data_root, place.list_root), bar.update)


def _is_torchvisions(source: str) -> bool:
    """Whether it is a set that torchvision knows, split and all."""
    kind, name, split = [*source.split(":", 2), "", ""][:3]
    return kind == "torchvision" and name in TORCHVISION and split in TORCHVISION[name].splits


def show(benchmark: Benchmark, data_root: Path) -> bool:
    """Prints the state of each image set, and where to get those that are not complete."""
    sets = benchmark.sets
    states = {name: look(name, image_set, data_root) for name, image_set in sets.items()}
    rows = [("image set", "source", "state")]
    rows += [(name, shown(state.place), state.text) for name, state in states.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, place, text in rows:
        optional = name == "calibration" and not states[name].complete
        tell(f"{name:{widths[0]}}  {place:{widths[1]}}  {text}" + ", optional" * optional)
    wanting = [name for name in sets if not states[name].complete and name != "calibration"]
    for name in wanting:
        if sets[name].source:
            say(f"{name} comes from: {sets[name].source}")
    command = f"python -m lhact.data --data-root {shown(shlex.quote(str(data_root)))}"
    if archives := [name for name in wanting if sets[name].md5]:
        names = f"--benchmark {benchmark.name} --download {' '.join(archives)}"
        say(f"fetch and unpack archives: {command} {names}")
    if benchmark.name == "imagenet" and "id" in wanting:
        files = "ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz"
        say(f"unpack your copy of ImageNet: {command} --imagenet-val {files}")
    return not wanting


def check_images(sets: Mapping[str, ImageSet], data_root: Path) -> bool:
    """Decodes all images of the sets that are there, in threads; prints those that cannot be read.
    Returns whether there are images and all of them can be read."""
    total = failed = 0
    for name, image_set in sets.items():
        place = find(data_root, image_set)
        if place is None:
            say(f"{name} is not there, so it is not checked")
            continue
        try:
            images = _open(name, place, data_root)
            count = len(images)
            with progress_bar(name, "image", count) as bar:
                for line in unreadable(images, DECODED_ALONE, THREADS, bar.update):
                    failed += 1
                    tell(f"{name}: {line}")
        except BadImages as error:
            count, failed = 1, failed + 1
            tell(f"{name}: {error}")
        total += count
    tell(f"{total - failed:,} images can be read, {failed:,} cannot")
    return total > 0 and failed == 0


def obtain(name: str, image_set: ImageSet, root: Path, unpack: Callable[[Path], None]) -> bool:
    """Lets `unpack` make the folder of an image set, unless it is complete already; prints and
    returns whether it is complete. Raises BadData if something else is there."""
    root.mkdir(parents=True, exist_ok=True)
    lock = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadData(f"another run writes to {root}; wait for it") from error
        except OSError as error:  # some file systems have no locks
            say(f"{shown(root)}: {error.strerror}: start no second download there")
        state = look(name, image_set, root)
        if not state.complete:
            target = root / image_set.places[0]
            if target.exists() and (not target.is_dir() or os.listdir(target)):
                raise BadData(f"{target} is taken ({state.text}); move it away and start again")
            unpack(target)
            state = look(name, image_set, root)
    finally:
        os.close(lock)
    tell(f"{name}: {state.text}: {state.place}")
    return state.complete


def download(image_set: ImageSet, mirror: str | None, target: Path) -> None:
    """Fetches the archive of an image set, from `mirror` or its source, and unpacks it."""
    # The archive and unfinished work lie in `ood_data`, outside of all folders of the set.
    store = target.parents[max(image_set.places[0].count("/"), 1) - 1]
    store.mkdir(parents=True, exist_ok=True)
    (source, _, file_name), md5 = image_set.source.rpartition("/"), str(image_set.md5)
    archive = store / file_name
    if os.path.lexists(archive):
        verify(archive, md5)
    else:
        fetch(f"{(mirror or source).rstrip('/')}/{file_name}", archive, md5)
    extract(archive, store, target)


def unpack_imagenet_val(tar: Path, devkit: Path | None, target: Path) -> None:
    """Unpacks ILSVRC2012_img_val.tar: into class folders by the ground truth in
    ILSVRC2012_devkit_t12.tar.gz, or into one flat folder without."""
    from torchvision.datasets import imagenet  # takes seconds to import: not for a mere list

    wnids = []
    if devkit:
        verify(devkit, imagenet.ARCHIVE_META["devkit"][1])
        with tempfile.TemporaryDirectory() as folder:  # where torchvision leaves what it reads
            imagenet.parse_devkit_archive(folder, os.path.abspath(devkit))
            wnids = imagenet.load_meta_file(folder)[1]
    verify(tar, imagenet.ARCHIVE_META["val"][1])
    target.parent.mkdir(parents=True, exist_ok=True)
    extract(tar, target.parent, target, f"ILSVRC2012/{target.name}", wnids)


def fetch(url: str, archive: Path, md5: str) -> None:
    """Downloads `url`, and goes on from what an earlier call has left. (torchvision's download_url
    knows no resuming, no limit of time and no second request.)"""
    part, failures = archive.with_name(f"{archive.name}.lhact-part"), 0
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(part, flags, 0o666), "a+b") as file:
        while True:
            before = file.seek(0, os.SEEK_END)
            try:
                _request(url, file)
                break
            except (OSError, HTTPException, ValueError) as error:
                size = file.seek(0, os.SEEK_END)
                failures = failures + 1 if size - before < PROGRESS else 1
                reason = str(error)[:300] or type(error).__name__  # a server may send any text
                if failures == REQUESTS or isinstance(error, (ValueError, InvalidURL)):
                    raise BadData(
                        f"{url} cannot be fetched: {reason}; {size:,} bytes are kept, and the same "
                        "command goes on from there; or give another address with --mirror URL, or "
                        f"put the archive (md5 {md5}) at {archive} yourself"
                    ) from error
            pause = PAUSE * 2 ** (failures - 1)
            say(shown(f"{url}: {reason}; the next request is in {pause:g} s"))
            time.sleep(pause)
    try:
        verify(part, md5)
    except BadData as error:
        os.truncate(part, before)  # the last answer is wrong; what came before it may be right
        raise BadData(f"{url}: {error}") from error
    os.rename(part, archive)


def _request(url: str, file: BinaryIO) -> None:
    """Sends one request for what `file` lacks of `url`, and appends the answer. Raises ValueError
    where another request would not help, and OSError or HTTPException where it may."""
    start = file.tell()
    headers = {"User-Agent": "lhact", **({"Range": f"bytes={start}-"} if start else {})}
    # The timeout of a socket starts anew with every byte; that of a signal does not.
    signal.signal(signal.SIGALRM, _stop_waiting)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with urlopen(Request(url, headers=headers)) as response:  # noqa: S310 (main checks it)
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if response.status != 200 and not resumed:
                raise ValueError(f"the server sent status {response.status} and another range")
            if response.headers.get_content_type() == "text/html":
                raise ValueError("the server sent a web page, perhaps to log in, and no archive")
            position = file.seek(0 if response.status == 200 else start)
            total = None if response.length is None else position + response.length
            with progress_bar(os.path.basename(url), "B", total, position) as bar:
                while chunk := response.read(CHUNK):
                    known = file.read(len(chunk))  # a server that ignores ranges sends it again
                    if not chunk.startswith(known):
                        raise ValueError("the server sent something else than what is there so far")
                    file.write(chunk[len(known) :])
                    bar.update(len(chunk))
                    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        if file.tell() < max(total or 0, start):
            raise ConnectionError(f"the connection ended after {file.tell():,} bytes")
    except HTTPError as error:
        error.close()
        if not start or error.code != 416:  # 416: nothing comes after `start`
            kind = ValueError if error.code < 500 else ConnectionError
            raise kind(f"the server answered with status {error.code}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _stop_waiting(*_: object) -> None:
    raise TimeoutError(f"less than {CHUNK:,} bytes came in {PATIENCE:g} s")


def verify(path: Path, md5: str) -> None:
    """Raises BadData if the file is not the one with that MD5."""
    from torchvision.datasets.utils import calculate_md5  # takes seconds to import

    if not path.is_file():  # a named pipe would be waited for
        raise BadData(f"{path} is not a file that is there; give the archive itself")
    say(f"checking {shown(path)}")
    if (found := calculate_md5(path)) != md5:
        mend = "move it away and start again"
        raise BadData(f"{path} is not the published archive (md5 {found}, wanted {md5}); {mend}")


def extract(
    archive: Path, store: Path, target: Path, top: str = "", wnids: Sequence[str] = ()
) -> None:
    """Unpacks an archive in the folder `store`, into its subfolder `top`; sorts the images into
    folders by `wnids`, one for each image; moves their folder to `target` in one step, and before
    it what lies beside it in the archive."""
    if not hasattr(tarfile, "data_filter"):
        raise BadData("safe unpacking needs Python 3.10.12, 3.11.4, 3.12 or newer; install one")

    def files_and_folders(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
        """tarfile's `data` filter (PEP 706), and no symbolic links: images need none, and the known
        ways round that filter (CVE-2025-4138, -4330, -4517) start with one."""
        bar.update()
        if member.issym():
            raise tarfile.FilterError(f"{member.name!r} is a symbolic link")
        return tarfile.data_filter(member, folder)

    for left in store.glob(".lhact-unpacking-*"):  # by a run that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=store, prefix=".lhact-unpacking-") as workspace:
        what = f"unpacking {shown(target)}"
        with tarfile.open(archive) as tar, progress_bar(what, "file") as bar:
            tar.extractall(Path(workspace, top), filter=files_and_folders)  # noqa: S202
        folders = [path for path in Path(workspace).glob(f"*/{target.name}") if path.is_dir()]
        if len(folders) != 1:
            raise BadData(f"{archive} must hold one folder */{target.name}, got {len(folders)}")
        if wnids:
            for wnid, name in zip(wnids, sorted(os.listdir(folders[0])), strict=True):
                (folders[0] / wnid).mkdir(exist_ok=True)
                os.rename(folders[0] / name, folders[0] / wnid / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in folders[0].parent.iterdir():
            if path != folders[0] and not os.path.lexists(target.parent / path.name):
                os.rename(path, target.parent / path.name)
        os.sync()  # otherwise a power loss could keep the new name and lose the bytes
        os.rename(folders[0], target)


@dataclass(frozen=True)
class Job:
    """What lhact.data is asked for; a mere list of states where nothing is fetched, unpacked or
    checked. download: names of image sets; mirror: where their archives lie instead; imagenet_val,
    devkit: the user's own copies."""

    benchmark: Benchmark
    data_root: Path
    check_images: bool
    download: tuple[str, ...]
    mirror: str | None
    imagenet_val: Path | None
    devkit: Path | None


def parse_job(argv: Sequence[str] | None) -> Job:
    description = "Shows the state of each image set of a benchmark; fetches and checks images."
    parser = argparse.ArgumentParser(f"python -m {PROGRAM}", None, description, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--benchmark",
        type=open_benchmark,
        default="imagenet",
        metavar="NAME|FILE.toml",
        help=f"{', '.join(BENCHMARKS)}, or your own file; default: imagenet",
    )
    add("--data-root", type=path, default="datasets", help="where they lie; default: datasets")
    add("--check-images", action="store_true", help="read every image and name the broken ones")
    add("--download", nargs="+", default=[], metavar="NAME", help="fetch and unpack image sets")
    add("--mirror", metavar="URL", help="fetch from there, by the same file names")
    add("--imagenet-val", type=path, metavar="TAR", help="unpack your ILSVRC2012_img_val.tar")
    devkit = "sort them into class folders by your ILSVRC2012_devkit_t12.tar.gz"
    add("--devkit", type=path, metavar="FILE", help=devkit)
    args = parser.parse_args(argv)
    archives = [name for name, image_set in args.benchmark.sets.items() if image_set.md5]
    if wrong := [name for name in args.download if name not in archives]:
        known = ", ".join(archives) or "no archives"
        parser.error(f"--download: {args.benchmark.name} has {known}; got {wrong[0]!r}")
    if args.mirror and not args.download:
        parser.error("--mirror goes with --download")
    if args.mirror and not args.mirror.startswith(("http://", "https://")):
        parser.error(f"--mirror must begin with http:// or https://, got {args.mirror!r}")
    if args.devkit and not args.imagenet_val:
        parser.error("--devkit goes with --imagenet-val")
    if args.imagenet_val and args.benchmark.name != "imagenet":
        parser.error("--imagenet-val goes with --benchmark imagenet")
    return Job(**{**vars(args), "download": tuple(args.download)})


def run(job: Job) -> int:
    """0 if all that was asked for is there and right, 1 if something is not."""
    sets, root, status = job.benchmark.sets, job.data_root, 0
    unpacks = {name: partial(download, sets[name], job.mirror) for name in job.download}
    if job.imagenet_val:
        unpacks["id"] = partial(unpack_imagenet_val, job.imagenet_val, job.devkit)
    steps = [partial(obtain, name, sets[name], root, unpack) for name, unpack in unpacks.items()]
    if job.check_images:
        steps.append(partial(check_images, sets, root))
    for step in steps or [partial(show, job.benchmark, root)]:
        try:
            status = status if step() else 1
        except (InputError, OSError, ValueError, tarfile.TarError, EOFError, zlib.error) as error:
            # The other steps are taken all the same.
            status = command.fail(PROGRAM, shown(error), 1)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    interrupted = "interrupted; a download goes on where it stopped"
    return command.run(PROGRAM, lambda: parse_job(argv), run, interrupted)


def tell(text: str) -> None:
    """Prints a line of the result, above the progress bars."""
    tqdm.write(encodable(shown(text), sys.stdout.encoding), sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
