"""The files of a report, from which two runs are compared later.

results.json        everything but the items
items/TASK.jsonl    an item per line, without its texts
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..files.fields import Fields
from ..files.json_file import read_json_lines
from ..files.paths import exists, read_text
from .report import EvaluationReport
from .requests import Score
from .results import ItemRecord, json_number

RESULTS, ITEMS = "results.json", "items"


def report_files(report: EvaluationReport) -> Iterator[tuple[str, str]]:
    """Names and contents of the files of a report, for a folder."""
    for label, result in report.by_label().items():
        if result.items:
            yield f"{ITEMS}/{item_file_name(label)}", "".join(item_lines(result.items))
    yield RESULTS, report.to_json()


def read_report(folder: str | Path) -> EvaluationReport:
    """The report in such a folder, with the items of each task that has a file.

    Raises:
        EvaluationError: if there is none, or a file is damaged.
    """
    folder = Path(folder)
    if not exists(folder / RESULTS):
        raise EvaluationError(f"{folder} is not a finished evaluation: {RESULTS} is missing")
    report = EvaluationReport.from_json(read_text(folder / RESULTS, EvaluationError), str(folder / RESULTS))
    items = {}
    for label, result in report.by_label().items():
        path = folder / ITEMS / item_file_name(label)
        if exists(path):
            items[label] = read_items(path)
            if len(items[label]) != result.num_items:
                raise EvaluationError(f"{path} has {len(items[label]):,} items; expected {result.num_items:,}")
    return report.with_items(items)


def item_file_name(label: str) -> str:
    """Name of the file for a task, such as "commonsense__piqa.jsonl"."""
    return re.sub(r"[^\w.@-]", "__", label) + ".jsonl"


def item_lines(items: Iterable[ItemRecord]) -> Iterator[str]:
    """A line of JSON for each item; log-likelihoods that are not finite are null."""
    for item in items:
        values: dict[str, Any] = {
            "index": item.index,
            "prompt_hash": item.prompt_hash,
            "gold": item.gold,
            "log_likelihoods": [json_number(score.log_likelihood) for score in item.scores],
            "is_greedy": [score.is_greedy for score in item.scores],
            "is_truncated": [score.is_truncated for score in item.scores],
            "metrics": {name: json_number(value) for name, value in item.metrics.items()},
        }
        if any(score.rounded is not None for score in item.scores):
            values["rounded"] = [None if score.rounded is None else json_number(score.rounded) for score in item.scores]
        yield json.dumps(values) + "\n"


def read_items(path: str | Path) -> tuple[ItemRecord, ...]:
    """The items of such a file; what was not finite is NaN.

    Raises:
        EvaluationError: naming the line, if it is damaged, or an item occurs twice.
    """
    items = [_item(line) for line in read_json_lines(Path(path), EvaluationError)]
    seen: set[int] = set()
    for item in items:
        if item.index in seen:
            raise EvaluationError(f"{path}: item {item.index} occurs twice")
        seen.add(item.index)
    return tuple(items)


def _item(line: Fields) -> ItemRecord:
    likelihoods = _numbers(line, "log_likelihoods")
    greedy = line.list_of("is_greedy", bool)
    truncated = line.list_of("is_truncated", bool)
    rounded: list[Any] = _numbers(line, "rounded") if "rounded" in line else [None] * len(likelihoods)
    if not len(likelihoods) == len(greedy) == len(truncated) == len(rounded):
        raise EvaluationError(f"{line.where}: its lists differ in length")
    metrics = line.table("metrics")
    return ItemRecord(
        line.whole("index"),
        line.text("prompt_hash"),
        tuple(line.list_of("gold", int)),
        tuple(map(Score, likelihoods, greedy, truncated, rounded)),
        {name: _or_nan(metrics.number(name, None)) for name in metrics},
    )


_NUMBERS = (int, float, type(None))


def _numbers(line: Fields, name: str) -> list[float]:
    values = line.get(name)
    if not isinstance(values, list) or not all(type(value) in _NUMBERS for value in values):
        raise EvaluationError(f"{line.where}: {name} must be a list of numbers")
    return list(map(_or_nan, values))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
