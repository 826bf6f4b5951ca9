import gc
import io
import weakref
from dataclasses import replace
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest

from conftest import assert_close, random_model
from mlx_openelm import CacheConfig, ContextLengthWarning, SamplingConfig, generate_tokens
from mlx_openelm.cache import kv_cache as cache_module
from mlx_openelm.errors import MemoryLimitError, PromptError, WeightsError
from mlx_openelm.generation import decode_step, engine
from mlx_openelm.generation.batch import generate_batch
from mlx_openelm.generation.drafters import DraftModel, PromptLookup
from mlx_openelm.generation.engine import prefill
from mlx_openelm.generation.speculative import speculate_tokens
from mlx_openelm.machine.device import replaced_choices

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


@pytest.mark.parametrize("queues", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_prefill_in_chunks_matches_one_pass(tiny_model, monkeypatch, chunk, queues):
    whole = tiny_model.transformer(mx.array([PROMPT]))[:, -1:]
    monkeypatch.setattr(engine, "queues_prefill", lambda: queues)
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    cache = tiny_model.make_cache()
    seen = []
    hidden = prefill(tiny_model, mx.array(PROMPT), cache, lambda done, total: seen.append((done, total)))
    assert_close(hidden, whole, 1e-5)
    assert cache.offset == len(PROMPT)
    assert seen == [(done, 8) for done in range(0, 8, chunk)]


@pytest.mark.parametrize("queues", [False, True])
def test_prefill_reports_what_is_computed_rather_than_queued(tiny_model, monkeypatch, queues):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 3)
    monkeypatch.setattr(engine, "queues_prefill", lambda: queues)
    computed, seen = [], []
    evaluate = mx.eval
    monkeypatch.setattr(engine.mx, "eval", lambda *arrays: (computed.append(arrays), evaluate(*arrays)))

    def report(done, total):
        seen.append((done, total, len(computed)))

    next(generate_tokens(tiny_model, PROMPT, max_tokens=2, on_prefill=report, compiled=False))
    assert seen == [(0, 8, 0), (3, 8, 1), (6, 8, 2), (8, 8, 3)]


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


@pytest.mark.parametrize("compiled", [False, True])
def test_text_that_grows_past_the_context_warns_once(tiny_config, compiled):
    model = random_model(replace(tiny_config, max_context_length=16))
    with pytest.warns(ContextLengthWarning, match="16 positions") as told:
        list(generate_tokens(model, PROMPT, max_tokens=20, compiled=compiled))
    assert len(told) == 1
    cache = model.make_cache(CacheConfig(window=12))
    list(generate_tokens(model, PROMPT, max_tokens=20, compiled=compiled, cache=cache))  # warnings are errors here


