"""Memory and graph while a text grows by 20,000 tokens: nothing grows but the keys and values that are to be kept.

Every way to keep keys and values, with the step compiled and not, on a small network with random weights in float32;
then mlx-lm over the first 5,000 tokens. Every 1,000 tokens: MLX's arrays, the freed buffers that it keeps, the memory
of the process without the keys and values, and the number of operations that wait to be computed for the cache.

python benchmarks/text_memory.py [--tokens 20000] [--peer-tokens 5000]
"""

import argparse
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import RESULTS, report

from mlx_openelm import CacheConfig, KVCache, OpenELM, OpenELMConfig, generate_tokens
from mlx_openelm.benchmark.models import Peer, random_network

CONFIG = replace(
    OpenELMConfig.layerwise(2, 64, 32, num_gqa_groups=2, ffn_dim_divisor=16, vocab_size=500),
    max_context_length=1 << 20,
)
KINDS = {
    "full": CacheConfig(),
    "8 bits": CacheConfig(bits=8),
    "4 bits from 3,000 tokens on": CacheConfig(bits=4, quantize_after=3000),
    "window of 64": CacheConfig(window=64),
    "window of 3,000": CacheConfig(window=3000),
    "window of 30,000": CacheConfig(window=30_000),
}
PROMPT = [5, 6, 7, 8]
STEP = 1000  # tokens between two points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--peer-tokens", type=int, default=5_000)
    arguments = parser.parse_args()
    network = random_network(CONFIG, mx.float32)
    curves: dict[str, list[dict[str, int]]] = {}
    for kind, config in KINDS.items():
        for compiled in (False, True):
            name = f"{kind}, {'compiled' if compiled else 'plain'}"
            curves[name] = our_points(network, config, arguments.tokens, compiled)
    curves["mlx-lm, full"] = points_of(peer_steps(network, arguments.peer_tokens))
    rows = [["", "tokens", "KV", "arrays", "freed, kept", "process without KV, MiB", "waiting"]]
    for name, points in curves.items():
        rows += [row_of(name, points[0]), row_of("", points[-1])]
    draw(curves, RESULTS / "text_memory.png")
    report("text_memory", rows, {"curves": curves})


def our_points(network: OpenELM, config: CacheConfig, tokens: int, compiled: bool) -> list[dict[str, int]]:
    mx.clear_cache()
    cache = network.make_cache(config)
    return points_of(generate_tokens(network, PROMPT, max_tokens=tokens, cache=cache, compiled=compiled), cache)


def peer_steps(network: OpenELM, tokens: int) -> Iterator[Any]:
    from mlx_lm.generate import generate_step

    mx.clear_cache()
    yield from generate_step(mx.array(PROMPT), Peer(network).model, max_tokens=tokens)


def points_of(steps: Iterable[Any], cache: KVCache | None = None) -> list[dict[str, int]]:
    """What is there after every 1,000 tokens, in bytes; `waiting` counts operations."""
    points = []
    for number, _ in enumerate(steps, start=1):
        if number % STEP == 0:
            mx.synchronize()
            kept = cache.nbytes if cache is not None else 0
            points.append(
                {
                    "tokens": number,
                    "kv": kept,
                    "arrays": mx.get_active_memory(),
                    "freed": mx.get_cache_memory(),
                    "process": resident_bytes() - kept,
                    "waiting": 0 if cache is None else waiting(cache),
                }
            )
    return points


def waiting(cache: KVCache) -> int:
    """Edges of the graph of what the cache holds and MLX has not computed."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *cache.arrays)
    return graph.getvalue().count("->")


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def row_of(name: str, point: dict[str, int]) -> list[str]:
    sizes = (f"{point[key] / 2**20:,.1f}" for key in ("kv", "arrays", "freed", "process"))
    return [name, f"{point['tokens']:,}", *sizes, str(point["waiting"])]


def draw(curves: dict[str, list[dict[str, int]]], path: Path) -> None:
    """Plot MiB of arrays and freed buffers over tokens."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for name, points in curves.items():
        if not name.endswith("plain"):
            tokens = [point["tokens"] for point in points]
            memory = [(point["arrays"] + point["freed"]) / 2**20 for point in points]
            axis.plot(tokens, memory, ".--" if "window" in name else ".-", label=name.removesuffix(", compiled"))
    axis.set(xlabel="tokens of text", ylabel="MiB of arrays and freed buffers", ylim=(0, None))
    axis.set_title("Memory while a text grows")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
