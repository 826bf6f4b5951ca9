"""Text in, text out: streaming, stop strings and figures about a generation."""

import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ..errors import PromptError
from ..machine.device import peak_memory_bytes, wired_memory
from ..model.openelm import OpenELM
from ..tokenizer.tokenizer import Tokenizer
from .drafters import Drafter
from .engine import MAX_TOKENS, Progress, Step, generate_tokens
from .prompt_cache import PromptCache
from .sampling import SamplingConfig
from .speculative import speculate_tokens
from .stop import StopStrings


@dataclass(frozen=True)
class Stats:
    """Figures about a generation so far."""

    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float  # until the first token
    decode_seconds: float  # from the first token on
    peak_memory_bytes: int
    drafted_tokens: int = 0  # of speculative decoding
    accepted_tokens: int = 0  # those that were right
    reused_tokens: int = 0  # of the prompt, whose keys and values were there already
    seed: int | None = None  # that the text was sampled with; None where it was not sampled

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens that were computed over the time to the first token."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the time that they took; 0 for a single token."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance(self) -> float | None:
        """Share of the draft tokens that were accepted; `None` without draft tokens."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None


@dataclass(frozen=True)
class GenerationChunk:
    """What one more token brought."""

    text: str  # "" while a character or a possible stop string is incomplete
    token: int
    logprob: float
    finish_reason: str | None  # "stop" (end of text or stop string), "length", or None: more follows
    stats: Stats


@dataclass
class Generation:
    """A whole generation, put together from its chunks."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats | None = None

    def add(self, chunk: GenerationChunk) -> None:
        """Take in the next chunk."""
        self.text += chunk.text
        self.tokens.append(chunk.token)
        self.logprobs.append(chunk.logprob)
        self.finish_reason = chunk.finish_reason
        self.stats = chunk.stats

    def to_dict(self) -> dict[str, Any]:
        """Everything, with the rates that follow from it, for JSON."""
        values = asdict(self)
        if self.stats is not None:
            values["stats"]["prefill_tokens_per_second"] = self.stats.prefill_tokens_per_second
            values["stats"]["decode_tokens_per_second"] = self.stats.decode_tokens_per_second
            values["stats"]["acceptance"] = self.stats.acceptance
        return values


def generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = MAX_TOKENS,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    stop: Iterable[str] = (),
    cache: PromptCache | None = None,
    drafter: Drafter | None = None,
    on_prefill: Progress | None = None,
) -> str:
    """The text that follows a prompt; arguments and errors as for `stream_generate`."""
    chunks = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        cache=cache,
        drafter=drafter,
        on_prefill=on_prefill,
    )
    return "".join(chunk.text for chunk in chunks)


def stream_generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = MAX_TOKENS,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    stop: Iterable[str] = (),
    cache: PromptCache | None = None,
    drafter: Drafter | None = None,
    on_prefill: Progress | None = None,
) -> Generator[GenerationChunk, None, None]:
    """Continue a prompt and yield a `GenerationChunk` with every token; the last one has a `finish_reason`.

    Args:
        prompt: plain text, which gets its BOS here, or ids, taken as they are.
        max_tokens: how many tokens to generate at most, at least 1.
        stop: texts that end the generation; neither they nor what follows them is given out.
        cache: of an earlier text; what the prompt shares with it is not computed again. It then holds the prompt and
            what was generated.
        drafter: proposes draft tokens (see `speculate_tokens`); the text stays the same.
        on_prefill: called with the number of prompt tokens done and their total.

    Raises:
        PromptError: if the prompt is empty or asks for no tokens.
        MemoryLimitError: if the prompt does not fit into memory.
        CacheError: if there is a drafter and the cache keeps a window.
    """
    check_request(prompt, max_tokens)
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    cache = cache if cache is not None else PromptCache(model)
    sampling = sampling.with_seed()
    before, fresh = cache.reuse(tokens)
    seed = None if sampling.is_greedy else sampling.seed
    row = TextStream(model, tokenizer, len(tokens), max_tokens, stop, drafter, reused=len(before), seed=seed)
    write = generate_tokens if drafter is None else partial(speculate_tokens, drafter=drafter)
    steps = write(
        model, fresh, max_tokens=max_tokens, sampling=sampling, cache=cache.kv, before=before, on_prefill=on_prefill
    )
    generated: list[int] = []
    try:
        with wired_memory():
            for step in steps:
                generated.append(step.token)
                chunk = row.push(step)
                yield chunk
                if chunk.finish_reason:
                    break
    finally:
        cache.hold([*tokens, *generated])


def check_request(prompt: str | Sequence[int], max_tokens: int) -> None:
    """Raises: PromptError, if there is nothing to continue, or no token asked for."""
    if not prompt:
        raise PromptError("the prompt is empty; there is nothing to continue")
    if max_tokens < 1:
        raise PromptError(f"max_tokens is {max_tokens}; at least one token has to be asked for")


class TextStream:
    """One generation on its way from tokens to text."""

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        prompt_tokens: int,
        max_tokens: int,
        stop: Iterable[str],
        drafter: Drafter | None = None,
        reused: int = 0,
        seed: int | None = None,
    ):
        self._eos = model.config.eos_token_id
        self._decoder = tokenizer.stream_decoder()
        self._stop = StopStrings(stop)
        self._max_tokens = max_tokens
        self._prompt_tokens = prompt_tokens
        self._reused = reused
        self._seed = seed
        self._drafter = drafter
        self._drafted_before, self._accepted_before = self._draft_counts()
        self._generated = 0
        self._start = self._first = time.perf_counter()

    @property
    def wants_more(self) -> bool:
        """Whether a token behind the next one may be wanted."""
        return self._generated + 1 < self._max_tokens

    def push(self, step: Step) -> GenerationChunk:
        """What one more token brought."""
        stats = self._tick()
        ended = step.token == self._eos
        text = self._stop.push("" if ended else self._decoder.push(step.token))
        is_last = self._generated == self._max_tokens
        finish_reason = "stop" if ended or self._stop.found else "length" if is_last else None
        if finish_reason and not self._stop.found:
            text += self._stop.push(self._decoder.finish()) + self._stop.finish()
            finish_reason = "stop" if self._stop.found else finish_reason
        return GenerationChunk(text, step.token, step.logprob, finish_reason, stats)

    def _draft_counts(self) -> tuple[int, int]:
        """Draft tokens so far, for this text and earlier ones, and how many of them were accepted."""
        return (self._drafter.drafted, self._drafter.accepted) if self._drafter is not None else (0, 0)

    def _tick(self) -> Stats:
        now = time.perf_counter()
        self._generated += 1
        if self._generated == 1:
            self._first = now
        drafted, accepted = self._draft_counts()
        return Stats(
            self._prompt_tokens,
            self._generated,
            self._first - self._start,
            now - self._first,
            peak_memory_bytes(),
            drafted - self._drafted_before,
            accepted - self._accepted_before,
            self._reused,
            self._seed,
        )
