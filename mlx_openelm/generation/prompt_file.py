"""Prompts from a file, and a file of answers that an interrupted run can continue."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..data.record_files import RECORD_ENDINGS, read_records
from ..data.text_files import BrokenLines
from ..errors import DataError, OutputError, TokenizerError
from ..files.names import with_ending
from ..files.output import OutputFile, output_file
from ..tokenizer.tokenizer import Tokenizer
from .text import Generation

_NEEDED = "prompt", "messages"
_ANSWER = "text", "finish_reason", "prompt_tokens", "generated_tokens"  # fields that an answer adds to its prompt


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file: its unchanged record, and its ids."""

    record: Mapping[str, Any]
    tokens: list[int]


def read_prompts(path: Path, tokenizer: Tokenizer, *, chat: bool, system: str | None = None) -> list[Prompt]:
    """Read prompts from a file of records (see `read_records`), each with a field `prompt` or `messages`.

    Args:
        chat: whether a `prompt` is a message to answer, not text to continue.
        system: the system message before each `prompt`; requires `chat`.

    Raises:
        DataError: if the file cannot be read, contains no prompts, or has an invalid record, with its number.
    """
    if not path.name.endswith(RECORD_ENDINGS):
        raise DataError(f"unsupported file type: {path} (choose from {', '.join(RECORD_ENDINGS)})")
    broken = BrokenLines(path, limit=0)
    prompts = [
        Prompt(record, _ids(record, tokenizer, chat, system, f"{path}, record {number}"))
        for number, record in enumerate(read_records(path, broken), start=1)
    ]
    if not prompts:
        raise DataError(f"{path} contains no prompts")
    return prompts


def _ids(record: Mapping[str, Any], tokenizer: Tokenizer, chat: bool, system: str | None, where: str) -> list[int]:
    found = [name for name in _NEEDED if name in record]
    if len(found) != 1:
        raise DataError(f"{where}: expected the field prompt or messages; found {', '.join(record) or 'none'}")
    if clash := [name for name in _ANSWER if name in record]:
        raise DataError(f"{where}: the field {clash[0]} is reserved for the answer; rename it")
    value = record[found[0]]
    try:
        if found == ["messages"]:
            if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
                raise DataError(f"{where}: messages must be a list of objects with role and content")
            return tokenizer.encode_chat(value)
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}: the prompt must be non-empty text")
        return tokenizer.encode_prompt(value, chat=chat, system=system)
    except TokenizerError as error:
        raise DataError(f"{where}: {error}") from error


class Answers:
    """Answers to prompts, as lines of JSON in the order of the prompts, written as soon as all earlier ones exist.

    Args:
        prompts: the prompts to answer.
        write: called with each line.
    """

    def __init__(self, prompts: Sequence[Prompt], write: Callable[[str], None]):
        self._prompts = prompts
        self._write = write
        self._lines: dict[int, str] = {}
        self._written = 0

    @property
    def missing(self) -> list[int]:
        """Numbers of the prompts without an answer."""
        return [number for number in range(len(self._prompts)) if number not in self._lines]

    def add(self, number: int, generation: Generation) -> None:
        """Add the answer to a prompt."""
        assert generation.stats is not None, "a generation without tokens is not an answer"
        stats = generation.stats
        values = generation.text, generation.finish_reason, stats.prompt_tokens, stats.generated_tokens
        answer = {**self._prompts[number].record, **dict(zip(_ANSWER, values, strict=True))}
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
    answer of this run, and that answer is computed again.

    Args:
        output: a `.jsonl` file.
        settings: everything else that the answers depend on; a run can only be continued with the same settings.

    Raises:
        OutputLockedError: if another process writes the partial file.
        OutputError: if the partial file belongs to other prompts or settings, or cannot be written.
    """

    def __init__(self, prompts: Sequence[Prompt], output: OutputFile, settings: Mapping[str, Any]):
        super().__init__(prompts, self._append)
        given = [[dict(prompt.record), prompt.tokens] for prompt in prompts]
        about = json.dumps({**settings, "prompts": given}, sort_keys=True, default=str)
        self._run = sha256(about.encode()).hexdigest()
        self._output = output
        with ExitStack() as held:
            self._part = held.enter_context(output_file(with_ending(output.path, ".part"), overwrite=True))
            self._lines = self._answers_of(self._part)
            kept = [self._line(number, answer) for number, answer in self._lines.items()]
            self._part.write("".join(f"{line}\n" for line in (self._heading, *kept)))
            self._file = held.enter_context(open(self._part.path, "ab", buffering=0))
            self._held = held.pop_all()

    def finish(self) -> None:
        """Write all answers, in order, to the output and remove the partial file."""
        super().finish()
        with self._held:
            self._output.write("".join(f"{self._lines[number]}\n" for number in range(len(self._prompts))))
            self._part.remove()

    def close(self) -> None:
        """Close and unlock the partial file; a later run continues from it."""
        self._held.close()

    @property
    def _heading(self) -> str:
        return json.dumps({"run": self._run})

    def _line(self, number: int, answer: str) -> str:
        checksum = sha256(f"{self._run} {number} {answer}".encode()).hexdigest()
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
            heading, *lines = part.path.read_bytes().decode(errors="replace").split("\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OutputError(f"{part.name} cannot be read: {error.strerror}") from error
        answers = dict(filter(None, map(self._answer_of, lines)))
        if answers or heading == self._heading or (not lines and self._heading.startswith(heading)):
            return answers
        if not _OTHER_RUN.fullmatch(heading):
            raise OutputError(f"{part.name} is not an answer file; move it, or choose another output")
        if len(lines) > 1:
            raise OutputError(
                f"{part.name} belongs to a run with other prompts or options; delete it, or choose another output"
            )
        return {}

    def _answer_of(self, line: str) -> tuple[int, str] | None:
        number, _, rest = line.partition("\t")
        answer = rest.partition("\t")[2]
        if not number.isdecimal() or int(number) >= len(self._prompts) or line != self._line(int(number), answer):
            return None
        return int(number), answer


_OTHER_RUN = re.compile(r'\{"run": "[0-9a-f]{64}"\}')
