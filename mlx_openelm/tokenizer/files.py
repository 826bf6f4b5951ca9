"""Finding a tokenizer, and writing one in the files that other programs read.

Apple's repositories contain no tokenizer, and Llama's, which the models use, is gated. So several places are tried, and
third-party copies are accepted only if their vocabulary is the known one.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OpenELMError, TokenizerError
from ..files.paths import exists, is_file, user_path
from ..hub import cached_file, download_file, model_folder
from .tokenizer import Tokenizer

FILE_NAMES = ("tokenizer.model", "tokenizer.json")
LLAMA_REPO = "meta-llama/Llama-2-7b-hf"
PUBLIC_COPIES = ("NousResearch/Llama-2-7b-hf", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "huggyllama/llama-7b")
LLAMA_VOCAB_SIZE = 32000
LLAMA_VOCAB_HASH = "b43c657d6772da32c3e0971ab610fc3d6a7e45089582758d1bc5160e5cdbe588"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_PROBE = "Zwölf  Boxkämpfer\tjagen 3.14 quick-witted foxes,\n(don't they?) — 日本 🎉 <s> </s>"


def has_tokenizer(folder: Path | None) -> bool:
    """Whether a folder contains a tokenizer."""
    return folder is not None and any(exists(folder / name) for name in FILE_NAMES)


def find_tokenizer(
    requested: str | Path | None, folder: Path | None, vocab_size: int, *, chat: bool, revision: str | None = None
) -> tuple[Tokenizer, str]:
    """Find a model's tokenizer; returns it and its origin, in words.

    Args:
        requested: file, folder or hub id; if given, nothing else is tried.
        folder: the model's own folder.
        vocab_size: rows of the embedding; the tokenizer must not have more tokens.
        chat: whether the model was tuned on conversations.
        revision: branch, tag or commit of `requested`.
    Raises:
        TokenizerError: if no tokenizer is found, with each place and the reason, or if it has too many tokens.
    """
    if requested is not None:
        path = user_path(requested)
        place = path.parent if is_file(path) else model_folder(requested, revision)
        tokenizer = Tokenizer(path, chat=chat) if is_file(path) else _from_folder(place, chat)
        origin = path.name if exists(path) else str(requested)
    elif has_tokenizer(folder):
        assert folder is not None
        tokenizer, origin = _from_folder(folder, chat), "the model's own"
    else:
        tokenizer, origin = _llama_tokenizer(folder, vocab_size, chat)
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{tokenizer.path} has {tokenizer.vocab_size:,} tokens, but the model has only {vocab_size:,} embeddings"
        )
    return tokenizer, origin


def _from_folder(folder: Path, chat: bool) -> Tokenizer:
    for name in FILE_NAMES:
        if exists(folder / name):
            return Tokenizer(folder / name, chat=chat)
    raise TokenizerError(f"{folder} contains neither {FILE_NAMES[0]} nor {FILE_NAMES[1]}")


@dataclass
class _Search:
    """Places tried for Llama's tokenizer, and why each was rejected."""

    chat: bool
    failures: list[str] = field(default_factory=list)

    def attempt(self, place: str, fetch: Callable[[], Path]) -> Tokenizer | None:
        try:
            tokenizer = Tokenizer(fetch(), chat=self.chat)
        except OpenELMError as error:
            self.failures.append(f"{place} ({str(error).removeprefix(f'{place} ')})")
            return None
        if tokenizer.vocab_hash() != LLAMA_VOCAB_HASH:
            self.failures.append(f"{place} (its vocabulary is not Llama's)")
            return None
        return tokenizer


def _llama_tokenizer(folder: Path | None, vocab_size: int, chat: bool) -> tuple[Tokenizer, str]:
    search = _Search(chat, [f"{folder or 'the checkpoint'} (contains none)"])
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
    for repo in repos:
        tokenizer = search.attempt(repo, lambda repo=repo: download_file(repo, FILE_NAMES[0]))  # type: ignore[misc]
        if tokenizer is not None:
            return tokenizer, repo
    raise _nowhere(search)


def _nowhere(search: _Search) -> TokenizerError:
    return TokenizerError(
        f"no tokenizer found; tried {'; '.join(search.failures)}. Set `tokenizer` to a file, a folder or a hub id; "
        f"or request access to {LLAMA_REPO} on its page and run `hf auth login`; or use `tokenizer=none` to work "
        "without one"
    )


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer as `convert` does: its original file, and the files that other programs look for beside it.

    A `tokenizer.json` is derived from a SentencePiece BPE model if it produces the same ids.
    """
    shutil.copyfile(tokenizer.path, folder / tokenizer.path.with_stem("tokenizer").name)
    if tokenizer.path.suffix != ".json":
        path = folder / FILE_NAMES[1]
        path.write_text(json.dumps(_tokenizer_json(tokenizer), ensure_ascii=False, indent=1), encoding="utf-8")
        if Tokenizer(path).encode(_PROBE) != tokenizer.encode(_PROBE):
            path.unlink()  # not BPE, or not normalised to NFC; tokenizer.model suffices
    pieces = tokenizer.pieces()
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the class that uses tokenizer.json unchanged
        "bos_token": pieces[tokenizer.bos_token_id],
        "eos_token": pieces[tokenizer.eos_token_id],
        "unk_token": "<unk>" if "<unk>" in pieces else None,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.has_chat_template:
        settings["chat_template"] = CHAT_TEMPLATE
    text = json.dumps({name: value for name, value in settings.items() if value is not None}, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A SentencePiece BPE model in the format of the `tokenizers` package."""
    pieces = tokenizer.pieces()
    ids = {piece: token for token, piece in enumerate(pieces)}
    bos = pieces[tokenizer.bos_token_id]
    special = dict.fromkeys(["<unk>", bos, pieces[tokenizer.eos_token_id]])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": ids[piece],
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for piece in special
            if piece in ids
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_token_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>" if "<unk>" in ids else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": "<0x00>" in ids,
            "ignore_merges": False,
            "vocab": ids,
            "merges": _merges(pieces, ids),
        },
    }


def _merges(pieces: list[str], ids: dict[str, int]) -> list[list[str]]:
    """Pairs that BPE merges, most frequent first: SentencePiece numbers its pieces in the order of their merges."""
    merges = []
    for piece in pieces:
        if len(piece) < 2 or (piece.startswith("<") and piece.endswith(">")):
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(ids[left], ids[right], left, right) for left, right in pairs if left in ids and right in ids]
        merges += [[left, right] for _, _, left, right in sorted(known)]
    return merges
