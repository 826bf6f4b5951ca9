"""The device that MLX computes on, and every choice that depends on it."""

import os
import platform
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import mlx.core as mx

from ..errors import ConfigError
from .blas import blas_in_use, is_bundled
from .native import native_kernels
from .system import physical_memory_bytes

_OLDEST_MLX = "0.32.1"  # as in pyproject.toml; older versions have bugs in RoPE and attention that give wrong text


def _check_version(version: str) -> None:
    """Raise ImportError, as for a package that is missing, where MLX is too old: pip only warns of that."""
    oldest, found = (tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (_OLDEST_MLX, version))
    if found < oldest:
        raise ImportError(f"version {version} is installed, but {_OLDEST_MLX} or newer is needed", name="mlx")


_check_version(getattr(mx, "__version__", _OLDEST_MLX))  # a stand-in has none

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
_LARGEST_TEAM = 8  # cores; more would only wait for memory
_COMPILED_ON_CPU = 2048  # tokens from which compiling pays off
_COMPILED_ON_GPU = 32
_LARGEST_COPIED = 64 << 20  # bytes that Metal copies in about the time of encoding a step: 1.3 ms at 100 GB/s
_LARGEST_BLOCK = 65_536  # queries
_CPU_SHARE = 0.9  # of physical memory; the rest is for the system
_CACHE_DIVISOR = 4  # of the memory limit: what MLX may keep in freed buffers while a model is trained


@dataclass(frozen=True)
class Choices:
    """How to compute, where devices differ. `choices()` returns those for the device in use.

    Those marked as open cannot be decided by reading; `openelm-mlx doctor --self-test` measures both ways.
    """

    backend: str  # cpu, metal or cuda
    fused_kernels: bool  # open: decode with the kernels of `kernels/`, which save launches
    indexed_writes: bool  # write keys and values by index, which is one launch on a GPU, not as a slice
    tokens_first: bool | None  # open: read a step's tokens before the next is queued; None: see `reads_tokens_first`
    exact_slices: bool  # decode uncompiled, over exactly the slots in use: fused attention takes no mask on CUDA
    attention_block: int  # queries at once in training


_DEFAULTS = {
    "cpu": Choices("cpu", False, False, False, False, 128),
    "metal": Choices("metal", True, True, None, False, 512),
    "cuda": Choices("cuda", True, True, False, True, 512),
}
_VARIABLE = "OPENELM_MLX_CHOICES"  # such as "tokens_first=1,fused_kernels=0"
_CPU = mx.Device(mx.cpu)
_replaced: list[dict[str, Any]] = []  # of contexts within contexts, each with the changes of those around it


def choices() -> Choices:
    """The choices for the device in use, with what `replaced_choices` or the environment changed.

    Raises:
        ConfigError: if the environment variable OPENELM_MLX_CHOICES names no choice, or a value that it cannot have.
    """
    changes = _replaced[-1] if _replaced else _from_environment()
    if not changes:
        return _DEFAULTS[backend_in_use()]
    return replace(_DEFAULTS[changes.get("backend") or backend_in_use()], **changes)


@contextmanager
def replaced_choices(**changes: Any) -> Iterator[None]:
    """Compute with other choices within this context; another `backend` brings all choices of that one.

    Nothing moves to another device: the graph becomes what that device would get.
    """
    _replaced.append({**_from_environment(), **(_replaced[-1] if _replaced else {}), **changes})
    try:
        yield
    finally:
        _replaced.pop()


def backend_in_use() -> str:
    """The backend that MLX computes with: cpu, metal or cuda, whatever `replaced_choices` says."""
    if mx.default_device() == _CPU:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def _gpu_info() -> dict[str, Any]:
    """What MLX says about the GPU that it computes on; on the CPU, whose entries are others, nothing."""
    return {} if backend_in_use() == "cpu" else mx.device_info(mx.default_device())


