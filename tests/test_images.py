"""lhact.images against PIL, torchvision's own transforms and lists written by hand."""

import contextlib
import io
import logging
import os
import random
import resource
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import fork, png_that_claims, wait
from PIL import EpsImagePlugin, Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from lhact.extraction import images
from lhact.extraction.images import BadImages, ImageList, Pixels, Preprocessing


def touch(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    return folder


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


# ---- which files, in which order ----


def test_sorted_by_relative_path_by_code_point(tmp_path):
    # '-' < '.' < '/' < '0' < 'Z' < 'a' < 'é': an order by folders, by locale or without regard to case is another one.
    wanted = ["Z.png", "a-b/x.jpg", "a.jpg", "a/b/c.jpg", "a/x.jpg", "a0.jpg", "b.JPEG", "é.jpg"]
    names = wanted.copy()
    random.Random(1).shuffle(names)
    assert images.list_images(touch(tmp_path, names)).paths == wanted


def test_order_of_creation_does_not_matter(tmp_path):
    names = [f"{folder}/{i:03}.jpg" for folder in ("n2", "n10", "n1") for i in range(20)]
    wanted = [f"{folder}/{i:03}.jpg" for folder in ("n1", "n10", "n2") for i in range(20)]
    for seed in range(2):
        random.Random(seed).shuffle(names)
        assert images.list_images(touch(tmp_path / str(seed), names)).paths == wanted


def test_order_of_the_directory_listing_does_not_matter(tmp_path, monkeypatch):
    touch(tmp_path, ["b/2.jpg", "b/1.jpg", "a/9.jpg", "c.jpg"])
    wanted = ["a/9.jpg", "b/1.jpg", "b/2.jpg", "c.jpg"]

    class Reversed(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    scandir = os.scandir
    for reverse in (False, True):
        order = lambda path, reverse=reverse: Reversed(sorted(scandir(path), key=lambda entry: entry.name, reverse=reverse))  # noqa: E731
        monkeypatch.setattr(os, "scandir", order)
        assert images.list_images(tmp_path).paths == wanted


def test_sizes_go_with_the_paths(tmp_path):
    found = images.list_images(touch(tmp_path, ["bb.jpg", "a.jpg", "c/ccc.jpg"]))
    assert dict(zip(found.paths, found.sizes, strict=True)) == {"a.jpg": 5, "bb.jpg": 6, "c/ccc.jpg": 9}
    assert found.folder == tmp_path


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a.jpg", True),
        ("a.JPEG", True),
        ("a.Png", True),
        ("a.bmp", True),
        ("a.gif", True),
        ("a.webp", True),
        ("a.tif", True),
        ("a.tiff", True),
        ("a.ppm", True),
        ("a b.c.jpg", True),
        (".hidden.jpg", True),
        ("_.jpg", True),
        ("._a.jpg", False),
        ("._.JPEG", False),
        (".DS_Store", False),
        ("Thumbs.db", False),
        ("a.txt", False),
        ("a.jpg.txt", False),
        ("ajpg", False),
        ("a.mat", False),
        ("a.jpg~", False),
        ("a.jpg.part", False),
        ("", False),
    ],
)
def test_what_counts_as_an_image(name, wanted, tmp_path):
    assert images.is_image(name) is wanted
    if name:
        touch(tmp_path, ["sure.jpg", f"sub/{name}"])
        assert (f"sub/{name}" in images.list_images(tmp_path).paths) is wanted


def test_links_to_files_and_folders_are_followed(tmp_path):
    touch(tmp_path / "elsewhere", ["1.jpg", "2.jpg"])
    folder = touch(tmp_path / "set", ["own.jpg"])
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "one.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    assert images.list_images(folder).paths == ["linked/1.jpg", "linked/2.jpg", "one.jpg", "own.jpg"]


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    assert images.list_images(touch(tmp_path, ["x.jpg/y.jpg"])).paths == ["x.jpg/y.jpg"]


