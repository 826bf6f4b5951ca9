"""What is scored, and what the score says: a continuation after a context."""

import math
from typing import NamedTuple


class Request(NamedTuple):
    """A text whose likelihood after another text is asked for. Blanks between the two belong to the continuation."""

    context: str
    continuation: str


class Score(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_likelihood: in nats, summed over the tokens of the continuation; not finite if the model's logits are not.
        is_greedy: whether each of these tokens is the likeliest after those before it.
        rounded: the same with logits, log-probabilities and their sum rounded to bfloat16, as the harness scored the
            published models; `None` if that was not asked for.
        is_truncated: whether the beginning of the context was cut off because all of it exceeds the model's context.
    """

    log_likelihood: float
    is_greedy: bool
    is_truncated: bool = False
    rounded: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the log-likelihood is a number."""
        return math.isfinite(self.log_likelihood)