@cache
def _from_environment() -> dict[str, Any]:
    known = {field.name: field.type for field in fields(Choices) if field.name != "backend"}
    values: dict[str, Any] = {}
    for part in filter(None, os.environ.get(_VARIABLE, "").split(",")):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise ConfigError(f"{_VARIABLE}: unknown choice {name!r} (choose from {', '.join(known)})")
        if known[name] is not int:
            if value not in ("0", "1"):
                raise ConfigError(f"{_VARIABLE}: {name} must be 0 or 1; got {value!r}")
            values[name] = value == "1"
        else:
            if not (value.isdecimal() and 1 <= int(value) <= _LARGEST_BLOCK):
                raise ConfigError(f"{_VARIABLE}: {name} must be a number from 1 to {_LARGEST_BLOCK:,}; got {value!r}")
            values[name] = int(value)
    return values


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return choices().backend == "cpu"


def gpu_name() -> str | None:
    """Name of the GPU that MLX computes on, as its maker calls it; `None` on the CPU."""
    return None if backend_in_use() == "cpu" else str(_gpu_info().get("device_name", "GPU"))


def device_name() -> str:
    """Name of the device that MLX computes on, for people."""
    name = gpu_name()
    return "CPU" if name is None else f"{name} ({'Metal' if backend_in_use() == 'metal' else 'CUDA'})"


def rounds_float32() -> bool:
    """Whether this GPU computes float32 matrix products in TF32, which keeps about 10 of the 23 bits.

    MLX does so by default on NVIDIA GPUs from Ampere on, and on Apple's from the M5 on with macOS 26.2. Products with a
    single vector are exact. MLX reads the environment variable MLX_ENABLE_TF32 at the first product; 0 turns it off.
    """
    if os.environ.get("MLX_ENABLE_TF32", "1").strip() == "0":
        return False
    info = _gpu_info()
    if backend_in_use() == "metal":
        found = re.fullmatch(r"applegpu_g(\d+)(\w)", str(info.get("architecture")))
        system = tuple(map(int, re.findall(r"\d+", platform.mac_ver()[0])))
        return found is not None and int(found[1]) >= (18 if found[2] == "p" else 17) and system >= (26, 2)
    return int(info.get("compute_capability_major", 0)) >= 8


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype to compute in: float32 on the CPU, where 16-bit arithmetic is slow, else what `convert` writes."""
    return mx.float32 if on_cpu() else written_dtype(stored)


def written_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype that `convert` writes by default: bfloat16 for float32, in half the bytes; 16-bit types stay."""
    return mx.bfloat16 if stored == mx.float32 else stored


def compute_streams() -> tuple[mx.Stream, ...]:
    """Streams that run in parallel: on the CPU, where each stream has a thread, one per core up to 8; else one."""
    default = mx.default_stream(mx.default_device())
    return (default, *_more_cpu_streams()) if on_cpu() else (default,)


@cache
def _more_cpu_streams() -> tuple[mx.Stream, ...]:
    return tuple(mx.new_stream(mx.cpu) for _ in range(min(os.cpu_count() or 1, _LARGEST_TEAM) - 1))


def reading_threads() -> int:
    """How many threads look at the values of a file at once, on the CPU beside any device."""
    return min(os.cpu_count() or 1, _LARGEST_TEAM)


def reads_tokens_first(kv_bytes: int) -> bool:
    """Whether to read a step's tokens before the next step is queued, with this many bytes of keys and values.

    Queued at once, the next step keeps the device busy. But while a step is in flight, Metal holds its inputs, so the
    next one cannot write keys and values in place and copies them, which takes longer than the wait if they are large.
    """
    found = choices()
    if found.tokens_first is not None:
        return found.tokens_first
    return found.backend == "metal" and kv_bytes > _LARGEST_COPIED


def queues_prefill() -> bool:
    """Whether to queue a chunk of a prompt while the one before is computed: on a GPU, which would wait otherwise.

    On the CPU queueing takes as long as computing, so that nobody would learn that a chunk is done.
    """
    return not on_cpu()


def plain_masked_attention() -> bool:
    """Whether to compute attention with a mask in plain operations: cuDNN plans each new shape, for 40 ms on an H100.

    Chunks of texts have ever new shapes, times the numbers of heads of all layers.
    """
    return choices().backend == "cuda"


