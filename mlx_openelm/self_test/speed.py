"""Tokens per second of the published sizes, with random weights, and how close that is to the memory's limit."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from ..benchmark.bench import bench_cases
from ..benchmark.measure import Case
from ..benchmark.models import random_network
from ..config import PRESETS, OpenELMConfig
from ..machine.device import memory_limit_bytes, wired_memory
from ..model.openelm import OpenELM
from ..quantization import Quantization
from .check import MEASURED, Check, Outcome, Skip
from .session import Session

_LARGEST_SHARE = 0.6  # of the memory for a model; the rest is for what creating it takes, and for the user
_CREATED_PER_SECOND = 2e8  # random parameters, at least; on the CPU a tenth of that
_FOUR_BITS = Quantization()


def checks(sizes: tuple[str, ...]) -> Iterator[Check]:
    """Measurements, from the smallest network to the largest."""
    for size in sizes:
        for quantization in (None, _FOUR_BITS):
            name = f"speed, {size}" + (f", {quantization.bits} bits" if quantization else "")
            yield Check(name, partial(_speed, size, quantization), is_optional=True)


def _speed(size: str, quantization: Quantization | None, session: Session) -> Outcome:
    extent = session.extent
    case = Case(extent.prompt_tokens, extent.measured_tokens)
    network = random_of_size(size, quantization, case, extent.rounds + 1, session)
    with wired_memory():
        (result,) = bench_cases(network, [case], name=size, memory=session.memory, rounds=extent.rounds)
    figures: dict[str, Any] = result.to_dict()
    (ours,) = result.figures.values()
    return Outcome(
        MEASURED,
        f"{ours.decode_tokens_per_second.median:,.1f} tokens/s, {ours.bandwidth_share:.0%} of the bandwidth; "
        f"prompt {ours.prefill_tokens_per_second.median:,.0f} tokens/s",
        figures={**figures, "case": asdict(case)},
    )


def random_of_size(size: str, quantization: Quantization | None, case: Case, rounds: int, session: Session) -> OpenELM:
    """A random network of a published size.

    Args:
        case, rounds: what will be measured.
    Raises:
        Skip: if it does not fit into memory, or measuring it would take longer than the time that is left.
    """
    config = PRESETS[size]
    bits = session.dtype.size * 8 if quantization is None else quantization.bits + 32 / quantization.group_size
    nbytes = config.num_parameters * bits / 8
    limit = memory_limit_bytes() * _LARGEST_SHARE
    if nbytes > limit:
        raise Skip(f"needs {nbytes / 2**30:,.1f} GiB, more than {limit / 2**30:,.1f} GiB")
    seconds = _expected_seconds(config, nbytes, case, rounds, session)
    if seconds > session.seconds_left:
        raise Skip(f"would take about {seconds:,.0f} s, and {max(0.0, session.seconds_left):,.0f} s are left")
    return random_network(config, session.dtype, quantization)


def _expected_seconds(config: OpenELMConfig, nbytes: float, case: Case, rounds: int, session: Session) -> float:
    """A rough estimate: twice what the memory and matrix products would take at their best."""
    flops = (session.diagnosis.float32_matmul_gflops or 1) * 1e9
    prompt = 2 * config.num_parameters * case.prompt_tokens / flops
    decoding = case.max_tokens * nbytes / session.memory.best
    creation = config.num_parameters / (_CREATED_PER_SECOND / (10 if session.is_on_cpu else 1))
    return creation + 2 * rounds * (prompt + decoding)
