"""A conversation with an Instruct model that keeps its KV cache between turns."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..errors import TokenizerError
from ..hub import BUILT_IN_CHAT_MODEL
from ..model.openelm import OpenELM
from ..tokenizer.chat_template import OPENELM
from ..tokenizer.example_format import CHAT
from ..tokenizer.tokenizer import Tokenizer
from .defaults import default_sampling
from .engine import MAX_TOKENS, Progress
from .prompt_cache import PromptCache
from .sampling import SEEDS, SamplingConfig
from .text import GenerationChunk, stream_generate


class Chat:
    """A conversation and its KV cache: each turn computes only its own tokens.

    A model that was tuned on single questions in another format gets each message alone, in that format.
    Without `sampling`, the model's own holds, as for `stream_generate`.
    Answer n, counting from 0 and through `undo` and `reset`, is sampled with the seed plus n; without a seed, a random
    one is drawn, which `sampling.seed` tells.

    Attributes:
        messages: the conversation so far: mappings with `role` and `content`.

    Raises:
        TokenizerError: if the model only continues text.
    """

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        sampling: SamplingConfig | None = None,
        max_tokens: int = MAX_TOKENS,
        stop: Iterable[str] = (),
        cache: PromptCache | None = None,
    ):
        known = tokenizer.example_format
        self._asked = CHAT if known is None or known.records == "text" else known
        if self._asked.style == "chat" and not tokenizer.has_chat_template:
            raise TokenizerError(
                "this is a base model without a chat template; chat with an Instruct model, such as the built-in "
                f"{BUILT_IN_CHAT_MODEL}, tune this one on conversations with `chat_template={OPENELM}`, or use "
                "generate to continue text"
            )
        self._check_system(system)
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = (sampling or default_sampling(model)).with_seed()
        self.max_tokens = max_tokens
        self.stop = tuple(stop)
        self.cache = cache if cache is not None else PromptCache(model)
        self.messages = _beginning(system)
        self._answers = 0  # begun so far

    def __repr__(self) -> str:
        return f"Chat({self.model!r}, {len(self.messages)} messages, {len(self.cache.tokens):,} tokens in the cache)"

    @property
    def answers_alone(self) -> bool:
        """Whether each message is answered without those before it, as in the examples the model was tuned on."""
        return self._asked.style != "chat"

    @property
    def system(self) -> str | None:
        """The system message; a new one takes the place of the old one, and all turns stay."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        self._check_system(text)
        turns = self.messages[1:] if self.system is not None else self.messages
        self.messages = [*_beginning(text), *turns]

    def _check_system(self, text: str | None) -> None:
        if text and self.answers_alone:
            raise TokenizerError(
                "`system` requires a chat template, but the model was tuned on single questions in "
                f"{self._asked.records} format"
            )

    def reset(self) -> None:
        """Remove all turns; the system message stays."""
        self.messages = _beginning(self.system)
        self.cache.clear()

    def undo(self) -> str | None:
        """Remove the last message of the user and its answer; returns the message, or `None` if there was none."""
        users = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            return None
        removed = self.messages[users[-1]]["content"]
        self.messages = self.messages[: users[-1]]
        return removed

    def reply(self, text: str, *, on_prefill: Progress | None = None) -> Iterator[GenerationChunk]:
        """Stream the answer to a message; both are added to `messages` when it is complete or the caller stops.

        Args:
            on_prefill: called with the number of prompt tokens done and their total.
        Raises:
            PromptError, MemoryLimitError: as for `stream_generate`; the conversation then stays unchanged.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.answers_alone:
            tokens = self.tokenizer.encode_as(self._asked, text)
        else:
            tokens = self.tokenizer.encode_chat(messages)
        answer: list[str] = []
        stream = stream_generate(
            self.model,
            self.tokenizer,
            tokens,
            max_tokens=self.max_tokens,
            sampling=self._next_sampling(),
            stop=self.stop,
            cache=self.cache,
            on_prefill=on_prefill,
        )
        try:
            for chunk in stream:
                answer.append(chunk.text if answer else chunk.text.lstrip())
                yield chunk
        finally:
            stream.close()
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

    def _next_sampling(self) -> SamplingConfig:
        number, self._answers = self._answers, self._answers + 1
        seed = self.sampling.seed
        return self.sampling if seed is None else replace(self.sampling, seed=(seed + number) % SEEDS)


def _beginning(system: str | None) -> list[dict[str, str]]:
    """The messages of a conversation without turns."""
    return [{"role": "system", "content": system}] if system else []
