"""Choosing the next token from logits."""

import os
from dataclasses import dataclass, replace

import mlx.core as mx

from ..errors import SamplingError
from ..kernels.cpu import log_sum_exp

# Outside these ranges logits overflow float32, or all of them become equal.
_TEMPERATURES = (1e-5, 1e5)
_PENALTIES = (0.01, 100)
SEEDS = 1 << 63  # number of possible seeds, which begin at 0
_LARGEST_CONTEXT = 65_536
_LEAST_TOP_P = 1e-30  # smaller values are 0 in float32, and would drop the most likely token too


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen; by default always the most likely one.

    Raises:
        SamplingError: if a value is out of range.
    """

    temperature: float = 0.0  # 0: the most likely token; 1: sample from the model's distribution
    top_p: float = 1.0  # sample from the most likely tokens that together reach this probability
    top_k: int = 0  # sample from this many of the most likely tokens; 0: from all
    min_p: float = 0.0  # drop tokens less likely than this fraction of the highest probability
    repetition_penalty: float = 1.0  # above 1 makes recent tokens less likely
    repetition_context: int = 256  # number of last tokens that the penalty covers
    seed: int | None = None  # the same seed produces the same text; None: a random seed

    def __post_init__(self) -> None:
        low, high = _TEMPERATURES
        _check(
            "temperature",
            self.temperature,
            self.is_greedy or low <= self.temperature <= high,
            _range(low, high, "0, or "),
        )
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        low, high = _PENALTIES
        _check("repetition_penalty", self.repetition_penalty, low <= self.repetition_penalty <= high, _range(low, high))
        _check("seed", self.seed or 0, 0 <= (self.seed or 0) < SEEDS, "from 0 to 2**63 - 1")
        low, high = 1, _LARGEST_CONTEXT
        _check("repetition_context", self.repetition_context, low <= self.repetition_context <= high, _range(low, high))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken, so that the seed does not matter."""
        return self.temperature == 0

    def with_seed(self) -> "SamplingConfig":
        """The same configuration, with a random seed if it samples without one, so that the run can be repeated."""
        return self if self.is_greedy or self.seed is not None else replace(self, seed=_fresh_seed())


State = tuple[mx.array, mx.array]  # random key (2,) and recent tokens (C,); for B rows (B, 2) and (B, C)


class Sampler:
    """Chooses the next token, with a state that is passed from one choice to the next.

    The state has a fixed shape and stays on the device, so that a decoding step can be compiled together with the
    choice. MLX's global random state is not used.
    """

    def __init__(self, config: SamplingConfig):
        self.config = config

    def start(self, prompt: mx.array, seed: int | None = None) -> State:
        """The state after the tokens (L,) of a prompt, at least one; the repetition penalty covers them.

        Args:
            seed: overrides the configuration's seed.
        """
        seed = seed if seed is not None else self.config.seed
        recent = prompt[-self.config.repetition_context :].astype(mx.uint32)  # as argmax and categorical return
        if recent.size < self.config.repetition_context:
            room = self.config.repetition_context - recent.size
            recent = mx.concatenate([mx.repeat(recent[:1], room), recent])  # repeating the oldest changes nothing
        return mx.random.key(seed if seed is not None else _fresh_seed()), recent

    def choose(self, logits: mx.array, state: State) -> tuple[mx.array, mx.array, State]:
        """Choose from logits (V,): the next token, () uint32, its log-probability, () float32, and the next state.

        The log-probability is the model's own, before the penalty, temperature and truncation.
        """
        key, recent = state
        logits = logits.astype(mx.float32)
        scores = self._penalize(logits, recent)
        if self.config.is_greedy:
            token = mx.argmax(scores)
        else:
            scores = restrict(scores / self.config.temperature, self.config)
            key, own = mx.random.split(key)
            token = mx.random.categorical(scores, key=own)
        if self.config.repetition_penalty != 1:
            recent = mx.concatenate([recent[1:], token[None]])
        return token, logits[token] - log_sum_exp(logits), (key, recent)

    def choose_rows(self, logits: mx.array, states: State) -> tuple[mx.array, mx.array, State]:
        """`choose` for each of B rows, from logits (B, V): tokens (B,), log-probabilities (B,), next states."""
        if logits.shape[0] > 1:
            return mx.vmap(self.choose)(logits, states)
        # Without the index 0, which would be an operation on a GPU.
        token, logprob, (key, recent) = self.choose(logits.squeeze(0), (states[0].squeeze(0), states[1].squeeze(0)))
        return token[None], logprob[None], (key[None], recent[None])

    def choose_along(self, logits: mx.array, state: State) -> tuple[mx.array, mx.array, State]:
        """Successive choices from logits (L, V): tokens (L,), log-probabilities (L,), the states after each."""
        if self.config.temperature == 0 and self.config.repetition_penalty == 1:  # no choice changes the state
            logits = logits.astype(mx.float32)
            tokens = mx.argmax(logits, axis=-1)
            chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
            key, recent = (mx.broadcast_to(part, (len(logits), *part.shape)) for part in state)
            return tokens, chosen - log_sum_exp(logits), (key, recent)
        choices = []
        for row in logits:
            *choice, state = self.choose(row, state)
            choices.append((*choice, *state))
        token, logprob, key, recent = (mx.stack(list(parts)) for parts in zip(*choices, strict=True))
        return token, logprob, (key, recent)

    def _penalize(self, logits: mx.array, recent: mx.array) -> mx.array:
        """Logits (V,), reduced for recent tokens (Keskar et al., arXiv:1909.05858)."""
        penalty = self.config.repetition_penalty
        if penalty == 1:
            return logits
        found = logits[recent]
        return mx.put_along_axis(logits, recent, mx.where(found > 0, found / penalty, found * penalty), axis=0)


def restrict(scores: mx.array, config: SamplingConfig) -> mx.array:
    """Scores (V,), minus infinity for tokens outside top-k, then top-p, then min-p; the most likely always stays."""
    if 0 < config.top_k < scores.shape[-1]:
        smallest_kept = mx.min(mx.topk(scores, config.top_k))
        scores = mx.where(scores < smallest_kept, -mx.inf, scores)
    if config.top_p < 1:
        order = mx.argsort(-scores)
        probabilities = mx.softmax(scores)[order]
        before = mx.cumsum(probabilities) - probabilities  # of all more likely tokens
        top_p = max(config.top_p, _LEAST_TOP_P)
        scores = mx.put_along_axis(scores, order, mx.where(before < top_p, scores[order], -mx.inf), axis=0)
    if config.min_p > 0:
        probabilities = mx.softmax(scores)
        scores = mx.where(probabilities < config.min_p * mx.max(probabilities), -mx.inf, scores)
    return scores


def _fresh_seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


def _range(low: float, high: float, before: str = "") -> str:
    return f"{before}from {low:g} to {high:,g}"


def _check(name: str, value: float, holds: bool, range_in_words: str) -> None:
    if not holds:
        raise SamplingError(f"{name} must be {range_in_words}; got {value}")
