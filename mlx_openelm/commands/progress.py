"""Progress of a training run on stderr."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.names import resolved
from ..training.checkpoints import checkpoint_folders
from ..training.run import TrainingCallback
from .interrupts import INTERRUPTED
from .streams import clean, console, is_terminal
from .tables import in_lines
from .terminal import byte_bar, fail, mib, say

if TYPE_CHECKING:
    from ..training.loop import Metrics


class TrainingView(TrainingCallback):
    """Progress on stderr: on a terminal a bar with the time left, otherwise one line per logged step."""

    unit = "tokens"

    def __init__(self) -> None:
        self._open = ExitStack()
        self._bar: Any = None
        self._steps = 0

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def on_tokenizing(self, done_bytes: int, total_bytes: int) -> None:
        """Show how much of the corpus is tokenized."""
        if self._bar is None:
            self._bar = self._open.enter_context(byte_bar("tokenizing"))
        self._bar(done_bytes, total_bytes)

    def on_prepared(self, num_steps: int) -> None:
        """Start the bar of training steps."""
        self._open.close()
        self._bar, self._steps = None, num_steps
        if not is_terminal(sys.stderr):
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = self._open.enter_context(Progress(*columns, console=console(stderr=True)))
        self._task = self._bar.add_task("", total=num_steps)

    def on_step(self, metrics: Metrics) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step)

    def on_metrics(self, metrics: Metrics) -> None:
        """Print metrics and a sample."""
        if self._bar is None:
            say(f"step {metrics.step:,} of {self._steps:,}: {_text(metrics, self.unit)}")
            if metrics.sample:
                say(f"sample: {metrics.sample}")
            return
        self.on_step(metrics)
        line = f"step {metrics.step:,}: {_text(metrics, self.unit)}"
        self._bar.console.print(in_lines(line.split(", "), self._bar.console.width))
        if metrics.sample:
            self._bar.console.print(clean(metrics.sample), style="dim")

    def on_message(self, message: str) -> None:
        """Print a message."""
        say(message)


@contextmanager
def resumable(output: Path) -> Iterator[None]:
    """On Ctrl-C, say whether the run can be resumed, and exit."""
    try:
        yield
    except KeyboardInterrupt:
        saved = checkpoint_folders(resolved(output))
        fail(
            f"interrupted; use --resume to continue {output}"
            if saved
            else "interrupted before the first checkpoint; there is nothing to resume",
            INTERRUPTED,
        )


def _text(metrics: Metrics, unit: str) -> str:
    parts = [] if metrics.loss is None else [f"loss {metrics.loss:.4f}"]
    if metrics.validation_loss is not None:
        of_text = "accuracy" not in (metrics.validation or {})
        perplexity = f" (perplexity {math.exp(min(metrics.validation_loss, 99)):,.1f})" if of_text else ""
        parts.append(f"validation loss {metrics.validation_loss:.4f}{perplexity}")
    if "accuracy" in metrics.more:
        parts.append(f"margin {metrics.more['margin']:+.4f}, accuracy {metrics.more['accuracy']:.0%}")
    if metrics.loss is not None:
        parts.append(f"{metrics.tokens_per_second:,.0f} {unit}/s, peak memory {mib(metrics.peak_memory_bytes)}")
    return ", ".join(parts)
