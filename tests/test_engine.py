import mlx.core as mx
import numpy as np
import pytest

from conftest import assert_close
from mlx_openelm import SamplingConfig, engine, generate_tokens
from mlx_openelm.engine import prefill
from mlx_openelm.errors import MemoryLimitError, PromptError

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def slow_greedy(model, prompt, count):
    """The same by brute force: the whole text through the model for every token."""
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        logits = model(mx.array([tokens]))[0, -1]
        tokens.append(mx.argmax(logits).item())
        logprobs.append((logits - mx.logsumexp(logits))[tokens[-1]].item())
    return tokens[len(prompt) :], logprobs


def test_tokens_and_log_probabilities_are_those_of_brute_force(tiny_model):
    steps = list(generate_tokens(tiny_model, PROMPT, max_tokens=12))
    tokens, logprobs = slow_greedy(tiny_model, PROMPT, 12)
    assert [step.token for step in steps] == tokens
    assert np.allclose([step.logprob for step in steps], logprobs, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_prefill_in_chunks_matches_one_pass(tiny_model, monkeypatch, chunk):
    whole = tiny_model.transformer(mx.array([PROMPT]))[:, -1:]
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    cache = tiny_model.make_cache()
    seen = []
    hidden = prefill(tiny_model, mx.array(PROMPT), cache, lambda done, total: seen.append((done, total)))
    assert_close(hidden, whole, 1e-5)
    assert cache.offset == len(PROMPT)
    assert seen == [(done, 8) for done in range(0, 8, chunk)]


def test_a_cache_is_continued(tiny_model):
    whole = [step.token for step in generate_tokens(tiny_model, PROMPT, max_tokens=10)]
    cache = tiny_model.make_cache()
    tiny_model(mx.array([PROMPT[:5]]), cache=cache)
    assert [step.token for step in generate_tokens(tiny_model, PROMPT[5:], max_tokens=10, cache=cache)] == whole


def test_the_cache_holds_at_most_one_token_more_than_were_taken(tiny_model):
    cache = tiny_model.make_cache()
    steps = generate_tokens(tiny_model, PROMPT, max_tokens=10, cache=cache)
    for count in (1, 2, 3):
        next(steps)
        assert cache.offset <= len(PROMPT) + count


def test_arrays_and_lists_are_taken(tiny_model):
    steps = [list(generate_tokens(tiny_model, tokens, max_tokens=3)) for tokens in (PROMPT, mx.array(PROMPT))]
    assert steps[0] == steps[1]


def test_no_tokens_asked_for_are_none(tiny_model):
    assert list(generate_tokens(tiny_model, PROMPT, max_tokens=0)) == []


def test_seeds_reproduce(tiny_model):
    def draw(seed):
        sampling = SamplingConfig(temperature=1.0, seed=seed)
        return [step.token for step in generate_tokens(tiny_model, PROMPT, max_tokens=10, sampling=sampling)]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("prompt", [[], [400], [-1], [3, 99999]])
def test_prompts_outside_the_vocabulary_are_refused(tiny_model, prompt):
    with pytest.raises(PromptError):
        next(generate_tokens(tiny_model, prompt))


def test_a_prompt_longer_than_memory_is_refused_before_it_is_computed(tiny_model, monkeypatch):
    monkeypatch.setattr(engine, "memory_limit_bytes", lambda: 1_000_000)
    with pytest.raises(MemoryLimitError, match="shorten the prompt"):
        next(generate_tokens(tiny_model, PROMPT * 500))
