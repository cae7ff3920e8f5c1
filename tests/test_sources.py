"""lhact.extraction.sources and what works on image sets, against lists written by hand, NumPy,
and torchvision's own datasets and transforms."""

import contextlib
import hashlib
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from torchvision.transforms import CenterCrop

from lhact.extraction import sources
from lhact.extraction.image_sets import FileReader, Images, gaussian_noise
from lhact.extraction.images import BadImages, NoImages
from lhact.extraction.labels import first_per_class, labels
from lhact.extraction.remarks import left_out_remark, overlap, size_remark
from lhact.extraction.sources import SourceOptions, open_source
from lhact.records import Preprocessing

SMALL = Preprocessing(0, 8)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def touch(folder: Path, names: str | list[str]) -> Path:
    """Files that hold their own names."""
    for name in names.split() if isinstance(names, str) else names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    return folder


def photographs(folder: Path, names: str, side: int = 12) -> Path:
    for seed, name in enumerate(names.split()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(side, side + 2, 3, seed=seed)).save(folder / name)
    return folder


def opened(source: str | Path, **options: object) -> Images:
    return open_source(source, SourceOptions(Path("no-data"), **options))


def refusal(source: str | Path, **options: object) -> str:
    with pytest.raises(BadImages) as error:
        opened(source, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ---- folders ----


@pytest.mark.parametrize("backwards", [False, True])
def test_files_are_sorted_by_relative_path_by_code_point(backwards, tmp_path, monkeypatch):
    """However the system lists them."""
    # '-' < '.' < '/' < '0' < 'Z' < 'a' < 'é': an order by folders, by locale or without regard to
    # case is another one.
    wanted = "Z.png a-b/x.jpg a.jpg a/b/c.jpg a/x.jpg a0.jpg b.JPEG é.jpg".split()  # noqa: SIM905
    touch(tmp_path, wanted)
    scandir = os.scandir

    def listed(path: str) -> contextlib.AbstractContextManager[list[os.DirEntry]]:
        entries = sorted(scandir(path), key=lambda entry: entry.name, reverse=backwards)
        return contextlib.nullcontext(entries)

    monkeypatch.setattr(os, "scandir", listed)
    found = opened(tmp_path)
    assert list(found.paths) == wanted
    assert found.status[:, 0].tolist() == [len(name.encode()) for name in wanted]


def test_links_are_followed_and_a_folder_named_like_an_image_is_a_folder(tmp_path):
    touch(tmp_path / "elsewhere", "1.jpg 2.jpg")
    folder = touch(tmp_path / "set", "own.jpg x.jpg/y.jpg list.txt/z.jpg")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "one.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    wanted = "linked/1.jpg linked/2.jpg list.txt/z.jpg one.jpg own.jpg x.jpg/y.jpg"
    assert " ".join(opened(folder).paths) == wanted
    assert opened(folder / "list.txt").paths == ("z.jpg",)


def test_hidden_files_and_folders_are_neither_images_nor_classes(tmp_path):
    touch(tmp_path, "a/1.jpg a/.2.jpg a/._1.jpg a/Thumbs.db a/.DS_Store b/3.JFIF b/notes b/x.TXT")
    touch(tmp_path, ".ipynb_checkpoints/c.jpg a/@eaDir/1.jpg/thumb.jpg b/@eaDir/x.jpg x.txt")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    found = opened(tmp_path)
    assert found.paths == ("a/1.jpg", "b/3.JFIF")
    assert found.class_names == ["a", "b"]
    assert left_out_remark(found) == (
        "4 other files left out: .txt 2, no extension 1, pipe or device 1; "
        "3 hidden folders left out: .ipynb_checkpoints/ 1, @eaDir/ 2"
    )
    assert left_out_remark(opened(tmp_path / "a" / "@eaDir")) is None


def test_progress_adds_up_to_the_files_found(tmp_path):
    touch(tmp_path, [f"{number}.jpg" for number in range(7)])
    (tmp_path / "list.txt").write_text("\n".join(f"{number}.jpg" for number in range(7)))
    np.savez(tmp_path / "arrays.npz", images=noise(7, 8, 8))
    for source in (tmp_path, tmp_path / "list.txt", tmp_path / "arrays.npz"):
        told: list[int] = []
        open_source(source, SourceOptions(tmp_path), told.append)
        assert sum(told) == 7


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: None, "set cannot be listed: No such file or directory; give a "),
    "file": (Path.touch, "set cannot be listed: Not a directory"),
    "empty": (Path.mkdir, r"set holds no images \(wanted .*\.jpg.*, found nothing\); put "),
    "no-images": (lambda set_: touch(set_, "a.txt ._a.jpg x/y.mat"), r"found .*\.mat 1"),
    "only-hidden": (lambda set_: touch(set_, "@eaDir/a.jpg"), "found @eaDir/ 1"),
    "dangling-link": (
        lambda set_: (touch(set_, "a.jpg"), (set_ / "b.jpg").symlink_to("nowhere")),
        "b.jpg cannot be read: No such file or directory; restore it or leave it out",
    ),
    "link-to-itself": (
        lambda set_: (touch(set_, "a.jpg"), (set_ / "b.jpg").symlink_to("b.jpg")),
        r"b\.jpg.*symbolic links",
    ),
    "link-loop": (
        lambda set_: (touch(set_, "c/a.jpg"), (set_ / "c" / "up").symlink_to(set_)),
        "c/up links back to a folder that holds it; remove that link",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_by_name(kind, tmp_path):
    make, message = FOLDERS[kind]
    make(tmp_path / "set")
    empty = kind in ("empty", "no-images", "only-hidden")
    with pytest.raises(NoImages if empty else BadImages, match=message):
        opened(tmp_path / "set")


@pytest.mark.parametrize("what", ["set", "set/sub", "set/sub/a.jpg", "set/list.txt"])
def test_no_permission(what, public_folder, unprivileged):
    photographs(public_folder, "set/sub/a.jpg")
    (public_folder / "set" / "list.txt").write_text("sub/a.jpg")
    (public_folder / what).chmod(0)
    unprivileged()
    message = f"{public_folder / what} cannot be .*: Permission denied; (give|restore)"
    source = public_folder / (what if what.endswith(".txt") else "set")
    with pytest.raises(BadImages, match=message):
        list(opened(source).digests())


# ---- what identifies a set ----


def test_fingerprint_is_over_names_and_sizes(tmp_path):
    """Caches on disk hold it, so its definition stands."""
    latin = os.fsdecode(b"caf\xe9.jpg")
    found = opened(touch(tmp_path, ["a/b.jpg", latin, "line\nbreak.jpg"]))
    assert found.paths == ("a/b.jpg", latin, "line\nbreak.jpg")
    wanted = hashlib.sha256(b"a/b.jpg\x007\ncaf\xe9.jpg\x008\nline\nbreak.jpg\x0014\n").hexdigest()
    assert found.fingerprint() == wanted
    noise_wanted = hashlib.sha256(b"000000\0000\n000001\0000\n").hexdigest()
    assert gaussian_noise(2).fingerprint() == noise_wanted


def test_other_names_sizes_orders_and_labels_give_another_fingerprint(tmp_path):
    touch(tmp_path, "a.jpg b/c.jpg d.jpg")
    lists = ["a.jpg", "a.jpg\nb/c.jpg", "b/c.jpg\na.jpg", "a.jpg 0\nb/c.jpg 1", "a.jpg\nd.jpg"]
    lists += ["a.jpg 0\nb/c.jpg 2", "a.jpg 0\nb/c.jpg -1"]
    found = []
    for text in lists:
        (tmp_path / "list.txt").write_text(text)
        found.append(opened(tmp_path / "list.txt").fingerprint())
    (tmp_path / "a.jpg").write_bytes(b"other size")
    found.append(opened(tmp_path / "list.txt").fingerprint())
    assert len(set(found)) == len(lists) + 1
    assert opened(tmp_path).select([0, 1]).fingerprint() not in found
    (tmp_path / "list.txt").write_text("a.jpg\nb/c.jpg -1")
    assert (
        opened(tmp_path).select([0, 1]).fingerprint() == opened(tmp_path / "list.txt").fingerprint()
    ), "the same files from a list"


def test_modified_tells_when_files_were_written(tmp_path):
    folder = photographs(tmp_path / "set", "a.bmp b.bmp")
    np.savez(tmp_path / "set.npz", images=noise(2, 9, 9))
    for source, file in ((folder, folder / "b.bmp"), (tmp_path / "set.npz",) * 2):
        before = opened(source)
        assert opened(source).modified() == before.modified()
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert opened(source).modified() != before.modified()
        assert opened(source).fingerprint() == before.fingerprint()
        assert list(opened(source).digests()) == list(before.digests())
    assert gaussian_noise(3).modified() == gaussian_noise(3).modified()


def test_digests_are_of_what_is_read(tmp_path):
    folder = photographs(tmp_path / "set", "a.bmp b.png")
    values = noise(3, 9, 9, 3)
    np.savez(tmp_path / "set.npz", images=values)
    contents = {
        folder: [(folder / name).read_bytes() for name in ("a.bmp", "b.png")],
        tmp_path / "set.npz": [row.tobytes() for row in values],
    }
    for source, read in contents.items():
        wanted = [hashlib.blake2b(content, digest_size=16).digest() for content in read]
        found = opened(source)
        pixels = found.pixels(SMALL)
        assert [pixels[row][1] for row in range(len(pixels))] == wanted
        assert list(found.digests()) == wanted
    made = gaussian_noise(2)
    assert [item[1] for item in map(made.pixels(SMALL).__getitem__, (0, 1))] == [*made.digests()]
    listed = opened(folder)
    (folder / "a.bmp").unlink()
    with pytest.raises(BadImages, match=r"a\.bmp .*No such file"):
        list(listed.digests())


def test_noise_is_clipped_normal_and_the_same_in_every_run():
    """Of N(0.5, 1) the share Phi(-0.5) = 30.85 % lies below 0, and as much above 1."""
    first, again = (gaussian_noise(2).pixels(Preprocessing(0, 100)) for _ in range(2))
    values = [first[row][0] for row in range(2)]
    for row in range(2):
        np.testing.assert_array_equal(values[row], again[row][0])
        for end in (0, 255):
            assert np.mean(values[row] == end) == pytest.approx(0.3085, abs=0.01)
    assert np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1] == pytest.approx(0, abs=0.03)


