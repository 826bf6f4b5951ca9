"""Decoding token by token: compiled against plain, cached against whole, batched against single, by kind of KV cache.

All compare logits of given tokens, not texts: one token that differs by rounding would change all that follow.
"""

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from ..cache.config import CacheConfig
from ..generation.decode_step import DecodeStep
from ..model.openelm import OpenELM
from ..tensors import dtype_name
from .check import Check, Comparison, Outcome, judged
from .samples import sample_config, sample_network, sample_tokens
from .session import Session

_PROMPT = 40  # tokens
_LENGTHS = (40, 23, 51)  # of the rows of a batch
_KINDS = {
    "full KV": CacheConfig(),
    "8-bit KV": CacheConfig(bits=8),
    "4-bit KV": CacheConfig(bits=4),
    "KV window": CacheConfig(window=44, sinks=4),  # full after the prompt and four tokens
}

_Pairs = Iterator[tuple[str, mx.array, mx.array]]  # what is compared, what was found, what is expected
_Compare = Callable[[Session, OpenELM], _Pairs]


def checks() -> Iterator[Check]:
    """Checks of decoding."""
    yield Check("compiled decoding as plain", partial(_on_samples, _compiled))
    yield Check("cached tokens as whole", partial(_on_samples, _cached))
    for name, cache in _KINDS.items():
        run = partial(_on_samples, partial(_one_by_one, cache), quantized_kv=cache.bits is not None)
        yield Check(f"{name}, one by one as at once", run)
    yield Check("batched rows as single", partial(_on_samples, _batched))


def _on_samples(compare: _Compare, session: Session, quantized_kv: bool = False) -> Outcome:
    """Pairs of results of several networks, which must be the same."""
    comparisons = []
    for size in session.extent.sampled_sizes:
        for dtype in session.dtypes:
            network = sample_network(sample_config(size), dtype)
            name = f"widths of {size}, {dtype_name(dtype)}"
            for what, found, expected in compare(session, network):
                label = f"{name}, {what}" if what else name
                allowed = session.tolerance(dtype, quantized_kv=quantized_kv)
                comparisons.append(Comparison.of(label, found, expected, allowed))
    return judged(comparisons)


def _tokens(session: Session, rows: int = 1) -> mx.array:
    return sample_tokens(rows, _PROMPT + session.extent.steps)


def _compiled(session: Session, network: OpenELM) -> _Pairs:
    for rows in (1, 2):
        tokens = _tokens(session, rows)
        one, other = (stepwise_logits(network, tokens, CacheConfig(), compiled) for compiled in (True, False))
        yield f"{rows} at once", one, other


def _cached(session: Session, network: OpenELM) -> _Pairs:
    tokens = _tokens(session)
    yield "", stepwise_logits(network, tokens, CacheConfig(), True), network(tokens)[:, _PROMPT:]


def _one_by_one(config: CacheConfig, session: Session, network: OpenELM) -> _Pairs:
    tokens = _tokens(session)
    cache = network.make_cache(config)
    mx.eval(network(tokens[:, :_PROMPT], cache))
    at_once = network(tokens[:, _PROMPT:], cache)
    for compiled in (True, False):
        what = "compiled" if compiled else "plain"
        yield what, stepwise_logits(network, tokens, config, compiled), at_once


def _batched(session: Session, network: OpenELM) -> _Pairs:
    """Rows of different lengths; after half of the steps the first one leaves."""
    steps = session.extent.steps
    rows = [sample_tokens(1, length + steps) for length in _LENGTHS]
    alone = [stepwise_logits(network, row, CacheConfig(), True, steps) for row in rows]
    cache, *others = caches = [network.make_cache() for _ in rows]
    for row, own in zip(rows, caches, strict=True):
        mx.eval(network(row[:, :-steps], own))
    for other in others:
        cache.join(other)
    step = DecodeStep(network, _last_logits, True)
    kept = list(range(len(rows)))
    for number in range(steps):
        if number == steps // 2:
            cache.keep(kept[1:])
            kept = kept[1:]
        tokens = mx.concatenate([rows[row][:, number - steps, None] for row in kept])
        found = step(tokens, (), cache)
        mx.eval(found, cache.arrays)
        yield f"step {number + 1}", found, mx.stack([alone[row][0, number] for row in kept])


def stepwise_logits(
    network: OpenELM, tokens: mx.array, config: CacheConfig, compiled: bool, steps: int | None = None
) -> mx.array:
    """Logits (B, n, V) after each of the last n tokens of (B, L), which are decoded one by one.

    Args:
        steps: n; by default all tokens but the prompt's.
    """
    first = tokens.shape[1] - steps if steps is not None else _PROMPT
    cache = network.make_cache(config)
    mx.eval(network(tokens[:, :first], cache))
    step = DecodeStep(network, _last_logits, compiled)
    found: list[mx.array] = []
    for place in range(first, tokens.shape[1]):
        found.append(step(tokens[:, place, None], (), cache))
        mx.eval(found[-1], cache.arrays)
    return mx.stack(found, axis=1)


def _last_logits(logits: mx.array, state: tuple[()]) -> mx.array:
    return logits[:, -1]
