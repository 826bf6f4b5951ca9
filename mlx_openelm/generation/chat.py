"""A conversation with an Instruct model that keeps its KV cache between turns."""

from collections.abc import Iterable, Iterator

from ..errors import TokenizerError
from ..model.openelm import OpenELM
from ..tokenizer.example_format import CHAT
from ..tokenizer.tokenizer import Tokenizer
from .engine import MAX_TOKENS
from .prompt_cache import PromptCache
from .sampling import SamplingConfig
from .text import GenerationChunk, stream_generate


class Chat:
    """A conversation and its KV cache: each turn computes only its own tokens.

    A model that was tuned on single questions in another format gets each message alone, in that format.

    Raises:
        TokenizerError: if the model only continues text.
    """

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
        max_tokens: int = MAX_TOKENS,
        stop: Iterable[str] = (),
        cache: PromptCache | None = None,
    ):
        known = tokenizer.example_format
        self._asked = CHAT if known is None or known.records == "text" else known
        if self._asked.style == "chat" and not tokenizer.has_chat_template:
            raise TokenizerError(
                "this is a base model without a chat template; use an Instruct model, or generate to continue text"
            )
        if system and self._asked.style != "chat":
            raise TokenizerError(
                "`system` requires a chat template, but the model was tuned on single questions in "
                f"{self._asked.records} format"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stop = tuple(stop)
        self.cache = cache if cache is not None else PromptCache(model)
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def __repr__(self) -> str:
        return f"Chat({self.model!r}, {len(self.messages)} messages, {len(self.cache.tokens):,} tokens in the cache)"

    @property
    def answers_alone(self) -> bool:
        """Whether each message is answered without those before it, as in the examples the model was tuned on."""
        return self._asked.style != "chat"

    def reset(self) -> None:
        """Remove all turns; the system message stays."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.cache.clear()

    def reply(self, text: str) -> Iterator[GenerationChunk]:
        """Stream the answer to a message; both are added to `messages` when it is complete or the caller stops.

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
            sampling=self.sampling,
            stop=self.stop,
            cache=self.cache,
        )
        try:
            for chunk in stream:
                answer.append(chunk.text if answer else chunk.text.lstrip())
                yield chunk
        finally:
            stream.close()
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
