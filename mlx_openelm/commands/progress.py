"""Progress of a training run on stderr."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..files.names import resolved
from ..runs import checkpoint_folders, newest_state, step_of
from ..training.callback import TrainingCallback
from .interrupts import INTERRUPTED, acknowledging
from .streams import clean, is_terminal
from .tables import in_lines
from .terminal import byte_bar, counting_bars, fail, mib, print_json, rate, say, write

if TYPE_CHECKING:
    from ..training.callback import Metrics
    from ..training.run import TrainingResult

_SPEED_SECONDS = 600  # over which a step's time is averaged; a step may take minutes
_STOPPING = "stopping once the computation in progress is done; Ctrl-C again stops without saving"


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
        self._bar = self._open.enter_context(counting_bars(speed_estimate_period=_SPEED_SECONDS))
        self._task = self._bar.add_task("training", total=num_steps)
        self._validation = self._bar.add_task("validating", total=None, visible=False)

    def on_begin(self, step: int) -> None:
        """Move the bar to the step where a resumed run continues; the time left is that of the steps to come."""
        if step:
            say(f"continuing after step {step:,} of {self._steps:,}")
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
        self._bar.console.print(in_lines(line.split(", "), self._bar.console.width))
        if metrics.sample:
            self._bar.console.print(clean(metrics.sample), style="dim")

    def on_message(self, message: str) -> None:
        """Print a message."""
        say(message)


@contextmanager
def resumable(command: str, output: Path) -> Iterator[None]:
    """On Ctrl-C, say at once that the run stops, later how it can be continued, and exit."""
    try:
        with acknowledging(_STOPPING):
            yield
    except KeyboardInterrupt:
        saved = checkpoint_folders(resolved(output))
        fail(
            f"interrupted; step {step_of(saved[-1]):,} is saved in {output}; to continue: "
            f"openelm-mlx {command} --resume {quote(str(output))}"
            if saved
            else "interrupted before the first checkpoint; there is nothing to resume",
            INTERRUPTED,
        )


def result_json(result: TrainingResult) -> dict[str, Any]:
    """The result of a run, for JSON."""
    return {
        "folder": str(result.folder),
        "checkpoint": str(result.checkpoint),
        "step": result.step,
        "validation_loss": result.validation_loss,
        "last": result.metrics.to_dict() if result.metrics else None,
    }


def report_finished(command: str, result: TrainingResult, as_json: bool) -> None:
    """Say that the run that should be resumed has no step left, and how to extend it."""
    if as_json:
        print_json(result_json(result))
        return
    state = newest_state(resolved(result.folder))
    step, planned = state["step"], state.table("recipe").whole("steps")
    if step < planned and not result.stopped_early:  # interrupted, and resumed with fewer steps than it has taken
        write(f"{result.folder} is already at step {step:,} of {planned:,}")
        write(f"to continue: openelm-mlx {command} --resume {quote(str(result.folder))}")
        return
    how = "stopped early, because the validation loss stopped improving," if result.stopped_early else "is finished:"
    loss = "" if result.validation_loss is None else f"; best validation loss: {result.validation_loss:.4f}"
    write(f"{result.folder} {how} {step:,} steps{loss}")
    more = "--early-stop 0" if result.stopped_early else f"--steps {2 * step}"
    write(f"train it further: openelm-mlx {command} --resume {quote(str(result.folder))} {more}")


def perplexity(loss: float) -> str:
    """The perplexity of a loss in nats per token, with one decimal."""
    return f"{math.exp(min(loss, 99)):,.1f}"


def _text(metrics: Metrics, unit: str) -> str:
    parts = [] if metrics.loss is None else [f"loss {metrics.loss:.4f}"]
    if metrics.validation_loss is not None:
        of_text = "accuracy" not in (metrics.validation or {})
        more = f" (perplexity {perplexity(metrics.validation_loss)})" if of_text else ""
        parts.append(f"validation loss {metrics.validation_loss:.4f}{more}")
    if "accuracy" in metrics.more:
        parts.append(f"margin {metrics.more['margin']:+.4f}, accuracy {metrics.more['accuracy']:.0%}")
    if metrics.loss is not None:
        parts.append(f"{rate(metrics.tokens_per_second)} {unit}/s, peak memory {mib(metrics.peak_memory_bytes)}")
    return ", ".join(parts)
