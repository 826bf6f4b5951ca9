"""PyTorch files (`.pt`, `.pth`, `.bin`) without PyTorch.

`torch.save` writes a zip file: `data.pkl` describes a value, and each storage of numbers is an uncompressed record
`data/KEY`. The description is interpreted by `torch_pickle`, the numbers are read from their place in the file.
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

from ...errors import TorchFileError
from ...tensors import LazyTensor, from_numpy
from .torch_pickle import TensorRecord, read_pickle

_PREFIXES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of PyTorch's wrappers
_MODEL_KEYS = ("model_state_dict", "state_dict", "model", "module", "ema_model_state_dict", "ema")
_FLOATS = {
    "float32": (4, mx.float32),
    "float16": (2, mx.float16),
    "bfloat16": (2, mx.bfloat16),
    "float64": (8, mx.float32),
}
_NUMPY = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8"}  # bfloat16 by its bits
_LOCAL_HEADER_BYTES = 30
_CHUNK_BYTES = 1 << 20
_LARGEST_DEPTH = 8  # of dictionaries in which the model may lie


def read_torch_file(path: Path) -> dict[str, LazyTensor]:
    """Floating-point tensors of the model in a file that `torch.save` wrote, by name; nothing in it is run.

    The model is the file's value itself or lies in a training checkpoint: under a usual name (`model_state_dict`,
    `state_dict`, `model` ...), else it is the dictionary with the most tensors. Prefixes that PyTorch's wrappers put
    before names are dropped. Buffers of integers are left out, float64 is read as float32.

    Raises:
        TorchFileError: if the file is damaged, of another format, or asks for more than tensors.
    """
    try:
        archive = _open(path)
        records = _find_model(read_pickle(_pickle(archive)))
        tensors = {}
        for name, record in records.items():
            if record.storage.dtype not in _FLOATS:
                continue
            plain = _without_prefixes(name)
            if plain in tensors:
                raise TorchFileError(f"holds {plain} twice")
            tensors[plain] = _lazy(archive, name, record)
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error
    except OSError as error:
        raise TorchFileError(f"{path} cannot be read: {error.strerror or error}") from error
    return tensors


@dataclass
class _Archive:
    """The records of a file, by name without the archive's own folder: where they start, their size and checksum."""

    path: Path
    entries: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)

    def read(self, name: str) -> bytes:
        """A whole small record."""
        start, size, _ = self.entries[name]
        self.check(name)
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(size)

    def check(self, name: str) -> None:
        """Compare a record with its checksum, the first time that it is asked for."""
        if name in self.checked:
            return
        start, size, expected = self.entries[name]
        crc = 0
        with open(self.path, "rb") as file:
            file.seek(start)
            while size > 0:
                chunk = file.read(min(size, _CHUNK_BYTES))
                if not chunk:
                    break
                crc = zlib.crc32(chunk, crc)
                size -= len(chunk)
        if size or crc != expected:
            raise TorchFileError(f"is damaged: the checksum of its record {name} is wrong; download it again")
        self.checked.add(name)


def _open(path: Path) -> _Archive:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(512)
        if not start.startswith(b"PK"):
            raise TorchFileError(_what_it_is(start))
        try:
            infos = zipfile.ZipFile(file).infolist()
        except Exception as error:  # zipfile lets errors of all kinds through for damaged directories
            raise TorchFileError("is damaged or incomplete: it has no table of contents; download it again") from error
        archive = _Archive(path)
        for info in infos:
            _, _, name = info.filename.partition("/")
            if not name or info.filename.endswith("/"):
                continue
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise TorchFileError(f"its record {name} is compressed, which PyTorch never does")
            if name in archive.entries:
                raise TorchFileError(f"is damaged: it holds the record {name} twice")
            header = b""
            if 0 <= info.header_offset < size:
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER_BYTES)
            if header[:4] != b"PK\x03\x04" or len(header) < _LOCAL_HEADER_BYTES:
                raise TorchFileError(f"is damaged: its record {name} is not where it should be; download it again")
            begin = info.header_offset + _LOCAL_HEADER_BYTES
            begin += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            if info.file_size != info.compress_size or begin + info.file_size > size:
                raise TorchFileError(f"is damaged or incomplete: its record {name} ends behind it; download it again")
            archive.entries[name] = begin, info.file_size, info.CRC
    if "constants.pkl" in archive.entries:
        raise TorchFileError("is a TorchScript program; save its state_dict() with torch.save instead")
    if "data.pkl" not in archive.entries:
        raise TorchFileError("is a zip file, but not one that torch.save wrote: it holds no data.pkl")
    if "byteorder" in archive.entries and archive.read("byteorder") != b"little":
        raise TorchFileError("was written on a big-endian machine; save it anew on another one")
    return archive


