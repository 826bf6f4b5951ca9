"""The command line: flags to one library call to text."""

import os
import sys
import warnings
from typing import NoReturn

import click
import typer

from mlx_openelm.commands import convert, generate, inspect
from mlx_openelm.commands.terminal import INTERRUPTED, fail, say
from mlx_openelm.errors import OpenELMError

app = typer.Typer(
    name="openelm-mlx",
    help="Apple's OpenELM language models with MLX: convert, generate, chat.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("chat", epilog=generate.CHAT_EXAMPLES)(generate.chat)
app.command("info", epilog=inspect.EXAMPLES)(inspect.info)
app.command("doctor")(inspect.doctor)


def main() -> NoReturn:
    """Run the command line: a user's mistake is one line on stderr and status 2."""
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    try:
        status = typer.main.get_command(app)(standalone_mode=False)
        sys.stdout.flush()
    except OpenELMError as error:
        fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.ctx.get_help())
        status = 2
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else app.info.name
        fail(f"{error.format_message()} (`{command} --help` shows what can be given)")
    except click.ClickException as error:
        fail(error.format_message())
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
