"""Benchmarks of whole models: all cases in turn, optionally with a peer in the same run."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx

from ..errors import BenchError
from ..generation.engine import check_memory
from ..loading import load_model
from ..machine.bandwidth import BandwidthProbe
from ..machine.device import wired_memory
from ..machine.hardware import describe
from ..model.openelm import OpenELM
from .measure import PAPER_PROMPT, Case, Result, default_lengths, measure
from .models import Contestant, Ours, Peer
from .report import BenchReport

PEERS = ("mlx-lm",)
_MOST_TOKENS, _MOST_ROUNDS = 1 << 20, 10_000


def bench(
    model: str | Path | OpenELM,
    cases: Sequence[Case] | None = None,
    *,
    against: str | None = None,
    rounds: int = 3,
    compiled: bool | None = None,
    dtype: mx.Dtype | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    on_round: Callable[[str, int], None] | None = None,
) -> BenchReport:
    """Measure tokens per second, time to first token and peak memory of a model on this machine.

    Args:
        model: a network, or a folder, hub id or built-in model.
        cases: what to measure, such as `[Case(prompt_tokens=128, max_tokens=64)]`; default: a prompt of 512 tokens and
            128 more, or less if the model's context is shorter.
        against: `"mlx-lm"` also measures mlx-lm, in turn with this package, on the same weights.
        rounds: measured rounds, after one warm-up round.
        compiled: whether to compile the decoding step; by default, where it pays off.
        dtype, adapter, revision: as for `load_model`.
        on_round: called before each run with the contestant's name and the number of the round; 0 is the warm-up.
    Raises:
        BenchError: if the peer cannot run a case.
        OpenELMError: if the model cannot be loaded.
    """
    if isinstance(model, OpenELM):
        network, name = model, "model"
    else:
        network, name = load_model(model, dtype=dtype, adapter=adapter, revision=revision), Path(model).name
    memory = BandwidthProbe()
    with wired_memory():
        results = bench_cases(
            network,
            cases or [Case(*default_lengths(network.config.max_context_length))],
            name=name,
            memory=memory,
            against=against,
            rounds=rounds,
            compiled=compiled,
            on_round=on_round,
        )
        return BenchReport.of(list(results), memory.best, describe("mlx_openelm.bench"))


def bench_cases(
    network: OpenELM,
    cases: Sequence[Case],
    *,
    name: str,
    memory: BandwidthProbe,
    against: str | None = None,
    rounds: int = 3,
    compiled: bool | None = None,
    paper: bool = False,
    on_round: Callable[[str, int], None] | None = None,
) -> Iterator[Result]:
    """Yields the result of each case as soon as it is measured.

    Args:
        name: of the model.
        memory: measures the memory between the runs. Its best grows with each case, so `BenchReport.of` computes the
            limits of all results again.
        paper: use the paper's prompt, in place of random tokens.
    Raises:
        MemoryLimitError: if a case does not fit into memory.
        BenchError: if the peer cannot run a case, or the vocabulary is too small for the prompt of `paper`.
    """
    check_cases(cases, against, rounds)
    if paper and max(PAPER_PROMPT) >= network.config.vocab_size:
        raise BenchError(f"the vocabulary of {name} is too small for the prompt of `paper`")
    contestants: list[Contestant] = [Ours(network, compiled), *([Peer(network)] if against else [])]
    for case in cases:
        check_memory(network, case.prompt_tokens + case.max_tokens, case.cache, case.batch_size)
        yield measure(
            network,
            contestants,
            case,
            model=name,
            memory=memory,
            rounds=rounds,
            prompts=[list(PAPER_PROMPT)] * case.batch_size if paper else None,
            on_round=on_round or (lambda who, number: None),
        )


def check_cases(cases: Sequence[Case], against: str | None, rounds: int = 1) -> None:
    """Raise BenchError if a case cannot be measured, before anything is loaded."""
    if against is not None and against not in PEERS:
        raise BenchError(f"`against` must be {', '.join(PEERS)}; got {against!r}")
    _check_range("rounds", rounds, 1, _MOST_ROUNDS)
    for case in cases:
        _check_range("prompt_tokens", case.prompt_tokens, 1, _MOST_TOKENS)
        _check_range("max_tokens", case.max_tokens, 1, _MOST_TOKENS)
        _check_range("batch_size", case.batch_size, 1, _MOST_TOKENS)
        if case.prompt_tokens * case.batch_size > _MOST_TOKENS:
            raise BenchError(
                f"{case.batch_size:,} prompts of {case.prompt_tokens:,} tokens are more than {_MOST_TOKENS:,} tokens; "
                "reduce `batch_size` or `prompt_tokens`"
            )
        if case.cache.window is not None and case.batch_size > 1:
            raise BenchError("a KV cache with a window requires `batch_size=1`")
        if against and case.batch_size > 1 and case.cache.bits:
            raise BenchError("mlx-lm cannot batch with a quantized KV cache; leave out `against`, or use a full cache")


def _check_range(name: str, value: int, at_least: int, at_most: int) -> None:
    if not at_least <= value <= at_most:
        raise BenchError(f"`{name}` must be from {at_least:,} to {at_most:,}; got {value:,}")
