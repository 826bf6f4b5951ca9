"""A record as a question: its prompt, its choices and the right answer, as the templates of a task say."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import DataError, TaskError, one_line, quoted
from ..tokenizer.sandbox import compiled, compiled_expression, new_sandbox
from .task import Task

if TYPE_CHECKING:
    from jinja2 import Environment

_Evaluate = Callable[[Mapping[str, Any]], Any]
_MARK = re.compile(r"\[.*?\]")
_WORDS = ("answer", "ending", "option", "solution")


class Question(NamedTuple):
    """What is asked about a record.

    Attributes:
        prompts: the text before the answer, one for each choice: equal, except in tasks of kind `partial`.
        answers: the text that is scored for each choice: equal in tasks of kind `partial`.
        choices: the text of each choice.
        gold: positions of the right choices.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    gold: tuple[int, ...]


class QuestionReader:
    """Makes questions of a task's records.

    Raises:
        TaskError: naming the file and the field, if a template or an expression is not valid.
    """

    def __init__(self, task: Task):
        self._task = task
        self._prompt = self._template("prompt")
        self._description = self._template("description")
        self._ending = self._template("ending")
        self._continuation = self._template("continuation")
        self._choices = self._value("choices")
        self._labels = self._value("labels")
        self._gold = self._value("gold")

    def description(self, record: Mapping[str, Any], where: str) -> str:
        """The text before all examples."""
        return str(self._computed("description", self._description, record, where))

    def read(self, record: Mapping[str, Any], where: str) -> Question:
        """The question about a record.

        Args:
            where: what messages begin with.
        Raises:
            DataError: if a template cannot be rendered, the choices are not those that the task declares, or there is
                no right answer.
        """
        task = self._task
        choices = self._choice_texts(record, where)
        gold = self._positions(record, choices, where)
        if task.kind == "partial":
            ending = str(self._computed("ending", self._ending, record, where))
            return Question(choices, (ending,) * len(choices), choices, gold)
        prompt = str(self._computed("prompt", self._prompt, record, where))
        if task.continuation:
            choices = tuple(
                str(self._computed("continuation", self._continuation, {**record, "choice": choice}, where))
                for choice in choices
            )
        return Question((prompt,) * len(choices), choices, choices, gold)

    def _choice_texts(self, record: Mapping[str, Any], where: str) -> tuple[str, ...]:
        found = self._list("choices", self._choices, record, where)
        if wrong := [choice for choice in found if not isinstance(choice, str)]:
            raise DataError(f"{where}: a choice must be text; got {quoted(wrong[0])}")
        if "" in found and not self._task.answer_delimiter:  # after a blank, the harness scores the blank
            raise DataError(f"{where}: a choice is empty: {quoted(found)}")
        least, most = self._task.num_choices
        if not least <= len(found) <= most:
            expected = str(least) if least == most else f"{least} to {most}"
            raise DataError(f"{where}: {len(found)} choices; task {self._task.name} declares {expected}")
        return tuple(found)

    def _positions(self, record: Mapping[str, Any], choices: Sequence[str], where: str) -> tuple[int, ...]:
        """Positions of the right choices."""
        gold = self._computed("gold", self._gold, record, where)
        if self._task.kind == "mc2":
            if not isinstance(gold, list) or len(gold) != len(choices) or not all(value in (0, 1) for value in gold):
                raise DataError(f"{where}: {len(choices)} choices need a 0 or 1 each; got {quoted(gold)}")
            if 1 not in gold:
                raise DataError(f"{where} has no right answer: none of its choices is marked with 1")
            return tuple(place for place, value in enumerate(gold) if value)
        if gold is None or gold == "" or gold == -1:
            split = self._task.source.test_split
            hint = f"; the published questions with answers are those of split {split}" if split != "test" else ""
            raise DataError(f"{where} has no right answer: {self._task.gold} is {quoted(gold)}{hint}")
        if self._task.labels is not None:
            labels = self._list("labels", self._labels, record, where)
            if len(labels) != len(choices):
                raise DataError(f"{where}: {len(choices)} choices, but {len(labels)} labels: {quoted(labels)}")
            return (_place(gold, labels, "labels", where),)
        if isinstance(gold, str):
            return (_place(gold, choices, "choices", where),)
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise DataError(f"{where}: the right answer must be from 0 to {len(choices) - 1}; got {quoted(gold)}")
        return (int(gold),)

    def _list(self, name: str, evaluate: _Evaluate, record: Mapping[str, Any], where: str) -> list[Any]:
        found = self._computed(name, evaluate, record, where)
        if not isinstance(found, list | tuple):
            raise DataError(f"{where}: {name} must be a list; got {quoted(found)}")
        return list(found)

    def _computed(self, name: str, evaluate: _Evaluate, record: Mapping[str, Any], where: str) -> Any:
        try:
            return evaluate({**record, "topic": self._task.topic} if self._task.topic else record)
        except Exception as error:  # whatever a template's expressions raise
            raise DataError(f"{where}: {name} cannot be computed: {one_line(error)}") from error

    def _template(self, name: str) -> _Evaluate:
        text = getattr(self._task, name)
        if "{" not in text:
            return lambda values: text
        if "{" not in text.replace("{{ choice }}", ""):
            return lambda values: text.replace("{{ choice }}", values["choice"])
        with _naming(self._task, name):
            return compiled(_environment(), text)

    def _value(self, name: str) -> _Evaluate:
        """A list of texts as it is, or what an expression gives."""
        given = getattr(self._task, name)
        if not isinstance(given, str):
            return lambda values: given
        with _naming(self._task, name):
            return compiled_expression(_environment(), given)


@cache
def _environment() -> "Environment":
    from jinja2 import StrictUndefined

    environment = new_sandbox(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["clean_wikihow"] = _clean_wikihow
    environment.filters["offered_answers"] = _offered_answers
    return environment


@contextmanager
def _naming(task: Task, name: str) -> Iterator[None]:
    """Turn errors of a template into one that names the task's file and the field."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, RecursionError, ValueError) as error:
        raise TaskError(f"{task.path}: {name} is not valid: {one_line(error)}") from error


def _place(gold: Any, names: Sequence[Any], what: str, where: str) -> int:
    """The position of the right answer among the names of the choices."""
    if gold not in names:
        raise DataError(f"{where}: the right answer {quoted(gold)} is not among the {what} {quoted(list(names))}")
    return list(names).index(gold)


def _clean_wikihow(text: str) -> str:
    """HellaSwag's texts without the marks that are left from WikiHow's pages, as the harness cleans them."""
    text = _MARK.sub("", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _offered_answers(instruction: str) -> list[str]:
    """The answers that the last line of an instruction of LLM-Adapters offers, found as CoreNet finds them."""
    line = instruction.rpartition("\n")[2]
    if "Answer format: true/false" in line:
        return ["true", "false"]
    found = re.search(rf"Answer format: .*({'|'.join(_WORDS)})(\d)$", line)
    if found is None:
        raise ValueError(f"its last line offers no answers: {quoted(line)}")
    return [f"{found[1]}{number}" for number in range(1, int(found[2]) + 1)]
