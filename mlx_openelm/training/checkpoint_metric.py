"""What a run evaluates, such as the accuracy on tasks, to choose its best checkpoint by it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import TrainingError, quoted
from ..files.fields import LARGEST_NUMBER
from ..model.openelm import OpenELM
from ..tokenizer.tokenizer import Tokenizer
from .checkpoints import together

Progress = Callable[[int, int], None]
MetricFunction = Callable[[OpenELM, Tokenizer], "float | Mapping[str, float]"]


class CheckpointMetric(ABC):
    """A figure of the model in training; the checkpoint where it is highest is the best one.

    `TaskMetric` is the accuracy on tasks. Derive from this class for a figure that takes long, or for one that the
    processes of a run compute together; otherwise pass a function.

    Attributes:
        name: what is measured.
        fingerprint: hash of what else the figure depends on, such as its data. A run is only continued with a metric of
            the same name and fingerprint.
    """

    name: str
    fingerprint: str = ""

    def check(self, model: OpenELM, tokenizer: Tokenizer) -> None:
        """Called before the first step, to refuse a model that cannot be evaluated.

        Raises:
            OpenELMError: one of its subclasses.
        """
        return

    @abstractmethod
    def evaluate(
        self, model: OpenELM, tokenizer: Tokenizer, group: mx.distributed.Group, on_progress: Progress
    ) -> Mapping[str, float]:
        """Figures of a model by name; the first one counts, and higher is better.

        Args:
            model: in evaluation mode, with its adapter; the same in all processes.
            group: processes of the run; all call this function, and those of the first one count.
            on_progress: to be called with the done and the total number of items.
        """


class FunctionMetric(CheckpointMetric):
    """A function of the model and its tokenizer that returns a figure, or several by name."""

    def __init__(self, function: MetricFunction):
        name = getattr(function, "__name__", type(function).__name__)
        self.name = name if name.isidentifier() else "metric"  # not that of a lambda
        self._function = function

    def evaluate(
        self, model: OpenELM, tokenizer: Tokenizer, group: mx.distributed.Group, on_progress: Progress
    ) -> Mapping[str, float]:
        """The figures that the function returns; a single one has the function's name."""
        found = self._function(model, tokenizer)
        return found if isinstance(found, Mapping) else {self.name: found}


def as_metric(evaluate: CheckpointMetric | MetricFunction | None) -> CheckpointMetric | None:
    """The metric that `tune` or `pretrain` was given."""
    if evaluate is None or isinstance(evaluate, CheckpointMetric):
        return evaluate
    return FunctionMetric(evaluate)


def figures_of(
    metric: CheckpointMetric, model: OpenELM, tokenizer: Tokenizer, group: mx.distributed.Group, on_progress: Progress
) -> dict[str, float]:
    """The figures of a model, equal in all processes; NaN where one is not finite.

    Raises:
        TrainingError: if the metric returns anything but numbers by name.
        OpenELMError: that of the metric.
    """
    found = together(group, lambda: _checked(metric, metric.evaluate(model, tokenizer, group, on_progress)))
    if group.size() == 1:
        return found
    # As bits: the processes compare figures with the best one so far, and must come to the same result.
    values = np.array(list(found.values()), np.float64)
    bits = mx.array(values.view(np.uint32))
    first = mx.distributed.all_sum(bits if group.rank() == 0 else mx.zeros_like(bits), group=group, stream=mx.cpu)
    return dict(zip(found, np.array(first).view(np.float64).tolist(), strict=True))


def _checked(metric: CheckpointMetric, found: Any) -> dict[str, float]:
    try:
        figures = {name: float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise TrainingError(f"{metric.name} must return a number, or numbers by name; got {quoted(found)}") from None
    if not figures or not all(isinstance(name, str) for name in figures):
        raise TrainingError(f"{metric.name} must return a number, or numbers by name; got {quoted(found)}")
    # What a state.json can hold; NaN as one value, because its bits are compared.
    return {name: value if abs(value) <= LARGEST_NUMBER else math.nan for name, value in figures.items()}


def metric_state(metric: CheckpointMetric | None) -> dict[str, str] | None:
    """What a checkpoint records about the metric of its run."""
    return None if metric is None else {"name": metric.name, "fingerprint": metric.fingerprint}


def metric_changes(metric: CheckpointMetric | None, state: Mapping[str, Any]) -> list[str]:
    """How a metric differs from that of a run, from a checkpoint's state."""
    before, now = state.get("metric") or {}, metric_state(metric) or {}
    if before.get("name") != now.get("name"):
        return [f"metric {before.get('name') or 'validation loss'} -> {now.get('name') or 'validation loss'}"]
    if before != now:
        return [f"the items or the data of the metric {metric.name if metric else ''}"]
    return []
