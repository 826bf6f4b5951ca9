"""A conversation with an Instruct model, whose keys and values stay between turns."""

from collections.abc import Iterable, Iterator

from .engine import MAX_TOKENS
from .errors import TokenizerError
from .generate import Piece, stream_generate
from .model import OpenELM
from .sampling import SamplingConfig
from .tokenizer import Tokenizer


class Chat:
    """Messages so far, and the model's memory of them: a turn costs only its own tokens.

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
    ):
        if not tokenizer.has_chat_template:
            raise TokenizerError("this model has no chat template: it is a base model, for which there is `generate`")
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stop = tuple(stop)
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._cache = self.model.make_cache()
        self._cached: list[int] = []

    def reply(self, text: str) -> Iterator[Piece]:
        """The answer to a message; once it is complete, or given up, both belong to the conversation.

        Raises:
            PromptError, MemoryLimitError: as `stream_generate` does; the conversation is then as before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self.tokenizer.encode_chat(messages)
        fresh = self._reuse(tokens)
        answer: list[str] = []
        generated: list[int] = []
        stream = stream_generate(
            self.model,
            self.tokenizer,
            fresh,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            stop=self.stop,
            cache=self._cache,
        )
        try:
            for piece in stream:
                answer.append(piece.text if answer else piece.text.lstrip())
                generated.append(piece.token)
                yield piece
        finally:
            stream.close()
            if generated:
                self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
            self._cached = [*tokens, *generated][: self._cache.offset]
            self._cache.trim(self._cache.offset - len(self._cached))

    def _reuse(self, tokens: list[int]) -> list[int]:
        """Cut the cache back to what it shares with `tokens`; gives those that it does not hold."""
        shared = 0
        for cached, token in zip(self._cached, tokens[:-1], strict=False):  # one is left to compute logits from
            if cached != token:
                break
            shared += 1
        self._cache.trim(len(self._cached) - shared)
        self._cached = self._cached[:shared]
        return tokens[shared:]
