"""Tokens in, tokens out: prefill in chunks, then one token after another with the device kept busy.

This stands below text (no tokenizer, no stop strings) and above the model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from .cache import KVCache, StepCache, kv_cache_bytes
from .device import memory_limit_bytes, pays_to_compile
from .errors import MemoryLimitError, PromptError
from .model import OpenELM
from .sampling import Sampler, SamplingConfig

MAX_TOKENS = 256
PREFILL_CHUNK = 512  # tokens


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
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
    compiled: bool | None = None,
) -> Iterator[Step]:
    """Continue a prompt, one `Step` at a time, through the end of the text and beyond: stopping is the caller's.

    While the caller handles a token, the device computes the next one.

    Args:
        tokens: ids (L,), at least one.
        max_tokens: how many to generate.
        cache: what came before the prompt; afterwards it holds the prompt and all generated tokens whose successor was
            computed, which is at most one more than were taken.
        on_prefill: called with the number of prompt tokens done and their total.
        compiled: whether the step from token to token is compiled whole; by default where that pays.

    Raises:
        PromptError: if there are no tokens, or ids outside the vocabulary.
        MemoryLimitError: if the prompt does not fit into memory.
    """
    prompt = mx.array(tokens if isinstance(tokens, mx.array) else list(tokens), dtype=mx.int32).reshape(-1)
    _check_prompt(model, prompt)
    cache = cache if cache is not None else model.make_cache()
    _check_memory(model, cache.offset + prompt.size + max_tokens)
    if max_tokens < 1:
        return
    sampler = Sampler(sampling, prompt)
    hidden = prefill(model, prompt, cache, on_prefill)
    token, logprob = sampler(model.logits(hidden)[0, -1])
    mx.async_eval(token, logprob)
    on_prefill(prompt.size, prompt.size)
    compiled = pays_to_compile(max_tokens) if compiled is None else compiled
    step = CompiledStep(model, sampler) if compiled else partial(_step, model, sampler)
    for remaining in range(max_tokens - 1, -1, -1):
        if remaining:
            following = step(token, cache)
            mx.async_eval(*following)
        yield Step(token.item(), logprob.item())  # type: ignore[arg-type]
        if remaining:
            token, logprob = following


class CompiledStep:
    """The step from one token to the next, with its sampling, as one compiled function.

    Keys and values stand in buffers that grow now and then; for each length the step is traced once. The weights are
    constants of it, so it lives no longer than a generation.
    """

    def __init__(self, model: OpenELM, sampler: Sampler):
        self._model = model
        self._sampler = sampler
        self._compiled = mx.compile(self._run)

    def __call__(self, token: mx.array, cache: KVCache) -> tuple[mx.array, mx.array]:
        """The token after this one, (), and its log-probability; the cache then holds this one."""
        position = mx.array(cache.offset, mx.int32)
        keys, values = cache.lend(1)
        token, logprob, self._sampler.state, keys, values = self._compiled(
            token, position, keys, values, self._sampler.state
        )
        cache.put_back(keys, values, 1)
        return token, logprob

    def _run(
        self,
        token: mx.array,
        position: mx.array,
        keys: list[mx.array],
        values: list[mx.array],
        state: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array, tuple[mx.array, mx.array], list[mx.array], list[mx.array]]:
        cache = StepCache(position, keys, values)
        hidden = self._model.transformer.run(token[None, None], cache, cache.mask())
        token, logprob, state = self._sampler.choose(self._model.logits(hidden)[0, -1], state)
        return token, logprob, state, cache.keys, cache.values


def _step(model: OpenELM, sampler: Sampler, token: mx.array, cache: KVCache) -> tuple[mx.array, mx.array]:
    """As `CompiledStep`, one operation after another."""
    return sampler(model(token[None, None], cache=cache)[0, -1])


def prefill(model: OpenELM, prompt: mx.array, cache: KVCache, on_prefill: Callable[[int, int], None]) -> mx.array:
    """Put a prompt (L,) into the cache, chunk by chunk; gives the last position's hidden state (1, 1, M).

    Logits are left to the caller: those of the other positions nobody reads.
    """
    for start in range(0, prompt.size, PREFILL_CHUNK):
        on_prefill(start, prompt.size)
        hidden = model.transformer(prompt[None, start : start + PREFILL_CHUNK], cache)
        if start + PREFILL_CHUNK < prompt.size:
            mx.eval(cache.arrays)
    return hidden[:, -1:]


def _check_prompt(model: OpenELM, prompt: mx.array) -> None:
    if prompt.size == 0:
        raise PromptError("the prompt is empty; there is nothing to continue")
    ids = np.array(prompt)
    outside = ids[(ids < 0) | (ids >= model.config.vocab_size)]
    if outside.size:
        raise PromptError(
            f"the prompt holds the id {outside[0]}, outside the vocabulary of {model.config.vocab_size:,} entries"
        )


def _check_memory(model: OpenELM, num_tokens: int) -> None:
    """Keys and values once more than kept, for the moment when they grow; attention within a layer comes on top."""
    config = model.config
    dtype = model.transformer.norm.weight.dtype
    heads = max(config.num_query_heads)
    scores = heads * min(num_tokens, PREFILL_CHUNK) * num_tokens * 4
    needed = 2 * kv_cache_bytes(config, num_tokens, dtype) + scores
    limit = memory_limit_bytes()
    if needed > limit:
        raise MemoryLimitError(num_tokens, needed, limit)
