"""Log-likelihoods of many continuations, with every prefix that texts share computed once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import add

import mlx.core as mx
import numpy as np

from ..errors import EvaluationError
from ..kernels.cpu import log_sum_exp
from ..machine.device import scoring_sizes
from ..model.forward_context import ForwardContext
from ..model.openelm import OpenELM
from ..model.rope import TokenRope
from ..tokenizer.tokenizer import Tokenizer
from .encoding import RequestEncoder, TokenRequest
from .path_cache import ChunkAttention, PathCache
from .prefix_tree import Chunk, PrefixTree, Target
from .requests import Request, Score

_SMALLEST_CHUNK = 16  # fewest and most tokens of a chunk
_LOGITS_ROWS = 4, 256

FAILED = Score(float("nan"), False)  # of a request that cannot be scored


@dataclass(frozen=True)
class ScorerConfig:
    """How a `Scorer` works; none of it changes a score by more than rounding.

    Attributes:
        max_length: most tokens that the model reads; by default the context that it was trained with.
        memory_bytes: memory for the activations of a chunk and the logits of a block, beside weights, keys and values;
            by default what suits the device, 64 MiB on the CPU.
        share: whether to compute shared prefixes once.
        emulate_bfloat16: whether to compute `Score.rounded`, too.

    Raises:
        EvaluationError: if a size is below 1.
    """

    max_length: int | None = None
    memory_bytes: int | None = None
    share: bool = True
    emulate_bfloat16: bool = False

    def __post_init__(self) -> None:
        for name, value in (("max_length", self.max_length), ("memory_bytes", self.memory_bytes)):
            if value is not None and value < 1:
                raise EvaluationError(f"{name} must be at least 1; got {value!r}")


class Scorer:
    """Scores requests with a model.

    The ids of all requests of a call form a tree, whose nodes are computed once each, in chunks of many texts at once.
    The last path of a call is kept for the next one: few-shot examples that many questions share are computed once
    even if the questions come in several calls.

    Attributes:
        tokens_computed: nodes so far.
    """

    def __init__(self, model: OpenELM, tokenizer: Tokenizer, config: ScorerConfig = ScorerConfig()):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.encode = RequestEncoder(tokenizer, config.max_length or model.config.max_context_length)
        self.tokens_computed = 0
        self._plan = _Plan.of(model, config.memory_bytes)
        self._tree = PrefixTree(self._plan.chunk_size, config.share)
        self._cache = PathCache(model.config.num_transformer_layers)

    def score(self, requests: Iterable[Request]) -> list[Score]:
        """The score of each request, in order; `FAILED` for one whose continuation has no token, or too many."""
        return self.score_tokens([self.encode(request) for request in requests])

    def score_tokens(self, requests: Sequence[TokenRequest | None]) -> list[Score]:
        """As `score`, of requests that are encoded already; `FAILED` for `None`."""
        numbers = [number for number, request in enumerate(requests) if request is not None]
        given = [request for request in requests if request is not None]
        sums = _Sums(len(given))
        try:
            for chunk in self._tree.chunks(given):
                self._compute(chunk, sums)
        except BaseException:
            self._tree.clear()
            self._cache.clear()
            raise
        scores = [FAILED] * len(requests)
        for place, number in enumerate(numbers):
            scores[number] = sums.score(place, given[place].is_truncated, self.config.emulate_bfloat16)
        return scores

    def _compute(self, chunk: Chunk, sums: "_Sums") -> None:
        self._run(chunk)
        for targets in _Targets.blocks(chunk.targets, self._plan.logits_rows):
            hidden = mx.take(self._cache.hidden, mx.array(targets.nodes), axis=0)
            sums.add(targets, *self._log_probabilities(hidden, targets))
        self._cache.keep(chunk)
        mx.eval(self._cache.arrays)

    def _run(self, chunk: Chunk) -> None:
        """Compute a chunk's tokens; the cache then holds their keys, values and last hidden states, too."""
        config = self.model.config
        if not len(chunk.tokens):
            return
        rotate = TokenRope(config.rope_freq_constant, mx.array(chunk.positions), config.head_dim)
        attend = ChunkAttention(self._cache, chunk, self._plan.block_size)
        hidden = self.model.transformer.run(mx.array(chunk.tokens)[None], ForwardContext(1, rotate, attend))
        self._cache.extend_hidden(hidden[0])
        mx.eval(self._cache.arrays)
        self.tokens_computed += len(chunk.tokens)

    def _log_probabilities(self, hidden: mx.array, targets: "_Targets") -> list[np.ndarray]:
        """Log-probability of each target, whether it is the likeliest token, and its rounded log-probability."""
        logits = self.model.logits(hidden).astype(mx.float32)  # (N, V)
        rows, tokens = mx.array(targets.rows), mx.array(targets.tokens)
        found = [_log_probability(logits, rows, tokens), mx.argmax(logits, axis=-1)[rows] == tokens]
        if self.config.emulate_bfloat16:
            rounded = logits.astype(mx.bfloat16).astype(mx.float32)
            found.append(_log_probability(rounded, rows, tokens).astype(mx.bfloat16).astype(mx.float32))
        mx.eval(found)
        return [np.array(array) for array in found]


