"""`openelm-mlx pretrain` and `openelm-mlx plot`."""

from __future__ import annotations

import signal
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .options import examples
from .progress import training_view
from .terminal import INTERRUPTED, byte_bar, fail, say

EXAMPLES = examples(
    'openelm-mlx pretrain --config recipe.yaml --data "stories/*.txt" --output runs/stories',
    "openelm-mlx pretrain --config recipe.yaml --output runs/stories --resume --steps 20000",
    'openelm-mlx pretrain --config 270M --data "refinedweb/*.parquet" --output runs/270M',
    "mlx.launch -n 2 -- openelm-mlx pretrain --config recipe.yaml --output runs/stories",
)
PLOT_EXAMPLES = examples("openelm-mlx plot runs/stories", "openelm-mlx plot runs/stories --output run.svg")


def plot(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Picture to write; RUN/metrics.png.", metavar="FILE")
    ] = None,
) -> None:
    """Draw a training run: loss, learning rate, gradient norm, tokens per second."""
    from ..plot import plot_run

    output = output or (run if run.is_dir() else run.parent) / "metrics.png"
    plot_run(run, output)
    typer.echo(output)


def pretrain(
    context: typer.Context,
    config: Annotated[
        str, typer.Option(help="Recipe in YAML, or one of 270M, 450M, 1.1B, 3B, tiny.", metavar="FILE_OR_NAME")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.", metavar="RUN")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    data_folder: Annotated[
        Path | None, typer.Option(help="What the paths of the recipe's data are relative to.", metavar="DIR")
    ] = None,
) -> None:
    """Train a model from scratch. Any field of the recipe can be given too, as in --learning-rate 1e-3."""
    import mlx.core as mx

    from ..data import Filters, prepare_corpus
    from ..pretrain import PretrainRecipe, pretrain
    from ..tokenizer import Tokenizer
    from ..tokenizer_files import find_tokenizer
    from ..vocabulary import train_tokenizer

    recipe = PretrainRecipe.from_file(PretrainRecipe.named(config), _fields(context.args), data_folder)
    if not recipe.data:
        raise ConfigError('no data is named; give --data "stories/*.txt", or `data` in the recipe')
    group = mx.distributed.init()
    main = group.rank() == 0
    if recipe.train_tokenizer:
        path = output / "tokenizer.model"
        if not path.exists() and main:
            say(f"making a vocabulary of {recipe.train_tokenizer:,} pieces")
            train_tokenizer(recipe.data, recipe.train_tokenizer, path)
        mx.eval(mx.distributed.all_sum(mx.zeros(1)))
        tokenizer = Tokenizer(path)
    else:
        tokenizer, _ = find_tokenizer(recipe.tokenizer or None, None, recipe.model.vocab_size, chat=False)
    filters = Filters(recipe.min_characters, recipe.min_tokens, recipe.validation_share)
    corpus = None
    if main:
        with byte_bar("tokenizing") as update:
            corpus = prepare_corpus(recipe.data, tokenizer, filters, output / "corpus", update)
    mx.eval(mx.distributed.all_sum(mx.zeros(1)))
    corpus = corpus or prepare_corpus(recipe.data, tokenizer, filters, output / "corpus")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a machine that shuts down loses nothing
    try:
        with training_view(recipe.steps, main) as view:
            on_message = say if main else lambda message: None
            steps = pretrain(
                recipe, corpus, tokenizer, output, resume=resume, group=group, on_step=view.moved, on_message=on_message
            )
            with closing(steps):
                for metrics in steps:
                    view.show(metrics)
    except KeyboardInterrupt:
        fail(f"interrupted; --resume goes on from {output}", INTERRUPTED)


def _fields(arguments: list[str]) -> dict[str, str]:
    """`--learning-rate 1e-3` and `--learning-rate=1e-3` as fields of a recipe."""
    fields: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, _, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"{name} is no field of a recipe; fields are given as --field value")
        if not value:
            if not rest:
                raise ConfigError(f"{name} has no value")
            value = rest.pop(0)
        fields[name.removeprefix("--").replace("-", "_")] = value
    return fields
