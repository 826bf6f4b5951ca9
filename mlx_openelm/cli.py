"""The command line: flags to one library call to text."""

import os
import re
import sys
import warnings
from functools import cache
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from mlx_openelm.commands.terminal import INTERRUPTED, fail, say, speak_flags
from mlx_openelm.errors import OpenELMError
from mlx_openelm.version import __version__

# Typer brings its own copy of Click or uses the installed one, as its version goes; these are those of either.
_UsageError: type[Any]
_ClickError: type[Any]
_UsageError, _ClickError = typer.BadParameter.__mro__[1:3]

_COMMANDS = {  # name: module in `commands`, function, and the constant with its examples
    "convert": ("convert", "convert", "EXAMPLES"),
    "average": ("convert", "average", "AVERAGE_EXAMPLES"),
    "generate": ("generate", "generate", "EXAMPLES"),
    "chat": ("chat", "chat", "EXAMPLES"),
    "bench": ("bench", "bench", "EXAMPLES"),
    "design": ("design", "design_command", "EXAMPLES"),
    "pretrain": ("pretrain", "pretrain", "EXAMPLES"),
    "tune": ("tune", "tune", "EXAMPLES"),
    "merge": ("merge", "merge", "EXAMPLES"),
    "plot": ("pretrain", "plot", "PLOT_EXAMPLES"),
    "info": ("inspect", "info", "EXAMPLES"),
    "doctor": ("inspect", "doctor", None),
}
_SETTINGS = {"help_option_names": ["-h", "--help"]}


class _Commands(typer.core.TyperGroup):
    """Commands by name, each imported when it is asked for: a command does not wait for the others' modules."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _command(cmd_name) if cmd_name in _COMMANDS else None


@cache
def _command(name: str) -> Any:
    module_name, function, examples = _COMMANDS[name]
    module = import_module(f"mlx_openelm.commands.{module_name}")
    alone = typer.Typer(add_completion=False)
    alone.command(name, epilog=getattr(module, examples) if examples else None, context_settings=_SETTINGS)(
        getattr(module, function)
    )
    return typer.main.get_command(alone)


app = typer.Typer(
    name="openelm-mlx",
    cls=_Commands,
    help="Apple's OpenELM language models with MLX: convert, generate, chat, train.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings=_SETTINGS,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"openelm-mlx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def all_commands() -> dict[str, Any]:
    """Every command by name."""
    return {name: _command(name) for name in _COMMANDS}


_PARAMETER = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")


@cache
def _options_of_commands() -> dict[str, list[str]]:
    """Spellings of every option by the name of its parameter."""
    return {
        parameter.name: [*parameter.opts, *parameter.secondary_opts]
        for command in all_commands().values()
        for parameter in command.params
    }


# Parameters of the library whose options have other names.
_ALIASES = {
    "window": "--max-kv-size",
    "sinks": "--kv-sinks",
    "bits": "--kv-bits",
    "quantize_after": "--quantized-kv-start",
    "max_draft": "--num-draft-tokens",
}


def as_flags(message: str) -> str:
    """A message of the library, which names parameters (`force`, `dtype=bfloat16`), with flags for them.

    A name that is no parameter of any command stays as it is. `name=False` becomes the flag that turns it off.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        spellings = [option for option in _options_of_commands().get(name, ()) if option.startswith("--")]
        if value == "False":
            return spellings[-1] if len(spellings) > 1 else match[0]
        found = _ALIASES.get(name) or (spellings[0] if spellings else None)
        return " ".join(filter(None, (found, value))) if found else match[0]

    return _PARAMETER.sub(flag, message)


def main() -> NoReturn:
    """Run the command line: a user's mistake is one line on stderr and status 2."""
    speak_flags(as_flags)
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    arguments = sys.argv[1:]
    try:
        status = typer.main.get_command(app)(arguments or ["--help"], standalone_mode=False)
        status = status if arguments else 2
        sys.stdout.flush()
    except OpenELMError as error:
        fail(str(error))
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else app.info.name
        fail(f"{error.format_message()} (see `{command} --help`)")
    except _ClickError as error:
        fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
