"""Texts to train on, read one after another from files of several kinds: memory does not grow with the corpus."""

import glob
import gzip
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from .errors import DataError
from .packages import optional_package

SEPARATOR = "<|endoftext|>"  # a line of its own between the documents of a .txt file
_NUMBERED = re.compile(r"\{file_id(:0\d+d)?\}")


@dataclass(frozen=True)
class Source:
    """Files that belong together.

    Attributes:
        path: a file, a glob, or a pattern of CoreNet with `{file_id:05d}` and a range.
        weight: how often a token of this source is seen, beside those of other sources.
        text_key: field of a JSON line or column of a Parquet file that holds the text.
        first, last: range of `file_id`, both included.
    """

    path: str
    weight: float = 1.0
    text_key: str = "text"
    first: int = 0
    last: int = 0

    def files(self) -> list[Path]:
        """The files that there are, in order.

        Raises:
            DataError: if there is none.
        """
        if self.weight <= 0:
            raise DataError(f"{self.path} has the weight {self.weight}; it has to be above 0")
        names = [self.path]
        if _NUMBERED.search(self.path):
            names = [self.path.format(file_id=number) for number in range(self.first, self.last + 1)]
        found = [Path(match) for name in names for match in sorted(glob.glob(name, recursive=True)) or [name]]
        for path in found:
            if not path.is_file():
                raise DataError(f"{path} does not exist")
        return found


def read_documents(path: Path, text_key: str = "text", max_broken: int = 10) -> Iterator[str]:
    """Texts of a `.txt`, `.jsonl`, `.jsonl.gz`, `.jsonl.zst` or `.parquet` file.

    The documents of a `.txt` file are separated by lines of `<|endoftext|>`; without any it is one document.

    Args:
        max_broken: lines of JSON that may be broken; they are passed over.
    Raises:
        DataError: if the file cannot be read, or more lines are broken; with the file and the line.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, text_key)
            return
        with _open(path) as file:
            is_json = ".jsonl" in path.suffixes or path.suffix == ".json"
            yield from _json_lines(file, path, text_key, max_broken) if is_json else _plain(file)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as text:
            yield text
    elif path.suffix == ".zst":
        zstandard = optional_package("zstandard", "Zstandard files need", "train")
        with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as raw:
            yield io.TextIOWrapper(raw, encoding="utf-8")
    else:
        with open(path, encoding="utf-8") as plain:
            yield plain


def _plain(file: TextIO) -> Iterator[str]:
    lines: list[str] = []
    for line in file:
        if line.strip() == SEPARATOR:
            yield "".join(lines).strip("\n")
            lines = []
        else:
            lines.append(line)
    yield "".join(lines).strip("\n")


def _json_lines(file: TextIO, path: Path, text_key: str, max_broken: int) -> Iterator[str]:
    broken = 0
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_key]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            broken += 1
            if broken > max_broken:
                raise DataError(
                    f"{path}, line {number}: no JSON with a text under {text_key!r}, and {broken - 1} lines before it "
                    "were broken too"
                ) from None
            continue
        yield text


def _parquet(path: Path, text_key: str) -> Iterator[str]:
    pyarrow_parquet = optional_package("pyarrow.parquet", "Parquet files need", "train")
    file = pyarrow_parquet.ParquetFile(path)
    if text_key not in file.schema_arrow.names:
        raise DataError(f"{path} has no column {text_key!r}; it has {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(columns=[text_key]):
        for text in batch.column(0).to_pylist():
            if isinstance(text, str):
                yield text
