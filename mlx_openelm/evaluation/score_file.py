"""Results that outlive a run: scores and generated texts, in files to which they are added as they come."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import EvaluationError
from ..files.fields import Fields
from ..files.json_file import parse_json_object
from ..files.paths import exists, read_bytes
from .requests import Request, Score

_FORMAT = 1
_LARGEST_FILE = 1 << 30  # bytes
_KEY_DIGITS = 32
_INFINITE = -math.inf, math.inf

Value = TypeVar("Value")


def prompt_key(request: Any) -> str:
    """A hash of what was asked: a request, or any values that JSON holds."""
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:_KEY_DIGITS]


class _ResultFile(ABC, Generic[Value]):
    """Results of one model by prompt.

    The first line says what the results depend on apart from the prompt; each further line is a result. A line that a
    killed run did not finish is removed.

    Args:
        path: the file.
        about: what the results depend on: `weights`, `tokenizer`, `dtype` and the like, as text and numbers.
        others: more such files, which are only read.
    Raises:
        EvaluationError: if the file holds the results of another model, or is damaged.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], others: Iterable[Path] = ()):
        self._path = path
        self._about = {"format": _FORMAT, **about}
        self._known: dict[str, Value] = {}
        for other in others:
            self._read(other)
        self._size = self._read(path) if exists(path) else 0

    def __len__(self) -> int:
        return len(self._known)

    @abstractmethod
    def _to_fields(self, value: Value) -> dict[str, Any]:
        """A result as JSON holds it."""

    @abstractmethod
    def _from_fields(self, fields: Fields) -> Value:
        """The result again."""

    def _append(self, new: Mapping[str, Value]) -> None:
        """Add results by key, and write them to the file at once."""
        lines = [_line({"prompt": key, **self._to_fields(value)}) for key, value in new.items()]
        if not self._size:
            lines.insert(0, _line(self._about))
        content = b"".join(lines)
        with open(self._path, "r+b" if self._size else "wb") as file:
            file.seek(self._size)
            file.write(content)
            file.truncate()
        self._size += len(content)
        self._known |= new

    def _read(self, path: Path) -> int:
        """Read all whole lines; the number of their bytes."""
        content = read_bytes(path, EvaluationError, _LARGEST_FILE)
        end = content.rfind(b"\n") + 1
        lines = content[:end].splitlines()
        if not lines:
            return 0
        self._check(_fields(path, lines[0], 1))
        for number, line in enumerate(lines[1:], 2):
            values = _fields(path, line, number)
            self._known[values.text("prompt")] = self._from_fields(values)
        return end

    def _check(self, before: Mapping[str, Any]) -> None:
        differs = [name for name, value in self._about.items() if before.get(name) != value]
        if differs:
            raise EvaluationError(
                f"{self._path.parent} is a run of another model: its {' and '.join(differs)} differ; choose another "
                "`output`"
            )


class ScoreFile(_ResultFile[Score]):
    """The scores of one model by request; arguments and errors as for `_ResultFile`."""

    def get(self, request: Request, needs_rounded: bool = False) -> Score | None:
        """The score of a request, if it is known, with `rounded` if that is needed."""
        score = self._known.get(prompt_key(request))
        return None if score is not None and needs_rounded and score.rounded is None else score

    def add(self, scores: Iterable[tuple[Request, Score]]) -> None:
        """Add scores, and write them to the file at once."""
        self._append({prompt_key(request): score for request, score in scores})

    def _to_fields(self, value: Score) -> dict[str, Any]:
        return {name: None if v != v or v in _INFINITE else v for name, v in value._asdict().items()}

    def _from_fields(self, fields: Fields) -> Score:
        log_likelihood = fields.number("log_likelihood", default=None)
        return Score(
            math.nan if log_likelihood is None else log_likelihood,
            fields.flag("is_greedy"),
            fields.flag("is_truncated"),
            fields.number("rounded", default=None),
        )


class TextFile(_ResultFile[str]):
    """The texts that one model generated, by prompt and settings; arguments and errors as for `_ResultFile`."""

    def get(self, asked: Any) -> str | None:
        """The text for a prompt and its settings (values that JSON holds), if it is known."""
        return self._known.get(prompt_key(asked))

    def add(self, asked: Any, text: str) -> None:
        """Add a text, and write it to the file at once."""
        self._append({prompt_key(asked): text})

    def _to_fields(self, value: str) -> dict[str, Any]:
        return {"text": value}

    def _from_fields(self, fields: Fields) -> str:
        return fields.text("text")


def _fields(path: Path, line: bytes, number: int) -> Fields:
    return parse_json_object(line.decode(errors="replace"), f"{path}, line {number:,}", EvaluationError)


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
