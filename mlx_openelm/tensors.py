"""Tensors that stay on disk until they are needed, and safetensors files.

A checkpoint is a `dict[str, LazyTensor]`: renaming is a dict comprehension; averaging or cutting rows wraps tensors in
a new `LazyTensor`. Values are read by rows, so only a few blocks of them are in memory at a time.
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
from .files.paths import open_regular
from .machine.device import compute_streams

# safetensors names of the types that weights of a language model can have.
SAFETENSORS_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_NUMPY_DTYPES = {mx.float32: "<f4", mx.float16: "<f2", mx.bfloat16: "<u2", mx.uint32: "<u4", mx.uint8: "u1"}
_EXPONENT_BITS = {mx.float16: 0x7C00, mx.bfloat16: 0x7F80}  # NaN or infinity if all are set
_LARGEST_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 1 << 20  # fits into CPU caches; buffers of this size are reused instead of freed


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and type whose values are read on demand, and again on each use."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read_rows: Callable[[int, int], mx.array]  # rows `start` to `stop` (excluded) along the first axis

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return prod(self.shape) * self.dtype.size

    @property
    def num_rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def read(self) -> mx.array:
        """Read all values."""
        return self.read_rows(0, self.num_rows)

    def map(self, function: Callable[[mx.array], mx.array], dtype: mx.Dtype | None = None) -> "LazyTensor":
        """Apply a function that keeps the shape to blocks of rows when read; `dtype` is the new type if it changes."""
        return LazyTensor(self.shape, dtype or self.dtype, lambda start, stop: function(self.read_rows(start, stop)))

    def first_rows(self, count: int) -> "LazyTensor":
        """The first `count` rows of the tensor."""
        return LazyTensor((count, *self.shape[1:]), self.dtype, self.read_rows)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the tensor, about 1 MiB each; a range has at least one row."""
        rows = max(1, _BLOCK_BYTES * self.num_rows // max(self.nbytes, 1))
        for start in range(0, self.num_rows, rows):
            yield start, min(start + rows, self.num_rows)


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Open the tensors of a safetensors file, by name; only the header is read now.

    Raises:
        WeightsError: if the header does not match the length of the file, or a type is unsupported; later, when values
            are read, if they contain NaN or infinity.
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
        with open_regular(path) as file:
            file.seek(offset + start * row * dtype.size)
            values = np.fromfile(file, _NUMPY_DTYPES[dtype], (stop - start) * row)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    if values.size != (stop - start) * row:
        raise WeightsError(f"{path} was truncated while it was read")
    return from_numpy(values.reshape(stop - start, *shape[1:]) if shape else values.reshape(()), dtype, name)


def from_numpy(values: np.ndarray, dtype: mx.Dtype, name: str) -> mx.array:
    """An MLX array from values read from a file; bfloat16, which NumPy lacks, is passed as uint16 bits.

    Raises:
        WeightsError: naming the tensor, if the values contain NaN or infinity.
    """
    if dtype in _EXPONENT_BITS:
        bits = values.view(np.uint16) & _EXPONENT_BITS[dtype]
        finite = not (bits == _EXPONENT_BITS[dtype]).any()
    else:
        finite = bool(np.isfinite(values).all())  # ten times as fast in NumPy as in MLX on a CPU
    if not finite:
        raise WeightsError(f"{name} contains NaN or infinity: the checkpoint is damaged, or its training diverged")
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def checked_cast(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast an array to `dtype`.

    Raises:
        WeightsError: naming the tensor, if values overflow float16.
    """
    result = array.astype(dtype)
    if dtype == mx.float16 and array.dtype != dtype and not mx.all(mx.isfinite(result)).item():
        raise WeightsError(f"{name} has values beyond the range of float16; use bfloat16")
    return result


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], mx.Dtype, int]]:
    """Shape, type and file offset of each tensor."""

    def damaged(what: str) -> WeightsError:
        return WeightsError(f"{path} is damaged or incomplete: {what}; download or convert it again")

    with open_regular(path) as file:
        file_bytes = path.stat().st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(file_bytes - 8, _LARGEST_HEADER_BYTES):
            raise damaged(f"the header has {header_bytes:,} bytes, the file {file_bytes:,}")
        raw = file.read(header_bytes)
    try:
        entries = json.loads(raw)
    except ValueError as error:
        raise damaged("the header is not JSON") from error
    if not isinstance(entries, dict):
        raise damaged("the header is not a table of tensors")

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
            raise damaged(f"the header entry of {name} is malformed")
        dtype = SAFETENSORS_DTYPES.get(dtype_name)
        if dtype is None:
            raise WeightsError(f"{path}: {name} has type {dtype_name}; expected one of {', '.join(SAFETENSORS_DTYPES)}")
        if stop - start != prod(shape) * dtype.size or header_bytes + 8 + stop > file_bytes:
            raise damaged(f"{name} cannot be at bytes {start:,} to {stop:,} after the header")
        header[name] = shape, dtype, header_bytes + 8 + start
        end = max(end, stop)
    if header_bytes + 8 + end != file_bytes:
        raise damaged(f"the file has {file_bytes:,} bytes, but its tensors end at {header_bytes + 8 + end:,}")
    return header


def write_safetensors(
    file: BinaryIO,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    on_written: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """Write a safetensors file, some rows at a time.

    The header follows from shapes and types alone, so it is written before any value is read. While a block of rows is
    written, the next ones are read and computed; on a CPU, one on each core.

    Args:
        metadata: strings for the header; MLX readers look for `{"format": "mlx"}`.
        on_written: called with a tensor's name and the number of bytes just written, after each block.
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
    """Write arrays in memory to a safetensors file.

    The file is opened here, because MLX given a path raises RuntimeError and follows links.

    Raises:
        OSError: if the file cannot be written.
    """
    mx.eval(*arrays.values())
    with open(path, "wb") as file:
        mx.save_safetensors(file, dict(arrays), dict(metadata))


def _in_blocks(tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[str, mx.array]]:
    """Blocks of rows of all tensors, with their names; the next blocks are computed ahead."""
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
