"""Standard streams: missing, full or of another encoding; and what may reach a terminal."""

import codecs
import contextlib
import io
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from .verbosity import is_quiet

if TYPE_CHECKING:
    from rich.console import Console

_HANDLER = "openelm-mlx"  # name of an error handler of codecs
_CODES = {"bold": "1", "dim": "2", "green": "32"}
# All control characters but tabs and newlines; line separators; what reorders text; halves of surrogate pairs.
_UNSAFE = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class StdoutError(OSError):
    """Stdout does not take what is written to it: its disk is full, its reader has gone, or it is not writable."""


class _Stdout(io.FileIO):
    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            raise StdoutError(error.errno, error.strerror) from error


def prepare_streams() -> None:
    """Make all three standard streams usable: the null device stands in for a closed one.

    Characters that stdout or stderr cannot hold are written as JSON writes them, so that JSON stays valid. What stdout
    does not take is a `StdoutError`.
    """
    codecs.register_error(_HANDLER, _escape_unencodable)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:  # left closed, the number would be that of the next file to be opened
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
            setattr(sys, f"__{name}__", getattr(sys, name))
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors=_HANDLER)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        writer = io.BufferedWriter(_Stdout(sys.stdout.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(writer, sys.stdout.encoding, _HANDLER, line_buffering=sys.stdout.line_buffering)


def read_stdin(whole: bool = True) -> bytes:
    """All of stdin, or its next line; empty at its end.

    Raises:
        PromptError: if it cannot be read.
    """
    try:
        return sys.stdin.buffer.read() if whole else sys.stdin.buffer.readline()
    except OSError as error:
        raise PromptError(f"stdin cannot be read: {error.strerror or error}") from error


def finish_streams() -> None:
    """Write what is still buffered; what a stream does not take is lost, without the traceback that Python prints."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            lose(number)


def lose(number: int) -> None:
    """Send a stream that cannot be written to the null device from now on."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; a missing or closed one is not, nor is stderr with --quiet: no progress there."""
    if stream is sys.stderr and is_quiet():
        return False
    try:
        return stream is not None and bool(stream.isatty())
    except ValueError:
        return False


def has_styles(stream: Any) -> bool:
    """Whether colors, bold and dim text may be used: on a terminal, unless NO_COLOR or TERM=dumb asks for none."""
    return is_terminal(stream) and not no_styles()


def no_styles() -> bool:
    """Whether the environment asks for text without colors and styles."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def clean(text: str) -> str:
    """Text without what a terminal would obey; such characters are escaped as in JSON. Tabs and newlines stay."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def styled(text: str, *styles: str, stream: Any) -> str:
    """Cleaned text with styles (`bold`, `dim`, `green`), where the stream has them."""
    codes = ";".join(_CODES[style] for style in styles)
    return f"\x1b[{codes}m{clean(text)}\x1b[0m" if has_styles(stream) else clean(text)


def console(stderr: bool = False) -> "Console":
    """Rich's console, which takes text literally: no markup and no emoji names."""
    from rich.console import Console

    return Console(
        stderr=stderr, color_system=None if no_styles() else "auto", markup=False, emoji=False, highlight=False
    )


def _escape_unencodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
