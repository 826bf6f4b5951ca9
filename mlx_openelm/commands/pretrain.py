"""`openelm-mlx pretrain` and `openelm-mlx plot`."""

from __future__ import annotations

import signal
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from ..files.names import resolved
from ..files.output import output_file
from .options import Force, examples
from .processes import join_processes
from .progress import training_view
from .terminal import INTERRUPTED, byte_bar, fail, say

if TYPE_CHECKING:
    import mlx.core as mx

    from ..data.corpus import Corpus
    from ..tokenizer.tokenizer import Tokenizer
    from ..training.pretrain import PretrainRecipe

EXAMPLES = examples(
    'openelm-mlx pretrain --config recipe.yaml --data "stories/*.txt" --output runs/stories',
    "openelm-mlx pretrain --config recipe.yaml --output runs/stories --resume --steps 20000",
    'openelm-mlx pretrain --config 270M --data "refinedweb/*.parquet" --output runs/270M',
    "mlx.launch -n 2 -- openelm-mlx pretrain --config recipe.yaml --output runs/stories",
)
PLOT_EXAMPLES = examples("openelm-mlx plot runs/stories", "openelm-mlx plot runs/stories --output run.svg")


def plot(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Picture to write; default: RUN/metrics.png.", metavar="FILE")
    ] = None,
    force: Force = False,
) -> None:
    """Plot a training run: loss, learning rate, gradient norm and tokens per second."""
    from ..plot import plot_run

    output = output or (run if run.is_dir() else run.parent) / "metrics.png"
    with output_file(output, overwrite=force) as picture:
        plot_run(run, picture)
    typer.echo(output)


def pretrain(
    context: typer.Context,
    config: Annotated[
        str, typer.Option(help="YAML recipe, or one of 270M, 450M, 1.1B, 3B, tiny.", metavar="FILE_OR_NAME")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder to write.", metavar="RUN")],
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint.")] = False,
    data_folder: Annotated[
        Path | None, typer.Option(help="Base folder of relative data paths in the recipe.", metavar="DIR")
    ] = None,
) -> None:
    """Train a model from scratch. Any recipe field is also an option, such as --learning-rate 1e-3."""
    from ..training.checkpoints import check_fresh, checkpoint_folders, run_lock, together
    from ..training.pretrain import PretrainRecipe, pretrain

    recipe = PretrainRecipe.from_file(PretrainRecipe.named(config), _fields(context.args), data_folder)
    if not recipe.data:
        raise ConfigError('no data; give --data "stories/*.txt", or set data in the recipe')
    group = join_processes()
    main = group.rank() == 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that a shutdown loses nothing
    try:
        with run_lock(output, group) as run:
            if not resume:
                together(group, lambda: check_fresh(run.path))
            tokenizer, corpus = _prepare(recipe, run.path, group)
            with training_view(recipe.steps, main) as view:
                on_message = say if main else lambda message: None
                steps = pretrain(
                    recipe,
                    corpus,
                    tokenizer,
                    run,
                    resume=resume,
                    group=group,
                    on_step=view.moved,
                    on_message=on_message,
                )
                with closing(steps):
                    for metrics in steps:
                        view.show(metrics)
    except KeyboardInterrupt:
        saved = checkpoint_folders(resolved(output))
        fail(
            f"interrupted; use --resume to continue {output}" if saved else "interrupted before the first checkpoint",
            INTERRUPTED,
        )


def _prepare(recipe: PretrainRecipe, run: Path, group: mx.distributed.Group) -> tuple[Tokenizer, Corpus]:
    """The tokenizer and tokenized corpus of a run; the first process creates them if they do not exist."""
    from ..data.corpus import Filters, prepare_corpus
    from ..data.train_tokenizer import train_tokenizer
    from ..tokenizer.files import find_tokenizer
    from ..tokenizer.tokenizer import Tokenizer
    from ..training.checkpoints import together

    main = group.rank() == 0
    filters = Filters(recipe.min_characters, recipe.min_tokens, recipe.validation_share)
    vocabulary = run / "tokenizer.model"

    def make_vocabulary() -> None:
        if main and recipe.train_tokenizer and not vocabulary.exists():
            say(f"training a tokenizer with {recipe.train_tokenizer:,} tokens")
            train_tokenizer(recipe.data, recipe.train_tokenizer, vocabulary)

    def find_corpus() -> Corpus:
        with byte_bar("tokenizing") if main else nullcontext() as update:
            return prepare_corpus(recipe.data, tokenizer, filters, run / "corpus", *([update] if update else []))

    together(group, make_vocabulary)
    if recipe.train_tokenizer:
        tokenizer = Tokenizer(vocabulary)
    else:
        tokenizer, _ = find_tokenizer(recipe.tokenizer or None, None, recipe.model.vocab_size, chat=False)
    corpus = together(group, lambda: find_corpus() if main else None)  # the others find it on disk
    return tokenizer, corpus or find_corpus()


def _fields(arguments: list[str]) -> dict[str, str]:
    """`--learning-rate 1e-3` and `--learning-rate=1e-3` as fields of a recipe."""
    fields: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, _, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"unexpected argument {name}; give recipe fields as --field value")
        if not value:
            if not rest:
                raise ConfigError(f"{name} requires a value")
            value = rest.pop(0)
        fields[name.removeprefix("--").replace("-", "_")] = value
    return fields
