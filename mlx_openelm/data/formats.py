"""Kinds of record that a model is tuned on, and the example that each becomes: ids, and which of them are answers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, TokenizerError
from ..tokenizer.tokenizer import Tokenizer

# Fields that a record of each kind needs, and those that it may have; the first kind that fits is taken.
_FIELDS = {
    "preference": (("chosen", "rejected"), ("prompt",)),
    "chat": (("messages",), ()),
    "instruction": (("instruction", "output"), ("input",)),
    "completion": (("prompt", "completion"), ()),
    "text": (("text",), ()),
}
KINDS = tuple(_FIELDS)
FIELD_NAMES = frozenset(name for needed, optional in _FIELDS.values() for name in (*needed, *optional))

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class Example:
    """A text as ids: BOS first, and EOS last unless it was cut."""

    tokens: np.ndarray  # int32 (T,)
    answer: np.ndarray  # bool (T,): tokens to learn, of an answer or the EOS behind it; never BOS

    @property
    def sides(self) -> tuple["Example", ...]:
        """Itself; a pair has two."""
        return (self,)


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """Two answers to the same prompt, of which the first is the better one."""

    chosen: Example
    rejected: Example

    @property
    def sides(self) -> tuple[Example, ...]:
        """Both, the better one first."""
        return self.chosen, self.rejected


def kind_of(record: Mapping[str, Any], named: Collection[str] = ()) -> str:
    """The first kind whose fields are all there, and which uses all fields that are `named`.

    Raises:
        DataError: if there is none, with the fields found and the kinds that exist.
    """
    for kind, (needed, optional) in _FIELDS.items():
        if record.keys() >= set(needed) and set(named) <= {*needed, *optional}:
            return kind
    kinds = "; ".join(f"{kind}: {', '.join(needed)}" for kind, (needed, _) in _FIELDS.items())
    raise DataError(f"the fields {', '.join(map(str, record)) or '(none)'} are of no kind that is known ({kinds})")


def encode_record(
    kind: str, record: Mapping[str, Any], tokenizer: Tokenizer, *, indent: int = 0
) -> Example | PreferencePair:
    """The example that a record of this kind stands for, at its full length.

    Args:
        indent: of an instruction's lines; see `instruction_prompt`.
    Raises:
        DataError, TokenizerError: if a field is not what it has to be, or no tokenizer can take its text.
    """
    if kind == "preference":
        return _preference(record, tokenizer)
    if kind == "chat":
        return encode_conversation(_messages(record, "messages"), tokenizer)
    if kind == "instruction":
        question = _text(record, "input") if "input" in record else ""
        prompt = instruction_prompt(_text(record, "instruction"), question, indent=indent)
        return encode_completion(prompt, " " * indent + _text(record, "output"), tokenizer)
    if kind == "completion":
        return encode_completion(_text(record, "prompt"), _text(record, "completion"), tokenizer)
    return encode_completion("", _text(record, "text"), tokenizer)


def instruction_prompt(instruction: str, input: str = "", *, indent: int = 0) -> str:
    """An instruction in the words of Stanford Alpaca, up to the line where the answer begins.

    Args:
        input: what the instruction is to be carried out on.
        indent: spaces in front of every line but the first two, and of the answer, which the caller puts there. With 16
            the text is that of CoreNet (`commonsense_170k.py`), with the spaces that stand at the ends of its lines.
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
    """A prompt and the text that follows it, whose ids begin with those of the prompt alone.

    A completion of nothing but spaces is no answer.
    """
    before = tokenizer.encode(prompt)
    after = encode_continuation(completion, tokenizer) if prompt else tokenizer.encode(completion, bos=False)
    tokens = np.array([*before, *after, tokenizer.eos_token_id], np.int32)
    return Example(tokens, (np.arange(len(tokens)) >= len(before)) & bool(completion.strip()))


def encode_continuation(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text that follows another one: without the space that `encode` puts in front.

    Raises:
        TokenizerError: if the vocabulary has pieces in which a newline and what follows it are one.
    """
    newline = tokenizer.encode("\n", bos=False)
    if b"".join(map(tokenizer.token_bytes, newline)) == b"\n":
        return tokenizer.encode(text, bos=False)
    ids = tokenizer.encode("\n" + text, bos=False)
    if ids[: len(newline)] != newline:
        raise TokenizerError("this vocabulary joins newlines with the text behind them, so that answers have no begin")
    return ids[len(newline) :]


def encode_conversation(messages: Messages, tokenizer: Tokenizer, first: int = 0) -> Example:
    """A conversation by the model's template; the assistant's messages are answers, each with the EOS that closes it.

    Args:
        first: the messages before this one count as none.
    Raises:
        DataError: if the model has no chat template.
        TokenizerError: if a message is malformed.
    """
    if not tokenizer.has_chat_template:
        raise DataError(
            "conversations need a chat template, and this is a base model without one; "
            "data with the fields prompt and completion needs none"
        )
    tokens = np.array(tokenizer.encode_chat(messages, add_generation_prompt=False), np.int32)
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)  # of each message: no text becomes EOS
    answer = np.zeros(len(tokens), bool)
    for number, (message, end) in enumerate(zip(messages, ends, strict=True)):
        if number >= first and message["role"] == "assistant" and message["content"].strip():
            before = np.array(tokenizer.encode_chat(messages[:number]), np.int32)
            answer[_num_shared(before, tokens) : end + 1] = True
    return Example(tokens[: ends[-1] + 1], answer[: ends[-1] + 1])


def _num_shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts have in common before they part."""
    shortest = min(len(one), len(other))
    return int(np.argmin(np.append(one[:shortest] == other[:shortest], False)))


def _preference(record: Mapping[str, Any], tokenizer: Tokenizer) -> PreferencePair:
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = _text(record, "prompt")
        return PreferencePair(*(encode_completion(prompt, answer, tokenizer) for answer in (chosen, rejected)))
    before = _messages(record, "prompt") if isinstance(record.get("prompt"), list) else []
    sides = [[*before, *_messages(record, name)] for name in ("chosen", "rejected")]
    shared = 0
    for one, other in zip(*sides, strict=False):
        if (one.get("role"), one.get("content")) != (other.get("role"), other.get("content")):
            break
        shared += 1
    if shared == 0:
        raise DataError("chosen and rejected have no message in common that both answer")
    return PreferencePair(*(encode_conversation(side, tokenizer, first=shared) for side in sides))


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise DataError(f"{name} is missing" if value is None else f"{name} is {type(value).__name__}, not text")
    return value


def _messages(record: Mapping[str, Any], name: str) -> list[Mapping[str, str]]:
    value = record[name]
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise DataError(f"{name} must be a list of messages with role and content")
    return value