def test_progress_adds_up_to_the_files_found(tmp_path):
    for i in range(2003):
        (tmp_path / f"{i}.jpg").touch()
    told = []
    assert len(images.list_images(tmp_path, told.append).paths) == 2003
    assert told[:2] == [1000, 1000]
    assert sum(told) == 2003


# ---- fingerprint ----


def test_fingerprint_knows_names_sizes_and_order_and_nothing_else():
    base = ImageList(Path("here"), ["a.jpg", "b/c.jpg"], [10, 20])
    assert base.fingerprint() == ImageList(Path("/there"), ["a.jpg", "b/c.jpg"], [10, 20]).fingerprint()
    others = [
        ImageList(Path("here"), ["a.jpg", "b/c.jpg"], [20, 10]),
        ImageList(Path("here"), ["a.jpg", "b/c.jpg"], [10, 21]),
        ImageList(Path("here"), ["b/c.jpg", "a.jpg"], [10, 20]),
        ImageList(Path("here"), ["a.jpg", "bc.jpg"], [10, 20]),
        ImageList(Path("here"), ["a.jpg"], [10]),
        ImageList(Path("here"), ["a.jpg", "b/c.jpg", "d.jpg"], [10, 20, 0]),
        ImageList(Path("here"), ["a.jpg1", "b/c.jpg"], [0, 20]),
        ImageList(Path("here"), ["a.jpg\n10\nb/c.jpg"], [20]),
        ImageList(Path("here"), [], []),
    ]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == len(others) + 1
    assert len(base.fingerprint()) == 64


def test_fingerprint_of_a_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    found = images.list_images(touch(tmp_path, [name, "line\nbreak.jpg"]))
    assert found.paths == [name, "line\nbreak.jpg"]
    assert found.fingerprint() != images.list_images(touch(tmp_path, ["third.jpg"])).fingerprint()


def test_select_keeps_paths_and_sizes_together():
    chosen = ImageList(Path("x"), ["a", "b", "c"], [1, 2, 3]).select([2, 0])
    assert (chosen.paths, chosen.sizes, chosen.folder) == (["c", "a"], [3, 1], Path("x"))


# ---- labels, and the first of each class ----

ORDER = ["n01", "n02", "n03", "n04"]


@pytest.mark.parametrize(
    ("paths", "classes", "wanted"),
    [
        # all wnids, some of them missing: a position among the folders would be wrong
        (["n02/a.jpg", "n04/b.jpg", "n04/deep/c.jpg"], 4, [1, 3, 3]),
        (["n01/a", "n02/a", "n03/a", "n04/a"], 4, [0, 1, 2, 3]),
        # another number of classes than wnids: as many folders as classes are numbered in sorted order
        (["n02/a.jpg", "n04/b.jpg"], 2, [0, 1]),
        (["dog/a", "cat/b", "dog/c"], 2, [1, 0, 1]),
        (["cat/1", "cat-b/1", "Cat/1"], 3, [1, 2, 0]),
        (["10/a", "2/a", "1/a"], 3, [1, 2, 0]),
        # as many classes as wnids, but other names: still as many folders as classes
        (["w/1", "x/1", "y/1", "z/1"], 4, [0, 1, 2, 3]),
        # not known: flat, partly flat, another number of folders
        (["a.jpg", "b.jpg"], 4, None),
        (["n01/a.jpg", "b.jpg"], 4, None),
        (["cat/a", "dog/b"], 4, None),
        (["n01/a", "other/b"], 4, None),
        (["cat/a", "dog/b"], 1, None),
    ],
)
def test_labels(paths, classes, wanted):
    assert images.labels(paths, classes, ORDER) == wanted


@pytest.mark.parametrize(
    ("count", "wanted"), [(0, []), (1, ["a/1", "b/1"]), (2, ["a/1", "a/2", "b/1"]), (9, ["a/1", "a/2", "a/3/x", "b/1"])]
)
def test_first_per_class(count, wanted):
    paths = ["a/1", "a/2", "a/3/x", "b/1"]
    assert [paths[i] for i in images.first_per_class(paths, count)] == wanted


