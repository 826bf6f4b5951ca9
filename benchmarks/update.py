"""How much memory does the optimizer's update take, and how long?

The update of all parameters of a network, by this package's trainer and by MLX's AdamW with clipping, compiled as in
mlx-lm; the gradients are given. Each runs in a process of its own, in turn. Bytes are the peak of MLX's arrays over the
number of parameters: the parameters, their gradients and moments alone take 16. `--against` adds another checkout.

python benchmarks/update.py [--rounds 5] [--against FOLDER]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
from common import ROOT, in_turn, report, summary

from mlx_openelm import OpenELM, OpenELMConfig
from mlx_openelm.data.batch import TokenBatch
from mlx_openelm.training.loss import CrossEntropy
from mlx_openelm.training.pretrain import initial_parameters
from mlx_openelm.training.pretrain_recipe import PretrainRecipe
from mlx_openelm.training.trainer import Trainer

CONFIG = OpenELMConfig.layerwise(10, 384, 64, vocab_size=8000)
RECIPE = PretrainRecipe(model=CONFIG, steps=1000, sequence_length=16, dtype="float32")
STEPS = 6  # of which the first two do not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="folder of another checkout of this package")
    parser.add_argument("--one", choices=("ours", "mlx"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps({"ours": ours, "mlx": peer}[arguments.one]()))
        return
    ways = {"openelm-mlx": (ROOT, "ours"), "mlx.optimizers.AdamW": (ROOT, "mlx")}
    if arguments.against:
        ways["openelm-mlx, the other checkout"] = (arguments.against, "ours")
    bytes_of: dict[str, float] = {}

    def measure(way: str) -> float:
        package, who = ways[way]
        environment = {**os.environ, "PYTHONPATH": str(package.resolve())}
        command = [sys.executable, __file__, "--one", who]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        bytes_of[way] = found["bytes_per_parameter"]
        return found["seconds"]

    seconds = in_turn({way: partial(measure, way) for way in ways}, arguments.rounds, warm_up=0)
    figures: dict[str, Any] = {
        way: {"seconds": summary(seconds[way]), "bytes_per_parameter": bytes_of[way]} for way in ways
    }
    rows = [["", "bytes per parameter", "seconds"]]
    rows += [[way, f"{bytes_of[way]:.1f}", f"{figures[way]['seconds']['median']:.3f}"] for way in ways]
    report("update", rows, {"parameters": CONFIG.num_parameters, "ways": figures})


def gradients_of(parameters: dict[str, mx.array], step: int) -> dict[str, mx.array]:
    """Gradients as they are after a backward pass."""
    keys = mx.random.split(mx.random.key(step), len(parameters))
    found = {name: mx.random.normal(p.shape, key=key) for (name, p), key in zip(parameters.items(), keys, strict=True)}
    mx.eval(found)
    return found


def ours() -> dict:
    """Steps of the trainer with given gradients."""

    class Data:
        rows_per_step = rows_per_entry = 1
        fingerprint = ""

        def step(self, step: int, first: int = 0, count: int | None = None) -> TokenBatch:
            tokens = np.zeros((1, 17), np.int32)
            return TokenBatch(tokens, tokens, np.ones((1, 16), bool))

        def validation(self, first: int, stride: int) -> list[TokenBatch]:
            return []

    trainer = Trainer(RECIPE, OpenELM(CONFIG), initial_parameters(RECIPE), Data(), CrossEntropy(0.0))
    mx.eval(trainer.parameters, trainer.moments)
    times, peak = [], 0
    given: list[dict[str, mx.array]] = []
    trainer._gradients = lambda parameters, batch: (mx.array([1.0, 0.0, 16.0]), given.pop())
    for step in range(STEPS):
        given.append(gradients_of(trainer.parameters, step))
        mx.synchronize()
        mx.reset_peak_memory()
        started = time.perf_counter()
        trainer.take_step()
        times.append(time.perf_counter() - started)
        peak = mx.get_peak_memory()
    return figures_of(times, peak)


def peer() -> dict:
    """Updates by MLX's own optimizer, compiled with the model's and the optimizer's state, as mlx-lm does."""
    model = OpenELM(CONFIG)
    model.update(dict(mlx.utils.tree_unflatten(list(initial_parameters(RECIPE).items()))))
    optimizer = mlx.optimizers.AdamW(
        RECIPE.learning_rate, betas=[RECIPE.beta1, RECIPE.beta2], weight_decay=RECIPE.weight_decay, bias_correction=True
    )
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    mx.eval(state)

    @partial(mx.compile, inputs=state, outputs=state)
    def update(gradients: dict) -> mx.array:
        clipped, norm = mlx.optimizers.clip_grad_norm(gradients, RECIPE.max_grad_norm)
        optimizer.update(model, clipped)
        return norm

    times, peak = [], 0
    for step in range(STEPS):
        named = gradients_of(dict(mlx.utils.tree_flatten(model.trainable_parameters())), step)
        gradients = mlx.utils.tree_unflatten(list(named.items()))
        named.clear()
        mx.synchronize()
        mx.reset_peak_memory()
        started = time.perf_counter()
        norm = update(gradients)
        del gradients
        mx.eval(state, norm)
        times.append(time.perf_counter() - started)
        peak = mx.get_peak_memory()
    return figures_of(times, peak)


def figures_of(times: list[float], peak: int) -> dict:
    return {"bytes_per_parameter": peak / CONFIG.num_parameters, "seconds": float(np.median(times[2:]))}


if __name__ == "__main__":
    main()
