"""The machine of a benchmark: what it is, and the power it draws."""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..packages import installed_version
from ..version import __version__
from .blas import blas_in_use
from .device import backend_in_use, device_name, gpu_name
from .native import native_description

_RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def describe(command: str) -> dict[str, Any]:
    """What ran where, to be recorded with a result."""
    return {
        "chip": chip_name(),
        "device": device_name(),
        "system": _system(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "blas": _blas_name(),
        "native": native_description() if backend_in_use() == "cpu" else None,
        "versions": {
            "mlx": installed_version("mlx"),
            "mlx-lm": installed_version("mlx-lm"),
            "openelm-mlx": __version__,
        },
        "commit": _commit(),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }


def _blas_name() -> str | None:
    """File name of the library for matrix products where they run on the CPU; `None` elsewhere."""
    blas = blas_in_use() if backend_in_use() == "cpu" else None
    return None if blas is None else blas.name


def _system() -> str:
    """Name of the system, on a Mac its version, and the processor architecture."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    return f"{platform.system()} {platform.machine()}"


def chip_name() -> str:
    """The name of the processor or GPU, as its maker reports it."""
    gpu = gpu_name()
    if gpu is not None:
        return gpu
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def power_meter() -> Callable[[], float | None]:
    """Start measuring power; the returned function gives the watts drawn since, or `None` if they are not known.

    This needs no root privileges. On Linux it is the average from the processor's energy counter, if it can be read; on
    an NVIDIA GPU, the power drawn at the moment of the call; on a Mac, the same for its battery, if it runs on it.
    """
    started = time.perf_counter()
    if backend_in_use() == "cuda":
        return lambda: _number(_output("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"))
    if sys.platform == "darwin":
        return lambda: battery_watts(_output("ioreg", "-rn", "AppleSmartBattery") or "")
    before = _energy()

    def watts() -> float | None:
        after = _energy()
        if before is None or after is None or after < before:  # the counter wraps around now and then
            return None
        return (after - before) / 1e6 / (time.perf_counter() - started)

    return watts


def battery_watts(text: str) -> float | None:
    """Watts that a battery delivers, from the output of `ioreg`; `None` on external power or without a battery."""
    fields = dict(re.findall(r'"(InstantAmperage|Voltage|ExternalConnected)" = (\w+)', text))
    if fields.get("ExternalConnected") != "No" or not {"InstantAmperage", "Voltage"} <= fields.keys():
        return None
    milliamperes = int(fields["InstantAmperage"])
    milliamperes -= 1 << 64 if milliamperes >= 1 << 63 else 0  # negative while it discharges
    return -milliamperes * int(fields["Voltage"]) / 1e6


def _energy() -> float | None:
    try:
        return float(_RAPL.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _commit() -> str | None:
    """Commit of the working copy that contains this package, if there is one."""
    root = Path(__file__).resolve().parents[2]
    return _output("git", "-C", str(root), "rev-parse", "--short", "HEAD") if (root / ".git").exists() else None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").splitlines()[0])
    except (ValueError, IndexError):
        return None