def test_select_keeps_all_columns_together(tmp_path):
    photographs(tmp_path, "a.bmp b.png c.jpg")
    (tmp_path / "list.txt").write_text("a.bmp 5\nb.png 6\nc.jpg 7")
    whole = opened(tmp_path / "list.txt")
    chosen = whole.select([2, 0])
    assert (chosen.paths, chosen.labels.tolist()) == (("c.jpg", "a.bmp"), [7, 5])
    assert chosen.status.tolist() == whole.status[[2, 0]].tolist()
    assert list(chosen.digests()) == [list(whole.digests())[row] for row in (2, 0)]
    np.testing.assert_array_equal(chosen.pixels(SMALL)[0][0], whole.pixels(SMALL)[2][0])
    np.savez(tmp_path / "set.npz", images=noise(5, 9, 9), labels=np.arange(5))
    chosen = opened(tmp_path / "set.npz").select([4, 1]).select([1])
    assert (chosen.paths, chosen.labels.tolist()) == (("000001",), [1])
    theirs = CenterCrop(8)(Image.fromarray(noise(5, 9, 9)[1]).convert("RGB"))
    np.testing.assert_array_equal(chosen.pixels(SMALL)[0][0], np.asarray(theirs))


def test_grey_arrays_with_and_without_a_last_axis_are_the_same_images(tmp_path):
    values = noise(2, 9, 11)
    found = []
    for name, array in {"a": values, "b": values[..., None]}.items():
        np.savez(tmp_path / f"{name}.npz", images=array)
        pixels = opened(tmp_path / f"{name}.npz").pixels(Preprocessing(0, 9))
        found.append(np.stack([pixels[row][0] for row in range(2)]))
    np.testing.assert_array_equal(found[0], np.repeat(values[:, :, 1:10, None], 3, axis=3))
    np.testing.assert_array_equal(found[1], found[0])


