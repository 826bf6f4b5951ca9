"""The result of a task: what was run, its metrics, its items, and what went wrong with some of them."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .items import Item, ItemResult
from .metrics import checked_metrics, is_count, mean, pooled_mean, pooled_standard_error, standard_error
from .requests import Score

NUM_HASHED = 16  # hexadecimal digits of a hash


class MetricValue(NamedTuple):
    """The mean of a metric over all items of a task, from 0 to 1 except for `likelihood_diff`.

    Attributes:
        value: not finite if the task has no items, or if that of an item is not.
        stderr: its standard error; `None` for a single item.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True)
class ItemRecord:
    """What is kept of an item: enough to compare two runs, without its texts.

    Attributes:
        index: position of its record in the test data.
        prompt_hash: of all contexts and continuations.
        gold: positions of the right choices.
        scores: of the choices, in their order.
        metrics: what each metric makes of the scores.
    """

    index: int
    prompt_hash: str
    gold: tuple[int, ...]
    scores: tuple[Score, ...]
    metrics: dict[str, float]

    @classmethod
    def of(cls, result: ItemResult) -> "ItemRecord":
        """The record of an item's result."""
        item = result.item
        return cls(item.index, item_hash(item), item.gold, result.scores, dict(result.metrics))

    @property
    def is_truncated(self) -> bool:
        """Whether a choice was scored without the beginning of its context."""
        return any(score.is_truncated for score in self.scores)

    @property
    def is_finite(self) -> bool:
        """Whether all log-likelihoods are numbers."""
        return all(score.is_finite for score in self.scores)


@dataclass(frozen=True)
class TaskResult:
    """A task's metrics over its items.

    Attributes:
        task: its name.
        version: of its prompts and data, as lm-eval counts them; `None` if the members of a group differ.
        shots: number of solved examples before each question.
        protocol: `current` or `paper`.
        metric: the main one, which is compared with published figures.
        data: where the test data comes from.
        prompt_hash: of the prompts of all items.
        metrics: by name; those that end in `_bf16` are of scores rounded as the published models were scored.
        num_items: that were scored.
        num_available: records of the test data, of which a limit may have left out some.
        gold_counts: how often each position of the choices is the right one; empty if that says nothing.
        num_truncated: items with a context that was cut off at its beginning.
        num_non_finite: items with a log-likelihood that is not a number.
        num_failed: items that could not be scored; they count in no metric.
        items: by index; empty if they were not read.
    """

    task: str
    version: str | None
    shots: int
    protocol: str
    metric: str
    data: Mapping[str, Any]
    prompt_hash: str
    metrics: Mapping[str, MetricValue]
    num_items: int
    num_available: int
    gold_counts: tuple[int, ...] = ()
    num_truncated: int = 0
    num_non_finite: int = 0
    num_failed: int = 0
    items: tuple[ItemRecord, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        task: str,
        items: Iterable[ItemResult],
        *,
        metric: str,
        shots: int = 0,
        version: str | float | None = None,
        protocol: str = "current",
        data: Mapping[str, Any] | None = None,
        num_failed: int = 0,
        num_available: int | None = None,
    ) -> "TaskResult":
        """The result of a task, the same in whatever order its items are.

        Args:
            num_available: records of the test data; default: as many as were scored or failed.
        Raises:
            EvaluationError: if the metric is unknown.
        """
        checked_metrics([metric])
        records = tuple(sorted(map(ItemRecord.of, items), key=lambda record: record.index))
        return cls(
            task=task,
            version=None if version is None else str(version),
            shots=shots,
            protocol=protocol,
            metric=metric,
            data=dict(data or {}),
            prompt_hash=_joined_hash(record.prompt_hash for record in records),
            metrics=_averaged(records) or {metric: MetricValue(math.nan, None)},
            num_items=len(records),
            num_available=len(records) + num_failed if num_available is None else num_available,
            gold_counts=() if metric in _WITHOUT_MAJORITY else _gold_counts(records),
            num_truncated=sum(record.is_truncated for record in records),
            num_non_finite=sum(not record.is_finite for record in records),
            num_failed=num_failed,
            items=records,
        )

    @property
    def main(self) -> MetricValue:
        """The value of the main metric."""
        return self.metrics[self.metric]

    @property
    def majority(self) -> float | None:
        """The accuracy of always choosing the position that is right most often; `None` if that says nothing."""
        return max(self.gold_counts) / self.num_items if self.gold_counts else None

    def num_right(self, metric: str) -> float:
        """How many items a metric counts as right; the sum of its values, if it does not count."""
        count = self.metrics[metric].value * self.num_items
        return round(count) if is_count(metric) and not math.isnan(count) else count

    @property
    def problems(self) -> list[str]:
        """What makes the metrics doubtful, such as "2 truncated"; empty if nothing does."""
        counts = {"truncated": self.num_truncated, "not finite": self.num_non_finite, "failed": self.num_failed}
        return [f"{count:,} {what}" for what, count in counts.items() if count]


