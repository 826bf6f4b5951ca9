"""Dataset formats, and how their records become examples: ids and a completion mask."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, TokenizerError
from ..tokenizer.tokenizer import Tokenizer

# Required and optional fields of each format; the first format that matches is used.
_FIELDS = {
    "preference": (("chosen", "rejected"), ("prompt",)),
    "chat": (("messages",), ()),
    "instruction": (("instruction", "output"), ("input",)),
    "completion": (("prompt", "completion"), ()),
    "text": (("text",), ()),
}
FORMATS = tuple(_FIELDS)
FIELD_NAMES = frozenset(name for required, optional in _FIELDS.values() for name in (*required, *optional))

_LOOSE_TOKENS = 2  # at the end of a conversation that more messages may change, such as a line break
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class Example:
    """A text as ids: BOS first if the tokenizer adds it, and EOS last unless it was cut."""

    tokens: np.ndarray  # int32 (T,)
    completion_mask: np.ndarray  # bool (T,): tokens of an answer, and the EOS after it; never the first token

    @property
    def sequences(self) -> tuple["Example", ...]:
        """The example itself; a pair has two sequences."""
        return (self,)


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """A chosen and a rejected answer to the same prompt."""

    chosen: Example
    rejected: Example

    @property
    def sequences(self) -> tuple[Example, ...]:
        """Both, the chosen one first."""
        return self.chosen, self.rejected


def format_of(record: Mapping[str, Any], named: Collection[str] = ()) -> str:
    """The first format whose required fields are all in the record, and which uses all fields in `named`.

    Raises:
        DataError: listing the record's fields and the known formats, if no format matches.
    """
    for name, (required, optional) in _FIELDS.items():
        if record.keys() >= set(required) and set(named) <= {*required, *optional}:
            return name
    known = "; ".join(f"{name}: {', '.join(required)}" for name, (required, _) in _FIELDS.items())
    raise DataError(f"no format matches the fields {', '.join(map(str, record)) or '(none)'} (expected {known})")


def encode_record(
    format_name: str, record: Mapping[str, Any], tokenizer: Tokenizer, *, indent: int = 0
) -> Example | PreferencePair:
    """The example of a record in the given format, at its full length.

    Args:
        indent: spaces before an instruction's lines; see `instruction_prompt`.
    Raises:
        DataError, TokenizerError: if a field has the wrong type, or its text cannot be tokenized.
    """
    if format_name == "preference":
        return _preference(record, tokenizer)
    if format_name == "chat":
        return encode_conversation(_messages(record, "messages"), tokenizer)
    if format_name == "instruction":
        question = _text(record, "input") if "input" in record else ""
        prompt = instruction_prompt(_text(record, "instruction"), question, indent=indent)
        return encode_completion(prompt, " " * indent + _text(record, "output"), tokenizer)
    if format_name == "completion":
        return encode_completion(_text(record, "prompt"), _text(record, "completion"), tokenizer)
    return encode_completion("", _text(record, "text"), tokenizer)


def instruction_prompt(instruction: str, input: str = "", *, indent: int = 0) -> str:
    """An instruction in Stanford Alpaca's template, up to the line where the answer begins.

    Args:
        input: what the instruction applies to.
        indent: spaces before every line but the first two; the caller adds them to the answer. With 16, the text is
            that of CoreNet's `commonsense_170k.py`, including its trailing spaces.
    """
    context = ", paired with an input that provides further context" if input else ""
    margin = " " * indent
    end = ("" if not indent else " " if input else "  ") + "\n\n"
    parts = [("Instruction", instruction), *([("Input", input)] if input else [])]
    return (
        f"Below is an instruction that describes a task{context}. "
        f"Write a response that appropriately completes the request.{end}"
        + "".join(f"{margin}### {name}:\n{margin}{text}\n{margin}\n" for name, text in parts)
        + f"{margin}### Response:\n"
    )


def encode_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> Example:
    """An example of a prompt and its completion; its ids begin with those of the prompt alone.

    The mask of a blank completion is empty.
    """
    before = tokenizer.encode(prompt)
    after = encode_continuation(completion, tokenizer) if prompt else tokenizer.encode(completion, bos=False)
    tokens = np.array([*before, *after, tokenizer.eos_token_id], np.int32)
    mask = np.arange(len(tokens)) >= max(1, len(before))  # nothing comes before the first token
    return Example(tokens, mask & bool(completion.strip()))


def encode_continuation(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text that follows another one, without the leading space that `encode` adds.

    Raises:
        TokenizerError: if the vocabulary has tokens that join a newline with the text after it.
    """
    newline = tokenizer.encode("\n", bos=False)
    if b"".join(map(tokenizer.token_bytes, newline)) == b"\n":
        return tokenizer.encode(text, bos=False)
    ids = tokenizer.encode("\n" + text, bos=False)
    if ids[: len(newline)] != newline:
        raise TokenizerError(
            "this tokenizer merges a newline with the text after it, so prompt and answer cannot be separated"
        )
    return ids[len(newline) :]


