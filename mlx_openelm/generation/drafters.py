"""What proposes draft tokens for speculative decoding: the text itself, or a smaller model."""

from collections.abc import Sequence

import mlx.core as mx

from ..cache.kv_cache import KVCache
from ..errors import PromptError
from ..model.openelm import OpenELM
from .decode_step import DecodeStep
from .draft_length import DraftLengthController
from .engine import prefill
from .sampling import Sampler, State

DEFAULT_MAX_DRAFT = 8  # draft tokens in one pass
LARGEST_MAX_DRAFT = 64
_LONGEST_NGRAM = 3  # tokens; the longest end of the text that prompt lookup searches for
_SHORTEST_NGRAM = 2


class Drafter:
    """Proposes the next tokens. `length` learns from what became of them how many to propose.

    Args:
        max_draft: the most draft tokens in one pass, 1 to 64.

    Raises:
        PromptError: if `max_draft` is outside its range.

    Attributes:
        drafted: draft tokens so far.
        accepted: how many of them were accepted.
    """

    def __init__(self, max_draft: int = DEFAULT_MAX_DRAFT):
        if not 1 <= max_draft <= LARGEST_MAX_DRAFT:
            raise PromptError(f"`max_draft` must be 1 to {LARGEST_MAX_DRAFT}; got {max_draft}")
        self.drafted = 0
        self.accepted = 0
        self.length = DraftLengthController(max_draft)

    def start(self, text: Sequence[int], sampler: Sampler, compiled: bool) -> None:
        """Begin a new text with these tokens."""
        self.length.start()

    def draft(self, text: Sequence[int], count: int, state: State) -> mx.array | None:
        """At most `count` draft tokens (n,) for a text whose next token is chosen with this state; or None."""
        raise NotImplementedError

    def record(self, text: Sequence[int], drafted: int, accepted: int) -> None:
        """Take in how many of the draft tokens after `text` were accepted."""
        self.drafted += drafted
        self.accepted += accepted
        self.length.record_acceptance(drafted, accepted)


class PromptLookup(Drafter):
    """Proposes what followed the last occurrence of the text's final tokens (prompt-lookup decoding).

    Args:
        max_draft: the most draft tokens in one pass, 1 to 64.
    """

    def __init__(self, max_draft: int = DEFAULT_MAX_DRAFT):
        super().__init__(max_draft)
        self._ends: dict[tuple[int, ...], int] = {}  # of the last occurrence of each n-gram
        self._indexed = 0

    def start(self, text: Sequence[int], sampler: Sampler, compiled: bool) -> None:
        super().start(text, sampler, compiled)
        self._ends = {}
        self._indexed = 0

    def draft(self, text: Sequence[int], count: int, state: State) -> mx.array | None:
        for end in range(max(self._indexed, 1), len(text)):  # the end of the text itself is not an occurrence
            for length in range(_SHORTEST_NGRAM, min(_LONGEST_NGRAM, end) + 1):
                self._ends[tuple(text[end - length : end])] = end
        self._indexed = len(text)
        for length in range(min(_LONGEST_NGRAM, len(text)), _SHORTEST_NGRAM - 1, -1):
            found = self._ends.get(tuple(text[len(text) - length :]))
            if found is not None:
                period = len(text) - found  # past the end of the text, it is taken to repeat
                return mx.array([text[found + number % period] for number in range(count)], mx.uint32)
        return None


class DraftModel(Drafter):
    """Proposes what a smaller model with the same vocabulary writes.

    Args:
        max_draft: the most draft tokens in one pass, 1 to 64.
    """

    def __init__(self, model: OpenELM, max_draft: int = DEFAULT_MAX_DRAFT):
        super().__init__(max_draft)
        self.model = model
        self._cache: KVCache
        self._step: DecodeStep

    def start(self, text: Sequence[int], sampler: Sampler, compiled: bool) -> None:
        super().start(text, sampler, compiled)
        self._cache = self.model.make_cache()

        def choose(logits: mx.array, state: State) -> tuple[mx.array, State]:
            token, _, state = sampler.choose(logits[0, -1], state)
            return token, state

        self._choose = choose
        self._step = DecodeStep(self.model, choose, compiled)
        if len(text) > 1:
            prefill(self.model, mx.array(list(text[:-1])), self._cache)
            mx.eval(self._cache.arrays)

    def draft(self, text: Sequence[int], count: int, state: State) -> mx.array | None:
        unread = mx.array([list(text[self._cache.offset :])], mx.uint32)
        if unread.size > 2:  # after a backoff
            hidden = prefill(self.model, unread[0], self._cache)
            token, state = self._choose(self.model.logits(hidden), state)
        else:
            token, state = self._step(unread, state, self._cache)
        tokens = [token]
        while len(tokens) < count:
            token, state = self._step(token[None, None], state, self._cache)
            tokens.append(token)
        return mx.stack(tokens)

    def record(self, text: Sequence[int], drafted: int, accepted: int) -> None:
        super().record(text, drafted, accepted)
        valid = len(text) + min(accepted, drafted - 1)  # the draft model never read its last draft token
        self._cache.trim(max(0, self._cache.offset - valid))
