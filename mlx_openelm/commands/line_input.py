"""Lines that a person types, with editing and a history where Python has them, or lines from a pipe."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..files.output import write_file
from .streams import is_terminal, read_stdin, styled
from .terminal import write_error

HISTORY_VARIABLE = "OPENELM_MLX_CHAT_HISTORY"  # a file, or off
_LONGEST_HISTORY = 1000  # lines


class LineInput:
    """Reads line by line; where stdin is a terminal, after a prompt."""

    def __init__(self) -> None:
        self._prompt = ""
        self._history: History | None = None
        if is_terminal(sys.stdin):
            self._prompt = "> "
            if is_terminal(sys.stdout):
                self._prompt, self._history = _with_editing()

    def read(self) -> str:
        """The next line, without its end. Invalid UTF-8 is an error whatever the locale.

        Raises:
            EOFError: at the end of the input.
            PromptError: if stdin cannot be read.
            UnicodeError: if the line is not valid UTF-8.
        """
        if self._prompt and is_terminal(sys.stdout):
            line = input(self._prompt)
            line.encode()
            if self._history is not None:
                self._history.add(line)
            return line
        if self._prompt:  # stdout goes elsewhere and gets the answers alone
            write_error(self._prompt, end="", is_asked=True)
        raw = read_stdin(whole=False)
        if not raw:
            raise EOFError
        return raw.decode().rstrip("\r\n")


def _with_editing() -> tuple[str, "History | None"]:
    """The prompt of a terminal, and the history of what was typed; both depend on the library that edits lines.

    GNU readline has to be told which characters take no space, or it misplaces long lines; libedit would print the
    marks, so its prompt is plain.
    """
    bold = styled("> ", "bold", stream=sys.stdout)
    try:
        import readline
    except ImportError:
        return bold, None
    history = None if (path := history_path()) is None else History(path, readline)
    if "libedit" in (readline.__doc__ or "") or getattr(readline, "backend", "readline") == "editline":
        return "> ", history
    return re.sub("(\x1b[^m]*m)", "\x01\\1\x02", bold), history


def history_path() -> Path | None:
    """The file of the history; `None` if there is to be none."""
    wanted = os.environ.get(HISTORY_VARIABLE)
    if wanted == "off":
        return None
    if wanted:
        return Path(wanted).expanduser()
    base = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(base) / "openelm-mlx" / "chat_history"


class History:
    """What was typed in this chat and earlier ones: lines in a file that only its owner can read.

    A file that cannot be read or written is no error: then the history lasts as long as the chat.
    """

    def __init__(self, path: Path, readline: Any):
        self._path = path
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except OSError:
            return
        for line in lines[-_LONGEST_HISTORY:]:
            readline.add_history(line)
        if len(lines) > 2 * _LONGEST_HISTORY:
            with suppress(OutputError):
                write_file(path, "".join(f"{line}\n" for line in lines[-_LONGEST_HISTORY:]), overwrite=True)

    def add(self, line: str) -> None:
        """Keep a line for later chats."""
        if not line.strip():
            return
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "a", encoding="utf-8") as file:
                file.write(" ".join(line.split("\n")) + "\n")
