"""Requests as ids, by the rules of lm-evaluation-harness."""

import pytest
from hypothesis import given, settings, strategies as st

from mlx_openelm.evaluation.encoding import RequestEncoder
from mlx_openelm.evaluation.requests import Request


@pytest.fixture(scope="module")
def encode(tokenizer):
    return RequestEncoder(tokenizer, 64)


def by_the_rules(tokenizer, request, max_length):
    """`TemplateLM._encode_pair` and `HFLM._loglikelihood_tokens` in short: what the model reads, and is scored."""
    context, continuation = request
    if not context:
        inside = tokenizer.encode(continuation, bos=False)
        before, after = [tokenizer.bos_token_id], inside
    else:
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context)
        before, after = whole[: len(before)], whole[len(before) :]
    return (before + after)[-(max_length + 1) :][:-1], after


TEXTS = st.text(alphabet="the fox\n\t 😀é,.'", max_size=12)


@given(context=TEXTS, continuation=TEXTS)
@settings(max_examples=100, deadline=None)
def test_ids_are_those_of_the_rules(encode, tokenizer, context, continuation):
    found = encode(Request(context, continuation))
    inputs, scored = by_the_rules(tokenizer, (context, continuation), 64)
    if not scored:
        assert found is None
        return
    assert found.inputs.tolist() == inputs
    assert found.ids[-found.num_scored :].tolist() == scored
    assert not found.is_truncated


def test_blanks_at_the_end_of_a_context_belong_to_the_continuation(encode, tokenizer):
    found = encode(Request("The fox\n    ", "ran"))
    before = tokenizer.encode("The fox")
    assert found.ids.tolist()[: len(before)] == before
    assert tokenizer.decode(found.ids[-found.num_scored :].tolist()) == "\n    ran"


def test_a_token_that_spans_the_boundary_stays_whole(encode, tokenizer):
    text = "The small fox went down to the river where the water was cold"
    whole = tokenizer.encode(text)
    spanned = 0
    for place in range(4, len(text)):
        context = text[:place]
        before = tokenizer.encode(context)
        found = encode(Request(context, text[place:]))
        if context[-1] == " " or found is None:
            continue
        assert found.ids.tolist() == whole
        assert found.num_scored == len(whole) - len(before)
        spanned += before != whole[: len(before)]
    assert spanned > 5


def test_nothing_before_is_bos(encode, tokenizer):
    found = encode(Request("", "The fox"))
    assert found.ids.tolist() == tokenizer.encode("The fox")
    assert found.num_scored == len(found.ids) - 1


def test_bos_by_name_is_not_doubled(encode, tokenizer):
    assert encode(Request("<s>The fox", " ran")).ids.tolist().count(tokenizer.bos_token_id) == 1
    assert encode(Request("", "<s>The fox")).ids.tolist() == tokenizer.encode("The fox")


def test_a_long_context_loses_its_beginning_with_bos(encode, tokenizer):
    context = "The fox ran to the river. " * 20
    whole = tokenizer.encode(context + "And back")
    found = encode(Request(context, "And back"))
    assert found.is_truncated
    assert found.ids.tolist() == whole[-65:]
    assert len(found.inputs) == 64


@pytest.mark.parametrize("request_", [Request("The fox", ""), Request("", ""), Request("A", " fox" * 100)])
def test_a_continuation_without_tokens_or_with_too_many_cannot_be_scored(encode, request_):
    assert encode(request_) is None
