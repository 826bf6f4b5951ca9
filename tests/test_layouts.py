from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from conftest import assert_close, random_model
from mlx_openelm import CacheConfig, OpenELMConfig, generate_tokens
from mlx_openelm.cache import kv_cache
from mlx_openelm.cache.config import kv_bytes_per_layer
from mlx_openelm.cache.layouts import FullKV, QuantizedKV, RotatingKV, attention
from mlx_openelm.errors import CacheError
from mlx_openelm.machine.device import replaced_choices

TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 400, 90)]


def decoded(model, config, count=60, prompt=TEXT[:20], compiled=False):
    cache = model.make_cache(config)
    steps = list(generate_tokens(model, prompt, max_tokens=count, cache=cache, compiled=compiled))
    return [step.token for step in steps], [step.logprob for step in steps], cache


def step_by_step(model, tokens, config):
    """Log-probabilities of each token, by a cache that sees one after the other."""
    cache = model.make_cache(config)
    return mx.concatenate([model(mx.array([[token]]), cache=cache) for token in tokens], axis=1)


def normal(*shape_and_seed):
    *shape, seed = shape_and_seed
    return mx.random.normal(shape, key=mx.random.key(seed))


class TestQuantized:
    @pytest.mark.parametrize("length", [1, 3])
    def test_products_of_one_row_give_the_same(self, length):
        """As on GPUs."""
        layout = QuantizedKV(8, 32)
        buffers = layout.quantize(normal(2, 2, 20, 64, 1), normal(2, 2, 20, 64, 2))
        queries, mask = normal(2, 6, length, 64, 3), mx.arange(20) <= 16
        plain = layout.attend_masked(buffers, queries, mask)
        with replaced_choices(backend="metal"):
            assert_close(layout.attend_masked(buffers, queries, mask), plain, 1e-5)

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


class TestArrays:
    """What is kept in a file is what a layout holds, and nothing else fits."""

    LAYOUTS = (FullKV(), QuantizedKV(bits=4, group_size=32), RotatingKV(size=8, sinks=2, rope_base=1e4))

    @pytest.mark.parametrize("layout", LAYOUTS, ids=["full", "quantized", "rotating"])
    @pytest.mark.parametrize("count", [1, 5, 12])
    def test_buffers_come_back(self, layout, count):
        keys, values, queries = (mx.random.normal((1, 2, count, 32), key=mx.random.key(n)) for n in range(3))
        buffers = layout.allocate(keys, values, 16)
        buffers, _ = layout.extend(buffers, 0, keys, values, queries)
        arrays = layout.to_arrays(buffers, count)
        assert len(arrays) == layout.num_arrays
        slots = min(count, 8) if isinstance(layout, RotatingKV) else count
        assert [array.shape[2] for array in arrays[:2]] == [slots, slots]
        again = layout.from_arrays(arrays, count)
        query = mx.random.normal((1, 4, 1, 32), key=mx.random.key(9))
        assert_close(layout.attend(again, query, slots), layout.attend(buffers, query, slots), 1e-6)
        for wrong in (count + 1, count - 1) if count < 8 else (7,):
            with pytest.raises(ValueError, match="does not hold"):
                layout.from_arrays(arrays, wrong)

    def test_every_array_has_to_fit(self):
        layout = RotatingKV(size=8, sinks=2, rope_base=1e4)
        fitting, short = mx.zeros((1, 2, 8, 32)), mx.zeros((1, 2, 7, 32))
        with pytest.raises(ValueError, match="does not hold 8"):
            layout.from_arrays([fitting, short, short], 20)
        assert len(layout.from_arrays([fitting, fitting, mx.zeros((1, 2, 3, 32))], 20)) == 3
        with pytest.raises(ValueError, match="does not hold 8"):
            FullKV().from_arrays([fitting, short], 8)


@pytest.mark.parametrize(("size", "sinks"), [(12, 3), (9, 0), (10, 1)])
@pytest.mark.parametrize("lengths", [(30,), (9, 1, 20), (5, 5, 5, 15), (12, 18), (1,) * 30])
def test_a_window_is_attention_over_the_sinks_and_the_last_tokens(size, sinks, lengths):
    """Against the definition: rotate what each query sees to positions that follow one another, and attend."""
    B, K, H, D, base = 1, 2, 4, 16, 100.0
    layout = RotatingKV(size=size, sinks=sinks, rope_base=base)
    total = sum(lengths)
    plain_keys, values = (mx.random.normal((B, K, total, D), key=mx.random.key(n)) for n in range(2))
    plain_queries = mx.random.normal((B, H, total, D), key=mx.random.key(2))

    def rotated(array, offset):
        return mx.fast.rope(array, D, traditional=False, base=base, scale=1.0, offset=offset)

    expected = []
    for end in range(1, total + 1):
        seen = [*range(min(sinks, end)), *range(max(sinks, end - (size - sinks)), end)]
        window_keys = rotated(plain_keys[:, :, mx.array(seen)], end - len(seen))
        query = rotated(plain_queries[:, :, end - 1 : end], end - 1)
        expected.append(attention(query, window_keys, values[:, :, mx.array(seen)]))
    expected = mx.concatenate(expected, axis=2)

    keys, queries = rotated(plain_keys, 0), rotated(plain_queries, 0)
    for num_steps in (0, 4):  # the last ones by `write`, as in the decoding step
        buffers, found, offset = layout.allocate(keys, values, 4), [], 0
        for length in lengths:
            length = min(length, total - num_steps - offset)
            if length <= 0:
                break
            part = slice(offset, offset + length)
            buffers = layout.grow(buffers, min(offset, size), offset + length)
            buffers, output = layout.extend(buffers, offset, keys[:, :, part], values[:, :, part], queries[:, :, part])
            found.append(output)
            offset += length
        for slot in range(offset, total):
            part = slice(slot, slot + 1)
            buffers = layout.write(buffers, mx.array(slot), keys[:, :, part], values[:, :, part])
            found.append(layout.attend_masked(buffers, queries[:, :, part], mx.ones((1, 1, 1, size), mx.bool_)))
        assert_close(mx.concatenate(found, axis=2), expected, 2e-5)