def test_first_per_class_without_folders_is_everything():
    assert images.first_per_class(["1.jpg", "2.jpg", "3.jpg"], 1) == [0, 1, 2]


# ---- decoding ----


def _grey_alpha() -> Image.Image:
    return Image.merge("LA", [noise(9, 7).getchannel(0), noise(9, 7, 1).getchannel(0)])


def _transparent_palette() -> bytes:
    return encoded(noise(9, 7).quantize(16), "PNG", transparency=3)


def _rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(9, 7), "JPEG", exif=exif.tobytes())


FILES: dict[str, bytes] = {
    "rgb.jpg": encoded(noise(9, 7), "JPEG"),
    "grey.jpg": encoded(noise(9, 7).convert("L"), "JPEG"),
    "cmyk.jpg": encoded(noise(9, 7).convert("CMYK"), "JPEG"),
    "grey.png": encoded(noise(9, 7).convert("L"), "PNG"),
    "one-bit.png": encoded(noise(9, 7).convert("1"), "PNG"),
    "palette.png": encoded(noise(9, 7).quantize(16), "PNG"),
    "palette.gif": encoded(noise(9, 7).quantize(16), "GIF"),
    "transparent-palette.png": _transparent_palette(),
    "rgba.png": encoded(Image.merge("RGBA", [*noise(9, 7).split(), noise(9, 7, 1).getchannel(0)]), "PNG"),
    "grey-alpha.png": encoded(_grey_alpha(), "PNG"),
    "16-bit.png": encoded(Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (7, 9)).astype(np.uint16)), "PNG"),
    "16-bit.tif": encoded(Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (7, 9)).astype(np.uint16)), "TIFF"),
    "png-by-another-name.JPEG": encoded(noise(9, 7), "PNG"),
    "rotated-6.jpg": _rotated(6),
    "rotated-3.jpg": _rotated(3),
    "animation.gif": encoded(noise(9, 7).quantize(8), "GIF", save_all=True, append_images=[noise(9, 7, 5).quantize(8)]),
    "colour.webp": encoded(noise(9, 7), "WEBP", lossless=True),
    "colour.bmp": encoded(noise(9, 7), "BMP"),
    "colour.ppm": encoded(noise(9, 7), "PPM"),
}


@pytest.mark.parametrize("name", FILES)
def test_decodes_as_pil_converts_to_rgb(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    with Image.open(path) as image:
        wanted = image.convert("RGB")
    found = images.decode(path)
    assert found.mode == "RGB"
    assert found.size == (9, 7)  # width and height as stored: an EXIF orientation is not applied
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    pixels = images.load(path, 7, 7, "bilinear")
    assert (pixels.shape, pixels.dtype) == ((7, 7, 3), np.uint8)


def test_a_lossless_image_comes_back_to_the_bit(tmp_path):
    noise(9, 7).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(images.decode(tmp_path / "a.png")), np.asarray(noise(9, 7)))
    np.testing.assert_array_equal(images.load(tmp_path / "a.png", 7, 7, "bilinear"), np.asarray(noise(9, 7))[:, 1:8])


# ---- resize and crop ----


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("resize", "crop"), [(256, 224), (232, 224), (224, 224), (32, 32), (33, 20), (7, 4), (8, 5), (20, 24), (21, 24), (15, 32)]
)
def test_resize_and_crop_are_torchvisions_to_the_bit(resize, crop, interpolation, tmp_path):
    # The reader of a checkpoint may name any preprocessing, also a crop beyond the image, which torchvision fills with black.
    theirs = Compose([Resize(resize, InterpolationMode(interpolation)), CenterCrop(crop)])
    small = [(1, 1), (1, 3), (3, 1), (2, 5), (64, 64), (65, 64), (37, 61), (300, 31), (31, 300), (resize, resize + 1)]
    sizes = small if resize < 100 else [(500, 375), (333, 500), (256, 256), (255, 257), (257, 300), (3, 40), (1, 1)]
    wrong = []
    for width, height in sizes:
        path = tmp_path / "image.png"
        noise(width, height).save(path)
        found = images.load(path, resize, crop, interpolation)
        if not np.array_equal(found, np.asarray(theirs(noise(width, height)))):
            wrong.append((width, height))
    assert wrong == []