class TestCompiled:
    @pytest.mark.parametrize(
        "sampling",
        [
            SamplingConfig(),
            SamplingConfig(temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, seed=3),
            SamplingConfig(repetition_penalty=1.3, repetition_context=20),
        ],
        ids=["greedy", "sampling", "penalty"],
    )
    def test_the_same_tokens_over_several_lengths_of_buffer(self, tiny_model, monkeypatch, sampling):
        monkeypatch.setattr(cache_module, "GROWTH_STEP", 16)
        plain, compiled = (
            list(generate_tokens(tiny_model, PROMPT, max_tokens=50, sampling=sampling, compiled=compiled))
            for compiled in (False, True)
        )
        assert [step.token for step in compiled] == [step.token for step in plain]
        assert np.allclose([step.logprob for step in compiled], [step.logprob for step in plain], atol=1e-4)

    def test_it_is_traced_once_for_each_length_of_buffer(self, tiny_model, monkeypatch):
        monkeypatch.setattr(cache_module, "GROWTH_STEP", 16)
        traced = []
        original = decode_step._run_step
        monkeypatch.setattr(decode_step, "_run_step", lambda *parts: (traced.append(1), original(*parts))[1])
        list(generate_tokens(tiny_model, PROMPT, max_tokens=50, compiled=True))  # 58 tokens in buffers of 16 to 64
        assert len(traced) == 4

    def test_a_cache_goes_on_as_it_does_without(self, tiny_model):
        def continued(compiled):
            cache = tiny_model.make_cache()
            first = generate_tokens(tiny_model, PROMPT, max_tokens=6, cache=cache, compiled=compiled)
            tokens = [step.token for step in first]
            cache.trim(2)
            more = generate_tokens(tiny_model, [7, 8], max_tokens=6, cache=cache, compiled=compiled)
            return tokens, [step.token for step in more], cache.offset

        assert continued(True) == continued(False)

    def test_tuned_weights_are_seen_by_the_next_generation(self, tiny_config):
        model = random_model(tiny_config)
        first = [step.token for step in generate_tokens(model, PROMPT, max_tokens=8, compiled=True)]
        model.update(random_model(tiny_config, seed=1).parameters())
        second = [step.token for step in generate_tokens(model, PROMPT, max_tokens=8, compiled=True)]
        assert second == [step.token for step in generate_tokens(model, PROMPT, max_tokens=8, compiled=False)]
        assert second != first


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(temperature=1.0, repetition_penalty=1.2, seed=1)]
)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_graph_grows_from_step_to_step(tiny_model, sampling, count, compiled):
    """What is handed on without being asked for would drag all steps behind it, a few kilobytes a token."""
    rows = engine.DecodeBatch(tiny_model, sampling, compiled=compiled)
    for _ in range(count):
        rows.add(mx.array(PROMPT), tiny_model.make_cache())
    sizes = set()
    for _ in range(20):
        rows.step()
        mx.synchronize()
        dot = io.StringIO()
        mx.export_to_dot(dot, *rows._rows, *rows._cache.arrays)
        sizes.add(dot.getvalue().count("shape=rectangle"))
    assert sizes == {0}


@pytest.mark.parametrize("way", ["alone", "compiled", "several rows", "drafts"])
@pytest.mark.parametrize("factor", [1e22, 3e38])  # the squares overflow, or the values
def test_a_model_that_overflows_is_an_error_and_no_text(tiny_config, tokenizer, way, factor):
    model = random_model(tiny_config)
    for layer in model.transformer.layers:
        layer.ffn.proj_2.weight = layer.ffn.proj_2.weight * factor
    with pytest.raises(WeightsError, match="logits are not finite, or the same for all tokens"):
        if way == "several rows":
            list(generate_batch(model, tokenizer, [PROMPT, PROMPT[:3]], max_tokens=3))
        elif way == "drafts":
            list(speculate_tokens(model, PROMPT, PromptLookup(), max_tokens=3))
        else:
            list(generate_tokens(model, PROMPT, max_tokens=3, compiled=way == "compiled"))


KINDS = {
    "full": CacheConfig(),
    "8-bit": CacheConfig(bits=8),
    "8-bit later": CacheConfig(bits=8, quantize_after=30),
    "full window": CacheConfig(window=10, sinks=2),
    "window that fills": CacheConfig(window=24, sinks=2),
    "window": CacheConfig(window=200, sinks=2),
}


