"""Records for tuning, which are objects with named fields, read one by one from several types of files."""

import csv
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError, quoted
from .json_records import BrokenLines, json_objects
from .limits import LONGEST_TEXT, text_lines
from .text_files import open_text, parquet_rows

_COMPRESSED = (".gz", ".zst")
_COMPRESSIBLE = (".jsonl", ".json", ".csv")
RECORD_ENDINGS = (
    *(format_ending + compression for format_ending in _COMPRESSIBLE for compression in ("", *_COMPRESSED)),
    ".parquet",
)


def read_records(
    path: Path, broken: BrokenLines | None = None, fields: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Records of a `.jsonl`, `.json` or `.csv` file, which may be compressed (`.gz`, `.zst`), or of a `.parquet` file.

    A `.json` file contains a list of objects, an object with one such list in it, or one object per line. The first row
    of a `.csv` file names the fields.

    Args:
        fields: columns of a `.parquet` file to read; by default all.
        broken: counts skipped lines, which are not JSON objects or do not have as many cells as the header.
    Raises:
        DataError: naming the file and the line, if the file cannot be read or too many lines are broken.
    """
    broken = broken or BrokenLines(path)
    ending = (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix
    if path.suffix == ".parquet":
        yield from parquet_rows(path, fields)
        return
    if ending not in _COMPRESSIBLE:
        raise DataError(f"unsupported file type: {path} (choose from {', '.join((*_COMPRESSIBLE, '.parquet'))})")
    with open_text(path) as file:
        if ending == ".csv":
            yield from _csv_rows(file, path, broken)
        else:
            for _, record in json_objects(file, path, broken):
                yield record


def _csv_rows(file: TextIO, path: Path, broken: BrokenLines) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(LONGEST_TEXT)
    lines = text_lines(file, path)
    heading = next(lines, "")
    reader = csv.DictReader(chain([heading], lines), strict=True)
    num_read = 0
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if twice := [name for name, count in Counter(names).items() if name and count > 1]:
            raise DataError(f"{path}: several columns are named {quoted(twice[0])}")
        reader.fieldnames = names
        for row in reader:
            if None in row or None in row.values():  # how DictReader marks extra and missing cells
                broken.skip(reader.line_num, f"expected {len(reader.fieldnames or ())} cells, as in the header")
            elif ", " in heading and any(cell.startswith(' "') for cell in row.values()):
                raise DataError(f"{path}, line {reader.line_num}: a space before a quote; remove spaces after commas")
            else:
                num_read += 1
                yield row
        broken.check(num_read)
    except csv.Error as error:
        line = reader.reader.line_num  # `reader.line_num` is the line of the last readable row
        raise DataError(f"{path}, line {line}: {error}") from error
