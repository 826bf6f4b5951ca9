"""Does layer-wise scaling help at a size that trains in minutes? And does attention across packed documents hurt?

Trains a layer-wise and a uniform model with the same number of parameters on the same rows for the same steps, with
several seeds; then the layer-wise model with attention inside each document only. Reports the held-out loss of each
variant, with its spread.

python benchmarks/layerwise.py --data FOLDER [--seeds 3] [--steps 250]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from common import report, summary

from mlx_openelm import OpenELMConfig, load
from mlx_openelm.data.corpus import Corpus, Filters, prepare_corpus
from mlx_openelm.data.text_files import TextSource
from mlx_openelm.model.design import uniform_counterpart
from mlx_openelm.training.pretrain import fresh_trainer
from mlx_openelm.training.pretrain_recipe import PretrainRecipe

SOURCES = ("tinystories_*.txt", "african_storybook_*.txt", "fairytales_*.txt", "fables_*.txt", "children_*.txt")
LAYERWISE = OpenELMConfig.layerwise(
    8, 128, 32, num_gqa_groups=2, ffn_dim_divisor=16, vocab_size=4096, max_context_length=256
)
VARIANTS = {
    "layer-wise": (LAYERWISE, "stream"),
    "uniform": (uniform_counterpart(LAYERWISE), "stream"),
    "layer-wise, attention inside documents": (LAYERWISE, "documents"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of text files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    parser.add_argument("--one", nargs=3, metavar=("VARIANT", "SEED", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        variant, seed, cache = arguments.one
        print(json.dumps(train(recipe_of(arguments, variant, int(seed)), Path(cache))))
        return
    with tempfile.TemporaryDirectory() as cache:
        corpus_of(recipe_of(arguments, "uniform", 0), Path(cache))
        jobs = [(variant, seed) for seed in range(arguments.seeds) for variant in VARIANTS]
        losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for start in range(0, len(jobs), arguments.processes):
            group = [
                (variant, subprocess.Popen(command(arguments, variant, seed, cache), stdout=subprocess.PIPE, text=True))
                for variant, seed in jobs[start : start + arguments.processes]
            ]
            for variant, process in group:
                loss = json.loads(process.communicate()[0].splitlines()[-1])
                losses[variant].append(loss)
                print(f"  {variant}: {loss:.4f}", file=sys.stderr)
    figures = {name: summary(values) for name, values in losses.items()}
    rows = [["", "parameters", "median", "from", "to"]]
    for name, found in figures.items():
        count = f"{VARIANTS[name][0].num_parameters:,}"
        rows.append([name, count, *(f"{found[key]:.4f}" for key in ("median", "min", "max"))])
    report(
        "layerwise",
        rows,
        {
            "steps": arguments.steps,
            "tokens_per_step": recipe_of(arguments, "uniform", 0).batch_size * LAYERWISE.max_context_length,
            "parameters": {name: config.num_parameters for name, (config, _) in VARIANTS.items()},
            "held_out_loss": figures,
            "losses": losses,
        },
    )


def command(arguments: argparse.Namespace, variant: str, seed: int, cache: str) -> list[str]:
    words = [sys.executable, __file__, "--data", arguments.data, "--steps", arguments.steps]
    return [str(word) for word in [*words, "--one", variant, seed, cache]]


def recipe_of(arguments: argparse.Namespace, variant: str, seed: int) -> PretrainRecipe:
    config, packing = VARIANTS[variant]
    return PretrainRecipe(
        model=config,
        data=tuple(TextSource(str(arguments.data / name)) for name in SOURCES),
        steps=arguments.steps,
        batch_size=16,
        sequence_length=256,
        packing=packing,
        learning_rate=0.004,
        warmup_steps=arguments.steps // 10,
        dtype="float32",
        validation_rows=0,
        seed=seed,
    )


def corpus_of(recipe: PretrainRecipe, cache: Path) -> Corpus:
    _, tokenizer = load()
    return prepare_corpus(recipe.data, tokenizer, Filters(), cache)


def train(recipe: PretrainRecipe, cache: Path) -> float:
    """Held-out loss after training; all variants are evaluated with attention inside documents."""
    corpus = corpus_of(recipe, cache)
    trainer = fresh_trainer(recipe, corpus)
    while trainer.step < recipe.steps:
        trainer.take_step()
    judge = fresh_trainer(
        replace(recipe, packing="documents"), corpus
    )  # as a reader sees a text: one document and nothing else
    judge.parameters = trainer.parameters
    return judge.validation()["loss"]


if __name__ == "__main__":
    main()