def test_many_random_sizes_are_torchvisions_to_the_bit(tmp_path):
    draw = random.Random(0)
    path = tmp_path / "image.png"
    for _ in range(60):
        width, height, resize = draw.randint(1, 90), draw.randint(1, 90), draw.randint(2, 60)
        crop = draw.randint(1, resize)
        theirs = Compose([Resize(resize), CenterCrop(crop)])
        noise(width, height).save(path)
        found = images.load(path, resize, crop, "bilinear")
        np.testing.assert_array_equal(found, np.asarray(theirs(noise(width, height))), f"{width}x{height} {resize} {crop}")


def test_a_jpeg_goes_the_same_way_as_with_torchvision(tmp_path):
    noise(120, 90).save(tmp_path / "a.jpg")
    theirs = Compose([Resize(64), CenterCrop(56)])(Image.open(tmp_path / "a.jpg").convert("RGB"))
    np.testing.assert_array_equal(images.load(tmp_path / "a.jpg", 64, 56, "bilinear"), np.asarray(theirs))


def test_the_defaults_are_the_protocol():
    assert Preprocessing() == (256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# ---- what is refused, and in what words ----


def _whole() -> bytes:
    return encoded(noise(64, 64), "JPEG")


def _write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


BROKEN: dict[str, Callable[[Path], object]] = {
    "empty": _write(b""),
    "one-byte": _write(b"\xff"),
    "header-only": _write(_whole()[:20]),
    "cut-in-the-tables": _write(_whole()[:200]),
    "cut-in-the-middle": _write(_whole()[: len(_whole()) // 2]),
    "cut-near-the-end": _write(_whole()[:-200]),
    "cut-png": _write(encoded(noise(64, 64), "PNG")[:-3000]),
    "cut-gif": _write(encoded(noise(64, 64).quantize(64), "GIF")[:-1000]),
    "cut-webp": _write(encoded(noise(64, 64), "WEBP")[:-500]),
    "cut-tiff": _write(encoded(noise(64, 64), "TIFF")[:-500]),
    "cut-bmp": _write(encoded(noise(64, 64), "BMP")[:-500]),
    "text": _write(b"these are words, not an image\n" * 40),
    "html": _write(b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "zeros": _write(b"\0" * 5000),
    "bomb": _write(png_that_claims(60_000, 60_000)),
    "folder": Path.mkdir,
    "missing": lambda path: None,
    "dangling": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path),
    "line\nbreak": _write(b"words"),
    os.fsdecode(b"caf\xe9"): _write(b"words"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_read_is_refused_by_name(kind, tmp_path):
    path = tmp_path / f"{kind}.jpg"
    BROKEN[kind](path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadImages, match=r"cannot be read as an image: .+; restore or remove it") as refusal:
            images.decode(path)
        message = Pixels(ImageList(tmp_path, [path.name], [0]), Preprocessing(32, 32))[0]
    assert message == str(refusal.value)
    if kind.isascii() and kind.isprintable():
        assert f"{kind}.jpg" in message
    assert len(message.splitlines()) == 1, "one clear line, whatever the file is called"


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "a description of fifty characters and some more to cut"
    return exif.tobytes()


# What PIL has something to say about, by a warning or in its log, whether it then reads the file or not.
REMARKED: dict[str, bytes] = {
    "exif-cut": encoded(noise(9, 7), "JPEG", exif=_exif()[:-40]),
    "exif-of-nothing": encoded(noise(9, 7), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05"),
    "transparent-palette": encoded(noise(9, 7).quantize(16), "PNG", transparency=bytes([0, 100, 255])),
    "malformed-mpo": encoded(noise(9, 7), "MPO", save_all=True, append_images=[noise(9, 7)]).replace(b"MPF\0II", b"MPF\0XX"),
    "no-frames": encoded(noise(9, 7), "PNG", save_all=True, append_images=[noise(9, 7, 1)]).replace(
        b"acTL\0\0\0\2", b"acTL\0\0\0\0"
    ),
    "tag-too-large": encoded(noise(9, 7), "TIFF", description="y" * 30).replace(
        struct.pack("<HHI", 270, 2, 31), struct.pack("<HHI", 270, 2, 31_000)
    ),
    "nine-samples-a-pixel": encoded(noise(9, 7), "TIFF").replace(
        struct.pack("<HHIHH", 277, 3, 1, 3, 0), struct.pack("<HHIHH", 277, 3, 1, 9, 0)
    ),
    "large": encoded(noise(50, 40), "PNG"),
}


@pytest.fixture
def remarks(monkeypatch) -> Iterator[list[str]]:
    """What PIL says by warnings and log lines; it takes 1,500 pixels for large, and refuses more than 3,000."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("PIL"), "handlers", [handler])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: said.append(str(message))
        yield said


@pytest.mark.parametrize("kind", REMARKED)
def test_pils_own_remarks_do_not_stand_beside_ours(kind, remarks, tmp_path):
    path = tmp_path / "remarked.jpg"
    path.write_bytes(REMARKED[kind])
    wanted = None
    with contextlib.suppress(Exception), Image.open(path) as image:
        wanted = np.asarray(image.convert("RGB"))
    assert remarks, "PIL says nothing, so this proves nothing"
    remarks.clear()
    level = logging.getLogger("PIL").level
    if wanted is None:
        with pytest.raises(BadImages, match=r"remarked\.jpg cannot be read as an image"):
            images.decode(path)
    else:
        np.testing.assert_array_equal(np.asarray(images.decode(path)), wanted)
    assert remarks == []
    assert logging.getLogger("PIL").level == level
    warnings.warn("of somebody else", stacklevel=1)
    assert remarks == ["of somebody else"]


def test_beyond_pils_limit_a_file_is_refused(remarks, tmp_path):
    (tmp_path / "bomb.png").write_bytes(encoded(noise(60, 60), "PNG"))
    with pytest.raises(BadImages, match=r"bomb\.png cannot be read as an image: Image size \(3600 pixels\) exceeds limit of 3000"):
        images.decode(tmp_path / "bomb.png")
    assert remarks == []


def test_no_other_program_is_started_to_read_an_image(tmp_path, monkeypatch):
    # PIL hands PostScript to Ghostscript, by content, whatever the file is called.
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append("gs") or noise(9, 7).im)
    path = tmp_path / "photograph.jpg"
    path.write_bytes(encoded(noise(9, 7), "EPS"))
    with pytest.raises(BadImages, match=r"photograph\.jpg cannot be read as an image"):
        images.decode(path)
    assert started == []


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)

    def read() -> int:
        try:
            images.load(images.list_images(tmp_path).folder / "pipe.jpg", 32, 32, "bilinear")
        except BadImages as refusal:
            return int("pipe.jpg" not in str(refusal))
        return 1

    assert wait(fork(read, seconds=3)) == 0


def test_a_thread_of_an_image_takes_no_memory_that_it_does_not_warrant(tmp_path):
    # 1 x 60,000 pixels are allowed; their shorter side at 256 would make 256 x 15,360,000.
    path = tmp_path / "thread.png"
    Image.new("L", (1, 60_000)).save(path)

    def read() -> int:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
        try:
            return int(images.load(path, 256, 224, "bilinear").shape != (224, 224, 3))
        except BadImages as refusal:
            return int("thread.png cannot be read as an image" not in str(refusal))

    assert wait(fork(read)) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_file_never_gives_other_pixels(kind, tmp_path):
    whole = noise(40, 30).quantize(64) if kind == "GIF" else noise(40, 30)
    content = encoded(whole, kind)
    wanted = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    path = tmp_path / f"cut.{kind.lower()}"
    refused = 0
    for length in [*range(0, len(content), 1 + len(content) // 60), *range(len(content) - 12, len(content))]:
        path.write_bytes(content[:length])
        try:
            found = images.decode(path)
        except BadImages:
            refused += 1
        else:
            np.testing.assert_array_equal(np.asarray(found), wanted, f"cut at byte {length} of {len(content)}")
    assert refused >= 50


def test_a_file_that_vanished_after_listing_is_named(tmp_path):
    noise(9, 7).save(tmp_path / "a.png")
    noise(9, 7).save(tmp_path / "b.png")
    pixels = Pixels(images.list_images(tmp_path), Preprocessing(8, 8))
    (tmp_path / "b.png").unlink()
    assert len(pixels) == 2
    np.testing.assert_array_equal(pixels[0], images.load(tmp_path / "a.png", 8, 8, "bilinear"))
    assert "b.png cannot be read as an image: No such file" in pixels[1]


def test_pixels_follow_the_preprocessing(tmp_path):
    noise(50, 40).save(tmp_path / "a.png")
    theirs = Compose([Resize(36, InterpolationMode.BICUBIC), CenterCrop(32)])(noise(50, 40))
    found = Pixels(images.list_images(tmp_path), Preprocessing(36, 32, "bicubic"))[0]
    np.testing.assert_array_equal(found, np.asarray(theirs))


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: None, "set cannot be listed: No such file or directory; give a readable folder"),
    "file": (_write(b""), "set cannot be listed: Not a directory"),
    "empty": (Path.mkdir, r"set holds no images \(wanted files ending in .*\.jpg.*\); put images there"),
    "no-images": (lambda folder: touch(folder, ["a.txt", ".DS_Store", "._a.jpg", "labels/x.mat"]), "set holds no images"),
    "folder-named-x.jpg": (lambda folder: (folder / "x.jpg").mkdir(parents=True), "set holds no images"),
    "dangling-link": (
        lambda folder: (touch(folder, ["a.jpg"]), (folder / "b.jpg").symlink_to("nowhere")),
        "b.jpg cannot be read: No such file or directory; restore or remove it",
    ),
    "link-to-itself": (
        lambda folder: (touch(folder, ["a.jpg"]), (folder / "b.jpg").symlink_to("b.jpg")),
        r"b\.jpg.*symbolic links",
    ),
    "link-loop": (
        lambda folder: (touch(folder, ["c/a.jpg"]), (folder / "c" / "up").symlink_to(folder)),
        "c/up links back to a folder that holds it; remove that link",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_by_name(kind, tmp_path):
    make, message = FOLDERS[kind]
    make(tmp_path / "set")
    with pytest.raises(BadImages, match=message):
        images.list_images(tmp_path / "set")


@pytest.mark.parametrize("what", ["folder", "subfolder", "file"])
def test_no_permission(what, public_folder, unprivileged):
    touch(public_folder, ["set/sub/a.jpg"])
    folder = public_folder / "set"
    locked = {"folder": folder, "subfolder": folder / "sub", "file": folder / "sub" / "a.jpg"}[what]
    locked.chmod(0)
    unprivileged()
    message = f"{locked} cannot be .*: Permission denied; (give a readable folder|restore or remove it)"
    with pytest.raises(BadImages, match=message):
        images.decode(locked) if what == "file" else images.list_images(folder)


def test_gaussian_noise_has_the_moments_of_its_definition():
    """N(0.5, 1) clipped to [0, 1]: by symmetry the mean is 0.5; a share of 0.3085 of the values lies at each end."""
    noise = images.GaussianNoise(images.gaussian_list(3), images.Preprocessing(crop=150))
    assert len(noise) == 3
    pixels = np.stack([noise[i] for i in range(3)])
    assert pixels.shape == (3, 150, 150, 3)
    assert pixels.dtype == np.uint8
    assert pixels.mean() / 255 == pytest.approx(0.5, abs=0.005)
    assert np.mean(pixels == 0) == pytest.approx(0.3085, abs=0.005)
    assert np.mean(pixels == 255) == pytest.approx(0.3085, abs=0.005)
    assert not np.array_equal(pixels[0], pixels[1])
    np.testing.assert_array_equal(noise[1], pixels[1])
