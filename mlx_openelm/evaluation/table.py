"""The table of an evaluation: each task beside its published figure."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .metrics import ROUNDED
from .published import Published
from .results import SuiteAverage, TaskResult

_SHOWN_DIGITS = 8  # of a hash
_DOUBTFUL, _NEARER = " !", "~"


@dataclass(frozen=True)
class TaskRow:
    """A task or group, and what was published about it.

    Attributes:
        result: what was measured.
        published: `None` if nothing was published, or for another metric only.
    """

    result: TaskResult
    published: Published | None = None

    @property
    def points(self) -> float | None:
        """Percentage points above the published figure, in the main metric."""
        return None if self.published is None else 100 * self.result.main.value - self.published.percent

    def items(self, metric: str) -> float | None:
        """Right answers above those published; `None` if other than all items of the test set were scored."""
        if self.published is None or self.result.num_items != self.published.cell.num_items:
            return None
        return self.result.num_right(metric) - self.published.num_right

    @property
    def nearer(self) -> str | None:
        """The metric that is nearer to the published figure; `None` if the source says which one it published."""
        if self.published is None or len(self.published.cell.metrics) < 2:
            return None
        values = {name: self.result.metrics[name].value for name in self.published.cell.metrics if self._has(name)}
        percent = self.published.percent
        return min(values, key=lambda name: abs(100 * values[name] - percent)) if len(values) > 1 else None

    def _has(self, metric: str) -> bool:
        value = self.result.metrics.get(metric)
        return value is not None and not math.isnan(value.value)


class ResultTable(NamedTuple):
    """A table for `write_table`, without the columns in which it has nothing to say.

    Attributes:
        headings: of the columns.
        sections: rows of tasks, then of averages.
        shared: what all tasks have in common, such as "shots 0", instead of a column.
        left: numbers of the columns that are aligned at the left.
        num_keys: number of the first columns that say what a row is about.
        notes: what there is to know about the rows, one sentence each.
    """

    headings: list[str]
    sections: list[list[list[str]]]
    shared: list[str]
    left: list[int]
    num_keys: int
    notes: list[str]


def evaluation_table(
    rows: Sequence[TaskRow], averages: Mapping[str, SuiteAverage], published_averages: Mapping[str, float]
) -> ResultTable:
    """The table of these tasks.

    Args:
        averages: by the name of their suite.
        published_averages: those of the model, in percent, by the name of their suite.
    """
    tasks = [[column.cell(row) for column in _COLUMNS] for row in rows]
    means = [_average_row(name, average, published_averages.get(name)) for name, average in averages.items()]
    _mark_nearer(rows, tasks)
    names = [column.heading for column in _COLUMNS]
    shared = {
        at: tasks[0][at]
        for at, name in enumerate(names)
        if name in _SHARED and len(tasks) > 1 and tasks[0][at] and len({row[at] for row in tasks}) == 1
    }
    hidden = {names.index(name) for name in _COUNTS} if not any(row.result.problems for row in rows) else set()
    if all(row.result.metric == "acc" and "acc_norm" not in row.result.metrics for row in rows):
        hidden.add(names.index("acc"))  # the same as `ours`
    shown = [
        at
        for at in range(len(names))
        if at not in hidden and at not in shared and any(row[at].strip() for row in [*tasks, *means])
    ]
    prefix = shared_prefix([row[0] for row in tasks])
    tasks = [[row[0].removeprefix(prefix), *row[1:]] for row in tasks]
    sections = [[[row[at] for at in shown] for row in section] for section in (tasks, means) if section]
    twice = len({row.result.task for row in rows}) < len(rows)
    return ResultTable(
        [names[at] for at in shown],
        sections,
        [f"tasks {prefix}"] * bool(prefix) + [f"{names[at]} {value}" for at, value in shared.items()],
        [place for place, at in enumerate(shown) if _COLUMNS[at].is_left],
        2 if twice else 1,
        list(_notes(rows, averages)),
    )


def shared_prefix(tasks: Sequence[str]) -> str:
    """The folder that begins the names of all tasks, such as "commonsense/"."""
    folders = {task.rpartition("/")[0] for task in tasks}
    return f"{folders.pop()}/" if len(tasks) > 1 and len(folders) == 1 and "" not in folders else ""


def percentage(value: float | None) -> str:
    """A share in percent with two decimals, as the paper prints it; or `not a number`; nothing for `None`."""
    return "" if value is None else f"{100 * value:.2f}" if math.isfinite(value) else "not a number"


class _Column(NamedTuple):
    heading: str
    cell: Callable[[TaskRow], str]
    is_left: bool = False


def _metric(name: str) -> Callable[[TaskRow], str]:
    """A cell with a metric that not all tasks have."""
    return lambda row: percentage(row.result.metrics[name].value) if name in row.result.metrics else ""


def _above(row: TaskRow, suffix: str = "") -> str:
    metric = row.result.metric + suffix
    count = row.items(metric) if metric in row.result.metrics else None
    if count is None or math.isnan(count):
        return ""
    return f"{count:+,}" if isinstance(count, int) else f"{count:+,.1f}"


_COLUMNS = (
    _Column("task", lambda row: row.result.task + (_DOUBTFUL if row.result.problems else ""), True),
    _Column("shots", lambda row: str(row.result.shots)),
    _Column("metric", lambda row: row.result.metric, True),
    _Column("ours", lambda row: percentage(row.result.main.value)),
    _Column("published", lambda row: "" if row.published is None else f"{row.published.percent:.2f}"),
    _Column("points above", lambda row: "" if row.points is None else f"{row.points:+.2f}"),
    _Column("items above", _above),
    _Column("standard error", lambda row: percentage(row.result.main.stderr)),
    _Column("acc", _metric("acc")),
    _Column("acc_norm", _metric("acc_norm")),
    _Column("ours, bf16", lambda row: _metric(row.result.metric + ROUNDED)(row)),
    _Column("items above, bf16", lambda row: _above(row, ROUNDED)),
    _Column("acc, bf16", _metric("acc" + ROUNDED)),
    _Column("acc_norm, bf16", _metric("acc_norm" + ROUNDED)),
    _Column("majority", lambda row: percentage(row.result.majority)),
    _Column("items", lambda row: f"{row.result.num_items:,}"),
    _Column("version", lambda row: row.result.version or ""),
    _Column("prompts", lambda row: row.result.prompt_hash[:_SHOWN_DIGITS], True),
    _Column("truncated", lambda row: f"{row.result.num_truncated:,}"),
    _Column("not finite", lambda row: f"{row.result.num_non_finite:,}"),
    _Column("failed", lambda row: f"{row.result.num_failed:,}"),
)
_CHANGED = ("mmlu", "race")  # tasks with other prompts today than those of the published figures
_COUNTS = ("truncated", "not finite", "failed")
_SHARED = ("shots", "metric", "version")  # headings of columns that are left out if all tasks have the same value


def _average_row(name: str, average: SuiteAverage, published: float | None) -> list[str]:
    cells = {
        "task": name + (_DOUBTFUL if average.doubtful else ""),
        "ours": percentage(average.value),
        "published": "" if published is None else f"{published:.2f}",
        "points above": "" if published is None else f"{100 * average.value - published:+.2f}",
        "standard error": percentage(average.stderr),
    }
    return [cells.get(column.heading, "") for column in _COLUMNS]


def _mark_nearer(rows: Sequence[TaskRow], cells: Sequence[list[str]]) -> None:
    """Mark the cells of the metrics that are nearer to the published figures; the others of a column keep in line."""
    headings = [column.heading for column in _COLUMNS]
    for name in ("acc", "acc_norm"):
        at = headings.index(name)
        if any(row.nearer == name for row in rows):
            for row, line in zip(rows, cells, strict=True):
                line[at] += _NEARER if row.nearer == name else " " if line[at] else ""


def _notes(rows: Sequence[TaskRow], averages: Mapping[str, SuiteAverage]) -> Sequence[str]:
    notes = [f"! {row.result.task}: {', '.join(row.result.problems)}" for row in rows if row.result.problems]
    notes += [
        f"! {name}: includes {', '.join(average.doubtful)}" for name, average in averages.items() if average.doubtful
    ]
    if not any(row.result.problems for row in rows):
        notes.append("no item was truncated, not finite or failed")
    if any(row.nearer for row in rows):
        notes.append("~ the nearer one, where the source does not say whether it published acc or acc_norm")
    changed = [
        row.result.task
        for row in rows
        if row.published and row.result.protocol == "current" and row.result.task in _CHANGED
    ]
    if changed:
        notes.append(f"{', '.join(changed)}: asked as lm-eval asks today; the protocol `paper` asks as was published")
    partial = [
        f"{row.result.task} {row.result.num_items:,} of {row.published.cell.num_items:,}"
        for row in rows
        if row.published is not None and row.result.num_items != row.published.cell.num_items
    ]
    if partial:
        notes.append(f"items that were scored, of those of the published figure: {', '.join(partial)}")
    notes += [f"published: {source}" for source in dict.fromkeys(row.published.source for row in rows if row.published)]
    return notes