@dataclass(frozen=True)
class _Plan:
    """Sizes that keep the working memory within a limit: tokens of a chunk, queries of a block, rows of logits."""

    chunk_size: int
    block_size: int
    logits_rows: int

    @classmethod
    def of(cls, model: OpenELM, memory_bytes: int | None) -> "_Plan":
        config = model.config
        default_bytes, largest_chunk, block = scoring_sizes()
        memory_bytes = memory_bytes or default_bytes
        itemsize = model.transformer.norm.weight.dtype.size
        ffn = 4 * max(config.ffn_dims)  # both halves, the activated gate, and their product
        heads = 4 * config.head_dim * max(map(add, config.num_query_heads, config.num_kv_heads))
        token = itemsize * (ffn + heads + 4 * config.model_dim)
        return cls(
            chunk_size=_within(memory_bytes // (2 * token), _SMALLEST_CHUNK, largest_chunk),
            block_size=block,
            logits_rows=_within(memory_bytes // (4 * 2 * 4 * config.vocab_size), *_LOGITS_ROWS),
        )


class _Targets:
    """Targets by node: the nodes (N,), and for each target the row of its node, its token and its request."""

    def __init__(self, nodes: np.ndarray, rows: np.ndarray, tokens: np.ndarray, requests: np.ndarray):
        self.nodes, self.rows, self.tokens, self.requests = nodes, rows, tokens, requests

    @classmethod
    def blocks(cls, targets: Sequence[Target], num_nodes: int) -> Iterator["_Targets"]:
        """The targets of at most `num_nodes` nodes at a time, by node, each request's in the order of its tokens."""
        if not targets:
            return
        found = np.array(targets, np.int32)
        found = found[np.argsort(found[:, 0], kind="stable")]
        nodes, rows = np.unique(found[:, 0], return_inverse=True)
        for start in range(0, len(nodes), num_nodes):
            own = found[(rows >= start) & (rows < start + num_nodes)]
            block, places = np.unique(own[:, 0], return_inverse=True)
            yield cls(block, places.astype(np.int32), own[:, 1], own[:, 2])


class _Sums:
    """The sums over the tokens of each request, in float64 and in the order of the tokens."""

    def __init__(self, num_requests: int):
        self._log_likelihood = np.zeros(num_requests)
        self._rounded = np.zeros(num_requests)
        self._is_greedy = np.ones(num_requests, bool)

    def add(self, targets: _Targets, log_p: np.ndarray, is_best: np.ndarray, rounded: np.ndarray | None = None) -> None:
        np.add.at(self._log_likelihood, targets.requests, log_p.astype(np.float64))
        np.logical_and.at(self._is_greedy, targets.requests, is_best)
        if rounded is not None:
            np.add.at(self._rounded, targets.requests, rounded.astype(np.float64))

    def score(self, number: int, is_truncated: bool, with_rounded: bool) -> Score:
        rounded = _as_bfloat16(self._rounded[number]) if with_rounded else None
        return Score(float(self._log_likelihood[number]), bool(self._is_greedy[number]), is_truncated, rounded)


def _log_probability(logits: mx.array, rows: mx.array, tokens: mx.array) -> mx.array:
    return logits[rows, tokens] - log_sum_exp(logits)[rows]


def _as_bfloat16(value: float) -> float:
    return float(np.array(mx.array(value, mx.float32).astype(mx.bfloat16).astype(mx.float32)))


def _within(value: int, least: int, most: int) -> int:
    return max(least, min(value, most))
