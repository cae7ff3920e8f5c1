"""A data root in, the state of each image set of the ImageNet benchmark out; on request also the archives, checked and unpacked.

    python -m lhact.data                                                   where each set lies or should lie, and its state
    python -m lhact.data --download iNaturalist SUN Places Textures        fetch, check and unpack the OOD sets
    python -m lhact.data --imagenet-val ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz

What is at a place already is never overwritten or deleted. A set is unpacked beside its place and renamed when it is whole.
"""

import argparse
import fcntl
import os
import platform
import shlex
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from lhact.benchmarks.builtin import BENCHMARKS, ImageSet, find
from lhact.extraction.images import BadImages, NoImages, class_folders, list_images
from lhact.imagenet import wnids as imagenet_wnids

BENCHMARK = "imagenet"
OPTIONAL = ("calibration",)
SECONDS_WITHOUT_DATA = 30

# (image set, images found) -> which well-known list that is.
KNOWN_LISTS = {
    # Each of torchvision.datasets.DTD's train, val and test has 40 images of each of the 47 classes.
    ("Textures", 1_880): "one split of torchvision's DTD; the published numbers are for all of it",
    # Wang et al., "ViM", CVPR 2022: without bubbly, cobwebbed, honeycombed and spiralled, 120 images each.
    ("Textures", 5_160): "the list of ViM and OpenOOD, without the four classes that overlap with ImageNet's",
}


class BadData(Exception):
    """An archive that cannot be had, is not the published one or cannot be unpacked, or a place that is taken; one line."""


class State(NamedTuple):
    """An image set on disk. folder: where it lies or should lie. text: what is there, for the reader. complete: it is the
    published list, going by the number of images. problem: why the folder cannot be read, where that is so."""

    folder: Path
    text: str
    complete: bool
    problem: str | None = None


def look(name: str, image_set: ImageSet, data_root: Path) -> State:
    """What `get_activation.py` would find of that image set: missing, empty, incomplete, unexpected, complete or unreadable."""
    folder = find(data_root, image_set)
    if folder is None:
        return State(data_root / image_set.folders[0], "missing", False)
    try:
        with tqdm(unit="file", delay=1, leave=False, desc=f"counting {name}") as bar:
            count = _count(folder, bar.update)
    except BadImages as error:
        return State(folder, "unreadable", False, str(error))
    return State(folder, describe(name, count, image_set.images), count == image_set.images)


def _count(folder: Path, progress: Callable[[int], None] = lambda count: None) -> int:
    """The images below a folder, as `get_activation.py` would find them. Raises BadImages where it would, but for none at all."""
    try:
        return len(list_images(folder, progress).paths)
    except NoImages:
        return 0


def describe(name: str, count: int, wanted: int) -> str:
    """The state of a folder with `count` images where the published protocol has `wanted`."""
    if count == 0:
        return "empty"
    if count == wanted:
        return f"complete ({count:,})"
    if (name, count) in KNOWN_LISTS:
        return f"unexpected ({count:,} instead of {wanted:,}: {KNOWN_LISTS[name, count]})"
    if count > wanted:
        return f"unexpected ({count:,} instead of {wanted:,})"
    return f"incomplete ({count:,} of {wanted:,})"


def download(name: str, image_set: ImageSet, data_root: Path, mirror: str | None = None) -> str:
    """Fetches the archive of an OOD set, from `mirror` or its source, and unpacks it to its documented place; says what was done.

    Raises BadData, BadImages or OSError; what was fetched so far is then kept for the next call, what was unpacked is not.
    """
    found = look(name, image_set, data_root)
    if found.complete:
        return f"{name}: {found.text} already: {found.folder}"
    target = _free_place(name, image_set, data_root, found)
    store = _outermost(image_set, data_root).parent
    store.mkdir(parents=True, exist_ok=True)
    archive = _archive(image_set, store, mirror)
    with _workspace(store, name) as workspace:
        _unpack(archive, workspace)
        folders = [folder for folder in workspace.glob(f"*/{target.name}") if folder.is_dir()]
        if len(folders) != 1:
            raise BadData(f"{archive} must hold one folder */{target.name}, got {len(folders)}; unpack it by hand to {target}")
        _check_count(folders[0], archive, image_set.images)
        _place(folders[0], target)
    return f"{name}: complete ({image_set.images:,}): {target} (the archive can go: {archive})"


