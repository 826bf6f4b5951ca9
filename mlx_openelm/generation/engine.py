"""Tokens in, tokens out: prefill in chunks, then one token after another with the device kept busy.

This stands below text (no tokenizer, no stop strings) and above the model. A single prompt is a batch of one row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache.config import CacheConfig, kv_cache_bytes
from ..cache.kv_cache import KVCache, StepCache
from ..cache.layouts import Buffers, FullKV
from ..errors import MemoryLimitError, PromptError
from ..machine.device import memory_limit_bytes, pays_to_compile
from ..model.openelm import OpenELM
from .sampling import Sampler, SamplingConfig, State

MAX_TOKENS = 256
PREFILL_CHUNK = 512  # tokens

Progress = Callable[[int, int], None]  # prompt tokens done, and their total


@dataclass(frozen=True)
class Step:
    """One generated token."""

    token: int
    logprob: float  # natural logarithm of the probability that the model gave it, before sampling changed anything


def generate_tokens(
    model: OpenELM,
    tokens: mx.array | Sequence[int],
    *,
    max_tokens: int = MAX_TOKENS,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    cache: KVCache | None = None,
    before: Sequence[int] = (),
    on_prefill: Progress = lambda done, total: None,
    compiled: bool | None = None,
) -> Iterator[Step]:
    """Continue a prompt, one `Step` at a time, through the end of the text and beyond: stopping is the caller's.

    While the caller handles a token, the device computes the next one.

    Args:
        tokens: ids (L,), at least one.
        max_tokens: how many to generate.
        cache: what came before the prompt; afterwards it holds the prompt and all generated tokens whose successor was
            computed, which is at most one more than were taken.
        before: the ids that the cache holds already; a repetition penalty counts them.
        on_prefill: called with the number of prompt tokens done and their total.
        compiled: whether the step from token to token is compiled whole; by default where that pays.

    Raises:
        PromptError: if there are no tokens, or ids outside the vocabulary.
        MemoryLimitError: if the prompt does not fit into memory.
    """
    prompt = as_prompt(model, tokens)
    cache = cache if cache is not None else model.make_cache()
    check_memory(model, cache.offset + prompt.size + max_tokens, cache.config)
    if max_tokens < 1:
        return
    rows = DecodeBatch(model, sampling, compiled=pays_to_compile(max_tokens) if compiled is None else compiled)
    rows.add(prompt, cache, before=before, on_prefill=on_prefill)
    for remaining in range(max_tokens - 1, -1, -1):
        yield from rows.step(more=remaining > 0).values()


class DecodeBatch:
    """Rows of tokens that are decoded together. A finished row leaves, and another takes its place while others run.

    Args:
        sampling: of all rows.
        compiled: whether the step is compiled whole.
    """

    def __init__(self, model: OpenELM, sampling: SamplingConfig, *, compiled: bool):
        self._model = model
        self._sampler = Sampler(sampling)
        self._step = DecodeStep(model, self._choose, compiled)
        self._numbers: list[int | None] = []  # of the row in each place; None where it has left
        self._added = 0
        self._cache: KVCache
        self._state: State
        self._tokens: mx.array  # (B,), the next of each row, and its log-probability
        self._logprobs: mx.array

    def __len__(self) -> int:
        return sum(number is not None for number in self._numbers)

    def add(
        self,
        prompt: mx.array,
        cache: KVCache,
        *,
        before: Sequence[int] = (),
        seed: int | None = None,
        on_prefill: Progress = lambda done, total: None,
    ) -> int:
        """Prefill a prompt (L,) behind what a cache of one row holds; gives the row's number.

        The first row goes on in this very cache; further ones are copied to it.
        """
        state = self._sampler.start(whole_text(before, prompt), seed)
        token, logprob, state = first_choice(self._model, self._sampler, prompt, cache, state, on_prefill)
        own = token[None], logprob[None], state[0][None], state[1][None]
        free = self._numbers.index(None) if None in self._numbers else None
        if not len(self):
            self._numbers = [self._added]
            self._cache = cache
            self._tokens, self._logprobs, *both = own
        else:
            self._cache.join(cache, free)
            of_all = self._tokens, self._logprobs, *self._state
            self._tokens, self._logprobs, *both = (
                _with_row(old, new, free) for old, new in zip(of_all, own, strict=True)
            )
            if free is None:
                self._numbers.append(self._added)
            else:
                self._numbers[free] = self._added
        self._state = both[0], both[1]
        self._added += 1
        return self._added - 1

    def step(self, more: bool = True) -> dict[int, Step]:
        """The next token of each row by its number; with `more`, the ones behind them are queued."""
        self._close_gaps()
        tokens, logprobs = self._tokens, self._logprobs
        if more:
            self._tokens, self._logprobs, self._state = self._step(tokens[:, None], self._state, self._cache)
            mx.async_eval(self._tokens, self._logprobs, *self._state)  # a state never asked for would grow for ever
        values: Any = tokens.tolist(), logprobs.tolist()
        found = zip(self._numbers, *values, strict=True)
        return {number: Step(token, logprob) for number, token, logprob in found if number is not None}

    def remove(self, number: int) -> None:
        """A row leaves; the next one that is added takes its place."""
        self._numbers[self._numbers.index(number)] = None

    def _close_gaps(self) -> None:
        taken = [place for place, number in enumerate(self._numbers) if number is not None]
        if len(taken) == len(self._numbers):
            return
        self._cache.keep(taken)
        chosen = mx.array(taken)
        self._tokens, self._logprobs = self._tokens[chosen], self._logprobs[chosen]
        self._state = self._state[0][chosen], self._state[1][chosen]
        self._numbers = [self._numbers[place] for place in taken]

    def _choose(self, logits: mx.array, state: State) -> tuple[mx.array, mx.array, State]:
        return self._sampler.choose_rows(logits[:, -1], state)


class DecodeStep:
    """A pass over the next tokens of all rows, and a choice from its logits, as one function that may be compiled.

    Keys and values stand in buffers that grow now and then; for each length, and each number of rows and tokens, the
    step is traced once. The weights are constants of it, so it lives no longer than a generation.

    Args:
        choose: from logits (B, L, V) and a state to whatever is wanted: a function of arrays.
    """

    def __init__(self, model: OpenELM, choose: Callable[[mx.array, Any], Any], compiled: bool):
        self._model = model
        self._choose = choose
        self._compiled = compiled
        self._runs: dict[FullKV, Callable[..., tuple[Any, list[Buffers]]]] = {}

    def __call__(self, tokens: mx.array, state: Any, cache: KVCache) -> Any:
        """What is chosen for tokens (B, L); the cache then holds these."""
        run = self._runs.get(cache.layout)
        if run is None:
            run = partial(self._run, cache.layout)
            run = self._runs[cache.layout] = mx.compile(run) if self._compiled else run
        self._model.transformer.warn_past_context(cache, tokens.shape[1])
        place = mx.array(cache.offset, mx.int32)
        starts = [] if cache.starts is None else [cache.starts]
        with cache.guarded():
            chosen, buffers = run(tokens, place, starts, cache.lend(tokens.shape[1]), state)
            cache.put_back(buffers, tokens.shape[1])
        return chosen

    def _run(
        self,
        layout: FullKV,
        tokens: mx.array,
        place: mx.array,
        starts: list[mx.array],
        buffers: list[Buffers],
        state: Any,
    ) -> tuple[Any, list[Buffers]]:
        cache = StepCache(layout, place, starts[0] if starts else None, buffers, tokens.shape[1])
        transformer = self._model.transformer
        hidden = transformer.run(tokens, transformer.forward_context(tokens.shape[0], cache))
        return self._choose(self._model.logits(hidden), state), cache.buffers


def prefill(
    model: OpenELM, prompt: mx.array, cache: KVCache, on_prefill: Progress = lambda done, total: None
) -> mx.array:
    """Put a prompt (L,) into the cache, chunk by chunk; gives the last position's hidden state (1, 1, M).

    Logits are left to the caller: those of the other positions nobody reads.
    """
    for start in range(0, prompt.size, PREFILL_CHUNK):
        on_prefill(start, prompt.size)
        hidden = model.transformer(prompt[None, start : start + PREFILL_CHUNK], cache, last_only=True)
        if start + PREFILL_CHUNK < prompt.size:
            mx.eval(cache.arrays)
    return hidden


def first_choice(
    model: OpenELM, sampler: Sampler, prompt: mx.array, cache: KVCache, state: State, on_prefill: Progress
) -> tuple[mx.array, mx.array, State]:
    """Prefill a prompt (L,) and choose what follows it: token (), log-probability (), the state behind it."""
    hidden = prefill(model, prompt, cache, on_prefill)
    token, logprob, state = sampler.choose(model.logits(hidden)[0, -1], state)
    mx.async_eval(token, logprob)
    on_prefill(prompt.size, prompt.size)
    return token, logprob, state


def as_prompt(model: OpenELM, tokens: mx.array | Sequence[int]) -> mx.array:
    """Ids as an array (L,) int32.

    Raises:
        PromptError: if there are none, or some are outside the vocabulary.
    """
    prompt = mx.array(tokens if isinstance(tokens, mx.array) else list(tokens), dtype=mx.int32).reshape(-1)
    if prompt.size == 0:
        raise PromptError("the prompt is empty; there is nothing to continue")
    ids = np.array(prompt)
    outside = ids[(ids < 0) | (ids >= model.config.vocab_size)]
    if outside.size:
        raise PromptError(
            f"the prompt holds the id {outside[0]}, outside the vocabulary of {model.config.vocab_size:,} entries"
        )
    return prompt


def whole_text(before: Sequence[int], prompt: mx.array) -> mx.array:
    """What the cache holds already and the prompt behind it, (L,)."""
    return mx.concatenate([mx.array(list(before), prompt.dtype), prompt]) if before else prompt


def check_memory(model: OpenELM, num_tokens: int, cache: CacheConfig, rows: int = 1) -> None:
    """Keys and values once more than kept, for the moment when they grow; attention within a layer comes on top.

    Raises:
        MemoryLimitError: if so many tokens in each of so many rows do not fit into memory.
    """
    config = model.config
    dtype = model.transformer.norm.weight.dtype
    kept = num_tokens if cache.window is None else min(num_tokens, cache.window + PREFILL_CHUNK)
    scores = max(config.num_query_heads) * min(kept, PREFILL_CHUNK) * kept * 4
    needed = 2 * rows * kv_cache_bytes(config, num_tokens, dtype, cache) + scores
    limit = memory_limit_bytes()
    if needed > limit:
        raise MemoryLimitError(num_tokens, needed, limit)


def _with_row(old: mx.array, new: mx.array, row: int | None) -> mx.array:
    """Rows (B, ...) with one more (1, ...) at the end, or in the place of another."""
    if row is None:
        return mx.concatenate([old, new])
    return mx.concatenate([old[:row], new, old[row + 1 :]])
