"""Text in, text out: streaming, stop strings and statistics."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ..errors import PromptError
from ..machine.device import peak_memory_bytes, wired_memory
from ..model.openelm import OpenELM
from ..tokenizer.tokenizer import Tokenizer
from .defaults import default_sampling
from .drafters import Drafter
from .engine import MAX_TOKENS, Progress, Step, generate_tokens
from .prompt_cache import PromptCache
from .sampling import SamplingConfig
from .stop import StopStrings


@dataclass(frozen=True)
class Stats:
    """Statistics of a generation so far."""

    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float  # until the first token
    decode_seconds: float  # from the first token on
    peak_memory_bytes: int
    drafted_tokens: int = 0  # by speculative decoding
    accepted_tokens: int = 0  # draft tokens that the model accepted
    reused_tokens: int = 0  # prompt tokens whose keys and values were already cached
    seed: int | None = None  # used for sampling; None for greedy decoding

    @property
    def prefill_tokens_per_second(self) -> float:
        """Computed prompt tokens (without reused ones) per second until the first token."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second after the first token; 0 for a single token."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance(self) -> float | None:
        """Fraction of draft tokens that were accepted; `None` without draft tokens."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None


@dataclass(frozen=True)
class GenerationChunk:
    """The result of one more token."""

    text: str  # "" while a character or a possible stop string is incomplete
    token: int
    logprob: float
    finish_reason: str | None  # "stop" (end of text or stop string), "length", or None if more follows
    stats: Stats


@dataclass
class Generation:
    """A whole generation, assembled from its chunks."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats | None = None

    def add(self, chunk: GenerationChunk) -> None:
        """Append the next chunk."""
        self.text += chunk.text
        self.tokens.append(chunk.token)
        self.logprobs.append(chunk.logprob)
        self.finish_reason = chunk.finish_reason
        self.stats = chunk.stats

    def to_dict(self) -> dict[str, Any]:
        """All fields and the rates computed from them, for JSON."""
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
    sampling: SamplingConfig | None = None,
    stop: Iterable[str] = (),
    cache: PromptCache | None = None,
    drafter: Drafter | None = None,
    on_prefill: Progress | None = None,
) -> str:
    """Generate the text that follows a prompt; arguments and errors as for `stream_generate`."""
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
    sampling: SamplingConfig | None = None,
    stop: Iterable[str] = (),
    cache: PromptCache | None = None,
    drafter: Drafter | None = None,
    on_prefill: Progress | None = None,
) -> Generator[GenerationChunk, None, None]:
    """Continue a prompt and yield a `GenerationChunk` for every token; the last one has a `finish_reason`.

    Args:
        prompt: plain text, to which BOS is added, or ids, which are used unchanged.
        max_tokens: the most tokens to generate, at least 1.
        sampling: how each token is chosen; by default as the model's `generation_config.json` says (`model.sampling`),
            so that `SamplingConfig()` gives the most likely tokens whatever it says.
        stop: strings that end the generation; neither they nor the text after them is returned.
        cache: the cache of an earlier text; the prefix that the prompt shares with it is not computed again. Afterwards
            it holds the prompt and the generated tokens.
        drafter: proposes draft tokens (see `speculate_tokens`); the text stays the same.
        on_prefill: called with the number of prompt tokens done and their total.

    Raises:
        PromptError: if the prompt is empty or `max_tokens` is below 1.
        MemoryLimitError: if the prompt does not fit into memory.
        CacheError: if a drafter is given and the cache keeps a window.
    """
    check_request(prompt, max_tokens)
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    cache = cache if cache is not None else PromptCache(model)
    sampling = (sampling or default_sampling(model)).with_seed()
    before, fresh = cache.reuse(tokens)
    seed = None if sampling.is_greedy else sampling.seed
    row = TextStream(model, tokenizer, len(tokens), max_tokens, stop, drafter, reused=len(before), seed=seed)
    write = generate_tokens if drafter is None else _with_drafter(drafter)
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


def _with_drafter(drafter: Drafter) -> Callable[..., Iterator[Step]]:
    from .speculative import speculate_tokens

    return partial(speculate_tokens, drafter=drafter)


def check_request(prompt: str | Sequence[int], max_tokens: int) -> None:
    """Raise a `PromptError` if the prompt is empty or `max_tokens` is below 1."""
    if not prompt:
        raise PromptError("the prompt is empty")
    if max_tokens < 1:
        raise PromptError(f"max_tokens must be at least 1; got {max_tokens}")


class TextStream:
    """Turns the tokens of one generation into text."""

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
        self._eos = frozenset(model.config.eos_token_ids)
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
        """Whether a token after the next one may be wanted."""
        return self._generated + 1 < self._max_tokens

    def push(self, step: Step) -> GenerationChunk:
        """The chunk for one more token."""
        stats = self._tick()
        ended = step.token in self._eos
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
