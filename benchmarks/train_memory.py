"""How much memory does a training step take, and what do the chunked loss and recomputed layers save?

The peers are the same step with whole logits (MLX's own `cross_entropy` and its differentiation), and with nothing
saved. Each step runs, compiled as in training, in a process of its own. The peak is that of MLX's arrays, with the
weights; the growth of the process is recorded beside it.

python benchmarks/train_memory.py [--vocab 32000] [--sequence 2048] [--rounds 3]
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from common import in_turn, report, run, summary
from mlx.utils import tree_flatten, tree_unflatten

from mlx_openelm import OpenELM, OpenELMConfig
from mlx_openelm.device import peak_memory_bytes
from mlx_openelm.loss import DEFAULT_CHUNK, token_losses


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    recompute: bool
    chunk: int  # tokens; 0: whole logits


WAYS = {
    "recomputed layers, chunked loss": Way(True, DEFAULT_CHUNK),
    "recomputed layers, whole logits": Way(True, 0),
    "kept layers, chunked loss": Way(False, DEFAULT_CHUNK),
    "kept layers, whole logits": Way(False, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--model-dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        one_step(arguments, WAYS[arguments.step])
        return
    figures: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "losses": [], "process": []} for name in WAYS}

    def measure(name: str) -> float:
        found = json.loads(run([sys.executable, Path(__file__), *sys.argv[1:], "--step", name]).output.splitlines()[-1])
        figures[name]["seconds"].append(found["seconds"])
        figures[name]["losses"].append(found["loss"])
        figures[name]["process"].append(found["process_mib"])
        return found["arrays_mib"]

    peaks = in_turn({name: partial(measure, name) for name in WAYS}, arguments.rounds, warm_up=0)
    peak = {name: summary(values) for name, values in peaks.items()}
    seconds = {name: summary(values["seconds"]) for name, values in figures.items()}
    rows = [["", "peak MiB", "seconds"]]
    rows += [[name, f"{peak[name]['median']:,.0f}", f"{seconds[name]['median']:.2f}"] for name in WAYS]
    ours, whole = list(WAYS)[:2]
    ratio = peak[ours]["median"] / peak[whole]["median"]
    report(
        "train_memory",
        [*rows, ["chunked over whole, layers recomputed", f"{ratio:.2f}", ""]],
        {
            "shape": {name: getattr(arguments, name) for name in ("vocab", "sequence", "layers", "model_dim")},
            "peak_memory_mib": peak,
            "process_memory_mib": {name: summary(values["process"]) for name, values in figures.items()},
            "seconds": seconds,
            "loss": {name: values["losses"][0] for name, values in figures.items()},
            "ratio": ratio,
        },
    )


def one_step(arguments: argparse.Namespace, way: Way) -> None:
    """Loss and gradients of one row, by way of one graph, as in training."""
    config = OpenELMConfig.layerwise(
        arguments.layers,
        arguments.model_dim,
        64,
        vocab_size=arguments.vocab,
        max_context_length=arguments.sequence,
    )
    mx.random.seed(0)
    model = OpenELM(config)
    model.transformer.recompute_layers = way.recompute
    tokens = mx.random.randint(0, arguments.vocab, (1, arguments.sequence + 1))
    counted = mx.ones((1, arguments.sequence), mx.bool_)

    def loss(parameters: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten(list(parameters.items())))
        hidden = model.transformer(tokens[:, :-1])
        if way.chunk:
            return token_losses(model, hidden, tokens[:, 1:], counted, z_weight=1e-4, chunk=way.chunk).total
        logits = model.logits(hidden)
        z_loss = 1e-4 * mx.square(mx.logsumexp(logits, axis=-1)).sum()
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="sum") + z_loss

    parameters = dict(tree_flatten(model.parameters()))
    step = mx.compile(mx.value_and_grad(loss))
    mx.eval(parameters, tokens)
    mx.reset_peak_memory()
    before = peak_memory_bytes()
    started = time.perf_counter()
    value, gradients = step(parameters)
    mx.eval(value, gradients)
    print(
        json.dumps(
            {
                "arrays_mib": mx.get_peak_memory() / 2**20,
                "process_mib": (peak_memory_bytes() - before) / 2**20,
                "seconds": time.perf_counter() - started,
                "loss": value.item() / arguments.sequence,
            }
        )
    )


if __name__ == "__main__":
    main()
