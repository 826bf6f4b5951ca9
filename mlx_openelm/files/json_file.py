"""The one reader of JSON: settings files, metadata strings, and files with one object per line.

    values = read_json_object(folder / "config.json", ConfigError)
    layers = values.whole("num_transformer_layers", at_least=1)

`values` is a dict with readers for typed fields; see `Fields`. Size, depth and numbers are limited, and every error is
one line with the name of the file.
"""

import json
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import OpenELMError
from .fields import Fields, check_values
from .paths import LARGEST_TEXT_BYTES, exists, open_regular, read_text

_LONGEST_LINE = 1 << 20  # bytes


def read_json_object(
    path: Path, error: type[OpenELMError], *, optional: bool = False, max_bytes: int = LARGEST_TEXT_BYTES
) -> Fields:
    """The JSON object in a file.

    Args:
        error: class of the errors that are raised.
        optional: a file that does not exist counts as an empty object.
    Raises:
        OpenELMError: as `error`, if the file cannot be read, is too large, or contains something else.
    """
    if optional and not exists(path):
        return Fields({}, str(path), error)
    return parse_json_object(read_text(path, error, max_bytes), str(path), error)


def read_json_lines(path: Path, error: type[OpenELMError]) -> Iterator[Fields]:
    """The objects of a file with one per line, such as `metrics.jsonl`.

    Raises:
        OpenELMError: as `error`, naming the line, if it is anything but a JSON object or longer than 1 MiB.
    """
    try:
        with open_regular(path) as file:
            for number in count(1):
                line = file.readline(_LONGEST_LINE + 1)
                if not line:
                    return
                where = f"{path}, line {number}"
                if len(line) > _LONGEST_LINE:
                    raise error(f"{where} is longer than {_LONGEST_LINE:,} bytes")
                yield parse_json_object(line.decode("utf-8", "replace").rstrip(), where, error)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from reason


def parse_json_object(text: str, where: str, error: type[OpenELMError]) -> Fields:
    """The JSON object in a text; `where` is what messages begin with."""
    values = parse_json(text, where, error)
    if not isinstance(values, dict):
        raise error(f"{where} must contain a JSON object")
    return Fields(values, where, error)


def parse_json(text: str, where: str, error: type[OpenELMError]) -> Any:
    """The JSON value in a text."""
    try:
        values = json.loads(text, object_pairs_hook=partial(unique_names, allow_equal=True))
    except RecursionError as reason:
        raise error(f"{where} is nested too deeply") from reason
    except json.JSONDecodeError as reason:
        line = f"line {reason.lineno}, " if "\n" in text.strip() else ""
        raise error(f"{where} is not valid JSON: {reason.msg} ({line}column {reason.colno})") from reason
    except DuplicateError as reason:
        raise error(f"{where} is not valid JSON: {str(reason)[:60]!r} occurs twice with different values") from reason
    except ValueError as reason:
        raise error(f"{where} is not valid JSON: a number has thousands of digits") from reason
    return check_values(values, where, error)


class DuplicateError(ValueError):
    """A JSON object with a name twice; its text is the name."""


def unique_names(pairs: list[tuple[str, Any]], allow_equal: bool = False) -> dict[str, Any]:
    """A dict of pairs, for `object_pairs_hook`.

    Args:
        allow_equal: accept a name that occurs twice with equal values.
    Raises:
        DuplicateError: if a name occurs twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for name, value in pairs:
            if (name in seen and not allow_equal) or values[name] != value:
                raise DuplicateError(name)
            seen.add(name)
    return values
