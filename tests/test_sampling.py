import math

import mlx.core as mx
import numpy as np
import pytest

from conftest import assert_close
from mlx_openelm import SamplingConfig
from mlx_openelm.errors import SamplingError
from mlx_openelm.generation.sampling import Sampler, restrict

LOGITS = mx.log(mx.array([0.5, 0.05, 0.3, 0.15]))


def kept(config, logits=LOGITS):
    return np.flatnonzero(np.isfinite(np.array(restrict(logits, config)))).tolist()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SamplingConfig(), [0, 1, 2, 3]),
        (SamplingConfig(top_k=1), [0]),
        (SamplingConfig(top_k=3), [0, 2, 3]),
        (SamplingConfig(top_k=100), [0, 1, 2, 3]),
        (SamplingConfig(top_p=0.4), [0]),  # the first token alone is more than enough
        (SamplingConfig(top_p=5e-324), [0]),
        (SamplingConfig(top_p=0.51), [0, 2]),
        (SamplingConfig(top_p=0.94), [0, 2, 3]),
        (SamplingConfig(min_p=0.25), [0, 2, 3]),
        (SamplingConfig(min_p=1.0), [0]),
        (SamplingConfig(top_k=2, top_p=0.6), [0]),  # of the two left, the first has 0.625
        (SamplingConfig(top_p=0.94, min_p=0.5), [0, 2]),
    ],
)
def test_cuts_by_hand(config, expected):
    assert kept(config) == expected


def test_what_is_left_keeps_its_scores():
    assert_close(restrict(LOGITS, SamplingConfig(top_k=2))[mx.array([0, 2])], LOGITS[mx.array([0, 2])], 0)


def test_ties_at_the_cut_stay_together():
    assert kept(SamplingConfig(top_k=2), mx.array([1.0, 2.0, 1.0, 0.0])) == [0, 1, 2]


def draw(config, count, logits=LOGITS, prompt=(0,)):
    sampler = Sampler(config)
    state = sampler.start(mx.array(prompt))
    drawn = []
    for _ in range(count):
        token, _, state = sampler.choose(logits, state)
        drawn.append(token.item())
    return drawn


def test_temperature_0_takes_the_likeliest():
    assert draw(SamplingConfig(), 5) == [0] * 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_probabilities(temperature):
    count = 4000
    found = np.bincount(draw(SamplingConfig(temperature=temperature, seed=1), count), minlength=4) / count
    expected = np.exp(np.array(LOGITS) / temperature)
    expected /= expected.sum()
    assert np.abs(found - expected).max() < 4 * math.sqrt(0.25 / count)


@pytest.mark.parametrize("cut", [{"top_p": 0.65}, {"min_p": 0.3}], ids=["top_p", "min_p"])
def test_cuts_are_those_of_the_tempered_probabilities(cut):
    """As in Hugging Face's code: 0.7, 0.2 and 0.1 are 0.52, 0.28 and 0.20 at temperature 2; mlx-lm cuts before it."""
    logits = mx.log(mx.array([0.7, 0.2, 0.1]))

    def drawn(temperature):
        sampler = Sampler(SamplingConfig(temperature=temperature, seed=0, **cut))
        state = sampler.start(mx.array([0]))
        found = set()
        for _ in range(60):
            token, _, state = sampler.choose(logits, state)
            found.add(token.item())
        return found

    assert drawn(1.0) == {0}
    assert drawn(2.0) == ({0, 1} if "top_p" in cut else {0, 1, 2})


def test_the_same_seed_draws_the_same():
    config = SamplingConfig(temperature=1.0, seed=7)
    assert draw(config, 50) == draw(config, 50)
    assert draw(config, 50) != draw(SamplingConfig(temperature=1.0, seed=8), 50)
    assert draw(SamplingConfig(temperature=1.0), 50) != draw(SamplingConfig(temperature=1.0), 50)


