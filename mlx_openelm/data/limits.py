"""Limits of files with text: the length of a line, and what a small file may unpack to."""

import io
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..errors import DataError

LONGEST_TEXT = 1 << 28  # characters of a line, or of a file that must be read whole
PARQUET_ROWS = 128  # to read at a time
BYTES_OF_ROW = 32  # that a row counts, besides its values
_ANY_UNPACKED_BYTES = 1 << 26  # are allowed, however small the file
_PACKED_BYTES = 512  # to unpack at a time; a frame can hold 128 kB in 4 bytes
_LARGEST_RATIO = 100  # of unpacked to packed bytes; of real text, it is below 20


def text_lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a text file.

    Raises:
        DataError: naming the line, if one is longer than 256 MiB or contains a NUL character.
    """
    for number in count(1):
        line = file.readline(LONGEST_TEXT + 1)
        if not line:
            return
        if len(line) > LONGEST_TEXT:
            raise DataError(f"{path}, line {number}: longer than {LONGEST_TEXT:,} characters")
        if "\0" in line:
            raise DataError(f"{path}, line {number}: contains a NUL character; expected text in UTF-8")
        yield line


class UnpackedLimit:
    """How much a file may unpack to, so that a small file cannot fill the memory."""

    def __init__(self, path: Path):
        self._path = path
        self._bytes_left = max(_ANY_UNPACKED_BYTES, _LARGEST_RATIO * path.stat().st_size)

    def add(self, num_bytes: int) -> None:
        """Count unpacked bytes; raises DataError if they are too many."""
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise DataError(
                f"{self._path} unpacks to more than {_LARGEST_RATIO} times its size; unpack it first if that is right"
            )


class ZstandardFrames(io.RawIOBase):
    """Unpacks one frame after another; `zstandard`'s own reader takes an incomplete last frame for the end.

    Raises:
        EOFError: when it is read, if the file ends within a frame.
    """

    def __init__(self, file: BinaryIO, zstandard: Any):
        super().__init__()
        self._file = file
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        """Whether the stream can be read; it can."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; returns the number of bytes."""
        while not self._unpacked:
            self._packed = self._packed or self._file.read(_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends within a compressed frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._unpacked, self._packed = memoryview(self._frame.decompress(self._packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size


class Unpacked(io.RawIOBase):
    """The bytes from a decompressor, up to a limit."""

    def __init__(self, raw: Any, path: Path):
        super().__init__()
        self._raw = raw
        self._limit = UnpackedLimit(path)

    def readable(self) -> bool:
        """Whether the stream can be read; it can."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; returns the number of bytes."""
        size: int = self._raw.readinto(buffer)
        self._limit.add(size)
        return size
