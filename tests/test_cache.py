import mlx.core as mx
import pytest

from mlx_openelm import PRESETS, KVCache, kv_cache_bytes
from mlx_openelm.cache import GROWTH_STEP


def test_size_counts_each_layers_own_heads():
    heads = sum(PRESETS["270M"].num_kv_heads)
    assert kv_cache_bytes(PRESETS["270M"], 10) == 10 * heads * 64 * 2 * 2  # keys and values, two bytes each
    assert kv_cache_bytes(PRESETS["270M"], 10, mx.float32) == 2 * kv_cache_bytes(PRESETS["270M"], 10)


def test_buffers_grow_in_steps():
    cache = KVCache(1)
    new = mx.ones((1, 2, 3, 4))
    keys, _ = cache.update(0, new, new)
    assert keys.shape == (1, 2, 3, 4)
    assert cache.nbytes == 2 * 2 * GROWTH_STEP * 4 * 4


def test_more_cannot_be_forgotten_than_is_there():
    with pytest.raises(AssertionError, match="forget"):
        KVCache(1).trim(1)
