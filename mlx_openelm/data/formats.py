"""How the records of each dataset format become examples: ids and a completion mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, TokenizerError
from ..tokenizer.example_format import ExampleFormat, question
from ..tokenizer.tokenizer import Tokenizer

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


def encode_record(
    example_format: ExampleFormat, record: Mapping[str, Any], tokenizer: Tokenizer
) -> Example | PreferencePair:
    """The example of a record, at its full length.

    Args:
        example_format: with the kind of `records`.
        record: its fields; see `ExampleFormat.fields_of`.
    Raises:
        DataError, TokenizerError: if a field has the wrong type, or its text cannot be tokenized.
    """
    if example_format.records == "preference":
        return _preference(example_format, record, tokenizer)
    if example_format.records == "chat":
        return encode_conversation(messages_of(record, "messages"), tokenizer)
    if example_format.records == "text":
        return encode_completion("", text_of(record, "text"), tokenizer)
    if example_format.records == "completion":
        prompt, answer = text_of(record, "prompt"), text_of(record, "completion")
        return _answered(example_format, prompt, "", answer, tokenizer)
    context = text_of(record, "input") if "input" in record else ""
    return _answered(example_format, text_of(record, "instruction"), context, text_of(record, "output"), tokenizer)


def meets_without_space(example_format: ExampleFormat, record: Mapping[str, Any]) -> bool:
    """Whether a plain prompt ends, and its answer begins, with what a space usually separates."""
    prompt, answer = record.get("prompt"), record.get("completion", record.get("chosen"))
    if example_format.style != "plain" or not isinstance(prompt, str) or not isinstance(answer, str):
        return False
    before, after = example_format.prompt_text(prompt)[-1:], example_format.answer_text(answer)[:1]
    has_case = after.lower() != after.upper()  # scripts without it, such as Chinese, have no spaces between words
    return bool(before) and not before.isspace() and (has_case or after.isdecimal())


def _answered(example_format: ExampleFormat, prompt: str, input: str, answer: str, tokenizer: Tokenizer) -> Example:
    if example_format.style == "chat":
        asked = {"role": "user", "content": question(prompt, input)}
        return encode_conversation([asked, {"role": "assistant", "content": answer}], tokenizer)
    return encode_completion(example_format.prompt_text(prompt, input), example_format.answer_text(answer), tokenizer)


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


def _preference(example_format: ExampleFormat, record: Mapping[str, Any], tokenizer: Tokenizer) -> PreferencePair:
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = text_of(record, "prompt")
        answers = (chosen, rejected)
        return PreferencePair(*(_answered(example_format, prompt, "", answer, tokenizer) for answer in answers))
    conversations = pair_of_conversations(record)
    shared = len(shared_messages(*conversations))
    return PreferencePair(*(encode_conversation(messages, tokenizer, first=shared) for messages in conversations))


def pair_of_conversations(record: Mapping[str, Any]) -> tuple[list[Mapping[str, str]], list[Mapping[str, str]]]:
    """The conversations that end with the chosen and the rejected answer.

    Raises:
        DataError: if one of them is not a list of messages.
    """
    before = messages_of(record, "prompt") if isinstance(record.get("prompt"), list) else []
    return [*before, *messages_of(record, "chosen")], [*before, *messages_of(record, "rejected")]


def shared_messages(one: Sequence[Mapping[str, str]], other: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The messages that two conversations begin with.

    Raises:
        DataError: if there are none.
    """
    shared = []
    for message, same in zip(one, other, strict=False):
        if (message.get("role"), message.get("content")) != (same.get("role"), same.get("content")):
            break
        shared.append(message)
    if not shared:
        raise DataError("chosen and rejected must begin with the same message")
    return shared


def text_of(record: Mapping[str, Any], name: str) -> str:
    """A field with text.

    Raises:
        DataError: if it is missing or something else.
    """
    value = record.get(name)
    if not isinstance(value, str):
        raise DataError(f"{name} is missing" if value is None else f"{name} must be text; got {type(value).__name__}")
    return value


def messages_of(record: Mapping[str, Any], name: str) -> list[Mapping[str, str]]:
    """A field with messages.

    Raises:
        DataError: if it is something else.
    """
    value = record[name]
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise DataError(f"{name} must be a list of messages with role and content")
    return value
