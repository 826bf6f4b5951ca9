"""One decoding step: a forward pass over the next tokens of all rows, and a choice from its logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from ..cache.kv_cache import KVCache, StepCache
from ..cache.layouts import Buffers, FullKV
from ..kernels.fused import kernels_work
from ..machine.compiler import compile_function
from ..machine.device import choices
from ..model.openelm import OpenELM

_STEPS_IN_FLIGHT = 2


class DecodeStep:
    """A forward pass over the next tokens of all rows and a choice from its logits, as one function, maybe compiled.

    Buffers for keys and values grow from time to time; the step is traced once for each of their lengths, and for each
    number of rows and tokens. The weights are constants of a compiled step, so it lives no longer than a generation.

    Args:
        choose: a function of arrays, from logits (B, L, V) and a state to whatever is wanted.
    """

    def __init__(self, model: OpenELM, choose: Callable[[mx.array, Any], Any], compiled: bool):
        self._model = model
        self._choose = choose
        self._compiled = compiled
        config = model.config
        self._fused = kernels_work(model.transformer.norm.weight.dtype, config.head_dim, config.model_dim)
        self._run: Callable[..., tuple[Any, list[Buffers]]]
        self._traced: tuple[FullKV, int] | None = None  # layout and length of the buffers that `_run` is for
        self._until_freed = 0  # steps until the buffers before the last growth are freed

    def __call__(self, tokens: mx.array, state: Any, cache: KVCache) -> Any:
        """What is chosen after tokens (B, L); the cache holds these afterwards."""
        num_tokens = tokens.shape[1]
        self._give_back(grows=not cache.has_room(num_tokens))
        if choices().exact_slices and cache.row_offsets is None and type(cache.layout) is FullKV:
            # Uncompiled, and without a mask: the number of slots in use is a constant of the graph.
            return self._choose(self._model.logits(self._model.transformer(tokens, cache, fused=self._fused)), state)
        self._model.transformer.warn_past_context(cache, num_tokens)
        offset = mx.array(cache.offset, mx.int32)
        row_offsets = [] if cache.row_offsets is None else [cache.row_offsets]
        with cache.guarded():
            layout, buffers = cache.layout, cache.take_buffers(num_tokens)
            chosen, buffers = self._run_for(layout, buffers)(tokens, offset, row_offsets, buffers, state)
            cache.restore_buffers(buffers, num_tokens)
        return chosen

    def _run_for(self, layout: FullKV, buffers: list[Buffers]) -> Callable[..., tuple[Any, list[Buffers]]]:
        """The step for buffers of this length. That of a length before is dropped: MLX would keep its traces."""
        traced = layout, buffers[0][0].shape[2]
        if self._traced != traced:
            run = partial(_run_step, self._model, self._choose, self._fused, layout)
            self._run = compile_function(run) if self._compiled else run
            self._traced = traced
        return self._run

    def _give_back(self, grows: bool) -> None:
        """Free what growing buffers leave, once no step in flight holds it: MLX keeps it, and nothing fits into it."""
        self._until_freed = _STEPS_IN_FLIGHT if grows else self._until_freed - 1
        if self._until_freed == 0:
            mx.clear_cache()


def _run_step(
    model: OpenELM,
    choose: Callable[[mx.array, Any], Any],
    fused: bool,
    layout: FullKV,
    tokens: mx.array,
    offset: mx.array,
    row_offsets: list[mx.array],
    buffers: list[Buffers],
    state: Any,
) -> tuple[Any, list[Buffers]]:
    cache = StepCache(layout, offset, row_offsets[0] if row_offsets else None, buffers, tokens.shape[1])
    context = model.transformer.forward_context(tokens.shape[0], cache, fused=fused)
    return choose(model.logits(model.transformer.run(tokens, context)), state), cache.buffers


def evaluate_step(chosen: Any, cache: KVCache) -> None:
    """Queue a step's results, and what it wrote that nobody reads: that would keep its graph, which grows."""
    mx.async_eval(chosen, cache.unread)
