"""Output of commands: results on stdout, everything else on stderr."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from .streams import clean, console, is_terminal, lose, read_stdin, styled
from .verbosity import is_quiet, is_verbose

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
    """Print one line on stderr; with --quiet, only warnings and errors."""
    if is_quiet() and not message.startswith(("error: ", "warning: ")):
        return
    _to_stderr(clean(f"openelm-mlx: {' '.join(_as_flags(message).split())}"))


def write(text: str, end: str = "\n") -> None:
    """Print text on stdout at once: cleaned on a terminal, as it is elsewhere."""
    sys.stdout.write((clean(text) if is_terminal(sys.stdout) else text) + end)
    sys.stdout.flush()


def write_styled(text: str, *styles: str) -> None:
    """Print text on stdout in a style, without a new line."""
    sys.stdout.write(styled(text, *styles, stream=sys.stdout))
    sys.stdout.flush()


def ask(question: str, about: Iterable[str] = ()) -> bool:
    """Ask for a yes on stderr, after lines about what; anything but y or yes is a no."""
    for line in about:
        _to_stderr(clean(line))
    _to_stderr(f"{question} [y/N] ", end="")
    return read_stdin(whole=False).decode(errors="replace").strip().lower() in ("y", "yes")


def show_traceback() -> None:
    """With --verbose, print where the error that is being handled comes from."""
    if is_verbose():
        import traceback

        _to_stderr(clean(traceback.format_exc().rstrip("\n")))


def write_error(text: str, end: str = "\n") -> None:
    """Print lines on stderr that are clean already, unless --quiet was given."""
    if not is_quiet():
        _to_stderr(text, end)


def _to_stderr(text: str, end: str = "\n") -> None:
    """Write on stderr; where that cannot be, the text is lost."""
    try:
        sys.stderr.write(text + end)
        sys.stderr.flush()
    except (OSError, ValueError):
        lose(2)


def print_json(values: Any) -> None:
    """Print values on stdout as JSON."""
    write(json.dumps(values, indent=2, ensure_ascii=False, default=str))


def mib(nbytes: float) -> str:
    """A size in bytes, formatted as MiB."""
    return f"{nbytes / 2**20:,.1f} MiB"


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr in bytes, updated by calling (done, total); no bar when stderr is not a terminal."""
    if not is_terminal(sys.stderr):
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
