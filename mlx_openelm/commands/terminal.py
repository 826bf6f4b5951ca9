"""What commands say, and where: results on stdout, everything else on stderr."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

INTERRUPTED = 130  # the exit status after Ctrl-C

_as_flags: Callable[[str], str] = str  # what a message of the library says in the words of the command line


def speak_flags(translate: Callable[[str], str]) -> None:
    """Have messages pass through a function that names flags for parameters."""
    global _as_flags
    _as_flags = translate


def fail(message: str, status: int = 2) -> NoReturn:
    """One line on stderr, and the end."""
    say(f"error: {message}")
    sys.exit(status)


def say(message: str) -> None:
    """One line on stderr."""
    typer.echo(f"openelm-mlx: {' '.join(_as_flags(message).split())}", err=True)


def print_json(values: Any) -> None:
    """Values on stdout as JSON, for other programs."""
    typer.echo(json.dumps(values, indent=2, ensure_ascii=False, default=str))


def mib(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**20:,.1f} MiB"


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with bytes and time left, moved by calling (done, total); silent where nobody looks."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
