"""Tensors that stay on disk until they are needed, and the safetensors files they are read from and written to.

A checkpoint is a `dict[str, LazyTensor]`: renaming is a dict comprehension, averaging or cutting rows is a new
`LazyTensor` around the old ones. Values are read by rows, so that no more than a few blocks of them stand in memory.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import prod
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from .errors import WeightsError
from .machine.device import compute_streams

# The names that safetensors gives to the types that weights of a language model come in.
SAFETENSORS_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_NUMPY_DTYPES = {mx.float32: "<f4", mx.float16: "<f2", mx.bfloat16: "<u2", mx.uint32: "<u4", mx.uint8: "u1"}
_EXPONENT_BITS = {mx.float16: 0x7C00, mx.bfloat16: 0x7F80}  # all of them set: NaN or infinity
_LARGEST_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 1 << 20  # fits into caches, and is reused rather than given back


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and type whose values are read when they are asked for, anew each time."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read_rows: Callable[[int, int], mx.array]  # those from the first to before the second number, along the first axis

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return prod(self.shape) * self.dtype.size

    @property
    def num_rows(self) -> int:
        """Length of the first axis; 1 for a single number."""
        return self.shape[0] if self.shape else 1

    def read(self) -> mx.array:
        """All values."""
        return self.read_rows(0, self.num_rows)

    def map(self, function: Callable[[mx.array], mx.array], dtype: mx.Dtype | None = None) -> "LazyTensor":
        """The tensor that `function` makes of this one, row by row; say what type it has if that changes."""
        return LazyTensor(self.shape, dtype or self.dtype, lambda start, stop: function(self.read_rows(start, stop)))

    def first_rows(self, count: int) -> "LazyTensor":
        """The tensor without the rows behind the first `count`."""
        return LazyTensor((count, *self.shape[1:]), self.dtype, self.read_rows)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows, of some megabytes each, that together are the tensor."""
        rows = max(1, _BLOCK_BYTES * self.num_rows // max(self.nbytes, 1))
        for start in range(0, self.num_rows, rows):
            yield start, min(start + rows, self.num_rows)


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a safetensors file by name; only the header is read now.

    Raises:
        WeightsError: if the header and the length of the file do not agree, or a type is not one of weights; when
            values are read, if they hold NaN or infinity.
    """
    try:
        header = _read_header(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    return {
        name: LazyTensor(shape, dtype, partial(_read_rows, path, name, shape, dtype, offset))
        for name, (shape, dtype, offset) in header.items()
    }


def _read_rows(
    path: Path, name: str, shape: tuple[int, ...], dtype: mx.Dtype, offset: int, start: int, stop: int
) -> mx.array:
    row = prod(shape[1:])
    try:
        with open(path, "rb") as file:
            file.seek(offset + start * row * dtype.size)
            values = np.fromfile(file, _NUMPY_DTYPES[dtype], (stop - start) * row)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    if values.size != (stop - start) * row:
        raise WeightsError(f"{path} became shorter while it was read")
    return from_numpy(values.reshape(stop - start, *shape[1:]) if shape else values.reshape(()), dtype, name)


def from_numpy(values: np.ndarray, dtype: mx.Dtype, name: str) -> mx.array:
    """Values from a file as an array; those of bfloat16, which NumPy has not, come as their bits.

    Raises:
        WeightsError: naming the tensor, if they hold NaN or infinity.
    """
    if dtype in _EXPONENT_BITS:
        bits = values.view(np.uint16) & _EXPONENT_BITS[dtype]
        finite = not (bits == _EXPONENT_BITS[dtype]).any()
    else:
        finite = bool(np.isfinite(values).all())  # NumPy needs a tenth of the time that MLX takes on a CPU
    if not finite:
        raise WeightsError(f"{name} holds NaN or infinity: the checkpoint is damaged, or its training diverged")
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def checked_cast(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Values in another type.

    Raises:
        WeightsError: naming the tensor, if float16 cannot hold them.
    """
    result = array.astype(dtype)
    if dtype == mx.float16 and array.dtype != dtype and not mx.all(mx.isfinite(result)).item():
        raise WeightsError(f"{name} holds values beyond the range of float16; use bfloat16")
    return result


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], mx.Dtype, int]]:
    """Shape, type and place in the file of each tensor."""

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
        header[name] = shape, dtype, header_bytes + 8 + start
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
    """Write a safetensors file, reading some rows at a time.

    The header follows from shapes and types alone, so it can stand in front before any value was read. While a block
    of rows is written, the next ones are read and computed, on a CPU one on each core.

    Args:
        metadata: texts to keep in the header; readers of MLX look for `{"format": "mlx"}`.
        on_written: called with a tensor's name and a number of bytes as soon as they are in the file.
    Raises:
        OSError: if the disk is full or the file cannot be written.
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
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name, values in _in_blocks(tensors):
        tensor = tensors[name]
        assert values.shape[1:] == tensor.shape[1:], f"{name}, planned as {tensor.shape}, came as {values.shape}"
        assert values.dtype == tensor.dtype, f"{name}, planned as {tensor.dtype}, came as {values.dtype}"
        file.write(as_bytes(values))
        on_written(name, values.nbytes)


def save_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write arrays that are in memory to a safetensors file.

    Raises:
        OSError: if the file cannot be written. (Given a name, MLX raises RuntimeError and follows links.)
    """
    mx.eval(*arrays.values())
    with open(path, "wb") as file:
        mx.save_safetensors(file, dict(arrays), dict(metadata))


def _in_blocks(tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[str, mx.array]]:
    """All tensors, some rows at a time, with the next blocks under way."""
    streams = compute_streams()
    under_way: deque[tuple[str, mx.array]] = deque()
    blocks = ((name, tensor, rows) for name, tensor in tensors.items() for rows in tensor.blocks())
    for (name, tensor, rows), stream in zip(blocks, cycle(streams), strict=False):
        with mx.stream(stream):
            values = mx.contiguous(tensor.read_rows(*rows))
        mx.async_eval(values)
        under_way.append((name, values))
        del values
        if len(under_way) > len(streams):
            yield under_way.popleft()
    yield from under_way


def as_bytes(array: mx.array) -> memoryview:
    """The bytes of an array in row-major order, without a copy where its layout allows."""
    return memoryview(np.asarray(mx.contiguous(array).reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]