@dataclass(frozen=True)
class GroupResult(TaskResult):
    """Several tasks as one, such as the subjects of MMLU: their mean, weighted by their numbers of items.

    Attributes:
        members: names of the tasks.
    """

    members: tuple[str, ...] = ()

    @classmethod
    def of_tasks(cls, name: str, results: Sequence[TaskResult]) -> "GroupResult":
        """The group of these tasks, with the metrics that all of them have."""
        scored = [result for result in results if result.num_items] or results
        shared = [name for name in scored[0].metrics if all(name in result.metrics for result in scored)]
        versions = {result.version for result in results}
        return cls(
            task=name,
            version=versions.pop() if len(versions) == 1 else None,
            shots=results[0].shots,
            protocol=results[0].protocol,
            metric=results[0].metric,
            data={},
            prompt_hash=_joined_hash(result.prompt_hash for result in results),
            metrics={metric: _pooled(metric, scored) for metric in shared},
            num_items=sum(result.num_items for result in results),
            num_available=sum(result.num_available for result in results),
            gold_counts=_added([result.gold_counts for result in results]),
            num_truncated=sum(result.num_truncated for result in results),
            num_non_finite=sum(result.num_non_finite for result in results),
            num_failed=sum(result.num_failed for result in results),
            members=tuple(result.task for result in results),
        )


class SuiteAverage(NamedTuple):
    """The mean of the main metrics of several tasks, each with the same weight, as the paper averages.

    Attributes:
        value: from 0 to 1.
        stderr: standard error; `None` if a task has none.
        tasks: their names.
        doubtful: names of those with truncated, failed or not finite items.
    """

    value: float
    stderr: float | None
    tasks: tuple[str, ...]
    doubtful: tuple[str, ...]

    @classmethod
    def of(cls, results: Sequence[TaskResult]) -> "SuiteAverage":
        """The average of these tasks."""
        errors = [result.main.stderr for result in results]
        known = [error for error in errors if error is not None]
        return cls(
            mean([result.main.value for result in results]),
            math.sqrt(sum(error**2 for error in known)) / len(results) if known and len(known) == len(errors) else None,
            tuple(result.task for result in results),
            tuple(result.task for result in results if result.problems),
        )


def json_number(value: float | None) -> float | None:
    """A number for JSON, which has none that are not finite."""
    return value if value is not None and math.isfinite(value) else None


def item_hash(item: Item) -> str:
    """A fingerprint of what is asked: the contexts and continuations of all choices."""
    hashed = hashlib.sha256()
    for request in item.requests:
        for text in request:
            data = text.encode("utf-8", "surrogatepass")
            hashed.update(b"%d:" % len(data))
            hashed.update(data)
    return hashed.hexdigest()[:NUM_HASHED]


_WITHOUT_MAJORITY = frozenset({"mc2", "pct_stereotype"})  # several right choices, or always the first


def _averaged(records: Sequence[ItemRecord]) -> dict[str, MetricValue]:
    if not records:
        return {}
    columns = {name: [record.metrics[name] for record in records] for name in records[0].metrics}
    return {name: MetricValue(mean(values), standard_error(values)) for name, values in columns.items()}


def _pooled(metric: str, results: Sequence[TaskResult]) -> MetricValue:
    values = [result.metrics[metric] for result in results]
    sizes = [result.num_items for result in results]
    errors = [value.stderr for value in values]
    return MetricValue(pooled_mean([value.value for value in values], sizes), pooled_standard_error(errors, sizes))


def _gold_counts(records: Sequence[ItemRecord]) -> tuple[int, ...]:
    counts = Counter(position for record in records for position in record.gold)
    return tuple(counts[position] for position in range(max(counts, default=-1) + 1))


def _added(counts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    width = max(map(len, counts), default=0)
    return tuple(sum(of[place] for of in counts if place < len(of)) for place in range(width))


def _joined_hash(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:NUM_HASHED]
