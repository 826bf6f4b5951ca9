"""Text in, text out: streaming, stop strings and figures about a generation."""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .cache import KVCache
from .device import peak_memory_bytes, wired_memory
from .engine import MAX_TOKENS, generate_tokens
from .errors import PromptError, TokenizerError
from .model import OpenELM
from .sampling import SamplingConfig
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Stats:
    """Figures about a generation so far."""

    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float  # until the first token
    decode_seconds: float  # from the first token on
    peak_memory_bytes: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens over the time to the first token."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the time that they took; 0 for a single token."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Piece:
    """What one more token brought."""

    text: str  # "" while a character or a possible stop string is incomplete
    token: int
    logprob: float
    finish_reason: str | None  # "stop" (end of text or stop string), "length", or None: more follows
    stats: Stats


@dataclass
class Generation:
    """A whole generation, put together from its pieces."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats | None = None

    def add(self, piece: Piece) -> None:
        """Take in the next piece."""
        self.text += piece.text
        self.tokens.append(piece.token)
        self.logprobs.append(piece.logprob)
        self.finish_reason = piece.finish_reason
        self.stats = piece.stats

    def to_dict(self) -> dict[str, Any]:
        """Everything, with the rates that follow from it, for JSON."""
        values = asdict(self)
        if self.stats is not None:
            values["stats"]["prefill_tokens_per_second"] = self.stats.prefill_tokens_per_second
            values["stats"]["decode_tokens_per_second"] = self.stats.decode_tokens_per_second
        return values


def generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = MAX_TOKENS,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    stop: Iterable[str] = (),
) -> str:
    """The text that follows a prompt; arguments and errors as for `stream_generate`."""
    pieces = stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop)
    return "".join(piece.text for piece in pieces)


def stream_generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = MAX_TOKENS,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    stop: Iterable[str] = (),
    cache: KVCache | None = None,
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
) -> Generator[Piece, None, None]:
    """Continue a prompt and yield a `Piece` with every token; the last one has a `finish_reason`.

    Args:
        prompt: plain text, which gets its BOS here, or ids, taken as they are.
        max_tokens: how many tokens to generate at most, at least 1.
        stop: texts that end the generation; neither they nor what follows them is given out.
        cache: what came before the prompt. It then holds the prompt and what was generated of it.
        on_prefill: called with the number of prompt tokens done and their total.

    Raises:
        PromptError: if the prompt is empty or asks for no tokens.
        MemoryLimitError: if the prompt does not fit into memory.
    """
    if tokenizer is None:
        raise TokenizerError("this model was converted without a tokenizer; give one with --tokenizer FILE_OR_REPO")
    if not prompt:
        raise PromptError("the prompt is empty; there is nothing to continue")
    if max_tokens < 1:
        raise PromptError(f"max_tokens is {max_tokens}; at least one token has to be asked for")
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    decoder = tokenizer.stream_decoder()
    watch = StopWatch(stop)
    clock = _Clock(len(tokens))
    with wired_memory():
        steps = generate_tokens(
            model, tokens, max_tokens=max_tokens, sampling=sampling, cache=cache, on_prefill=on_prefill
        )
        for count, step in enumerate(steps, start=1):
            ended = step.token == model.config.eos_token_id
            text = watch.push("" if ended else decoder.push(step.token))
            finish_reason = "stop" if ended or watch.found else "length" if count == max_tokens else None
            if finish_reason and not watch.found:
                text += watch.push(decoder.finish()) + watch.finish()
                finish_reason = "stop" if watch.found else finish_reason
            yield Piece(text, step.token, step.logprob, finish_reason, clock.tick())
            if finish_reason:
                break


class StopWatch:
    """Holds text back as long as it could be the beginning of a stop string."""

    def __init__(self, stop: Iterable[str]):
        self._stops = [text for text in stop if text]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far is certain to stand before any stop string; "" for all that follows one."""
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        certain = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[:certain], self._held[certain:]
        return out

    def finish(self) -> str:
        """What was held back for a stop string that never came."""
        return "" if self.found else self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class _Clock:
    def __init__(self, prompt_tokens: int):
        self._prompt_tokens = prompt_tokens
        self._generated = 0
        self._start = self._first = time.perf_counter()

    def tick(self) -> Stats:
        """Figures after one more token."""
        now = time.perf_counter()
        self._generated += 1
        if self._generated == 1:
            self._first = now
        return Stats(
            self._prompt_tokens,
            self._generated,
            self._first - self._start,
            now - self._first,
            peak_memory_bytes(),
        )
