"""`openelm-mlx pretrain` and `openelm-mlx plot`."""

from __future__ import annotations

import signal
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..files.names import resolved
from ..files.output import output_file
from ..files.paths import is_folder
from ..runs import checkpoint_folders
from ..training.pretrain_recipe import PretrainRecipe
from .options import Force, Json, examples
from .pretrain_plan import describe
from .processes import join_processes
from .progress import TrainingView, best, judge, perplexity, report_finished, result_json, resumable
from .recipe_options import Resume, RunToResume, describe_metric, recipe_options, run_folder, task_metric
from .terminal import print_json, write

if TYPE_CHECKING:
    from ..training.plan import Plan
    from ..training.pretrain import Pretraining
    from ..training.run import TrainingResult

EXAMPLES = examples(
    'openelm-mlx pretrain --model toy.json --data "stories/*.txt" --output runs/stories',
    "openelm-mlx pretrain --resume runs/stories",
    "openelm-mlx pretrain --resume runs/stories --steps 20000",
    'openelm-mlx pretrain --config recipe.yaml --data "stories/*.txt" --output runs/stories --dry-run',
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
    """Plot a training run: loss, learning rate, gradient norm, tokens per second and evaluations.

    RUN/metrics.png is drawn anew each time; another file is replaced only with --force.
    """
    from ..plot import is_own_picture, plot_run

    usual = (run if is_folder(run) else run.parent) / "metrics.png"
    redrawn = output is None and is_own_picture(usual)  # the run may have got further
    output = output or usual
    with output_file(output, overwrite=force or redrawn) as picture:
        plot_run(run, picture)
    write(str(output))


@recipe_options(PretrainRecipe)
def pretrain(
    run: RunToResume = None,
    config: Annotated[
        str | None, typer.Option(help="YAML recipe, or one of 270M, 450M, 1.1B, 3B, tiny.", metavar="FILE_OR_NAME")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder to write.", metavar="RUN")] = None,
    resume: Resume = False,
    data_folder: Annotated[
        Path | None, typer.Option(help="Base folder of relative paths in the recipe.", metavar="DIR")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show steps, memory and time, then exit; writes nothing.")
    ] = False,
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Train a model from scratch.

    Options override the --config recipe; what neither sets follows from the model and the data.

    The fields of a recipe are the options below, with _ in place of -.
    """
    from ..training.plan import estimated_plan, plan_of
    from ..training.run import TrainingCallback, run_pretraining

    folder = None if dry_run and not resume else run_folder(run, output, resume)
    recipe = _recipe(config, given, data_folder, folder if resume else None)
    group = join_processes()
    is_first = group.rank() == 0
    metric = task_metric(recipe, group)
    if dry_run:
        if is_first:
            _show(estimated_plan(recipe, group.size()), as_json)
        return
    assert folder is not None, "only a dry run has none"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that a shutdown loses nothing
    view = TrainingView() if is_first else TrainingCallback()
    plans: list[Plan] = []

    def show(pretraining: Pretraining) -> None:
        if is_first:
            plans.append(plan_of(pretraining, group.size()))
            describe(plans[0])
            describe_metric(metric, recipe)

    with resumable("pretrain", folder), view:
        result = run_pretraining(recipe, folder, resume, group, view, show, metric)
    if not is_first:
        return
    if not plans:
        report_finished("pretrain", result, as_json)
    elif as_json:
        print_json(result_json(result))
    else:
        _report(result)
    if not as_json:
        _show_uses(result)


def _recipe(
    config: str | None, given: dict[str, Any], data_folder: Path | None, resumed: Path | None
) -> PretrainRecipe:
    if config is not None:
        return PretrainRecipe.from_file(config, given, data_folder)
    if data_folder is not None:
        raise ConfigError(f"--data-folder {data_folder} is for the paths of a recipe; give the recipe with --config")
    if resumed is not None:
        return PretrainRecipe.of_run(resumed, given)
    if "model" not in given:
        raise ConfigError(
            "which model? use --model with a file of `openelm-mlx design --save` or a size such as 270M, or a recipe "
            "with --config"
        )
    return PretrainRecipe.from_dict(given)


def _show(plan: Plan, as_json: bool) -> None:
    if as_json:
        print_json(plan.to_dict())
    else:
        describe(plan)


def _report(result: TrainingResult) -> None:
    last = result.metrics
    if last is None:
        write(f"{result.folder}: nothing left to train")
        return
    ended = f"stopped early, because {judge(result)} stopped improving," if result.stopped_early else "trained"
    loss = result.validation_loss
    more = "" if loss is None or result.evaluation else f" (perplexity {perplexity(loss)})"
    write(f"{result.folder}: {ended} {last.step:,} steps on {last.tokens:,} tokens{best(result)}{more}")


def _show_uses(result: TrainingResult) -> None:
    """Say what can be done with a run, by the commands that do it."""
    run = quote(str(result.folder))
    of = f"the checkpoint of step {result.step:,}" if result.step is not None else "its checkpoint"
    write(f"to use {of}:")
    write(f'  openelm-mlx generate --model {run} --prompt "Once upon a time"')
    write(f"  openelm-mlx info {run}")
    write("next steps:")
    write(f"  openelm-mlx plot {run}")
    if len(checkpoint_folders(resolved(result.folder))) > 1:
        write(f"  openelm-mlx average {run} --output {quote(f'{result.folder}-average')}")
