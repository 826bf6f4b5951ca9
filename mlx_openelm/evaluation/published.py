"""The accuracies that Apple published for OpenELM, by model, task and number of shots."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from ..errors import EvaluationError
from ..files.fields import Fields
from ..files.yaml_file import read_yaml_object
from .metrics import checked_metrics, is_count

_PATH = Path(__file__).parents[1] / "assets" / "published.yaml"
_MODEL = re.compile(r"openelm[-_]?(270m|450m|1[._]1b|3b)(?:[-_](instruct))?(?![a-z0-9])")
_COMMONSENSE = "commonsense/"  # begins the names of the tasks that were published for adapters alone


@dataclass(frozen=True)
class PublishedCell:
    """A task of a published table.

    Attributes:
        task: its name.
        shots: number of examples.
        num_items: size of the test set.
        metrics: what its figures may be; several, if the source does not say which, the likeliest first.
    """

    task: str
    shots: int
    num_items: int
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """A published accuracy.

    Attributes:
        percent: as printed.
        cell: the task.
        source: where it was published.
    """

    percent: float
    cell: PublishedCell
    source: str

    @property
    def num_right(self) -> float:
        """How many items were right: a whole number, except for `mc2`, a mean of probabilities."""
        count = self.percent * self.cell.num_items / 100
        return round(count) if all(map(is_count, self.cell.metrics)) else count


@dataclass(frozen=True)
class PublishedTable:
    """A table of the paper: its tasks, and per model a figure for each and their average, in percent."""

    name: str
    source: str
    cells: tuple[PublishedCell, ...]
    models: Mapping[str, tuple[float, ...]]


def published_model(model: str, has_adapter: bool = False) -> str | None:
    """Which published model a name or path stands for, such as "1.1B-Instruct"; `None` if it does not say.

    Args:
        model: a hub id or folder, such as "apple/OpenELM-1_1B-Instruct" or "models/OpenELM-270M-4bit".
        has_adapter: whether an adapter is used: then it is the size with "-LoRA", to be found in one table only.
    """
    found = _MODEL.search(Path(model).name.lower())
    if found is None:
        return None
    size = found[1].upper().replace("_", ".")
    if has_adapter:
        return f"{size}-LoRA"
    return f"{size}-Instruct" if found[2] else size


def published(
    model: str | None, task: str, shots: int, tables: Iterable[PublishedTable] | None = None
) -> Published | None:
    """The published figure of a model, by its name from `published_model`; `None` if there is none.

    Args:
        task: name of a task; a commonsense task may lack its prefix if no other task has that name.
        tables: where to look, in this order; several have the same figures.
    """
    name = full_name(task)
    if model is None:
        return None
    for table in published_tables().values() if tables is None else tables:
        for place, cell in enumerate(table.cells):
            if model in table.models and (cell.task, cell.shots) == (name, shots):
                return Published(table.models[model][place], cell, table.source)
    return None


def main_metric(task: str, metrics: Sequence[str]) -> str:
    """The metric by which a task is known: the likeliest of its published figures, else the first."""
    name = full_name(task)
    for table in published_tables().values():
        for cell in table.cells:
            if cell.task == name and cell.metrics[0] in metrics:
                return cell.metrics[0]
    return metrics[0]


def full_name(task: str) -> str:
    """The name of a task in the tables, for one that is given without its prefix."""
    names = {cell.task for table in published_tables().values() for cell in table.cells}
    return _COMMONSENSE + task if task not in names and _COMMONSENSE + task in names else task


@cache
def published_tables() -> Mapping[str, PublishedTable]:
    """All tables, by the name of their suite."""
    file = read_yaml_object(_PATH, EvaluationError)
    return MappingProxyType({name: _table(name, file.table(name)) for name in file})


def _table(name: str, fields: Fields) -> PublishedTable:
    cells = []
    for entry in fields.list_of("tasks", dict):
        task = Fields(entry, fields.where, EvaluationError)
        metrics = checked_metrics(task.list_of("metrics", str))
        cells.append(PublishedCell(task.text("task"), task.whole("shots"), task.whole("items", at_least=1), metrics))
    models = {model: tuple(map(float, row)) for model, row in fields.table("models").items()}
    assert all(len(row) == len(cells) + 1 for row in models.values()), f"{name}: a row is too short or too long"
    return PublishedTable(name, fields.text("source"), tuple(cells), MappingProxyType(models))
