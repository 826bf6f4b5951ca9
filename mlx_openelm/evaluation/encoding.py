"""Requests as token ids, by the rules of lm-evaluation-harness, so that scores can be compared with published ones."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..tokenizer.tokenizer import Tokenizer
from .requests import Request


class TokenRequest(NamedTuple):
    """Ids (int32) of a context and its continuation, and how many of the last ones are the continuation.

    `is_truncated` says whether ids were cut off at the beginning.
    """

    ids: np.ndarray
    num_scored: int
    is_truncated: bool = False

    @property
    def inputs(self) -> np.ndarray:
        """What the model reads: all ids but the last."""
        return self.ids[:-1]


class RequestEncoder:
    """Encodes requests for a model.

    The rules are those of `TemplateLM.loglikelihood` and `HFLM` in the harness: blanks at the end of the context move
    to the continuation; both are encoded as one text, which is cut behind as many tokens as the context has alone; an
    empty context is the token that begins a text; and of a text that is too long, the end is kept, without BOS.

    Args:
        tokenizer: of the model; each text begins with BOS if it says so.
        max_length: most tokens that the model reads.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._context_length = lru_cache(maxsize=256)(lambda text: len(self.text_ids(text)))  # choices share a context

    def __call__(self, request: Request) -> TokenRequest | None:
        """The ids of a request; `None` if its continuation has no token of its own or is longer than `max_length`."""
        context, continuation = request
        if not context:
            return self._after_nothing(continuation)
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        ids = self.text_ids(kept + continuation)
        return self.truncated(ids, len(ids) - self._context_length(kept))

    def text_ids(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text; BOS is not added twice, and the names of control tokens are these tokens."""
        ids = self._tokenizer.encode(text, bos=False, control_tokens=True)
        begin = self._tokenizer.bos_token_id
        if not bos or begin is None or not self._tokenizer.adds_bos or ids[:1] == [begin]:
            return ids
        return [begin, *ids]

    def truncated(self, ids: list[int], num_scored: int) -> TokenRequest | None:
        """A request of which at most the last `max_length` + 1 ids are kept; `None` as for a call."""
        if not 0 < num_scored <= self._max_length:
            return None
        kept = ids[-(self._max_length + 1) :]
        return TokenRequest(np.array(kept, np.int32), num_scored, len(kept) < len(ids))

    @property
    def prefix_token(self) -> int:
        """The token that begins a text: BOS, or else EOS."""
        begin = self._tokenizer.bos_token_id
        return self._tokenizer.eos_token_id if begin is None else begin

    def _after_nothing(self, continuation: str) -> TokenRequest | None:
        ids = self.text_ids(continuation, bos=False)
        if ids[:1] == [self.prefix_token]:
            return self.truncated(ids, len(ids) - 1)
        return self.truncated([self.prefix_token, *ids], len(ids))
