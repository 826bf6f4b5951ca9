"""The records of a task: from a folder, or from the Hugging Face hub; each file with its hash and its origin."""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..data.json_records import BrokenLines
from ..data.record_files import RECORD_ENDINGS, read_records
from ..errors import DataError, TaskError, quoted, shorten
from ..files.paths import exists, is_file, is_folder, open_regular, user_path
from ..hub import DownloadedFile, download_data_file
from .task import Task
from .task_locks import DataLock, read_lock, write_lock

_EXAMPLE_SPLITS = ("train", "validation", "dev")
_LONGEST_LITERAL = 1 << 20  # characters


@dataclass(frozen=True)
class DataOrigin:
    """Where records come from.

    Attributes:
        path: of their file.
        sha256: of the file.
        num_records: in the file.
        repository, revision: on the hub, if the file was downloaded; empty for a local file.
        is_published: whether the file has the hash of the published one, which a downloaded file must have; where none
            is known, or only that of a file in another format, whether there are as many records as were published.
    """

    path: Path
    sha256: str
    num_records: int
    repository: str = ""
    revision: str = ""
    is_published: bool = False


@dataclass(frozen=True)
class Records:
    """The records of a file, with the fields of a task checked and converted."""

    path: Path
    rows: list[dict[str, Any]]
    origin: DataOrigin

    def where(self, index: int) -> str:
        """What messages about a record begin with."""
        return f"{self.path}, record {index + 1}"


class TaskData:
    """The data of a task: the records that are asked, and those that examples come from, which are read on first use.

    Attributes:
        test: the records that are asked.
    """

    def __init__(self, test: Records, read_examples: Callable[[], Records]):
        self.test = test
        self._read_examples = read_examples

    @property
    def origin(self) -> DataOrigin:
        """Where the records that are asked come from."""
        return self.test.origin

    @cached_property
    def examples(self) -> Records:
        """The records that examples come from.

        Raises:
            DataError: if there are none, or one does not fit the task.
        """
        return self._read_examples()


def read_task_data(task: Task, folder: str | Path | None = None) -> TaskData:
    """The data of a task.

    Args:
        folder: holds `TASK/test.jsonl` (or `.json`, `.parquet`, compressed or not), and `TASK/train.jsonl` for
            examples, which may also be called `validation` or `dev`. By default the data are downloaded from the hub
            unless they are cached, or are beside the task's own file if it names no repository.
    Raises:
        DataError: naming the file and the record, if there are no data, or a field is missing or has another type.
        SourceError: if they cannot be downloaded.
    """
    find = _local(task, user_path(folder)) if folder is not None else _published(task)
    test = _read(task, find("test"), "test", task.source.documents)

    def examples() -> Records:
        split = task.examples.split
        if split in ("test", task.source.test_split):
            return test
        return _read(task, find(split), split, None)

    return TaskData(test, examples)


@dataclass(frozen=True)
class _Found:
    path: Path
    download: DownloadedFile | None = None
    lock: DataLock | None = None


def _local(task: Task, folder: Path) -> Callable[[str], _Found]:
    """Finds the file of a split in a user's folder."""
    if not is_folder(folder):
        raise DataError(f"{folder} {'is not a folder' if exists(folder) else 'does not exist'}; expected one with data")
    names = [task.name, task.name.rpartition("/")[2]]
    if task.group:
        names.append(f"{task.group}/{task.name.removeprefix(f'{task.group}_')}")
    folders = [folder / name for name in dict.fromkeys(names)]
    existing = [place for place in folders if is_folder(place)]

    def find(split: str) -> _Found:
        splits = ("test", task.source.test_split) if split == "test" else (split, *_EXAMPLE_SPLITS)
        asked = find("test").path if split != "test" else None
        for name in dict.fromkeys(splits):
            found = [path for place in existing for path in _files(place, name) if path != asked]
            if len(found) > 1 and found[0].parent == found[1].parent:
                raise DataError(f"{found[0]} and {found[1].name} exist; keep one of them")
            if found:
                return _Found(found[0])
        what = f"the examples of task {task.name}" if split != "test" else f"task {task.name}"
        if _files(folder, "test"):
            raise DataError(f"{folder} has no folder for {what}; pass the folder that contains {folder.name}")
        expected = f"{folder / names[1]}/{splits[0]}.jsonl (or .json, .parquet)"
        raise DataError(f"{folder} has no data for {what}; expected {expected}")

    return find


def _files(folder: Path, split: str) -> list[Path]:
    names = [*(f"{split}{ending}" for ending in RECORD_ENDINGS), f"{split}-00000-of-00001.parquet"]
    return [folder / name for name in names if is_file(folder / name)]


