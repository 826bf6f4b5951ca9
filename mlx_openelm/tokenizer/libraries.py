"""The two packages that tokenize: `sentencepiece` for `tokenizer.model`, `tokenizers` for `tokenizer.json`."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from ..errors import TokenizerError, one_line, quoted
from ..files.paths import read_bytes, read_text
from .settings import LARGEST_FILE, LARGEST_VOCABULARY, SETTINGS_FILE, added_token, token_name, tokenizer_values

SPACE = "▁"  # how both packages write a space within a piece
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNKNOWN = " \u2047 "  # what SentencePiece prints for text that its vocabulary cannot express
_LARGEST_GROWTH = 1000  # how many times longer the normalizers may make a text

Result = TypeVar("Result")


class Library(Protocol):
    """What a tokenizer package must provide."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    adds_bos: bool  # whether a text begins with BOS

    @property
    def added_tokens(self) -> Mapping[int, Mapping[str, Any]]:
        """Control tokens and added ones by id, in the form of `added_tokens_decoder`."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, in which the names of control tokens are text."""

    def encode_marked(self, text: str, normalize: bool = True) -> list[int]:
        """Ids of a text, in which the names of control tokens are these tokens.

        Args:
            normalize: whether to normalise the text as CoreNet does, if the file does not say how.
        """

    def piece(self, token: int) -> str:
        """Name of a token."""

    def is_control(self, token: int) -> bool:
        """Whether a token never shows in decoded text."""

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes of a token that is no control token."""


class SentencePiece:
    """A `tokenizer.model`. Texts are normalised to NFC, as in CoreNet."""

    adds_bos = True

    def __init__(self, path: Path, settings: Mapping[str, Any] = MappingProxyType({})):
        """Read a file.

        Args:
            path: the file.
            settings: see `settings_beside`; they may name other pieces as BOS and EOS.
        """
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_proto=read_bytes(path, TokenizerError, LARGEST_FILE))
        except (RuntimeError, ValueError, TypeError) as error:
            raise TokenizerError(f"{path} is not a SentencePiece model") from error
        self.vocab_size = self._processor.vocab_size()
        self.bos_token_id = self._id_of(settings.get("bos_token"), self._processor.bos_id())
        self.eos_token_id = self._id_of(settings.get("eos_token"), self._processor.eos_id())

    @cached_property
    def added_tokens(self) -> Mapping[int, Mapping[str, Any]]:
        """See `Library`."""
        control = [token for token in range(self.vocab_size) if self.is_control(token) or self.is_unknown(token)]
        return {token: added_token(self.piece(token), special=True) for token in control}

    def _id_of(self, entry: Any, default: int) -> int | None:
        name = token_name(entry)
        token = default if name is None else self._processor.piece_to_id(name)
        token = default if token == self._processor.unk_id() else token
        return token if token >= 0 else None

    def encode(self, text: str) -> list[int]:
        """See `Library`."""
        return self._processor.encode(unicodedata.normalize("NFC", text))

    def encode_marked(self, text: str, normalize: bool = True) -> list[int]:
        """See `Library`."""
        ids = {entry["content"]: token for token, entry in self.added_tokens.items()}
        names = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        parts = re.split(f"({names})", unicodedata.normalize("NFC", text) if normalize else text)
        encode = self._processor.encode
        return [token for part in parts if part for token in ([ids[part]] if part in ids else encode(part))]

    def piece(self, token: int) -> str:
        """See `Library`."""
        try:
            return self._processor.id_to_piece(token)
        except UnicodeDecodeError:  # a damaged file
            return "\ufffd"

    def has(self, token: int, content: str) -> bool:
        """Whether this is a control token, or the unknown one, of that name."""
        if token >= self.vocab_size or self.piece(token) != content:
            return False
        return self.is_control(token) or self.is_unknown(token)

    def score(self, token: int) -> float:
        """The higher, the earlier a piece is merged."""
        return self._processor.get_score(token)

    def is_normal(self, token: int) -> bool:
        """Whether a token is text, as opposed to a control token, a byte, or the unknown token."""
        kinds = (self._processor.is_control, self._processor.is_byte, self._processor.is_unknown)
        return not any(kind(token) for kind in (*kinds, self._processor.is_unused))

    def is_control(self, token: int) -> bool:
        """See `Library`."""
        return self._processor.is_control(token)

    def is_unknown(self, token: int) -> bool:
        """Whether this is the token for text that the vocabulary cannot express."""
        return self._processor.is_unknown(token)

    def bytes_of(self, token: int) -> bytes:
        """See `Library`."""
        piece = self.piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return (_UNKNOWN if self.is_unknown(token) else piece.replace(SPACE, " ")).encode()


class Tokenizers:
    """A `tokenizer.json`, with the settings in the files beside it. Texts are normalised as the file says."""

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any] = MappingProxyType({}),
        content: str | None = None,
        vocab_size: int | None = None,
    ):
        """Read a file.

        Args:
            path: the file.
            settings: see `settings_beside`.
            content: what to read in place of the file.
            vocab_size: rows of the model's embedding; tokens added beyond them are left out.
        """
        self._path = path
        self._settings = settings
        self._content = content if content is not None else read_text(path, TokenizerError, LARGEST_FILE)
        written = tokenizer_values(self._content, path)
        rows = LARGEST_VOCABULARY if vocab_size is None else vocab_size
        added = {entry["id"]: entry for entry in written.get("added_tokens") or () if entry["id"] < rows}
        self.added_tokens = added
        deterministic = {
            **written,
            "added_tokens": list(added.values()),
            "model": {**written["model"], **({"dropout": None} if written["model"].get("dropout") else {})},
            "padding": None,  # whoever saved the file while it padded or cut texts does not mean these ones
            "truncation": None,
        }
        if deterministic != {"padding": None, "truncation": None, "added_tokens": [], **written}:
            self._content = json.dumps(deterministic, ensure_ascii=False)
        _check_growth(written.get("normalizer"), path)  # before the package normalises the names of added tokens
        self._tokenizer = self._parse()
        self._tokenizer.encode_special_tokens = True  # `<s>` in a text stays text
        for token, entry in added.items():
            found = self._token_id(entry["content"])
            if found != token:
                raise TokenizerError(f"{path} says that {quoted(entry['content'])} has the id {token}; it gets {found}")
        self._byte_level = _byte_alphabet() if "ByteLevel" in json.dumps(written.get("decoder")) else None
        self._unknown = written["model"].get("unk_token")
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1  # ids may have gaps
        if self.vocab_size > LARGEST_VOCABULARY:
            raise TokenizerError(f"{path} has the id {self.vocab_size - 1:,}; at most {LARGEST_VOCABULARY:,} is read")
        self.bos_token_id = self._id_of("bos_token", "<s>")
        self.eos_token_id = self._id_of("eos_token", "</s>")
        self.adds_bos = self._finds_bos()
        self._check_decoder()

    def _check_decoder(self) -> None:
        """Refuse a decoder that needs more than one token at a time, such as that of word pieces."""
        ids = [token for token in self.encode("hello world") if not self.is_control(token)]
        expected = self._checked(lambda: self._tokenizer.decode(ids), "cannot decode a text")
        found = b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")
        if found.strip() != expected.strip() and _UNKNOWN not in found:
            raise TokenizerError(
                f"{self._path} has a decoder that is not supported: {quoted(expected)} would read {quoted(found)}"
            )

    def encode(self, text: str) -> list[int]:
        """See `Library`."""
        return self._ids(self._tokenizer, text)

    def encode_marked(self, text: str, normalize: bool = True) -> list[int]:
        """See `Library`."""
        return self._ids(self._with_control_tokens, text)

    def piece(self, token: int) -> str:
        """See `Library`."""
        return self._tokenizer.id_to_token(token) or ""

    def is_control(self, token: int) -> bool:
        """See `Library`."""
        return token in self.added_tokens and self.added_tokens[token]["special"] and self.piece(token) != self._unknown

    def bytes_of(self, token: int) -> bytes:
        """See `Library`."""
        piece = self.piece(token)
        if token in self.added_tokens and piece != self._unknown:
            return piece.encode()  # text, whatever the alphabet of the other tokens
        if self._byte_level is not None:
            return bytes(self._byte_level[character] for character in piece if character in self._byte_level)
        byte = _BYTE.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        return (_UNKNOWN if piece == self._unknown else piece.replace(SPACE, " ")).encode()

    def content_with_bos(self) -> str:
        """The file's content, changed if it adds something else to a text than BOS, or BOS against the settings."""
        if self._added_to_texts() == ([self.bos_token_id] if self.adds_bos else []):
            return self._content
        written = json.loads(self._content)
        token = self.bos_token_id if self.adds_bos else None
        written["post_processor"] = None if token is None else bos_first(token, self.piece(token))
        return json.dumps(written, ensure_ascii=False)

    @cached_property
    def _with_control_tokens(self) -> Any:
        return self._parse()

    def _parse(self) -> Any:
        from tokenizers import Tokenizer as Package

        return self._checked(lambda: Package.from_str(self._content), "is not a tokenizer.json")

    def _ids(self, tokenizer: Any, text: str) -> list[int]:
        return self._checked(lambda: tokenizer.encode(text, add_special_tokens=False).ids, "cannot encode this text")

    def _checked(self, call: Callable[[], Result], failure: str) -> Result:
        """The result of a call; the package raises plain exceptions, and for a panic in Rust a BaseException."""
        try:
            return call()
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as error:
            raise TokenizerError(f"{self._path} {failure}: {one_line(error)}") from error

    def _id_of(self, name: str, default: str) -> int | None:
        if name in self._settings and self._settings[name] is None:
            return None
        entry = self._settings.get(name, default)
        content = token_name(entry)
        if content is None:
            raise TokenizerError(f"{self._path.with_name(SETTINGS_FILE)}: {name} must be text; got {quoted(entry)}")
        return self._token_id(content)

    def _token_id(self, content: str) -> int | None:
        try:
            return self._tokenizer.token_to_id(content)
        except UnicodeEncodeError:  # a lone surrogate
            return None

    def _finds_bos(self) -> bool:
        """Whether texts begin with BOS, according to the settings or, without any, to the file."""
        if self.bos_token_id is None:
            return False
        said = self._settings.get("add_bos_token")
        return said if isinstance(said, bool) else self._added_to_texts()[:1] == [self.bos_token_id]

    def _added_to_texts(self) -> list[int]:
        """What the file's post-processor adds to every text."""
        return self._checked(lambda: self._tokenizer.encode("").ids, "cannot encode an empty text")


