"""Values as files have them: read, checked for NaN and infinity, and turned into MLX arrays."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import WeightsError, readable
from .files.paths import open_regular
from .machine.device import reading_threads

_LARGE_BYTES = 1 << 22  # from these on, MLX's threads read a tensor
_EXPONENT_BITS = {mx.float16: 0x7C00, mx.bfloat16: 0x7F80}  # NaN or infinity if all are set
_BLOCK = 1 << 18  # values that are checked at once: what is made of them fits into CPU caches
_BLOCKS_ALONE = 32  # one thread checks up to this many, which takes a millisecond or two


@dataclass(frozen=True)
class Entry:
    """Where a file has a tensor, and in which form."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    stored: str  # NumPy type
    start: int  # byte of the file
    stop: int

    @property
    def is_large(self) -> bool:
        """Whether MLX's threads read it."""
        return self.stop - self.start >= _LARGE_BYTES


class TensorFile:
    """The tensors of a safetensors file: rows are read by NumPy, large ones whole by MLX's threads into its memory.

    Args:
        entries: by name, in the order in which they are probably wanted.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]):
        self._path = path
        self._entries = entries
        large = [name for name, entry in entries.items() if entry.is_large]
        self._after = dict(pairwise(large))
        self._expected = next(iter(large), None)
        self._waiting: dict[str, mx.array] = {}  # of MLX, not yet wanted; the file stays open for them
        self._suits_mlx = True

    def read_rows(self, name: str, start: int, stop: int) -> mx.array:
        """Rows of a tensor.

        Raises:
            WeightsError: if they cannot be read, are not finite, or are beyond the range of float32.
        """
        entry, path = self._entries[name], self._path
        shape, row = entry.shape, prod(entry.shape[1:])
        if self._suits_mlx and entry.is_large and (stop - start) * row == prod(shape):
            array = self._read_whole(name, entry)
            if array is not None:
                return array
        try:
            with open_regular(path) as file:
                file.seek(entry.start + start * row * np.dtype(entry.stored).itemsize)
                values = np.fromfile(file, entry.stored, (stop - start) * row)
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
        if values.size != (stop - start) * row:
            raise WeightsError(f"{path} was truncated while it was read")
        return from_numpy(values.reshape(stop - start, *shape[1:]) if shape else values.reshape(()), entry.dtype, name)

    def _read_whole(self, name: str, entry: Entry) -> mx.array | None:
        """While it is checked, MLX reads the next one. `None` if MLX cannot read it, and the other way can say why."""
        try:
            if name not in self._waiting:
                with open_regular(self._path):  # MLX would wait for a FIFO
                    found: Any = mx.load(str(self._path), format="safetensors")  # reads the header only
                self._waiting = found
            array = self._waiting.pop(name)
            if (array.shape, array.dtype) != (entry.shape, entry.dtype):  # another file is there now
                return None
            values = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
            mx.eval(array, values)
            if self._path.stat().st_size < entry.stop:
                return None
            if name == self._expected:  # else they are wanted in another order, and reading ahead would fill memory
                self._expected = self._after.get(name)
                if self._expected in self._waiting:
                    mx.async_eval(self._waiting[self._expected])
        except (OSError, RuntimeError, ValueError, KeyError):  # MLX knows no float64
            self._suits_mlx = False
            return None
        check_finite(np.asarray(values), array.dtype, name)
        return array


def from_numpy(values: np.ndarray, dtype: mx.Dtype, name: str) -> mx.array:
    """An MLX array from values read from a file; bfloat16, which NumPy lacks, is passed as uint16 bits.

    Raises:
        WeightsError: naming the tensor, if the values contain NaN or infinity, or overflow float32.
    """
    check_finite(values, dtype, name)
    if values.dtype == np.float64 and dtype == mx.float32:
        with np.errstate(over="ignore", under="ignore"):
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise WeightsError(f"{readable(name)} has values beyond the range of float32")
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def check_finite(values: np.ndarray, dtype: mx.Dtype, name: str) -> None:
    """Make sure that no value is NaN or infinity; many values are divided among threads.

    Args:
        values: of any shape, contiguous.
        dtype: the type that they stand for; bfloat16 is passed as uint16 bits.
        name: of their tensor, for the message.
    Raises:
        WeightsError: if there is one.
    """
    flat = values.reshape(-1)
    mask = _EXPONENT_BITS.get(dtype)

    def is_finite(start: int) -> bool:  # NumPy is ten times as fast as MLX on a CPU, and needs no copy on any device
        block = flat[start : start + _BLOCK]
        if mask is None:
            return bool(np.isfinite(block).all())
        return bool((block.view(np.uint16) & mask).max() < mask)

    blocks = range(0, flat.size, _BLOCK)
    if len(blocks) <= _BLOCKS_ALONE:
        found = all(map(is_finite, blocks))
    else:
        with ThreadPoolExecutor(reading_threads()) as pool:
            found = all(pool.map(is_finite, blocks))
    if not found:
        raise WeightsError(
            f"{readable(name)} contains NaN or infinity: the checkpoint is damaged, or its training diverged"
        )
