"""Text to ids and back, the chat template, and streaming decoding.

OpenELM uses Llama's vocabulary: SentencePiece BPE with byte fallback. It comes as `tokenizer.model`, which the
`sentencepiece` package reads, or as `tokenizer.json`, which the slower-starting `tokenizers` package reads.
"""

import codecs
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import TokenizerError, quoted
from ..files.fields import Fields
from ..files.paths import exists, is_file
from .chat_template import (
    CHAT_ROLES,
    OPENELM,
    OPENELM_TEMPLATE,
    check_messages,
    is_openelm,
    openelm_segments,
    render_template,
)
from .example_format import CHAT, PLAIN_TEXT, ExampleFormat, question, saved_format
from .libraries import Library, SentencePiece, Tokenizers, adds_space
from .settings import (
    ADDED_TOKENS_FILE,
    JSON_FILE,
    SETTINGS_FILE,
    added_tokens_beside,
    settings_beside,
    token_name,
    unknown_name,
)


class Tokenizer:
    """Text to ids and back.

    With a `tokenizer.model`, text is normalised to NFC, as in CoreNet; a `tokenizer.json` says itself how. The names of
    control tokens in a text, like `</s>`, are plain text and never become control tokens.

    Attributes:
        path: the file that it was read from.
        chat_template: a Jinja template, if the model was tuned on conversations; `openelm` sets CoreNet's.
        vocab_size: number of ids.
        bos_token_id, eos_token_id: ids of the tokens that begin and end a text; `bos_token_id` may be `None`.
        adds_bos: whether texts begin with BOS.
        example_format: of the examples that the model was tuned on, if known; prompts are presented in the same way.
        settings: what `tokenizer_config.json` and `special_tokens_map.json` beside the file say.
    """

    def __init__(self, path: str | Path, *, chat_template: str | None = None, vocab_size: int | None = None):
        """Read a `tokenizer.model` or a `tokenizer.json`, and the settings and added tokens in the files beside it.

        Args:
            path: the file.
            chat_template: see above.
            vocab_size: rows of the model's embedding; tokens added beyond them are left out.
        Raises:
            TokenizerError: if a file cannot be read, or there is no token that ends a text.
        """
        self.path = Path(path)
        self.chat_template = chat_template
        if not is_file(self.path):
            raise TokenizerError(f"{path} is not a file; expected a tokenizer.model or a tokenizer.json")
        self.settings = settings_beside(self.path)
        where = str(self.path.with_name(SETTINGS_FILE))
        self.example_format: ExampleFormat | None = saved_format(Fields(self.settings, where, TokenizerError))
        self._library = _open(self.path, self.settings, vocab_size)
        self.vocab_size = self._library.vocab_size
        self.adds_bos = self._library.adds_bos
        self.bos_token_id = self._library.bos_token_id
        if self._library.eos_token_id is None or (self.adds_bos and self.bos_token_id is None):
            raise TokenizerError(f"{path} has no BOS and EOS tokens (<s> and </s>)")
        self.eos_token_id: int = self._library.eos_token_id
        self._adds_space = adds_space(self._library)

    def __repr__(self) -> str:
        kind = "with" if self.has_chat_template else "no"
        return f"Tokenizer({str(self.path)!r}, {self.vocab_size:,} tokens, {kind} chat template)"

    @property
    def chat_template(self) -> str | None:
        """The chat template, or `None` for a base model."""
        return self._chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self._chat_template = OPENELM_TEMPLATE if template == OPENELM else template
        self._is_openelm = self._chat_template is not None and is_openelm(self._chat_template)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was tuned on conversations."""
        return self._chat_template is not None

    def encode(self, text: str, *, bos: bool = True, control_tokens: bool = False) -> list[int]:
        """Ids of a text.

        Args:
            bos: whether to put BOS in front, if the tokenizer adds it.
            control_tokens: whether the names of control tokens in the text are these tokens, as in other programs.
        Raises:
            TokenizerError: if the text contains a lone surrogate, which UTF-8 cannot encode.
        """
        _check_text(text)
        ids = self._library.encode_marked(text) if control_tokens else self._library.encode(text)
        return [self.bos_token_id, *ids] if bos and self.adds_bos and self.bos_token_id is not None else ids

    def encode_as_written(self, text: str) -> list[int]:
        """Ids of a text, without BOS, as `transformers` gives them: not normalised, with control tokens by their names.

        With a `tokenizer.json` they are those of `encode(text, bos=False, control_tokens=True)`.

        Raises:
            TokenizerError: as for `encode`.
        """
        _check_text(text)
        return self._library.encode_marked(text, normalize=False)

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

    def encode_prompt(
        self, text: str, *, chat: bool | None = None, system: str | None = None, input: str = ""
    ) -> list[int]:
        """Ids of a prompt as the model knows prompts; see `prompt_format`.

        Args:
            chat: whether to use the chat template; False: the text as it is.
            system: system message; requires the chat template.
            input: what an instruction applies to.
        Raises:
            TokenizerError: if the chat template is required and the model has none.
        """
        return self.encode_as(self.prompt_format(chat, system), text, input=input, system=system)

    def encode_as(
        self, example_format: ExampleFormat, text: str, *, input: str = "", system: str | None = None
    ) -> list[int]:
        """Ids of a prompt in a format; arguments as for `encode_prompt`.

        Raises:
            TokenizerError: if it is the chat template's and the model has none.
        """
        if example_format.style != "chat":
            return self.encode(example_format.prompt_text(text, input))
        before = [{"role": "system", "content": system}] if system else []
        return self.encode_chat([*before, {"role": "user", "content": question(text, input)}])

    def prompt_format(self, chat: bool | None = None, system: str | None = None) -> ExampleFormat:
        """How `encode_prompt` presents a prompt; arguments and errors as there.

        By default as in the examples that the model was tuned on, if it records their format. Otherwise in the chat
        template, or as plain text if there is none.
        """
        known = self.example_format if chat is None else None
        default = CHAT if self.has_chat_template else PLAIN_TEXT
        asked = known or (default if chat is None else CHAT if chat else PLAIN_TEXT)
        if system is not None and asked.style != "chat":
            why = ", but `chat=False` turns it off" if chat is False else ""
            why = f", but the model was tuned on examples in {asked.records} format" if known else why
            raise TokenizerError(f"`system` requires a chat template{why}")
        if asked.style == "chat" and not self.has_chat_template:
            raise TokenizerError("this is a base model without a chat template; it can only continue text")
        return asked

    def uses_chat_template(self, chat: bool | None = None, system: str | None = None) -> bool:
        """Whether `encode_prompt` uses the chat template; arguments and errors as there."""
        return self.prompt_format(chat, system).style == "chat"

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True, bos: bool = True
    ) -> list[int]:
        """Ids of a conversation in the chat template.

        In CoreNet's template, the text between control tokens is encoded segment by segment, as when the models were
        tuned. Another template is rendered, and the names of control tokens in the result become these tokens.

        Args:
            messages: mappings with `role` (system, user or assistant) and `content`.
            add_generation_prompt: whether to end where the assistant's answer begins.
            bos: whether to keep the BOS that the template begins with.
        Raises:
            TokenizerError: if the model has no chat template or a message is malformed.
        """
        self._check(messages)
        if not self._is_openelm:
            ids = self.encode(self._rendered(messages, add_generation_prompt), bos=False, control_tokens=True)
            return ids if bos or ids[:1] != [self.bos_token_id] else ids[1:]
        ids = [self.bos_token_id] if bos and self.bos_token_id is not None else []
        for number, text in enumerate(openelm_segments(messages, add_generation_prompt)):
            ids += [self.eos_token_id] if number else []
            ids += self.encode(text, bos=False)
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Text of a conversation, for people; without BOS in CoreNet's template.

        Raises:
            TokenizerError: as for `encode_chat`.
        """
        self._check(messages)
        if not self._is_openelm:
            return self._rendered(messages, add_generation_prompt)
        return self._library.piece(self.eos_token_id).join(openelm_segments(messages, add_generation_prompt))

    @property
    def added_tokens(self) -> Mapping[int, Mapping[str, Any]]:
        """Control tokens and added tokens by id, in the form of `added_tokens_decoder` in `tokenizer_config.json`."""
        return self._library.added_tokens

    @cached_property
    def token_names(self) -> dict[str, str]:
        """Names of control tokens by their role, such as `eos_token`: those in the settings, and what is known."""
        said = {role: token_name(entry) for role, entry in self.settings.items() if role.endswith("_token")}
        names = {role: name for role, name in said.items() if name is not None}
        if unknown := unknown_name(self.added_tokens):
            names.setdefault("unk_token", unknown)
        if self.bos_token_id is not None:
            names["bos_token"] = self._library.piece(self.bos_token_id)
        return {**names, "eos_token": self._library.piece(self.eos_token_id)}

    @property
    def is_sentencepiece(self) -> bool:
        """Whether `path` is a `tokenizer.model` that knows all tokens."""
        return isinstance(self._library, SentencePiece)

    @cached_property
    def tokenizer_json(self) -> str | None:
        """The content of a `tokenizer.json` that gives the same ids; `None` if none is known.

        It is the file's own, or derived from a SentencePiece BPE model. BOS is added there too.
        """
        if isinstance(self._library, SentencePiece):
            from .sentencepiece_json import same_ids, tokenizer_json  # seldom needed

            content = tokenizer_json(self._library)
            return content if same_ids(self._library, Tokenizers(self.path, {}, content)) else None
        assert isinstance(self._library, Tokenizers)
        return self._library.content_with_bos()

    def pieces(self) -> list[str]:
        """The vocabulary in the order of its ids."""
        return [self._library.piece(token) for token in range(self.vocab_size)]

    def vocab_hash(self) -> str:
        """SHA-256 of the vocabulary in the order of its ids; the same for both file types."""
        return hashlib.sha256("\0".join(self.pieces()).encode()).hexdigest()

    def _check(self, messages: Sequence[Mapping[str, str]]) -> None:
        if not self.has_chat_template:
            raise TokenizerError("this is a base model without a chat template; it can only continue text")
        check_messages(messages, CHAT_ROLES if self._is_openelm else None)

    def _rendered(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        assert self._chat_template is not None
        return render_template(
            self._chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tokens=self.token_names,
        )


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


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(f"the text contains a lone surrogate at character {error.start:,}") from error


def _open(path: Path, settings: Mapping[str, Any], vocab_size: int | None) -> Library:
    """The file in the package that reads it; for a `tokenizer.model` to which tokens were added, as a JSON text."""
    if path.suffix == ".json":
        return Tokenizers(path, settings, vocab_size=vocab_size)
    library = SentencePiece(path, settings)
    added = {
        token: entry
        for token, entry in added_tokens_beside(path, settings).items()
        if not library.has(token, entry["content"]) and (vocab_size is None or token < vocab_size)
    }
    if not added:
        return library
    for token, entry in added.items():
        if token < library.vocab_size and library.piece(token) != entry["content"]:
            raise TokenizerError(
                f"{path.with_name(ADDED_TOKENS_FILE)} or {SETTINGS_FILE} gives the id {token} to "
                f"{quoted(entry['content'])}, but {path.name} to {quoted(library.piece(token))}"
            )
    other = path.with_name(JSON_FILE)
    if exists(other):
        return Tokenizers(other, settings, vocab_size=vocab_size)
    from .sentencepiece_json import same_ids, tokenizer_json

    extended = Tokenizers(path, settings, tokenizer_json(library, added))
    if not same_ids(library, extended):
        raise TokenizerError(
            f"{path} has added tokens, and its own are not SentencePiece BPE; pass a tokenizer.json as tokenizer"
        )
    return extended
