"""Does tuning teach the built-in model the answers of ARC-Easy in minutes?

Tunes openelm-tiny with LoRA on the answers of the training questions, with the paper's prompt template, and follows the
loss on the answers of the test questions. For comparison, it reports the loss of a model that knows the form of the
answers but not which of the four is right. A plot of the loss is saved with the results.

python benchmarks/tune_arc.py --data FOLDER     # with train.json and test.json
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import RESULTS, report

from mlx_openelm.files.output import output_file
from mlx_openelm.plot import plot_run
from mlx_openelm.training.tune import prepare_tuning, tuning_steps
from mlx_openelm.training.tune_recipe import TuneRecipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.json and test.json")
    parser.add_argument("--epochs", type=float, default=1.0)
    arguments = parser.parse_args()
    recipe = TuneRecipe(
        data=str(arguments.data),
        validation=str(arguments.data / "test.json"),
        rank=16,
        alpha=32.0,
        batch_size=16,
        epochs=arguments.epochs,
        learning_rate=2e-3,
        validate_every=47,
        dtype="float32",
    )
    tuning = prepare_tuning(recipe)
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "openelm-tiny on ARC-Easy"
        started = time.perf_counter()
        metrics = []
        for figures in tuning_steps(tuning, run):
            metrics.append(figures)
            print(figures.step, figures.loss, figures.validation_loss, flush=True)
        seconds = time.perf_counter() - started
        shutil.copy(run / "metrics.jsonl", RESULTS / "tune_arc.jsonl")
        with output_file(RESULTS / "tune_arc.png", overwrite=True) as picture:
            plot_run(run, picture)
    held_out = [(m.step, m.validation_loss) for m in metrics if m.validation_loss is not None]
    choice = choice_nats(arguments.data / "test.json", tuning)
    rows = [
        ["", "loss on the answers of the test questions, nats per token"],
        ["untuned", f"{held_out[0][1]:.4f}"],
        ["tuned", f"{held_out[-1][1]:.4f}"],
        ["form known, choice unknown", f"{choice:.4f}"],
    ]
    report(
        "tune_arc",
        rows,
        {
            "steps": tuning.recipe.steps,
            "trained_parameters": tuning.num_parameters,
            "examples": len(tuning.train.examples),
            "test_examples": len(tuning.held_out.examples) if tuning.held_out else 0,
            "seconds": seconds,
            "held_out": held_out,
            "choice_nats": choice,
        },
    )


def choice_nats(path: Path, tuning) -> float:  # type: ignore[no-untyped-def]
    """Entropy of the choice of the right answer, per token of an answer."""
    records = json.loads(path.read_text(encoding="utf-8"))
    counts = Counter(record["answer"] for record in records)
    entropy = -sum(n * math.log(n / len(records)) for n in counts.values()) / len(records)
    held_out = tuning.held_out.examples
    return entropy / (sum(int(example.completion_mask.sum()) for example in held_out) / len(held_out))


if __name__ == "__main__":
    main()
