"""The commands, and what becomes of their errors: flags to one library call to text."""

import errno
import re
import sys
import warnings
from functools import cache, partial
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core

from ..errors import OpenELMError
from ..machine.blas import load_fast_blas
from ..version import __version__
from .interrupts import is_interrupt
from .streams import StdoutError, finish_streams, lose, no_styles, prepare_streams
from .terminal import fail, say, show_traceback, speak_flags, write
from .usage import unknown_command, usage_message
from .verbosity import Quiet, Verbose, reset_verbosity, set_verbosity, with_verbosity

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
    "evaluate": ("evaluate", "evaluate", "EXAMPLES"),
    "plot": ("pretrain", "plot", "PLOT_EXAMPLES"),
    "info": ("inspect", "info", "EXAMPLES"),
    "models": ("models", "models", "EXAMPLES"),
    "doctor": ("inspect", "doctor", "DOCTOR_EXAMPLES"),
    "completion": ("completion", "completion", "EXAMPLES"),
}
# Commands without matrix products, or without any computing: they do not look for a fast library.
_WITHOUT_PRODUCTS = {None, "convert", "average", "design", "plot", "info", "models", "completion"}
_SETTINGS = {"help_option_names": ["-h", "--help"]}
_MARKUP: dict[str, Any] = {"rich_markup_mode": None} if no_styles() else {}  # without Rich, help has no styles


class _Commands(typer.core.TyperGroup):
    """Commands by name, each imported when it is asked for: a command does not wait for the others' modules."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _command(cmd_name) if cmd_name in _COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in _COMMANDS and not args[0].startswith("-"):
            raise _UsageError(unknown_command(args[0], _COMMANDS), ctx)
        return super().resolve_command(ctx, args)


@cache
def _command(name: str) -> Any:
    module_name, function, examples = _COMMANDS[name]
    missing: ImportError | None = None
    try:
        module = import_module(f"mlx_openelm.commands.{module_name}")
    except ImportError as error:
        from ..packages import missing_package
        from .stand_ins import stand_ins

        if is_interrupt(error) or missing_package(error) is None:
            raise
        missing = error  # there is still help to show
        with stand_ins():
            module = import_module(f"mlx_openelm.commands.{module_name}")
    alone = typer.Typer(add_completion=False, **_MARKUP)
    alone.command(name, epilog=getattr(module, examples) if examples else None, context_settings=_SETTINGS)(
        with_verbosity(getattr(module, function), say)
    )
    command = _without_types(typer.main.get_command(alone))
    if missing is not None:
        command.callback = partial(_refuse, missing)
    return command


def _without_types(command: Any) -> Any:
    """The command, whose help says nothing of the types of arguments, and of options that take no value."""
    help_option = command.get_help_option

    def plain(parameter: Any) -> Any:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        elif parameter is not None and parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None
        return parameter

    for parameter in command.params:
        plain(parameter)
    command.get_help_option = lambda ctx: plain(help_option(ctx))
    return command


def _refuse(missing: ImportError, **options: Any) -> None:
    raise missing


app = typer.Typer(
    name="openelm-mlx",
    cls=_Commands,
    help="Apple's OpenELM language models with MLX: convert, generate, chat, train.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings=_SETTINGS,
    **_MARKUP,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        write(f"openelm-mlx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    set_verbosity(verbose, quiet)


def all_commands() -> dict[str, Any]:
    """Every command by name."""
    return {name: _command(name) for name in _COMMANDS}


def _named(arguments: list[str]) -> str | None:
    """The command among these arguments; `None` if none is there, as with --help alone."""
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    return first if first in _COMMANDS else None


_PARAMETER = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")


@cache
def _options_of_commands() -> dict[str, list[str]]:
    """Spellings of every option by the name of its parameter; an argument has none."""
    return {
        parameter.name: [*parameter.opts, *parameter.secondary_opts]
        for command in all_commands().values()
        for parameter in command.params
        if parameter.opts[0].startswith("-")
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


def run(arguments: list[str]) -> int:
    """Run the command line with these arguments; a user's mistake is one line on stderr.

    Returns:
        The exit status: 0, 2 for a mistake, 130 after Ctrl-C, 1 if the reader of stdout has gone or a self-test failed.
    """
    try:
        return _run(arguments)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    finally:
        finish_streams()


def _run(arguments: list[str]) -> int:
    prepare_streams()
    reset_verbosity()
    speak_flags(as_flags)
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    try:
        status = _status(arguments)
        sys.stdout.flush()
        return status
    except OpenELMError as error:
        show_traceback()
        fail(str(error))
    except _UsageError as error:
        command = " ".join(filter(None, ("openelm-mlx", _named(arguments))))
        fail(f"{usage_message(error, arguments, all_commands)} (see `{command} --help`)")
    except _ClickError as error:
        fail(error.format_message())
    except ImportError as error:
        from ..packages import missing_package

        if is_interrupt(error) or (message := missing_package(error)) is None:
            raise
        show_traceback()
        fail(message)
    except MemoryError:
        fail("not enough memory")
    except OSError as error:
        if not isinstance(error, StdoutError):
            show_traceback()
            fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
        lose(1)
        if error.errno == errno.EPIPE:  # the reader of our output has gone
            return 1
        fail(f"stdout cannot be written: {error.strerror or error}")


def _status(arguments: list[str]) -> int:
    if _named(arguments) not in _WITHOUT_PRODUCTS:
        load_fast_blas()
    if arguments[:1] == ["help"]:  # as in `openelm-mlx help tune`
        arguments = [*arguments[1:2], "--help"]
    group = _without_types(typer.main.get_command(app))
    try:
        with group.make_context("openelm-mlx", list(arguments) or ["--help"]) as context:
            group.invoke(context)
    except typer.Exit as done:
        return done.exit_code if arguments else 2
    return 0
