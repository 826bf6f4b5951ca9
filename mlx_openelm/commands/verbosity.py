"""How much commands say on stderr: `--verbose` and `--quiet`, which every command has."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated

import typer

from ..errors import ConfigError

Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also show versions, device, files and times, and where an error comes from."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show only results, warnings and errors, and no progress.")]

_verbose = _quiet = False


def is_verbose() -> bool:
    """Whether to say more than usual."""
    return _verbose


def is_quiet() -> bool:
    """Whether to say nothing but warnings and errors beside the result."""
    return _quiet


def reset_verbosity() -> None:
    """Say as much as usual again."""
    global _verbose, _quiet
    _verbose = _quiet = False


def set_verbosity(verbose: bool, quiet: bool) -> None:
    """Note what was asked for, before the name of the command or after it.

    Raises:
        ConfigError: if both were.
    """
    global _verbose, _quiet
    _verbose, _quiet = _verbose or verbose, _quiet or quiet
    if _verbose and _quiet:
        raise ConfigError("--verbose and --quiet are mutually exclusive")


def with_verbosity(command: Callable[..., None], show: Callable[[str], None]) -> Callable[..., None]:
    """A command with the two options.

    Args:
        show: receives what --verbose shows, line by line: first the versions, then what the library logs.
    """

    @functools.wraps(command)
    def with_options(verbose: bool, quiet: bool, **values: object) -> None:
        set_verbosity(verbose, quiet)
        if is_verbose():
            _show_log(show)
            show(_about())
        command(**values)

    parameters = list(inspect.signature(command, eval_str=True).parameters.values())
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("verbose", Verbose), ("quiet", Quiet))
    ]
    with_options.__signature__ = inspect.Signature([*parameters, *more])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *more]}
    return with_options


def _show_log(show: Callable[[str], None]) -> None:
    import logging

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(record.getMessage())

    logger = logging.getLogger("mlx_openelm")
    logger.handlers[:] = [Handler()]
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


def _about() -> str:
    """Versions, device, and the library for matrix products on the CPU."""
    import platform

    from ..packages import installed_version
    from ..version import __version__

    parts = [f"openelm-mlx {__version__}, Python {platform.python_version()}, MLX {installed_version('mlx')}"]
    try:
        from ..machine.blas import blas_in_use
        from ..machine.device import device_name, on_cpu
    except ImportError:
        return parts[0]
    parts.append(f"on {device_name()}")
    blas = blas_in_use() if on_cpu() else None
    return " ".join(parts) + (f", BLAS {blas}" if blas else "")
