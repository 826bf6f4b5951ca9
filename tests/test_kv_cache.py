import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import CacheConfig, KVCache
from mlx_openelm.cache import kv_cache
from mlx_openelm.cache.kv_cache import GROWTH_STEP
from mlx_openelm.cache.layouts import QuantizedKV

TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 400, 90)]


def test_buffers_grow_in_steps():
    cache = KVCache(1)
    new = mx.ones((1, 2, 3, 4))
    assert cache.attend(0, new, new, new).shape == (1, 2, 3, 4)
    assert cache.nbytes == 2 * 2 * GROWTH_STEP * 4 * 4


def test_more_cannot_be_forgotten_than_is_there():
    with pytest.raises(AssertionError, match="cannot remove"):
        KVCache(1).trim(1)


class TestJoin:
    def filled(self, model, tokens, config=None):
        cache = model.make_cache(config or CacheConfig())
        model(mx.array([tokens]), cache=cache)
        return cache

    def test_texts_end_at_the_same_place(self, tiny_model):
        cache = self.filled(tiny_model, TEXT[:5])
        cache.join(self.filled(tiny_model, TEXT[:9]))
        cache.join(self.filled(tiny_model, TEXT[:3]))
        assert cache.offset == 9
        assert cache.row_offsets.tolist() == [4, 0, 6]
        cache.join(self.filled(tiny_model, TEXT[:7]), row=1)
        assert cache.row_offsets.tolist() == [4, 2, 6]

    def test_room_before_all_texts_is_given_back(self, tiny_model, monkeypatch):
        monkeypatch.setattr(kv_cache, "GROWTH_STEP", 8)
        cache = self.filled(tiny_model, TEXT[:40])
        cache.join(self.filled(tiny_model, TEXT[:10]))
        cache.keep([1])
        assert (cache.offset, cache.row_offsets.tolist()) == (16, [6])
        assert cache.arrays[0].shape[2] == 16

    def test_rows_of_both_kinds_become_quantized(self, tiny_model):
        config = CacheConfig(bits=8, quantize_after=20)
        cache = self.filled(tiny_model, TEXT[:5], config)
        cache.join(self.filled(tiny_model, TEXT[:30], config))
        assert isinstance(cache.layout, QuantizedKV)
