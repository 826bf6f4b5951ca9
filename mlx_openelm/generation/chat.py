"""A conversation with an Instruct model that keeps its KV cache between turns."""

from collections.abc import Iterable, Iterator

from ..errors import TokenizerError
from ..model.openelm import OpenELM
from ..tokenizer.tokenizer import Tokenizer
from .engine import MAX_TOKENS
from .prompt_cache import PromptCache
from .sampling import SamplingConfig
from .text import GenerationChunk, stream_generate


class Chat:
    """A conversation and its KV cache: each turn computes only its own tokens.

    Raises:
        TokenizerError: if the model has no chat template.
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
        if not tokenizer.has_chat_template:
            raise TokenizerError(
                "this is a base model without a chat template; use an Instruct model, or generate to continue text"
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
