"""Tensors that stay on disk until they are needed, and safetensors files.

A checkpoint is a `dict[str, LazyTensor]`: renaming is a dict comprehension; averaging or cutting rows wraps tensors in
a new `LazyTensor`. Values are read by rows, so only a few blocks of them are in memory at a time.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from .errors import WeightsError, quoted, readable
from .file_values import Entry, TensorFile
from .files.json_file import DuplicateError, unique_names
from .files.paths import open_regular
from .machine.device import compute_streams

# The types that a file may have, by their safetensors names: as read, and as stored (bfloat16 as its bits).
_STORED_DTYPES = {
    "F64": (mx.float32, "<f8"),
    "F32": (mx.float32, "<f4"),
    "F16": (mx.float16, "<f2"),
    "BF16": (mx.bfloat16, "<u2"),
    "C64": (mx.complex64, "<c8"),
    "U64": (mx.uint64, "<u8"),
    "I64": (mx.int64, "<i8"),
    "U32": (mx.uint32, "<u4"),
    "I32": (mx.int32, "<i4"),
    "U16": (mx.uint16, "<u2"),
    "I16": (mx.int16, "<i2"),
    "U8": (mx.uint8, "u1"),
    "I8": (mx.int8, "i1"),
    "BOOL": (mx.bool_, "?"),
}
_WRITTEN_DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8"}
_LARGEST_HEADER_BYTES = 4_000_000  # about 2,000 quantized layers; in memory it takes up to twenty times as much
_BLOCK_BYTES = 1 << 20  # fits into CPU caches; buffers of this size are reused instead of freed


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and type whose values are read on demand, and again on each use."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    reader: Callable[[int, int], mx.array]  # rows `start` to `stop` (excluded) along the first axis

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return prod(self.shape) * self.dtype.size

    @property
    def num_rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def read_rows(self, start: int, stop: int) -> mx.array:
        """Read rows `start` to `stop` (excluded) along the first axis.

        Raises:
            WeightsError: if the tensor has fewer rows; behind them lie the bytes of another tensor.
        """
        if not 0 <= start <= stop <= self.num_rows:
            raise WeightsError(f"rows {start:,} to {stop:,} were requested of a tensor with {self.num_rows:,} rows")
        return self.reader(start, stop)

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

    Values in float64 are read as float32.

    Raises:
        WeightsError: if the header is malformed, its tensors do not cover the file exactly once, or a type is
            unsupported; later, when values are read, if they contain NaN or infinity.
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """As `read_safetensors`, and the metadata of the file."""
    try:
        header, metadata = _read_header(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    file = TensorFile(path, header)
    tensors = {name: LazyTensor(e.shape, e.dtype, partial(file.read_rows, name)) for name, e in header.items()}
    return tensors, metadata


def checked_cast(name: str, array: mx.array, dtype: mx.Dtype, computed: bool = False) -> mx.array:
    """Cast an array to `dtype`.

    Args:
        computed: check the values even if every one of the array's type fits; computing them may have overflowed.
    Raises:
        WeightsError: naming the tensor, if values overflow `dtype`.
    """
    limit = _LIMITS.get(dtype, math.inf)
    is_narrower = limit < _LIMITS.get(array.dtype, math.inf)
    if (is_narrower or computed) and not is_below(array, limit):
        wider = {mx.float16: "; use bfloat16", mx.bfloat16: "; use float32"}.get(dtype, "")
        raise WeightsError(f"{readable(name)} has values beyond the range of {dtype_name(dtype)}{wider}")
    return array.astype(dtype)


# The smallest numbers that are rounded to infinity.
_LIMITS = {mx.float16: 65520.0, mx.bfloat16: (2 - 2**-8) * 2.0**127}


def is_below(array: mx.array, limit: float) -> bool:
    """Whether all values are numbers whose magnitude is below a limit; NumPy is ten times as fast as MLX on a CPU."""
    if array.dtype == mx.bfloat16:  # the order of the bits is that of the magnitudes, and NaN is above infinity
        bits = (np.asarray(array.view(mx.uint16)) & 0x7FFF).max(initial=0).astype(np.uint32)
        return float((bits << 16).view(np.float32)) < limit
    values: Any = np.asarray(array)
    return -limit < float(values.min(initial=0)) and float(values.max(initial=0)) < limit


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of a type, such as `float16`."""
    return str(dtype).removeprefix("mlx.core.")


# Buffers of other implementations: what this one computes itself.
_BUFFERS = ("inv_freq", "causal_mask", "attention_mask", "masked_bias", "cos_cached", "sin_cached", "freqs_cis")
_WEIGHTS = ("weight", "scales", "biases")


def is_buffer(name: str, dtype: mx.Dtype) -> bool:
    """Whether a tensor is no weight: a mask, positions or frequencies, or anything else of integers or booleans."""
    last = name.rpartition(".")[2]
    is_weight = mx.issubdtype(dtype, mx.floating) or last in _WEIGHTS or ".lora_" in name
    return last in _BUFFERS or not is_weight


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Type and place of each tensor, in the order of the header, and the metadata."""

    def damaged(what: str) -> WeightsError:
        return WeightsError(f"{path} is damaged or incomplete: {what}; download or convert it again")

    with open_regular(path) as file:
        file_bytes = path.stat().st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > file_bytes - 8:
            raise damaged(f"the header has {header_bytes:,} bytes, the file {file_bytes:,}")
        if header_bytes > _LARGEST_HEADER_BYTES:
            raise damaged(f"the header has {header_bytes:,} bytes, which is more than {_LARGEST_HEADER_BYTES:,}")
        raw = file.read(header_bytes)
    try:
        entries = json.loads(raw.decode(), object_pairs_hook=unique_names)
    except DuplicateError as error:
        raise damaged(f"the header contains {readable(str(error))} twice") from error
    except (ValueError, RecursionError) as error:
        raise damaged("the header is not JSON") from error
    if not isinstance(entries, dict):
        raise damaged("the header is not a table of tensors")

    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged("__metadata__ must contain strings")
    header = {}
    for name, entry in entries.items():
        try:
            kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            well_formed = isinstance(kind, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        except (TypeError, KeyError, ValueError):
            well_formed = False
        if not well_formed:
            raise damaged(f"the header entry of {readable(name)} is malformed")
        if kind not in _STORED_DTYPES:
            raise WeightsError(
                f"{path}: {readable(name)} has type {kind[:20]!r}; expected one of {', '.join(_STORED_DTYPES)}"
            )
        dtype, stored = _STORED_DTYPES[kind]
        if stop - start != prod(shape) * np.dtype(stored).itemsize or header_bytes + 8 + stop > file_bytes:
            raise damaged(f"{readable(name)} cannot be at bytes {quoted(start)} to {quoted(stop)} after the header")
        header[name] = Entry(shape, dtype, stored, header_bytes + 8 + start, header_bytes + 8 + stop)
    end, before = header_bytes + 8, ""
    for name, found in sorted(header.items(), key=lambda item: (item[1].start, item[1].stop)):
        if found.start < end:
            raise damaged(f"{readable(before)} and {readable(name)} overlap")
        if found.start > end:
            raise damaged(f"no tensor covers the {found.start - end:,} bytes before {readable(name)}")
        end, before = found.stop, name
    if end != file_bytes:
        raise damaged(f"the file has {file_bytes:,} bytes, but its tensors end at {end:,}")
    return header, metadata


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
            "dtype": _WRITTEN_DTYPES[tensor.dtype],
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
