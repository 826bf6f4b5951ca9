"""Text to ids and back, the chat template, and streaming decoding.

OpenELM uses Llama's vocabulary: SentencePiece BPE with byte fallback. It comes as `tokenizer.model`, which the
`sentencepiece` package reads, or as `tokenizer.json`, which the slower-starting `tokenizers` package reads.
"""

import codecs
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import TokenizerError

CHAT_ROLES = ("system", "user", "assistant")
_SPACE = "▁"  # how both libraries write a space within a piece
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNKNOWN = " \u2047 "  # what SentencePiece prints for text that its vocabulary cannot express


class Tokenizer:
    """Text to ids and back.

    Text is normalised to NFC. `<s>` and `</s>` in a text are plain text and never become control tokens.

    Attributes:
        path: the file that it was read from.
        has_chat_template: whether the model was tuned on conversations.
        vocab_size: number of ids.
        bos_token_id, eos_token_id: ids of the tokens that begin and end a text.
    """

    def __init__(self, path: str | Path, *, chat: bool = False):
        """Read a `tokenizer.model` or a `tokenizer.json`.

        Raises:
            TokenizerError: if the file cannot be read, or has no tokens that begin and end a text.
        """
        self.path = Path(path)
        self.has_chat_template = chat
        if not self.path.is_file():
            raise TokenizerError(f"{path} is not a file; expected a tokenizer.model or a tokenizer.json")
        self._library: _Library = (_Tokenizers if self.path.suffix == ".json" else _SentencePiece)(self.path)
        self.vocab_size = self._library.vocab_size
        self.bos_token_id = self._library.bos_token_id
        self.eos_token_id = self._library.eos_token_id
        if min(self.bos_token_id, self.eos_token_id) < 0:
            raise TokenizerError(f"{path} has no BOS and EOS tokens (<s> and </s>)")
        self._adds_space = self._library.piece(next(iter(self._library.encode("a")), 0)).startswith(_SPACE)

    def __repr__(self) -> str:
        kind = "with" if self.has_chat_template else "no"
        return f"Tokenizer({str(self.path)!r}, {self.vocab_size:,} tokens, {kind} chat template)"

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of a text, after BOS if `bos` is true.

        Raises:
            TokenizerError: if the text contains a lone surrogate, which UTF-8 cannot encode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text contains a lone surrogate at character {error.start:,}") from error
        ids = self._library.encode(unicodedata.normalize("NFC", text))
        return [self.bos_token_id, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without control tokens and without the space that `encode` puts in front."""
        text = b"".join(self.token_bytes(token) for token in ids).decode("utf-8", errors="replace")
        return text[1:] if self._adds_space and text.startswith(" ") else text

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one token, possibly part of a character; empty for control tokens and ids out of range."""
        if not 0 <= token < self.vocab_size or self._library.is_control(token):
            return b""
        return self._library.bytes_of(token)

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for ids that arrive one at a time."""
        return StreamDecoder(self)

    def encode_prompt(self, text: str, *, chat: bool | None = None, system: str | None = None) -> list[int]:
        """Ids of a prompt: in the chat template if the model has one, otherwise as plain text.

        Args:
            chat: whether to use the chat template; by default if the model has one.
            system: system message; requires the chat template.
        Raises:
            TokenizerError: if the chat template is required and the model has none.
        """
        if not self.uses_chat_template(chat, system):
            return self.encode(text)
        before = [{"role": "system", "content": system}] if system else []
        return self.encode_chat([*before, {"role": "user", "content": text}])

    def uses_chat_template(self, chat: bool | None = None, system: str | None = None) -> bool:
        """Whether `encode_prompt` uses the chat template; arguments and errors as there."""
        chosen = self.has_chat_template if chat is None else chat
        if system is not None and not chosen:
            raise TokenizerError(
                "`system` requires a chat template" + (", but `chat=False` turns it off" if chat is False else "")
            )
        if chosen and not self.has_chat_template:
            raise TokenizerError("this is a base model without a chat template; it can only continue text")
        return chosen

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True, bos: bool = True
    ) -> list[int]:
        """Ids of a conversation, with EOS after each turn.

        The text between control tokens is encoded segment by segment, as when the models were tuned.

        Args:
            messages: mappings with `role` (system, user or assistant) and `content`.
            add_generation_prompt: whether to end where the assistant's answer begins.
            bos: whether to begin with BOS.
        Raises:
            TokenizerError: if the model has no chat template or a message is malformed.
        """
        ids = [self.bos_token_id] if bos else []
        stretches = _stretches(self._checked(messages), add_generation_prompt)
        for number, text in enumerate(stretches):
            ids += [self.eos_token_id] if number else []
            ids += self.encode(text, bos=False)
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Text of a conversation, for people; `encode_chat` does not use it.

        Raises:
            TokenizerError: as for `encode_chat`.
        """
        eos = self._library.piece(self.eos_token_id)
        return eos.join(_stretches(self._checked(messages), add_generation_prompt))

    def pieces(self) -> list[str]:
        """The vocabulary in the order of its ids."""
        return [self._library.piece(token) for token in range(self.vocab_size)]

    def vocab_hash(self) -> str:
        """SHA-256 of the vocabulary in the order of its ids; the same for both file types."""
        return hashlib.sha256("\0".join(self.pieces()).encode()).hexdigest()

    def _checked(self, messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
        if not self.has_chat_template:
            raise TokenizerError("this is a base model without a chat template; it can only continue text")
        for message in messages:
            if message.get("role") not in CHAT_ROLES:
                raise TokenizerError(f"unknown role {message.get('role')!r} (choose from {', '.join(CHAT_ROLES)})")
            if not isinstance(message.get("content"), str):
                raise TokenizerError(f"the content of a message must be text (role {message['role']})")
        return messages


class StreamDecoder:
    """Decodes ids that arrive one at a time; an incomplete character is held back."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """A replacement character if the ids end within a character, otherwise an empty string."""
        return self._utf8.decode(b"", final=True)


def _stretches(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> list[str]:
    """The conversation's text, split at EOS, in the template of CoreNet's recipe for instruction tuning."""
    stretches = [""]
    for message in messages:
        stretches[-1] += f"<|{message['role']}|>\n{message['content']}"
        stretches.append("\n")
    if add_generation_prompt:
        stretches[-1] += "<|assistant|>\n"
    return stretches


class _Library(Protocol):
    """What a tokenizer package must provide."""

    vocab_size: int
    bos_token_id: int  # -1: none
    eos_token_id: int

    def encode(self, text: str) -> list[int]: ...
    def piece(self, token: int) -> str: ...
    def is_control(self, token: int) -> bool: ...
    def bytes_of(self, token: int) -> bytes: ...


class _SentencePiece:
    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path} is not a SentencePiece model") from error
        self.vocab_size = self._processor.vocab_size()
        self.bos_token_id = self._processor.bos_id()
        self.eos_token_id = self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def is_control(self, token: int) -> bool:
        return self._processor.is_control(token)

    def bytes_of(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return (_UNKNOWN if self._processor.is_unknown(token) else piece.replace(_SPACE, " ")).encode()


class _Tokenizers:
    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Library

        try:
            self._tokenizer = Library.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise TokenizerError(f"{path} is not a tokenizer.json: {str(error)[:200]}") from error
        self._tokenizer.encode_special_tokens = True  # `<s>` in a text stays text
        settings = json.loads(self._tokenizer.to_str())
        self._byte_level = _byte_alphabet() if "ByteLevel" in json.dumps(settings.get("decoder")) else None
        self._special = {entry["id"] for entry in settings.get("added_tokens", ()) if entry["special"]}
        self._unknown = settings["model"].get("unk_token")
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        config = _read_settings(path.with_name("tokenizer_config.json"))
        self.bos_token_id = self._id_of(config.get("bos_token"), "<s>")
        self.eos_token_id = self._id_of(config.get("eos_token"), "</s>")

    def _id_of(self, entry: Any, default: str) -> int:
        name = entry.get("content") if isinstance(entry, dict) else entry
        token = self._tokenizer.token_to_id(name if isinstance(name, str) else default)
        return -1 if token is None else token

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""

    def is_control(self, token: int) -> bool:
        return token in self._special and self.piece(token) != self._unknown

    def bytes_of(self, token: int) -> bytes:
        piece = self.piece(token)
        if self._byte_level is not None:
            return bytes(self._byte_level[character] for character in piece if character in self._byte_level)
        byte = _BYTE.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        return (_UNKNOWN if piece == self._unknown else piece.replace(_SPACE, " ")).encode()


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _byte_alphabet() -> dict[str, int]:
    """Bytes by the character that represents them in a byte-level vocabulary: printable bytes represent themselves."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + number): byte for number, byte in enumerate(unseen)}
