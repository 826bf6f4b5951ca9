import io
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from conftest import random_model
from mlx_openelm import CacheConfig, SamplingConfig, generate_tokens
from mlx_openelm.errors import CacheError, PromptError
from mlx_openelm.generation.drafters import Drafter, DraftModel, PromptLookup
from mlx_openelm.generation.sampling import Sampler
from mlx_openelm.generation.speculative import _Writer, speculate_tokens

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4, 1]
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "penalty": SamplingConfig(repetition_penalty=1.3, repetition_context=10),
    "sampling": SamplingConfig(temperature=0.9, top_k=50, top_p=0.95, seed=3),
    "everything": SamplingConfig(temperature=1.2, min_p=0.01, repetition_penalty=1.2, seed=4),
}


class Oracle(Drafter):
    """Knows the text, and errs at random."""

    def __init__(self, text, share, length=4):
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.known, self.share = text, share
        self.length.next_length = lambda: length

    def draft(self, text, count, state):
        guesses = self.known[len(text) : len(text) + count]
        wrong = self.rng.random(len(guesses)) >= self.share
        return mx.array([(g + int(w)) % 400 for g, w in zip(guesses, wrong, strict=True)], mx.uint32)


def steps(model, drafter, count=40, **options):
    stream = generate_tokens if drafter is None else lambda m, p, **o: speculate_tokens(m, p, drafter, **o)
    return list(stream(model, PROMPT, max_tokens=count, **options))


@pytest.fixture
def near_model(tiny_config, tiny_model):
    """One that agrees with `tiny_model` now and then."""
    model = random_model(tiny_config)
    noise = random_model(tiny_config, seed=1)
    model.update(tree_map(lambda own, other: own + 0.2 * other, model.parameters(), noise.parameters()))
    return model


@pytest.mark.parametrize("name", SAMPLINGS)
class TestTheTextIsTheSame:
    def check(self, found, expected, atol=1e-4):
        assert [step.token for step in found] == [step.token for step in expected]
        assert np.allclose([step.logprob for step in found], [step.logprob for step in expected], atol=atol)

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_however_many_guesses_are_right(self, tiny_model, name, share, compiled):
        expected = steps(tiny_model, None, sampling=SAMPLINGS[name])
        drafter = Oracle([*PROMPT, *(step.token for step in expected)], share)
        self.check(steps(tiny_model, drafter, sampling=SAMPLINGS[name], compiled=compiled), expected)
        assert drafter.drafted >= drafter.accepted
        assert drafter.accepted == 31 if share == 1 else drafter.accepted < 31  # in 7 passes of 5 tokens and one of 4

    def test_with_a_draft_model(self, tiny_model, near_model, name):
        drafter = DraftModel(near_model)
        drafter.length.next_length = lambda: 4
        expected = steps(tiny_model, None, sampling=SAMPLINGS[name])
        self.check(steps(tiny_model, drafter, sampling=SAMPLINGS[name]), expected)
        assert 0 < drafter.accepted < drafter.drafted

    def test_with_prompt_lookup(self, tiny_model, name):
        expected = steps(tiny_model, None, sampling=SAMPLINGS[name])
        drafter = PromptLookup()
        drafter.length.next_length = lambda: 4
        self.check(steps(tiny_model, drafter, sampling=SAMPLINGS[name]), expected)
        if name == "greedy":  # the others find no two tokens again
            assert drafter.drafted > 0

    @pytest.mark.parametrize("config", [CacheConfig(bits=8), CacheConfig(bits=4, quantize_after=30)])
    @pytest.mark.parametrize("share", [0.5, 1.0])
    def test_over_a_quantized_cache(self, tiny_model, name, config, share):
        """Also where it becomes quantized on the way: guesses that are refused do not bring that about."""
        options = {"sampling": SAMPLINGS[name]}
        expected = steps(tiny_model, None, cache=tiny_model.make_cache(config), **options)
        drafter = Oracle([*PROMPT, *(step.token for step in expected)], share)
        found = steps(tiny_model, drafter, cache=tiny_model.make_cache(config), **options)
        self.check(found, expected, atol=0.05)  # rounding may move a number to the next value that its bits can hold
        assert drafter.accepted > 0


def test_a_model_that_drafts_for_itself_is_always_right(tiny_model):
    drafter = DraftModel(tiny_model)
    steps(tiny_model, drafter, count=60)
    assert drafter.drafted == drafter.accepted > 0


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_as_many_tokens_as_asked_for(tiny_model, count):
    expected = steps(tiny_model, None, count)
    drafter = Oracle([*PROMPT, *(step.token for step in steps(tiny_model, None, 20))], 1.0)
    assert len(steps(tiny_model, drafter, count)) == len(expected) == count


def test_a_cache_that_was_filled_before(tiny_model, near_model):
    expected = steps(tiny_model, None)
    for drafter in (DraftModel(near_model), PromptLookup()):
        cache = tiny_model.make_cache()
        tiny_model(mx.array([PROMPT[:7]]), cache=cache)
        found = list(speculate_tokens(tiny_model, PROMPT[7:], drafter, max_tokens=40, cache=cache, before=PROMPT[:7]))
        assert [step.token for step in found] == [step.token for step in expected]
        assert cache.offset >= len(PROMPT) + 39


def test_a_window_cannot_go_back(tiny_model):
    with pytest.raises(CacheError, match="cannot be used with `window`"):
        steps(tiny_model, PromptLookup(), cache=tiny_model.make_cache(CacheConfig(window=32)))


def test_another_vocabulary_is_refused(tiny_model, tiny_config):
    with pytest.raises(PromptError, match="vocabulary of 400 tokens; it has 300"):
        steps(tiny_model, DraftModel(random_model(replace(tiny_config, vocab_size=300))))


def test_no_graph_grows_from_pass_to_pass(tiny_model):
    sampler = Sampler(SamplingConfig())
    writer = _Writer(tiny_model, sampler, tiny_model.make_cache(), compiled=False)
    writer.begin((), mx.array(PROMPT), lambda done, total: None)
    drafter = PromptLookup()
    for _ in range(5):
        list(writer.with_drafts(mx.array([1, 2], mx.uint32), drafter, 0.0))
        list(writer.without_drafts(3, drafter.length))
        mx.synchronize()
        dot = io.StringIO()
        mx.export_to_dot(dot, *writer.state)
        assert "shape=rectangle" not in dot.getvalue()
