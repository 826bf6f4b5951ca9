"""Tensors that stay on disk until they are needed, and the safetensors files they are read from and written to.

A checkpoint is a `dict[str, LazyTensor]`: renaming is a dict comprehension, averaging or cutting rows is a new
`LazyTensor` around the old ones, and no more than what is being looked at stands in memory.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from .errors import OutputError, WeightsError

# The names that safetensors gives to the types that weights of a language model come in.
SAFETENSORS_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_LARGEST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and type whose values are read by `read()`, anew at each call."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return prod(self.shape) * self.dtype.size

    def map(
        self,
        function: Callable[[mx.array], mx.array],
        shape: tuple[int, ...] | None = None,
        dtype: mx.Dtype | None = None,
    ) -> "LazyTensor":
        """The tensor that `function` makes of this one; say what shape and type it has if they change."""
        return LazyTensor(shape or self.shape, dtype or self.dtype, lambda: function(self.read()))


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a safetensors file by name; only the header is read now.

    Raises:
        WeightsError: if the header and the length of the file do not agree, or a type is not one of weights.
    """
    try:
        header = _read_header(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    arrays = _Arrays(path)
    return {name: LazyTensor(shape, dtype, partial(arrays.take, name)) for name, (shape, dtype) in header.items()}


class _Arrays:
    """Unread arrays of one file, each given away once, so that no values stay behind; then the file is opened anew."""

    def __init__(self, path: Path):
        self._path = path
        self._arrays: dict[str, mx.array] = {}

    def take(self, name: str) -> mx.array:
        if name not in self._arrays:
            self._arrays = mx.load(str(self._path))  # type: ignore[assignment]
        return self._arrays.pop(name)


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    def damaged(what: str) -> WeightsError:
        return WeightsError(f"{path} is damaged or incomplete: {what}; download or convert it again")

    with open(path, "rb") as file:
        file_bytes = path.stat().st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(file_bytes - 8, _LARGEST_HEADER_BYTES):
            raise damaged(f"a header of {header_bytes:,} bytes in a file of {file_bytes:,}")
        raw = file.read(header_bytes)
    try:
        entries = json.loads(raw)
    except ValueError as error:
        raise damaged("its header is not JSON") from error
    if not isinstance(entries, dict):
        raise damaged("its header is not a table of tensors")

    header = {}
    end = 0
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            dtype_name, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            well_formed = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        except (TypeError, KeyError, ValueError):
            well_formed = False
        if not well_formed:
            raise damaged(f"the entry of {name} in its header is malformed")
        dtype = SAFETENSORS_DTYPES.get(dtype_name)
        if dtype is None:
            raise WeightsError(f"{path}: {name} has the type {dtype_name}; weights are {', '.join(SAFETENSORS_DTYPES)}")
        if stop - start != prod(shape) * dtype.size or header_bytes + 8 + stop > file_bytes:
            raise damaged(f"{name} should take bytes {start:,} to {stop:,} after the header")
        header[name] = shape, dtype
        end = max(end, stop)
    if header_bytes + 8 + end != file_bytes:
        raise damaged(f"it has {file_bytes:,} bytes and its tensors end at {header_bytes + 8 + end:,}")
    return header


def write_safetensors(
    file: BinaryIO,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    on_written: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """Write a safetensors file, reading one tensor at a time.

    The header follows from shapes and types alone, so it can stand in front before any value was read. Peak memory is
    the largest tensor with whatever its `read` takes.

    Args:
        metadata: texts to keep in the header; readers of MLX look for `{"format": "mlx"}`.
        on_written: called with each tensor's name and size in bytes once it is in the file.
    Raises:
        OutputError: if the disk is full or the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    try:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, tensor in tensors.items():
            values = tensor.read()
            assert values.shape == tensor.shape, f"{name} was planned as {tensor.shape} and came as {values.shape}"
            assert values.dtype == tensor.dtype, f"{name} was planned as {tensor.dtype} and came as {values.dtype}"
            file.write(as_bytes(values))
            on_written(name, tensor.nbytes)
            del values
    except OSError as error:
        raise OutputError(
            f"{getattr(file, 'name', 'the file')} cannot be written: {error.strerror or error}"
        ) from error


def as_bytes(array: mx.array) -> memoryview:
    """The bytes of an array in row-major order, without a copy where its layout allows."""
    return memoryview(np.asarray(mx.contiguous(array).reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]