def test_mlxs_own_random_state_is_left_alone():
    mx.random.seed(3)
    expected = mx.random.uniform().item()
    mx.random.seed(3)
    draw(SamplingConfig(temperature=1.0, seed=1), 5)
    assert mx.random.uniform().item() == expected


def test_log_probabilities_are_the_models_own():
    sampler = Sampler(SamplingConfig(temperature=0.5, top_k=1, repetition_penalty=1.3))
    token, logprob, _ = sampler.choose(LOGITS.astype(mx.float16) + 3, sampler.start(mx.array([1])))
    assert (token.item(), logprob.dtype) == (0, mx.float32)
    assert logprob.item() == pytest.approx(math.log(0.5), abs=2e-3)  # float16 logits


class TestRepetitionPenalty:
    def test_by_hand(self):
        """Positive logits are divided, negative ones multiplied, each token once however often it came."""
        logits = mx.array([2.0, -1.0, 1.9, 0.5])
        sampler = Sampler(SamplingConfig(repetition_penalty=2.0))
        state = sampler.start(mx.array([0, 1, 0]))
        assert_close(sampler._penalize(logits, state[1]), mx.array([1.0, -2.0, 1.9, 0.5]), 1e-6)
        assert sampler.choose(logits, state)[0].item() == 2

    def test_generated_tokens_count(self):
        logits = mx.array([2.0, 1.8, 1.6, 0.0])
        assert draw(SamplingConfig(repetition_penalty=1.5), 4, logits, prompt=(3,)) == [0, 1, 2, 0]

    def test_the_window_forgets(self):
        logits = mx.array([2.0, 1.8, 1.6, 0.0])
        config = SamplingConfig(repetition_penalty=1.5, repetition_context=1)
        assert draw(config, 4, logits, prompt=(0, 3)) == [0, 1, 0, 1]

    def test_a_window_longer_than_the_prompt_fills_up_and_then_forgets(self):
        logits = mx.array([2.0, 1.8, 1.6, 0.0])
        config = SamplingConfig(repetition_penalty=1.5, repetition_context=3)
        assert draw(config, 5, logits, prompt=(0,)) == [1, 2, 0, 0, 1]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_context": 0},
    ],
)
def test_values_out_of_range_are_refused_by_name(values):
    (name,) = values
    with pytest.raises(SamplingError, match=name):
        SamplingConfig(**values)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(repetition_penalty=1.4, repetition_context=5),
        SamplingConfig(temperature=0.9, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=3),
    ],
    ids=["greedy", "penalty", "everything"],
)
def test_rows_are_chosen_as_each_alone(config):
    sampler = Sampler(config)
    logits = 3 * mx.random.normal((4, 200), key=mx.random.key(1))
    alone = [sampler.start(mx.array([1, 2 + row]), seed=row) for row in range(4)]
    states = mx.stack([key for key, _ in alone]), mx.stack([recent for _, recent in alone])
    for _ in range(5):
        tokens, logprobs, states = sampler.choose_rows(logits, states)
        for row in range(4):
            token, logprob, alone[row] = sampler.choose(logits[row], alone[row])
            assert token.item() == tokens[row].item()
            assert logprob.item() == pytest.approx(logprobs[row].item(), abs=1e-6)


