"""lhact.extraction.images against PIL and torchvision's own transforms."""

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
from lhact.extraction.images import BadImages
from lhact.records import Preprocessing


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("a.jpg a.JPEG a.Png a.jfif a.jpe a.avif a.jp2 a.webp a.tif a.pgm _.jpg a.b.tga", True),
        (".hidden.jpg ._a.jpg ._.JPEG .DS_Store .jpg desktop.ini Thumbs.db @eaDir", False),
        ("a.txt a.jpg.txt ajpg a.mat a.jpg~ a.jpg.part a.eps a.pdf a.pfm a.h5 a.mpg", False),
    ],
)
def test_what_counts_as_an_image(names, wanted):
    assert {name: images.is_image(name) for name in names.split()} == dict.fromkeys(
        names.split(), wanted
    )
    assert images.is_image("") is False


def test_extensions_are_those_of_pils_formats():
    registered = Image.registered_extensions()
    for extension, kind in images.EXTENSIONS.items():
        assert registered[extension] == ("MPO" if extension == ".mpo" else kind)
    assert {"JPEG", "PNG", "TIFF", "AVIF", "JPEG2000"} <= set(images.EXTENSIONS.values())


# ---- decoding ----


def _rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(9, 7), "JPEG", exif=exif.tobytes())


GREY = noise(9, 7, 1).getchannel(0)
PALETTE = noise(9, 7).quantize(16)
SUN = struct.pack(">8I", 0x59A66A95, 9, 7, 8, 70, 1, 0, 0) + np.random.default_rng(0).bytes(70)
FILES: dict[str, bytes] = {
    "rgb.jpg": encoded(noise(9, 7), "JPEG"),
    "grey.jpg": encoded(GREY, "JPEG"),
    "cmyk.jpg": encoded(noise(9, 7).convert("CMYK"), "JPEG"),
    "rotated-6.jpg": _rotated(6),
    "rotated-3.jpg": _rotated(3),
    "several.mpo": encoded(noise(9, 7), "MPO", save_all=True, append_images=[noise(9, 7, 1)]),
    "grey.png": encoded(GREY, "PNG"),
    "one-bit.png": encoded(GREY.convert("1"), "PNG"),
    "palette.png": encoded(PALETTE, "PNG"),
    "transparent-palette.png": encoded(PALETTE, "PNG", transparency=3),
    "rgba.png": encoded(Image.merge("RGBA", [*noise(9, 7).split(), GREY]), "PNG"),
    "grey-alpha.png": encoded(Image.merge("LA", [GREY, GREY]), "PNG"),
    "png-by-another-name.JPEG": encoded(noise(9, 7), "PNG"),
    "avif-by-another-name.jpg": encoded(noise(9, 7), "AVIF"),
    "jpeg-2000-by-another-name.jpg": encoded(noise(9, 7), "JPEG2000"),
    "sun.ras": SUN,  # PIL does not write it
    "no-extension": encoded(noise(9, 7), "PNG"),
    "animation.gif": encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]),
    "colour.webp": encoded(noise(9, 7), "WEBP", lossless=True),
    **{
        f"colour{images.FORMATS_BY_EXTENSION[kind][0]}": encoded(noise(9, 7), kind)
        for kind in ("DDS", "DIB", "ICO", "PCX", "QOI", "SGI", "TGA")
    },
    **{f"colour.{kind.lower()}": encoded(noise(9, 7), kind) for kind in ("BMP", "PPM", "TIFF")},
}


