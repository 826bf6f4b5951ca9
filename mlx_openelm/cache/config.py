"""How keys and values are stored, and how much memory that takes."""

from dataclasses import dataclass

import mlx.core as mx

from ..config import OpenELMConfig
from ..errors import CacheError

KV_GROUP_SIZES = (64, 32)  # numbers that share a scale when quantized
_BITS = (4, 8)
_LARGEST_SINKS = 65_536
_LARGEST_WINDOW = 1 << 24  # tokens


@dataclass(frozen=True)
class CacheConfig:
    """How keys and values are stored; by default all of them, in the dtype that the model computes in.

    Raises:
        CacheError: if a value is out of range, or two values are mutually exclusive.
    """

    bits: int | None = None  # 4 or 8: quantize, which saves memory and costs a little accuracy
    quantize_after: int = 0  # tokens; shorter texts are not quantized
    window: int | None = None  # keep only this many tokens: the sinks and the most recent ones
    sinks: int = 4  # first tokens that a window keeps as attention sinks (Xiao et al., arXiv:2309.17453)

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in _BITS:
            raise CacheError(f"`bits` of the KV cache must be 4 or 8; got {self.bits}")
        if self.quantize_after < 0:
            raise CacheError(f"`quantize_after` must not be negative; got {self.quantize_after}")
        if not 0 <= self.sinks <= _LARGEST_SINKS:
            raise CacheError(f"`sinks` must be from 0 to {_LARGEST_SINKS:,}; got {self.sinks}")
        if self.window is not None and self.window > _LARGEST_WINDOW:
            raise CacheError(f"`window` must be at most {_LARGEST_WINDOW:,}; got {self.window}")
        if self.window is not None and self.window < self.sinks + 1:
            raise CacheError(f"`window` must be greater than the {self.sinks} `sinks`; got {self.window}")
        if self.window is not None and self.bits is not None:
            raise CacheError("`window` and `bits` are mutually exclusive")

    @property
    def label(self) -> str:
        """Short description, such as "full", "8-bit" or "window of 512 tokens (4 sinks)"."""
        if self.window is not None:
            return f"window of {self.window:,} tokens ({self.sinks} sinks)"
        if self.bits is None:
            return "full"
        return f"{self.bits}-bit" + (f" from {self.quantize_after:,} tokens on" if self.quantize_after else "")


def kv_group_size(head_dim: int) -> int:
    """How many numbers of a key or value share a scale when quantized.

    Raises:
        CacheError: if `head_dim` is not a multiple of 32.
    """
    fitting = [size for size in KV_GROUP_SIZES if head_dim % size == 0]
    if not fitting:
        raise CacheError(f"head_dim must be a multiple of 32 to quantize keys and values; got {head_dim}")
    return fitting[0]


def kv_bytes_per_layer(
    config: OpenELMConfig, dtype: mx.Dtype = mx.float16, cache: CacheConfig = CacheConfig()
) -> tuple[int, ...]:
    """Bytes that each layer needs for the keys and values of one token; with `bits`, once they are quantized."""
    if cache.bits is None:
        head = config.head_dim * dtype.size
    else:
        scales = 2 * dtype.size * (config.head_dim // kv_group_size(config.head_dim))  # and biases
        head = config.head_dim * cache.bits // 8 + scales
    return tuple(2 * heads * head for heads in config.num_kv_heads)


def kv_cache_bytes(
    config: OpenELMConfig, num_tokens: int, dtype: mx.Dtype = mx.float16, cache: CacheConfig = CacheConfig()
) -> int:
    """Bytes that the cached keys and values of one sequence need, without spare room in the buffers."""
    if cache.bits is not None and num_tokens < cache.quantize_after:
        cache = CacheConfig()
    kept = num_tokens if cache.window is None else min(num_tokens, cache.window)
    return sum(kv_bytes_per_layer(config, dtype, cache)) * kept
