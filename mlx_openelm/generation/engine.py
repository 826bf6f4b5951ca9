"""Tokens in, tokens out: prefill in chunks, then one token after another while the device stays busy.

Nothing here knows about text: no tokenizer, no stop strings. A single prompt is a batch of one row.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..cache.config import CacheConfig, kv_cache_bytes
from ..cache.kv_cache import KVCache
from ..errors import MemoryLimitError, PromptError, WeightsError
from ..machine.device import memory_limit_bytes, pays_to_compile, queues_prefill, reads_tokens_first
from ..model.openelm import OpenELM
from .decode_step import DecodeStep, evaluate_step
from .sampling import Sampler, SamplingConfig, State

MAX_TOKENS = 256
BATCH_SIZE = 8  # prompts decoded at once
PREFILL_CHUNK = 512  # tokens

Progress = Callable[[int, int], None]  # prompt tokens done, and their total


@dataclass(frozen=True)
class Step:
    """One generated token.

    Raises:
        WeightsError: if its probability is not a number, so that the token means nothing.
    """

    token: int
    logprob: float  # natural logarithm of its probability under the model, before sampling changed anything

    def __post_init__(self) -> None:
        if not math.isfinite(self.logprob):
            raise WeightsError(
                "the model's logits are not finite, or the same for all tokens: its weights or its adapter are "
                "damaged, or their values overflow the type that it computes in; try `dtype=float32`"
            )


def generate_tokens(
    model: OpenELM,
    tokens: mx.array | Sequence[int],
    *,
    max_tokens: int = MAX_TOKENS,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    cache: KVCache | None = None,
    before: Sequence[int] = (),
    on_prefill: Progress | None = None,
    compiled: bool | None = None,
) -> Iterator[Step]:
    """Continue a prompt, one `Step` at a time, past the end-of-text token too: the caller decides when to stop.

    While the caller handles a token, the device computes the next one.

    Args:
        tokens: ids (L,), at least one.
        max_tokens: how many to generate.
        cache: what came before the prompt. Afterwards it holds the prompt and the generated tokens, except those whose
            successor was never computed; that is at most one token more than the caller took.
        before: ids that the cache already holds; a repetition penalty counts them.
        on_prefill: called with the number of prompt tokens done and their total.
        compiled: whether to compile the whole decoding step; by default where it pays off.

    Raises:
        PromptError: if there are no tokens, or ids outside the vocabulary.
        MemoryLimitError: if the prompt does not fit into memory.
    """
    prompt = as_prompt(model, tokens)
    cache = cache if cache is not None else model.make_cache()
    check_memory(model, cache.offset + prompt.size + max_tokens, cache.config)
    if max_tokens < 1:
        return
    batch = DecodeBatch(model, sampling, compiled=pays_to_compile(max_tokens) if compiled is None else compiled)
    batch.add(prompt, cache, before=before, on_prefill=on_prefill)
    for remaining in range(max_tokens - 1, -1, -1):
        yield from batch.step(more=remaining > 0).values()


class _Rows(NamedTuple):
    """What is known of every row of a batch before its next step; arrays with one entry per row."""

    tokens: mx.array  # (B,), the next token of each
    logprobs: mx.array  # (B,), of these
    keys: mx.array  # (B, 2), random state
    recent: mx.array  # (B, R), tokens that a repetition penalty covers

    @property
    def state(self) -> State:
        """State of the sampler."""
        return self.keys, self.recent

    def join(self, row: "_Rows", slot: int | None) -> "_Rows":
        """With one more row, at the end or in the slot of another one."""
        return _Rows(*(_with_row(old, new, slot) for old, new in zip(self, row, strict=True)))

    def keep(self, slots: Sequence[int]) -> "_Rows":
        """These rows only."""
        chosen = mx.array(list(slots))
        return _Rows(*(array[chosen] for array in self))


class DecodeBatch:
    """Rows of tokens that are decoded together. A finished row leaves, and another one takes its slot meanwhile.

    Args:
        sampling: of all rows.
        compiled: whether to compile the whole step.
    """

    def __init__(self, model: OpenELM, sampling: SamplingConfig, *, compiled: bool):
        self._model = model
        self._sampler = sampler = Sampler(sampling)
        # A method here would refer to this object, and both would stay in memory until Python looks for such cycles.
        self._step = DecodeStep(model, lambda logits, state: sampler.choose_rows(logits[:, -1], state), compiled)
        self._numbers: list[int | None] = []  # of the row in each slot; None where it has left
        self._added = 0
        self._cache: KVCache
        self._rows: _Rows

    def __len__(self) -> int:
        return sum(number is not None for number in self._numbers)

    def add(
        self,
        prompt: mx.array,
        cache: KVCache,
        *,
        before: Sequence[int] = (),
        seed: int | None = None,
        on_prefill: Progress | None = None,
    ) -> int:
        """Prefill a prompt (L,) behind what a cache of one row holds; returns the row's number.

        The batch uses the cache of its first row; the caches of further rows are copied into it.
        """
        state = self._sampler.start(whole_text(before, prompt), seed)
        token, logprob, state = first_choice(self._model, self._sampler, prompt, cache, state, on_prefill)
        row = _Rows(token[None], logprob[None], state[0][None], state[1][None])
        free = self._numbers.index(None) if None in self._numbers else None
        if not len(self):
            self._numbers, self._cache, self._rows = [self._added], cache, row
        else:
            self._cache.join(cache, free)
            self._rows = self._rows.join(row, free)
            if free is None:
                self._numbers.append(self._added)
            else:
                self._numbers[free] = self._added
        self._added += 1
        return self._added - 1

    def step(self, more: bool = True) -> dict[int, Step]:
        """The next token of each row by its number; with `more`, the tokens after these are queued.

        They are queued before these are read, so that the device need not wait; or afterwards, so that no step is in
        flight that keeps the device from writing keys and values in place (see `reads_tokens_first`).
        """
        self._close_gaps()
        tokens, logprobs, *_ = rows = self._rows
        if more and reads_tokens_first(self._cache.nbytes):
            mx.eval(tokens, logprobs)
        if more:
            chosen, chosen_logprobs, state = self._step(tokens[:, None], rows.state, self._cache)
            self._rows = _Rows(chosen, chosen_logprobs, *state)
            evaluate_step(self._rows, self._cache)
        values: Any = tokens.tolist(), logprobs.tolist()
        found = zip(self._numbers, *values, strict=True)
        return {number: Step(token, logprob) for number, token, logprob in found if number is not None}

    def remove(self, number: int) -> None:
        """Let a row leave; the next row that is added takes its slot."""
        self._numbers[self._numbers.index(number)] = None

    def _close_gaps(self) -> None:
        taken = [slot for slot, number in enumerate(self._numbers) if number is not None]
        if len(taken) == len(self._numbers):
            return
        self._cache.keep(taken)
        self._rows = self._rows.keep(taken)
        self._numbers = [self._numbers[slot] for slot in taken]


def prefill(model: OpenELM, prompt: mx.array, cache: KVCache, on_prefill: Progress | None = None) -> mx.array:
    """Put a prompt (L,) into the cache, chunk by chunk; returns the last position's hidden state (1, 1, M).

    The caller computes logits, because only those of the last position are needed. Where it pays, the next chunk is
    queued while the device computes one.
    """
    report = on_prefill or (lambda done, total: None)

    def queue(start: int) -> mx.array:
        hidden = model.transformer(prompt[None, start : start + PREFILL_CHUNK], cache, last_only=True)
        if prompt.size > PREFILL_CHUNK:
            mx.async_eval(hidden, cache.arrays)
        return hidden

    report(0, prompt.size)
    hidden = queue(0)
    for start in range(PREFILL_CHUNK, prompt.size, PREFILL_CHUNK):
        following = queue(start) if queues_prefill() else None
        mx.eval(hidden)
        mx.clear_cache()  # the buffers of a chunk; MLX keeps them, and they are of no use to single tokens
        report(start, prompt.size)
        hidden = queue(start) if following is None else following
    return hidden


def first_choice(
    model: OpenELM, sampler: Sampler, prompt: mx.array, cache: KVCache, state: State, on_prefill: Progress | None
) -> tuple[mx.array, mx.array, State]:
    """Prefill a prompt (L,) and choose the token after it: token (), log-probability () and the next state."""
    hidden = prefill(model, prompt, cache, on_prefill)
    logits = model.logits(hidden)[0, -1]
    token, logprob, state = sampler.choose(logits, state)
    # A norm whose squares overflow gives zeros, and these the same logit for all tokens.
    logprob = mx.where(logits.max() > logits.min(), logprob, math.nan)
    mx.async_eval(token, logprob)
    if on_prefill is not None:
        mx.eval(token, logprob)
        on_prefill(prompt.size, prompt.size)
    return token, logprob, state


def as_prompt(model: OpenELM, tokens: mx.array | Sequence[int]) -> mx.array:
    """Ids as an array (L,) int32.

    Raises:
        PromptError: if there are none, or some are outside the vocabulary.
    """
    prompt = mx.array(tokens if isinstance(tokens, mx.array) else list(tokens), dtype=mx.int32).reshape(-1)
    if prompt.size == 0:
        raise PromptError("the prompt is empty")
    ids = np.array(prompt)
    outside = ids[(ids < 0) | (ids >= model.config.vocab_size)]
    if outside.size:
        raise PromptError(
            f"the prompt contains token id {outside[0]}, but the vocabulary has only {model.config.vocab_size:,} tokens"
        )
    return prompt


def whole_text(before: Sequence[int], prompt: mx.array) -> mx.array:
    """What the cache already holds, followed by the prompt, (L,)."""
    return mx.concatenate([mx.array(list(before), prompt.dtype), prompt]) if before else prompt


def check_memory(model: OpenELM, num_tokens: int, cache: CacheConfig, rows: int = 1) -> None:
    """Make sure that `rows` sequences of `num_tokens` tokens fit into memory.

    Counts keys and values twice, for the moment when their buffers are copied to grow, and one layer's scores.

    Raises:
        MemoryLimitError: if they do not fit.
    """
    config = model.config
    dtype = model.transformer.norm.weight.dtype
    kept = num_tokens if cache.window is None else min(num_tokens, cache.window + PREFILL_CHUNK)
    scores = max(config.num_query_heads) * min(kept, PREFILL_CHUNK) * kept * 4
    needed = 2 * rows * kv_cache_bytes(config, num_tokens, dtype, cache) + scores
    limit = memory_limit_bytes()
    if needed > limit:
        raise MemoryLimitError(num_tokens, needed, limit)


def _with_row(old: mx.array, new: mx.array, slot: int | None) -> mx.array:
    """Rows (B, ...) with one more (1, ...), at the end or in the slot of another one."""
    if slot is None:
        return mx.concatenate([old, new])
    return mx.concatenate([old[:slot], new, old[slot + 1 :]])
