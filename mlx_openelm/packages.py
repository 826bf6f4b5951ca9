"""Optional packages: imported when a feature needs them, with a message that says how to install them."""

import importlib
from importlib.metadata import PackageNotFoundError, version
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
    try:
        return version(name)
    except PackageNotFoundError:
        return None
