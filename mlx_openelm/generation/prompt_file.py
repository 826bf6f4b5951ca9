"""Prompts from a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.formats import messages_of, pair_of_conversations, shared_messages, text_of
from ..data.record_files import RECORD_ENDINGS, read_records
from ..data.text_files import BrokenLines
from ..errors import DataError, TokenizerError
from ..tokenizer.example_format import ExampleFormat
from ..tokenizer.tokenizer import Tokenizer

ANSWER_FIELDS = "text", "finish_reason", "prompt_tokens", "generated_tokens"  # that an answer adds to its prompt


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
    if clash := [taken for taken in ANSWER_FIELDS if taken in record]:
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
