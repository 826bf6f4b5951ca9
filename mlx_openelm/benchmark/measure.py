"""Measures cases: a prompt length, an output length, a batch size, and a type of KV cache."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..cache.config import CacheConfig, kv_cache_bytes
from ..config import OpenELMConfig
from ..machine.hardware import power_meter
from ..model.openelm import OpenELM
from .models import Contestant, Run

# The prompt of the paper's throughput measurements with MLX, the beginning of Treasure Island: BOS and 35 tokens.
PAPER_PROMPT = (
    *(1, 317, 1548, 6479, 10653, 3801, 29892, 4942, 29889, 16238, 968, 29891, 29892, 322, 278, 1791, 310, 1438),
    *(26703, 2534, 4433, 592, 304, 2436, 1623, 278, 3353, 3153, 29879, 1048, 6479, 3745, 7935, 29892, 515, 278),
)


@dataclass(frozen=True)
class Case:
    """One benchmark case."""

    prompt_tokens: int = 512
    max_tokens: int = 128
    batch_size: int = 1
    cache: CacheConfig = CacheConfig()  # noqa: RUF009, frozen

    def __repr__(self) -> str:
        return (
            f"Case({self.prompt_tokens:,} prompt tokens, {self.max_tokens:,} generated, {self.batch_size} at once, "
            f"{self.cache.label} KV cache)"
        )

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random ids for each row, the same in every call."""
        key = mx.random.key(self.prompt_tokens)
        ids: Any = mx.random.randint(1, vocab_size, (self.batch_size, self.prompt_tokens), key=key).tolist()
        return ids


PAPER_CASE = Case(len(PAPER_PROMPT), 1024)


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of several rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of these values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Figures:
    """Figures of one contestant in one case."""

    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread  # of all rows together, after the first token of each
    total_tokens_per_second: Spread  # prompt and generated tokens over the total time, as in the paper
    first_token_seconds: Spread
    peak_memory_bytes: int
    bandwidth_share: float  # decoding speed as a share of the limit that reading weights, keys and values sets
    watts: float | None


@dataclass(frozen=True)
class Result:
    """A case, with the figures of each contestant."""

    model: str
    dtype: str
    bits: int | None  # of quantized weights
    case: Case
    limit_tokens_per_second: float
    figures: dict[str, Figures] = field(default_factory=dict)
    same_tokens: float | None = None  # share of the tokens on which this package and its peer agree

    def ratios(self) -> dict[str, float]:
        """This package relative to its peer: above 1 is better, but for memory and the first token, below 1."""
        names = list(self.figures)
        if len(names) < 2:
            return {}
        ours, theirs = self.figures[names[0]], self.figures[names[1]]
        return {
            "prefill": ours.prefill_tokens_per_second.median / theirs.prefill_tokens_per_second.median,
            "decode": ours.decode_tokens_per_second.median / theirs.decode_tokens_per_second.median,
            "total": ours.total_tokens_per_second.median / theirs.total_tokens_per_second.median,
            "first_token": ours.first_token_seconds.median / theirs.first_token_seconds.median,
            "peak_memory": ours.peak_memory_bytes / theirs.peak_memory_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields and the ratios, for JSON."""
        return {**asdict(self), "ratios": self.ratios()}


def measure(
    network: OpenELM,
    contestants: Sequence[Contestant],
    case: Case,
    *,
    model: str,
    bandwidth: float,
    rounds: int = 3,
    prompts: list[list[int]] | None = None,
    on_round: Callable[[str, int], None] = lambda name, number: None,
) -> Result:
    """Run the contestants in turn, A B A B, after a warm-up round that does not count.

    Args:
        model: name of the model.
        bandwidth: memory bandwidth, in bytes per second.
        prompts: ids of each prompt, instead of random ones.
        on_round: called before each run with the contestant's name and the number of the round; 0 is the warm-up.
    """
    given = prompts or case.prompts(network.config.vocab_size)
    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in contestants}
    watts: dict[str, list[float | None]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds + 1):
        for contestant in contestants:
            on_round(contestant.name, number)
            drawn = power_meter()
            run = contestant.run(given, case.max_tokens, case.cache)
            if number:
                runs[contestant.name].append(run)
                watts[contestant.name].append(drawn())
    limit = (
        case.batch_size
        * bandwidth
        / bytes_per_step(network.config, weight_bytes(network), case, network_dtype(network))
    )
    quantized = [layer.bits for _, layer in network.named_modules() if hasattr(layer, "bits")]
    return Result(
        model,
        str(network_dtype(network)).removeprefix("mlx.core."),
        quantized[0] if quantized else None,
        case,
        limit,
        {name: _figures(of, case, limit, watts[name]) for name, of in runs.items()},
        _agreement([of[-1] for of in runs.values()]),
    )


def weight_bytes(network: OpenELM) -> int:
    """Size of a network's weights, in bytes."""
    parameters: Any = tree_flatten(network.parameters())
    return sum(array.nbytes for _, array in parameters)


def network_dtype(network: OpenELM) -> mx.Dtype:
    """The dtype that a network computes in."""
    return network.transformer.norm.weight.dtype


def bytes_per_step(config: OpenELMConfig, weights: int, case: Case, dtype: mx.Dtype) -> float:
    """Bytes to read for one token of each row: all weights once, and each row's keys and values."""
    middle = case.prompt_tokens + case.max_tokens // 2
    return weights + case.batch_size * kv_cache_bytes(config, middle, dtype, case.cache)


def _figures(runs: Sequence[Run], case: Case, limit: float, watts: Sequence[float | None]) -> Figures:
    prompt_tokens = case.batch_size * case.prompt_tokens
    behind = case.batch_size * (case.max_tokens - 1)
    total = prompt_tokens + case.batch_size * case.max_tokens
    decode = Spread.of([behind / run.decode_seconds if behind else 0.0 for run in runs])
    known = [value for value in watts if value is not None]
    return Figures(
        Spread.of([prompt_tokens / run.first_token_seconds for run in runs]),
        decode,
        Spread.of([total / (run.first_token_seconds + run.decode_seconds) for run in runs]),
        Spread.of([run.first_token_seconds for run in runs]),
        max(run.peak_memory_bytes for run in runs),
        decode.median / limit,
        statistics.median(known) if known else None,
    )


def _agreement(runs: Sequence[Run]) -> float | None:
    if len(runs) < 2:
        return None
    pairs = [pair for rows in zip(runs[0].tokens, runs[1].tokens, strict=True) for pair in zip(*rows, strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)
