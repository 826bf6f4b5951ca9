"""A task: what is asked of which data, read from a small YAML file. `docs/evaluate.md` describes its fields."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import TaskError, quoted, shorten
from ..files.fields import Fields
from ..files.yaml_file import read_yaml_object

PROTOCOLS = ("current", "paper")
METRICS = {  # of each kind
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "partial": ("acc", "acc_norm", "acc_bytes"),
    "mc2": ("acc",),
    "stereotype": ("pct_stereotype", "likelihood_diff"),
}
KINDS = tuple(METRICS)
SAMPLERS = ("random", "first_n")
TYPES = ("text", "texts", "label", "numbers", "records", "blank")
_OF_PAPER = ("version", "description", "prompt", "choices", "gold")
_MOST_CHOICES, _MOST_SHOTS = 1000, 1000
_LONGEST_NAME = 100
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")  # also of files, so no part begins with a dot
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = (
    *("name", "group", "version", "kind", "licence", "documents", "data", "sha256", "fields", "description", "prompt"),
    *("choices", "num_choices", "labels", "gold", "ending", "continuation", "answer_delimiter", "shots", "metrics"),
    *("paper", "variants"),
)


@dataclass(frozen=True)
class DataSource:
    """Where the data of a task are published.

    Attributes:
        repository: of a data set on the Hugging Face hub; empty if it is not there.
        revision: commit of the repository; empty: the newest at the first download, which is recorded.
        files: the path of each split's file in the repository, by split; `*` stands for any part of a name.
        test_split: the published name of the split that is asked.
        about: what to do where nothing can be downloaded.
        sha256: hashes of published files by split.
        documents: number of records that are asked; `None` if unknown.
        licence: of the data.
    """

    repository: str = ""
    revision: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    test_split: str = "test"
    about: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    documents: int | None = None
    licence: str = ""


@dataclass(frozen=True)
class ShotRule:
    """How the examples before a question are chosen.

    Attributes:
        split: that they come from; `test`: the records that are asked.
        sampler: `random`, drawn anew for each question, or the `first_n`.
        skip_equal: draw one more than needed, and leave out one that equals the question, as the harness does where a
            task's test split has no answers.
        fixed: the number of examples cannot be chosen.
        delimiter: text after each example.
    """

    split: str = "train"
    sampler: str = "random"
    skip_equal: bool = False
    fixed: bool = False
    delimiter: str = "\n\n"


@dataclass(frozen=True)
class Task:
    """What is asked, and how. Texts in braces are Jinja templates of a record's fields; expressions are Jinja's too.

    Attributes:
        name: as it is given on the command line.
        version: changes with anything that changes a prompt.
        shots: number of examples before each question.
        metrics: names of what is measured, in the order in which it is shown.
        kind: `multiple_choice`; `partial`: the choices are contexts, of which the one that makes `ending` likeliest is
            taken; `mc2`: the share of the probability of the right choices; `stereotype`: how often the first choice
            is the likelier.
        group: the tasks of a group are averaged by size.
        topic: what `{{ topic }}` stands for; the name of the variant, with blanks for underscores.
        source: where the data come from.
        fields: the type of each field that records must have; `a.b` is a field of an object.
        description: template of the text before all examples.
        prompt: template of a question.
        choices: an expression for a list of texts, or the texts.
        num_choices: the least and the largest number of choices.
        labels: an expression for the names of the choices, or the names; `None`: they have none.
        gold: an expression: the position of the right choice, or its label or text; for `mc2`, 1 or 0 for each choice.
        ending: template of what is scored after each choice, for `partial`.
        continuation: template of a choice's text, if that is more than the choice; `{{ choice }}` stands for it.
        answer_delimiter: between a prompt and an answer.
        examples: how examples are chosen.
        paper: the fields that differ in the paper's protocol.
        path: the file that the task was read from.
    """

    name: str
    version: str
    shots: int
    metrics: tuple[str, ...]
    kind: str
    group: str
    topic: str
    source: DataSource
    fields: Mapping[str, str]
    description: str
    prompt: str
    choices: str | tuple[str, ...]
    num_choices: tuple[int, int]
    labels: str | tuple[str, ...] | None
    gold: str
    ending: str
    continuation: str
    answer_delimiter: str
    examples: ShotRule
    paper: Mapping[str, Any]
    path: Path

    def with_shots(self, shots: int) -> "Task":
        """The task with this number of examples, unless its number is fixed.

        Raises:
            TaskError: if the number is not from 0 to 1,000.
        """
        if not 0 <= shots <= _MOST_SHOTS:
            raise TaskError(f"shots must be from 0 to {_MOST_SHOTS:,}; got {quoted(shots)}")
        return self if self.examples.fixed else replace(self, shots=shots)

    def under(self, protocol: str) -> "Task":
        """The task as a protocol asks it: `current`, or the `paper`'s.

        Raises:
            TaskError: if the protocol is unknown.
        """
        if protocol not in PROTOCOLS:
            raise TaskError(f"unknown protocol {quoted(protocol)} (choose from {', '.join(PROTOCOLS)})")
        return replace(self, **self.paper) if protocol == "paper" else self


def read_tasks(path: Path) -> list[Task]:
    """The task in a file, or its variants.

    Raises:
        TaskError: naming the file and the field, if it cannot be read or is not valid.
    """
    values = read_yaml_object(path, TaskError)
    _check_names(values, _FIELDS)
    variants = values.table("variants")
    if not variants:
        return [_task(values, path, "")]
    if "{variant}" not in values.text("name"):
        raise TaskError(f"{path}: the name of a task with variants must contain {{variant}}")
    tasks = []
    for variant in variants:
        changes = variants.table(variant)
        _check_names(changes, [name for name in _FIELDS if name not in ("name", "group", "variants")])
        tasks.append(_task(Fields({**values, **changes}, f"{path}: {variant}", TaskError), path, variant))
    return tasks


def _task(values: Fields, path: Path, variant: str) -> Task:
    shots = values.table("shots")
    _check_names(shots, ("default", "split", "sampler", "skip_equal", "fixed", "delimiter"))
    rule = ShotRule(
        shots.text("split", ShotRule.split),
        shots.text("sampler", ShotRule.sampler, SAMPLERS),
        shots.flag("skip_equal", ShotRule.skip_equal),
        shots.flag("fixed", ShotRule.fixed),
        shots.text("delimiter", ShotRule.delimiter),
    )
    kind = values.text("kind", KINDS[0], KINDS)
    choices = _texts_or_expression(values, "choices")
    if choices is None:
        raise TaskError(f"{values.where}: choices is missing")
    name = values.text("name").replace("{variant}", variant)
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise TaskError(f"{values.where}: name must be of letters, digits, _, -, . and /; got {quoted(name)}")
    task = Task(
        name=name,
        version=values.text("version"),
        shots=shots.whole("default", 0, at_most=_MOST_SHOTS),
        metrics=_metrics(values, kind),
        kind=kind,
        group=values.text("group", ""),
        topic=variant.replace("_", " "),
        source=_source(values, variant),
        fields=_record_fields(values),
        description=values.text("description", ""),
        prompt=values.text("prompt", ""),
        choices=choices,
        num_choices=_num_choices(values, choices),
        labels=_texts_or_expression(values, "labels"),
        gold=values.text("gold"),
        ending=values.text("ending") if kind == "partial" else values.text("ending", ""),
        continuation=values.text("continuation", ""),
        answer_delimiter=values.text("answer_delimiter", " "),
        examples=rule,
        paper=_of_paper(values),
        path=path,
    )
    _check_consistent(task, values)
    return task


def _check_consistent(task: Task, values: Fields) -> None:
    """Refuse fields that the kind of the task does not use, which a reader would believe."""
    if task.kind != "partial" and task.ending:
        raise TaskError(f"{values.where}: ending belongs to kind partial; this task is {task.kind}")
    if task.kind == "partial" and (task.prompt or task.continuation):
        raise TaskError(f"{values.where}: in kind partial, the choices are the prompts; remove prompt and continuation")
    for name, value in (("gold", task.gold), ("choices", task.choices), ("labels", task.labels)):
        if isinstance(value, str) and "{{" in value:
            raise TaskError(
                f"{values.where}: {name} is an expression, so it is written without braces; got {quoted(value)}"
            )


def _metrics(values: Fields, kind: str) -> tuple[str, ...]:
    allowed = METRICS[kind]
    names = values.list_of("metrics", str, allowed[:1])
    if unknown := [name for name in names if name not in allowed]:
        raise TaskError(
            f"{values.where}: unknown metric for kind {kind}: {shorten(unknown)} (choose from {', '.join(allowed)})"
        )
    if not names:
        raise TaskError(f"{values.where}: metrics must name at least one (choose from {', '.join(allowed)})")
    return tuple(names)


def _source(values: Fields, variant: str) -> DataSource:
    data = values.table("data")
    _check_names(data, ("repository", "revision", "files", "test_split", "about"))
    files, hashes = data.table("files"), values.table("sha256")
    for split in hashes:
        if not _SHA256.fullmatch(hashes.text(split).lower()):
            raise TaskError(f"{hashes.where}: {split} must have 64 hexadecimal digits; got {quoted(hashes[split])}")
    return DataSource(
        data.text("repository", ""),
        data.text("revision", ""),
        {split: files.text(split).replace("{variant}", variant) for split in files},
        data.text("test_split", DataSource.test_split),
        data.text("about", ""),
        {split: hashes.text(split).lower() for split in hashes},
        values.whole("documents", None, at_least=1),
        values.text("licence", ""),
    )


def _record_fields(values: Fields) -> dict[str, str]:
    found = values.table("fields")
    return {name: found.text(name, choices=TYPES) for name in found}


def _texts_or_expression(values: Fields, name: str) -> str | tuple[str, ...] | None:
    if isinstance(values.get(name), str | None):
        expression: str | None = values.text(name, None)
        return expression
    return tuple(values.list_of(name, str))


def _num_choices(values: Fields, choices: str | tuple[str, ...]) -> tuple[int, int]:
    """The limits in the file; by default, the number of given choices, or at least two."""
    found = values.get("num_choices")
    if isinstance(found, list):
        least, most = (*values.list_of("num_choices", int), 0, 0)[:2]
        if len(found) != 2 or not 1 <= least <= most <= _MOST_CHOICES:
            raise TaskError(f"{values.where}: num_choices must be a number, or the least and the largest; got {found}")
        return least, most
    number = values.whole("num_choices", None, at_least=1, at_most=_MOST_CHOICES)
    if not isinstance(choices, str):
        return len(choices), len(choices)
    return (2, _MOST_CHOICES) if number is None else (number, number)


def _of_paper(values: Fields) -> dict[str, Any]:
    paper = values.table("paper")
    _check_names(paper, _OF_PAPER)
    return {name: paper.text(name) for name in paper}


def _check_names(values: Fields, known: Sequence[str]) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        from difflib import get_close_matches

        close = [match[0] for name in unknown if (match := get_close_matches(name, known, 1))]
        hint = f"did you mean {shorten(close)}?" if close else f"choose from {', '.join(known)}"
        raise TaskError(f"{values.where}: unknown field: {shorten(unknown)} ({hint})")
