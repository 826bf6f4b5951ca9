"""Logits of whole prompts: against those that are stored, and against the CPU's."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..config import PRESETS
from ..generation.engine import generate_tokens
from ..machine.device import DTYPES, rounds_float32
from ..tensors import dtype_name
from .check import FAILED, MEASURED, PASSED, Check, Comparison, Outcome, Skip, as_numpy, judged
from .golden import read_golden
from .reference import on_reference
from .samples import sample_config, sample_network, sample_tokens
from .session import Session

_LENGTH = 40  # tokens
_TF32_ADVICE = (
    "float32 matrix products are computed in TF32 here, with 11 bits instead of 24; set MLX_ENABLE_TF32=0 in the "
    "environment to compute them in full, which is slower"
)


def checks() -> Iterator[Check]:
    """Checks of whole prompts."""
    yield Check("float32 products", _exact_products)
    for name in DTYPES:
        yield Check(f"stored logits, {name}", partial(_stored_logits, name))
    yield Check("stored greedy text", _greedy_text)
    for size in PRESETS:
        yield Check(f"CPU's logits, widths of {size}", partial(_device_logits, size))


def _exact_products(session: Session) -> Outcome:
    exact = session.has_exact_products
    found = "exact" if exact else "TF32"
    return Outcome(
        MEASURED,
        found,
        figures={"exact": exact, "expected_exact": not rounds_float32()},
        advice="" if exact else _TF32_ADVICE,
    )


def _stored_logits(name: str, session: Session) -> Outcome:
    golden, dtype = read_golden(), DTYPES[name]
    found = golden.of(session.built_in(dtype))
    outcome = judged([Comparison.of(name, found, golden.logits, session.tolerance(dtype))])
    same = (as_numpy(found).argmax(axis=-1) == as_numpy(golden.logits).argmax(axis=-1)).mean()
    return replace(outcome, figures={**outcome.figures, "same_choices": float(same)})


def _greedy_text(session: Session) -> Outcome:
    golden = read_golden()
    stored: Any = golden.greedy.tolist()
    expected: list[int] = stored[: session.extent.greedy_tokens]
    network = session.built_in(mx.float32)
    found = [step.token for step in generate_tokens(network, golden.tokens, max_tokens=len(expected))]
    same = next((n for n, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), len(expected))
    needed = len(expected) if session.has_exact_products else 1
    return Outcome(
        PASSED if same >= needed else FAILED,
        f"{same} of {len(expected)} tokens are the same",
        f"at least {needed}",
        {"same_tokens": same, "tokens": len(expected)},
    )


def _device_logits(size: str, session: Session) -> Outcome:
    if session.is_on_cpu:
        raise Skip("the CPU is the device already")
    config, tokens = sample_config(size), sample_tokens(2, _LENGTH)
    with on_reference():
        expected = as_numpy(sample_network(config, mx.float32)(tokens))
    comparisons = []
    for dtype in session.dtypes:
        found = sample_network(config, dtype)(tokens)
        comparisons.append(Comparison.of(dtype_name(dtype), found, expected, session.tolerance(dtype)))
    return judged(comparisons)
