"""What `generate` and `chat` show: what takes long, text as it comes, and statistics."""

from __future__ import annotations

import shutil
import sys
import textwrap
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.paths import exists, user_path
from ..generation.text import Stats
from ..hub import BUILT_IN_MODELS
from .streams import clean, console, is_terminal, styled
from .terminal import messages_after_text, mib, write, write_error, write_styled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PATIENCE = 0.5  # seconds of a silent terminal
_LONGEST_ECHO = 400  # characters
_MOST_LINES = 6


class TextView:
    """Text on stdout as it comes. On a terminal, stderr first shows how much of a long prompt is read.

    Messages that would run into the text come after it.

    Args:
        before: what the text continues, printed in front of it.
        shown: whether to print text; otherwise there is only the progress.
    """

    def __init__(self, before: str = "", *, shown: bool = True):
        self.on_prefill = PrefillProgress()
        self._before = before
        self._shown = shown
        self._begun = self._wrote = False
        self._open = ExitStack()

    def __enter__(self) -> TextView:
        self._open.enter_context(messages_after_text())
        if not is_terminal(sys.stderr):  # no progress comes first
            self._begin()
        return self

    def add(self, text: str) -> None:
        """Print a piece of text."""
        self._begin()
        if self._shown:
            write(text, end="")
            self._wrote = True

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._open:
            self.on_prefill.close()
            if self._shown and (self._wrote or kind is None):
                write("")

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        self.on_prefill.close()
        if self._shown and self._before:
            write_styled(self._before, "dim")
            self._wrote = True


class StatusLine:
    """A line on stderr that says what takes so long; it appears on a terminal that was silent for a while.

    Attributes:
        text: what it says.
    """

    def __init__(self, text: str):
        self._lock = threading.Lock()
        self._closed = False
        self._text = text
        self._line: Any = None  # on the screen
        self._spinner: Any = None  # within it
        self._timer: threading.Timer | None = None
        if is_terminal(sys.stderr):
            self._timer = threading.Timer(_PATIENCE, self.show)
            self._timer.daemon = True
            self._timer.start()

    @property
    def text(self) -> str:
        """What it says."""
        return self._text

    @text.setter
    def text(self, text: str) -> None:
        with self._lock:
            self._text = text
            if self._spinner is not None:
                self._spinner.update(text=text)

    def show(self) -> None:
        """Show the line, unless it was closed."""
        from rich.live import Live
        from rich.spinner import Spinner

        with self._lock:
            if not self._closed:
                self._spinner = Spinner("dots", self._text)
                self._line = Live(
                    self._spinner,
                    console=console(stderr=True),
                    transient=True,
                    refresh_per_second=8,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self._line.start(refresh=True)

    def close(self) -> None:
        """Remove the line."""
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._line is not None:
                self._line.stop()
                self._line = None


class PrefillProgress(StatusLine):
    """Says how much of a prompt is read; called with the number of prompt tokens done and their total."""

    def __init__(self) -> None:
        super().__init__("reading the prompt")

    def __call__(self, done: int, total: int) -> None:
        """Update the line."""
        self.text = f"reading the prompt: {done:,} of {total:,} tokens"


@contextmanager
def loading(*names: str | None) -> Iterator[None]:
    """Say so if it takes long to load these models, tokenizers or adapters.

    Where one may have to be downloaded there is no line: a download shows its own progress.
    """
    given = [name for name in names if name is not None]
    if not all(name in BUILT_IN_MODELS or exists(user_path(name)) for name in given):
        yield
        return
    line = StatusLine(f"loading {clean(Path(given[0]).resolve().name)}")
    with messages_after_text():
        try:
            yield
        finally:
            line.close()


def prompt_end(text: str) -> str:
    """A prompt to print before its continuation: a short one as it is, of a long one the end."""
    end = "\n".join(text[-_LONGEST_ECHO:].split("\n")[-_MOST_LINES:])
    if end == text:
        return text
    words = end.split(maxsplit=1)
    is_cut = not (text[: -len(end)][-1:].isspace() or end[0].isspace())  # within a word
    return "… " + (words[1] if is_cut and len(words) > 1 else end.lstrip())


def print_stats(stats: Stats | None, repeat_seed: int | None = None) -> None:
    """Print statistics of a generation when stderr is a terminal.

    Args:
        repeat_seed: the seed that would give the same text again, if the user does not know it.
    """
    if stats is None or not is_terminal(sys.stderr):
        return
    repeat = f"; repeat with --seed {repeat_seed}" if repeat_seed is not None else ""
    lines = textwrap.wrap(stats_line(stats) + repeat, shutil.get_terminal_size().columns)
    write_error(styled("\n".join(lines), "dim", stream=sys.stderr))


def stats_line(stats: Stats) -> str:
    """Statistics of a generation in a line."""
    reused = f" after {stats.reused_tokens:,} cached" if stats.reused_tokens else ""
    drafted = (
        f" ({stats.acceptance:.0%} of {stats.drafted_tokens:,} draft tokens accepted)" if stats.drafted_tokens else ""
    )
    return (
        f"{stats.prompt_tokens - stats.reused_tokens:,} prompt tokens{_rate(stats.prefill_tokens_per_second)}{reused}, "
        f"{stats.generated_tokens:,} generated{_rate(stats.decode_tokens_per_second)}{drafted}, "
        f"peak memory {mib(stats.peak_memory_bytes)}"
    )


def _rate(per_second: float) -> str:
    return f" at {per_second:,.1f}/s" if per_second else ""


@contextmanager
def answer_bar(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; call the result with the number of tokens of each finished answer."""
    if not is_terminal(sys.stderr):
        yield lambda num_tokens: None
        return
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("answers"),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
    )
    started = time.perf_counter()
    tokens = 0
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=done)

        def moved(num_tokens: int) -> None:
            nonlocal tokens
            tokens += num_tokens
            rate = tokens / (time.perf_counter() - started)
            progress.update(task, advance=1, description=f"{rate:,.1f} tokens/s")

        yield moved
