"""Records to tune on, objects with named fields, read one after another from files of several kinds."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError
from .text_files import BrokenLines, open_text, parquet_rows

_PACKED = (".gz", ".zst")
_PACKABLE = (".jsonl", ".json", ".csv")
RECORD_ENDINGS = (*(kind + packed for kind in _PACKABLE for packed in ("", *_PACKED)), ".parquet")


def read_records(path: Path, broken: BrokenLines | None = None) -> Iterator[dict[str, Any]]:
    """Records of a `.jsonl`, `.json` or `.csv` file, each of them also packed (`.gz`, `.zst`), or of a `.parquet` file.

    A `.json` file holds a list of objects, an object with one such list in it, or an object a line. The first row of a
    `.csv` file names the fields.

    Args:
        broken: counts the lines that are passed over; they are no JSON, or do not have the header's number of cells.
    Raises:
        DataError: if the file cannot be read, or too many lines are broken; with the file and the line.
    """
    broken = broken or BrokenLines(path)
    ending = (path.with_suffix("") if path.suffix in _PACKED else path).suffix
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
        return
    if ending not in _PACKABLE:
        raise DataError(f"unsupported file type: {path} (choose from {', '.join((*_PACKABLE, '.parquet'))})")
    with open_text(path) as file:
        if ending == ".csv":
            yield from _csv_rows(file, path, broken)
        elif ending == ".jsonl":
            yield from _json_lines(file, broken)
        else:
            yield from _json_file(file.read(), path, broken)


def _json_lines(lines: Iterable[str], broken: BrokenLines) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parsed(line)
        if isinstance(record, dict):
            yield record
        else:
            broken.skip(number, "no JSON object")


def _json_file(text: str, path: Path, broken: BrokenLines) -> Iterator[dict[str, Any]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not isinstance(_parsed(text.lstrip().split("\n", 1)[0]), dict):
            raise DataError(f"{path} is not valid JSON: {error}") from error
        yield from _json_lines(io.StringIO(text), broken)
        return
    records = _list_within(value) if isinstance(value, dict) else value
    if not isinstance(records, list):
        raise DataError(f"{path} holds no list of objects")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(f"{path}, record {number}: no JSON object")
        yield record


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _list_within(value: dict[str, Any]) -> list[Any]:
    """The list of records that an object holds, or the object as the only record."""
    lists = [entry for name, entry in value.items() if isinstance(entry, list) and name != "messages"]
    is_wrapper = len(lists) == 1 and all(isinstance(entry, dict) for entry in lists[0])
    return lists[0] if is_wrapper else [value]


def _csv_rows(file: TextIO, path: Path, broken: BrokenLines) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():  # where DictReader puts cells too many, and too few
                broken.skip(reader.line_num, f"not the {len(reader.fieldnames or ())} cells that the header has")
            else:
                yield row
    except csv.Error as error:
        line = reader.reader.line_num  # `reader.line_num` is that of the last row that could be read
        raise DataError(f"{path}, line {line}: {error}") from error