def adds_space(library: Library) -> bool:
    """Whether a tokenizer puts a space in front of each text."""
    return library.piece(next(iter(library.encode("a")), 0)).startswith(SPACE)


def bos_first(token: int, name: str) -> dict[str, Any]:
    """A post-processor that puts BOS in front of each text."""
    sequences = {
        kind: [{"SpecialToken": {"id": name, "type_id": number}}, {"Sequence": {"id": kind, "type_id": number}}]
        for number, kind in enumerate("AB")
    }
    return {
        "type": "TemplateProcessing",
        "single": sequences["A"],
        "pair": [*sequences["A"], *sequences["B"]],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _check_growth(normalizer: Any, path: Path) -> None:
    """Refuse normalizers that blow a text up, one after the other; what is malformed is left to the package."""
    growth = 1.0  # of a text of one character
    for step in _normalizers(normalizer):
        content = step.get("content")
        if step.get("type") == "Replace" and isinstance(content, str):
            pattern = step.get("pattern")
            literal = pattern.get("String") if isinstance(pattern, dict) else None
            growth *= max(1.0, len(content) / max(1, len(literal) if isinstance(literal, str) else 0))
        if step.get("type") == "Prepend" and isinstance(step.get("prepend"), str):
            growth += len(step["prepend"])
        if growth > _LARGEST_GROWTH:
            raise TokenizerError(
                f"{path}: its normalizers can make a text more than {_LARGEST_GROWTH:,} times longer; refused"
            )


def _normalizers(normalizer: Any) -> Iterable[dict[str, Any]]:
    if isinstance(normalizer, dict):
        if normalizer.get("type") == "Sequence":
            steps = normalizer.get("normalizers")
            for step in steps if isinstance(steps, list) else ():
                yield from _normalizers(step)
        else:
            yield normalizer


def _byte_alphabet() -> dict[str, int]:
    """Bytes by the character that represents them in a byte-level vocabulary: printable bytes represent themselves."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + number): byte for number, byte in enumerate(unseen)}
