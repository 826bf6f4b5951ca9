"""The command line: flags to one library call to text."""

import os
import re
import sys
import warnings
from functools import cache
from typing import Annotated, Any, NoReturn

import typer

from mlx_openelm.commands import bench, chat, convert, design, generate, inspect, merge, pretrain, tune
from mlx_openelm.commands.terminal import INTERRUPTED, fail, say, speak_flags
from mlx_openelm.errors import OpenELMError
from mlx_openelm.version import __version__

# Typer brings its own copy of Click or uses the installed one, as its version goes; these are those of either.
_UsageError: type[Any]
_ClickError: type[Any]
_UsageError, _ClickError = typer.BadParameter.__mro__[1:3]

app = typer.Typer(
    name="openelm-mlx",
    help="Apple's OpenELM language models with MLX: convert, generate, chat, train.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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


app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("average", epilog=convert.AVERAGE_EXAMPLES)(convert.average)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("chat", epilog=chat.EXAMPLES)(chat.chat)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("design", epilog=design.EXAMPLES)(design.design_command)
app.command(
    "pretrain",
    epilog=pretrain.EXAMPLES,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(pretrain.pretrain)
app.command("tune", epilog=tune.EXAMPLES)(tune.tune)
app.command("merge", epilog=merge.EXAMPLES)(merge.merge)
app.command("plot", epilog=pretrain.PLOT_EXAMPLES)(pretrain.plot)
app.command("info", epilog=inspect.EXAMPLES)(inspect.info)
app.command("doctor")(inspect.doctor)


_PARAMETER = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")


@cache
def _options_of_commands() -> dict[str, list[str]]:
    """Spellings of every option by the name of its parameter."""
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    return {parameter.name: parameter.opts for command in commands for parameter in command.params}


def as_flags(message: str) -> str:
    """A message of the library, which names parameters (`force`, `dtype=bfloat16`), with flags for them.

    A name that is no parameter of any command stays as it is.
    """

    def flag(match: re.Match[str]) -> str:
        found = [option for option in _options_of_commands().get(match[1], ()) if option.startswith("--")]
        return " ".join(filter(None, (found[0], match[2]))) if found else match[0]

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
        fail(f"{error.format_message()} (`{command} --help` shows what can be given)")
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
