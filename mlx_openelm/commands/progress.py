"""How a training run is shown while it goes on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .terminal import mib, say

if TYPE_CHECKING:
    from ..train import Metrics


@contextmanager
def training_progress(steps: int, main: bool, unit: str = "tokens") -> Iterator[Callable[[Metrics], None]]:
    """A bar with loss, speed and time left on a terminal; elsewhere a line now and then."""
    if not main:
        yield lambda metrics: None
        return
    if not sys.stderr.isatty():

        def show_line(metrics: Metrics) -> None:
            say(f"step {metrics.step:,} of {steps:,}: {_text(metrics, unit)}")
            if metrics.sample:
                say(f"sample: {metrics.sample}")

        yield show_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=steps)

        def show_bar(metrics: Metrics) -> None:
            progress.update(task, completed=metrics.step, description=_text(metrics, unit))
            if metrics.sample:
                progress.console.print(metrics.sample, style="dim", markup=False)

        yield show_bar


def _text(metrics: Metrics, unit: str) -> str:
    parts = [] if metrics.loss is None else [f"loss {metrics.loss:.4f}"]
    if metrics.validation_loss is not None:
        of_text = "accuracy" not in (metrics.validation or {})
        perplexity = f" (perplexity {math.exp(min(metrics.validation_loss, 99)):,.1f})" if of_text else ""
        parts.append(f"held-out {metrics.validation_loss:.4f}{perplexity}")
    if "accuracy" in metrics.more:
        parts.append(f"margin {metrics.more['margin']:+.4f}, {metrics.more['accuracy']:.0%} right")
    if metrics.loss is not None:
        parts.append(f"{metrics.tokens_per_second:,.0f} {unit}/s, peak {mib(metrics.peak_memory_bytes)}")
    return ", ".join(parts)
