"""Prompts from a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.record_files import RECORD_ENDINGS, read_records
from ..data.text_files import BrokenLines
from ..errors import DataError, TokenizerError
from ..tokenizer.tokenizer import Tokenizer

_NEEDED = "prompt", "messages"
ANSWER_FIELDS = "text", "finish_reason", "prompt_tokens", "generated_tokens"  # that an answer adds to its prompt


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
    if clash := [name for name in ANSWER_FIELDS if name in record]:
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
