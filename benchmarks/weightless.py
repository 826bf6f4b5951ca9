"""Networks and caches of any size that take no memory, to build graphs with: this package's and mlx-lm's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from step_graph import blank

from mlx_openelm import CacheConfig, OpenELMConfig
from mlx_openelm.cache.config import kv_group_size
from mlx_openelm.cache.kv_cache import KVCache
from mlx_openelm.loading import assemble
from mlx_openelm.model.openelm import OpenELM, parameter_shapes
from mlx_openelm.quantization import Quantization

DTYPE = mx.bfloat16
_SHORTER = 10  # tokens by which each further row of a batch is shorter than the one before


def our_network(config: OpenELMConfig, bits: int) -> OpenELM:
    """A network of this package; with `bits`, its matrices are quantized."""
    arrays: dict[str, mx.array] = {}
    packed: dict[str, Quantization] = {}
    quantization = Quantization(bits) if bits else None
    for name, shape in parameter_shapes(config).items():
        if quantization is not None and quantization.fits(shape):
            path = name.removesuffix(".weight")
            packed[path] = quantization
            for part, (part_shape, dtype) in quantization.plan((shape[0], shape[1]), DTYPE).items():
                arrays[f"{path}.{part}"] = blank(part_shape, dtype)
        else:
            arrays[name] = blank(shape, DTYPE)
    return assemble(config, arrays, packed, DTYPE)


def our_cache(network: OpenELM, config: CacheConfig, rows: int, num_tokens: int) -> KVCache:
    """A cache that holds `num_tokens` tokens, with room for one more."""
    cache, *others = (_row(network, config, num_tokens - _SHORTER * row) for row in range(rows))
    for other in others:
        cache.join(other)
    buffers = cache.take_buffers(1)
    cache.restore_buffers([tuple(blank(tuple(a.shape), a.dtype) for a in layer) for layer in buffers], 0)
    return cache


def _row(network: OpenELM, cache_config: CacheConfig, num_tokens: int) -> KVCache:
    D = network.config.head_dim
    kept = min(num_tokens, cache_config.window or num_tokens)
    arrays: dict[str, mx.array] = {}
    for layer, heads in enumerate(network.config.num_kv_heads):
        parts: list[tuple[tuple[int, ...], mx.Dtype]] = [((1, heads, kept, D), DTYPE)] * 2
        if cache_config.window is not None:
            parts.append(((1, heads, cache_config.sinks + 1, D), DTYPE))
        elif cache_config.bits is not None:
            parts = _quantized_parts(1, heads, kept, D, cache_config.bits) * 2
        arrays.update({f"layers.{layer}.{n}": blank(*part) for n, part in enumerate(parts)})
    cache = network.make_cache(cache_config)
    cache.from_arrays(arrays, num_tokens, cache_config.bits is not None)
    return cache


def _quantized_parts(rows: int, heads: int, length: int, D: int, bits: int) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    """Shapes and types of words, scales and biases."""
    groups = (rows, heads, length, D // kv_group_size(D)), DTYPE
    return [((rows, heads, length, D * bits // 32), mx.uint32), groups, groups]


def peer_model(config: OpenELMConfig, bits: int) -> Any:
    """A model of mlx-lm; with `bits`, its matrices are quantized."""
    from mlx_lm.models.openelm import Model, ModelArgs

    model = Model(ModelArgs.from_dict(config.to_dict()))
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    parameters: Any = tree_flatten(model.parameters())
    types = {mx.uint32: mx.uint32}
    model.load_weights([(name, blank(tuple(a.shape), types.get(a.dtype, DTYPE))) for name, a in parameters])
    return model


def peer_step_alone(model: Any, config: CacheConfig, num_tokens: int) -> list[mx.array]:
    """What mlx-lm's `generate_step` evaluates for a token behind `num_tokens` others."""
    from mlx_lm.generate import generate_step

    kept = [_peer_cache(heads, model.args.head_dim, config, num_tokens) for heads in model.args.num_kv_heads]
    with _captured() as arrays:
        next(
            generate_step(
                mx.array([5], mx.uint32), model, prompt_cache=kept, stream=mx.default_stream(mx.default_device())
            )
        )
    return arrays


def _peer_cache(heads: int, D: int, config: CacheConfig, num_tokens: int) -> Any:
    from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

    room = -(-(num_tokens + 1) // KVCache.step) * KVCache.step
    cache: Any = KVCache()
    parts: Any = [((1, heads, room, D), DTYPE)]
    if config.window is not None:
        cache = RotatingKVCache(max_size=config.window, keep=config.sinks)
        cache._idx = config.window
        parts = [((1, heads, config.window, D), DTYPE)]
    elif config.bits is not None:
        cache = QuantizedKVCache(group_size=kv_group_size(D), bits=config.bits)
        parts = _quantized_parts(1, heads, room, D, config.bits)
    keys, values = ([blank(*part) for part in parts] for _ in range(2))
    cache.keys, cache.values = (keys, values) if len(parts) > 1 else (keys[0], values[0])
    cache.offset = num_tokens
    return cache


def peer_step_of_rows(model: Any, rows: int, num_tokens: int) -> list[mx.array]:
    """What mlx-lm's `BatchGenerator` evaluates for a token of each row, behind `num_tokens` others or fewer."""
    from mlx_lm.generate import GenerationBatch, greedy_sampler
    from mlx_lm.models.cache import BatchKVCache

    padding = [_SHORTER * row for row in range(rows)]
    caches = []
    for heads in model.args.num_kv_heads:
        cache: Any = BatchKVCache(padding)
        room = -(-(num_tokens + 1) // cache.step) * cache.step
        cache.keys, cache.values = (blank((rows, heads, room, model.args.head_dim), DTYPE) for _ in range(2))
        cache.offset = mx.array([num_tokens - pad - 1 for pad in padding]) + 1  # the step before leaves a sum behind
        cache._idx = num_tokens
        caches.append(cache)
    none: Any = [None] * rows
    numbers, tokens, lengths = list(range(rows)), [[5]] * rows, [2] * rows
    start = blank((rows,), mx.uint32)
    with _captured() as arrays:
        GenerationBatch(model, numbers, start, caches, tokens, none, greedy_sampler, none, [], lengths)
    return arrays


class _Captured(Exception):
    """A step is built; it is not to be evaluated."""


@contextmanager
def _captured() -> Iterator[list[mx.array]]:
    """Collect the arrays that `mx.async_eval` is given first; nothing is evaluated."""
    arrays: list[mx.array] = []

    def async_eval(*given: Any) -> None:
        leaves: Any = tree_flatten(list(given))
        arrays.extend(array for _, array in leaves)
        raise _Captured

    with mock.patch.object(mx, "async_eval", async_eval):
        try:
            yield arrays
        except _Captured:
            return
    raise AssertionError("mlx-lm starts its steps in another way now")
