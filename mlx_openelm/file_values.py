"""Values as files have them: checked for NaN and infinity, and turned into MLX arrays."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from .errors import WeightsError, readable
from .machine.device import reading_threads

_EXPONENT_BITS = {mx.float16: 0x7C00, mx.bfloat16: 0x7F80}  # NaN or infinity if all are set
_BLOCK = 1 << 18  # values that are checked at once: what is made of them fits into CPU caches
_BLOCKS_ALONE = 32  # up to so many are checked by one thread, in a millisecond or two


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