def _published(task: Task) -> Callable[[str], _Found]:
    """Finds the file of a split on the hub, or beside the task's own file."""
    source = task.source

    def find(split: str) -> _Found:
        name = source.files.get(split)
        if name is None:
            what = f"the examples of task {task.name}" if split != "test" else f"task {task.name}"
            how = source.about or "pass the folder of its data as `data`"
            raise DataError(f"{what} cannot be downloaded; {how}")
        if not source.repository:
            return _Found(task.path.parent / name)
        lock = read_lock(source, split)
        if lock is not None:
            download = download_data_file(source.repository, lock.file, lock.revision)
        else:
            download = download_data_file(source.repository, name, source.revision or None)
        return _Found(download.path, download, lock)

    return find


def _read(task: Task, found: _Found, split: str, documents: int | None) -> Records:
    path = found.path
    digest = _file_hash(path)
    expected = task.source.sha256.get(split)
    if found.download is not None:
        expected = expected or (found.lock.sha256 if found.lock else digest)
        if digest != expected:
            raise DataError(
                f"{path} has another sha256 than {task.source.repository} had: expected {expected}, got {digest}; "
                "delete it to download it again, or pass a folder as `data` to use other data"
            )
        if found.lock is None:
            lock = DataLock(task.source.repository, found.download.revision, found.download.name, digest)
            write_lock(task.source, split, lock)
    rows = []
    for number, record in enumerate(read_records(path, BrokenLines(path, 0)), start=1):
        rows.append(_checked(task, record, f"{path}, record {number}"))
    if not rows:
        raise DataError(f"{path} has no records")
    repository, revision = (task.source.repository, found.download.revision) if found.download else ("", "")
    is_comparable = expected is not None and path.suffix == Path(task.source.files.get(split, "test.json")).suffix
    is_published = digest == expected if is_comparable or found.download else len(rows) == documents
    return Records(path, rows, DataOrigin(path, digest, len(rows), repository, revision, is_published))


def _file_hash(path: Path) -> str:
    digest = sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _checked(task: Task, record: dict[str, Any], where: str) -> dict[str, Any]:
    """A record with the types that the task declares; labels become numbers, literals lists."""
    for name, kind in task.fields.items():
        *outer, last = name.split(".")
        holder: Any = record
        for part in outer:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or (holder.get(last) is None and kind != "blank"):
            raise DataError(f"{where}: {name} is missing; its fields are {shorten(record, 12)}{_fitting(task, record)}")
        value = _CONVERTERS[kind](holder.get(last))
        if value is _WRONG:
            raise DataError(f"{where}: {name} must be {_EXPECTED[kind]}; got {quoted(holder.get(last))}")
        if value is not holder.get(last):
            record = _with(record, name.split("."), value)
    return record


def _with(record: dict[str, Any], names: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of a record in which the field that these names lead to has another value."""
    first, *others = names
    return {**record, first: _with(record[first], others, value) if others else value}


def _fitting(task: Task, record: Mapping[str, Any]) -> str:
    """A hint about another task of the same name whose fields a record has."""
    from .suites import find_tasks

    name = task.name.rpartition("/")[2]
    for other in (f"commonsense/{name}", name):
        if other != task.name:
            try:
                (found,) = find_tasks([other])
            except (TaskError, ValueError):
                continue
            if all(field.partition(".")[0] in record for field in found.fields):
                return f" (these are records of task {other})"
    return ""


_WRONG = object()


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else _WRONG


def _texts(value: Any) -> Any:
    return value if isinstance(value, list) and all(isinstance(entry, str) for entry in value) else _WRONG


def _label(value: Any) -> Any:
    """A position, which may be written as text or as true and false; -1 if it is left open."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 9:
        return int(value)
    if value == "":
        return -1
    return int(value) if isinstance(value, int) else _WRONG


def _numbers(value: Any) -> Any:
    return value if isinstance(value, list) and all(type(entry) is int for entry in value) else _WRONG


def _records(value: Any) -> Any:
    """A list of objects, which may be written as a Python literal."""
    if isinstance(value, str) and len(value) < _LONGEST_LITERAL:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return _WRONG
    is_list = isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)
    return value if is_list else _WRONG


def _blank(value: Any) -> Any:
    return value if value in (None, "") else _WRONG


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "text": _text,
    "texts": _texts,
    "label": _label,
    "numbers": _numbers,
    "records": _records,
    "blank": _blank,
}
_EXPECTED = {
    "text": "text",
    "texts": "a list of texts",
    "label": "a whole number, or one written as text",
    "numbers": "a list of whole numbers",
    "records": "a list of objects, or a text that spells one",
    "blank": "empty, because the prompt does not show it",
}