class TestChoices:
    """The ways of other devices give the same tokens."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("change", [{"indexed_writes": True}, {"tokens_first": True}, {"exact_slices": True}])
    def test_one_row(self, tiny_model, kind, change):
        expected = list(generate_tokens(tiny_model, PROMPT, max_tokens=40, cache=tiny_model.make_cache(KINDS[kind])))
        with replaced_choices(**change):
            found = list(generate_tokens(tiny_model, PROMPT, max_tokens=40, cache=tiny_model.make_cache(KINDS[kind])))
        assert [step.token for step in found] == [step.token for step in expected]
        assert np.allclose([step.logprob for step in found], [step.logprob for step in expected], atol=1e-5)

    @pytest.mark.parametrize(
        "change", [{"indexed_writes": True}, {"tokens_first": True}, {"exact_slices": True}, {"backend": "metal"}]
    )
    def test_several_rows_and_guesses(self, tiny_model, tokenizer, change):
        prompts = [PROMPT, PROMPT[:3], [7, 8] * 6]

        def texts():
            rows = generate_batch(tiny_model, tokenizer, prompts, batch_size=2, max_tokens=20)
            alone = speculate_tokens(tiny_model, prompts[2], PromptLookup(4), max_tokens=20)
            return {number: row.tokens for number, row in rows}, [step.token for step in alone]

        expected = texts()
        with replaced_choices(**{"fused_kernels": False, **change}):
            assert texts() == expected

    def test_tokens_are_read_before_the_next_step_is_queued(self, tiny_model, monkeypatch):
        events = []
        evaluate, queue = mx.eval, engine.evaluate_step
        monkeypatch.setattr(mx, "eval", lambda *arrays: (events.append("read"), evaluate(*arrays)))
        monkeypatch.setattr(engine, "evaluate_step", lambda *of: (events.append("queue"), queue(*of)))
        with replaced_choices(tokens_first=True):
            list(generate_tokens(tiny_model, PROMPT, max_tokens=4))
        assert [event for event in events if event == "queue" or events[events.index(event)] == "read"][:6] == [
            *["read", "queue"] * 3
        ]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_of_what_a_step_wrote_does_not_grow(tiny_model, kind, compiled, monkeypatch):
    """Nobody reads some of it for a while: the unrotated sinks of a window whose buffers still grow."""
    monkeypatch.setattr(cache_module, "GROWTH_STEP", 16)
    cache = tiny_model.make_cache(KINDS[kind])
    sizes = []
    for _ in generate_tokens(tiny_model, PROMPT, max_tokens=60, cache=cache, compiled=compiled):
        mx.synchronize()
        graph = io.StringIO()
        mx.export_to_dot(graph, *cache.arrays)
        sizes.append(graph.getvalue().count("->"))
    assert max(sizes[30:]) <= max(sizes[:5])  # one cache is quantized in between


def test_traces_for_shorter_buffers_are_dropped(tiny_model, monkeypatch):
    monkeypatch.setattr(cache_module, "GROWTH_STEP", 16)
    steps, compile_function = [], decode_step.compile_function

    def compile_watched(run):
        steps.append(weakref.ref(run))
        return compile_function(run)

    monkeypatch.setattr(decode_step, "compile_function", compile_watched)
    generation = generate_tokens(tiny_model, PROMPT, max_tokens=60, compiled=True)
    list(islice(generation, 50))
    gc.collect()
    assert len(steps) == 4
    assert [run() is None for run in steps] == [True, True, True, False]


def test_what_growing_buffers_leave_is_given_back(tiny_model, monkeypatch):
    monkeypatch.setattr(cache_module, "GROWTH_STEP", 16)
    cleared = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(True))
    list(generate_tokens(tiny_model, PROMPT, max_tokens=41))  # 48 tokens in all
    assert len(cleared) == 2
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 3)
    cleared.clear()
    prefill(tiny_model, mx.array(PROMPT), tiny_model.make_cache())
    assert len(cleared) == 2  # after each chunk but the last


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("drafter", [None, PromptLookup(4), "model"])
def test_keys_and_values_go_with_the_generation(tiny_config, compiled, drafter):
    """Not when Python next looks for cycles, of whose memory it knows nothing."""
    model = random_model(tiny_config)
    write = speculate_tokens if drafter else generate_tokens
    options = {"drafter": DraftModel(model) if drafter == "model" else drafter} if drafter else {}
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        for _ in range(2):
            list(write(model, PROMPT, max_tokens=30, compiled=compiled, **options))
        del options
        assert mx.get_active_memory() < before + 50_000
    finally:
        gc.enable()
