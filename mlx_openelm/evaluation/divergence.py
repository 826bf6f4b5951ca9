"""KL divergence between the predictions of models."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..generation.engine import generate_tokens
from ..generation.sampling import SamplingConfig
from ..model.openelm import OpenELM

NUM_TEXTS, _TEXT_TOKENS = 8, 64


def divergences(
    exact: OpenELM,
    others: Sequence[OpenELM],
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """KL divergence of each other model from the exact one, in nats per token.

    It is measured on texts that the exact model generates from BOS.

    Args:
        on_progress: called with the done and the total number of texts.
    """
    totals, count = [0.0] * len(others), 0
    for number in range(NUM_TEXTS):
        sampling = SamplingConfig(temperature=1.0, seed=seed + number)
        steps = generate_tokens(exact, [exact.config.bos_token_id], max_tokens=_TEXT_TOKENS, sampling=sampling)
        tokens = mx.array([[exact.config.bos_token_id, *(step.token for step in steps)]])
        p = _log_softmax(exact(tokens))
        for place, other in enumerate(others):
            totals[place] += float(np.array((mx.exp(p) * (p - _log_softmax(other(tokens)))).sum()))
        count += tokens.size
        on_progress(number + 1, NUM_TEXTS)
    return [total / count for total in totals]


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
