"""Prompts from a file, and a file of answers that can go on after an interruption."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from .documents import BrokenLines
from .errors import DataError, OutputError, TokenizerError
from .generate import Generation
from .records import RECORD_ENDINGS, read_records
from .tokenizer import Tokenizer

_NEEDED = "prompt", "messages"
_ANSWER = "text", "finish_reason", "prompt_tokens", "generated_tokens"  # fields of an answer beside those of its prompt


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file: its record as it was, and its ids."""

    record: Mapping[str, Any]
    tokens: list[int]


def read_prompts(path: Path, tokenizer: Tokenizer, *, chat: bool, system: str | None = None) -> list[Prompt]:
    """The prompts of a file of records (see `read_records`), each with the field `prompt`, or `messages` of a chat.

    Args:
        chat: whether a `prompt` is a message to answer; else it is text to continue.
        system: the message that stands before each `prompt` of a chat.

    Raises:
        DataError: if the file cannot be read, has no prompt, or has a record that is none; with its number.
    """
    if not path.name.endswith(RECORD_ENDINGS):
        raise DataError(f"{path} is of no kind that is known; there are {', '.join(RECORD_ENDINGS)}")
    broken = BrokenLines(path, limit=0)
    prompts = [
        Prompt(record, _ids(record, tokenizer, chat, system, f"{path}, record {number}"))
        for number, record in enumerate(read_records(path, broken), start=1)
    ]
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts


def _ids(record: Mapping[str, Any], tokenizer: Tokenizer, chat: bool, system: str | None, where: str) -> list[int]:
    before = [{"role": "system", "content": system}] if system else []
    found = [name for name in _NEEDED if name in record]
    if len(found) != 1:
        raise DataError(f"{where}: it needs either the field prompt or messages; it has {', '.join(record) or 'none'}")
    if clash := [name for name in _ANSWER if name in record]:
        raise DataError(f"{where}: the field {clash[0]} is needed for the answer; give it another name")
    value = record[found[0]]
    try:
        if found == ["messages"]:
            if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
                raise DataError(f"{where}: messages is no list of objects with role and content")
            return tokenizer.encode_chat(value)
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}: the prompt is empty or no text")
        return tokenizer.encode_chat([*before, {"role": "user", "content": value}]) if chat else tokenizer.encode(value)
    except TokenizerError as error:
        raise DataError(f"{where}: {error}") from error


class Answers:
    """Answers to prompts, each a line of JSON, written in the order of the prompts as soon as those before are there.

    Args:
        prompts: that are answered.
        write: takes a line.
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
        """Keep the answer to a prompt."""
        assert generation.stats is not None, "a generation without a token is no answer"
        stats = generation.stats
        values = generation.text, generation.finish_reason, stats.prompt_tokens, stats.generated_tokens
        answer = {**self._prompts[number].record, **dict(zip(_ANSWER, values, strict=True))}
        line = json.dumps(answer, ensure_ascii=False, default=str)
        if any("\ud800" <= character <= "\udfff" for character in line):  # half a character, which UTF-8 cannot hold
            line = json.dumps(answer, default=str)
        self._lines[number] = line
        self._keep(number)

    def finish(self) -> None:
        """All answers are there."""
        assert not self.missing, "answers are missing"

    def close(self) -> None:
        """No more answers come for now."""

    def _keep(self, number: int) -> None:
        while self._written in self._lines:
            self._write(self._lines[self._written])
            self._written += 1


class AnswerFile(Answers):
    """Answers in a file, once all are there; until then a file beside it holds those that are.

    Args:
        path: a `.jsonl` file.
        settings: whatever the answers depend on; a run goes on only with the same.

    Raises:
        OutputError: if the file beside it belongs to other prompts or settings, or cannot be written.
    """

    def __init__(self, prompts: Sequence[Prompt], path: Path, settings: Mapping[str, Any]):
        super().__init__(prompts, self._append)
        self._path = path
        self._part = path.with_name(f"{path.name}.part")
        given = [[dict(prompt.record), prompt.tokens] for prompt in prompts]
        about = json.dumps({**settings, "prompts": given}, sort_keys=True, default=str)
        heading = json.dumps({"run": sha256(about.encode()).hexdigest()})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            resumed = self._part.exists() and self._resume(heading)
            self._file: TextIO = open(self._part, "a" if resumed else "w", encoding="utf-8")  # noqa: SIM115, until `finish`
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from error
        if not resumed:
            self._append(heading)

    def finish(self) -> None:
        """Put all answers, in order, in their place."""
        super().finish()
        self._file.close()
        whole = self._path.with_name(f"{self._path.name}.whole")
        try:
            with open(whole, "w", encoding="utf-8") as file:
                file.writelines(f"{self._lines[number]}\n" for number in range(len(self._prompts)))
                file.flush()
                os.fsync(file.fileno())
            whole.replace(self._path)
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error.strerror}") from error
        self._part.unlink()

    def close(self) -> None:
        """Let go of the file; what is there can be gone on from."""
        self._file.close()

    def _keep(self, number: int) -> None:
        self._append(f"{number}\t{self._lines[number]}")

    def _append(self, line: str) -> None:
        try:
            print(line, file=self._file, flush=True)
        except OSError as error:
            raise OutputError(f"{self._part} cannot be written: {error.strerror}") from error

    def _resume(self, heading: str) -> bool:
        """Take over what an earlier run wrote, without a last line that was cut."""
        content = self._part.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole.count(b"\n") < 2:  # no answer yet
            return False
        try:
            first, *lines = whole.decode("utf-8").split("\n")[:-1]
            answers = {int(number): answer for number, _, answer in (line.partition("\t") for line in lines)}
        except ValueError as error:  # UnicodeDecodeError is one too
            raise OutputError(f"{self._part} is damaged; delete it, or name another output") from error
        if first != heading:
            raise OutputError(
                f"{self._part} belongs to a run with other prompts or options; delete it, or name another output"
            )
        os.truncate(self._part, len(whole))
        self._lines = answers
        return True