# ---- lists ----


def test_a_list_gives_its_order_and_labels(tmp_path):
    folder = touch(tmp_path / "set", ["b.jpg", "a b.jpg", "c/d.jpg", "7 8.jpg"])
    lines = ["\ufeffb.jpg 3", "", "a b.jpg\t-1", f"  {folder}/c/d.jpg 0", "./x/../7 8.jpg"]
    (tmp_path / "list.TXT").write_text("\r\n".join(lines), encoding="utf-8")
    found = opened(tmp_path / "list.TXT", list_root=folder)
    assert found.paths == ("b.jpg", "a b.jpg", "c/d.jpg", "7 8.jpg")
    assert found.labels.tolist() == [3, -1, 0, -1]
    assert found.status[:, 0].tolist() == [5, 7, 7, 7]
    assert found.class_names is None
    (folder / "list.txt").write_text("b.jpg\na b.jpg -1")
    assert opened(folder / "list.txt").labels is None


LISTS = {
    "": "list.txt lists no images; give a list of them, one a line",
    "a.jpg\n\na.jpg 3": "line 3: a.jpg stands in line 1 already; name each image once",
    "a.jpg -2": "line 1: the label -2 is no class number; give numbers from 0, or -1 where",
    "a.jpg 2147483648": "line 1: the label 2147483648 is no class number",
    "a.jpg\n../b.jpg": "line 2: ../b.jpg lies outside of .*; give the folder .* as --list-root",
    "c/../../b.jpg": r"line 1: c/\.\./\.\./b\.jpg lies outside of",
    "/b.jpg": "line 1: /b.jpg lies outside of",
    "a.jpg\nc.jpg\nd\0.jpg 1": r"names 2 of 3 files .* \(line 2: c.jpg; line 3: d\\x00.jpg; ",
    "c": r"names 1 of 1 files that cannot be found in .* \(line 1: c; it is no file\); restore",
}


