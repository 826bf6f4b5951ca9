"""What this machine offers MLX, what is slow about it, and what to do."""

import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..packages import installed_version, missing_package
from ..version import __version__
from .blas import VARIABLE, blas_in_use, installed_blas, is_bundled
from .native import native_description, native_problem
from .system import physical_memory_bytes

_PACKAGES = ("mlx", "mlx-lm", "numpy", "sentencepiece", "tokenizers", "huggingface-hub", "typer")
_SLOW_GFLOPS = 20  # a vectorised BLAS exceeds this on any core of the last ten years; reference BLAS is far below


@dataclass(frozen=True)
class Diagnosis:
    """The findings of `examine`."""

    versions: dict[str, str]
    python: str
    system: str
    device: str
    memory_bytes: int
    memory_limit_bytes: int | None  # None where MLX cannot be loaded, as for the speed
    wired_limit_bytes: int | None  # Metal only; None if the system does not report it
    float32_matmul_gflops: float | None
    blas: str | None  # library for matrix products on the CPU; Linux only
    native: str | None  # kernels of openelm-mlx-native on the CPU: MLX's version, instruction set and threads
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All findings, for JSON."""
        return asdict(self)


def examine() -> Diagnosis:
    """Examine the machine; this takes about a second, to time a matrix product. Works where MLX cannot be loaded, too.

    Raises:
        ImportError: if a module of this package is damaged.
    """
    versions = {"openelm-mlx": __version__, **{name: installed_version(name) or "missing" for name in _PACKAGES}}
    common: dict[str, Any] = {
        "versions": versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "memory_bytes": physical_memory_bytes(),
    }
    try:
        from .device import device_name, memory_limit_bytes, on_cpu
    except ImportError as error:
        return _without_mlx(common, error)

    gflops = _matmul_gflops()
    blas = blas_in_use() if on_cpu() else None
    return Diagnosis(
        **common,
        device=device_name(),
        memory_limit_bytes=memory_limit_bytes(),
        wired_limit_bytes=_wired_limit(),
        float32_matmul_gflops=gflops,
        blas=None if blas is None else f"{blas.parent.name}/{blas.name}",
        native=native_description() if on_cpu() else None,
        advice=tuple(_advice(gflops, blas)),
    )


def _without_mlx(common: dict[str, Any], error: ImportError) -> Diagnosis:
    advice = missing_package(error)
    if advice is None:
        raise error
    return Diagnosis(
        **common,
        device="none: MLX cannot be loaded",
        memory_limit_bytes=None,
        wired_limit_bytes=None,
        float32_matmul_gflops=None,
        blas=None,
        native=None,
        advice=(advice,),
    )


def _advice(gflops: float, blas: Path | None) -> list[str]:
    from .device import on_cpu, rounds_float32

    advice: list[str] = []
    if rounds_float32():
        advice.append(
            "this GPU computes float32 matrix products in TF32, with about three decimal digits; 16-bit models are as "
            "exact as elsewhere. For full float32, set the environment variable MLX_ENABLE_TF32=0"
        )
    if not on_cpu():
        return advice
    advice += _about_native()
    if sys.platform == "darwin":
        advice.append("MLX computes on the CPU: this is not Apple silicon, or the default device was changed")
        return advice
    advice.append(
        "without a GPU, 16-bit arithmetic is slow and 16-bit quantized arithmetic very slow; models run in float32 "
        "here unless `dtype` is set"
    )
    advice += _about_blas(gflops, blas)
    if shutil.which("g++") is None:
        advice.append("g++ is missing; MLX needs it to compile fused kernels on the CPU, and training uses them")
    return advice


def _about_native() -> list[str]:
    if problem := native_problem():
        return [f"openelm-mlx-native is installed, but not used: {problem}"]
    if native_description() is not None:
        return []
    return [
        "openelm-mlx-native is not installed or turned off; it makes this CPU several times as fast: see docs/native.md"
    ]


def _about_blas(gflops: float, blas: Path | None) -> list[str]:
    """What to do about slow matrix products: in the command line, which looks for a fast library, or in programs."""
    installed = next(installed_blas(), None)
    if gflops >= _SLOW_GFLOPS:
        if blas is None or installed is None or blas != installed.resolve() or os.environ.get("LD_PRELOAD"):
            return []
        return [
            f"the command line found {installed} by itself; Python programs of your own use the slow BLAS that comes "
            f"with MLX, unless they start with LD_PRELOAD={installed}"
        ]
    slow = f"float32 matrix products run at {gflops:.1f} GFLOP/s with {blas or 'the BLAS in use'}, which is slow"
    if installed is not None and os.environ.get(VARIABLE):
        return [f"{slow}: {installed} is installed, but the environment variable {VARIABLE} is set; unset it"]
    if installed is not None and (blas is None or is_bundled(blas)):
        return [f"{slow}: start with LD_PRELOAD={installed}"]
    return [
        f"{slow}: install OpenBLAS, which openelm-mlx then finds by itself (Debian and Ubuntu: "
        "apt install libopenblas0-pthread; Fedora: dnf install openblas-threads; Arch: pacman -S openblas)"
    ]


def _matmul_gflops(size: int = 512) -> float:
    import mlx.core as mx

    a = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(a, a @ a)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def _wired_limit() -> int | None:
    from .device import backend_in_use

    if backend_in_use() != "metal":
        return None
    try:
        told = subprocess.run(["sysctl", "-n", "iogpu.wired_limit_mb"], capture_output=True, text=True, check=True)
        return int(told.stdout) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
