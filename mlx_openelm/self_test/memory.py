"""Memory over a long generation: it grows by keys and values alone."""

import warnings
from collections.abc import Iterator
from functools import partial

import mlx.core as mx

from ..cache.config import CacheConfig
from ..config import OpenELMConfig
from ..generation.engine import generate_tokens
from ..model.openelm import ContextLengthWarning
from .check import FAILED, PASSED, Check, Outcome
from .samples import sample_network
from .session import Session

_SAMPLES = 20
_ALLOWED = 1 << 18  # bytes; a graph that grows keeps the keys of every token, over a kilobyte each
_NETWORK = OpenELMConfig.layerwise(4, 256, 64, num_gqa_groups=2, vocab_size=1024)
_MIB = 2**20
_KINDS = {
    "full KV": CacheConfig(),
    "8-bit KV": CacheConfig(bits=8),
    "4-bit KV": CacheConfig(bits=4),
    "full KV window": CacheConfig(window=128),
    "KV window with room": CacheConfig(window=1 << 16),
}


def checks() -> Iterator[Check]:
    """Checks of memory, by kind of KV cache."""
    for name, config in _KINDS.items():
        yield Check(f"memory, {name}", partial(_growth, config))


def _growth(config: CacheConfig, session: Session) -> Outcome:
    """Memory without keys and values, in the last quarter of the text against the first.

    What a device still holds for a moment does not count, so the smallest values are compared.
    """
    network = sample_network(_NETWORK, session.dtype)
    cache = network.make_cache(config)
    count = session.extent.memory_tokens
    mx.clear_cache()
    active, reserved = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextLengthWarning)
        steps = generate_tokens(network, [1, 2, 3], max_tokens=count, cache=cache)
        for number, _ in enumerate(steps, 1):
            if number % max(1, count // _SAMPLES) == 0:
                mx.synchronize()
                active.append(mx.get_active_memory() - cache.nbytes)
                reserved.append(mx.get_cache_memory())
    quarter = len(active) // 4
    growth = max(0, min(active[-quarter:]) - min(active[1 : 1 + quarter]))
    return Outcome(
        PASSED if growth <= _ALLOWED else FAILED,
        f"grows by {growth / _MIB:,.2f} MiB over {count:,} tokens; MLX keeps {max(reserved) / _MIB:,.0f} MiB for reuse",
        f"{_ALLOWED / _MIB:,.2f} MiB",
        {
            "growth_bytes": growth,
            "kv_bytes": cache.nbytes,
            "active_bytes_without_kv": active,
            "reusable_bytes": reserved,
        },
    )