@pytest.mark.parametrize("text", LISTS)
def test_a_list_that_cannot_be_used_is_refused(text, tmp_path):
    touch(tmp_path / "set", "a.jpg c/d.jpg")
    (tmp_path / "list.txt").write_text(text)
    assert re.search(LISTS[text], refusal(tmp_path / "list.txt", list_root=tmp_path / "set"))


@pytest.mark.parametrize("name", ["list.txt", "arrays.npz"])
def test_a_file_that_is_not_there_or_is_a_pipe_is_refused(name, tmp_path):
    assert f"{name} cannot be read: No such file or directory; give a" in refusal(tmp_path / name)
    os.mkfifo(tmp_path / name)
    assert f"{name} cannot be read: it is no file; give a" in refusal(tmp_path / name)


# ---- arrays ----


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_in_any_order_of_their_bytes(save, tmp_path):
    values = np.asfortranarray(noise(3, 8, 8, 3))
    save(tmp_path / "a.npz", other=np.zeros(3), images=values, labels=np.array([4, -1, 0]))
    found = opened(tmp_path / "a.npz")
    assert found.paths == ("000000", "000001", "000002")
    assert found.labels.tolist() == [4, -1, 0]
    pixels = pickle.loads(pickle.dumps(found.pixels(SMALL)))  # as a worker process gets it
    for row in range(3):
        np.testing.assert_array_equal(pixels[row][0], values[row])
    (tmp_path / "a.npz").unlink()
    if save is np.savez:  # which stays on disk
        assert "image 000001 of " in pixels[1]
        assert "cannot be read: [Errno 2]" in pixels[1]


