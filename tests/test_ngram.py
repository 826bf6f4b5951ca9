"""The 5-gram model that the built-in model is compared with is a model too: its probabilities add up to one."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from ngram import KneserNey


@pytest.fixture(scope="module")
def stream():
    rng = np.random.default_rng(0)
    tokens = [0, 1, 2, 3]
    for _ in range(3000):  # each token mostly follows from the two before
        tokens.append(int((3 * tokens[-1] + tokens[-2]) % 5 if rng.random() < 0.8 else rng.integers(5)))
    return np.array(tokens)


@pytest.mark.parametrize("context", [[1, 2, 3, 4], [0, 0, 0, 0], [4, 3, 1, 0]])
def test_probabilities_add_up_to_one(stream, context):
    model = KneserNey(stream, 5)
    total = sum(np.exp(-model.losses(np.array([*context, token]))[0]) for token in range(5))
    assert total == pytest.approx(1, abs=1e-9)


def test_by_hand():
    """Bigrams of a b a b a c: after `a` stand b twice and c once; c(a) = 3."""
    model = KneserNey(np.array([0, 1, 0, 1, 0, 2]), 3, order=2)
    assert model.levels[0].counts.tolist() == [2, 1, 2]  # ab, ac, ba
    assert model.levels[1].counts.tolist() == [1, 1, 1]  # each token was seen after one other
    discounts, below = model.discounts
    unigram = (1 - below[1]) / 3 + 3 * below[1] / 3 / 3
    expected = (2 - discounts[2]) / 3 + (discounts[1] + discounts[2]) / 3 * unigram
    assert np.exp(-model.losses(np.array([0, 1]))[0]) == pytest.approx(expected)


def test_the_context_that_decides_is_used(stream):
    train, held_out = stream[:2500], stream[2500:]
    loss = {order: KneserNey(train, 5, order).losses(held_out).mean() for order in (1, 3, 5)}
    assert loss[1] == pytest.approx(np.log(5), abs=0.05)
    assert loss[3] < loss[5] < loss[1] - 0.8  # two tokens before decide; more of them only make counts scarce
