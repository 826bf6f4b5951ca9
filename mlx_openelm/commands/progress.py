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
        self._announced: set[str] = set()

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
        self._measuring("validating", done_batches, total_batches, "batch" if total_batches == 1 else "batches")

    def on_evaluating(self, done_items: int, total_items: int) -> None:
        """Show the progress of an evaluation in the bar of validations."""
        self._measuring("evaluating", done_items, total_items, "item" if total_items == 1 else "items")

    def on_testing(self, done_batches: int, total_batches: int) -> None:
        """Show the progress of the test in the bar of validations."""
        self._measuring("testing", done_batches, total_batches, "batch" if total_batches == 1 else "batches")

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

    def _measuring(self, what: str, done: int, total: int, unit: str) -> None:
        if self._bar is not None:
            if done == 0:
                self._bar.reset(self._validation, total=total)
            self._bar.update(self._validation, description=what, completed=done, total=total, visible=done < total)
        elif what not in self._announced:
            say(f"{what}: {total:,} {unit}")
        self._announced.add(what)


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
        "evaluation": result.evaluation,
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
    how = f"stopped early, because {judge(result)} stopped improving," if result.stopped_early else "is finished:"
    write(f"{result.folder} {how} {step:,} steps{best(result)}")
    more = "--early-stop 0" if result.stopped_early else f"--steps {2 * step}"
    write(f"train it further: openelm-mlx {command} --resume {quote(str(result.folder))} {more}")


def judge(result: TrainingResult) -> str:
    """What said which checkpoint is the best."""
    return next(iter(result.evaluation)) if result.evaluation else "the validation loss"


def best(result: TrainingResult) -> str:
    """The figure of the best checkpoint, to follow a sentence; nothing if none was measured."""
    if result.evaluation:
        name, value = next(iter(result.evaluation.items()))
        return f"; best {name}: {value:.4f}"
    return "" if result.validation_loss is None else f"; best validation loss: {result.validation_loss:.4f}"


def perplexity(loss: float) -> str:
    """The perplexity of a loss in nats per token, with one decimal."""
    return f"{math.exp(min(loss, 99)):,.1f}"


def _text(metrics: Metrics, unit: str) -> str:
    parts = [] if metrics.loss is None else [f"loss {metrics.loss:.4f}"]
    if metrics.validation_loss is not None:
        of_text = "accuracy" not in (metrics.validation or {})
        more = f" (perplexity {perplexity(metrics.validation_loss)})" if of_text else ""
        parts.append(f"validation loss {metrics.validation_loss:.4f}{more}")
    parts += [f"{name} {value:.4f}" for name, value in (metrics.evaluation or {}).items()]
    if "accuracy" in metrics.more:
        parts.append(f"margin {metrics.more['margin']:+.4f}, accuracy {metrics.more['accuracy']:.0%}")
    if metrics.loss is not None:
        parts.append(f"{rate(metrics.tokens_per_second)} {unit}/s, peak memory {mib(metrics.peak_memory_bytes)}")
    return ", ".join(parts)
