"""Attention of a decoding step with fused kernels."""

from typing import TYPE_CHECKING

import mlx.core as mx

from ..cache.kv_cache import KVCache, StepCache
from ..cache.layouts import QuantizedKV
from ..kernels.fused import normalize_and_rotate, normalize_rotate_and_quantize

if TYPE_CHECKING:
    from .openelm import Attention


class FusedAttention:
    """Normalizes, rotates and attends with fused kernels, for new tokens behind those in a cache."""

    def __init__(self, cache: KVCache | StepCache, rope_base: float):
        self._cache = cache
        self._base = rope_base
        positions = cache.positions
        self._positions = positions if isinstance(positions, mx.array) else mx.array(positions, mx.int32)

    def __call__(self, attn: "Attention", qkv: mx.array) -> mx.array:
        """Attention output (B, H, L, D) of a layer's heads (B, L, H + 2K, D)."""
        norms = (attn.q_norm.weight, attn.k_norm.weight) if attn.normalize_qk else None
        counts = attn.num_query_heads, attn.num_kv_heads
        layout = self._cache.layout
        if isinstance(layout, QuantizedKV) and isinstance(self._cache, StepCache):
            packing = layout.bits, layout.group_size
            queries, new = normalize_rotate_and_quantize(qkv, norms, self._positions, counts, self._base, *packing)
            return self._cache.attend_quantized(attn.layer, queries, new)
        heads = normalize_and_rotate(qkv, norms, self._positions, counts, self._base)
        return self._cache.attend(attn.layer, *heads)
