"""Two models on the same items: what the difference between them is worth."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import EvaluationError, shorten
from .metrics import ROUNDED, is_count, mean, standard_error
from .report import EvaluationReport
from .results import ItemRecord, TaskResult, json_number
from .table import ResultTable, percentage, shared_prefix


@dataclass(frozen=True)
class Difference:
    """Two models in one metric, on the items that both have.

    Attributes:
        task: name of the task or group.
        shots: number of examples.
        metric: name of the metric.
        num_items: that both have.
        first: value of the first model on these, from 0 to 1.
        second: value of the second one.
        stderr: standard error of the difference, from the differences of the items; `None` for a single item.
        num_lost: items that only the first model has right; `None` for a metric that does not count.
        num_gained: items that only the second one has right.
        p_value: probability of flips at least as uneven as these if both models were equally good; `None` likewise.
        num_only_first: items that only the first run has.
        num_only_second: items that only the second one has.
        problems: of either run, such as "2 truncated".
    """

    task: str
    shots: int
    metric: str
    num_items: int
    first: float
    second: float
    stderr: float | None
    num_lost: int | None
    num_gained: int | None
    p_value: float | None
    num_only_first: int
    num_only_second: int
    problems: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """How much better the second model is, from -1 to 1."""
        return self.second - self.first


@dataclass(frozen=True)
class Comparison:
    """Two runs, item by item.

    Attributes:
        first: name of the first model, with its adapter and type.
        second: name of the second one.
        differences: by task and metric.
        only_first: tasks that only the first run has.
        only_second: tasks that only the second one has.
    """

    first: str
    second: str
    differences: tuple[Difference, ...]
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON; values that are not numbers are `None`."""
        values = asdict(self)
        values["differences"] = [
            {name: _for_json(value) for name, value in {**asdict(of), "difference": of.difference}.items()}
            for of in self.differences
        ]
        return values

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def table(self) -> ResultTable:
        """The table that the command line prints."""
        prefix = shared_prefix(list(dict.fromkeys(of.task for of in self.differences)))
        rows = [_row(of, prefix) for of in self.differences]
        shared = {
            at: rows[0][at]
            for at, name in enumerate(_HEADINGS)
            if name in _SHARED and len(rows) > 1 and len({row[at] for row in rows}) == 1
        }
        shown = [at for at in range(len(_HEADINGS)) if at not in shared]
        return ResultTable(
            [_HEADINGS[at] for at in shown],
            [[[row[at] for at in shown] for row in rows]],
            [f"tasks {prefix}"] * bool(prefix) + [f"{_HEADINGS[at]} {value}" for at, value in shared.items()],
            [0, 1],
            _NUM_KEYS,
            list(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        yield f"first: {self.first}"
        yield f"second: {self.second}"
        yield "lost: right only in the first; gained: right only in the second; p: McNemar's exact test"
        for of in {(of.task, of.shots): of for of in self.differences}.values():
            if of.problems:
                yield f"! {_label(of.task, of.shots)}: {', '.join(of.problems)}"
            if of.num_only_first or of.num_only_second:
                yield (
                    f"{_label(of.task, of.shots)}: {of.num_only_first:,} items only in the first run, "
                    f"{of.num_only_second:,} only in the second"
                )
        for which, tasks in (("first", self.only_first), ("second", self.only_second)):
            if tasks:
                yield f"only in the {which} run: {', '.join(tasks)}"


def compare(first: EvaluationReport, second: EvaluationReport) -> Comparison:
    """Compare two runs on the items that both have.

    A group is compared too, over the items of all its tasks.

    Raises:
        EvaluationError: if a run has no items, no task is in both, or an item was asked in different words.
    """
    ours, theirs = ({(of.task, of.shots): of for of in run.results} for run in (first, second))
    shared = [key for key in ours if key in theirs]
    if not shared:
        raise EvaluationError(f"no task is in both runs: {_named(ours)} in the first, {_named(theirs)} in the second")
    pairs = {key: _Pair.of(ours[key], theirs[key]) for key in shared}
    differences = [of for key in shared for of in pairs[key].differences(*key)]
    for group in first.groups:
        members = [pairs[key] for key in shared if key[0] in group.members and key[1] == group.shots]
        if members:
            differences += _Pair.joined(members).differences(group.task, group.shots)
    return Comparison(
        _described(first),
        _described(second),
        tuple(differences),
        tuple(_label(*key) for key in ours if key not in theirs),
        tuple(_label(*key) for key in theirs if key not in ours),
    )


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's exact test.

    It is the probability that fair coin tosses divide `lost + gained` at least as unevenly.
    """
    total, fewer = lost + gained, min(lost, gained)
    ways, tail = 1, 0
    for number in range(fewer + 1):
        tail += ways
        ways = ways * (total - number) // (number + 1)
    return min(1.0, 2 * tail / 2**total)


@dataclass(frozen=True)
class _Pair:
    """The items of a task, or of a group, that two runs have in common."""

    items: list[tuple[ItemRecord, ItemRecord]]
    num_only_first: int
    num_only_second: int
    problems: tuple[str, ...]

    @classmethod
    def of(cls, first: TaskResult, second: TaskResult) -> "_Pair":
        """Those of a task, each asked in the same words."""
        ours, theirs = ({item.index: item for item in of.items} for of in (first, second))
        for found, which in ((ours, "first"), (theirs, "second")):
            if not found:
                raise EvaluationError(f"the {which} run has no items of {first.task}; evaluate it again")
        items = [(ours[index], theirs[index]) for index in sorted(ours.keys() & theirs.keys())]
        if not items:
            raise EvaluationError(f"the two runs have no item of {first.task} in common")
        for one, other in items:
            if (one.prompt_hash, one.gold) != (other.prompt_hash, other.gold):
                raise EvaluationError(
                    f"{first.task}, item {one.index}: the two runs asked different questions; they differ in "
                    f"{_what_differs(first, second)}"
                )
        problems = [f"{text} in the first run" for text in first.problems]
        problems += [f"{text} in the second run" for text in second.problems]
        return cls(items, len(ours) - len(items), len(theirs) - len(items), tuple(problems))

    @classmethod
    def joined(cls, pairs: "Sequence[_Pair]") -> "_Pair":
        """Those of several tasks."""
        return cls(
            [item for pair in pairs for item in pair.items],
            sum(pair.num_only_first for pair in pairs),
            sum(pair.num_only_second for pair in pairs),
            tuple(dict.fromkeys(problem for pair in pairs for problem in pair.problems)),
        )

    def differences(self, task: str, shots: int) -> list[Difference]:
        """The difference in each metric that both runs have, but not of rounded scores."""
        one, other = self.items[0]
        names = [name for name in one.metrics if name in other.metrics and not name.endswith(ROUNDED)]
        return [self._difference(task, shots, name) for name in names]

    def _difference(self, task: str, shots: int, metric: str) -> Difference:
        values = [(one.metrics[metric], other.metrics[metric]) for one, other in self.items]
        counts = is_count(metric)
        lost = sum(one > other for one, other in values)
        gained = sum(one < other for one, other in values)
        return Difference(
            task=task,
            shots=shots,
            metric=metric,
            num_items=len(values),
            first=mean([one for one, _ in values]),
            second=mean([other for _, other in values]),
            stderr=standard_error([other - one for one, other in values]),
            num_lost=lost if counts else None,
            num_gained=gained if counts else None,
            p_value=mcnemar(lost, gained) if counts else None,
            num_only_first=self.num_only_first,
            num_only_second=self.num_only_second,
            problems=self.problems,
        )


def _what_differs(first: TaskResult, second: TaskResult) -> str:
    """The settings in which two results of a task differ, with their values."""
    found = [
        f"{name} ({getattr(first, name)} and {getattr(second, name)})"
        for name in ("protocol", "version", "data")
        if getattr(first, name) != getattr(second, name)
    ]
    return ", ".join(found) or "their prompts only"


_HEADINGS = (
    "task",
    "metric",
    "shots",
    "items",
    "first",
    "second",
    "points",
    "standard error",
    "lost",
    "gained",
    "p",
)
_NUM_KEYS = 2
_SHARED = ("shots", "items")  # headings of columns that are left out if all rows have the same value


def _row(of: Difference, prefix: str) -> list[str]:
    return [
        of.task.removeprefix(prefix) + (" !" if of.problems else ""),
        of.metric,
        str(of.shots),
        f"{of.num_items:,}",
        percentage(of.first),
        percentage(of.second),
        "" if math.isnan(of.difference) else f"{100 * of.difference:+.2f}",
        percentage(of.stderr),
        "" if of.num_lost is None else f"{of.num_lost:,}",
        "" if of.num_gained is None else f"{of.num_gained:,}",
        "" if of.p_value is None else f"{of.p_value:.3f}" if of.p_value >= 0.001 else f"{of.p_value:.0e}",
    ]


def _for_json(value: Any) -> Any:
    return json_number(value) if isinstance(value, float) else value


def _described(report: EvaluationReport) -> str:
    adapter = f" with adapter {report.adapter}" if report.adapter else ""
    return f"{report.model}{adapter}, {report.dtype}"


def _label(task: str, shots: int) -> str:
    return f"{task} ({shots} shots)" if shots else task


def _named(results: dict[tuple[str, int], TaskResult]) -> str:
    return shorten(_label(*key) for key in results) or "nothing"
