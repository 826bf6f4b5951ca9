import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import CacheConfig, SamplingConfig, generate_tokens
from mlx_openelm.cache import kv_cache
from mlx_openelm.errors import CacheError, MemoryLimitError, PromptError
from mlx_openelm.generation.batch import generate_batch
from mlx_openelm.generation.text import Generation, stream_generate

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(3, 400, length).tolist() for length in (9, 30, 1, 17, 4, 50, 12, 2, 8, 21, 3)]
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "sampling": SamplingConfig(temperature=0.9, top_k=40, top_p=0.95, seed=3),
    "penalty": SamplingConfig(repetition_penalty=1.3, repetition_context=10),
}


def alone(model, tokenizer, prompt, number=0, **options):
    sampling = options.pop("sampling", SamplingConfig())
    if sampling.seed is not None:
        sampling = SamplingConfig(**{**vars(sampling), "seed": sampling.seed + number})
    generation = Generation("")
    for piece in stream_generate(model, tokenizer, prompt, sampling=sampling, **options):
        generation.add(piece)
    return generation


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("batch_size", [1, 3, 20])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_row_is_as_its_prompt_alone(tiny_model, tokenizer, monkeypatch, name, batch_size, compiled):
    monkeypatch.setattr(kv_cache, "GROWTH_STEP", 16)
    sampling = SAMPLINGS[name]
    stop = ["e"]  # ends some rows early
    found = dict(
        generate_batch(
            tiny_model,
            tokenizer,
            PROMPTS,
            batch_size=batch_size,
            max_tokens=25,
            sampling=sampling,
            stop=stop,
            compiled=compiled,
        )
    )
    assert sorted(found) == list(range(len(PROMPTS)))
    lengths = set()
    for number, prompt in enumerate(PROMPTS):
        expected = alone(tiny_model, tokenizer, prompt, number, sampling=sampling, max_tokens=25, stop=stop)
        assert found[number].tokens == expected.tokens
        assert found[number].text == expected.text
        assert found[number].finish_reason == expected.finish_reason
        assert np.allclose(found[number].logprobs, expected.logprobs, atol=1e-4)
        lengths.add(len(expected.tokens))
    assert len(lengths) > 1


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_rows_are_as_each_alone(tiny_model, tokenizer, bits):
    config = CacheConfig(bits=bits)
    found = dict(generate_batch(tiny_model, tokenizer, PROMPTS, batch_size=4, max_tokens=12, cache=config))
    for number, prompt in enumerate(PROMPTS):
        steps = list(generate_tokens(tiny_model, prompt, max_tokens=12, cache=tiny_model.make_cache(config)))
        assert [step.token for step in steps] == found[number].tokens


def test_text_prompts_and_the_order_of_numbers(tiny_model, tokenizer):
    prompts = ["Once upon a time", "the fox", "She said"]
    found = list(generate_batch(tiny_model, tokenizer, prompts, batch_size=1, max_tokens=4, numbers=[2, 0]))
    assert [number for number, _ in found] == [2, 0]
    assert found[0][1].prompt == "She said"
    assert found[1][1].tokens == alone(tiny_model, tokenizer, "Once upon a time", max_tokens=4).tokens


def test_no_step_is_computed_behind_the_last_token(tiny_model, tokenizer, monkeypatch):
    from mlx_openelm.generation import engine

    steps = []
    original = engine.DecodeStep.__call__
    monkeypatch.setattr(engine.DecodeStep, "__call__", lambda *parts: (steps.append(1), original(*parts))[1])
    list(generate_batch(tiny_model, tokenizer, PROMPTS[:3], batch_size=3, max_tokens=5))
    assert len(steps) == 4


def test_places_of_rows_that_left_are_given_back(tiny_model, tokenizer, monkeypatch):
    """However many prompts there are, the buffers are as long as their texts are, and two steps of growth."""
    from mlx_openelm.generation import engine

    monkeypatch.setattr(kv_cache, "GROWTH_STEP", 16)
    lengths = []
    original = engine.DecodeStep.__call__

    def watched(step, tokens, state, cache):
        lengths.append(cache.offset)
        return original(step, tokens, state, cache)

    monkeypatch.setattr(engine.DecodeStep, "__call__", watched)
    prompts = [PROMPTS[number % 5] for number in range(60)]
    found = dict(generate_batch(tiny_model, tokenizer, prompts, batch_size=3, max_tokens=12))
    assert len(lengths) > 200
    assert max(lengths) <= 30 + 12 + 2 * 16
    for number in (3, 30, 59):
        assert found[number].tokens == alone(tiny_model, tokenizer, prompts[number], max_tokens=12).tokens


def test_rows_that_hold_fewer_tokens_than_a_new_one_move_on(tiny_model, tokenizer):
    prompts = [[5], [7, 8], list(range(10, 90))]
    found = dict(generate_batch(tiny_model, tokenizer, prompts, batch_size=2, max_tokens=9))
    for number, prompt in enumerate(prompts):
        assert found[number].tokens == alone(tiny_model, tokenizer, prompt, max_tokens=9).tokens


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, PromptError, "batch_size"),
        ({"max_tokens": 0}, PromptError, "max_tokens must be at least 1; got 0"),
        ({"prompts": [[1], []]}, PromptError, "empty"),
        ({"cache": CacheConfig(window=20)}, CacheError, "window"),
        ({"prompts": [[1], [999]]}, PromptError, "vocabulary"),
    ],
)
def test_what_cannot_be_done_is_refused(tiny_model, tokenizer, options, error, message):
    with pytest.raises(error, match=message):
        list(generate_batch(tiny_model, tokenizer, options.pop("prompts", PROMPTS), **options))


def test_more_rows_than_fit_are_refused(tiny_model, tokenizer, monkeypatch):
    from mlx_openelm.generation import engine

    monkeypatch.setattr(engine, "memory_limit_bytes", lambda: 3_000_000)
    assert list(generate_batch(tiny_model, tokenizer, PROMPTS[:1], batch_size=1, max_tokens=200))
    with pytest.raises(MemoryLimitError):
        list(generate_batch(tiny_model, tokenizer, PROMPTS[:1], batch_size=64, max_tokens=200))


def test_mlxs_own_arrays_as_prompts(tiny_model, tokenizer):
    (found,) = generate_batch(tiny_model, tokenizer, [mx.array([3, 4, 5]).tolist()], max_tokens=3)
    assert found[1].stats.prompt_tokens == 3
