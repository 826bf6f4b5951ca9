"""`openelm-mlx models`: the models on this machine, and removing them."""

import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, SourceError
from .options import Json, examples
from .streams import is_terminal
from .terminal import ask, mib, print_json, say, write

if TYPE_CHECKING:
    from ..conversion.local_models import LocalModel

EXAMPLES = examples(
    "openelm-mlx models",
    "openelm-mlx models --folder ~/models --json",
    "openelm-mlx models remove apple/OpenELM-270M OpenELM-270M-4bit",
)


def models(
    action: Annotated[
        str, typer.Argument(help="list, or remove, which asks before it removes models.", metavar="ACTION")
    ] = "list",
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Models to remove, by the names in the list.", metavar="NAME..."),
    ] = None,
    folder: Annotated[
        str, typer.Option("--folder", help="Folder that holds models, adapters and runs.", metavar="DIR")
    ] = ".",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    as_json: Json = False,
) -> None:
    """List the models on this machine, or remove some.

    Listed are the built-in models, those in the Hugging Face cache, and the models, adapters and training runs in a
    folder.
    """
    from ..conversion.local_models import local_models

    if action not in ("list", "remove"):
        raise ConfigError(
            f"unknown action {action!r} (choose from list, remove); to list the models in a folder: "
            f"openelm-mlx models --folder {quote(action)}"
        )
    if (action == "remove") != bool(names):
        raise ConfigError(
            "which models? give their names, as `openelm-mlx models` lists them"
            if action == "remove"
            else f"unexpected argument {(names or [''])[0]!r}; give a folder with --folder"
        )
    found = local_models(folder)
    if names:
        _remove([_named(name, found) for name in dict.fromkeys(names)], yes)
    elif as_json:
        print_json([model.to_dict() for model in found])
    else:
        _print(found, folder)


def _named(name: str, found: Sequence["LocalModel"]) -> "LocalModel":
    plain = name.rstrip("/").removeprefix("./")
    # A folder goes before a built-in model of its name, as in --model.
    model = next((model for model in reversed(found) if plain in (model.name, str(model.folder))), None)
    if model is None:
        raise SourceError(f"{name} is not a model on this machine; `openelm-mlx models` lists them")
    return model


def _remove(chosen: Sequence["LocalModel"], yes: bool) -> None:
    from ..conversion.local_models import BUILT_IN, remove_model

    for model in chosen:
        if model.place == BUILT_IN:
            remove_model(model)  # refuses, before anything is removed
    if not yes:
        if not is_terminal(sys.stdin):
            raise ConfigError(
                "stdin is not a terminal, so nobody can be asked first; use --yes to remove without asking"
            )
        what = [f"{model.name}: {mib(model.nbytes)} in the {model.place}: {model.folder}" for model in chosen]
        if not ask(f"Remove {'it' if len(chosen) == 1 else f'these {len(chosen)} models'}?", what):
            say("nothing was removed")
            raise typer.Exit(1)
    for model in chosen:
        remove_model(model)
        write(f"{model.name}: removed, {mib(model.nbytes)} freed")


def _print(found: Sequence["LocalModel"], folder: str) -> None:
    from ..conversion.local_models import BUILT_IN, CACHE, FOLDER

    where = "in this folder" if folder == "." else f"in {folder}"
    width = shutil.get_terminal_size().columns
    rows = [(model, _cells(model)) for model in found]
    widths = [max((len(cells[column]) for _, cells in rows), default=0) for column in range(4)]
    names = max((len(model.name) for model in found), default=0)
    aligned = names + sum(widths) + 2 * 5 <= width
    for place, heading in ((BUILT_IN, BUILT_IN), (CACHE, "in the Hugging Face cache"), (FOLDER, where)):
        write(f"{heading}:")
        inside = [row for row in rows if row[0].place == place]
        for model, cells in inside:
            if aligned:
                padded = (cell.rjust(size) for cell, size in zip(cells, widths, strict=True))
                write("  ".join(("", model.name.ljust(names), *padded)))
            else:
                write(f"  {model.name}")
                _wrapped(cells, width)
        if not inside:
            write("  none")


def _cells(model: "LocalModel") -> tuple[str, str, str, str]:
    """Parameters, type, size and last use of a model."""
    count = model.parameters
    if count is None:
        size = ""
    else:
        millions = count / 1e6
        size = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{millions:,.0f}M" if count >= 1e7 else f"{millions:.1f}M"
    return size, model.storage, mib(model.nbytes), _used(model.last_used)


def _wrapped(cells: Iterable[str], width: int) -> None:
    line = ""
    for cell in filter(None, cells):
        if line and len(line) + len(cell) + 6 > width:
            write(f"    {line},")
            line = ""
        line = f"{line}, {cell}" if line else cell
    write(f"    {line}")


def _used(time: datetime | None, now: datetime | None = None) -> str:
    """When a model was last used, in days."""
    if time is None:
        return "never used"
    days = ((now or datetime.now()).date() - time.date()).days
    if days > 30:
        return f"used {time:%Y-%m-%d}"
    return "used today" if days <= 0 else "used yesterday" if days == 1 else f"used {days} days ago"
