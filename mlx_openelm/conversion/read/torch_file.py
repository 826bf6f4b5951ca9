"""PyTorch files (`.pt`, `.pth`, `.bin`) without PyTorch.

`torch.save` writes a zip file: `data.pkl` describes an object, and each tensor storage is an uncompressed record
`data/KEY`. `torch_pickle` interprets the description; values are read from their offset in the file.
"""

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import TorchFileError, readable
from ...file_values import from_numpy
from ...files.paths import open_regular
from ...tensors import LazyTensor, is_buffer
from ..source import plain_name
from .torch_pickle import TensorRecord, read_pickle

_MODEL_KEYS = ("model_state_dict", "state_dict", "model", "module", "ema_model_state_dict", "ema")
# As read, and as stored (bfloat16 as its bits).
_DTYPES = {
    "float64": (mx.float32, "<f8"),
    "float32": (mx.float32, "<f4"),
    "float16": (mx.float16, "<f2"),
    "bfloat16": (mx.bfloat16, "<u2"),
    "complex128": (mx.complex64, "<c16"),
    "complex64": (mx.complex64, "<c8"),
    "int64": (mx.int64, "<i8"),
    "int32": (mx.int32, "<i4"),
    "int16": (mx.int16, "<i2"),
    "int8": (mx.int8, "i1"),
    "uint8": (mx.uint8, "u1"),
    "bool": (mx.bool_, "?"),
}
_LOCAL_HEADER_BYTES = 30
_CHUNK_BYTES = 1 << 20
_LARGEST_DEPTH = 8  # of nested dictionaries to search for the model


def read_torch_file(path: Path) -> dict[str, LazyTensor]:
    """Read the weights of a model from a file written by `torch.save`, without running any of its code.

    The model is the saved object itself or part of a training checkpoint: a dictionary under a common key
    (`model_state_dict`, `state_dict`, `model` ...), else the dictionary with the most tensors. Name prefixes added by
    PyTorch's wrappers are dropped. Buffers are left out; float64 is read as float32.

    Returns:
        Tensors by name; their values are read later.
    Raises:
        TorchFileError: if the file is damaged, in another format, or needs more than tensors.
    """
    try:
        archive = _open(path)
        records = _find_model(read_pickle(_pickle(archive)))
        tensors = {}
        for name, record in records.items():
            plain = plain_name(name)
            if is_buffer(plain, _DTYPES[record.storage.dtype][0]):
                continue
            if plain in tensors:
                raise TorchFileError(f"contains {readable(plain)} twice")
            tensors[plain] = _lazy(archive, name, record)
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error
    except OSError as error:
        raise TorchFileError(f"{path} cannot be read: {error.strerror or error}") from error
    return tensors


@dataclass
class _Archive:
    """Offset, size and CRC-32 of each record of a file, by name without the archive's top folder."""

    path: Path
    entries: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)

    def read(self, name: str) -> bytes:
        """Read a whole record; for small ones."""
        start, size, _ = self.entries[name]
        self.check(name)
        with open_regular(self.path) as file:
            file.seek(start)
            return file.read(size)

    def check(self, name: str) -> None:
        """Verify the checksum of a record on its first use."""
        if name in self.checked:
            return
        start, size, expected = self.entries[name]
        crc = 0
        with open_regular(self.path) as file:
            file.seek(start)
            while size > 0:
                chunk = file.read(min(size, _CHUNK_BYTES))
                if not chunk:
                    break
                crc = zlib.crc32(chunk, crc)
                size -= len(chunk)
        if size or crc != expected:
            raise TorchFileError(f"damaged: the checksum of record {name} is wrong; download the file again")
        self.checked.add(name)


