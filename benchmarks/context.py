"""Time per token over the length of the context, from 128 to 4,096 tokens, for each type of KV cache.

6 layers of width 256, float32, random weights. Each text is generated in full; times are medians of 64 tokens. The
slope is compared with that of reading keys and values alone, measured separately: anything above it would be copying.

python benchmarks/context.py [--tokens 4096] [--rounds 3]
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from common import RESULTS, report
from mlx_lm.generate import generate_step

from mlx_openelm import CacheConfig, OpenELM, OpenELMConfig, generate_tokens
from mlx_openelm.benchmark.models import Peer, random_network
from mlx_openelm.cache.kv_cache import GROWTH_STEP

CONFIG = replace(
    OpenELMConfig.layerwise(6, 256, 64, num_gqa_groups=2, ffn_dim_divisor=128, vocab_size=1000), max_context_length=8192
)
KINDS = {
    "in full": CacheConfig(),
    "8 bits": CacheConfig(bits=8),
    "4 bits": CacheConfig(bits=4),
    "window of 1,024": CacheConfig(window=1024),
}
PROMPT = 128
SPAN = 64  # tokens per point


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    network = random_network(CONFIG, mx.float32)
    prompt = mx.random.randint(1, CONFIG.vocab_size, (PROMPT,), key=mx.random.key(0))
    count = arguments.tokens - PROMPT
    times: dict[str, list[np.ndarray]] = {name: [] for name in (*KINDS, "mlx-lm, in full")}
    for number in range(arguments.rounds):
        for name in times:
            spent = ours(network, prompt, count, KINDS[name]) if name in KINDS else theirs(network, prompt, count)
            times[name].append(spent)
            print(f"  round {number + 1}: {name} {spent.mean() * 1e3:.2f} ms a token", flush=True)
    lengths = PROMPT + SPAN * (np.arange(count // SPAN) + 0.5)
    curves = {name: smoothed(np.stack(rounds)) for name, rounds in times.items()}
    alone = {name: attention_slope(network, config) for name, config in KINDS.items()}
    rows = [["", "ms at the beginning", "ms at the end", "us per 1,000 tokens", "of attention alone", "largest step"]]
    figures = {}
    for name, curve in curves.items():
        slope = float(np.polyfit(lengths, curve, 1)[0])
        residual = curve - np.polyval(np.polyfit(lengths, curve, 1), lengths)
        step = float(np.abs(residual).max() / curve.mean())
        figures[name] = {
            "milliseconds": [round(float(value) * 1e3, 4) for value in curve],
            "slope": slope * 1e9,
            "attention_slope": alone[name] * 1e9 if name in alone else None,
            "largest_step": step,
        }
        rows.append(
            [
                name,
                f"{curve[0] * 1e3:.2f}",
                f"{curve[-1] * 1e3:.2f}",
                f"{slope * 1e9:,.0f}",
                f"{alone[name] * 1e9:,.0f}" if name in alone else "",
                f"{step:.0%}",
            ]
        )
    draw(lengths, curves, RESULTS / "context.png")
    report("context", rows, {"lengths": lengths.tolist(), "kinds": figures})


def ours(network: OpenELM, prompt: mx.array, count: int, config: CacheConfig) -> np.ndarray:
    """Seconds of each token of this package."""
    cache = network.make_cache(config)
    return _timed(generate_tokens(network, prompt, max_tokens=count + 1, cache=cache, compiled=True), count)


def theirs(network: OpenELM, prompt: mx.array, count: int) -> np.ndarray:
    """Seconds of each token of mlx-lm."""
    return _timed(generate_step(prompt, Peer(network).model, max_tokens=count + 1), count)


def _timed(steps, count: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    next(steps)
    seconds = np.empty(count)
    last = time.perf_counter()
    for place in range(count):
        token = next(steps)
        if isinstance(token, tuple):
            int(token[0])
        now = time.perf_counter()
        seconds[place], last = now - last, now
    return seconds


def smoothed(rounds: np.ndarray) -> np.ndarray:
    """For each span, the median of the fastest round, because other load on the machine can only slow it down."""
    spans = rounds[:, : rounds.shape[1] // SPAN * SPAN].reshape(len(rounds), -1, SPAN)
    return np.median(spans, axis=2).min(axis=0)


def attention_slope(network: OpenELM, config: CacheConfig) -> float:
    """Additional seconds per token of context to read the keys and values of all layers, measured separately."""
    lengths = [GROWTH_STEP * blocks for blocks in (1, 4, 8, 12, 16)]
    spent = []
    for length in lengths:
        cache = network.make_cache(config)
        for layer, (heads, kv_heads) in enumerate(zip(CONFIG.num_query_heads, CONFIG.num_kv_heads, strict=True)):
            keys = mx.random.normal((1, kv_heads, length, CONFIG.head_dim))
            cache.attend(layer, mx.zeros((1, heads, 1, CONFIG.head_dim)), keys, keys)
        cache.advance(length - 1)
        mx.eval(cache.arrays)
        layout, mask = cache.layout, mx.arange(cache.arrays[0].shape[2]) < length
        queries = [mx.random.normal((1, heads, 1, CONFIG.head_dim)) for heads in CONFIG.num_query_heads]
        buffers = cache.take_buffers(1)
        mx.eval(queries, mask)
        best = min(_read(layout, buffers, queries, mask) for _ in range(30))
        spent.append(best)
    return float(np.polyfit(lengths, spent, 1)[0])


def _read(layout, buffers, queries, mask) -> float:  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    mx.eval([layout.attend_masked(of, query, mask) for of, query in zip(buffers, queries, strict=True)])
    return time.perf_counter() - started


def draw(lengths: np.ndarray, curves: dict[str, np.ndarray], path: Path) -> None:
    """Plot milliseconds per token over the length of the context."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curve in curves.items():
        axis.plot(lengths, curve * 1e3, label=name, linestyle="--" if name.startswith("mlx-lm") else "-")
    axis.set(
        xlabel="tokens of context", ylabel="ms a token", ylim=(0, None), title="Time of a token, 6 layers of width 256"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
