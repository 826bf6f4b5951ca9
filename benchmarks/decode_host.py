"""How much of a token's time is host time? Decoding with many narrow layers, where arithmetic hardly matters.

16 layers of width 128, float32, random weights, in one process, in turn: the compiled step, the uncompiled step, and
stock mlx-lm's `generate_step`. Host time is the time to build a step without evaluating it; primitives are the nodes
of its graph.

python benchmarks/decode_host.py [--tokens 200] [--rounds 5]
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
from common import in_turn, report, summary, write_random_model
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_with_mlx_lm

from mlx_openelm import OpenELMConfig, SamplingConfig, generate_tokens, load_model
from mlx_openelm.generation.decode_step import DecodeStep
from mlx_openelm.generation.sampling import Sampler

PROMPT = mx.array([5, 6, 7, 8])
CONFIG = OpenELMConfig.layerwise(16, 128, 32, num_gqa_groups=2, ffn_dim_divisor=16, vocab_size=1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder), CONFIG)
        model = load_model(folder)
        peer, _ = load_with_mlx_lm(Path(folder))
    mx.eval(peer.parameters())

    def ours(compiled: bool) -> float:
        started = time.perf_counter()
        for _ in generate_tokens(model, PROMPT, max_tokens=arguments.tokens, compiled=compiled):
            pass
        return (time.perf_counter() - started) / arguments.tokens * 1e3

    def theirs() -> float:
        started = time.perf_counter()
        for token, _ in generate_step(PROMPT, peer, max_tokens=arguments.tokens):
            int(token)
        return (time.perf_counter() - started) / arguments.tokens * 1e3

    contestants = {"compiled": lambda: ours(True), "one by one": lambda: ours(False), "mlx-lm": theirs}
    times = {name: summary(figures) for name, figures in in_turn(contestants, arguments.rounds).items()}
    steps = {"compiled": our_step(model, True), "one by one": our_step(model, False), "mlx-lm": peer_step(peer)}
    hosts = {name: summary(figures) for name, figures in in_turn(
        {name: partial(host_milliseconds, step) for name, step in steps.items()}, arguments.rounds
    ).items()}  # fmt: skip
    counts = {name: primitives(step) for name, step in steps.items()}
    rows = [["", "ms a token", "host ms", "primitives", "speed against mlx-lm", "host time against mlx-lm"]]
    for name in steps:
        speed = times["mlx-lm"]["median"] / times[name]["median"]
        host = hosts[name]["median"] / hosts["mlx-lm"]["median"]
        figures = (f"{times[name]['median']:.2f}", f"{hosts[name]['median']:.2f}", str(counts[name]))
        rows.append([name, *figures, f"{speed:.2f}", f"{host:.2f}"])
    report("decode_host", rows, {"milliseconds": times, "host_milliseconds": hosts, "primitives": counts})


def our_step(model, compiled: bool) -> Callable[[], tuple[mx.array, ...]]:  # type: ignore[no-untyped-def]
    """A function that builds the next step of this package."""
    sampler = Sampler(SamplingConfig())
    cache = model.make_cache()
    mx.eval(model(PROMPT[None], cache=cache), cache.arrays)
    decode_step = DecodeStep(model, lambda logits, state: sampler.choose_rows(logits[:, -1], state), compiled)
    token = mx.array([[5]], mx.uint32)
    key, recent = sampler.start(PROMPT)
    state = key[None], recent[None]
    return lambda: decode_step(token, state, cache)[:2]


def peer_step(model) -> Callable[[], tuple[mx.array, ...]]:  # type: ignore[no-untyped-def]
    """A function that builds the next step as mlx-lm's `generate_step` does."""
    cache = make_prompt_cache(model)
    mx.eval(model(PROMPT[None], cache=cache))
    token = mx.array(5, mx.uint32)

    def step() -> tuple[mx.array, ...]:
        logits = model(token[None, None], cache=cache)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return mx.argmax(logprobs, axis=-1), logprobs.squeeze(0)

    return step


def host_milliseconds(step: Callable[[], tuple[mx.array, ...]], count: int = 50) -> float:
    """Time to build a step; its evaluation is not timed."""
    total = 0.0
    for _ in range(count):
        started = time.perf_counter()
        arrays = step()
        total += time.perf_counter() - started
        mx.eval(arrays)
    return total / count * 1e3


def primitives(step: Callable[[], tuple[mx.array, ...]]) -> int:
    """Number of operations in the graph of a step."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *step())
    return sum("shape=rectangle" in line or "shape=box" in line for line in dot.getvalue().splitlines())


if __name__ == "__main__":
    main()
