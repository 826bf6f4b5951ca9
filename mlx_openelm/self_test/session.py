"""What all checks of a self-test share: how much to do, the time left, tolerances, and the networks to check with."""

import time
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from ..config import PRESETS
from ..loading import load_model
from ..machine.bandwidth import BandwidthProbe
from ..machine.device import compute_dtype, on_cpu
from ..machine.doctor import Diagnosis, examine
from ..model.openelm import OpenELM
from .golden import MODEL_FOLDER

# Largest differences that rounding explains, as shares of the largest value. Different ways on the CPU differ by up to
# 2e-6 in float32, 2e-3 in float16 and 1.5e-2 in bfloat16, or 3e-2 with quantized KV; a wrong position by 1e-1 and more.
_TOLERANCES = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}
_TF32_TOLERANCE = 1e-2  # TF32 has as many bits as float16
_QUANTIZED_KV_TOLERANCE = 5e-3  # at least: a number between two codes may get either
_BITS_24 = 1 + 2**-13  # float32 holds this number; TF32, with its 11 bits, rounds it to 1


@dataclass(frozen=True)
class Extent:
    """How much a self-test does."""

    seconds: float = 300  # no measurement begins after this time
    sampled_sizes: tuple[str, ...] = ("270M", "3B")  # whose widths are decoded with: heads of width 64 and 128
    trained_size: str = "270M"  # whose widths are trained and quantized
    steps: int = 12  # tokens that are decoded one by one and compared
    greedy_tokens: int = 32
    memory_tokens: int = 2000
    sizes: tuple[str, ...] = tuple(PRESETS)  # to measure
    compared_sizes: tuple[str, ...] = ("270M", "1.1B")  # to measure with both ways of a choice
    prompt_tokens: int = 512
    measured_tokens: int = 64
    contexts: tuple[int, ...] = (128, 1536)  # tokens before those that are measured with both ways of a choice
    rounds: int = 2

    @classmethod
    def of_device(cls) -> "Extent":
        """About five minutes, on the CPU ten: it reads a prompt 100 times more slowly, so there is less to measure."""
        if not on_cpu():
            return cls()
        return cls(
            seconds=600,
            sampled_sizes=("270M",),
            compared_sizes=("270M",),
            prompt_tokens=32,
            measured_tokens=12,
            contexts=(64,),
            rounds=1,
        )


class Session:
    """One run of the self-test on the default device."""

    def __init__(self, extent: Extent | None = None):
        self.extent = extent or Extent.of_device()
        self._ends = time.monotonic() + self.extent.seconds
        self._built_in: dict[mx.Dtype, OpenELM] = {}

    @property
    def seconds_left(self) -> float:
        """Time until no further measurement begins."""
        return self._ends - time.monotonic()

    @property
    def is_on_cpu(self) -> bool:
        """Whether the device is the one that results are compared with."""
        return on_cpu()

    @property
    def dtype(self) -> mx.Dtype:
        """The type that a published model computes in here."""
        return compute_dtype(mx.bfloat16)

    @property
    def dtypes(self) -> tuple[mx.Dtype, ...]:
        """The types to check: float32, and that of a published model."""
        return tuple(dict.fromkeys((mx.float32, self.dtype)))

    @cached_property
    def has_exact_products(self) -> bool:
        """Whether float32 matrix products keep all 24 bits: TF32 units round their inputs to 11."""
        ones = mx.eye(256)
        return bool((ones * _BITS_24 @ ones).max().item() == _BITS_24)

    def tolerance(self, dtype: mx.Dtype, *, quantized_kv: bool = False) -> float:
        """The largest difference that rounding explains, as a share of the largest value."""
        is_tf32 = dtype == mx.float32 and not self.has_exact_products
        allowed = _TF32_TOLERANCE if is_tf32 else _TOLERANCES[dtype]
        return max(2 * allowed, _QUANTIZED_KV_TOLERANCE) if quantized_kv else allowed

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """What `doctor` finds without a self-test."""
        return examine()

    @cached_property
    def memory(self) -> BandwidthProbe:
        """Measures the memory's bandwidth; it has taken a sample."""
        probe = BandwidthProbe()
        probe.sample()
        return probe

    def built_in(self, dtype: mx.Dtype) -> OpenELM:
        """The model that comes with the package, on the default device."""
        if dtype not in self._built_in:
            self._built_in[dtype] = load_model(MODEL_FOLDER, dtype=dtype)
        return self._built_in[dtype]