def _open(path: Path) -> _Archive:
    size = path.stat().st_size
    with open_regular(path) as file:
        start = file.read(512)
        if not start.startswith(b"PK"):
            raise TorchFileError(_what_it_is(start))
        try:
            infos = zipfile.ZipFile(file).infolist()
        except Exception as error:  # zipfile raises errors of any type for a damaged directory
            raise TorchFileError("damaged or incomplete: no table of contents; download the file again") from error
        archive = _Archive(path)
        for info in infos:
            _, _, name = info.filename.partition("/")
            if not name or info.filename.endswith("/"):
                continue
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise TorchFileError(f"record {name} is compressed, which PyTorch never does")
            if name in archive.entries:
                raise TorchFileError(f"damaged: record {name} exists twice")
            header = b""
            if 0 <= info.header_offset < size:
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER_BYTES)
            if header[:4] != b"PK\x03\x04" or len(header) < _LOCAL_HEADER_BYTES:
                raise TorchFileError(f"damaged: record {name} is not where it should be; download the file again")
            begin = info.header_offset + _LOCAL_HEADER_BYTES
            begin += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            if info.file_size != info.compress_size or begin + info.file_size > size:
                raise TorchFileError(
                    f"damaged or incomplete: record {name} extends past the end of the file; download it again"
                )
            archive.entries[name] = begin, info.file_size, info.CRC
    if "constants.pkl" in archive.entries:
        raise TorchFileError("this is a TorchScript program; save its state_dict() with torch.save instead")
    if "data.pkl" not in archive.entries:
        raise TorchFileError("this zip file was not written by torch.save: it has no data.pkl")
    if "byteorder" in archive.entries and archive.read("byteorder") != b"little":
        raise TorchFileError("this file was written on a big-endian machine; save it again on a little-endian one")
    return archive


def _pickle(archive: _Archive) -> bytes:
    return archive.read("data.pkl")


def _what_it_is(start: bytes) -> str:
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "this is an HTML page, not a PyTorch file; download it again"
    if start[8:9] == b"{":
        return "this looks like a safetensors file; pass its folder instead"
    if start[:1] == b"\x80":
        return "the format is that of PyTorch before 1.6; load the file with PyTorch and save it again with torch.save"
    return "this is not a PyTorch file, or its first bytes are damaged"


def _find_model(value: Any) -> dict[str, TensorRecord]:
    """Find the dictionary that is the model; returns its tensors."""
    tables = list(_tables(value))
    if not tables:
        raise TorchFileError("the file contains no named tensors")
    for key in _MODEL_KEYS:
        for place, tensors in tables:
            if place and place[-1] == key:
                return tensors
    return max(tables, key=lambda table: len(table[1]))[1]


def _tables(value: Any) -> Iterator[tuple[tuple[str, ...], dict[str, TensorRecord]]]:
    """All dictionaries with tensors, outer ones first, each with its path of keys."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while waiting:
        place, table = waiting.pop(0)
        if not isinstance(table, dict) or id(table) in seen or len(place) > _LARGEST_DEPTH:
            continue
        seen.add(id(table))
        tensors = {k: v for k, v in table.items() if isinstance(k, str) and isinstance(v, TensorRecord)}
        if tensors:
            yield place, tensors
        waiting += [((*place, key), inner) for key, inner in table.items() if isinstance(key, str)]


def _lazy(archive: _Archive, name: str, record: TensorRecord) -> LazyTensor:
    entry = f"data/{record.storage.key}"
    if entry not in archive.entries:
        raise TorchFileError(f"damaged: the values of {name} are missing")
    dtype, stored = _DTYPES[record.storage.dtype]
    size = np.dtype(stored).itemsize
    available = archive.entries[entry][1] // size
    numel = prod(record.shape)
    if numel:
        last = record.offset + sum((n - 1) * s for n, s in zip(record.shape, record.strides, strict=True))
        if last >= available or numel > available:
            raise TorchFileError(f"damaged: {name} of shape {record.shape} needs more values than are stored")
    return LazyTensor(record.shape, dtype, partial(_read_rows, archive, name, entry, record))


def _read_rows(archive: _Archive, name: str, entry: str, record: TensorRecord, start: int, stop: int) -> mx.array:
    """Read rows `start` to `stop` (excluded) of a tensor, and only the part of its record that contains them."""
    dtype, stored = _DTYPES[record.storage.dtype]
    size = np.dtype(stored).itemsize
    shape = (stop - start, *record.shape[1:]) if record.shape else ()
    if prod(shape) == 0:
        return mx.zeros(shape, dtype)
    first = record.offset + (start * record.strides[0] if shape else 0)
    span = 1 + sum((n - 1) * s for n, s in zip(shape, record.strides, strict=True))
    try:
        archive.check(entry)
        with open_regular(archive.path) as file:
            file.seek(archive.entries[entry][0] + first * size)
            values = np.fromfile(file, stored, span)
    except TorchFileError as error:
        raise TorchFileError(f"{archive.path}: {error}") from error
    except OSError as error:
        raise TorchFileError(f"{archive.path} cannot be read: {error.strerror or error}") from error
    if values.size != span:
        raise TorchFileError(f"{archive.path} was truncated while it was read")
    strides = tuple(stride * size for stride in record.strides)
    strided = np.lib.stride_tricks.as_strided(values, shape, strides, writeable=False)
    return from_numpy(np.ascontiguousarray(strided).reshape(shape), dtype, name)