def unpack_imagenet_val(archive: Path, devkit: Path | None, image_set: ImageSet, data_root: Path) -> str:
    """Unpacks the user's ILSVRC2012_img_val.tar to its documented place: into class folders by the ground truth of `devkit`
    (its archive, or the meta.bin that torchvision makes of it), into one flat folder without; says what was done.

    Raises BadData, BadImages or OSError; nothing of it is then kept.
    """
    found = look("id", image_set, data_root)
    if found.complete:
        if devkit and class_folders(list_images(found.folder).paths) is None:
            raise BadData(f"{found.folder} is complete but flat; to have class folders, move it away and start again")
        return f"id: {found.text} already: {found.folder}"
    target = _free_place("id", image_set, data_root, found)
    wnids = _ground_truth(devkit, image_set.images) if devkit else None
    _check_imagenet("val", archive)
    with _workspace(_outermost(image_set, data_root).parent, "id") as workspace:
        folder = workspace / target.name
        _unpack(archive, folder)
        _check_count(folder, archive, image_set.images)
        if wnids:
            _sort_into_classes(folder, wnids)
        _place(folder, target)
    return f"id: complete ({image_set.images:,}){'' if wnids else ', flat: no labels'}: {target}"


def _outermost(image_set: ImageSet, data_root: Path) -> Path:
    """The documented place, or the folder above it that is another spelling of the set and so searched for images as well.

    Archives and unfinished work lie outside of it: they must never count as the set's images.
    """
    documented = image_set.folders[0]
    return data_root / min((f for f in image_set.folders if f"{documented}/".startswith(f"{f}/")), key=len)


def _free_place(name: str, image_set: ImageSet, data_root: Path, found: State) -> Path:
    """The documented place of the set. Raises BadData if something is there: it is the user's."""
    target = data_root / image_set.folders[0]
    try:
        occupied = any(os.scandir(target))
    except FileNotFoundError:
        occupied = False
    if occupied:
        text = "it holds other files" if found.text == "empty" else found.problem or found.text
        raise BadData(f"{name}: {target} is taken: {text}; move it away and start again (nothing was changed)")
    return target


# --- Fetching. torchvision's download_url cannot go on from a part, has no time limit and turns https into http when it fails. ---


def _archive(image_set: ImageSet, store: Path, mirror: str | None) -> Path:
    """The set's archive in the folder `store`, with the right MD5: the one that lies there, or fetched."""
    url = image_set.source
    archive = store / url.rpartition("/")[2]
    part = archive.with_name(archive.name + ".lhact-part")
    if mirror:
        url = f"{mirror.rstrip('/')}/{archive.name}"
    if archive.exists():
        md5 = _md5(archive)
        if md5 != image_set.md5:
            raise BadData(
                f"{archive} is not the published archive (md5 {md5}, wanted {image_set.md5}); move it away and start again"
            )
        return archive
    by_hand = f"give another address with --mirror URL, or put {archive.name} (md5 {image_set.md5}) at {archive} yourself"
    try:
        with _writing(part), open(part, "ab") as file:
            try:
                _fetch(url, file)
            except (OSError, HTTPException, UnicodeError) as error:
                reason = str(error.reason if type(error) is URLError else error) or type(error).__name__
                kept = f" ({file.tell():,} bytes are kept: the same command goes on from there)" if file.tell() else ""
                raise BadData(f"{url} cannot be fetched: {reason}{kept}; {by_hand}") from error
    except BadData:
        if part.is_file() and not part.stat().st_size:
            part.unlink()
        raise
    md5, size = _md5(part), part.stat().st_size
    if md5 != image_set.md5:
        part.unlink()
        raise BadData(f"{url} is not the published archive (md5 {md5}, {size:,} bytes), so it was removed again; {by_hand}")
    os.replace(part, archive)
    return archive


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """Turns what goes wrong with the file into BadData, so that it is not taken for the network's and tried again."""
    try:
        yield
    except OSError as error:
        raise BadData(f"{path} cannot be written: {error.strerror}; mend that and give the same command again") from error


