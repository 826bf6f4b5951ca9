"""Output of commands: results on stdout, everything else on stderr."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

INTERRUPTED = 130  # the exit status after Ctrl-C

_as_flags: Callable[[str], str] = str  # rewrites library messages to name flags instead of parameters


def speak_flags(translate: Callable[[str], str]) -> None:
    """Set the function that rewrites parameter names in messages to flags."""
    global _as_flags
    _as_flags = translate


def fail(message: str, status: int = 2) -> NoReturn:
    """Print one line on stderr and exit."""
    say(f"error: {message}")
    sys.exit(status)


def say(message: str) -> None:
    """Print one line on stderr."""
    typer.echo(f"openelm-mlx: {' '.join(_as_flags(message).split())}", err=True)


def print_json(values: Any) -> None:
    """Print values on stdout as JSON."""
    typer.echo(json.dumps(values, indent=2, ensure_ascii=False, default=str))


def mib(nbytes: float) -> str:
    """A size in bytes, formatted as MiB."""
    return f"{nbytes / 2**20:,.1f} MiB"


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr in bytes, updated by calling (done, total); no bar when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
