"""Optional packages: imported when a feature needs them, with a message that says how to install them."""

import importlib
import sys
from pathlib import Path
from typing import Any

from .errors import MissingPackageError


def optional_package(name: str, what: str, extra: str) -> Any:
    """Import a package by its import name.

    Args:
        what: start of the message, such as `plots need`.
        extra: the extra of this package that installs it as well.
    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingPackageError(
            f"{what} {package}, which is not installed: `{install_command(package)}` (or install this package with its "
            f"extra {extra!r})"
        ) from error


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
        return f"MLX cannot be loaded ({reason}); install it with {_install_mlx()}"
    how = f"`{install_command(_DISTRIBUTIONS.get(name, name))}`" if name else "this package's requirements"
    return f"a package that openelm-mlx needs cannot be loaded ({reason}); install it with {how}"


_DISTRIBUTIONS = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub", "google": "protobuf"}  # by import name
_BACKENDS = {"cpu": "mlx[cpu]", "cuda": "mlx[cuda13]"}  # by the extra of this package that installs the same


def install_command(requirement: str, upgrade: bool = False) -> str:
    """What to type to install a package where this one is installed, also if pipx or uv made the environment.

    It names the package itself, so that it works whether this one came from an index or from a copy of its code.
    """
    quoted = f'"{requirement}"' if "[" in requirement else requirement
    parts = Path(sys.prefix).parts
    options = "--upgrade " if upgrade else ""
    if "pipx" in parts and "venvs" in parts:
        return f"pipx runpip {parts[-1]} install {options}{quoted}"
    if "uv" in parts and "tools" in parts:
        return f"uv pip install --python {sys.prefix} {options}{quoted}"
    return f"pip install {options}{quoted}"


def _install_mlx() -> str:
    """What installs MLX with a backend for this machine, or a newer MLX."""
    if not sys.platform.startswith("linux"):
        return f"`{install_command('mlx', upgrade=True)}`"
    cpu, cuda = (f"`{install_command(requirement, upgrade=True)}`" for requirement in _BACKENDS.values())
    return f"{cpu}, or {cuda} for an NVIDIA GPU"