def scoring_sizes() -> tuple[int, int, int]:
    """For scoring: bytes beside the model, most tokens of a chunk, and queries that attend at once.

    MLX on a CPU computes all products of a block with what its mask excludes, so that small blocks pay; the native
    kernels do not. A GPU needs a thousand tokens at once to be busy, and equal shapes: for new ones, CUDA's libraries
    choose anew how to multiply.
    """
    if not on_cpu():
        return 1 << 30, 1024, 1024
    return 64 << 20, 4096, 64 if native_kernels() is None else 1024


def pays_to_compile(num_tokens: int) -> bool:
    """Whether compiling the decoding step pays off for an answer of at most `num_tokens` tokens.

    On the CPU, MLX starts a C++ compiler once per kernel: that takes some seconds and saves 2 to 3 ms per token.
    """
    return num_tokens >= (_COMPILED_ON_CPU if on_cpu() else _COMPILED_ON_GPU)


def has_fast_matmul() -> bool:
    """Whether matrix products on the CPU use vector instructions; the BLAS that comes with MLX on Linux does not."""
    blas = blas_in_use()
    return blas is None or not is_bundled(blas)


def memory_limit_bytes() -> int:
    """Memory that a model, its cache and its activations may use on the device that computes, in bytes."""
    info = _gpu_info()
    limit = info.get("max_recommended_working_set_size") or info.get("total_memory")  # of Metal, of CUDA
    return int(limit or physical_memory_bytes() * _CPU_SHARE)


def peak_memory_bytes() -> int:
    """Peak memory so far, in bytes: of the device, or on the CPU of the whole process."""
    if backend_in_use() != "cpu":
        return mx.get_peak_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _SharedLimit:
    """A limit of MLX for contexts that may overlap in any order: the first sets it, the last restores it.

    Generators overlap like that: one that is closed must not change the limit for another whose work is in flight.
    """

    def __init__(self, set_limit: Callable[[int], int], restore: Callable[[int], object]):
        self._set, self._restore = set_limit, restore
        self._lock = threading.RLock()  # a generator can be closed by garbage collection, within the lock too
        self._users = self._before = 0

    @contextmanager
    def at(self, limit: int) -> Iterator[None]:
        """A context in which the limit holds."""
        with self._lock:
            if self._users == 0:
                self._before = self._set(limit)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore(self._before)


def _lower_cache_limit(limit: int) -> int:
    before = mx.set_cache_limit(limit)
    if before < limit:
        mx.set_cache_limit(before)
    return before


def _restore_cache_limit(before: int) -> None:
    mx.set_cache_limit(before)
    mx.clear_cache()


def _restore_wired_limit(before: int) -> None:
    mx.synchronize()
    mx.set_wired_limit(before)


_wired = _SharedLimit(lambda limit: mx.set_wired_limit(limit), _restore_wired_limit)
_cache = _SharedLimit(_lower_cache_limit, _restore_cache_limit)


@contextmanager
def wired_memory() -> Iterator[None]:
    """Keep the weights of a large model in the GPU's memory within this context; without Metal, do nothing.

    Contexts may overlap: the limit stays until the last of them ends.
    """
    if backend_in_use() != "metal":
        yield
        return
    with _wired.at(int(_gpu_info()["max_recommended_working_set_size"])):
        yield


@contextmanager
def limited_cache() -> Iterator[None]:
    """Let MLX keep at most a quarter of `memory_limit_bytes` in freed buffers within this context, and none after it.

    MLX reuses a freed buffer for arrays of about its size. Steps whose rows differ in width need ever new sizes, and on
    a GPU MLX frees the old ones only when memory runs out. Within a quarter, all buffers of a step are reused unless it
    computes with a large share of the memory, and then allocating them anew takes little of its time. A lower limit,
    as MLX has on the CPU, stays. Contexts may overlap.
    """
    with _cache.at(memory_limit_bytes() // _CACHE_DIVISOR):
        yield
