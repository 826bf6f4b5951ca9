"""A `tokenizer.json` from a SentencePiece BPE model."""

import json
import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .libraries import SPACE, Library, SentencePiece, adds_space, bos_first

_TRIED_TEXTS = 300


def tokenizer_json(source: SentencePiece, added_tokens: Mapping[int, Mapping[str, Any]] = MappingProxyType({})) -> str:
    """The content of a `tokenizer.json` for a SentencePiece BPE model.

    Whether it gives the same ids has to be tried: what a model does besides BPE is not visible from outside.

    Args:
        added_tokens: more tokens by id, in the form of `added_tokens_decoder`.
    """
    pieces = [source.piece(token) for token in range(source.vocab_size)]
    ids = {piece: token for token, piece in enumerate(pieces)}
    added = dict(sorted({**source.added_tokens, **added_tokens}.items()))
    has_space = adds_space(source)
    unknown = next((piece for token, piece in enumerate(pieces) if source.is_unknown(token)), None)
    bos = None if source.bos_token_id is None else pieces[source.bos_token_id]
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, **entry} for token, entry in added.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                *([{"type": "Prepend", "prepend": SPACE}] if has_space else []),
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None if source.bos_token_id is None else bos_first(source.bos_token_id, bos or ""),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_space else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": "<0x00>" in ids,
            "ignore_merges": False,
            "vocab": ids,
            "merges": _merges(source, ids),
        },
    }
    return json.dumps(values, ensure_ascii=False, indent=1)


def _merges(source: SentencePiece, ids: Mapping[str, int]) -> list[list[str]]:
    """Pairs that BPE merges, in the order of the scores of what they make.

    The order of ids is not enough: in Llama's vocabulary, pieces of spaces alone have early ids and the same last
    score. Of equal scores SentencePiece merges the leftmost pair, so that a run of spaces grows at its left end:
    longer pieces come first, and of these the pair with the shorter right part.
    """
    merges = []
    for piece, token in ids.items():
        if len(piece) < 2 or not source.is_normal(token):
            continue
        order = (-source.score(token), -len(piece))
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((*order, len(right), token, left, right))
    return [[left, right] for *_, left, right in sorted(merges)]


def same_ids(one: Library, other: Library) -> bool:
    """Whether two tokenizers give the same ids for texts made of their own pieces, of spaces and of rare characters."""
    chance = random.Random(0)
    characters = "  \t\n.,0159aeinoT<>|/s_é\u0301ß日本🎉\u200dﬁ①Ａ²…ﾊ\u00a0\u3000\u1e9e"
    pieces = [one.piece(token).replace(SPACE, " ") for token in range(one.vocab_size)]
    for _ in range(_TRIED_TEXTS):
        parts = [*chance.choices(pieces, k=4), *chance.choices(characters, k=4)]
        chance.shuffle(parts)
        text = "".join(parts)
        if one.encode(text) != other.encode(text):
            return False
    return all(one.encode(text) == other.encode(text) for text in ("", " ", " " * 40, "a" * 200, "<s> </s>"))
