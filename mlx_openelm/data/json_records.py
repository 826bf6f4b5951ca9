"""Objects in a JSON file, whatever its name says: one per line, an array, or written over several lines."""

import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError
from .limits import LONGEST_TEXT, text_lines

MAX_BROKEN = 10
_LONE_SURROGATE = "contains a lone surrogate, which is not valid Unicode"


class BrokenLines:
    """Lines of a file that are skipped, up to a limit.

    Attributes:
        count: number of lines skipped so far.
        first: number of the first one, and what is wrong with it.
    """

    def __init__(self, path: Path, limit: int = MAX_BROKEN):
        self.count = 0
        self._path = path
        self._limit = limit
        self.first = ""

    def skip(self, number: int, reason: str) -> None:
        """Skip one line.

        Raises:
            DataError: if the limit is already reached.
        """
        if self.count == self._limit:
            before = f" (broken lines before it: {self.count})" if self.count else ""
            raise DataError(f"{self._path}, line {number}: {reason}{before}")
        self.first = self.first or f"line {number}: {reason}"
        self.count += 1

    def check(self, num_read: int) -> None:
        """Raise DataError if more lines of the file were skipped than read: it is probably in another format."""
        if self.count > num_read:
            raise DataError(f"{self._path}: {self.count} of {self.count + num_read} lines are broken; {self.first}")


def json_objects(file: TextIO, path: Path, broken: BrokenLines) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file: JSON lines, one array, one object with such an array in it, or objects one after another.

    JSON lines are read one by one; everything else is read as a whole. Yields each object with its line, or with its
    number if the file is not JSON lines.

    Args:
        broken: counts lines that are not JSON objects and are skipped.
    Raises:
        DataError: naming the file and the line, if it is not JSON, or if more lines are broken than read.
    """
    lines = ((number, line) for number, line in enumerate(text_lines(file, path), start=1) if line.strip())
    start, first = next(lines, (1, ""))
    if isinstance(_parsed(first), dict) or _ends_in_comma(first):
        more = list(islice(lines, 1))
        if more or _ends_in_comma(first):
            yield from _from_lines(chain([(start, first)], more, lines), path, broken)
            return
    text = first + file.read(LONGEST_TEXT)
    if len(text) >= LONGEST_TEXT:
        raise DataError(f"{path} is longer than {LONGEST_TEXT:,} characters; write it with one object per line")
    try:
        values = list(_values(text))
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] == "[":
            raise DataError(f"{path} is a JSON array that cannot be parsed: {error}") from error
        following = list(enumerate(text.splitlines(), start=start))
        if not any(isinstance(_parsed(line), dict) for _, line in following):
            raise DataError(f"{path} is not valid JSON: {error}") from error
        yield from _from_lines([(number, line) for number, line in following if line.strip()], path, broken)
        return
    records = values
    if len(values) == 1:
        records = _list_within(values[0]) if isinstance(values[0], dict) else values[0]
    if not isinstance(records, list):
        raise DataError(f"{path} contains no list of objects")
    num_read = 0
    has_surrogates = _may_have_surrogates(text)  # once: the text is that of all records
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(f"{path}, record {number}: not a JSON object")
        if not has_surrogates or _is_unicode(record):
            num_read += 1
            yield number, record
        else:
            broken.skip(number, _LONE_SURROGATE)
    if num_read:  # with none, the caller says so with the first reason
        broken.check(num_read)


def _from_lines(
    lines: Iterable[tuple[int, str]], path: Path, broken: BrokenLines
) -> Iterator[tuple[int, dict[str, Any]]]:
    num_read = 0
    for number, line in lines:
        record = _parsed(line)
        if isinstance(record, dict) and (not _may_have_surrogates(line) or _is_unicode(record)):
            num_read += 1
            yield number, record
        elif isinstance(record, dict):
            broken.skip(number, _LONE_SURROGATE)
        elif _ends_in_comma(line):
            raise DataError(f"{path}, line {number}: ends in a comma; JSON lines have no commas between them")
        else:
            broken.skip(number, "not a JSON object")
    broken.check(num_read)


def _values(text: str) -> Iterator[Any]:
    """JSON values one after another, with nothing but white space between them."""
    decoder = json.JSONDecoder()
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        value, position = decoder.raw_decode(text, position)
        yield value


def _may_have_surrogates(text: str) -> bool:
    """Whether a JSON text has escapes of surrogates; only these can bring in lone ones."""
    return "\\ud" in text or "\\uD" in text


def _is_unicode(value: Any) -> bool:
    """Whether no string of a value has a lone surrogate."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _ends_in_comma(line: str) -> bool:
    """Whether a line is an object with a comma after it."""
    return line.rstrip().endswith(",") and isinstance(_parsed(line.rstrip()[:-1]), dict)


def _list_within(value: dict[str, Any]) -> list[Any]:
    """The list of records in an object, or the object itself as the only record."""
    lists = [entry for name, entry in value.items() if isinstance(entry, list) and name != "messages"]
    is_wrapper = len(lists) == 1 and all(isinstance(entry, dict) for entry in lists[0])
    return lists[0] if is_wrapper else [value]