def _fetch(url: str, file: BinaryIO) -> None:
    """All of `url` into `file`, which may hold its beginning: tries again for as long as that brings further bytes."""
    while True:
        size = file.tell()
        try:
            _transfer(url, file)
            return
        except (OSError, HTTPException):
            if file.tell() <= size:
                raise


def _transfer(url: str, file: BinaryIO) -> None:
    """One request for what `file` lacks of `url`. Raises OSError or HTTPException if not all of it came."""
    start = file.tell()
    headers = {"User-Agent": "lhact"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=SECONDS_WITHOUT_DATA)
    except HTTPError as error:
        error.close()
        if start and error.code == 416:  # there is nothing after `start`; the MD5 will tell whether that is right
            return
        raise
    with response:
        # A server may answer with the whole file all the same; then that is taken.
        going_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if not going_on:
            start = 0
            with _writing(file.name):
                file.seek(0)
                file.truncate()
            if response.status != 200:
                raise ConnectionError(f"the server answered with status {response.status} and another range than asked for")
        total = None if response.length is None else start + response.length
        size = {"total": total, "initial": start, "unit": "B", "unit_scale": True, "unit_divisor": 1024}
        with tqdm(**size, delay=1, leave=False, desc=url.rpartition("/")[2]) as bar:
            while chunk := response.read(1 << 16):
                with _writing(file.name):
                    file.write(chunk)
                bar.update(len(chunk))
    with _writing(file.name):
        file.flush()
        os.fsync(file.fileno())
    if total is not None and file.tell() < total:
        raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes")


def _md5(path: Path) -> str:
    from torchvision.datasets.utils import (
        calculate_md5,  # takes seconds to import: not for a mere list
    )

    _remark(f"checking {path}")
    return calculate_md5(path)


# --- Unpacking. ---


