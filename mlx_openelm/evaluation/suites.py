"""Tasks by name: those that come with the package, groups and suites of them, and a user's own files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from ..errors import TaskError, quoted
from ..files.paths import exists, user_path
from ..files.yaml_file import read_yaml_object
from .task import Task, read_tasks

_FOLDER = Path(__file__).parent.parent / "assets" / "tasks"
_SUITES = _FOLDER / "suites.yaml"
_ENDINGS = (".yaml", ".yml")
_ELSEWHERE = {  # names of other programs and papers
    "siqa": "social-i-qa",
    "social-iqa": "social-i-qa",
    "obqa": "openbookqa",
    "arc-e": "arc-easy",
    "arc-c": "arc-challenge",
    "crows-pairs": "crows-pairs-english",
    "truthfulqa": "truthfulqa-mc2",
    "zeroshot": "zero-shot",
    "open-llm": "openllm",
    "leaderboard": "openllm",
}


def find_tasks(names: str | Sequence[str]) -> list[Task]:
    """The tasks of these names, each with its number of examples; a task that several names lead to occurs once.

    Args:
        names: of tasks, of groups (`mmlu`), of suites (`zero-shot`, `openllm`, `llm360`, `commonsense`), patterns like
            `mmlu_high_school_*`, or paths of task files (.yaml). A text may hold several, with commas between them.
            `commonsense/openbookqa` may be written `openbookqa`, because no other task has that name.
    Raises:
        TaskError: if there are no names, or one is unknown, with similar ones; or if a task file is not valid.
    """
    wanted = [name for text in ([names] if isinstance(names, str) else names) for name in _split(text)]
    if not wanted:
        raise TaskError(f"no tasks given (choose from {', '.join(suites())}, or the tasks themselves)")
    found: dict[tuple[str, int, Path], Task] = {}
    for name in wanted:
        for task in _named(name):
            found.setdefault((task.name, task.shots, task.path), task)
    return list(found.values())


@cache
def suites() -> dict[str, dict[str, int]]:
    """The suites: numbers of examples by the names of their tasks."""
    values = read_yaml_object(_SUITES, TaskError)
    return {name: {task: values.table(name).whole(task) for task in values.table(name)} for name in values}


def task_names() -> list[str]:
    """The names of all tasks, groups and suites that come with the package."""
    library = _library()
    return [*suites(), *library.groups, *library.tasks]


@dataclass(frozen=True)
class _Library:
    tasks: dict[str, Task]
    groups: dict[str, list[Task]]


@cache
def _library() -> _Library:
    """All tasks that come with the package."""
    found = [task for path in sorted(_FOLDER.glob("*.yaml")) if path != _SUITES for task in read_tasks(path)]
    groups: dict[str, list[Task]] = {}
    for task in found:
        if task.group:
            groups.setdefault(task.group, []).append(task)
    return _Library({task.name: task for task in found}, groups)


def _split(text: str) -> Iterable[str]:
    """The names in a text: the text itself if it is a path with commas in it."""
    if "," in text and text.endswith(_ENDINGS) and exists(user_path(text)):
        return [text]
    return [name.strip() for name in text.split(",") if name.strip()]


def _named(name: str) -> list[Task]:
    if name in suites():
        return [task.with_shots(shots) for member, shots in suites()[name].items() for task in _named(member)]
    if name.endswith(_ENDINGS):
        path = user_path(name)
        if not exists(path):
            raise TaskError(f"{name} does not exist; expected a task file")
        return read_tasks(path)
    library = _library()
    if name in library.groups:
        return library.groups[name]
    if name in library.tasks:
        return [library.tasks[name]]
    parts = [task for task in library.tasks.values() if task.name.rpartition("/")[2] == name]
    if len(parts) == 1:
        return parts
    if any(character in name for character in "*?["):
        matches = [task for task in library.tasks.values() if fnmatchcase(task.name, name)]
        if matches:
            return matches
        raise TaskError(f"no task matches {quoted(name)}")
    raise TaskError(f"unknown task {quoted(name)}{_similar(name)}")


def _similar(name: str) -> str:
    """A hint about names like one that does not exist."""
    from difflib import get_close_matches

    spellings: dict[str, list[str]] = {}
    for known in task_names():
        for spelling in dict.fromkeys((_plain(known), _plain(known.rpartition("/")[2]))):
            spellings.setdefault(spelling, []).append(known)
    plain = _ELSEWHERE.get(_plain(name), _plain(name))
    close = [plain] if plain in spellings else get_close_matches(plain, spellings, 3, 0.6)
    known_names = dict.fromkeys(known for spelling in close for known in sorted(spellings[spelling], key=len))
    if known_names:
        return f"; did you mean {' or '.join(list(known_names)[:3])}?"
    return f" (suites: {', '.join(suites())}; a task file ends in .yaml)"


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
