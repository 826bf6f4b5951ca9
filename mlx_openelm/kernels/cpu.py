"""The network's operations on the CPU, where MLX computes most of them as several, without vector instructions.

With the package `openelm-mlx-native` each is one operation, and a row's result is the same to the bit whatever other
rows there are. Without it, and for types other than float32, each is MLX's. Where the plain way has another form, a
function returns `None` instead.
"""

import math
from typing import Any

import mlx.core as mx

from ..machine.device import on_cpu
from ..machine.native import native_kernels


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """`mx.fast.rms_norm`: (..., M) to (..., M)."""
    kernels = _kernels_for(x, weight)
    return mx.fast.rms_norm(x, weight, eps) if kernels is None else kernels.rms_norm(x, weight, eps)


def add_and_normalize(x: mx.array, update: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """`x + update` and its norm, each (..., M)."""
    kernels = _kernels_for(x, update, weight)
    if kernels is not None and x.shape == update.shape:
        total, normed = kernels.add_and_normalize(x, update, weight, eps)
        return total, normed
    x = x + update
    return x, rms_norm(x, weight, eps)


def normalize_and_rotate(
    qkv: mx.array,
    norms: tuple[mx.array, mx.array] | None,
    table: tuple[mx.array, mx.array],
    num_query_heads: int,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array] | None:
    """Queries (B, H, L, D), keys and values (B, K, L, D) of heads (B, L, H + 2K, D); `None` without the package.

    Args:
        norms: weights of the norms of queries and of keys, (D,); None: no norm.
        table: cosines and sines, (L, D / 2), or (B, 1, L, D / 2) if each row has its own positions.
    """
    kernels = _kernels_for(qkv, *norms or (), *table)
    if kernels is None:
        return None
    cosines, sines = (part.squeeze(1) if part.ndim == 4 else part for part in table)
    queries, keys, values = kernels.normalize_and_rotate(
        qkv, *norms or (None, None), cosines, sines, num_query_heads, eps
    )
    return queries, keys, values


def attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array | None:
    """Attention of queries (B, H, L, D) over (B, K, S, D), masked, or causal; `None` without the package."""
    kernels = _kernels_for(queries, keys, values)
    if kernels is None or (mask is not None and mask.dtype != mx.bool_):
        return None
    causal = mask is None and queries.shape[2] > 1
    read: mx.array = kernels.attention(queries, keys, values, queries.shape[-1] ** -0.5, causal, mask)
    return read


def gated(x: mx.array) -> mx.array | None:
    """`silu(gate) * input` (..., F) of a gate and then an input (..., 2F); `None` without the package."""
    kernels = _kernels_for(x)
    return None if kernels is None else kernels.gated(x)


def log_sum_exp(x: mx.array) -> mx.array:
    """`mx.logsumexp` over the last axis: (..., V) to (...)."""
    kernels = _kernels_for(x)
    return mx.logsumexp(x, axis=-1) if kernels is None else kernels.log_sum_exp(x)


def exponential(x: mx.array) -> mx.array:
    """e to the power of x. On the CPU, MLX's `power` takes a third of the time of its `exp`: 4 ns each, not 12."""
    return mx.power(math.e, x) if on_cpu() else mx.exp(x)


def _kernels_for(*arrays: mx.array | None) -> Any | None:
    """The native kernels, if they are installed, MLX computes on the CPU, and all arrays are float32."""
    if not on_cpu() or any(array is not None and array.dtype != mx.float32 for array in arrays):
        return None
    return native_kernels()
