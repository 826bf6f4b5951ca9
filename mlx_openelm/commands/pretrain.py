"""`openelm-mlx pretrain` and `openelm-mlx plot`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files.output import output_file
from ..files.paths import is_folder
from ..training.pretrain import PretrainRecipe
from .options import Force, examples
from .processes import join_processes
from .progress import TrainingView, resumable
from .recipe_options import recipe_options
from .terminal import write

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
        Path | None, typer.Option("--output", "-o", help="Image to write; default: RUN/metrics.png.", metavar="FILE")
    ] = None,
    force: Force = False,
) -> None:
    """Plot a training run: loss, learning rate, gradient norm and tokens per second."""
    from ..plot import plot_run

    output = output or (run if is_folder(run) else run.parent) / "metrics.png"
    with output_file(output, overwrite=force) as picture:
        plot_run(run, picture)
    write(str(output))


@recipe_options(PretrainRecipe)
def pretrain(
    config: Annotated[
        str, typer.Option(help="YAML recipe, or one of 270M, 450M, 1.1B, 3B, tiny.", metavar="FILE_OR_NAME")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder to write.", metavar="RUN")],
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint.")] = False,
    data_folder: Annotated[
        Path | None, typer.Option(help="Base folder of relative paths in the recipe.", metavar="DIR")
    ] = None,
    *,
    given: dict[str, Any],
) -> None:
    """Train a model from scratch.

    Options override the --config recipe; anything that neither sets has its default.
    """
    from ..training.run import TrainingCallback, pretrain as run

    recipe = PretrainRecipe.from_file(config, given, data_folder)
    group = join_processes()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that a shutdown loses nothing
    view = TrainingView() if group.rank() == 0 else TrainingCallback()
    with resumable(output), view:
        run(recipe, output, resume=resume, group=group, callback=view)
