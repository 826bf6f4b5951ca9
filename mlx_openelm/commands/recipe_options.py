"""Options made from the fields of a recipe, where their names, defaults, choices and help are written."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..files.names import resolved
from ..files.yaml_file import parse_yaml
from ..training.recipe import Recipe
from ..training.setting import setting_of
from ..training.tune_recipe import TuneRecipe
from .options import MODEL_VARIABLE
from .terminal import say

if TYPE_CHECKING:
    import mlx.core as mx

    from ..evaluation.task_metric import TaskMetric

RunToResume = Annotated[Path | None, typer.Argument(help="Run folder to continue, with --resume.", metavar="RUN")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue RUN from its last checkpoint, with its settings."),
]

_SHORT = {"model": "-m", "adapter": "-a", "data": "-d", "batch_size": "-b"}
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
_GROUPS = ("Model and data", "Method", "Examples", "Optimizer", "Validation and checkpoints", "Compute")


def recipe_options(recipe: type[Recipe]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command one option for each field of a recipe.

    The command's last parameter, `given`, receives the fields that were given on the command line.
    """
    entries = sorted(fields(recipe), key=lambda entry: _GROUPS.index(setting_of(entry).group))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_options(context: typer.Context, **values: Any) -> None:
            given = {entry.name: _value(entry, values.pop(entry.name)) for entry in entries}
            sources = {name: context.get_parameter_source(name) for name in given}
            named = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
            command(**values, given={name: value for name, value in given.items() if name in named})

        parameters = [
            inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
            *list(inspect.signature(command, eval_str=True).parameters.values())[:-1],
            *map(_parameter, entries),
        ]
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate


def run_folder(run: Path | None, output: Path | None, resume: bool) -> Path:
    """The folder of a run: `--output RUN` for a new one, `--resume RUN` to continue one.

    Raises:
        ConfigError: if none is given, or two.
    """
    if run is not None and not resume:
        raise ConfigError(
            f"unexpected argument {run}; use --output {run} for a new run, or --resume {run} to continue one"
        )
    if run is not None and output is not None and resolved(run) != resolved(output):
        raise ConfigError(f"--resume {run} writes to {run}; leave out --output {output}")
    if (folder := run or output) is None:
        raise ConfigError(
            "which run? use --resume RUN" if resume else "give the folder to write with --output, such as --output run"
        )
    return folder


def tune_recipe(config: str | None, given: dict[str, Any], resumed: Path | None = None) -> TuneRecipe:
    """The recipe of a file, or of a run to resume, with the fields given on the command line.

    For a new run, the environment may name the model.
    """
    if resumed is not None and config is None:
        return TuneRecipe.of_run(resumed, given)
    recipe = TuneRecipe.from_file(config, given) if config else TuneRecipe.from_dict(given)
    named = os.environ.get(MODEL_VARIABLE)
    return replace(recipe, model=named) if named and recipe.model == TuneRecipe.model else recipe


def task_metric(recipe: Recipe, group: mx.distributed.Group) -> TaskMetric | None:
    """The metric of a recipe that names tasks to evaluate; reads their data, before a model is loaded.

    Args:
        group: processes of the run, which fail together.
    Raises:
        OpenELMError: a subclass, if a task is unknown, or its data are missing or do not fit.
    """
    if not recipe.evaluate:
        return None
    from ..evaluation.task_metric import TaskMetric
    from ..training.checkpoints import together

    data, limit = recipe.evaluate_data or None, recipe.evaluate_limit or None
    return together(group, lambda: TaskMetric(recipe.evaluate, data=data, limit=limit))


def describe_metric(metric: TaskMetric | None, recipe: Recipe) -> None:
    """Say what will be evaluated, if there is anything, and when."""
    if metric is not None:
        when = f"every {recipe.evaluate_every:,} steps" if recipe.evaluate_every else "with each validation"
        say(f"evaluates {metric.num_items:,} items of {metric.name} {when}; the best checkpoint is the most accurate")


def _parameter(entry: Field[Any]) -> inspect.Parameter:
    setting, kind, default = setting_of(entry), _kind(entry), option_default(entry)
    flag = f"--{entry.name.replace('_', '-')}"
    names = [f"{flag}/--no-{entry.name.replace('_', '-')}"] if kind is bool else [flag]
    names += [_SHORT[entry.name]] if entry.name in _SHORT else []
    help = setting.help
    if setting.choices and not all(choice in help for choice in setting.choices):
        help = f"{help.removesuffix('.')}: {', '.join(setting.choices[:-1])} or {setting.choices[-1]}."
    option = typer.Option(
        *names,
        help=help,
        metavar=None if kind is bool else {int: "N", float: "X"}.get(kind, "TEXT"),
        rich_help_panel=setting.group,
        envvar=MODEL_VARIABLE if entry.name == "model" and default else None,
    )
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def option_default(entry: Field[Any]) -> Any:
    """The default of a field as its option has it; None if there is nothing to show."""
    if entry.default is MISSING or entry.default in ("", ()):
        return None
    return ",".join(entry.default) if isinstance(entry.default, tuple) else entry.default


def _kind(entry: Field[Any]) -> type:
    """The type in which an option is read; text, for what has a notation of its own."""
    return type(entry.default) if isinstance(entry.default, bool | int | float) else str


def _value(entry: Field[Any], value: Any) -> Any:
    """The value of an option; lists and tables may be written as in YAML, and some texts with escapes."""
    if setting_of(entry).escapes and isinstance(value, str):
        return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], value)
    if not isinstance(entry.default, str) and isinstance(value, str) and value.startswith(("[", "{")):
        return parse_yaml(value, f"the value of {entry.name}", ConfigError)
    return value
