"""The report of an evaluation: all results, as a table, CSV, Markdown, JSON, and in lm-eval's shape."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..errors import EvaluationError
from ..files.fields import Fields
from ..files.json_file import parse_json_object
from .published import PublishedTable, full_name, published, published_model, published_tables
from .results import GroupResult, ItemRecord, MetricValue, SuiteAverage, TaskResult, json_number
from .table import ResultTable, TaskRow, evaluation_table

_Result = TypeVar("_Result", bound=TaskResult)


@dataclass(frozen=True)
class EvaluationReport:
    """All results of one evaluation.

    Attributes:
        model: name or folder of the model.
        adapter: name or folder of its adapter.
        dtype: in which it computed.
        protocol: `current` or `paper`.
        results: of the tasks, in the order in which they are shown.
        groups: tasks that are shown as one.
        machine: what ran where; see `machine.hardware.describe`.
        limit: the number of items of each task that were asked for; `None` for all.
        settings: whatever else describes the run, in values for JSON.
    """

    model: str
    adapter: str | None
    dtype: str
    protocol: str
    results: tuple[TaskResult, ...]
    groups: tuple[GroupResult, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"  {row.task}, {row.shots} shots: {row.metric} {100 * row.main.value:.2f}" for row in self.shown()]
        return "\n".join([f"EvaluationReport({self.model!r},", *lines, ")"])

    @property
    def published_model(self) -> str | None:
        """The published model that this one is compared with."""
        return published_model(self.model, self.adapter is not None)

    def shown(self) -> list[TaskResult]:
        """Tasks and groups; a group stands where its first task was."""
        group_of = {(name, group.shots): group for group in self.groups for name in group.members}
        found: dict[tuple[str, int], TaskResult] = {}
        for result in self.results:
            row = group_of.get((result.task, result.shots), result)
            found.setdefault((row.task, row.shots), row)
        return list(found.values())

    def rows(self) -> list[TaskRow]:
        """What is shown, each beside its published figure."""
        return [self._row(result) for result in self.shown()]

    def averages(self) -> dict[str, SuiteAverage]:
        """The averages of the paper's suites of which all tasks are there; without any, the average of all tasks."""
        shown = {(full_name(result.task), result.shots): result for result in self.shown()}
        found = {}
        for name, table in published_tables().items():
            cells = [(cell.task, cell.shots) for cell in table.cells]
            if all(cell in shown for cell in cells):
                found[f"{name} average"] = SuiteAverage.of([shown[cell] for cell in cells])
        if not found and len(shown) > 1:
            return {"average": SuiteAverage.of(list(shown.values()))}
        return found

    def published_averages(self) -> dict[str, float]:
        """The published averages of the model, in percent, named like those of `averages`."""
        model = self.published_model or ""
        tables = published_tables().items()
        return {f"{name} average": table.models[model][-1] for name, table in tables if model in table.models}

    def table(self) -> ResultTable:
        """The table that the command line prints."""
        return evaluation_table(self.rows(), self.averages(), self.published_averages())

    def by_label(self) -> dict[str, TaskResult]:
        """Results by the name of their task; with the number of shots, such as "hellaswag@10", if it occurs twice."""
        return _labelled(self.results)

    def groups_by_label(self) -> dict[str, GroupResult]:
        """The groups, named in the same way."""
        return _labelled(self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the items, for JSON; values are shares, and one that is not a number is `None`."""
        averages, published_averages = self.averages(), self.published_averages()
        return {
            "model": self.model,
            "adapter": self.adapter,
            "dtype": self.dtype,
            "protocol": self.protocol,
            "limit": self.limit,
            "published_model": self.published_model,
            "results": {label: _task_dict(self._row(result)) for label, result in self.by_label().items()},
            "groups": {
                label: {**_task_dict(self._row(group)), "members": list(group.members)}
                for label, group in self.groups_by_label().items()
            },
            "averages": {
                name: {
                    **average._asdict(),
                    "value": json_number(average.value),
                    "stderr": json_number(average.stderr),
                    "published": published_averages.get(name),
                }
                for name, average in averages.items()
            },
            "settings": dict(self.settings),
            "machine": dict(self.machine),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_csv(self) -> str:
        """Comma-separated values, one line per task and group; shares from 0 to 1, published figures in percent."""
        rows = [self._row(result) for result in (*self.results, *self.groups)]
        metrics = list(dict.fromkeys(name for row in rows for name in row.result.metrics))
        columns = [column for name in metrics for column in (name, name + _ERROR)]
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([*_ABOUT, *columns, *_COUNTS, *_PUBLISHED])
        for row in rows:
            values = _task_dict(row)
            line = [values.get(name) for name in (*_ABOUT, *columns, *_COUNTS, *_PUBLISHED)]
            writer.writerow(["" if value is None else value for value in line])
        return text.getvalue()

    def to_markdown(self) -> str:
        """The table and its notes in Markdown."""
        table = self.table()
        rows = [row for section in table.sections for row in section]
        lines = [table.headings, ["---" if at in table.left else "---:" for at in range(len(table.headings))], *rows]
        text = "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines)
        about = [f"{_escaped(', '.join(table.shared))}\n\n"] if table.shared else []
        return "".join(about) + text + "\n\n" + "".join(f"* {_escaped(note)}\n" for note in table.notes)

    def with_items(self, items: Mapping[str, Sequence[ItemRecord]]) -> "EvaluationReport":
        """This report with items, by the label of their task, as they were read from its files."""
        results = self.by_label()
        return replace(
            self,
            results=tuple(
                replace(result, items=tuple(items.get(label, result.items))) for label, result in results.items()
            ),
        )

    @classmethod
    def from_json(cls, text: str, where: str = "the report") -> "EvaluationReport":
        """The report of `to_json`, without items.

        Raises:
            EvaluationError: if it is damaged.
        """
        fields = parse_json_object(text, where, EvaluationError)
        tables = fields.table("results")
        groups = fields.table("groups")
        return cls(
            model=fields.text("model"),
            adapter=fields.text("adapter", None),
            dtype=fields.text("dtype"),
            protocol=fields.text("protocol"),
            results=tuple(_task_of(TaskResult, tables.table(label)) for label in tables),
            groups=tuple(_task_of(GroupResult, groups.table(name)) for name in groups),
            machine=dict(fields.table("machine")),
            limit=fields.whole("limit", None),
            settings=dict(fields.table("settings")),
        )

    def _row(self, result: TaskResult) -> TaskRow:
        found = published(self.published_model, result.task, result.shots, self._tables())
        return TaskRow(result, found if found is not None and result.metric in found.cell.metrics else None)

    def _tables(self) -> list[PublishedTable]:
        """The published tables, first those of which most tasks are there."""
        shown = {(full_name(result.task), result.shots) for result in self.shown()}

        def num_shown(table: PublishedTable) -> int:
            return sum((cell.task, cell.shots) in shown for cell in table.cells)

        return sorted(published_tables().values(), key=num_shown, reverse=True)


_ERROR = "_stderr"  # at the end of the name of a metric's standard error
_ABOUT = ("task", "shots", "version", "protocol", "metric")
_COUNTS = ("num_items", "num_available", "num_truncated", "num_non_finite", "num_failed", "majority", "prompt_hash")
_PUBLISHED = ("published", "points_above", "items_above", "nearer_metric")


def _labelled(results: Sequence[_Result]) -> dict[str, _Result]:
    names = Counter(result.task for result in results)
    return {result.task if names[result.task] == 1 else f"{result.task}@{result.shots}": result for result in results}


def _task_dict(row: TaskRow) -> dict[str, Any]:
    result = row.result
    metrics: dict[str, Any] = {}
    for name, value in result.metrics.items():
        metrics |= {name: json_number(value.value), name + _ERROR: json_number(value.stderr)}
    if result.metric == "mc2":  # lm-eval calls it acc
        metrics["acc"] = json_number(result.main.value)
    items = row.items(result.metric)
    return {
        "task": result.task,
        "version": result.version,
        "shots": result.shots,
        "protocol": result.protocol,
        "metric": result.metric,
        **metrics,
        "stderr": json_number(result.main.stderr),
        "num_items": result.num_items,
        "num_available": result.num_available,
        "num_truncated": result.num_truncated,
        "num_non_finite": result.num_non_finite,
        "num_failed": result.num_failed,
        "majority": result.majority,
        "gold_counts": list(result.gold_counts),
        "prompt_hash": result.prompt_hash,
        "data": dict(result.data),
        "published": None if row.published is None else row.published.percent,
        "points_above": json_number(row.points),
        "items_above": json_number(items),
        "nearer_metric": row.nearer,
    }


def _task_of(kind: type[TaskResult], fields: Fields) -> Any:
    metrics = {}
    for name in fields:
        if name.endswith(_ERROR):
            value = fields.number(name.removesuffix(_ERROR), None)
            metrics[name.removesuffix(_ERROR)] = MetricValue(
                math.nan if value is None else value, fields.number(name, None)
            )
    metric = fields.text("metric")
    if metric not in metrics:
        raise EvaluationError(f"{fields.where}: {metric} is missing")
    counts = fields.list_of("gold_counts", int, [])
    members = {"members": tuple(fields.list_of("members", str))} if kind is GroupResult else {}
    return kind(
        task=fields.text("task"),
        version=fields.text("version", None),
        shots=fields.whole("shots"),
        protocol=fields.text("protocol"),
        metric=metric,
        data=dict(fields.table("data")),
        prompt_hash=fields.text("prompt_hash"),
        metrics=metrics,
        num_items=fields.whole("num_items"),
        num_available=fields.whole("num_available"),
        gold_counts=tuple(counts),
        num_truncated=fields.whole("num_truncated"),
        num_non_finite=fields.whole("num_non_finite"),
        num_failed=fields.whole("num_failed"),
        **members,
    )


def _escaped(note: str) -> str:
    return "".join(f"\\{letter}" if letter in "*_|" else letter for letter in note)
