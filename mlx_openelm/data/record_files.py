"""Records for tuning, which are objects with named fields, read one by one from several types of files."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError
from .text_files import BrokenLines, open_text, parquet_rows

_COMPRESSED = (".gz", ".zst")
_COMPRESSIBLE = (".jsonl", ".json", ".csv")
RECORD_ENDINGS = (
    *(format_ending + compression for format_ending in _COMPRESSIBLE for compression in ("", *_COMPRESSED)),
    ".parquet",
)


def read_records(path: Path, broken: BrokenLines | None = None) -> Iterator[dict[str, Any]]:
    """Records of a `.jsonl`, `.json` or `.csv` file, which may be compressed (`.gz`, `.zst`), or of a `.parquet` file.

    A `.json` file contains a list of objects, an object with one such list in it, or one object per line. The first row
    of a `.csv` file names the fields.

    Args:
        broken: counts skipped lines, which are not JSON objects or do not have as many cells as the header.
    Raises:
        DataError: naming the file and the line, if the file cannot be read or too many lines are broken.
    """
    broken = broken or BrokenLines(path)
    ending = (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
        return
    if ending not in _COMPRESSIBLE:
        raise DataError(f"unsupported file type: {path} (choose from {', '.join((*_COMPRESSIBLE, '.parquet'))})")
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
            broken.skip(number, "not a JSON object")


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
        raise DataError(f"{path} contains no list of objects")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(f"{path}, record {number}: not a JSON object")
        yield record


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _list_within(value: dict[str, Any]) -> list[Any]:
    """The list of records in an object, or the object itself as the only record."""
    lists = [entry for name, entry in value.items() if isinstance(entry, list) and name != "messages"]
    is_wrapper = len(lists) == 1 and all(isinstance(entry, dict) for entry in lists[0])
    return lists[0] if is_wrapper else [value]


def _csv_rows(file: TextIO, path: Path, broken: BrokenLines) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():  # how DictReader marks extra and missing cells
                broken.skip(reader.line_num, f"expected {len(reader.fieldnames or ())} cells, as in the header")
            else:
                yield row
    except csv.Error as error:
        line = reader.reader.line_num  # `reader.line_num` is the line of the last readable row
        raise DataError(f"{path}, line {line}: {error}") from error
