"""Progress of a training run on stderr."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .terminal import mib, say

if TYPE_CHECKING:
    from ..training.loop import Metrics


class TrainingView:
    """Shows nothing; used in all processes but the first."""

    def moved(self, metrics: Metrics) -> None:
        """Called after every step."""

    def show(self, metrics: Metrics) -> None:
        """Show metrics, when a step is logged or validated."""


class _Lines(TrainingView):
    """Lines, for when stderr is a file or a pipe."""

    def __init__(self, steps: int, unit: str):
        self._steps = steps
        self._unit = unit

    def show(self, metrics: Metrics) -> None:
        say(f"step {metrics.step:,} of {self._steps:,}: {_text(metrics, self._unit)}")
        if metrics.sample:
            say(f"sample: {metrics.sample}")


class _Bar(TrainingView):
    """Lines above a progress bar with the time left, for a terminal."""

    def __init__(self, progress: Any, steps: int, unit: str):
        self._progress = progress
        self._task = progress.add_task("", total=steps)
        self._unit = unit

    def moved(self, metrics: Metrics) -> None:
        self._progress.update(self._task, completed=metrics.step)

    def show(self, metrics: Metrics) -> None:
        self.moved(metrics)
        line = f"step {metrics.step:,}: {_text(metrics, self._unit)}"
        self._progress.console.print(line, markup=False, highlight=False)
        if metrics.sample:
            self._progress.console.print(metrics.sample, style="dim", markup=False)


@contextmanager
def training_view(steps: int, main: bool, unit: str = "tokens") -> Iterator[TrainingView]:
    """The view of a running training: a bar on a terminal, lines otherwise, nothing outside the main process."""
    if not main:
        yield TrainingView()
        return
    if not sys.stderr.isatty():
        yield _Lines(steps, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        yield _Bar(progress, steps, unit)


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