ARRAYS: dict[str, tuple[dict[str, object], str]] = {
    "floats": ({"images": np.zeros((2, 8, 8), np.float32)}, "its images are float32(2, 8, 8), wan"),
    "one": ({"images": noise(8, 8, 3)}, "its images are uint8(8, 8, 3), wanted uint8 (n, h, w) or"),
    "four-channels": ({"images": noise(2, 8, 8, 4)}, "its images are uint8(2, 8, 8, 4)"),
    "no-images": ({"images": noise(0, 8, 8)}, "its images are uint8(0, 8, 8)"),
    "others": ({"a": noise(1), "b": noise(1)}, "it holds no array 'images', but a, b"),
    "objects": ({"images": np.array([None])}, "'images' should be object(1,), but it has"),
    "too-few-labels": (
        {"images": noise(2, 8, 8), "labels": [1]},
        "its labels are int64(1,), want",
    ),
    "fractions": (
        {"images": noise(1, 8, 8), "labels": [1.0]},
        "its labels are float64(1,), wan",
    ),
    "negative": ({"images": noise(1, 8, 8), "labels": [-2]}, "its labels go from -2 to -2, want"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_cannot_be_used_are_refused(kind, tmp_path):
    arrays, message = ARRAYS[kind]
    np.savez(tmp_path / "a.npz", **arrays)
    said = refusal(tmp_path / "a.npz")
    assert f"a.npz cannot be used: {message}" in said
    assert said.endswith("; write it with numpy.savez(FILE, images=..., labels=...)")


def test_damaged_and_huge_arrays_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=noise(2, 8, 8))
    monkeypatch.setattr(sources, "MAX_COMPRESSED", 127)
    assert "its compressed values would take 128 bytes of memory" in refusal(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    assert "b.npz cannot be used: " in refusal(tmp_path / "b.npz")


# ---- sets of torchvision ----


class Downloaded:
    """A set of torchvision that is there once it has been downloaded."""

    data, labels, there = noise(2, 3, 8, 8), np.array([5, 6]), False

    def __init__(self, root: Path, download: bool, split: str) -> None:
        Downloaded.there |= download
        if not self.there:
            raise RuntimeError("Dataset not found. You can use download=True to download it")


def test_arrays_of_torchvision_are_fetched_only_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "SVHN", Downloaded)
    said = refusal("torchvision:SVHN:test")
    assert "SVHN:test cannot be read in no-data: Dataset not found; give the folder" in said
    first = opened("torchvision:SVHN:test", download=True)
    again = opened("torchvision:SVHN:test")
    for found in (first, again):
        assert (found.paths, found.labels.tolist()) == (("000000", "000001"), [5, 6])
        theirs = Downloaded.data[1].transpose(1, 2, 0)
        np.testing.assert_array_equal(found.pixels(SMALL)[1][0], theirs)
    assert (first.fingerprint(), first.modified()) == (again.fingerprint(), again.modified())
    monkeypatch.setattr(Downloaded, "data", Downloaded.data + 1)
    assert opened("torchvision:SVHN:test").modified() != first.modified()


def test_files_of_torchvision(tmp_path):
    folder = tmp_path / "dtd" / "dtd"
    photographs(folder / "images", "banded/b_1.png woven/w_1.png banded/b_2.png")
    (folder / "labels").mkdir()
    (folder / "labels" / "test1.txt").write_text("woven/w_1.png\nbanded/b_1.png\n")
    found = open_source("torchvision:DTD:test", SourceOptions(tmp_path))
    assert found.paths == ("dtd/dtd/images/woven/w_1.png", "dtd/dtd/images/banded/b_1.png")
    assert found.labels.tolist() == [1, 0]
    (folder / "images" / "woven" / "w_1.png").unlink()
    with pytest.raises(BadImages, match=r"1 of 2 files are missing, such as dtd/.*/w_1\.png; give"):
        open_source("torchvision:DTD:test", SourceOptions(tmp_path))


def test_unknown_sets_of_torchvision_list_the_known_ones():
    said = refusal("torchvision:SVNH:test")
    assert said.startswith("torchvision:SVNH:test is not known; known sets are CIFAR10, ")
    assert refusal("torchvision:MNIST") == (
        "torchvision:MNIST is not known; known splits are torchvision:MNIST:train, "
        "torchvision:MNIST:test"
    )


# ---- labels ----

WNIDS = ("n1", "n2", "n3")


def in_folders(paths: str, given: list[int] | None = None) -> Images:
    names = tuple(paths.split())
    status = np.zeros((len(names), 4), np.uint64)
    known = None if given is None else np.array(given)
    return Images("there", names, FileReader(Path()), status, known, in_class_folders=True)


# Images of id and calibration, the network's classes, labels of id, what is said of it.
LABELS = {
    "wnids": (["n3/a n1/b"], 3, (2, 0), "labels by ImageNet's order, 2 of 3 classes"),
    "wnids-of-another": (["n3/a n1/b"], 2, (1, 0), "labels by the sorted order of the class fol"),
    "numbers": (["07/a 1/b"], 8, (7, 1), "labels by the numbers that the class folders are named"),
    "same-number": (["01/a 1/b"], 8, None, "no labels: two class folders have the same number"),
    "beyond": (
        ["3/a 9/b"],
        4,
        None,
        "no labels: the class folders are numbered 3 to 9, the network has the classes 0 to 3",
    ),
    "sorted": (
        ["c/a b/b", "a/c"],
        3,
        (2, 1),
        "labels by the sorted order of the class folders, a =",
    ),
    "too-few": (["c/a b/b"], 3, None, "no labels: it has 2 class folders, the network has 3 class"),
    "too-many": (
        ["c/a b/b", "a/c"],
        2,
        None,
        "no labels: id and calibration have 3 class folders together, the network has 2 classes",
    ),
    "flat": (["c/a b"], 2, None, "no labels: not all of its images lie in class folders"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_by_class_folders(kind):
    paths, classes, wanted, remark = LABELS[kind]
    sets = dict(zip(("id", "calibration"), map(in_folders, paths), strict=False))
    found = labels(sets, classes, WNIDS)["id"]
    assert found.labels == wanted
    assert found.remark.startswith(remark)


def test_labels_that_came_with_the_images():
    given = in_folders("n1/a n1/b n1/c", [2, 0, 2])
    assert labels({"id": given}, 3, WNIDS)["id"].labels == (2, 0, 2)
    assert first_per_class(given, 1) == [0, 1]
    assert first_per_class(in_folders("a b"), 1) == [0, 1]
    some = labels({"id": in_folders("n1/a n1/b", [2, -1])}, 3, WNIDS)["id"]
    assert (some.labels, some.remark) == (None, "no labels: 1 of its 2 images have none")
    with pytest.raises(
        BadImages, match=r"there gives n1/a the label 2, the network has .* 0 to 1;"
    ):
        labels({"id": given}, 2, WNIDS)


# ---- remarks ----


def test_images_that_would_be_enlarged_or_framed_get_a_remark(tmp_path):
    images = opened(photographs(tmp_path, "a.png b.png"))
    (tmp_path / "a.png").write_bytes(b"words")  # passed over
    for preprocessing, remark in {
        Preprocessing(36, 32): "input 32: they are enlarged 3.0 times; give the network's own --re",
        Preprocessing(0, 13): "input 13: they get a black border; give a smaller --crop, or --resi",
    }.items():
        said = size_remark(images, preprocessing)
        assert said.startswith(f"the images have 12 pixels a side, the network's {remark}")
    for preprocessing in (Preprocessing(24, 13), Preprocessing(0, 12)):
        assert size_remark(images, preprocessing) is None
    assert size_remark(gaussian_noise(2), Preprocessing(0, 13)) is None


def test_images_that_two_sets_share_get_a_remark(tmp_path):
    first = photographs(tmp_path / "first", "a.bmp b.bmp c.bmp")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "x.bmp").hardlink_to(first / "a.bmp")
    shutil.copytree(first, tmp_path / "copied" / "deep")
    photographs(tmp_path / "other", "c.bmp a.bmp b.bmp")  # the same names and sizes alone
    for name, values in {"one": noise(3, 8, 8), "two": noise(4, 8, 8)[1:]}.items():
        np.savez(tmp_path / f"{name}.npz", images=values)
    for name, second, wanted in [
        ("linked", "first", "all 1 images are the same images as in {} (the same files)"),
        ("first", "linked", "1 of 3 images are the same images as in {} (the same files)"),
        ("first", "copied", "all 3 images are .* {} (of the same name and size; 3 of 3 compared "),
        ("one.npz", "two.npz", "2 of 3 images are the same images as in {} (the same pixels)"),
    ]:
        said = overlap(opened(tmp_path / name), opened(tmp_path / second))
        pattern = re.escape(wanted.format(tmp_path / second)).replace(r"\.\*", ".*")
        assert re.match(pattern, said)
    assert overlap(opened(first), opened(tmp_path / "other")) is None
    assert overlap(opened(first), opened(tmp_path / "one.npz")) is None
