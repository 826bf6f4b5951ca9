"""The optional package `openelm-mlx-native`: products on the CPU with vector instructions and on all cores."""

import importlib
import os
import warnings
from functools import cache
from typing import Any

from ..errors import ConfigError

VARIABLE = "OPENELM_MLX_NATIVE"  # `off` computes with MLX's own operations; `int8` rounds the inputs of prefill
_PACKAGE = "openelm_mlx_native"


@cache
def native_kernels() -> Any | None:
    """The module `openelm_mlx_native`; `None` if it is not installed, or OPENELM_MLX_NATIVE is `off`.

    Raises:
        ConfigError: if OPENELM_MLX_NATIVE has another value.
    Warns:
        RuntimeWarning: if it is installed but cannot be loaded, as with another version of MLX.
    """
    wanted = os.environ.get(VARIABLE, "").lower()
    if wanted in ("off", "0"):
        return None
    if wanted not in ("", "on", "1", "int8"):
        raise ConfigError(f"{VARIABLE} must be on, off or int8; got {os.environ[VARIABLE]!r}")
    try:
        return importlib.import_module(_PACKAGE)
    except ModuleNotFoundError as error:
        if error.name == _PACKAGE:
            return None
        problem: ImportError = error
    except ImportError as error:
        problem = error
    warnings.warn(f"openelm-mlx-native is not used: {problem}", RuntimeWarning, stacklevel=2)
    return None


@cache
def native_activations() -> str:
    """How the kernels read the inputs of quantized matrices: as float32 or, if OPENELM_MLX_NATIVE says so, as int8."""
    return "int8" if os.environ.get(VARIABLE, "").lower() == "int8" else "float32"


def native_description() -> str | None:
    """Version, instruction set and threads of the kernels in use, for people; `None` without them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        kernels = native_kernels()
    if kernels is None:
        return None
    threads = kernels.threads()
    rounded = ", int8 activations" if native_activations() == "int8" else ""
    return f"{kernels.mlx_version}, {kernels.instructions()}, {threads} thread{'s' if threads > 1 else ''}{rounded}"


def native_problem() -> str | None:
    """Why the package is not used although it is installed; `None` if it is used or not installed."""
    try:
        importlib.import_module(_PACKAGE)
    except ModuleNotFoundError as error:
        return None if error.name == _PACKAGE else str(error)
    except ImportError as error:
        return str(error)
    return None
