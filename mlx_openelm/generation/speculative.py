"""Speculative decoding: a drafter proposes the next tokens, and the model checks all of them in one forward pass.

At each position the model makes its own choice, with the sampler and the random keys that it would use without drafts;
a draft token is accepted if it equals that choice. So the text is the one that the model writes alone, token for token,
greedy or sampled with a seed. (The rule of Leviathan et al., arXiv:2211.17192, keeps the distribution, not the text.)
What remains is rounding: a pass over several tokens adds up in another order.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..cache.config import CacheConfig
from ..cache.kv_cache import KVCache
from ..errors import CacheError, PromptError
from ..machine.device import pays_to_compile, reads_tokens_first
from ..model.openelm import OpenELM
from .decode_step import DecodeStep, evaluate_step
from .draft_length import FIRST_BACKOFF, DraftLengthController
from .drafters import LARGEST_MAX_DRAFT, Drafter, DraftModel
from .engine import MAX_TOKENS, Progress, Step, as_prompt, check_memory, first_choice, whole_text
from .sampling import Sampler, SamplingConfig, State


def speculate_tokens(
    model: OpenELM,
    tokens: mx.array | Sequence[int],
    drafter: Drafter,
    *,
    max_tokens: int = MAX_TOKENS,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    cache: KVCache | None = None,
    before: Sequence[int] = (),
    on_prefill: Progress | None = None,
    compiled: bool | None = None,
) -> Iterator[Step]:
    """As `generate_tokens`, with draft tokens; the cache may hold several tokens more than the caller took.

    Args:
        before: ids that the cache already holds; the drafter needs them.

    Raises:
        PromptError: as `generate_tokens`, or if the vocabulary of a draft model has another size.
        CacheError: if the cache is a window, from which rejected tokens cannot be removed.
    """
    prompt = as_prompt(model, tokens)
    cache = cache if cache is not None else model.make_cache()
    if cache.config.window is not None:
        raise CacheError("speculative decoding cannot be used with `window`")
    num_tokens = cache.offset + prompt.size + max_tokens
    if isinstance(drafter, DraftModel):
        if drafter.model.config.vocab_size != model.config.vocab_size:
            raise PromptError(
                f"the draft model must have the model's vocabulary of {model.config.vocab_size:,} tokens; "
                f"it has {drafter.model.config.vocab_size:,}"
            )
        check_memory(drafter.model, num_tokens, CacheConfig())
    check_memory(model, num_tokens, cache.config)
    if max_tokens < 1:
        return
    compiled = pays_to_compile(max_tokens) if compiled is None else compiled
    writer = _Writer(model, Sampler(sampling), cache, compiled)
    yield writer.begin(before, prompt, on_prefill)
    drafter.start(writer.text, writer.sampler, compiled)
    remaining = max_tokens - 1
    while remaining:
        for step in _next_steps(writer, drafter, remaining):
            remaining -= 1
            yield step


def _next_steps(writer: "_Writer", drafter: Drafter, remaining: int) -> Iterator[Step]:
    length = drafter.length.next_length()
    if length < 1:
        return writer.without_drafts(min(drafter.length.next_backoff(), remaining), drafter.length)
    length = min(length, remaining - 1, writer.max_draft)
    started = time.perf_counter()
    drafts = drafter.draft(writer.text, length, writer.state) if length > 0 else None
    if drafts is None:
        return writer.without_drafts(min(FIRST_BACKOFF, remaining), drafter.length)
    return writer.with_drafts(drafts, drafter, started)


class _Writer:
    """The text so far, and a cache of all of it but the last token."""

    def __init__(self, model: OpenELM, sampler: Sampler, cache: KVCache, compiled: bool):
        self.text: list[int] = []
        self.state: State
        self.sampler = sampler
        self._model = model
        self._cache = cache
        self._one = DecodeStep(model, lambda logits, state: sampler.choose(logits[0, -1], state), compiled)
        self._several = DecodeStep(model, lambda logits, state: sampler.choose_along(logits[0], state), compiled)

    @property
    def max_draft(self) -> int:
        """The most draft tokens that may be read now: rejected ones must not make the cache quantize itself."""
        config = self._cache.config
        if config.bits is None or self._cache.is_quantized:
            return LARGEST_MAX_DRAFT
        return config.quantize_after - self._cache.offset - 2

    def begin(self, before: Sequence[int], prompt: mx.array, on_prefill: Progress | None) -> Step:
        """The first token after a prompt."""
        text = whole_text(before, prompt)
        state = self.sampler.start(text)
        token, logprob, self.state = first_choice(self._model, self.sampler, prompt, self._cache, state, on_prefill)
        ids: Any = text.tolist()
        self.text = ids
        return self._add(token.item(), logprob.item())

    def without_drafts(self, count: int, length: DraftLengthController) -> Iterator[Step]:
        """`count` tokens one by one, with the device one token ahead."""
        seconds = 0.0
        started = time.perf_counter()
        queued = self._one(mx.array([[self.text[-1]]], mx.uint32), self.state, self._cache)
        for left in range(count - 1, -1, -1):
            token, logprob, self.state = queued
            if left and reads_tokens_first(self._cache.nbytes):
                mx.eval(token, logprob)
            if left:
                queued = self._one(token[None, None], self.state, self._cache)
                evaluate_step(queued, self._cache)
            step = self._add(token.item(), logprob.item())
            seconds += time.perf_counter() - started
            yield step
            started = time.perf_counter()
        length.record_seconds(0, seconds / count)

    def with_drafts(self, drafts: mx.array, drafter: Drafter, started: float) -> Iterator[Step]:
        """The draft tokens that the model accepts, and its own choice after them."""
        last = mx.array([self.text[-1]], mx.uint32)
        chosen, logprobs, (keys, recent) = self._several(mx.concatenate([last, drafts])[None], self.state, self._cache)
        mx.eval(chosen, logprobs, drafts)
        own: Any = chosen.tolist()
        drafted: Any = drafts.tolist()
        accepted = [*(one == other for one, other in zip(own, drafted, strict=False)), False].index(False)
        self._cache.trim(len(drafted) - accepted)
        self.state = keys[accepted], recent[accepted]
        mx.async_eval(self.state)  # if it were never evaluated, its graph would grow
        drafter.record(self.text, len(drafted), accepted)
        drafter.length.record_seconds(len(drafted), time.perf_counter() - started)
        of_each: Any = logprobs.tolist()
        for number in range(accepted + 1):
            yield self._add(own[number], of_each[number])

    def _add(self, token: Any, logprob: Any) -> Step:
        self.text.append(token)
        return Step(token, logprob)
