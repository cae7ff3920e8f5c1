"""An .npz file in, its arrays out, in memory or mapped from the file; nothing is unpickled."""

import functools
import io
import math
import os
import struct
import zipfile
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.lib import format as npy

MAX_HEADER = 10_000  # NumPy's limit, which it checks only after it has read the header


class Member:
    """An array of an .npz. Its header is read, its values are not.

    Raises ValueError where there is no such array, where it holds Python objects, and where its
    values are not as many as its header says.
    """

    def __init__(self, path: str, archive: zipfile.ZipFile, name: str) -> None:
        self.path, self.archive = path, archive
        if f"{name}.npy" not in archive.namelist():
            others = ", ".join(other.removesuffix(".npy") for other in archive.namelist()[:10])
            raise ValueError(f"it holds no array {name!r}, but {others or 'nothing'}")
        self.info = archive.getinfo(f"{name}.npy")
        with archive.open(self.info) as file:
            header = io.BytesIO(file.read(MAX_HEADER))
        major, _ = npy.read_magic(header)
        read_header = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
        self.shape, is_fortran, self.dtype = read_header(header)
        self.order: Literal["F", "C"] = "F" if is_fortran else "C"
        self.start = header.tell()
        self.bytes = math.prod(self.shape) * self.dtype.itemsize
        if self.dtype.hasobject or self.start + self.bytes != self.info.file_size:
            raise ValueError(
                f"{name!r} should be {self.dtype}{self.shape}, but it has "
                f"{self.info.file_size - self.start:,} bytes"
            )

    def read(self) -> np.ndarray:
        """The values, in memory."""
        with self.archive.open(self.info) as file:
            values = np.frombuffer(file.read(), self.dtype, offset=self.start)
        return np.ndarray(self.shape, self.dtype, values, order=self.order)

    def opener(self, most_bytes: int) -> Callable[[], np.ndarray]:
        """A function that gives the values, mapped from the file where they are not compressed. It
        can be pickled. Raises ValueError for compressed values of more than `most_bytes`."""
        if self.info.compress_type == zipfile.ZIP_STORED:
            path = os.path.abspath(self.path)
            place = (path, self.dtype, "r", self._position(), self.shape, self.order)
            return functools.partial(np.memmap, *place)
        if self.bytes > most_bytes:
            raise ValueError(f"its compressed values would take {self.bytes:,} bytes of memory")
        return functools.partial(np.asarray, self.read())

    def _position(self) -> int:
        """Where the values begin in the file: before them are 30 bytes, which give the lengths of
        the name and of an extra field that follow, and the header."""
        with open(self.path, "rb") as file:
            file.seek(self.info.header_offset)
            name, extra = struct.unpack("<26x2H", file.read(30))
        return int(self.info.header_offset + 30 + name + extra + self.start)
