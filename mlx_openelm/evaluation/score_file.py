"""Scores that outlive a run: a file to which they are added as they come."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..files.fields import Fields
from ..files.json_file import parse_json_object
from ..files.paths import exists, read_bytes
from .requests import Request, Score

_FORMAT = 1
_LARGEST_FILE = 1 << 30  # bytes
_KEY_DIGITS = 32
_INFINITE = -math.inf, math.inf


def prompt_key(request: Request) -> str:
    """A hash of a request's texts."""
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:_KEY_DIGITS]


class ScoreFile:
    """The scores of one model by prompt.

    The first line says what the scores depend on apart from the prompt; each further line is a score. A line that a
    killed run did not finish is removed.

    Args:
        path: the file.
        about: what the scores depend on: `weights`, `tokenizer`, `dtype` and the like, as text and numbers.
        others: more such files, which are only read.
    Raises:
        EvaluationError: if the file holds the scores of another model, or is damaged.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], others: Iterable[Path] = ()):
        self._path = path
        self._about = {"format": _FORMAT, **about}
        self._scores: dict[str, Score] = {}
        for other in others:
            self._read(other)
        self._size = self._read(path) if exists(path) else 0

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, request: Request, needs_rounded: bool = False) -> Score | None:
        """The score of a request, if it is known, with `rounded` if that is needed."""
        score = self._scores.get(prompt_key(request))
        return None if score is not None and needs_rounded and score.rounded is None else score

    def add(self, scores: Iterable[tuple[Request, Score]]) -> None:
        """Add scores, and write them to the file at once."""
        new = {prompt_key(request): score for request, score in scores}
        lines = [_line({"prompt": key, **_values(score)}) for key, score in new.items()]
        if not self._size:
            lines.insert(0, _line(self._about))
        content = b"".join(lines)
        with open(self._path, "r+b" if self._size else "wb") as file:
            file.seek(self._size)
            file.write(content)
            file.truncate()
        self._size += len(content)
        self._scores |= new

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
            self._scores[values.text("prompt")] = _score(values)
        return end

    def _check(self, before: Mapping[str, Any]) -> None:
        differs = [name for name, value in self._about.items() if before.get(name) != value]
        if differs:
            raise EvaluationError(
                f"{self._path.parent} is a run of another model: its {' and '.join(differs)} differ; choose another "
                "`output`"
            )


def _fields(path: Path, line: bytes, number: int) -> Fields:
    return parse_json_object(line.decode(errors="replace"), f"{path}, line {number:,}", EvaluationError)


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _values(score: Score) -> dict[str, Any]:
    """As JSON holds it, which has no NaN."""
    return {name: None if value != value or value in _INFINITE else value for name, value in score._asdict().items()}


def _score(values: Fields) -> Score:
    log_likelihood = values.number("log_likelihood", default=None)
    return Score(
        math.nan if log_likelihood is None else log_likelihood,
        values.flag("is_greedy"),
        values.flag("is_truncated"),
        values.number("rounded", default=None),
    )
