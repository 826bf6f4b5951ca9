"""The device that MLX computes on, and every choice that depends on it."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mlx.core as mx

from .system import physical_memory_bytes

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
_LARGEST_TEAM = 8  # cores; more would only wait for memory
_COMPILED_ON_CPU = 2048  # tokens from which compiling pays off
_COMPILED_ON_GPU = 32
_CPU_SHARE = 0.9  # of physical memory; the rest is for the system


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return mx.default_device() == mx.Device(mx.cpu)


def device_name() -> str:
    """Name of the device that MLX computes on, for people."""
    if on_cpu():
        return "CPU"
    name = mx.device_info().get("device_name")
    return f"{name} ({'Metal' if mx.metal.is_available() else 'CUDA'})"


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype to compute in: float32 on the CPU, where 16-bit arithmetic is slow, else the stored one."""
    return mx.float32 if on_cpu() else stored


@cache
def compute_streams() -> tuple[mx.Stream, ...]:
    """Streams that run in parallel: on the CPU, where each stream has a thread, one per core up to 8; else one."""
    default = mx.default_stream(mx.default_device())
    team = min(os.cpu_count() or 1, _LARGEST_TEAM) if on_cpu() else 1
    return default, *(mx.new_stream(mx.cpu) for _ in range(team - 1))


def pays_to_compile(num_tokens: int) -> bool:
    """Whether compiling the decoding step pays off for an answer of at most `num_tokens` tokens.

    On the CPU, MLX starts a C++ compiler once per kernel: that takes some seconds and saves 2 to 3 ms per token.
    """
    return num_tokens >= (_COMPILED_ON_CPU if on_cpu() else _COMPILED_ON_GPU)


@cache
def blas_in_use() -> str | None:
    """Folder and file name of a Linux process's BLAS: a preloaded one takes precedence over MLX's own."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = dict.fromkeys(Path(line.split()[-1]) for line in maps.splitlines() if ".so" in line)
    found = [path for path in paths if path.name.startswith(("libblas", "libopenblas", "libmkl", "libblis"))]
    preloaded = [path for path in found if "mlx" not in str(path.parent)]
    return next((f"{path.parent.name}/{path.name}" for path in [*preloaded, *found]), None)


def has_fast_matmul() -> bool:
    """Whether matrix products use vector instructions; the BLAS that comes with MLX on Linux does not."""
    blas = blas_in_use() if sys.platform.startswith("linux") else None
    return blas is None or "mlx" not in blas


def memory_limit_bytes() -> int:
    """Memory that a model, its cache and its activations may use on this machine, in bytes."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    if not on_cpu():
        total = mx.device_info().get("total_memory")
        if total:
            return int(total)
    return int(physical_memory_bytes() * _CPU_SHARE)


def peak_memory_bytes() -> int:
    """Peak memory so far, in bytes: of the device, or on the CPU of the whole process."""
    if not on_cpu():
        return mx.get_peak_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def wired_memory() -> Iterator[None]:
    """Keep the weights of a large model in the GPU's memory within this context; without Metal, do nothing."""
    if not mx.metal.is_available():
        yield
        return
    before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)