def _pickle(archive: _Archive) -> bytes:
    return archive.read("data.pkl")


def _what_it_is(start: bytes) -> str:
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself; `git lfs pull` fetches it"
    if start.lstrip()[:1] == b"<":
        return "is a page of HTML and not a PyTorch file; download it again"
    if start[8:9] == b"{":
        return "looks like a safetensors file; give its folder instead"
    if start[:1] == b"\x80":
        return "is in the format of PyTorch before 1.6; load it with PyTorch and save it anew with torch.save"
    return "is not a PyTorch file, or is damaged from its first byte on"


def _find_model(value: Any) -> dict[str, TensorRecord]:
    """The tensors of the dictionary that is the model."""
    tables = list(_tables(value))
    if not tables:
        raise TorchFileError("holds no tensors by name")
    for key in _MODEL_KEYS:
        for place, tensors in tables:
            if place and place[-1] == key:
                return tensors
    return max(tables, key=lambda table: len(table[1]))[1]


def _tables(value: Any) -> Iterator[tuple[tuple[str, ...], dict[str, TensorRecord]]]:
    """Dictionaries with tensors, outer ones first, each with the keys that lead to it."""
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


def _without_prefixes(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _PREFIXES)


def _lazy(archive: _Archive, name: str, record: TensorRecord) -> LazyTensor:
    entry = f"data/{record.storage.key}"
    if entry not in archive.entries:
        raise TorchFileError(f"is damaged: the values of {name} are missing")
    size, dtype = _FLOATS[record.storage.dtype]
    available = archive.entries[entry][1] // size
    numel = prod(record.shape)
    if numel:
        last = record.offset + sum((n - 1) * s for n, s in zip(record.shape, record.strides, strict=True))
        if last >= available or numel > available:
            raise TorchFileError(f"is damaged: {name} of shape {record.shape} reaches beyond its values")
    return LazyTensor(record.shape, dtype, partial(_read_rows, archive, name, entry, record))


def _read_rows(archive: _Archive, name: str, entry: str, record: TensorRecord, start: int, stop: int) -> mx.array:
    """Rows of a tensor: of its record, only the span that they lie in."""
    size, dtype = _FLOATS[record.storage.dtype]
    shape = (stop - start, *record.shape[1:]) if record.shape else ()
    if prod(shape) == 0:
        return mx.zeros(shape, dtype)
    first = record.offset + (start * record.strides[0] if shape else 0)
    span = 1 + sum((n - 1) * s for n, s in zip(shape, record.strides, strict=True))
    try:
        archive.check(entry)
        with open(archive.path, "rb") as file:
            file.seek(archive.entries[entry][0] + first * size)
            values = np.fromfile(file, _NUMPY[record.storage.dtype], span)
    except TorchFileError as error:
        raise TorchFileError(f"{archive.path}: {error}") from error
    except OSError as error:
        raise TorchFileError(f"{archive.path} cannot be read: {error.strerror or error}") from error
    if values.size != span:
        raise TorchFileError(f"{archive.path} became shorter while it was read")
    strides = tuple(stride * size for stride in record.strides)
    strided = np.lib.stride_tricks.as_strided(values, shape, strides, writeable=False)
    return from_numpy(np.ascontiguousarray(strided, np.float32 if size == 8 else None).reshape(shape), dtype, name)
