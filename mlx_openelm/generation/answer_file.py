"""Answers to the prompts of a file, and a file of them that an interrupted run can continue."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import OutputError, quoted
from ..files.names import with_ending
from ..files.output import OutputFile, output_file
from .prompt_file import ANSWER_FIELDS, Prompt
from .text import Generation

_RUN_FIELD = "run"
_RUN_DIGITS = 12


@dataclass(frozen=True)
class AnswerRun:
    """Everything that the answers to a file of prompts depend on, so that two runs can be told apart.

    Args:
        prompts: the prompts to answer.
        settings: the options by the names of their parameters, and the fingerprint of the `model`; values that JSON
            holds. A `seed` of None stands for any seed.
        drawn_seed: the seed that was drawn for this run, if it samples and none was given.
    """

    prompts: Sequence[Prompt]
    settings: Mapping[str, Any]
    drawn_seed: int | None = None
    digest: str = field(init=False)  # SHA-256 of prompts and settings

    def __post_init__(self) -> None:
        about = json.dumps({**self.settings, "prompts": self.prompts_hash}, sort_keys=True, default=str)
        object.__setattr__(self, "digest", sha256(about.encode()).hexdigest())

    @property
    def mark(self) -> str:
        """The start of `digest`, in the field `run` of every answer."""
        return self.digest[:_RUN_DIGITS]

    @property
    def prompts_hash(self) -> str:
        """SHA-256 of all records and their ids."""
        given = [[dict(prompt.record), prompt.tokens] for prompt in self.prompts]
        return sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()

    def heading(self) -> dict[str, Any]:
        """What the first line of a partial file says."""
        return {
            "run": self.digest,
            "prompts": self.prompts_hash,
            "settings": dict(self.settings),
            "drawn_seed": self.drawn_seed,
        }

    def differences(self, heading: Mapping[str, Any]) -> list[str]:
        """What another run, of this heading, had different; in words, with the values of that run and of this one."""
        own = json.loads(json.dumps(self.heading(), default=str))
        before = heading.get("settings")
        before = before if isinstance(before, dict) else {}
        found = ["the prompts"] if heading.get("prompts") != own["prompts"] else []
        for name, value in own["settings"].items():
            if name in before and before[name] != value:
                values = f"`{name}` {_shown(before[name])} -> {_shown(value)}"
                found.append("the model" if name == "model" else values)
        return found


class Answers:
    """Answers to prompts, as lines of JSON in the order of the prompts, written as soon as all earlier ones exist.

    Args:
        run: the prompts to answer, and how.
        write: called with each line.
    """

    def __init__(self, run: AnswerRun, write: Callable[[str], None]):
        self.run = run
        self._prompts = run.prompts
        self._write = write
        self._lines: dict[int, str] = {}
        self._written = 0

    @property
    def missing(self) -> list[int]:
        """Numbers of the prompts without an answer."""
        return [number for number in range(len(self._prompts)) if number not in self._lines]

    @property
    def drawn_seed(self) -> int | None:
        """The seed that was drawn for all answers, if they are sampled and none was given."""
        return self.run.drawn_seed

    def add(self, number: int, generation: Generation) -> None:
        """Add the answer to a prompt."""
        assert generation.stats is not None, "a generation without tokens is not an answer"
        stats = generation.stats
        values = generation.text, generation.finish_reason, stats.prompt_tokens, stats.generated_tokens
        answer = {**self._prompts[number].record, **dict(zip(ANSWER_FIELDS, values, strict=True))}
        answer.setdefault(_RUN_FIELD, self.run.mark)  # of a prompt that has such a field, it stays
        line = json.dumps(answer, ensure_ascii=False, default=str)
        if any("\ud800" <= character <= "\udfff" for character in line):  # a lone surrogate, which UTF-8 cannot encode
            line = json.dumps(answer, default=str)
        self._lines[number] = line
        self._keep(number)

    def finish(self) -> None:
        """Finish after the last answer."""
        assert not self.missing, "answers are missing"

    def close(self) -> None:
        """Stop for now; answers may be missing."""

    def _keep(self, number: int) -> None:
        while self._written in self._lines:
            self._write(self._lines[self._written])
            self._written += 1


class AnswerFile(Answers):
    """Answers in a file that is written once all are complete; until then a locked partial file beside it holds them.

    Each line of the partial file has a checksum over the run and the answer. A line without a valid checksum is not an
    answer of this run, and that answer is computed again. The seed that the earlier run drew is used again.

    Args:
        output: a `.jsonl` file.

    Raises:
        OutputLockedError: if another process writes the partial file.
        OutputError: if the partial file belongs to other prompts or settings, or cannot be written.
    """

    def __init__(self, run: AnswerRun, output: OutputFile):
        super().__init__(run, self._append)
        self._output = output
        self._seed = run.drawn_seed
        with ExitStack() as held:
            self._part = held.enter_context(output_file(with_ending(output.path, ".part"), overwrite=True))
            self._lines = self._answers_of(self._part)
            kept = [self._line(number, answer) for number, answer in self._lines.items()]
            heading = json.dumps({**run.heading(), "drawn_seed": self._seed}, default=str)
            self._part.write("".join(f"{line}\n" for line in (heading, *kept)))
            self._file = held.enter_context(open(self._part.path, "ab", buffering=0))
            self._held = held.pop_all()

    @property
    def drawn_seed(self) -> int | None:
        """The seed that was drawn for all answers, maybe by an earlier run."""
        return self._seed

    def finish(self) -> None:
        """Write all answers, in order, to the output and remove the partial file."""
        super().finish()
        with self._held:
            self._output.write("".join(f"{self._lines[number]}\n" for number in range(len(self._prompts))))
            self._part.remove()

    def close(self) -> None:
        """Close and unlock the partial file; a later run continues from it."""
        self._held.close()

    def _line(self, number: int, answer: str) -> str:
        checksum = sha256(f"{self.run.digest} {number} {answer}".encode()).hexdigest()
        return f"{number}\t{checksum}\t{answer}"

    def _keep(self, number: int) -> None:
        self._append(self._line(number, self._lines[number]))

    def _append(self, line: str) -> None:
        try:
            self._file.write(f"{line}\n".encode())
        except OSError as error:
            raise OutputError(f"{self._part.name} cannot be written: {error.strerror}") from error

    def _answers_of(self, part: OutputFile) -> dict[int, str]:
        """The answers that an earlier run wrote.

        Raises:
            OutputError: if the file has answers of another run, or is not an answer file.
        """
        try:
            first, *lines = part.path.read_bytes().decode(errors="replace").split("\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OutputError(f"{part.name} cannot be read: {error.strerror}") from error
        heading = _heading(first)
        answers = dict(filter(None, map(self._answer_of, lines)))
        if heading is None:
            if answers or (not lines and _START.startswith(first[: len(_START)])):  # its start is damaged or was cut
                return answers if self._seed is None else {}  # the seed that was drawn is lost
            raise OutputError(f"{part.name} is not an answer file; move it, or choose another `output`")
        if heading["run"] != self.run.digest and any(lines):
            changes = ", ".join(self.run.differences(heading)) or "something else"
            raise OutputError(
                f"{part.name} holds answers of another run; these changed: {changes}; "
                "repeat that run to finish it, delete the file, or choose another `output`"
            )
        if isinstance(seed := heading.get("drawn_seed"), int) and self._seed is not None and answers:
            self._seed = seed
        return answers

    def _answer_of(self, line: str) -> tuple[int, str] | None:
        number, _, rest = line.partition("\t")
        answer = rest.partition("\t")[2]
        if not number.isdecimal() or int(number) >= len(self._prompts) or line != self._line(int(number), answer):
            return None
        return int(number), answer


def is_answer_file(path: Path) -> bool:
    """Whether a file begins with a finished answer."""
    try:
        with open(path, encoding="utf-8") as file:
            return _MARK.search(file.readline(_LONGEST_LOOK)) is not None
    except (OSError, UnicodeDecodeError):
        return False


def is_finished(path: Path, run: AnswerRun) -> bool:
    """Whether a file holds all answers of a run."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            marks = [found[1] if (found := _MARK.search(line)) else None for line in file]
    except (OSError, UnicodeDecodeError):
        return False
    return marks == [run.mark] * len(run.prompts)


def _heading(line: str) -> dict[str, Any] | None:
    """The first line of a partial file; `None` if it is not one."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and _HASH.fullmatch(str(found.get("run"))) else None


def _shown(value: Any) -> str:
    return "none" if value is None else quoted(value)


_LONGEST_LOOK = 1 << 24  # characters of a first line
_START = '{"run": "'
_HASH = re.compile("[0-9a-f]{64}")
_MARK = re.compile(rf'"{_RUN_FIELD}": "([0-9a-f]{{{_RUN_DIGITS}}})"\}}\n?$')