@pytest.mark.parametrize("name", FILES)
def test_decodes_as_pil_converts_to_rgb(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    with Image.open(path) as image:
        wanted = image.convert("RGB")
    found = images.decode(path)
    assert (found.mode, found.size) == ("RGB", (9, 7))  # as stored: EXIF turns nothing
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    assert images.size(path) == (9, 7)
    pixels = images.load(path, Preprocessing(7, 7))
    assert (pixels.shape, pixels.dtype) == ((7, 7, 3), np.uint8)


SIXTEEN_BIT = np.random.default_rng(0).integers(0, 2**16, (7, 9)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_of_16_bit_grey_values_the_high_byte_counts(kind, tmp_path):
    path = tmp_path / f"grey{images.FORMATS[kind][0]}"
    path.write_bytes(encoded(Image.fromarray(SIXTEEN_BIT), kind))
    found = np.asarray(images.decode(path))
    np.testing.assert_array_equal(found, np.repeat(SIXTEEN_BIT[..., None] // 256, 3, axis=2))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(Image.fromarray(np.ones((7, 9), np.float32)), "TIFF"), "floating-point values"),
        (encoded(Image.fromarray(np.ones((7, 9), np.int32)), "TIFF"), "32-bit values stand for"),
        (
            encoded(Image.fromarray(SIXTEEN_BIT), "TIFF").replace(  # white is zero
                struct.pack("<HHI2H", 262, 3, 1, 1, 0), struct.pack("<HHI2H", 262, 3, 1, 0, 0)
            ),
            "16-bit values stand for",
        ),
        (encoded(Image.fromarray(SIXTEEN_BIT % 256), "PNG"), "end at 25., which is black"),
    ],
)
def test_values_of_no_known_range_are_refused(content, reason, tmp_path):
    (tmp_path / "grey.tif").write_bytes(content)
    with pytest.raises(BadImages, match=rf"grey\.tif .*{reason}.*; convert it to 8 bits$"):
        images.decode(tmp_path / "grey.tif")


def test_a_black_16_bit_image_is_black(tmp_path):
    Image.fromarray(np.zeros((7, 9), np.uint16)).save(tmp_path / "black.png")
    assert not np.asarray(images.decode(tmp_path / "black.png")).any()


# ---- resize and crop ----

SETTINGS = [(256, 224), (232, 224), (224, 224), (32, 32), (33, 20), (7, 4), (8, 5)]
BEYOND = [(20, 24), (21, 24), (15, 32)]  # torchvision fills a crop beyond the image with black


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(("resize", "crop"), [*SETTINGS, *BEYOND, (0, 32), (0, 61)])
def test_resize_and_crop_are_torchvisions_to_the_bit(resize, crop, interpolation):
    theirs = Compose(
        [Resize(resize, InterpolationMode(interpolation))] * (resize > 0) + [CenterCrop(crop)]
    )
    sizes = [(1, 1), (1, 3), (3, 1), (2, 5), (64, 64), (65, 64), (37, 61), (300, 31), (31, 300)]
    if resize >= 100:
        sizes = [(500, 375), (333, 500), (256, 256), (255, 257), (257, 300), (3, 40), (1, 1)]
    draw = random.Random(resize)
    sizes += [(draw.randint(1, 90), draw.randint(1, 90)) for _ in range(10)]
    preprocessing = Preprocessing(resize, crop, interpolation)
    wrong = [
        size
        for size in [*sizes, (resize or 9, resize + 1)]
        if not np.array_equal(
            images.resize_and_crop(noise(*size), preprocessing, "it"),
            np.asarray(theirs(noise(*size))),
        )
    ]
    assert wrong == []


# ---- what is refused, and in what words ----

WHOLE = encoded(noise(64, 64), "JPEG")


def _write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


BROKEN: dict[str, Callable[[Path], object]] = {
    "empty": _write(b""),
    "one-byte": _write(b"\xff"),
    "header-only": _write(WHOLE[:20]),
    "cut-in-the-tables": _write(WHOLE[:200]),
    "cut-in-the-middle": _write(WHOLE[: len(WHOLE) // 2]),
    "text": _write(b"these are words, not an image\n" * 40),
    "html": _write(b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "zeros": _write(b"\0" * 5000),
    "bomb": _write(png_that_claims(60_000, 60_000)),
    "tga-by-another-name": _write(encoded(noise(9, 7), "TGA")),
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
    message = r"cannot be read as an image: .+; restore it or leave it out$"
    with pytest.raises(BadImages, match=message) as refusal:
        images.decode(path)
    if kind.isascii() and kind.isprintable():
        assert f"{kind}.jpg" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1, "one line, whatever the file is called"


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    with open(tmp_path / "huge.tif", "wb") as file:
        file.truncate(2**31 + 1)  # takes no room on disk
    with pytest.raises(BadImages, match=r"huge\.tif .*2,147,483,649 bytes, more than any image"):
        images.decode(tmp_path / "huge.tif")


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "a description of fifty characters and some more to cut"
    return exif.tobytes()


# What PIL has something to say about, by a warning or in its log, whether it then reads the file
# or not.
REMARKED: dict[str, bytes] = {
    "exif-cut": encoded(noise(9, 7), "JPEG", exif=_exif()[:-40]),
    "exif-of-nothing": encoded(noise(9, 7), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05"),
    "transparent-palette": encoded(PALETTE, "PNG", transparency=bytes([0, 100, 255])),
    "malformed-mpo": FILES["several.mpo"].replace(b"MPF\0II", b"MPF\0XX"),
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
    """What PIL says by warnings and log lines; it takes 1,500 pixels for large, and refuses more
    than 3,000."""
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
        images.size(path)
    assert remarks == []
    assert logging.getLogger("PIL").level == level
    warnings.warn("of somebody else", stacklevel=1)
    assert remarks == ["of somebody else"]


def test_beyond_pils_limit_a_file_is_refused(remarks, tmp_path):
    (tmp_path / "bomb.png").write_bytes(encoded(noise(60, 60), "PNG"))
    reason = r"bomb\.png .*: Image size \(3600 pixels\) exceeds limit of 3000"
    with pytest.raises(BadImages, match=reason):
        images.decode(tmp_path / "bomb.png")
    assert remarks == []


@pytest.mark.parametrize("name", ["photograph.jpg", "photograph.eps"])
def test_no_other_program_is_started_to_read_an_image(name, tmp_path, monkeypatch):
    # PIL hands PostScript to Ghostscript, by content, whatever the file is called.
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append("gs"))
    (tmp_path / name).write_bytes(encoded(noise(9, 7), "EPS"))
    with pytest.raises(BadImages, match=r"it is in none of the formats JPEG, PNG, "):
        images.decode(tmp_path / name)
    assert started == []


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")

    def read() -> int:
        for function in (images.decode, images.size):
            with pytest.raises(BadImages, match=r"pipe\.jpg"):
                function(tmp_path / "pipe.jpg")
        return 0

    assert wait(fork(read, seconds=3)) == 0


def test_a_thread_of_an_image_takes_no_memory_that_it_does_not_warrant(tmp_path):
    # 1 x 60,000 pixels are allowed; their shorter side at 256 would make 256 x 15,360,000.
    Image.new("L", (1, 60_000)).save(tmp_path / "thread.png")

    def read() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + 2**31
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(BadImages, match=r"thread\.png .* 1 x 60000 pixels are too thin"):
            images.load(tmp_path / "thread.png", Preprocessing())
        return 0

    assert wait(fork(read)) == 0


@pytest.mark.parametrize("kind", [*images.FORMATS, *images.FORMATS_BY_EXTENSION])
def test_a_truncated_file_never_gives_other_pixels(kind):
    whole = noise(40, 30).quantize(64) if kind == "GIF" else noise(40, 30)
    content = SUN if kind == "SUN" else encoded(whole, kind)
    wanted = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    extension = next(name for name, own in images.EXTENSIONS.items() if own == kind)
    refused = 0
    end = len(content)
    for length in [*range(0, end, 1 + end // 60), *range(end - 12, end)]:
        try:
            found = images.decode(f"cut{extension}", content[:length])
        except BadImages:
            refused += 1
        else:
            np.testing.assert_array_equal(np.asarray(found), wanted, f"{length} of {end}")
    assert refused >= 50
