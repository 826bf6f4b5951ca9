import sys

import mlx.core as mx
import pytest

from conftest import random_model
from mlx_openelm import SamplingConfig, generate, generate_batch, generate_tokens, stream_generate
from mlx_openelm.errors import PromptError
from mlx_openelm.generation.engine import Step
from mlx_openelm.generation.text import Stats

PROMPT = "Once upon a time"


@pytest.fixture
def model_that_says(tiny_config, tokenizer, monkeypatch):
    """Makes a model's likeliest tokens spell a text, whatever came before; then it ends the text."""

    def make(text):
        ids = [*tokenizer.encode(text, bos=False), tokenizer.eos_token_id]

        def steps(model, tokens, *, max_tokens, **_):
            return (Step(token, -1.0) for token in [*ids, *[5] * max_tokens][:max_tokens])

        monkeypatch.setattr(sys.modules[stream_generate.__module__], "generate_tokens", steps)
        return random_model(tiny_config)

    return make


def run(model, tokenizer, **arguments):
    chunks = list(stream_generate(model, tokenizer, PROMPT, **arguments))
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason, chunks


def test_text_is_that_of_the_tokens(tiny_model, tokenizer):
    text, reason, chunks = run(tiny_model, tokenizer, max_tokens=20)
    tokens = [step.token for step in generate_tokens(tiny_model, tokenizer.encode(PROMPT), max_tokens=20)]
    assert [chunk.token for chunk in chunks] == tokens
    assert reason == "length"
    assert (PROMPT + text) == tokenizer.decode([*tokenizer.encode(PROMPT), *tokens])
    assert generate(tiny_model, tokenizer, PROMPT, max_tokens=20) == text


def test_ids_are_taken_as_they_are(tiny_model, tokenizer):
    ids = tokenizer.encode(PROMPT)
    assert generate(tiny_model, tokenizer, ids, max_tokens=5) == generate(tiny_model, tokenizer, PROMPT, max_tokens=5)


def test_the_end_of_the_text_ends_it(model_that_says, tokenizer):
    text, reason, chunks = run(model_that_says("there was a fox"), tokenizer)
    assert (text, reason) == (" there was a fox", "stop")
    assert chunks[-1].token == tokenizer.eos_token_id
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


def test_each_of_several_ids_ends_a_text(model_that_says, tokenizer):
    model = model_that_says("there was a fox")
    middle = tokenizer.encode("there was", bos=False)[-1]
    model.config = model.config.with_eos(middle)
    text, reason, chunks = run(model, tokenizer)
    assert (reason, chunks[-1].token) == ("stop", middle)
    assert " there was a fox".startswith(text)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["fox"], " there was a "),
        ([" was a f"], " there"),
        (["x", "was"], " there "),
        (["wolf"], " there was a fox 日本."),
        (["fox 日"], " there was a "),
        ([""], " there was a fox 日本."),
        (["."], " there was a fox 日本"),
    ],
)
def test_stop_strings_straddle_tokens(model_that_says, tokenizer, stop, expected):
    text, reason, _ = run(model_that_says("there was a fox 日本."), tokenizer, stop=stop)
    assert (text, reason) == (expected, "stop")


def test_what_could_begin_a_stop_string_is_held_back_until_it_cannot(model_that_says, tokenizer):
    _, _, chunks = run(model_that_says("there was a fox"), tokenizer, stop=["a fox!"])
    so_far = ""
    for chunk in chunks[:-1]:
        so_far += chunk.text
        assert not so_far.endswith(("a", "a ", "a f", "a fo"))
    assert chunks[-1].text.endswith("a fox")


def test_a_text_cut_within_a_character_says_so(model_that_says, tokenizer):
    text, reason, _ = run(model_that_says("🎉"), tokenizer, max_tokens=3)
    assert (text, reason) == (" \ufffd", "length")


def test_figures_count_tokens(tiny_model, tokenizer):
    *_, last = stream_generate(tiny_model, tokenizer, PROMPT, max_tokens=5)
    assert last.stats.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert last.stats.generated_tokens == 5
    assert last.stats.decode_tokens_per_second == pytest.approx(4 / last.stats.decode_seconds)
    assert last.stats.peak_memory_bytes > 0


@pytest.mark.parametrize(("prompt", "max_tokens"), [("", 5), ([], 5), ("a", 0), ("a", -1)])
def test_nothing_to_do_is_refused(tiny_model, tokenizer, prompt, max_tokens):
    with pytest.raises(PromptError):
        generate(tiny_model, tokenizer, prompt, max_tokens=max_tokens)


def test_float16_and_quantized_models_generate(tiny_folder, tmp_path, tokenizer):
    from mlx_openelm import convert, load

    convert(tiny_folder, tmp_path / "out", quantize=8, group_size=32)
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        model, text = load(tmp_path / "out", dtype=dtype)
        assert model(mx.array([[1]])).dtype == dtype
        assert len(list(stream_generate(model, text, PROMPT, max_tokens=3))) <= 3


def test_speeds_count_what_was_computed_in_the_time_that_it_took():
    stats = Stats(100, 21, prefill_seconds=2.0, decode_seconds=4.0, peak_memory_bytes=0, reused_tokens=90)
    assert stats.prefill_tokens_per_second == 5  # 90 of the 100 were there already
    assert stats.decode_tokens_per_second == 5  # the first of the 21 came with the prompt
    assert Stats(1, 1, 0.0, 0.0, 0).decode_tokens_per_second == 0


@pytest.mark.parametrize("seed", [None, 7])
def test_every_sampled_text_can_be_had_again_by_its_seed(tiny_model, tokenizer, seed):
    sampling = SamplingConfig(temperature=1.0, seed=seed)
    *_, last = chunks = list(stream_generate(tiny_model, tokenizer, PROMPT, max_tokens=20, sampling=sampling))
    found = last.stats.seed
    assert found == seed or (seed is None and 0 <= found < 1 << 32)
    again = SamplingConfig(temperature=1.0, seed=found)
    assert generate(tiny_model, tokenizer, PROMPT, max_tokens=20, sampling=again) == "".join(c.text for c in chunks)
    batch = dict(generate_batch(tiny_model, tokenizer, [PROMPT] * 3, max_tokens=20, sampling=sampling, batch_size=2))
    for generation in batch.values():
        again = SamplingConfig(temperature=1.0, seed=generation.stats.seed)
        assert generate(tiny_model, tokenizer, PROMPT, max_tokens=20, sampling=again) == generation.text
    assert len({generation.stats.seed for generation in batch.values()}) == 3


def test_a_greedy_text_has_no_seed(tiny_model, tokenizer):
    *_, last = stream_generate(tiny_model, tokenizer, PROMPT, max_tokens=2, sampling=SamplingConfig(seed=3))
    assert last.stats.seed is None
