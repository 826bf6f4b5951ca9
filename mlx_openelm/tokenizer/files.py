"""Finding a tokenizer, and writing one in the files that other programs read.

Apple's repositories contain no tokenizer, and Llama's, which the models use, is gated. So several places are tried, and
third-party copies are accepted only if their vocabulary is the known one.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HubUnreachableError, OpenELMError, TokenizerError
from ..files.paths import exists, is_file, user_path
from ..hub import cached_file, download_file, model_folder
from .example_format import format_entry
from .settings import JSON_FILE, SETTINGS_FILE, token_name, unknown_name
from .tokenizer import Tokenizer

FILE_NAMES = ("tokenizer.model", JSON_FILE)
LLAMA_REPO = "meta-llama/Llama-2-7b-hf"
PUBLIC_COPIES = ("NousResearch/Llama-2-7b-hf", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "huggyllama/llama-7b")
LLAMA_VOCAB_SIZE = 32000
LLAMA_VOCAB_HASH = "b43c657d6772da32c3e0971ab610fc3d6a7e45089582758d1bc5160e5cdbe588"

# What a tokenizer_config.json says that stays true in another folder; code and classes do not.
_KEPT_SETTINGS = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens", "model_max_length", "padding_side", "truncation_side"),
)


def has_tokenizer(folder: Path | None) -> bool:
    """Whether a folder contains a tokenizer."""
    return folder is not None and any(exists(folder / name) for name in FILE_NAMES)


def find_tokenizer(
    requested: str | Path | None,
    folder: Path | None,
    vocab_size: int,
    *,
    chat_template: str | None = None,
    revision: str | None = None,
) -> tuple[Tokenizer, str]:
    """Find a model's tokenizer; returns it and its origin, in words.

    Args:
        requested: file, folder or hub id; if given, nothing else is tried.
        folder: the model's own folder.
        vocab_size: rows of the embedding; the tokenizer must not have more tokens.
        chat_template: the model's, if it was tuned on conversations.
        revision: branch, tag or commit of `requested`.
    Raises:
        TokenizerError: if no tokenizer is found, with each place and the reason, or if it has too many tokens.
    """
    if requested is not None:
        path = user_path(requested)
        place = path.parent if is_file(path) else model_folder(requested, revision)
        tokenizer = Tokenizer(path, vocab_size=vocab_size) if is_file(path) else _from_folder(place, vocab_size)
        origin = path.name if exists(path) else str(requested)
    elif has_tokenizer(folder):
        assert folder is not None
        tokenizer, origin = _from_folder(folder, vocab_size), "the model's own"
    else:
        tokenizer, origin = _llama_tokenizer(folder, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{tokenizer.path} has {tokenizer.vocab_size:,} tokens, but the model has only {vocab_size:,} embeddings"
        )
    tokenizer.chat_template = chat_template
    return tokenizer, origin


def _from_folder(folder: Path, vocab_size: int) -> Tokenizer:
    for name in FILE_NAMES:
        if exists(folder / name):
            return Tokenizer(folder / name, vocab_size=vocab_size)
    raise TokenizerError(f"{folder} contains neither {FILE_NAMES[0]} nor {FILE_NAMES[1]}")


@dataclass
class _Search:
    """Places tried for Llama's tokenizer, and why each was rejected."""

    failures: list[str] = field(default_factory=list)
    hub_answers: bool = True  # the first refusal of the hub itself is enough for all its repositories

    def attempt(self, place: str, fetch: Callable[[], Path]) -> Tokenizer | None:
        try:
            tokenizer = Tokenizer(fetch())
        except OpenELMError as error:
            self.failures.append(f"{place} ({str(error).removeprefix(f'{place} ')})")
            self.hub_answers = not isinstance(error, HubUnreachableError)
            return None
        if tokenizer.vocab_hash() != LLAMA_VOCAB_HASH:
            self.failures.append(f"{place} (its vocabulary is not Llama's)")
            return None
        return tokenizer


def _llama_tokenizer(folder: Path | None, vocab_size: int) -> tuple[Tokenizer, str]:
    search = _Search([f"{folder or 'the checkpoint'} (contains none)"])
    if vocab_size < LLAMA_VOCAB_SIZE:
        search.failures.append(f"Llama's ({LLAMA_VOCAB_SIZE:,} tokens; the model has only {vocab_size:,})")
        raise _nowhere(search)
    repos = (LLAMA_REPO, *PUBLIC_COPIES)
    for repo in repos:
        path = cached_file(repo, FILE_NAMES[0])
        if path is not None:
            tokenizer = search.attempt(f"{repo} in the Hugging Face cache", lambda path=path: path)  # type: ignore[misc]
            if tokenizer is not None:
                return tokenizer, f"{repo}, from the Hugging Face cache"
    if len(search.failures) == 1:
        search.failures.append("the Hugging Face cache (contains none)")
    from ..hub_client import progress_lines

    with progress_lines():
        for repo in repos:
            tokenizer = search.attempt(repo, lambda repo=repo: download_file(repo, FILE_NAMES[0]))  # type: ignore[misc]
            if tokenizer is not None:
                return tokenizer, repo
            if not search.hub_answers:
                break
    raise _nowhere(search)


def _nowhere(search: _Search) -> TokenizerError:
    return TokenizerError(
        f"no tokenizer found; tried {'; '.join(search.failures)}. Set `tokenizer` to a file, a folder or a hub id; "
        f"or request access to {LLAMA_REPO} on its page and run `hf auth login`; or use `tokenizer=none` to work "
        "without one"
    )


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer as `convert` does: its original file, and the files that other programs look for beside it."""
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).write_bytes(content)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The content of each file of a tokenizer, by name.

    `tokenizer.model` is there if it knows all tokens, `tokenizer.json` unless a SentencePiece model does something that
    it cannot express; one of them always is.
    """
    files: dict[str, bytes] = {}
    derived = tokenizer.tokenizer_json
    if tokenizer.is_sentencepiece:
        files[FILE_NAMES[0]] = tokenizer.path.read_bytes()
    if derived is not None:
        files[FILE_NAMES[1]] = derived.encode()
    files[SETTINGS_FILE] = (json.dumps(_settings(tokenizer), indent=2) + "\n").encode()
    return files


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """The `tokenizer_config.json` of a tokenizer: what its own says about tokens, and what this package knows."""
    known = set(tokenizer.pieces())
    kept = {name: value for name, value in tokenizer.settings.items() if name in _KEPT_SETTINGS}
    names = tokenizer.token_names
    settings = {
        "unk_token": unknown_name(tokenizer.added_tokens),
        **{name: value for name, value in kept.items() if not _names_unknown(name, value, known)},
        "tokenizer_class": "PreTrainedTokenizerFast",  # the class that uses tokenizer.json unchanged
        "bos_token": None if tokenizer.bos_token_id is None else names["bos_token"],
        "eos_token": names["eos_token"],
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(token): _entry(entry) for token, entry in tokenizer.added_tokens.items()},
        "chat_template": tokenizer.chat_template,
        **format_entry(tokenizer.example_format),
    }
    return {name: value for name, value in settings.items() if value is not None}


def _names_unknown(name: str, value: Any, known: set[str]) -> bool:
    """Whether a setting names a token that the tokenizer does not have."""
    if not name.endswith(("_token", "_tokens")):
        return False
    entries = value if isinstance(value, list) else [value]
    return not all(token_name(entry) in known for entry in entries)


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "id"}
