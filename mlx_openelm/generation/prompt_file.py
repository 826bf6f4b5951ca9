"""Prompts from a file, and a file of answers that an interrupted run can continue."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..data.formats import messages_of, pair_of_conversations, shared_messages, text_of
from ..data.record_files import RECORD_ENDINGS, read_records
from ..data.text_files import BrokenLines
from ..errors import DataError, OutputError, TokenizerError
from ..files.names import with_ending
from ..files.output import OutputFile, output_file
from ..tokenizer.example_format import ExampleFormat
from ..tokenizer.tokenizer import Tokenizer
from .text import Generation

_ANSWER = "text", "finish_reason", "prompt_tokens", "generated_tokens"  # fields that an answer adds to its prompt


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file: its unchanged record, and its ids."""

    record: Mapping[str, Any]
    tokens: list[int]


def read_prompts(
    path: Path,
    tokenizer: Tokenizer,
    *,
    chat: bool | None = None,
    system: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """Read prompts from a file of records (see `read_records`), in any format that `tune` accepts.

    The prompt is `messages` (without an answer at their end), `instruction` and `input`, `prompt`, `text` to continue,
    or the messages that `chosen` and `rejected` share. Answers in the record stay in it, but are not read.

    Args:
        chat: whether prompts are presented in the chat template; by default as the model knows them.
        system: the system message before each prompt that is not a list of messages; requires the chat template.
        columns: names of fields in the file, such as {"prompt": "question"}; by default those that an adapter records,
            where the file has them.

    Raises:
        DataError: if the file cannot be read, contains no prompts, or has an invalid record, with its number.
    """
    if not path.name.endswith(RECORD_ENDINGS):
        raise DataError(f"unsupported file type: {path} (choose from {', '.join(RECORD_ENDINGS)})")
    asked = tokenizer.prompt_format(chat, system)
    broken = BrokenLines(path, limit=0)
    prompts = []
    for number, record in enumerate(read_records(path, broken), start=1):
        known = ExampleFormat(columns=columns) if columns else (tokenizer.example_format or asked).for_record(record)
        try:
            prompts.append(_prompt(record, known.fields_of(record), asked, tokenizer, system))
        except (DataError, TokenizerError) as error:
            raise DataError(f"{path}, record {number}: {error}") from error
    if not prompts:
        raise DataError(f"{path} contains no prompts")
    return prompts


def _prompt(
    record: Mapping[str, Any],
    fields: Mapping[str, Any],
    asked: ExampleFormat,
    tokenizer: Tokenizer,
    system: str | None,
) -> Prompt:
    found = [name for name in ("prompt", "messages", "instruction") if name in fields]
    if not found:
        found = [name for name in ("chosen", "text") if name in fields]
    if len(found) != 1:
        raise DataError(
            f"expected one of the fields prompt, messages, instruction and text; found {', '.join(record) or 'none'}; "
            "`columns` maps other names, such as `columns=prompt=question`"
        )
    name = found[0]
    if name == "text" and "text" in record:  # the answer's text gets this field
        record = {"prompt": fields["text"], **{other: value for other, value in record.items() if other != "text"}}
    if clash := [taken for taken in _ANSWER if taken in record]:
        raise DataError(f"the field {clash[0]} is reserved for the answer; rename it")
    if name == "chosen":
        return Prompt(record, tokenizer.encode_chat(shared_messages(*pair_of_conversations(fields))))
    if name == "messages" or (name == "prompt" and isinstance(fields[name], list)):
        return Prompt(record, tokenizer.encode_chat(_asking(messages_of(fields, name))))
    text = text_of(fields, name)
    if not text:
        raise DataError(f"the {name} must be non-empty text")
    if name == "text" and asked.style != "chat":
        return Prompt(record, tokenizer.encode(text))
    if name == "instruction" and asked.style != "chat":
        asked = replace(asked, prompt_style="instruction")  # as when it is tuned on
    context = text_of(fields, "input") if name == "instruction" and "input" in fields else ""
    return Prompt(record, tokenizer.encode_as(asked, text, input=context, system=system))


def _asking(messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """The messages before the answer that they end with, if they do."""
    return messages[:-1] if len(messages) > 1 and messages[-1].get("role") == "assistant" else messages


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
