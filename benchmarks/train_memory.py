"""How much memory does a training step take, and what do the chunked loss and gradient checkpointing save?

The peers are the same step with whole logits (MLX's own `cross_entropy` and automatic differentiation), and without
recomputed layers. Each step runs in a separate process, compiled as in training. The peak is that of MLX's arrays,
including the weights; the growth of the process is recorded too.

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
import numpy as np
from common import in_turn, report, run, summary
from mlx.utils import tree_unflatten

from mlx_openelm import OpenELM, OpenELMConfig
from mlx_openelm.data.batch import TokenBatch, make_batch
from mlx_openelm.machine.device import peak_memory_bytes
from mlx_openelm.model.forward_context import ForwardContext
from mlx_openelm.training.gradients import gradients_of
from mlx_openelm.training.loss import CrossEntropy
from mlx_openelm.training.pretrain import initial_parameters
from mlx_openelm.training.pretrain_recipe import PretrainRecipe


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    recompute: bool
    chunked: bool  # this package's loss; otherwise whole logits, with MLX's own functions


WAYS = {
    "recomputed layers, chunked loss": Way(True, True),
    "recomputed layers, whole logits": Way(True, False),
    "kept layers, chunked loss": Way(False, True),
    "kept layers, whole logits": Way(False, False),
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
    """Compute loss and gradients of one row, and print memory and time."""
    config = OpenELMConfig.layerwise(
        arguments.layers,
        arguments.model_dim,
        64,
        vocab_size=arguments.vocab,
        max_context_length=arguments.sequence,
    )
    recipe = PretrainRecipe(model=config, sequence_length=arguments.sequence)
    model = OpenELM(config)
    parameters = initial_parameters(recipe)
    model.update(tree_unflatten(list(parameters.items())))
    tokens = mx.random.randint(0, arguments.vocab, (1, arguments.sequence + 1), key=mx.random.key(0))
    ids = np.array(tokens)
    batch = make_batch(TokenBatch(ids, np.zeros_like(ids), np.ones((1, arguments.sequence), bool)))

    def whole(parameters: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten(list(parameters.items())))
        x = model.transformer.token_embeddings(tokens[:, :-1])
        shared = ForwardContext.alone(config, 1, training=True)
        for layer in model.transformer.layers:
            x = (nn.utils.checkpoint(layer) if way.recompute else layer)(x, shared)
        logits = model.logits(model.transformer.norm(x))
        z_loss = recipe.z_loss * mx.square(mx.logsumexp(logits, axis=-1)).sum()
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="sum") + z_loss

    objective = CrossEntropy(recipe.z_loss, recipe.loss_chunk)
    ours = gradients_of(model, objective, mx.float32, way.recompute)
    peer = mx.compile(mx.value_and_grad(whole))
    mx.eval(parameters, tokens, batch)
    mx.reset_peak_memory()
    before = peak_memory_bytes()
    started = time.perf_counter()
    value, gradients = ours(parameters, batch) if way.chunked else peer(parameters)
    mx.eval(value, gradients)
    values = np.array(value)
    loss = float(values[0] + recipe.z_loss * values[1]) if way.chunked else float(values)
    print(
        json.dumps(
            {
                "arrays_mib": mx.get_peak_memory() / 2**20,
                "process_mib": (peak_memory_bytes() - before) / 2**20,
                "seconds": time.perf_counter() - started,
                "loss": loss / arguments.sequence,
            }
        )
    )


if __name__ == "__main__":
    main()
