"""Texts for training, read one by one from several types of files, so that memory does not grow with the corpus."""

import glob
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError, quoted
from ..files.paths import check_regular, is_file, is_folder, open_regular
from ..packages import optional_package
from .json_records import MAX_BROKEN, BrokenLines, json_objects
from .limits import BYTES_OF_ROW, PARQUET_ROWS, Unpacked, UnpackedLimit, ZstandardFrames, text_lines

SEPARATOR = "<|endoftext|>"  # a separate line between the documents of a .txt file
_NUMBERED = re.compile(r"\{file_id(:0(\d{1,2})d)?\}")
_UTF8 = "utf-8-sig"  # some editors and spreadsheets write a byte order mark, which is not part of the text


@dataclass(frozen=True)
class TextSource:
    """Files that belong together.

    Attributes:
        path: a file, a glob, or a CoreNet pattern with `{file_id:05d}` and a range.
        weight: how often a token of this source is seen, relative to those of other sources.
        text_key: field of a JSON line or column of a Parquet file that contains the text.
        first, last: range of `file_id`, inclusive.
    """

    path: str
    weight: float = 1.0
    text_key: str = "text"
    first: int = 0
    last: int = 0

    def files(self) -> list[Path]:
        """The files of the source, in order.

        Raises:
            DataError: if a file does not exist, a pattern matches nothing, or the weight is not positive.
        """
        if self.weight <= 0:
            raise DataError(f"the weight of {self.path} must be positive; got {self.weight}")
        names = [self.path]
        if _NUMBERED.search(self.path):
            names = [
                _NUMBERED.sub(lambda found, number=number: f"{number:0{found[2] or 1}d}", self.path)  # type: ignore[misc]
                for number in range(self.first, self.last + 1)
            ]
        return [path for name in names for path in _matches(name)]


def _matches(name: str) -> list[Path]:
    """The files of a path or a pattern.

    Raises:
        DataError: if there are none.
    """
    path = Path(name)
    if is_file(path):
        return [path]
    if is_folder(path):
        raise DataError(f"{name} is a folder; name its files, for example {path / '*.txt'}")
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    if found := [match for match in matches if is_file(match)]:
        return found
    current = Path.cwd()
    where = "" if path.is_absolute() else f"; the current folder is {current}"
    if matches:
        raise DataError(f"{name} matches only folders, such as {matches[0]}; name their files{where}")
    if not glob.has_magic(name):
        raise DataError(f"{name} does not exist{where}")
    folder = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    if not is_folder(folder):
        raise DataError(f"{name} matches no file: there is no folder {folder}{where}")
    raise DataError(f"{name} matches no file in {current / folder}")


def read_documents(path: Path, text_key: str = "text", max_broken: int = MAX_BROKEN) -> Iterator[str]:
    """Texts of a `.txt`, `.jsonl`, `.jsonl.gz`, `.jsonl.zst` or `.parquet` file.

    The documents of a `.txt` file are separated by lines of `<|endoftext|>`; without any, the file is one document.

    Args:
        max_broken: maximum number of broken JSON lines, which are skipped.
    Raises:
        DataError: naming the file and the line, if the file cannot be read or more lines are broken.
    """
    if path.suffix == ".parquet":
        for row in parquet_rows(path, [text_key]):
            if isinstance(row[text_key], str):
                yield row[text_key]
            elif row[text_key] is not None:
                raise DataError(f"{path}: column {text_key!r} must be text; got {quoted(row[text_key])}")
        return
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_json = any(suffix in (".jsonl", ".ndjson", ".json") for suffix in suffixes[-2:])
    if not is_json and any(suffix in (".csv", ".tsv", ".parquet", ".arrow") for suffix in suffixes[-2:]):
        raise DataError(f"{path} cannot be read as texts; convert it to .txt, .jsonl or .parquet")
    with open_text(path) as file:
        yield from _json_texts(file, path, text_key, BrokenLines(path, max_broken)) if is_json else _plain(file, path)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file, decompressed if its name ends in `.gz` or `.zst`.

    Raises:
        DataError: if the file cannot be read, here or later within the block.
    """
    broken: tuple[type[Exception], ...] = (OSError, EOFError, UnicodeDecodeError, zlib.error)
    try:
        if path.suffix == ".gz":
            with open_regular(path) as file, gzip.GzipFile(fileobj=file) as raw:
                yield _unpacked(raw, path)
        elif path.suffix == ".zst":
            zstandard = optional_package("zstandard", "Zstandard files need", "train")
            broken += (zstandard.ZstdError,)
            with open_regular(path) as file, ZstandardFrames(file, zstandard) as raw:
                yield _unpacked(raw, path)
        else:
            with io.TextIOWrapper(open_regular(path), encoding=_UTF8) as plain:
                yield plain
    except broken as error:
        raise _unreadable(path, error) from error


def parquet_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file as dicts by column name, with all columns or those of `columns` that exist.

    Other columns are not read, whatever types they have.

    Raises:
        DataError: if the file cannot be read or has none of the columns.
    """
    parquet = optional_package("pyarrow.parquet", "Parquet files need", "train")
    check_regular(path, DataError)
    try:
        limit = UnpackedLimit(path)
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        chosen = names if columns is None else [name for name in names if name in columns]
        if not chosen:
            raise DataError(
                f"{path} has no column {' or '.join(map(repr, sorted(columns or ())))}; it has {', '.join(names)}"
            )
        for batch in file.iter_batches(PARQUET_ROWS, columns=chosen):
            limit.add(batch.nbytes + batch.num_rows * BYTES_OF_ROW)
            yield from batch.to_pylist()
    except (OSError, ValueError, OverflowError, TypeError) as error:  # ArrowInvalid is a ValueError
        raise _unreadable(path, error) from error


def _unpacked(raw: Any, path: Path) -> TextIO:
    return io.TextIOWrapper(io.BufferedReader(Unpacked(raw, path), 1 << 17), encoding=_UTF8)


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"{path} cannot be read: it is not text in UTF-8")
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return DataError(f"{path} cannot be read: {reason}")


def _plain(file: TextIO, path: Path) -> Iterator[str]:
    lines: list[str] = []
    for line in text_lines(file, path):
        if line.strip() == SEPARATOR:
            yield "".join(lines).strip("\n")
            lines = []
        else:
            lines.append(line)
    yield "".join(lines).strip("\n")


def _json_texts(file: TextIO, path: Path, text_key: str, broken: BrokenLines) -> Iterator[str]:
    num_read = 0
    for number, record in json_objects(file, path, broken):
        text = record.get(text_key)
        if isinstance(text, str):
            num_read += 1
            yield text
        else:
            broken.skip(number, f"not a JSON object with text under {text_key!r}")
    broken.check(num_read)
