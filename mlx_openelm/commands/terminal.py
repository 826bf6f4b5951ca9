"""Output of commands: results on stdout, everything else on stderr."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from .streams import clean, console, is_terminal, lose, read_stdin, styled
from .verbosity import is_quiet, is_verbose

_BYTE_COLUMNS = 45  # characters beside the label of a bar: its own, "999.9/999.9 MiB", "999.9 MB/s", "0:00:00"
_as_flags: Callable[[str], str] = str  # rewrites library messages to name flags instead of parameters
_held: list[str] | None = None  # messages that wait for the end of a text
_line_is_open = False  # whether the last line that a terminal got from `write` has no end yet


def speak_flags(translate: Callable[[str], str]) -> None:
    """Set the function that rewrites parameter names in messages to flags."""
    global _as_flags
    _as_flags = translate


def with_flags(message: str) -> str:
    """A message of the library with flags in place of parameters."""
    return _as_flags(message)


def fail(message: str, status: int = 2) -> NoReturn:
    """Print one line on stderr and exit."""
    say(f"error: {message}")
    sys.exit(status)


def say(message: str) -> None:
    """Print one line on stderr, after the text within `messages_after_text`; with --quiet, only warnings and errors."""
    if is_quiet() and not message.startswith(("error: ", "warning: ")):
        return
    line = clean(f"openelm-mlx: {' '.join(_as_flags(message).split())}")
    if _held is None:
        _to_stderr(line)
    else:
        _held.append(line)


@contextmanager
def messages_after_text() -> Iterator[None]:
    """On a terminal, hold messages back until this context ends, so that they run into no text and no status line."""
    global _held
    if _held is not None or not is_terminal(sys.stderr):
        yield
        return
    _held = []
    try:
        yield
    finally:
        lines, _held = _held, None
        for line in lines:
            _to_stderr(line)


def write(text: str, end: str = "\n") -> None:
    """Print text on stdout at once: cleaned on a terminal, as it is elsewhere."""
    _put((clean(text) if is_terminal(sys.stdout) else text) + end)


def write_styled(text: str, *styles: str) -> None:
    """Print text on stdout in a style, without a new line."""
    if text:
        _put(styled(text, *styles, stream=sys.stdout), ends_line=text.endswith("\n"))


def _put(text: str, ends_line: bool | None = None) -> None:
    global _line_is_open
    sys.stdout.write(text)
    sys.stdout.flush()
    if text:
        _line_is_open = is_terminal(sys.stdout) and not (text.endswith("\n") if ends_line is None else ends_line)


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


def write_error(text: str, end: str = "\n", is_asked: bool = False) -> None:
    """Print lines on stderr that are clean already; with --quiet, only what the user asked for."""
    if is_asked or not is_quiet():
        _to_stderr(text, end)


def _to_stderr(text: str, end: str = "\n") -> None:
    """Write on stderr; where that cannot be, the text is lost.

    If stdout is on a terminal too and its last line has no end yet, the text begins a new line.
    """
    global _line_is_open
    try:
        if _line_is_open and is_terminal(sys.stderr):
            sys.stderr.write("\n")
        _line_is_open = False
        sys.stderr.write(text + end)
        sys.stderr.flush()
    except (OSError, ValueError):
        lose(2)


def print_json(values: Any) -> None:
    """Print values on stdout as JSON."""
    write(json.dumps(values, indent=2, ensure_ascii=False, default=str))


def rate(per_second: float) -> str:
    """A speed as text: with a decimal where a whole number would say little."""
    return (
        f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:,.1f}" if per_second >= 1 else f"{per_second:.2f}"
    )


def mib(nbytes: float) -> str:
    """A size in bytes, formatted as MiB."""
    return f"{nbytes / 2**20:,.1f} MiB"


def counting_bars(**options: Any) -> Any:
    """A display of Rich on stderr for bars that count; where it is narrow, they give way to the numbers."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(None, table_column=Column(ratio=1)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    )
    return Progress(*columns, console=console(stderr=True), expand=True, **options)


@contextmanager
def step_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr that counts, updated by calling (done, total); no bar when stderr is not a terminal."""
    if not is_terminal(sys.stderr):
        yield lambda done, total: None
        return
    with counting_bars(transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr in bytes, updated by calling (done, total); no bar when stderr is not a terminal."""
    if not is_terminal(sys.stderr):
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Column

    def whole() -> Column:  # not wrapped: the bar gives way, and the speed in a narrow terminal
        return Column(no_wrap=True)

    shown = console(stderr=True)
    columns = [
        TextColumn(what, table_column=whole()),
        BarColumn(None, table_column=Column(ratio=1)),
        DownloadColumn(True, table_column=whole()),
        TransferSpeedColumn(table_column=whole()),
        TimeRemainingColumn(table_column=whole()),
    ]
    if shown.width < len(what) + _BYTE_COLUMNS:
        del columns[3]
    with Progress(*columns, console=shown, transient=True, expand=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
