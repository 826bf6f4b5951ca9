"""How fast is tuning, and how much memory does it take, compared with stock mlx-lm?

Both train the same new LoRA adapter on the same random model, on the same rows with the same optimizer, each in a
separate process, in turn; with and without gradient checkpointing. mlx-lm runs through the `train` function behind
`mlx_lm.lora`. The losses of each step are recorded; they have to be the same.

python benchmarks/tune.py [--vocab 32000] [--sequence 1024] [--batch 2] [--answers 1.0] [--rounds 3]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers
import numpy as np
from common import in_turn, report, summary, write_model_and_adapter

from mlx_openelm import OpenELMConfig, load_model
from mlx_openelm.data.batch import TokenBatch
from mlx_openelm.model.adapters import read_tensors
from mlx_openelm.model.lora import adapter_parameters
from mlx_openelm.training.gradients import set_parameters
from mlx_openelm.training.loss import CrossEntropy
from mlx_openelm.training.trainer import Trainer
from mlx_openelm.training.tune_recipe import TuneRecipe

RECIPE = TuneRecipe(
    steps=1000, learning_rate=1e-3, schedule="constant", initial_learning_rate=1e-3, max_grad_norm=0.0, dtype="float32"
)
WARM_UP = 2  # steps, in which both compile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--model-dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--answers", type=float, default=1.0, help="share of each row that is learnt")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed in a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("WHO", "CHECKPOINTING", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        who, checkpointing, folder = arguments.one
        steps = {"openelm-mlx": ours, "mlx-lm": peer}[who]
        print(json.dumps(steps(arguments, Path(folder), checkpointing == "yes")))
        return
    rows = [["", "", "tokens/s", "peak MiB", "ratio of speed", "ratio of peak"]]
    figures: dict = {"shape": {name: value for name, value in vars(arguments).items() if name != "one"}}
    with tempfile.TemporaryDirectory() as folder:
        prepare(arguments, Path(folder))
        for checkpointing in ("no", "yes"):
            found = measure(arguments, folder, checkpointing)
            figures[f"checkpointing_{checkpointing}"] = found
            for who in ("openelm-mlx", "mlx-lm"):
                speed, peak = (found[who][key]["median"] for key in ("tokens_per_second", "peak_bytes"))
                ratios = (
                    [f"{found[key]:.2f}" for key in ("speed_ratio", "peak_ratio")] if who == "openelm-mlx" else ["", ""]
                )
                rows.append([f"checkpointing: {checkpointing}", who, f"{speed:,.0f}", f"{peak / 2**20:,.0f}", *ratios])
    report("tune", rows, figures)


def measure(arguments: argparse.Namespace, folder: str, checkpointing: str) -> dict:
    """Run both in turn; the figures of each, and their ratios."""
    runs: dict[str, list[dict]] = {"openelm-mlx": [], "mlx-lm": []}

    def once(who: str) -> float:
        shape = [word for name in ("layers", "model_dim", "vocab", "sequence", "batch", "answers", "steps")
                 for word in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]  # fmt: skip
        command = [sys.executable, __file__, *shape, "--one", who, checkpointing, folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        runs[who].append(json.loads(done.stdout.splitlines()[-1]))
        return runs[who][-1]["tokens_per_second"]

    in_turn({who: partial(once, who) for who in runs}, arguments.rounds, warm_up=0)
    found: dict = {
        who: {key: summary([run[key] for run in of]) for key in ("tokens_per_second", "peak_bytes")}
        for who, of in runs.items()
    }
    for name, key in (("speed_ratio", "tokens_per_second"), ("peak_ratio", "peak_bytes")):
        found[name] = found["openelm-mlx"][key]["median"] / found["mlx-lm"][key]["median"]
    found["losses"] = {who: of[0]["losses"] for who, of in runs.items()}
    return found


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Write a random model, and a new adapter for it."""
    config = OpenELMConfig.layerwise(
        arguments.layers, arguments.model_dim, 64, vocab_size=arguments.vocab, max_context_length=arguments.sequence
    )
    assert RECIPE.adapter_config is not None, "the recipe is of an adapter"
    write_model_and_adapter(folder, config, RECIPE.adapter_config)


def tokens_of(arguments: argparse.Namespace, step: int) -> np.ndarray:
    """Rows of a step, int32 (B, L + 1); four batches alternate."""
    return np.random.default_rng(step % 4).integers(0, 500, (arguments.batch, arguments.sequence + 1)).astype(np.int32)


def first_counted(arguments: argparse.Namespace) -> int:
    """The first position in a row whose next token is in the loss."""
    return round(arguments.sequence * (1 - arguments.answers))


def ours(arguments: argparse.Namespace, folder: Path, checkpointing: bool) -> dict:
    """Steps of this package's trainer."""

    class Data:
        rows_per_step = arguments.batch
        rows_per_entry = 1
        fingerprint = ""

        def step(self, step: int, first: int = 0, count: int | None = None) -> TokenBatch:
            tokens = tokens_of(arguments, step)
            counted = np.ones((arguments.batch, arguments.sequence), bool)
            counted[:, : first_counted(arguments)] = False
            return TokenBatch(tokens, np.zeros_like(tokens), counted)

        def validation(self, first: int, stride: int) -> list[TokenBatch]:
            return []

    from dataclasses import replace

    recipe = replace(RECIPE, gradient_checkpointing=checkpointing)
    model = load_model(folder / "model", adapter=folder / "adapter")
    set_parameters(model, mx.float32, read_tensors(folder / "adapter" / "adapters.safetensors"))
    trainer = Trainer(recipe, model, adapter_parameters(model), Data(), CrossEntropy())
    losses, times = [], []
    for _ in range(WARM_UP + arguments.steps):
        started = time.perf_counter()
        losses.append(trainer.take_step()["loss"])
        times.append(time.perf_counter() - started)
    return figures_of(arguments, losses, times)


def peer(arguments: argparse.Namespace, folder: Path, checkpointing: bool) -> dict:
    """Steps of mlx-lm's trainer."""
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(folder / "model", lazy=False)
    model.freeze()
    model = load_adapters(model, str(folder / "adapter"))
    losses, times = [], []
    last = 0.0

    class Watch(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            nonlocal last
            losses.append(info["train_loss"])
            times.append(time.perf_counter() - last)
            last = time.perf_counter()

    def batches(**options: object):  # type: ignore[no-untyped-def]
        nonlocal last
        for step in range(WARM_UP + arguments.steps):
            last = last or time.perf_counter()
            lengths = [[first_counted(arguments) + 1, arguments.sequence]] * arguments.batch
            yield mx.array(tokens_of(arguments, step)), mx.array(lengths)

    options = TrainingArgs(
        batch_size=arguments.batch,
        iters=WARM_UP + arguments.steps,
        steps_per_report=1,
        steps_per_save=10**9,
        adapter_file=str(folder / "peer.safetensors"),
        grad_checkpoint=checkpointing,
    )
    optimizer = mlx.optimizers.AdamW(1e-3, betas=[RECIPE.beta1, RECIPE.beta2], weight_decay=0.0, bias_correction=True)
    train(model, optimizer, [None], args=options, iterate_batches=batches, training_callback=Watch())
    return figures_of(arguments, losses, times)


def figures_of(arguments: argparse.Namespace, losses: list[float], times: list[float]) -> dict:
    tokens = arguments.batch * arguments.sequence
    speed = tokens * arguments.steps / sum(times[WARM_UP:])
    return {"tokens_per_second": speed, "peak_bytes": mx.get_peak_memory(), "losses": losses}


if __name__ == "__main__":
    main()
