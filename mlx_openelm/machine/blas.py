"""The library for matrix products on a Linux CPU (BLAS): which one is in use, and a faster one that is installed.

MLX's wheel for Linux CPUs comes with a BLAS without vector instructions. A library whose symbols are global before MLX
is loaded takes its place. That is what LD_PRELOAD does, and what `load_fast_blas` does without a new process. This
module does not need MLX, as `system.py` does not.
"""

import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ..errors import ConfigError

VARIABLE = "OPENELM_MLX_BLAS"  # `off`, or the path of a library
_BUNDLED = "mlx_cpu.libs"  # folder of the libraries in MLX's wheel, beside `mlx`
_SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # what MLX takes from a BLAS
_NAMES = (  # the variants with threads first; those for 64-bit integers, whose names have a 64, do not fit MLX
    "libopenblasp.so.0",  # Fedora
    "libopenblas_pthreads.so.0",  # openSUSE
    "libopenblas.so.0",  # Debian, Arch, conda; without threads on Fedora
    "libopenblaso.so.0",
    "libopenblas.so",
    "libmkl_rt.so.3",  # conda's or pip's mkl
    "libmkl_rt.so.2",
)
_FOLDERS = (
    "/usr/local/lib",
    "/usr/local/lib64",
    f"/usr/lib/{os.uname().machine}-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/opt/OpenBLAS/lib",
    "/home/linuxbrew/.linuxbrew/lib",
)
_STARTS = ("libblas", "libopenblas", "libmkl_rt", "libblis", "libflexiblas", "libcblas")


def load_fast_blas() -> Path | None:
    """Load a fast BLAS for the rest of this process, if MLX would use its own slow one. Call it before MLX is imported.

    Returns:
        The library that was loaded; `None` if there is none, or nothing to do: not Linux, MLX is loaded already or uses
        another BLAS, a library is preloaded, or the environment variable OPENELM_MLX_BLAS is `off`.

    Raises:
        ConfigError: if OPENELM_MLX_BLAS names a library that cannot be used.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted.lower() in ("off", "0") or not _replaces_own() or _global_symbols():
        return None
    if wanted:
        if problem := _load(wanted):
            raise ConfigError(f"{VARIABLE}: {problem}; set it to the path of a BLAS, or to off")
        return Path(wanted)
    return next((path for path in installed_blas() if _load(str(path), known=True) is None), None)


def installed_blas() -> Iterator[Path]:
    """Fast BLAS libraries on this system, the best first; where they can be told by their names and places."""
    listed = [part for part in os.environ.get("LD_LIBRARY_PATH", "").split(":") if part.startswith("/")]
    folders = [*listed, *(f"{prefix}/lib" for prefix in (sys.prefix, sys.base_prefix)), *_FOLDERS]
    for folder in dict.fromkeys(folders):
        for name in _NAMES:
            if os.path.isfile(f"{folder}/{name}"):
                yield Path(folder, name)


@cache
def blas_in_use() -> Path | None:
    """The BLAS of this process, which has loaded MLX; `None` where it is unknown, as on a Mac."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    address = _global_symbols().get(_SYMBOLS[0])
    if address is not None:
        return next((_file(line) for line in maps if _holds(line, address)), None)
    paths = dict.fromkeys(_file(line) for line in maps if ".so" in line)
    found = [path for path in paths if path.name.startswith(_STARTS)]
    return next((path for path in found if path.parent.name == _BUNDLED), found[0] if found else None)


def is_bundled(blas: Path) -> bool:
    """Whether a library is the slow one that comes with MLX."""
    return blas.parent.name.startswith("mlx_") and blas.parent.suffix == ".libs"


def _replaces_own() -> bool:
    """Whether MLX comes with its own BLAS and is not loaded yet."""
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return False
    spec = PathFinder.find_spec("mlx")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any(os.path.isdir(os.path.join(os.path.dirname(folder), _BUNDLED)) for folder in folders)


def _file(line: str) -> Path:
    """The file of a line of /proc/self/maps."""
    return Path(line.split(maxsplit=5)[-1])


def _holds(line: str, address: int) -> bool:
    """Whether a line of /proc/self/maps is that of the range with this address."""
    start, _, end = line.split(maxsplit=1)[0].partition("-")
    return int(start, 16) <= address < int(end, 16)


def _global_symbols() -> dict[str, int]:
    """Addresses of the functions that every library loaded from now on would get."""
    import ctypes

    everything = ctypes.CDLL(None)
    found = {name: getattr(everything, name, None) for name in _SYMBOLS}
    return {name: _address(function) for name, function in found.items() if function is not None}


def _address(function: Any) -> int:
    import ctypes

    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


def _load(path: str, known: bool = False) -> str | None:
    """Load a library and make its symbols global, if it fits MLX; otherwise, what is wrong with it.

    Args:
        known: whether it must be one of those that are known to be fast.
    """
    import ctypes

    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        return f"{path!r} cannot be loaded ({error})"
    if missing := [name for name in _SYMBOLS if not hasattr(library, name)]:
        return f"{path!r} has no function {missing[0]}"
    config = ""
    if hasattr(library, "openblas_get_config"):
        library.openblas_get_config.restype = ctypes.c_char_p
        config = library.openblas_get_config().decode(errors="replace")
    elif hasattr(library, "MKL_Get_Version_String"):
        config = os.environ.get("MKL_INTERFACE_LAYER", "")
    elif known:
        return f"{path!r} is neither OpenBLAS nor MKL"
    if "USE64BITINT" in config or "ILP64" in config.split(","):
        return f"{path!r} takes 64-bit integers, and MLX gives it 32-bit ones"
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return None
