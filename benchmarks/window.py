"""Memory while 20,000 tokens are generated with a window: it stays constant.

16 layers of width 128, float32, random weights, a window of 512 tokens. The memory of MLX's arrays and of the process
is read every 1,000 tokens.

python benchmarks/window.py [--tokens 20000] [--window 512]
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from common import RESULTS, report

from mlx_openelm import CacheConfig, OpenELMConfig, generate_tokens
from mlx_openelm.benchmark.models import random_network

CONFIG = replace(
    OpenELMConfig.layerwise(16, 128, 32, num_gqa_groups=2, ffn_dim_divisor=16, vocab_size=1000),
    max_context_length=1 << 20,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--full-tokens", type=int, default=5_000, help="written in full, to compare")
    arguments = parser.parse_args()
    network = random_network(CONFIG, mx.float32)
    curves = {}
    for name, config, tokens in (
        ("in a window", CacheConfig(window=arguments.window), arguments.tokens),
        ("in full", CacheConfig(), arguments.full_tokens),
    ):
        curves[name] = memory_over_text(network, config, tokens)
    rows = [["", "tokens", "arrays at 1,000, MiB", "at the end", "process at 1,000, MiB", "at the end", "ms a token"]]
    for name, points in curves.items():
        first, last = points[0], points[-1]
        rows.append(
            [
                name,
                f"{last['tokens']:,}",
                *(f"{point[key] / 2**20:,.1f}" for key in ("arrays", "process") for point in (first, last)),
                f"{last['seconds'] / last['tokens'] * 1e3:.2f}",
            ]
        )
    draw(curves, RESULTS / "window.png")
    report("window", rows, {"window": arguments.window, "curves": curves})


def memory_over_text(network, config: CacheConfig, tokens: int) -> list[dict]:  # type: ignore[no-untyped-def]
    """Memory and time after every 1,000 tokens."""
    mx.clear_cache()
    cache = network.make_cache(config)
    started = time.perf_counter()
    points = []
    steps = generate_tokens(network, [5, 6, 7, 8], max_tokens=tokens, cache=cache, compiled=True)
    for number, _ in enumerate(steps, start=1):
        if number % 1000 == 0:
            points.append(
                {
                    "tokens": number,
                    "arrays": mx.get_active_memory(),
                    "process": resident_bytes(),
                    "seconds": time.perf_counter() - started,
                }
            )
    return points


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    """Plot MiB of arrays over tokens."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name, points in curves.items():
        tokens = [point["tokens"] for point in points]
        axis.plot(tokens, [point["arrays"] / 2**20 for point in points], ".-", label=f"keys and values {name}")
    axis.set(xlabel="tokens of text", ylabel="MiB of arrays", ylim=(0, None), title="Memory while a text grows")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
