import json

import mlx.core as mx
import pytest

from conftest import random_model
from mlx_openelm import CacheConfig, SamplingConfig
from mlx_openelm.errors import CacheError, OutputError
from mlx_openelm.generation.prompt_cache import PromptCache, model_fingerprint
from mlx_openelm.generation.text import Generation, stream_generate
from mlx_openelm.model.openelm import FeedForward

TEXT = [(7 * number) % 397 for number in range(60)]
KINDS = [CacheConfig(), CacheConfig(bits=8), CacheConfig(bits=4, quantize_after=30), CacheConfig(window=200)]
TURNED = CacheConfig(window=24)


def run(model, tokenizer, prompt, cache=None, **options):
    generation = Generation("")
    for piece in stream_generate(model, tokenizer, prompt, max_tokens=10, cache=cache, **options):
        generation.add(piece)
    return generation


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.label)
@pytest.mark.parametrize("shared", [0, 1, 30, 59, 60])
def test_what_two_prompts_share_is_computed_once(tiny_model, tokenizer, config, shared):
    cache = PromptCache(tiny_model, config)
    run(tiny_model, tokenizer, TEXT, cache)
    prompt = [*TEXT[:shared], 5, 6, 7] if shared < 60 else TEXT
    found = run(tiny_model, tokenizer, prompt, cache)
    goes_back_before_it_was_quantized = config.quantize_after > shared
    assert found.stats.reused_tokens == (0 if goes_back_before_it_was_quantized else min(shared, len(prompt) - 1))
    if config.bits is None:
        assert found.tokens == run(tiny_model, tokenizer, prompt).tokens
    assert cache.tokens == [*prompt, *found.tokens][: cache.kv.offset]


def test_repetition_counts_what_is_reused(tiny_model, tokenizer):
    sampling = SamplingConfig(repetition_penalty=1.5)
    cache = PromptCache(tiny_model)
    run(tiny_model, tokenizer, TEXT, cache, sampling=sampling)
    again = run(tiny_model, tokenizer, TEXT, cache, sampling=sampling)
    assert again.stats.reused_tokens == 59
    assert again.tokens == run(tiny_model, tokenizer, TEXT, sampling=sampling).tokens


@pytest.mark.parametrize("shared", [12, 40])
def test_a_shorter_text_is_not_quantized_because_a_longer_one_was(tiny_model, tokenizer, shared):
    config = CacheConfig(bits=4, quantize_after=30)
    cache = PromptCache(tiny_model, config)
    run(tiny_model, tokenizer, TEXT, cache)
    prompt = [*TEXT[:shared], 5]
    found = run(tiny_model, tokenizer, prompt, cache)
    assert (found.stats.reused_tokens > 0) == (shared > 30)
    if shared < 30:
        assert found.logprobs == run(tiny_model, tokenizer, prompt, PromptCache(tiny_model, config)).logprobs


@pytest.mark.parametrize("config", [CacheConfig(), CacheConfig(bits=8), TURNED], ids=lambda config: config.label)
@pytest.mark.parametrize("layer", [1, 4], ids=["prefill", "step"])  # of three: the second one each time
def test_an_interruption_within_a_pass_leaves_nothing_half_done(tiny_model, tokenizer, monkeypatch, config, layer):
    cache = PromptCache(tiny_model, config)
    run(tiny_model, tokenizer, TEXT[:20], cache)
    calls = []
    original = FeedForward.__call__

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == layer + 1:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FeedForward, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, tokenizer, [*TEXT[:20], 1, 2, 3], cache)
    assert cache.tokens == []
    expected = run(tiny_model, tokenizer, TEXT[:23], PromptCache(tiny_model, config))
    assert run(tiny_model, tokenizer, TEXT[:23], cache).logprobs == expected.logprobs


def test_a_window_that_has_turned_starts_again(tiny_model, tokenizer):
    cache = PromptCache(tiny_model, TURNED)
    first = run(tiny_model, tokenizer, TEXT, cache)
    went_on = [*TEXT, *first.tokens, 5]
    assert run(tiny_model, tokenizer, went_on, cache).stats.reused_tokens > len(TEXT)
    assert run(tiny_model, tokenizer, [*TEXT[:30], 5], cache).stats.reused_tokens == 0


