"""How much memory do freed buffers take while a model is tuned on rows of many widths?

MLX keeps freed buffers for arrays of about the same size. On a GPU it keeps them until memory runs out; on the CPU only
32 MB of them. Here the CPU backend gets the limit that Metal would set on a small machine, and a LoRA adapter is
tuned for 200 steps whose widths vary from 32 to 256: by this package with and without its limit, and by mlx-lm, which
frees them all after each step. Every way runs in a process of its own, in turn, on the same rows.

python benchmarks/train_cache.py [--steps 200] [--rounds 3] [--memory-mib 192]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.optimizers
import numpy as np
from common import in_turn, report, summary, write_model_and_adapter

from mlx_openelm import OpenELMConfig, load_model
from mlx_openelm.data.batch import TokenBatch
from mlx_openelm.machine import device
from mlx_openelm.model.lora import adapter_parameters
from mlx_openelm.training.loss import CrossEntropy
from mlx_openelm.training.trainer import Trainer
from mlx_openelm.training.tune_recipe import TuneRecipe

WAYS = ("openelm-mlx", "openelm-mlx, no limit", "mlx-lm")
CONFIG = OpenELMConfig.layerwise(4, 128, 32, num_gqa_groups=2, ffn_dim_divisor=32, vocab_size=2048)
RECIPE = TuneRecipe(
    steps=10_000,
    learning_rate=1e-4,
    schedule="constant",
    initial_learning_rate=1e-4,
    max_grad_norm=0.0,
    dtype="float32",
)
BATCH = 2
WIDTHS = np.arange(32, 257, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory-mib", type=int, default=192, help="memory of the machine that is imitated, some four times the peak"
    )
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    limit = arguments.memory_mib << 20
    if arguments.one:
        mx.set_cache_limit(limit * 3 // 2)  # as on Metal
        way, folder = arguments.one
        with patch.object(device, "memory_limit_bytes", lambda: limit):
            print(json.dumps(one(way, Path(folder), arguments.steps)))
        return
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))

        def measure(way: str) -> float:
            shape = ["--steps", str(arguments.steps), "--memory-mib", str(arguments.memory_mib)]
            done = subprocess.run(
                [sys.executable, __file__, *shape, "--one", way, folder], capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(done.stderr)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            return found[way][-1]["tokens_per_second"]

        in_turn({way: partial(measure, way) for way in WAYS}, arguments.rounds, warm_up=0)
    keys = ("cache_mib", "largest_cache_mib", "arrays_mib", "process_mib", "tokens_per_second")
    figures = {way: {key: summary([run[key] for run in found[way]]) for key in keys} for way in WAYS}
    rows = [["", "freed buffers at the end, MiB", "at most", "peak of arrays", "peak of the process", "tokens/s"]]
    rows += [[way, *(f"{figures[way][key]['median']:,.0f}" for key in keys)] for way in WAYS]
    report("train_cache", rows, {"steps": arguments.steps, "memory_mib": arguments.memory_mib, **figures})


def prepare(folder: Path) -> None:
    """Write a random model, and a new adapter for it."""
    assert RECIPE.adapter_config is not None, "the recipe is of an adapter"
    write_model_and_adapter(folder, CONFIG, RECIPE.adapter_config)


def tokens_of(step: int) -> np.ndarray:
    """Rows of a step, int32 (B, L + 1)."""
    chance = np.random.default_rng(step)
    return chance.integers(0, 500, (BATCH, chance.choice(WIDTHS) + 1)).astype(np.int32)


def one(way: str, folder: Path, steps: int) -> dict:
    """Take the steps of one way; its memory and speed, without the steps in which each width occurs first."""
    caches, seen, counted, seconds = [], set(), 0, 0.0

    def after(step: int, taken: float) -> None:
        nonlocal counted, seconds
        caches.append(mx.get_cache_memory())
        width = tokens_of(step).shape[1]
        if width in seen:
            counted, seconds = counted + BATCH * (width - 1), seconds + taken
        seen.add(width)

    if way == "mlx-lm":
        peer(folder, steps, after)
    else:
        with nullcontext() if "no limit" in way else device.limited_cache():
            ours(folder, steps, after)
            mx.synchronize()
    return {
        "cache_mib": caches[-1] / 2**20,
        "largest_cache_mib": max(caches) / 2**20,
        "arrays_mib": mx.get_peak_memory() / 2**20,
        "process_mib": device.peak_memory_bytes() / 2**20,
        "tokens_per_second": counted / seconds,
    }


def ours(folder: Path, steps: int, after: Callable[[int, float], None]) -> None:
    """Steps of this package's trainer."""

    class Data:
        rows_per_step = BATCH
        rows_per_entry = 1
        fingerprint = ""

        def step(self, step: int, first: int = 0, count: int | None = None) -> TokenBatch:
            tokens = tokens_of(step)
            return TokenBatch(tokens, np.zeros_like(tokens), np.ones_like(tokens[:, 1:], bool))

        def validation(self, first: int, stride: int) -> list[TokenBatch]:
            return []

    model = load_model(folder / "model", adapter=folder / "adapter")
    trainer = Trainer(RECIPE, model, adapter_parameters(model), Data(), CrossEntropy())
    for step in range(steps):
        started = time.perf_counter()
        trainer.take_step()
        after(step, time.perf_counter() - started)


def peer(folder: Path, steps: int, after: Callable[[int, float], None]) -> None:
    """Steps of mlx-lm's trainer."""
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model as load_peer

    model, _ = load_peer(folder / "model", lazy=False)
    model.freeze()
    model = load_adapters(model, str(folder / "adapter"))
    started = 0.0

    class Watch(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            after(info["iteration"] - 1, time.perf_counter() - started)

    def batches(**options: object) -> Iterator[tuple[mx.array, mx.array]]:
        nonlocal started
        for step in range(steps):
            tokens = tokens_of(step)
            started = time.perf_counter()
            yield mx.array(tokens), mx.array([[1, tokens.shape[1] - 1]] * BATCH)

    options = TrainingArgs(
        batch_size=BATCH,
        iters=steps,
        steps_per_report=1,
        steps_per_save=10**9,
        adapter_file=str(folder / "peer.safetensors"),
    )
    optimizer = mlx.optimizers.AdamW(1e-4, betas=[RECIPE.beta1, RECIPE.beta2], weight_decay=0.0, bias_correction=True)
    train(model, optimizer, [None], args=options, iterate_batches=batches, training_callback=Watch())


if __name__ == "__main__":
    main()
