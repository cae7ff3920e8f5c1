"""lhact.extraction.sources and what works on image sets, against lists written by hand, NumPy,
and torchvision's own datasets and transforms."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop

from lhact.extraction.image_sets import Images, gaussian_noise
from lhact.extraction.images import BadImages, NoImages
from lhact.extraction.remarks import left_out_remark
from lhact.extraction.sources import (
    SourceOptions,
    open_folder,
    open_source,
)
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
    for number in range(2003):
        (tmp_path / f"{number}.jpg").touch()
    told: list[int] = []
    open_folder(tmp_path, told.append)
    (tmp_path / "list.txt").write_text("\n".join(f"{number}.jpg" for number in range(2003)))
    for source in (tmp_path, tmp_path / "list.txt"):
        open_source(source, SourceOptions(tmp_path), told.append)
    assert told == [1000, 1000, 3] * 3


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
