"""Packages that only some features need: imported when they are, with a word on how to get them."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .errors import MissingPackageError


def optional_package(name: str, what: str, extra: str) -> Any:
    """A package by its import name.

    Args:
        what: the feature that needs it, for the message.
        extra: the extra of this package that brings it.
    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"{what} another package: pip install 'openelm-mlx[{extra}]'") from error


def installed_version(name: str) -> str | None:
    """The version of a package by its name on the index; `None` if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