def encode_conversation(messages: Messages, tokenizer: Tokenizer, first: int = 0) -> Example:
    """A conversation in the model's chat template; the mask covers the assistant's messages and the EOS after them.

    An answer is what the template adds to the conversation before it with the assistant's turn begun. What follows its
    EOS, like a line break, is not learned, and not kept at the end.

    Args:
        first: index of the first message that can be in the mask.
    Raises:
        DataError: if the model has no chat template.
        TokenizerError: if a message is malformed.
    """
    if not tokenizer.has_chat_template:
        raise DataError(
            "this is a base model without a chat template; "
            "set `chat_template`, use an Instruct model, or data with the fields prompt and completion"
        )
    tokens = np.array(tokenizer.encode_chat(messages, add_generation_prompt=False), np.int32)
    mask = np.zeros(len(tokens), bool)
    for number, message in enumerate(messages):
        if number >= first and message["role"] == "assistant" and message["content"].strip():
            before = np.array(tokenizer.encode_chat(messages[:number]), np.int32)
            after = np.array(tokenizer.encode_chat(messages[: number + 1], add_generation_prompt=False), np.int32)
            start, stop = _num_shared(before, tokens), _num_shared(after, tokens)
            if stop < len(after) - _LOOSE_TOKENS or start > stop:
                raise DataError(
                    "the chat template writes earlier messages in another way once more follow, so that the answers to "
                    "learn cannot be told from the rest; set another `chat_template`, or use the last answers alone"
                )
            mask[start : _end_of_turn(tokens, start, stop, tokenizer.eos_token_id)] = True
    mask[:1] = False  # nothing comes before the first token
    length = _end_of_turn(tokens, 0, len(tokens), tokenizer.eos_token_id)
    return Example(tokens[:length], mask[:length])


def _end_of_turn(tokens: np.ndarray, start: int, stop: int, eos: int) -> int:
    """The index just after the last EOS in `tokens[start:stop]`, or `stop` without one."""
    ends = np.flatnonzero(tokens[start:stop] == eos)
    return start + int(ends[-1]) + 1 if len(ends) else stop


def _num_shared(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common prefix of two sequences of ids."""
    shortest = min(len(one), len(other))
    return int(np.argmin(np.append(one[:shortest] == other[:shortest], False)))


def _preference(record: Mapping[str, Any], tokenizer: Tokenizer) -> PreferencePair:
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = _text(record, "prompt")
        return PreferencePair(*(encode_completion(prompt, answer, tokenizer) for answer in (chosen, rejected)))
    before = _messages(record, "prompt") if isinstance(record.get("prompt"), list) else []
    conversations = [[*before, *_messages(record, name)] for name in ("chosen", "rejected")]
    shared = 0
    for one, other in zip(*conversations, strict=False):
        if (one.get("role"), one.get("content")) != (other.get("role"), other.get("content")):
            break
        shared += 1
    if shared == 0:
        raise DataError("chosen and rejected must begin with the same message")
    return PreferencePair(*(encode_conversation(messages, tokenizer, first=shared) for messages in conversations))


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise DataError(f"{name} is missing" if value is None else f"{name} must be text; got {type(value).__name__}")
    return value


def _messages(record: Mapping[str, Any], name: str) -> list[Mapping[str, str]]:
    value = record[name]
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise DataError(f"{name} must be a list of messages with role and content")
    return value
