"""Evaluates a model on tasks: reads their data, scores all items, and keeps scores and results in a folder."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import EvaluationError
from ..files.paths import read_bytes
from ..generation.prompt_cache import model_fingerprint
from ..machine.hardware import describe
from ..model.openelm import OpenELM
from ..tokenizer.tokenizer import Tokenizer
from .encoding import RequestEncoder
from .item_scorer import ItemScorer
from .items import ItemResult
from .metrics import grade
from .prompts import check_records, items
from .published import main_metric
from .report import EvaluationReport
from .results import GroupResult, TaskResult
from .run_folder import SampleWriter, open_run
from .scorer import Scorer, ScorerConfig
from .suites import find_tasks
from .task import Task
from .task_data import TaskData, read_task_data

_LARGEST_TOKENIZER = 256 << 20  # bytes


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, and how.

    Attributes:
        data: a folder with the data of each task, `TASK/test.jsonl`; `None`: they are downloaded.
        protocol: `current`, the prompts of lm-eval today, or `paper`, those of the paper.
        shots: solved examples before each question, instead of a task's own number.
        limit: evaluate only the first items of each task.
        max_truncated: the share of a task's or group's items whose prompts may exceed the model's context.
        scorer: how to score.
    """

    data: str | Path | None = None
    protocol: str = "current"
    shots: int | None = None
    limit: int | None = None
    max_truncated: float = 0.25
    scorer: ScorerConfig = field(default_factory=ScorerConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.max_truncated <= 1:
            raise EvaluationError(f"max_truncated must be a share from 0 to 1; got {self.max_truncated!r}")


class EvaluationCallback:
    """Receives what an evaluation does; derive from it and override what is needed."""

    def on_task(self, task: str, num_items: int) -> None:
        """A task begins."""

    def on_items(self, num_items: int) -> None:
        """So many more items of the task are scored."""

    def on_result(self, result: TaskResult) -> None:
        """A task is finished."""


@dataclass(frozen=True)
class PreparedTask:
    """A task with its data, all of whose records fit it."""

    task: Task
    data: TaskData
    num_items: int


def prepare(tasks: Sequence[str], options: EvaluationOptions = EvaluationOptions()) -> list[PreparedTask]:
    """Find tasks and read their data, before a model is loaded.

    Raises:
        OpenELMError: a subclass, if a task is unknown, or its data are missing or do not fit.
    """
    prepared = []
    for task in find_tasks(tasks):
        if options.shots is not None:
            task = task.with_shots(options.shots)
        data = read_task_data(task, options.data)
        check_records(task, data, limit=options.limit, protocol=options.protocol)
        items(task, data, limit=options.limit, protocol=options.protocol)  # raises for too few examples
        available = len(data.test.rows)
        prepared.append(PreparedTask(task, data, min(available, options.limit or available)))
    return prepared


def evaluate(
    model: OpenELM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    options: EvaluationOptions = EvaluationOptions(),
    *,
    output: str | Path | None = None,
    name: str = "model",
    adapter: str | None = None,
    callback: EvaluationCallback = EvaluationCallback(),  # noqa: B008, keeps nothing
) -> EvaluationReport:
    """Evaluate a model on tasks of lm-eval, or on those of the paper's adapters.

    Args:
        tasks: names of tasks, groups or suites, or paths of task files.
        output: a folder for scores and results. Scores that it holds are not computed again, so that a run that was
            interrupted continues; results of other tasks with the same protocol and limit stay.
        name: of the model, as the report shows it; the name of a published one brings the published figures.
        adapter: name of the adapter that the model has.
        callback: is told of the progress.

    Raises:
        OpenELMError: a subclass, if a task is unknown, its data are missing or do not fit, `output` belongs to another
            model, or too many prompts exceed the model's context.
    """
    subject = Subject(model, tokenizer, name, adapter)
    return evaluate_prepared(subject, prepare(tasks, options), options, output=output, callback=callback)


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, and the names of it and its adapter."""

    model: OpenELM
    tokenizer: Tokenizer
    name: str
    adapter: str | None = None


def evaluate_prepared(
    subject: Subject,
    tasks: Sequence[PreparedTask],
    options: EvaluationOptions,
    *,
    output: str | Path | None = None,
    group: mx.distributed.Group | None = None,
    callback: EvaluationCallback = EvaluationCallback(),  # noqa: B008, keeps nothing
    command: str = "",
) -> EvaluationReport:
    """As `evaluate`, with tasks whose data were read before.

    Args:
        group: processes that share the items.
        command: what was typed, for the report.
    """
    dtype = str(subject.model.transformer.norm.weight.dtype).removeprefix("mlx.core.")
    empty = tuple(_result(task, (), options) for task in tasks)
    report = EvaluationReport(
        subject.name, subject.adapter, dtype, options.protocol, empty, machine=describe(command), limit=options.limit
    )
    with open_run(output, 0 if group is None else group.rank()) as folder:
        scores = None if folder is None else folder.scores(dependencies(subject, options.scorer))
        scorer = Scorer(subject.model, subject.tokenizer, options.scorer)
        run = _Run(ItemScorer(scorer, scores, group), options, callback)
        results: list[TaskResult] = []
        for label, task in zip(report.by_label(), tasks, strict=True):
            with nullcontext(SampleWriter(None)) if folder is None else folder.samples(report, label) as write:
                results.append(run.evaluate(task, tasks, write))
            callback.on_result(results[-1])
        report = replace(report, results=tuple(results), groups=tuple(_groups(tasks, results)))
        return report if folder is None else folder.write(report)


def check_lengths(
    model: OpenELM, tokenizer: Tokenizer, tasks: Sequence[PreparedTask], options: EvaluationOptions
) -> None:
    """Check that the prompts of tasks fit a model's context, without scoring any.

    Raises:
        EvaluationError: if more than `max_truncated` of a task's or group's do not.
    """
    length = options.scorer.max_length or model.config.max_context_length
    encode = RequestEncoder(tokenizer, length)
    found: Counter[str] = Counter()
    for task in tasks:
        key = _group_of(task)
        for item in items(task.task, task.data, limit=options.limit, protocol=options.protocol):
            if all(len("".join(request).encode()) < length for request in item.requests):
                continue  # a token has at least a byte
            encoded = [encode(request) for request in item.requests]
            found[key] += all(encoded) and any(request.is_truncated for request in encoded if request is not None)
        if found[key] > _most_truncated(task, tasks, options):
            raise _too_long(task, options, found[key])


class _Run:
    """Evaluates one task after the other, and counts the prompts that exceed the model's context."""

    def __init__(self, scorer: ItemScorer, options: EvaluationOptions, callback: EvaluationCallback):
        self._scorer = scorer
        self._options = options
        self._callback = callback
        self._num_truncated: Counter[str] = Counter()  # by group, or by task

    def evaluate(self, task: PreparedTask, others: Sequence[PreparedTask], write: SampleWriter) -> TaskResult:
        """The result of a task; `write` is called with each item."""
        self._callback.on_task(task.task.name, task.num_items)
        key = _group_of(task)
        most = _most_truncated(task, others, self._options)
        num_failed = 0

        def graded() -> Iterator[ItemResult]:
            nonlocal num_failed
            asked = items(task.task, task.data, limit=self._options.limit, protocol=self._options.protocol)
            for item, scores in self._scorer(asked, self._callback.on_items):
                if scores is None:
                    num_failed += 1
                    continue
                self._num_truncated[key] += any(score.is_truncated for score in scores)
                if self._num_truncated[key] > most:
                    raise _too_long(task, self._options, self._num_truncated[key])
                yield write(grade(item, scores, _metrics(task.task)))

        return replace(_result(task, graded(), self._options), num_failed=num_failed)


def _result(task: PreparedTask, results: Iterable[ItemResult], options: EvaluationOptions) -> TaskResult:
    found = task.task.under(options.protocol)
    metric = main_metric(found.name, _metrics(found))
    origin = {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(task.data.origin).items()
    }
    return TaskResult.of(
        found.name,
        results,
        metric=metric,
        shots=found.shots,
        version=found.version,
        protocol=options.protocol,
        data=origin,
        num_available=len(task.data.test.rows),
    )


def _metrics(task: Task) -> tuple[str, ...]:
    return ("mc2",) if task.kind == "mc2" else task.metrics


def _group_of(task: PreparedTask) -> str:
    return f"{task.task.group or task.task.name}@{task.task.shots}"


def _groups(tasks: Sequence[PreparedTask], results: Sequence[TaskResult]) -> Iterator[GroupResult]:
    members: dict[tuple[str, int], list[TaskResult]] = {}
    for task, result in zip(tasks, results, strict=True):
        if task.task.group:
            members.setdefault((task.task.group, task.task.shots), []).append(result)
    for (name, _), found in members.items():
        if len(found) > 1:
            yield GroupResult.of_tasks(name, found)


def dependencies(subject: Subject, config: ScorerConfig) -> dict[str, Any]:
    """What scores depend on apart from the prompt; the dtype is part of the weights' fingerprint."""
    vocabulary = hashlib.sha256(read_bytes(subject.tokenizer.path, EvaluationError, _LARGEST_TOKENIZER)).hexdigest()
    length = config.max_length or subject.model.config.max_context_length
    return {"weights": model_fingerprint(subject.model), "tokenizer": vocabulary, "max_length": length}


def _most_truncated(task: PreparedTask, tasks: Sequence[PreparedTask], options: EvaluationOptions) -> float:
    """How many items of the group that a task belongs to may exceed the context."""
    key = _group_of(task)
    return options.max_truncated * sum(other.num_items for other in tasks if _group_of(other) == key)


def _too_long(task: PreparedTask, options: EvaluationOptions, count: int) -> EvaluationError:
    return EvaluationError(
        f"{task.task.name} with {task.task.shots} shots: {count:,} prompts exceed the model's context, more than "
        f"{options.max_truncated:.0%} of all; use fewer `shots`, or raise `max_truncated` to score their ends"
    )
