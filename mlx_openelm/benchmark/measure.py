"""Measures cases: a prompt length, an output length, a batch size, and a type of KV cache."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..cache.config import CacheConfig, kv_cache_bytes
from ..config import OpenELMConfig
from ..machine.bandwidth import LARGE_BYTES, SAMPLE_SECONDS, BandwidthProbe
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
_CACHE_SPEEDUP = 1.5  # of a small array over a large one, from which it must be in a cache: two probes differ by less


def default_lengths(context: int, prompt_tokens: int | None = None, max_tokens: int | None = None) -> tuple[int, int]:
    """Lengths of prompt and completion: those that are not given have their default, or fit into a short context."""
    if max_tokens is None:
        room = context // 4 if prompt_tokens is None else context - prompt_tokens
        max_tokens = min(Case.max_tokens, room) if room > 1 else 2
    if prompt_tokens is None:
        prompt_tokens = max(1, min(Case.prompt_tokens, context - max_tokens))
    return prompt_tokens, max_tokens


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
    bandwidth_share: float  # decoding speed as a share of `Result.limit_tokens_per_second`
    watts: float | None

    def limited_by(self, tokens_per_second: float) -> "Figures":
        """These figures with their share of a limit."""
        return replace(self, bandwidth_share=min(1.0, self.decode_tokens_per_second.median / tokens_per_second))


@dataclass(frozen=True)
class Result:
    """A case, with the figures of each contestant."""

    model: str
    dtype: str
    bits: int | None  # of quantized weights
    case: Case
    bytes_per_step: float  # of weights, keys and values that decoding reads for one token of each row
    cache_bytes_per_second: float | None  # of reading as many bytes again and again; None if no cache holds them
    figures: dict[str, Figures] = field(default_factory=dict)
    same_tokens: float | None = None  # share of the tokens on which this package and its peer agree
    limit_bytes_per_second: float = 0.0  # see `limited_by`
    fits_in_cache: bool = False  # what is read for a token
    limit_was_raised: bool = False  # because decoding read faster than the probe

    @property
    def limit_tokens_per_second(self) -> float:
        """Decoding speed if nothing but reading took time."""
        return self.case.batch_size * self.limit_bytes_per_second / self.bytes_per_step

    @property
    def reached_bytes_per_second(self) -> float:
        """What the fastest contestant read while decoding."""
        fastest = max(figures.decode_tokens_per_second.median for figures in self.figures.values())
        return fastest / self.case.batch_size * self.bytes_per_step

    def limited_by(self, memory: float) -> "Result":
        """This result with its limit: that of the memory, of a cache that holds all, or at least what was reached.

        Args:
            memory: the memory's bandwidth, in bytes per second.
        """
        cache = self.cache_bytes_per_second or 0.0
        found = replace(
            self,
            limit_bytes_per_second=max(memory, cache, self.reached_bytes_per_second),
            fits_in_cache=cache > _CACHE_SPEEDUP * memory,
            limit_was_raised=self.reached_bytes_per_second >= max(memory, cache),
        )
        limit = found.limit_tokens_per_second
        return replace(found, figures={name: of.limited_by(limit) for name, of in self.figures.items()})

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
        return {**asdict(self), "limit_tokens_per_second": self.limit_tokens_per_second, "ratios": self.ratios()}


def measure(
    network: OpenELM,
    contestants: Sequence[Contestant],
    case: Case,
    *,
    model: str,
    memory: BandwidthProbe,
    rounds: int = 3,
    prompts: list[list[int]] | None = None,
    on_round: Callable[[str, int], None] = lambda name, number: None,
) -> Result:
    """Run the contestants in turn, A B A B, after a warm-up round that does not count.

    Args:
        model: name of the model.
        memory: measures the memory between the runs.
        prompts: ids of each prompt, instead of random ones.
        on_round: called before each run with the contestant's name and the number of the round; 0 is the warm-up.
    """
    given = prompts or case.prompts(network.config.vocab_size)
    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in contestants}
    watts: dict[str, list[float | None]] = {contestant.name: [] for contestant in contestants}
    nbytes = bytes_per_step(network.config, weight_bytes_per_step(network), case, network_dtype(network))
    cache = BandwidthProbe(nbytes) if nbytes < LARGE_BYTES else None
    seconds = 0.0
    for number in range(rounds + 1):
        for contestant in contestants:
            on_round(contestant.name, number)
            for probe in filter(None, (memory, cache)):
                probe.sample(min(seconds, SAMPLE_SECONDS))
            drawn = power_meter()
            run = contestant.run(given, case.max_tokens, case.cache)
            seconds = run.first_token_seconds + run.decode_seconds  # short runs do not wait for long samples
            if number:
                runs[contestant.name].append(run)
                watts[contestant.name].append(drawn())
    quantized = [layer.bits for _, layer in network.named_modules() if hasattr(layer, "bits")]
    return Result(
        model,
        str(network_dtype(network)).removeprefix("mlx.core."),
        quantized[0] if quantized else None,
        case,
        nbytes,
        None if cache is None else cache.best,
        {name: _figures(of, case, watts[name]) for name, of in runs.items()},
        _agreement([of[-1] for of in runs.values()]),
    ).limited_by(memory.best)


def weight_bytes_per_step(network: OpenELM) -> int:
    """Bytes of weights that a decoding step reads: all, but of an embedding that is not the output only some rows."""
    parameters: Any = tree_flatten(network.parameters())
    skipped = () if network.config.share_input_output_layers else ("transformer.token_embeddings.",)
    return sum(array.nbytes for name, array in parameters if not name.startswith(skipped))


def network_dtype(network: OpenELM) -> mx.Dtype:
    """The dtype that a network computes in."""
    return network.transformer.norm.weight.dtype


def bytes_per_step(config: OpenELMConfig, weights: int, case: Case, dtype: mx.Dtype) -> float:
    """Bytes to read for one token of each row: the weights once, and each row's keys and values."""
    middle = case.prompt_tokens + case.max_tokens // 2
    return weights + case.batch_size * kv_cache_bytes(config, middle, dtype, case.cache)


def _figures(runs: Sequence[Run], case: Case, watts: Sequence[float | None]) -> Figures:
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
        0.0,
        statistics.median(known) if known else None,
    )


def _agreement(runs: Sequence[Run]) -> float | None:
    if len(runs) < 2:
        return None
    pairs = [pair for rows in zip(runs[0].tokens, runs[1].tokens, strict=True) for pair in zip(*rows, strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)
