"""Fused kernels against the plain formulas: on the CPU as C++ of its own (`host_kernels.py`), on a Mac as they are."""

import re
import sys
import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from host_kernels import HostKernels

from conftest import assert_close, random_model
from mlx_openelm import CacheConfig, SamplingConfig
from mlx_openelm.cache.layouts import QuantizedKV
from mlx_openelm.generation.batch import generate_batch
from mlx_openelm.generation.drafters import PromptLookup
from mlx_openelm.generation.engine import generate_tokens
from mlx_openelm.generation.speculative import speculate_tokens
from mlx_openelm.kernels import fused, sources
from mlx_openelm.kernels.dialects import DIALECTS
from mlx_openelm.machine.device import replaced_choices

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
KINDS = {"full": {}, "8-bit": {"bits": 8}, "4-bit": {"bits": 4}, "window": {"window": 12, "sinks": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def built(folder):
    if sys.platform != "linux":
        pytest.skip("coroutines are Linux's")
    return HostKernels(folder)


@pytest.fixture
def kernels(built, monkeypatch):
    """The choices of a Mac, with kernels that run on the CPU."""
    monkeypatch.setattr(mx.fast, "metal_kernel", built)
    fused.forget_kernels()
    built.calls.clear()
    with replaced_choices(backend="metal"):
        yield built
    fused.forget_kernels()


def normal(*shape, dtype=mx.float32, seed=0):
    return mx.random.normal(shape, dtype, key=mx.random.key(seed))


def rotated(qkv, norms, positions, counts, base):
    H, K = counts
    queries, keys, values = mx.split(qkv.swapaxes(1, 2), [H, H + K], axis=1)
    if norms is not None:
        queries, keys = (mx.fast.rms_norm(x, norm, 1e-6) for x, norm in zip((queries, keys), norms, strict=True))
    options = {"traditional": False, "base": base, "scale": 1.0, "offset": positions}
    return *(mx.fast.rope(heads, heads.shape[-1], **options) for heads in (queries, keys)), values


class TestNormalizeAndRotate:
    @pytest.mark.parametrize("head_dim", [8, 64, 80])
    @pytest.mark.parametrize("normalized", [True, False])
    def test_is_the_plain_formula(self, kernels, head_dim, normalized):
        norms = (normal(head_dim, seed=1), normal(head_dim, seed=2)) if normalized else None
        qkv, positions = normal(2, 3, 5, head_dim), mx.array([7, 300], mx.int32)
        found = fused.normalize_and_rotate(qkv, norms, positions, (3, 1), 500.0)
        for one, other in zip(found, rotated(qkv, norms, positions, (3, 1), 500.0), strict=True):
            assert_close(one, other, 1e-4)

    def test_one_position_of_all_rows(self, kernels):
        qkv = normal(2, 1, 4, 8)
        found = fused.normalize_and_rotate(qkv, None, mx.array(9, mx.int32), (2, 1), 10_000.0)
        expected = fused.normalize_and_rotate(qkv, None, mx.array([9, 9], mx.int32), (2, 1), 10_000.0)
        assert all(mx.array_equal(one, other) for one, other in zip(found, expected, strict=True))

    def test_rounds_as_separate_operations_do(self, kernels):
        qkv = normal(1, 1, 4, 64, dtype=mx.bfloat16)
        norms = normal(64, dtype=mx.bfloat16, seed=1), normal(64, dtype=mx.bfloat16, seed=2)
        found = fused.normalize_and_rotate(qkv, norms, mx.array(0, mx.int32), (2, 1), 10_000.0)
        for one, other in zip(found, rotated(qkv, norms, 0, (2, 1), 10_000.0), strict=True):
            assert mx.array_equal(one, other)


class TestQuantized:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize(("head_dim", "group_size"), [(64, 64), (128, 64), (96, 32)])
    def test_words_scales_and_biases_are_those_of_mlx(self, kernels, bits, head_dim, group_size):
        qkv = normal(2, 1, 5, head_dim)
        norms = normal(head_dim, seed=1), normal(head_dim, seed=2)
        where = qkv, norms, mx.array([1, 2], mx.int32), (3, 1), 10_000.0
        queries, found = fused.normalize_rotate_and_quantize(*where, bits, group_size)
        plain_queries, keys, values = fused.normalize_and_rotate(*where)
        assert mx.array_equal(queries, plain_queries)
        expected = QuantizedKV(bits, group_size).quantize(keys, values)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert_close(one.astype(mx.float32), other.astype(mx.float32), 1e-6)

    def test_a_group_of_zeros(self, kernels):
        _, found = fused.normalize_rotate_and_quantize(
            mx.zeros((1, 1, 3, 64)), None, mx.array(0, mx.int32), (1, 1), 10_000.0, 8, 64
        )
        keys = mx.dequantize(*found[:3], group_size=64, bits=8)
        assert mx.array_equal(keys, mx.zeros_like(keys))

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("first", [None, [0, 13]])
    @pytest.mark.parametrize("last", [13, 15, 39])
    def test_attention_is_the_plain_formula(self, kernels, bits, first, last):
        layout = QuantizedKV(bits, 32)
        buffers = layout.quantize(normal(2, 2, 40, 64), normal(2, 2, 40, 64, seed=1))
        queries = normal(2, 6, 1, 64, seed=2)
        offsets = None if first is None else mx.array(first, mx.int32)
        found = fused.attend_quantized(queries, buffers, mx.array(last, mx.int32), offsets, bits, 32)
        slots = mx.arange(40)
        mask = (slots <= last) & (slots >= mx.array(first or [0, 0])[:, None, None, None])
        assert_close(found, layout.attend_masked(buffers, queries, mask), 1e-5)


@pytest.mark.parametrize("width", [1, 100, 256, 700])
def test_add_and_normalize_is_the_plain_formula(kernels, width):
    x, update, weight = normal(3, width), normal(3, width, seed=1), normal(width, seed=2)
    total, normed = fused.add_and_normalize(x, update, weight, 1e-6)
    assert mx.array_equal(total, x + update)
    assert_close(normed, mx.fast.rms_norm(x + update, weight, 1e-6), 1e-5)


class TestDecoding:
    def text(self, model, kind, **options):
        cache = model.make_cache(CacheConfig(**KINDS[kind]))
        steps = list(generate_tokens(model, PROMPT, max_tokens=20, cache=cache, compiled=False, **options))
        return [step.token for step in steps], [step.logprob for step in steps]

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_text_is_the_same(self, tiny_model, kernels, kind):
        with replaced_choices(fused_kernels=False):
            tokens, logprobs = self.text(tiny_model, kind)
        kernels.calls.clear()
        found, found_logprobs = self.text(tiny_model, kind)
        assert found == tokens
        assert np.allclose(found_logprobs, logprobs, atol=1e-3)
        rotating = "normalize_rotate_quantize" if kind.endswith("bit") else "normalize_and_rotate"
        assert kernels.calls.count(f"openelm_{rotating}") >= 19 * 3
        assert kernels.calls.count("openelm_add_and_normalize") >= 19 * 6
        assert kernels.calls.count("openelm_attend_quantized") >= 19 * 3 * kind.endswith("bit")

    @pytest.mark.parametrize("kind", ["full", "8-bit"])
    def test_rows_that_begin_at_different_slots(self, tiny_model, tokenizer, kernels, kind):
        prompts = [PROMPT, PROMPT[:3], PROMPT[2:7]]
        options = {"max_tokens": 9, "cache": CacheConfig(**KINDS[kind]), "compiled": False}

        def texts():
            found = generate_batch(tiny_model, tokenizer, prompts, batch_size=3, **options)
            return {number: generation.tokens for number, generation in found}

        with replaced_choices(fused_kernels=False):
            expected = texts()
        assert texts() == expected

    def test_without_norms_of_queries_and_keys(self, tiny_config, kernels):
        model = random_model(replace(tiny_config, normalize_qk_projections=False))
        with replaced_choices(fused_kernels=False):
            expected = self.text(model, "full")[0]
        assert self.text(model, "full")[0] == expected

    @pytest.mark.parametrize("kind", ["full", "8-bit"])
    def test_on_cuda(self, tiny_model, kernels, monkeypatch, kind):
        """Over exact slices, as long as the cache is full and holds one row."""
        with replaced_choices(fused_kernels=False):
            expected = self.text(tiny_model, kind)[0]
        monkeypatch.setattr(mx.fast, "cuda_kernel", kernels)
        monkeypatch.delattr(mx.fast, "metal_kernel")
        kernels.calls.clear()
        with replaced_choices(backend="cuda"):
            assert self.text(tiny_model, kind)[0] == expected
        assert kernels.calls.count("openelm_add_and_normalize") >= 19 * 6

    @pytest.mark.parametrize("kind", ["full", "8-bit"])
    def test_guesses_are_read_at_once(self, tiny_model, kernels, kind):
        def text():
            cache = tiny_model.make_cache(CacheConfig(**KINDS[kind]))
            steps = speculate_tokens(
                tiny_model, [7, 8] * 6, PromptLookup(4), max_tokens=20, cache=cache, compiled=False
            )
            return [step.token for step in steps]

        with replaced_choices(fused_kernels=False):
            expected = text()
        assert text() == expected


class TestCheck:
    def broken(self, built, monkeypatch, name):
        """The same kernels, one of which gives something else."""

        def create(**options):
            kernel = built(**options)
            if options["name"] != f"openelm_{name}":
                return kernel
            return lambda **arguments: [array + array.dtype.size for array in kernel(**arguments)]

        monkeypatch.setattr(mx.fast, "metal_kernel", create)
        fused.forget_kernels()

    @pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
    @pytest.mark.parametrize("head_dim", [8, 64])
    def test_they_work(self, kernels, dtype, head_dim):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fused.kernels_work(dtype, head_dim, 200)

    @pytest.mark.parametrize(
        "name", ["normalize_and_rotate", "add_and_normalize", "normalize_rotate_quantize", "attend_quantized"]
    )
    def test_a_wrong_one_is_found_and_none_is_used(self, kernels, monkeypatch, name):
        self.broken(kernels, monkeypatch, name)
        with pytest.warns(UserWarning, match="results differ"):
            assert not fused.kernels_work(mx.float32, 64, 200)

    def test_one_that_does_not_compile_is_not_used(self, tiny_model, kernels, monkeypatch):
        def fail(**options):
            raise RuntimeError("[metal::Device] Unable to build metal library from source\nprogram_source:12: error")

        with replaced_choices(fused_kernels=False):
            expected = [step.token for step in generate_tokens(tiny_model, PROMPT, max_tokens=5)]
        monkeypatch.setattr(mx.fast, "metal_kernel", fail)
        fused.forget_kernels()
        with pytest.warns(UserWarning, match="Unable to build metal library from source\\)"):
            assert [step.token for step in generate_tokens(tiny_model, PROMPT, max_tokens=5)] == expected
        assert [step.token for step in generate_tokens(tiny_model, PROMPT, max_tokens=5)] == expected  # told once

    def test_none_on_the_cpu_or_unless_chosen(self, kernels):
        with replaced_choices(fused_kernels=False):
            assert not fused.kernels_work(mx.float32, 64, 200)
        with replaced_choices(backend="cpu"):
            assert not fused.kernels_work(mx.float32, 64, 200)
        assert not kernels.calls


def test_both_dialects_define_the_same_names():
    bodies = [value for name, value in vars(sources).items() if name.isupper()]
    for name in ("GROUP_SHARED", "GROUP_BARRIER", "TEAM_BARRIER", "lane_sum", "e_to", "two_to", "inverse_root"):
        assert any(name in body for body in bodies)
        assert all(name in dialect.header for dialect in DIALECTS.values())
    for name in ("group", "member", "lane", "team"):
        assert all(f"const int {name} =" in dialect.prologue for dialect in DIALECTS.values())


def test_no_name_is_a_word_of_one_of_the_languages():
    reserved = (
        "kernel vertex fragment device constant thread threadgroup threadgroup_imageblock ray_data object_data half"
    )
    reserved += " ushort uchar sampler texture using namespace template typename class struct new delete this operator"
    for body in (value for name, value in vars(sources).items() if name.isupper()):
        assert not set(reserved.split()) & set(re.findall(r"[a-z_]\w*", body))


def test_sampling_is_the_same_with_them(tiny_model, kernels):
    options = {"max_tokens": 15, "compiled": False, "sampling": SamplingConfig(temperature=0.7, seed=3)}
    found = [step.token for step in generate_tokens(tiny_model, PROMPT, **options)]
    with replaced_choices(fused_kernels=False):
        assert [step.token for step in generate_tokens(tiny_model, PROMPT, **options)] == found
