"""The accuracy on tasks during training, by which a run chooses its best checkpoint."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import mlx.core as mx

from ..model.openelm import OpenELM
from ..tokenizer.tokenizer import Tokenizer
from ..training.checkpoint_metric import CheckpointMetric, Progress
from .prompts import items
from .report import EvaluationReport
from .results import SuiteAverage
from .run import EvaluationCallback, EvaluationOptions, Subject, check_lengths, evaluate_prepared, prepare


class TaskMetric(CheckpointMetric):
    """The accuracy on tasks, for the `evaluate` of `tune` and `pretrain`; of several tasks, the average counts.

    Args:
        tasks: names of tasks, groups or suites, or task files.
        data: a folder with the data of each task, `TASK/test.jsonl`; `None`: they are downloaded.
        protocol: `current`, the prompts of lm-eval today, or `paper`, those of the paper.
        shots: solved examples before each question, instead of a task's own number.
        limit: evaluate only the first items of each task.
    Raises:
        OpenELMError: one of its subclasses, if a task is unknown, or its data are missing or do not fit.
    """

    def __init__(
        self,
        tasks: str | Sequence[str],
        *,
        data: str | Path | None = None,
        protocol: str = "current",
        shots: int | None = None,
        limit: int | None = None,
    ):
        self._options = EvaluationOptions(data, protocol, shots, limit)
        self._tasks = prepare([tasks] if isinstance(tasks, str) else tasks, self._options)
        self.name = ", ".join(dict.fromkeys(prepared.task.group or prepared.task.name for prepared in self._tasks))
        self.num_items = sum(prepared.num_items for prepared in self._tasks)
        self.fingerprint = self._hash()

    def check(self, model: OpenELM, tokenizer: Tokenizer) -> None:
        """Check that the prompts fit the model's context.

        Raises:
            EvaluationError: if too many do not.
        """
        check_lengths(model, tokenizer, self._tasks, self._options)

    def evaluate(
        self, model: OpenELM, tokenizer: Tokenizer, group: mx.distributed.Group, on_progress: Progress
    ) -> Mapping[str, float]:
        """The accuracy on each task or group of tasks, from 0 to 1; of several, first their average."""
        subject = Subject(model, tokenizer, self.name)
        counter = _Counter(self.num_items, on_progress)
        return _figures(evaluate_prepared(subject, self._tasks, self._options, group=group, callback=counter))

    def _hash(self) -> str:
        """A hash of all questions and their right answers: equal for equal ones, whatever the files they came from."""
        digest = sha256()
        for prepared in self._tasks:
            options = self._options
            digest.update(json.dumps([prepared.task.name, prepared.task.metrics]).encode())
            for item in items(prepared.task, prepared.data, limit=options.limit, protocol=options.protocol):
                digest.update(json.dumps([item.requests, item.gold]).encode())
        return digest.hexdigest()


class _Counter(EvaluationCallback):
    """Counts the items of all tasks; the processes of a run, each with a part of a task, round up."""

    def __init__(self, total: int, on_progress: Progress):
        self._done = 0
        self._total = total
        self._on_progress = on_progress
        on_progress(0, total)

    def on_items(self, num_items: int) -> None:
        self._done = min(self._done + num_items, self._total)
        self._on_progress(self._done, self._total)


def _figures(report: EvaluationReport) -> dict[str, float]:
    shown = report.shown()
    names = [result.task for result in shown]
    figures = {
        name if names.count(name) == 1 else f"{name}@{result.shots}": result.main.value
        for name, result in zip(names, shown, strict=True)
    }
    return figures if len(shown) == 1 else {"average": SuiteAverage.of(shown).value, **figures}
