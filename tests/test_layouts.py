from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from conftest import assert_close, random_model
from mlx_openelm import CacheConfig, OpenELMConfig, generate_tokens
from mlx_openelm.cache import kv_cache
from mlx_openelm.cache.config import kv_bytes_per_layer
from mlx_openelm.cache.layouts import QuantizedKV, RotatingKV
from mlx_openelm.errors import CacheError

TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 400, 90)]


def decoded(model, config, count=60, prompt=TEXT[:20], compiled=False):
    cache = model.make_cache(config)
    steps = list(generate_tokens(model, prompt, max_tokens=count, cache=cache, compiled=compiled))
    return [step.token for step in steps], [step.logprob for step in steps], cache


def step_by_step(model, tokens, config):
    """Log-probabilities of each token, by a cache that sees one after the other."""
    cache = model.make_cache(config)
    return mx.concatenate([model(mx.array([[token]]), cache=cache) for token in tokens], axis=1)


class TestQuantized:
    @pytest.mark.parametrize(("bits", "atol"), [(8, 0.05), (4, 1.0)])
    def test_logits_are_near_those_in_full(self, tiny_model, bits, atol):
        tokens = TEXT[:40]
        near = step_by_step(tiny_model, tokens, CacheConfig(bits=bits))
        assert_close(near, tiny_model(mx.array([tokens])), atol)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_reading_packed_is_reading_unpacked(self, bits):
        layout = QuantizedKV(bits, 32)
        keys, values = mx.random.normal((2, 2, 3, 16, 64), key=mx.random.key(0))
        queries = mx.random.normal((2, 6, 5, 64), key=mx.random.key(1))
        buffers = layout.quantize(keys, values)
        mask = mx.arange(16) <= mx.arange(11, 16)[:, None]
        assert_close(layout.attend_masked(buffers, queries, mask), layout.attend(buffers, queries, 16), 1e-5)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_before_its_time_nothing_changes(self, tiny_model, compiled):
        plain, _, _ = decoded(tiny_model, CacheConfig())
        later, _, cache = decoded(tiny_model, CacheConfig(bits=8, quantize_after=50), compiled=compiled)
        assert later[:31] == plain[:31]  # 20 of the prompt and 30 behind it are kept as they were
        assert isinstance(cache.layout, QuantizedKV)
        kept, _, cache = decoded(tiny_model, CacheConfig(bits=8, quantize_after=500), compiled=compiled)
        assert kept == plain
        assert not isinstance(cache.layout, QuantizedKV)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_compiled_steps_give_the_same(self, tiny_model, monkeypatch, bits):
        monkeypatch.setattr(kv_cache, "GROWTH_STEP", 16)
        config = CacheConfig(bits=bits, quantize_after=30)
        tokens, logprobs, _ = decoded(tiny_model, config)
        again, others, _ = decoded(tiny_model, config, compiled=True)
        assert again == tokens
        assert np.allclose(logprobs, others, atol=1e-4)

    def test_narrow_heads_are_refused(self, tiny_config):
        config = replace(tiny_config, head_dim=48)
        with pytest.raises(CacheError, match="head_dim must be a multiple of 32"):
            kv_bytes_per_layer(config, mx.float16, CacheConfig(bits=4))


class TestWindow:
    @pytest.mark.parametrize(("size", "sinks"), [(24, 4), (16, 0), (17, 1), (90, 4)])
    @pytest.mark.parametrize("sizes", [(20, 1, 30, 3, 36), (90,), (5, 85), (16, 8, 66)])
    def test_chunks_of_any_size_are_as_token_after_token(self, tiny_model, size, sinks, sizes):
        config = CacheConfig(window=size, sinks=sinks)
        cache = tiny_model.make_cache(config)
        parts, start = [], 0
        for count in sizes:
            parts.append(tiny_model(mx.array([TEXT[start : start + count]]), cache=cache))
            start += count
        assert_close(mx.concatenate(parts, axis=1), step_by_step(tiny_model, TEXT, config), 1e-4)

    def test_as_long_as_all_fits_it_is_a_plain_cache(self, tiny_model):
        plain, logprobs, _ = decoded(tiny_model, CacheConfig())
        window, others, _ = decoded(tiny_model, CacheConfig(window=80))
        assert window == plain
        assert np.allclose(logprobs, others, atol=1e-5)

    @pytest.mark.parametrize(("size", "sinks"), [(24, 4), (16, 0)])
    def test_one_layer_reads_the_sinks_and_the_last_tokens_side_by_side(self, size, sinks):
        """With one layer keys depend on nothing but their token, so a pass over what is kept has to give the same."""
        config = OpenELMConfig.layerwise(1, 128, 64, num_gqa_groups=2, ffn_dim_divisor=128, vocab_size=400)
        model = random_model(config)
        found = step_by_step(model, TEXT, CacheConfig(window=size, sinks=sinks))
        for end in (size, size + 1, size + 9, len(TEXT)):
            kept = TEXT[: min(end, sinks)] + TEXT[max(sinks, end - (size - sinks)) : end]
            assert_close(found[:, end - 1], model(mx.array([kept]))[:, -1], 1e-4)

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize(("size", "sinks"), [(24, 4), (33, 0)])
    def test_steps_give_what_passes_give(self, tiny_model, monkeypatch, compiled, size, sinks):
        monkeypatch.setattr(kv_cache, "GROWTH_STEP", 16)
        config = CacheConfig(window=size, sinks=sinks)
        tokens, logprobs, cache = decoded(tiny_model, config, compiled=compiled, prompt=TEXT[:10])
        logits = step_by_step(tiny_model, TEXT[:10] + tokens, config)[0]
        expected = (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[9:-1]
        assert np.allclose(logprobs, [row[token].item() for row, token in zip(expected, tokens)], atol=1e-4)  # noqa: B905
        assert cache.arrays[0].shape[2] == size

    def test_a_prompt_shorter_than_the_sinks(self, tiny_model):
        config = CacheConfig(window=16, sinks=8)
        tokens, logprobs, _ = decoded(tiny_model, config, prompt=TEXT[:3], count=40)
        logits = step_by_step(tiny_model, TEXT[:3] + tokens, config)[0]
        found = [(logits[i + 2] - mx.logsumexp(logits[i + 2]))[token].item() for i, token in enumerate(tokens)]
        assert np.allclose(logprobs, found, atol=1e-4)

    def test_what_has_turned_cannot_go_back(self, tiny_model):
        cache = tiny_model.make_cache(CacheConfig(window=16))
        tiny_model(mx.array([TEXT[:16]]), cache=cache)
        assert cache.can_trim
        cache.trim(2)
        tiny_model(mx.array([TEXT[14:30]]), cache=cache)
        assert not cache.can_trim
        with pytest.raises(AssertionError, match="cannot be trimmed"):
            cache.trim(1)

    def test_its_memory_stays_the_same(self, tiny_model):
        cache = tiny_model.make_cache(CacheConfig(window=64))
        steps = generate_tokens(tiny_model, TEXT, max_tokens=200, cache=cache)
        assert len({(next(steps), cache.nbytes)[1] for _ in range(200)}) == 1
        assert isinstance(cache.layout, RotatingKV)
