"""Scores equal those of one plain pass per request, however the work is divided."""

import random

import mlx.core as mx
import numpy as np
import pytest

from conftest import SMALL_CONFIG, random_model
from mlx_openelm.evaluation.requests import Request
from mlx_openelm.evaluation.scorer import FAILED, Scorer, ScorerConfig

WORDS = ("the", "cat", "sat", "on", "mat", "a", "big", "dog", "ran", "to", "red", "house", "fox", "😀", "é", ",", ".")


def text(random, count):
    return " ".join(random.choice(WORDS) for _ in range(count))


def some_requests(count, seed=0, longest=30):
    """Shared and lone contexts, blanks at their ends, none at all, single tokens, repeats, and texts that are cut."""
    chance = random.Random(seed)
    ends = ["", " ", "\n", " \n  "]
    contexts = [text(chance, chance.randint(0, 12)) + chance.choice(ends) for _ in range(count // 4)]
    contexts += ["", text(chance, longest)]
    found = [Request(chance.choice(contexts), " " + text(chance, chance.randint(1, 5))) for _ in range(count)]
    return found + found[: count // 10]


def plain(model, scorer, request):
    """One pass over the ids alone."""
    encoded = scorer.encode(request)
    logits = model(mx.array(encoded.inputs)[None])[0].astype(mx.float32)
    log_p = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(np.float64)
    places = np.arange(len(encoded.ids) - 1 - encoded.num_scored, len(encoded.ids) - 1)
    tokens = encoded.ids[places + 1]
    return log_p[places, tokens].sum(), bool((log_p[places].argmax(axis=-1) == tokens).all())


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL_CONFIG)


@pytest.fixture(scope="module")
def given(model, tokenizer):
    """Requests and their scores one by one."""
    found = some_requests(120)
    scorer = Scorer(model, tokenizer)
    return found, [plain(model, scorer, request) for request in found]


def check(scores, expected):
    for score, (log_likelihood, is_greedy) in zip(scores, expected, strict=True):
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
        assert score.is_greedy == is_greedy


def test_scores_are_those_of_one_pass_per_request(model, tokenizer, given):
    requests, expected = given
    scorer = Scorer(model, tokenizer)
    scores = scorer.score(requests)
    check(scores, expected)
    assert any(score.is_truncated for score in scores)
    assert not all(score.is_truncated for score in scores)


def sizes(scorer, chunk, block, rows):
    scorer._plan = type(scorer._plan)(chunk, block, rows)
    scorer._tree.chunk_size = chunk
    return scorer


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("chunk", "block", "rows", "calls"), [(1, 1, 1, 1), (7, 3, 2, 7), (64, 16, 5, 3), (999, 9, 9, 1)]
)
def test_chunks_blocks_and_calls_change_nothing(model, tokenizer, given, share, chunk, block, rows, calls):
    requests, expected = (part[: 20 * chunk] for part in given)
    scorer = sizes(Scorer(model, tokenizer, ScorerConfig(share=share)), chunk, block, rows)
    size = -(-len(requests) // calls)
    scores = [s for start in range(0, len(requests), size) for s in scorer.score(requests[start : start + size])]
    check(scores, expected)


def test_the_order_changes_nothing(model, tokenizer, given):
    requests, expected = given
    order = random.Random(1).sample(range(len(requests)), len(requests))
    scores = Scorer(model, tokenizer).score([requests[number] for number in order])
    check(scores, [expected[number] for number in order])


def test_memory_bounds_the_sizes(model, tokenizer, given):
    requests, expected = given
    scorer = Scorer(model, tokenizer, ScorerConfig(memory_bytes=100_000))
    assert scorer._plan.chunk_size < Scorer(model, tokenizer)._plan.chunk_size
    check(scorer.score(requests), expected)


def test_what_texts_share_is_computed_once(model, tokenizer):
    scorer = Scorer(model, tokenizer)
    context = "The fox ran to the river, where the"
    scorer.score([Request(context, " water"), Request(context, " house")])
    first = scorer.tokens_computed
    scorer.score([Request(context, " water"), Request(context, " fox")])
    assert scorer.tokens_computed < first + len(tokenizer.encode(context))


def test_a_greedy_continuation_is_recognised(model, tokenizer):
    tokens = tokenizer.encode("The fox")
    best = int(mx.argmax(model(mx.array([tokens]))[0, -1]).item())
    scorer = Scorer(model, tokenizer)
    encoded = scorer.encode.truncated([*tokens, best], 1)
    other = scorer.encode.truncated([*tokens, (best + 1) % 400], 1)
    assert [score.is_greedy for score in scorer.score_tokens([encoded, other])] == [True, False]


def test_what_cannot_be_scored_is_marked_and_the_rest_is_scored(model, tokenizer, given):
    requests, expected = given
    scores = Scorer(model, tokenizer).score([Request("The fox", ""), requests[0]])
    assert scores[0] is FAILED
    assert not scores[0].is_finite
    check(scores[1:], expected[:1])


def test_bfloat16_is_that_of_a_plain_computation(model, tokenizer, given):
    requests, _ = given
    scores = Scorer(model, tokenizer, ScorerConfig(emulate_bfloat16=True)).score(requests[:20])
    scorer = Scorer(model, tokenizer)
    for request, score in zip(requests[:20], scores, strict=True):
        encoded = scorer.encode(request)
        logits = model(mx.array(encoded.inputs)[None])[0].astype(mx.bfloat16).astype(mx.float32)
        log_p = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(mx.bfloat16)
        places = mx.arange(len(encoded.ids) - 1 - encoded.num_scored, len(encoded.ids) - 1)
        tokens = mx.array(encoded.ids)[places + 1]
        total = log_p[places, tokens].astype(mx.float32).sum().astype(mx.bfloat16)
        # A logit at the border of two bfloat16 values falls on either side of it.
        assert score.rounded == pytest.approx(total.item(), rel=2**-6)
        assert score.rounded == mx.array(score.rounded).astype(mx.bfloat16).item()


def test_after_a_failure_the_next_call_starts_afresh(model, tokenizer, given, monkeypatch):
    requests, expected = given
    scorer = Scorer(model, tokenizer)
    scorer.score(requests[:10])
    with monkeypatch.context() as patched:
        patched.setattr(scorer, "_log_probabilities", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scorer.score(requests[10:20])
    check(scorer.score(requests[20:40]), expected[20:40])


def test_a_model_whose_logits_are_not_finite_gives_scores_that_are_not(tokenizer):
    model = random_model(SMALL_CONFIG)
    model.transformer.norm.weight = model.transformer.norm.weight * float("nan")
    scores = Scorer(model, tokenizer).score([Request("The fox", " ran")])
    assert not scores[0].is_finite
