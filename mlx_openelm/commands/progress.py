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
from .interrupts import INTERRUPTED, acknowledging
from .streams import clean, console, is_terminal
from .terminal import byte_bar, fail, mib, rate, say

if TYPE_CHECKING:
    from ..training.loop import Metrics


class TrainingView(TrainingCallback):
    """Progress on stderr: on a terminal bars with the time left, otherwise one line per logged step."""

    unit = "tokens"  # what the speed counts

    def __init__(self) -> None:
        self._open = ExitStack()
        self._bar: Any = None
        self._steps = 0
        self._has_validated = False

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
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = self._open.enter_context(Progress(*columns, console=console(stderr=True)))
        self._task = self._bar.add_task("training", total=num_steps)
        self._validation = self._bar.add_task("validating", total=None, visible=False)

    def on_begin(self, step: int) -> None:
        """Move the bar to the step where a resumed run continues; the time left is that of the steps to come."""
        if self._bar is not None:
            self._bar.reset(self._task, total=self._steps, completed=step)

    def on_validating(self, done_batches: int, total_batches: int) -> None:
        """Show a bar of its own while a validation runs; without a terminal, announce the first one."""
        if self._bar is not None:
            begins, ends = done_batches == 0, done_batches == total_batches
            if begins:
                self._bar.reset(self._validation, total=total_batches)
            self._bar.update(self._validation, completed=done_batches, total=total_batches, visible=not ends)
        elif not self._has_validated:
            say(f"validating: {total_batches:,} {'batch' if total_batches == 1 else 'batches'}")
        self._has_validated = True

    def on_testing(self, done_batches: int, total_batches: int) -> None:
        """Show the progress of the test in the bar of validations."""
        if self._bar is not None:
            self._bar.update(self._validation, description="testing")
        self.on_validating(done_batches, total_batches)

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
        self._bar.console.print(line)
        if metrics.sample:
            self._bar.console.print(clean(metrics.sample), style="dim")

    def on_message(self, message: str) -> None:
        """Print a message."""
        say(message)


@contextmanager
def resumable(output: Path) -> Iterator[None]:
    """On Ctrl-C, say at once that the run stops, later whether it can be resumed, and exit."""
    try:
        with acknowledging("stopping once the computation in progress is done"):
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
        parts.append(f"{rate(metrics.tokens_per_second)} {unit}/s, peak memory {mib(metrics.peak_memory_bytes)}")
    return ", ".join(parts)
