"""Optional packages: imported when a feature needs them, with a message that says how to install them."""

import importlib
import sys
from typing import Any

from .errors import MissingPackageError


def optional_package(name: str, what: str, extra: str) -> Any:
    """Import a package by its import name.

    Args:
        what: start of the message, such as `plots need`.
        extra: the extra of this package that installs it.
    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"{what} an optional package: pip install 'openelm-mlx[{extra}]'") from error


def installed_version(name: str) -> str | None:
    """The version of a package by its distribution name; `None` if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing_package(error: ImportError) -> str | None:
    """What to install, for an import of another package that failed; `None` if it was one of this package's modules."""
    name = (error.name or "").partition(".")[0]
    reason = " ".join(str(error).split())
    if name == __package__.partition(".")[0]:
        return None
    if name.startswith("mlx") or "libmlx" in reason:
        return f"MLX cannot be loaded ({reason}); install it with {_install_command()}"
    return f"a package that openelm-mlx needs cannot be loaded ({reason}); install it with {_install_command()}"


def _install_command() -> str:
    """What installs this package with a backend for this machine."""
    if not sys.platform.startswith("linux"):
        return "`pip install openelm-mlx`"
    return '`pip install "openelm-mlx[cpu]"`, or `pip install "openelm-mlx[cuda]"` for an NVIDIA GPU'