@contextmanager
def _workspace(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder in `parent` for unfinished work, gone afterwards; one that a killed run left there is removed first."""
    folder = parent / f".{name}.lhact-unpacking"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _files_and_folders(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """tarfile's `data` filter (nothing outside the folder, no devices, PEP 706), and no symbolic links either: folders of images
    need none, and the known ways round that filter (CVE-2025-4138, -4330, -4517) all start with one."""
    if member.issym():
        raise tarfile.FilterError(f"{member.name!r} is a symbolic link")
    return tarfile.data_filter(member, folder)


def _unpack(archive: Path, folder: Path) -> None:
    # torchvision's extract_archive leaves the filter out in old versions and, without a word, on an old Python.
    if not hasattr(tarfile, "data_filter"):
        raise BadData(
            f"Python {platform.python_version()} cannot unpack archives safely (wanted 3.10.12, 3.11.4, 3.12 or newer); "
            f"take a newer one, or unpack {archive} by hand"
        )
    try:
        progress = tqdm(unit="file", delay=1, leave=False, desc=f"unpacking {archive.name}")
        with progress as bar, tarfile.open(archive) as tar:
            members = (member for member in tar if bar.update() or True)
            tar.extractall(folder, members=members, filter=_files_and_folders)
    except (tarfile.TarError, EOFError, ValueError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0].rstrip(":")  # tarfile adds a line for each compression it tried
        raise BadData(f"{archive} cannot be unpacked: {reason} (nothing of it was kept)") from error


def _check_count(folder: Path, archive: Path, wanted: int) -> None:
    count = _count(folder)
    if count != wanted:
        raise BadData(f"{archive} must hold {wanted:,} images, got {count:,} (nothing of it was kept)")


def _place(folder: Path, target: Path) -> None:
    """Moves the unpacked images to their place, in one step, and first what lies beside them in the archive."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in folder.parent.iterdir():
        if path != folder and not os.path.lexists(target.parent / path.name):
            os.rename(path, target.parent / path.name)
    os.sync()  # or a power loss could keep the new name and lose the bytes
    os.rename(folder, target)


# --- ImageNet's validation images, with torchvision's knowledge of their archives. ---


def _check_imagenet(kind: str, archive: Path) -> None:
    from torchvision.datasets.imagenet import (
        ARCHIVE_META,  # takes seconds to import: not for a mere list
    )

    name, wanted = ARCHIVE_META[kind]
    md5 = _md5(archive)
    if md5 != wanted:
        raise BadData(f"{archive} is not {name} (md5 {md5}, wanted {wanted}); download it again")


def _ground_truth(devkit: Path, wanted: int) -> list[str]:
    """The wnid of each validation image, in the order of their names."""
    from torchvision.datasets import imagenet  # takes seconds to import: not for a mere list

    if devkit.suffix == ".bin":
        try:
            wnids = [str(wnid) for wnid in imagenet.load_meta_file(devkit.parent, devkit.name)[1]]
        except Exception as error:  # torch.load raises nearly anything on a file that is not its own
            raise BadData(
                f"{devkit} cannot be read as torchvision's meta.bin; give {imagenet.ARCHIVE_META['devkit'][0]}"
            ) from error
    else:
        _check_imagenet("devkit", devkit)
        with tempfile.TemporaryDirectory() as folder:
            # It leaves meta.bin in the folder given; the absolute path of the archive stands by itself.
            imagenet.parse_devkit_archive(folder, str(devkit.absolute()))
            wnids = imagenet.load_meta_file(folder)[1]
    if len(wnids) != wanted or not set(wnids) <= set(imagenet_wnids()):
        raise BadData(f"{devkit} must give one of ImageNet's 1,000 classes to each of {wanted:,} images, got {len(wnids):,}")
    return wnids


def _sort_into_classes(folder: Path, wnids: Sequence[str]) -> None:
    """Moves the i-th image by name into the folder of the i-th wnid; there must be as many of both."""
    paths = list_images(folder).paths
    for wnid in set(wnids):
        (folder / wnid).mkdir()
    for path, wnid in zip(paths, wnids, strict=True):
        os.rename(folder / path, folder / wnid / path)


# --- Command line. ---


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lhact.data",
        description="Where each image set of the ImageNet benchmark lies or should lie, and its state; fetches what is missing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data-root", type=Path, default=Path("datasets"), help="where the benchmark's folders lie")
    fetched = [name for name, image_set in BENCHMARKS[BENCHMARK].ood.items() if image_set.md5]
    parser.add_argument("--download", nargs="+", choices=fetched, metavar="NAME", help=f"fetch and unpack: {', '.join(fetched)}")
    parser.add_argument("--mirror", metavar="URL", help="where the archives lie, by the same names, instead of at their source")
    parser.add_argument("--imagenet-val", type=Path, metavar="TAR", help="unpack your ILSVRC2012_img_val.tar")
    parser.add_argument(
        "--devkit",
        type=Path,
        metavar="FILE",
        help="into class folders by your ILSVRC2012_devkit_t12.tar.gz (or torchvision's meta.bin)",
    )
    args = parser.parse_args(argv)
    if args.mirror and not args.download:
        parser.error("--mirror goes with --download")
    if args.devkit and not args.imagenet_val:
        parser.error("--devkit goes with --imagenet-val")
    if args.mirror and not _is_web_address(args.mirror):
        parser.error(f"--mirror must be an address such as https://example.org/archives, got {args.mirror!r}")
    return args


