"""Speculative decoding: something cheap guesses the next tokens, and the model checks all of them in one pass.

The check is the model's own choice at each place, by the same sampler and the same random keys as without guesses; a
guess counts if it is that choice. So the text is the one that the model writes alone, token for token, whether it takes
the likeliest token or samples with a seed. (Leviathan et al., arXiv:2211.17192, accept by a rule that keeps the
distribution, but not the text.) What remains is rounding: a pass over several tokens adds up in another order.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..cache.config import CacheConfig
from ..cache.kv_cache import KVCache
from ..errors import CacheError, PromptError
from ..machine.device import pays_to_compile
from ..model.openelm import OpenELM
from .engine import MAX_TOKENS, DecodeStep, Progress, Step, as_prompt, check_memory, first_choice, prefill, whole_text
from .sampling import Sampler, SamplingConfig, State

MAX_DRAFT = 8  # guesses in one pass
_MOST_DRAFT = 64
_LONGEST_NGRAM = 3  # tokens; the longest end of the text that prompt lookup searches for
_SHORTEST_NGRAM = 2
_UNDRAFTED = 4  # tokens that are decoded without guesses when there are none to make
_FADING = 0.9  # of what older guesses say, with each pass
_LONGEST_REST = 64  # tokens between two attempts of one whose guesses bring nothing


class Drafter:
    """Guesses what comes next, and learns from what became of it how much to guess.

    Raises:
        PromptError: if the most guesses in one pass are none, or more than 64.

    Attributes:
        drafted: guesses so far.
        accepted: how many of them were right.
    """

    def __init__(self, max_draft: int = MAX_DRAFT):
        if not 1 <= max_draft <= _MOST_DRAFT:
            raise PromptError(f"{max_draft} guesses in one pass cannot be made; there are 1 to {_MOST_DRAFT}")
        self.drafted = 0
        self.accepted = 0
        self.pace = Pace(max_draft)

    def start(self, text: Sequence[int], sampler: Sampler, compiled: bool) -> None:
        """A new text begins with these tokens."""
        self.pace.start()

    def draft(self, text: Sequence[int], count: int, state: State) -> mx.array | None:
        """At most `count` guesses (n,) of what follows a text that is chosen with this state; `None` for no guess."""
        raise NotImplementedError

    def checked(self, text: Sequence[int], drafted: int, accepted: int) -> None:
        """So many guesses behind `text` were made, and so many of them right."""
        self.drafted += drafted
        self.accepted += accepted
        self.pace.checked(drafted, accepted)


class PromptLookup(Drafter):
    """Guesses that the text goes on as it did after the last place where it read the same.

    Args:
        max_draft: the most guesses in one pass.
    """

    def __init__(self, max_draft: int = MAX_DRAFT):
        super().__init__(max_draft)
        self._places: dict[tuple[int, ...], int] = {}
        self._known = 0

    def start(self, text: Sequence[int], sampler: Sampler, compiled: bool) -> None:
        super().start(text, sampler, compiled)
        self._places = {}
        self._known = 0

    def draft(self, text: Sequence[int], count: int, state: State) -> mx.array | None:
        for end in range(max(self._known, 1), len(text)):  # an end of the text itself is no place to look at
            for length in range(_SHORTEST_NGRAM, min(_LONGEST_NGRAM, end) + 1):
                self._places[tuple(text[end - length : end])] = end
        self._known = len(text)
        for length in range(min(_LONGEST_NGRAM, len(text)), _SHORTEST_NGRAM - 1, -1):
            place = self._places.get(tuple(text[len(text) - length :]))
            if place is not None:
                return mx.array(self._continued(text, place, count), mx.uint32)
        return None

    @staticmethod
    def _continued(text: Sequence[int], place: int, count: int) -> list[int]:
        """What follows a place; past the end of the text, what it would be if it went on turning."""
        turn = len(text) - place
        return [text[place + number % turn] for number in range(count)]


class DraftModel(Drafter):
    """Guesses what a smaller model of the same vocabulary writes.

    Args:
        max_draft: the most guesses in one pass.
    """

    def __init__(self, model: OpenELM, max_draft: int = MAX_DRAFT):
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
        new = mx.array([list(text[self._cache.offset :])], mx.uint32)
        if new.size > 2:  # after a rest
            hidden = prefill(self.model, new[0], self._cache)
            token, state = self._choose(self.model.logits(hidden), state)
        else:
            token, state = self._step(new, state, self._cache)
        tokens = [token]
        while len(tokens) < count:
            token, state = self._step(token[None, None], state, self._cache)
            tokens.append(token)
        return mx.stack(tokens)

    def checked(self, text: Sequence[int], drafted: int, accepted: int) -> None:
        super().checked(text, drafted, accepted)
        right = len(text) + min(accepted, drafted - 1)  # the last guess was never read
        self._cache.trim(max(0, self._cache.offset - right))


class Pace:
    """How many guesses pay: what they bring, by how many were right, over what a pass with them takes, as measured.

    The text does not depend on it, only the time.
    """

    def __init__(self, max_draft: int):
        self.max_draft = max_draft
        self.start()

    def start(self) -> None:
        """Forget what was learnt; the next text may be of another kind."""
        self._right = 1.0
        self._wrong = 1.0
        self._times: dict[int, deque[float]] = {}
        self._rest = _UNDRAFTED
        self._rested = False

    @property
    def agreement(self) -> float:
        """Estimated probability that a guess is right if those before it are."""
        return self._right / (self._right + self._wrong)

    def checked(self, drafted: int, accepted: int) -> None:
        """So many guesses were made, and so many of them right; those behind the first wrong one say nothing."""
        self._right = self._right * _FADING + accepted
        self._wrong = self._wrong * _FADING + (accepted < drafted)

    def took(self, drafted: int, seconds: float) -> None:
        """A pass with so many guesses took so long."""
        self._times.setdefault(drafted, deque(maxlen=5)).append(seconds)

    def next_length(self) -> int:
        """How many guesses to make now; 0 for a rest, whose length is `next_rest`."""
        if 0 not in self._times:
            return 0
        if len(self._times) == 1:
            return min(2, self.max_draft)
        best = max(range(self.max_draft + 1), key=self._tokens_per_second)
        if best:
            self._rest = _UNDRAFTED
        elif self._rested:  # try again, at the least cost
            best = 1
        self._rested = False
        return best

    def next_rest(self) -> int:
        """How many tokens to decode without guesses: more each time that guesses did not pay."""
        rest = self._rest
        if len(self._times) > 1:
            self._rest = min(2 * rest, _LONGEST_REST)
            self._rested = True
        return rest

    def _tokens_per_second(self, length: int) -> float:
        agreement = min(self.agreement, 0.99)
        tokens = (1 - agreement ** (length + 1)) / (1 - agreement)
        return tokens / self._seconds(length)

    def _seconds(self, length: int) -> float:
        """The fastest of the last passes of this length; of one never tried, as if each guess took the same."""
        if length in self._times:
            return min(self._times[length])
        plain = min(self._times[0])
        each = min((min(times) - plain) / tried for tried, times in self._times.items() if tried)
        return plain + length * max(each, 0.0)


def speculate_tokens(
    model: OpenELM,
    tokens: mx.array | Sequence[int],
    drafter: Drafter,
    *,
    max_tokens: int = MAX_TOKENS,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    cache: KVCache | None = None,
    before: Sequence[int] = (),
    on_prefill: Progress = lambda done, total: None,
    compiled: bool | None = None,
) -> Iterator[Step]:
    """As `generate_tokens`, with guesses; the cache may hold several tokens more than were taken.

    Args:
        before: the ids that the cache holds already; the drafter has to know them.

    Raises:
        PromptError: as `generate_tokens` does, or if the vocabulary of a draft model has another size.
        CacheError: if the cache keeps a window, which cannot go back behind a wrong guess.
    """
    prompt = as_prompt(model, tokens)
    cache = cache if cache is not None else model.make_cache()
    if cache.config.window is not None:
        raise CacheError("guesses need a cache that can go back behind a wrong one; leave out the window, or the draft")
    num_tokens = cache.offset + prompt.size + max_tokens
    if isinstance(drafter, DraftModel):
        if drafter.model.config.vocab_size != model.config.vocab_size:
            raise PromptError(
                f"the draft model has a vocabulary of {drafter.model.config.vocab_size:,} entries and the model one of "
                f"{model.config.vocab_size:,}; they have to share it"
            )
        check_memory(drafter.model, num_tokens, CacheConfig())
    check_memory(model, num_tokens, cache.config)
    if max_tokens < 1:
        return
    compiled = pays_to_compile(max_tokens) if compiled is None else compiled
    writer = _Writer(model, Sampler(sampling), cache, compiled)
    yield writer.begin(before, prompt, on_prefill)
    drafter.start(writer.text, writer.sampler, compiled)
    remaining = max_tokens - 1
    while remaining:
        for step in _next_steps(writer, drafter, remaining):
            remaining -= 1
            yield step


def _next_steps(writer: "_Writer", drafter: Drafter, remaining: int) -> Iterator[Step]:
    length = drafter.pace.next_length()
    if length < 1:
        return writer.alone(min(drafter.pace.next_rest(), remaining), drafter.pace)
    length = min(length, remaining - 1, writer.room)
    if length < 1:
        return writer.alone(min(_UNDRAFTED, remaining), drafter.pace)
    started = time.perf_counter()
    drafts = drafter.draft(writer.text, length, writer.state)
    if drafts is None:
        return writer.alone(min(_UNDRAFTED, remaining), drafter.pace)
    return writer.checked(drafts, drafter, started)


class _Writer:
    """The text so far, and the model's memory of all of it but the last token."""

    def __init__(self, model: OpenELM, sampler: Sampler, cache: KVCache, compiled: bool):
        self.text: list[int] = []
        self.state: State
        self.sampler = sampler
        self._model = model
        self._cache = cache
        self._one = DecodeStep(model, lambda logits, state: sampler.choose(logits[0, -1], state), compiled)
        self._several = DecodeStep(model, lambda logits, state: sampler.choose_along(logits[0], state), compiled)

    @property
    def room(self) -> int:
        """How many guesses may be read before keys and values are quantized, which none of them may bring about."""
        config = self._cache.config
        if config.bits is None or self._cache.is_quantized:
            return _MOST_DRAFT
        return config.quantize_after - self._cache.offset - 2

    def begin(self, before: Sequence[int], prompt: mx.array, on_prefill: Progress) -> Step:
        """The first token behind a prompt."""
        text = whole_text(before, prompt)
        state = self.sampler.start(text)
        token, logprob, self.state = first_choice(self._model, self.sampler, prompt, self._cache, state, on_prefill)
        ids: Any = text.tolist()
        self.text = ids
        return self._add(token.item(), logprob.item())

    def alone(self, count: int, pace: Pace) -> Iterator[Step]:
        """So many tokens without guesses, with the device one token ahead."""
        seconds = 0.0
        started = time.perf_counter()
        queued = self._one(mx.array([[self.text[-1]]], mx.uint32), self.state, self._cache)
        for left in range(count - 1, -1, -1):
            token, logprob, self.state = queued
            if left:
                queued = self._one(token[None, None], self.state, self._cache)
                mx.async_eval(queued)
            step = self._add(token.item(), logprob.item())
            seconds += time.perf_counter() - started
            yield step
            started = time.perf_counter()
        pace.took(0, seconds / count)

    def checked(self, drafts: mx.array, drafter: Drafter, started: float) -> Iterator[Step]:
        """Those of the guesses that are right, and the token behind them."""
        last = mx.array([self.text[-1]], mx.uint32)
        chosen, logprobs, (keys, recents) = self._several(mx.concatenate([last, drafts])[None], self.state, self._cache)
        mx.eval(chosen, logprobs, drafts)
        own: Any = chosen.tolist()
        guesses: Any = drafts.tolist()
        accepted = [*(one == other for one, other in zip(own, guesses, strict=False)), False].index(False)
        self._cache.trim(len(guesses) - accepted)
        self.state = keys[accepted], recents[accepted]
        mx.async_eval(self.state)  # else it would be asked for never, and grow
        drafter.checked(self.text, len(guesses), accepted)
        drafter.pace.took(len(guesses), time.perf_counter() - started)
        of_each: Any = logprobs.tolist()
        for number in range(accepted + 1):
            yield self._add(own[number], of_each[number])

    def _add(self, token: Any, logprob: Any) -> Step:
        self.text.append(token)
        return Step(token, logprob)
