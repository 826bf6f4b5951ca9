"""Choices that only a measurement can decide: both ways give the same, and which one is faster here."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import mlx.core as mx

from ..benchmark.measure import Case, Figures, measure
from ..benchmark.models import Ours, Run
from ..cache.config import CacheConfig, kv_cache_bytes
from ..generation.engine import generate_tokens
from ..kernels.dialects import DIALECTS
from ..machine.device import choices, reads_tokens_first, replaced_choices, wired_memory
from ..model.openelm import OpenELM
from ..tensors import dtype_name
from .check import FAILED, MEASURED, PASSED, Check, Comparison, Outcome, Skip, judged
from .decoding import stepwise_logits
from .samples import sample_config, sample_network, sample_tokens
from .session import Session
from .speed import random_of_size

OPEN_CHOICES = ("tokens_first", "fused_kernels")  # those that `Choices` marks as open
_PROMPT = 40  # tokens
_KINDS = (CacheConfig(), CacheConfig(bits=4))
_FASTER = 1.03  # a smaller advantage may be chance


def equality_checks() -> Iterator[Check]:
    """Both ways of each choice give the same."""
    for name in OPEN_CHOICES:
        yield Check(f"{name}, both ways the same", partial(_equal, name))


def speed_checks(sizes: tuple[str, ...], contexts: tuple[int, ...]) -> Iterator[Check]:
    """Both ways of each choice, timed in turn."""
    for size, context, name in product(sizes, contexts, OPEN_CHOICES):
        what = f"{name} on and off, {size} after {context:,}"
        yield Check(what, partial(_timed, name, size, context), is_optional=True)


def _check_applies(name: str) -> None:
    if name == "fused_kernels" and choices().backend not in DIALECTS:
        raise Skip("there are no fused kernels for this device")


def _equal(name: str, session: Session) -> Outcome:
    _check_applies(name)
    comparisons = []
    for size in session.extent.sampled_sizes:
        for dtype in session.dtypes:
            network = sample_network(sample_config(size), dtype)
            about = f"widths of {size}, {dtype_name(dtype)}"
            for config in _KINDS:
                for rows in (1, 2):
                    on, off = (_logits(session, network, name, value, config, rows) for value in (True, False))
                    what = f"{about}, {config.label} KV, {rows} at once"
                    allowed = session.tolerance(dtype, quantized_kv=config.bits is not None)
                    comparisons.append(Comparison.of(what, on, off, allowed))
    found = judged(comparisons, f"set OPENELM_MLX_CHOICES={name}=0 in the environment to do without {name}")
    texts = [_text(session, name, value) for value in (True, False)]
    if texts[0] != texts[1] and found.status == PASSED:
        return Outcome(FAILED, "the greedy texts differ", "equal texts", {**found.figures, "texts": texts})
    return found


def _logits(session: Session, network: OpenELM, name: str, value: bool, config: CacheConfig, rows: int) -> mx.array:
    tokens = sample_tokens(rows, _PROMPT + session.extent.steps)
    with replaced_choices(**{name: value}):
        return stepwise_logits(network, tokens, config, compiled=True, steps=session.extent.steps)


def _text(session: Session, name: str, value: bool) -> list[int]:
    """A greedy text of the built-in model in float32."""
    network = session.built_in(mx.float32)
    with replaced_choices(**{name: value}):
        return [step.token for step in generate_tokens(network, [1], max_tokens=session.extent.greedy_tokens)]


class _Way:
    """This package with a choice made one way."""

    def __init__(self, network: OpenELM, choice: str, value: bool):
        self.name = f"{choice}={value:d}"
        self._ours = Ours(network)
        self._changes = {choice: value}

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int, cache: CacheConfig) -> Run:
        """See `Contestant`."""
        with replaced_choices(**self._changes):
            return self._ours.run(prompts, max_tokens, cache)


def _timed(name: str, size: str, context: int, session: Session) -> Outcome:
    _check_applies(name)
    extent = session.extent
    case = Case(context, extent.measured_tokens)
    network = random_of_size(size, None, case, 2 * (extent.rounds + 1), session)
    ways = [_Way(network, name, value) for value in (True, False)]
    with wired_memory():
        result = measure(network, ways, case, model=size, memory=session.memory, rounds=extent.rounds)
    on, off = (_speed(result.figures[way.name]) for way in ways)
    is_on = getattr(choices(), name)
    if is_on is None:
        is_on = reads_tokens_first(kv_cache_bytes(network.config, context, session.dtype))
    ratio = on / off if is_on else off / on
    advice = ""
    if ratio * _FASTER < 1:
        better = f"OPENELM_MLX_CHOICES={name}={not is_on:d}"
        advice = (
            f"{size} after {context:,} tokens is {1 / ratio:.2f} times as fast here with {better} in the environment"
        )
    return Outcome(
        MEASURED,
        f"on {on:,.1f}, off {off:,.1f} tokens/s; the default is {'on' if is_on else 'off'}",
        figures={**result.to_dict(), "default": is_on, "default_over_other": ratio},
        advice=advice,
    )


def _speed(figures: Figures) -> float:
    return figures.decode_tokens_per_second.median