def _is_web_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        if args.download or args.imagenet_val:
            with _alone(args.data_root):
                return _get_all(args)
        return _show(args.data_root)
    except (BadData, OSError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        _remark("lhact.data: interrupted; the same command goes on where it stopped")
        return 130


def _get_all(args: argparse.Namespace) -> int:
    """Each set asked for; one that fails does not keep the others from coming."""
    benchmark = BENCHMARKS[BENCHMARK]
    tasks = [(download, name, benchmark.ood[name], args.data_root, args.mirror) for name in dict.fromkeys(args.download or ())]
    if args.imagenet_val:
        tasks.append((unpack_imagenet_val, args.imagenet_val, args.devkit, benchmark.id, args.data_root))
    status = 0
    for task, *arguments in tasks:
        try:
            print(_printable(task(*arguments)), flush=True)
        except (BadData, BadImages, OSError) as error:
            status = _fail(error)
    return status


@contextmanager
def _alone(data_root: Path) -> Iterator[None]:
    """Holds the data root for this process. Raises BadData if another one has it."""
    data_root.mkdir(parents=True, exist_ok=True)
    with open(data_root / ".lhact-data.lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadData(f"another run is fetching or unpacking to {data_root}; wait for it") from error
        yield


def _show(data_root: Path) -> int:
    benchmark = BENCHMARKS[BENCHMARK]
    sets = {"id": benchmark.id, "calibration": benchmark.calibration, **benchmark.ood}
    states = {name: look(name, image_set, data_root) for name, image_set in sets.items()}
    print(_printable(table(states)), flush=True)
    for name, state in states.items():
        if state.problem:
            _remark(f"{name}: {state.problem}")
    wanting = [name for name, state in states.items() if not state.complete and name not in OPTIONAL]
    if wanting:
        _remark("\n".join(["", *_advice(wanting, data_root)]))
    return 1 if wanting else 0


def table(states: Mapping[str, State]) -> str:
    """Image set, folder and state of each, one line each, in aligned columns."""
    rows = [("image set", "folder", "state")]
    for name, state in states.items():
        optional = ", optional" if name in OPTIONAL and not state.complete else ""
        rows.append((name, str(state.folder), state.text + optional))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:{widths[0]}}  {folder:{widths[1]}}  {state}" for name, folder, state in rows)


def _advice(wanting: Sequence[str], data_root: Path) -> list[str]:
    """What to do about the sets that are not complete."""
    benchmark = BENCHMARKS[BENCHMARK]
    command = "python -m lhact.data" + ("" if data_root == Path("datasets") else f" --data-root {shlex.quote(str(data_root))}")
    lines = []
    if names := [name for name in wanting if name in benchmark.ood]:
        lines.append(f"OOD sets: {command} --download {' '.join(names)}")
    if "id" in wanting:
        train = data_root / benchmark.calibration.folders[0]
        lines += [
            f"ImageNet: register and log in at {benchmark.id.source.split()[0]}, and download",
            "  ILSVRC2012_img_val.tar (the validation images) and ILSVRC2012_devkit_t12.tar.gz (their classes); then",
            f"  {command} --imagenet-val ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz",
            "  Without --devkit they come to lie in one flat folder: no accuracy, all else works.",
            f"  Training images, optional, go to {train}/<wnid>/*.JPEG.",
        ]
    return lines


def _printable(text: str) -> str:
    """A folder's name need not be valid UTF-8; standard output wants that."""
    return text.encode("utf-8", "backslashreplace").decode()


def _remark(text: object) -> None:
    tqdm.write(str(text), file=sys.stderr)


def _fail(error: Exception) -> int:
    if isinstance(error, OSError):
        error = f"{error.filename}: {error.strerror}" if error.filename else error
    _remark(f"lhact.data: {error}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
