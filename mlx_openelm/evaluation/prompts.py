"""The requests of a task, as the harness makes them: examples, prompts and answers."""

import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from random import Random
from typing import Any

from ..errors import DataError, TaskError, quoted
from .items import Item
from .questions import QuestionReader
from .requests import Request
from .task import Task
from .task_data import Records, TaskData

_SEED = 1234  # the harness's


def items(
    task: Task, data: TaskData, *, shots: int | None = None, limit: int | None = None, protocol: str = "current"
) -> Iterator[Item]:
    """The items of a task one by one, in the order of its data.

    Args:
        shots: number of examples; by default the task's.
        limit: number of items, the first ones; by default all.
        protocol: `current`, as lm-eval 0.4.13 asks, or `paper`, as it asked at the commit that the paper names.
    Raises:
        TaskError: if an argument or a template is not valid. Raised at once, before the first item.
        DataError: naming file and record, if a record does not fit the task, or there are too few examples.
    """
    if shots is not None:
        task = task.with_shots(shots)
    if limit is not None and limit < 1:
        raise TaskError(f"limit must be at least 1; got {quoted(limit)}")
    task = task.under(protocol)
    examples = _Examples(task, data, QuestionReader(task), is_paper=protocol == "paper")
    return _items(task, data.test, examples, limit)


def check_records(task: Task, data: TaskData, *, limit: int | None = None, protocol: str = "current") -> None:
    """Check that every record that will be asked fits the task, before any is scored.

    Raises:
        DataError: naming the file and the first record that does not.
    """
    records, reader = data.test, QuestionReader(task.under(protocol))
    for index, record in enumerate(islice(records.rows, limit)):
        reader.read(record, records.where(index))


def prompt_hash(items: Iterable[Item]) -> str:
    """A sha256 over all requests: equal for equal prompts, whatever the files they came from."""
    digest = sha256()
    for item in items:
        for request in item.requests:
            digest.update(json.dumps(request).encode() + b"\n")
    return digest.hexdigest()


def _items(task: Task, records: Records, examples: "_Examples", limit: int | None) -> Iterator[Item]:
    for index, record in enumerate(islice(records.rows, limit)):
        where = records.where(index)
        before = examples.reader.description(record, where) + examples.before(record, where)
        question = examples.reader.read(record, where)
        requests = [
            Request(before + prompt, task.answer_delimiter + answer)
            for prompt, answer in zip(question.prompts, question.answers, strict=True)
        ]
        yield Item(index, tuple(requests), question.choices, question.gold)


class _Examples:
    """The examples before each question, drawn as the harness draws them.

    One generator serves all questions of a task in their order, so the examples of a question depend on its position
    and on the order and number of the records that they are drawn from.
    """

    def __init__(self, task: Task, data: TaskData, reader: QuestionReader, *, is_paper: bool):
        """`is_paper`: a question among its own examples is left out and not made up for, as it was at that time."""
        self.reader = reader
        self._task = task
        self._is_paper = is_paper
        self._random = Random(_SEED)
        self._texts: dict[int, str] = {}  # by the position of the record
        self._num_drawn = task.shots + task.examples.skip_equal
        self._pool = data.examples if task.shots else None
        if self._pool is not None and len(self._pool.rows) < self._num_drawn:
            raise DataError(
                f"{self._pool.path} has {len(self._pool.rows):,} records; {task.shots} examples of task {task.name} "
                f"need at least {self._num_drawn}: add records, or lower `shots`"
            )

    def before(self, record: dict[str, Any], where: str) -> str:
        """The text of all examples before a question."""
        if self._pool is None:
            return ""
        chosen = self._chosen(record, self._pool.rows, where)
        return "".join(self._text(index, self._pool) for index in chosen) or self._task.examples.delimiter

    def _chosen(self, record: dict[str, Any], rows: Sequence[dict[str, Any]], where: str) -> Sequence[int]:
        """Positions of the examples."""
        shots, rule = self._task.shots, self._task.examples
        is_random = rule.sampler == "random"
        numbers = range(len(rows))
        drawn = self._random.sample(numbers, self._num_drawn) if is_random else numbers[: self._num_drawn]
        if not rule.skip_equal and not self._is_paper:
            return drawn
        others = [index for index in drawn if rows[index] != record][:shots]
        if len(others) == shots or self._is_paper:
            return others
        pool = [index for index in numbers if rows[index] != record]
        if len(pool) < shots:
            raise DataError(f"{where}: only {len(pool)} records differ from it; {shots} examples are needed")
        return self._random.sample(pool, shots) if is_random else pool[:shots]

    def _text(self, index: int, pool: Records) -> str:
        if index not in self._texts:
            question = self.reader.read(pool.rows[index], pool.where(index))
            right = question.gold[0]
            answer = self._task.answer_delimiter + question.answers[right]
            self._texts[index] = question.prompts[right] + answer + self._task.examples.delimiter
        return self._texts[index]