@pytest.mark.parametrize("config", [*KINDS, TURNED], ids=lambda config: config.label)
def test_a_file_brings_everything_back(tiny_model, tokenizer, tmp_path, config):
    cache = PromptCache(tiny_model, config)
    run(tiny_model, tokenizer, TEXT, cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = PromptCache.load(tiny_model, tmp_path / "cache.safetensors", config)
    assert loaded.tokens == cache.tokens
    assert loaded.config == config
    longer = [*cache.tokens, 5, 6]
    assert run(tiny_model, tokenizer, longer, loaded).logprobs == run(tiny_model, tokenizer, longer, cache).logprobs


def test_an_empty_one_is_kept_too(tiny_model, tmp_path):
    PromptCache(tiny_model).save(tmp_path / "cache")
    assert PromptCache.load(tiny_model, tmp_path / "cache").tokens == []


def test_the_fingerprint_follows_the_weights(tiny_config):
    model = random_model(tiny_config)
    before = model_fingerprint(model)
    assert model_fingerprint(random_model(tiny_config)) == before
    model.transformer.layers[1].ffn.proj_2.weight[3, 5] += 0.001
    assert model_fingerprint(model) != before
    model = random_model(tiny_config)
    model.transformer.norm.weight = model.transformer.norm.weight[::-1]
    assert model_fingerprint(model) != before
    model = random_model(tiny_config)
    model.set_dtype(mx.float16)
    assert model_fingerprint(model) != before


class TestFilesThatDoNotFit:
    @pytest.fixture
    def path(self, tiny_model, tokenizer, tmp_path):
        cache = PromptCache(tiny_model)
        run(tiny_model, tokenizer, TEXT, cache)
        cache.save(tmp_path / "cache")
        return tmp_path / "cache"

    def test_another_model(self, tiny_config, path):
        with pytest.raises(CacheError, match="another model"):
            PromptCache.load(random_model(tiny_config, seed=1), path)

    def test_another_way_to_keep(self, tiny_model, path):
        with pytest.raises(CacheError, match=r"another KV cache \(full, not 8-bit\)"):
            PromptCache.load(tiny_model, path, CacheConfig(bits=8))

    def test_no_prompt_cache(self, tiny_model, tmp_path):
        (tmp_path / "text").write_text("hello")
        with pytest.raises(CacheError, match="not a prompt cache"):
            PromptCache.load(tiny_model, tmp_path / "text")
        mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(3)})
        with pytest.raises(CacheError, match="not a prompt cache"):
            PromptCache.load(tiny_model, tmp_path / "other.safetensors")

    def test_a_damaged_one(self, tiny_model, path):
        arrays, about = mx.load(str(path), format="safetensors", return_metadata=True)
        for broken in (
            {**arrays, "layers.1.0": arrays["layers.1.0"][..., :9, :]},
            {"layers.0.0": arrays["layers.0.0"]},
        ):
            mx.save_safetensors(str(path) + ".safetensors", broken, about)
            with pytest.raises(CacheError, match="damaged"):
                PromptCache.load(tiny_model, path.with_name("cache.safetensors"))

    def test_a_place_that_cannot_be_written(self, tiny_model, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be written"):
            PromptCache(tiny_model).save(tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", None),
        ("config", "{"),
        ("config", '{"zzz": 1}'),
        ("config", '{"bits": 7}'),
        ("config", "[1]"),
        ("tokens", None),
        ("tokens", "null"),
        ("tokens", '["a"]'),
        ("tokens", "[1.5, 2]"),
        ("tokens", "[true]"),
        ("tokens", "[-1]"),
        ("tokens", "[400]"),
        ("tokens", "[" * 5000),
        ("tokens", "[1, 2]"),
        ("quantized", ""),
        ("quantized", "true"),
        ("quantized", None),
    ],
)
def test_damaged_metadata_is_one_error(tiny_model, tmp_path, name, value):
    cache = PromptCache(tiny_model)
    cache.reuse([1, 2, 3])
    tiny_model(mx.array([[1, 2, 3]]), cache=cache.kv)
    cache.hold([1, 2, 3])
    cache.save(tmp_path / "cache")
    arrays, about = mx.load(str(tmp_path / "cache"), format="safetensors", return_metadata=True)
    about.pop(name) if value is None else about.update({name: value})
    mx.save_safetensors(str(tmp_path / "other.safetensors"), arrays, about)
    with pytest.raises(CacheError, match=r"other\.safetensors is damaged"):
        PromptCache.load(tiny_model, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "damage", ["nan", "inf", "dtype", "another float", "heads", "width", "missing", "rows", "axis", "scalar", "empty"]
)
def test_arrays_that_the_model_would_not_have_written_are_refused(tiny_model, tmp_path, damage):
    cache = PromptCache(tiny_model)
    tiny_model(mx.array([[1, 2, 3]]), cache=cache.kv)
    cache.hold([1, 2, 3])
    cache.save(tmp_path / "cache")
    arrays, about = mx.load(str(tmp_path / "cache"), format="safetensors", return_metadata=True)
    name = "layers.1.0"
    array = arrays.pop(name)
    changed = {
        "nan": mx.where(mx.arange(array.shape[-1]) == 2, mx.nan, array),
        "inf": mx.where(mx.arange(array.shape[-1]) == 2, mx.inf, array),
        "dtype": array.astype(mx.int32),
        "another float": array.astype(mx.float16),
        "axis": array[0],
        "scalar": array[0, 0, 0, 0],
        "empty": array[..., :0],
        "heads": array[:, :1] if array.shape[1] > 1 else mx.concatenate([array, array], axis=1),
        "width": array[..., :-1],
        "rows": mx.concatenate([array, array]),
    }
    if damage in changed:
        arrays[name] = changed[damage]
    mx.save_safetensors(str(tmp_path / "other.safetensors"), arrays, about)
    with pytest.raises(CacheError, match="is damaged"):
        PromptCache.load(tiny_model, tmp_path / "other.safetensors")


@pytest.mark.parametrize("change", ["overlap", "beyond the end", "twice", "metadata"])
def test_a_header_that_lies_is_refused(tiny_model, tmp_path, change):
    cache = PromptCache(tiny_model)
    tiny_model(mx.array([[1, 2, 3]]), cache=cache.kv)
    cache.hold([1, 2, 3])
    cache.save(tmp_path / "cache")
    raw = (tmp_path / "cache").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    one, other = header["layers.0.0"], header["layers.0.1"]
    if change == "overlap":
        one["data_offsets"] = other["data_offsets"]
    if change == "beyond the end":
        one["data_offsets"] = [offset + len(raw) for offset in one["data_offsets"]]
    if change == "metadata":
        header["__metadata__"]["tokens"] = [1, 2, 3]
    text = json.dumps(header)
    if change == "twice":
        text = text[:-1] + f', "layers.0.0": {json.dumps(one)}' + "}"
    (tmp_path / "cache").write_bytes(len(text).to_bytes(8, "little") + text.encode() + raw[8 + length :])
    with pytest.raises(CacheError, match="is damaged or incomplete"):
        PromptCache.load(tiny_model, tmp_path / "cache")