def test_choices_along_a_text_follow_the_probabilities_at_each_place():
    """What speculative decoding checks guesses by: a guess is right as often as its token is probable."""
    count = 4000
    logits = mx.stack([LOGITS, LOGITS[::-1]])
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=5))
    state, drawn = sampler.start(mx.array([0])), []
    for _ in range(count):
        tokens, _, (keys, recents) = sampler.choose_along(logits, state)
        state = keys[1], recents[1]
        drawn.append(tokens)
    found = np.stack([np.bincount(of, minlength=4) / count for of in np.array(mx.stack(drawn)).T])
    assert np.abs(found - np.exp(np.array(logits))).max() < 4 * math.sqrt(0.25 / count)
    pairs = np.array(mx.stack(drawn))
    both = ((pairs[:, 0] == 0) & (pairs[:, 1] == 3)).mean()  # independent of one another
    assert abs(both - 0.5 * 0.5) < 4 * math.sqrt(0.25 / count)


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(temperature=1.0, repetition_penalty=1.3, seed=2)])
def test_choices_along_a_text_are_those_one_after_another(config):
    logits = 3 * mx.random.normal((5, 100), key=mx.random.key(1))
    sampler = Sampler(config)
    state = sampler.start(mx.array([1, 2]))
    tokens, logprobs, (keys, recents) = sampler.choose_along(logits, state)
    for place in range(5):
        token, logprob, state = sampler.choose(logits[place], state)
        assert token.item() == tokens[place].item()
        assert logprob.item() == pytest.approx(logprobs[place].item(), abs=1e-5)
        assert mx.array_equal(state[0], keys[place]).item()
        assert mx.array_equal(state[1], recents[place]).item()


def test_seeds_may_have_63_bits():
    assert SamplingConfig(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(SamplingError, match="seed must be"):
        SamplingConfig(seed=2**63)


def test_top_p_ends_with_the_token_that_reaches_it():
    quarters = mx.log(mx.array([0.25, 0.25, 0.25, 0.25]))
    assert np.isfinite(np.array(restrict(quarters, SamplingConfig(temperature=1, top_p=0.5)))).sum() == 2
    assert np.isfinite(np.array(restrict(quarters, SamplingConfig(temperature=1, top_p=0.51)))).sum() == 3


def test_one_row_is_chosen_as_alone():
    sampler = Sampler(SamplingConfig(temperature=1.0, repetition_penalty=1.3, repetition_context=4, seed=5))
    state = sampler.start(mx.array([1, 2, 3]))
    logits = mx.random.normal((6,), key=mx.random.key(3)) * 3
    token, logprob, (key, recent) = sampler.choose(logits, state)
    tokens, logprobs, (keys, recents) = sampler.choose_rows(logits[None], (state[0][None], state[1][None]))
    assert (tokens.tolist(), logprobs.tolist()) == ([token.item()], [logprob.item()])
    assert (keys.tolist(), recents.tolist()) == ([key.tolist()], [recent.tolist()])


def test_a_config_that_samples_gets_a_seed_once():
    assert SamplingConfig().with_seed().seed is None
    assert SamplingConfig(seed=7).with_seed().seed == 7
    sampled = SamplingConfig(temperature=0.5, top_k=3)
    drawn = sampled.with_seed()
    assert drawn.seed is not None
    assert (drawn.temperature, drawn.top_k) == (0.5, 3)
    assert drawn.with_seed() is drawn
    assert sampled.with_seed().seed != drawn.seed


def test_a_penalty_makes_small_negative_logits_smaller():
    sampler = Sampler(SamplingConfig(repetition_penalty=2.0, repetition_context=3))
    logits = mx.array([0.0, -0.5, -0.9, 3.0])
    _, recent = sampler.start(mx.array([0, 1, 3]))
    assert sampler._penalize(logits, recent).tolist() == pytest.approx([0.0, -1.0, -0.9, 1.5])


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1e-40},
        {"temperature": 1e39},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"repetition_penalty": 1e-3},
        {"repetition_penalty": 1e39},
        {"repetition_penalty": float("nan")},
        {"repetition_context": 3_000_000_000},
        {"repetition_context": 65_537},
        {"top_p": float("nan")},
        {"min_p": float("nan")},
    ],
)
def test_numbers_that_float32_cannot_use_are_refused(values):
    (name,) = values
    with pytest.raises(SamplingError, match=f"{name} must be"):
        SamplingConfig(**values)


@pytest.mark.parametrize("temperature", [1e-5, 1e5])
def test_the_ends_of_the_range_still_sample(temperature):
    assert set(draw(SamplingConfig(temperature=temperature, seed=1), 50)) <= {0, 1, 2, 3, 4, 5, 6, 7}
