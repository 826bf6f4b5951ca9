import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import PRESETS, CacheConfig, kv_cache_bytes
from mlx_openelm.cache.config import kv_bytes_per_layer
from mlx_openelm.cache.kv_cache import GROWTH_STEP
from mlx_openelm.errors import CacheError

TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 400, 90)]


class TestBytes:
    def test_size_counts_each_layers_own_heads(self):
        heads = sum(PRESETS["270M"].num_kv_heads)
        assert kv_cache_bytes(PRESETS["270M"], 10) == 10 * heads * 64 * 2 * 2  # keys and values, two bytes each
        assert kv_cache_bytes(PRESETS["270M"], 10, mx.float32) == 2 * kv_cache_bytes(PRESETS["270M"], 10)

    def test_a_window_keeps_no_more_than_its_size(self):
        config = CacheConfig(window=100)
        assert kv_cache_bytes(PRESETS["270M"], 5000, cache=config) == kv_cache_bytes(PRESETS["270M"], 100)
        assert kv_cache_bytes(PRESETS["270M"], 50, cache=config) == kv_cache_bytes(PRESETS["270M"], 50)

    def test_texts_too_short_to_quantize_take_what_they_take(self):
        config = CacheConfig(bits=8, quantize_after=100)
        assert kv_cache_bytes(PRESETS["270M"], 99, cache=config) == kv_cache_bytes(PRESETS["270M"], 99)
        assert kv_cache_bytes(PRESETS["270M"], 100, cache=config) < 0.6 * kv_cache_bytes(PRESETS["270M"], 100)

    @pytest.mark.parametrize(
        "config", [CacheConfig(), CacheConfig(bits=4), CacheConfig(bits=8), CacheConfig(window=GROWTH_STEP)]
    )
    def test_what_is_predicted_is_what_a_full_buffer_takes(self, tiny_model, tiny_config, config):
        cache = tiny_model.make_cache(config)
        tiny_model(mx.array([(TEXT * 3)[:GROWTH_STEP]]), cache=cache)
        predicted = kv_cache_bytes(tiny_config, GROWTH_STEP, mx.float32, config)
        sinks = 5 * sum(kv_bytes_per_layer(tiny_config, mx.float32)) // 2 if config.window else 0
        assert cache.nbytes == predicted + sinks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 3}, "got 3"),
        ({"bits": 4, "quantize_after": -1}, "negative"),
        ({"window": 4}, "`window` must be greater than the 4 `sinks`; got 4"),
        ({"window": 9, "sinks": -1}, "`sinks` must be from 0 to 65,536; got -1"),
        ({"window": 64, "bits": 4}, "mutually exclusive"),
    ],
)
def test_what_cannot_be_kept_is_refused(values, message):
    with pytest.raises(CacheError, match=message):
        CacheConfig(**values)
