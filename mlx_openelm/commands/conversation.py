"""A conversation in the terminal, or from a pipe: messages, commands that begin with a slash, and their history."""

import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import OpenELMError, OutputError, PromptError
from ..files.output import write_file
from ..files.paths import user_path
from ..generation.chat import Chat
from ..model.openelm import ContextLengthWarning
from .interrupts import INTERRUPTED
from .line_input import LineInput
from .streams import clean, is_terminal, styled
from .terminal import fail, say, write, write_error
from .text_view import TextView, print_stats

_COMMANDS = {  # name: what it takes, what it does
    "/help": ("", "show these commands"),
    "/reset": ("", "start a new conversation; the system message stays"),
    "/undo": ("", "take back your last message and its answer"),
    "/system": ("[TEXT]", "show or set the system message; none removes it"),
    "/save": ("FILE", "write the conversation to a .json, .jsonl, .md or .txt file"),
    "/quit": ("", "end the chat, as Ctrl-D does"),
}
_ALIASES = {"/?": "/help", "/": "/help", "/clear": "/reset", "/exit": "/quit", "/bye": "/quit"}
_NONE = "none"  # for no system message
_JSON_ENDINGS = (".json", ".jsonl")
_TEXT_ENDINGS = (".md", ".txt")


class Conversation:
    """Reads messages and commands until the input ends, and prints the answers."""

    def __init__(self, chat: Chat):
        self._chat = chat
        self._saved: set[Path] = set()  # may be written again
        self._is_interactive = is_terminal(sys.stdin)
        self._has_answered = False

    def run(self, name: str, *, seed_is_drawn: bool = False) -> None:
        """Talk until /quit or the end of the input.

        Args:
            name: of the model.
            seed_is_drawn: whether to say with which seed the answers can be repeated.
        """
        if self._is_interactive:
            seed = f" --seed {self._chat.sampling.seed} repeats the answers." if seed_is_drawn else ""
            self._note(f"Chat with {name}: type a message, or /help for the commands.{seed}")
        lines = LineInput()
        pressed = False
        with _context_warnings():
            while True:
                try:
                    line = lines.read()
                except EOFError:
                    if self._is_interactive:
                        write("")
                    return
                except KeyboardInterrupt:
                    write("")
                    if not self._is_interactive:
                        fail("interrupted", INTERRUPTED)
                    if pressed:
                        self._note("Ctrl-D or /quit ends the chat.")
                    pressed = True
                    continue
                except UnicodeError:
                    say("error: line skipped: not valid UTF-8")
                    continue
                pressed = False
                if self._does(line):
                    return

    def _does(self, line: str) -> bool:
        """Obey or answer a line; returns whether it ends the chat."""
        words = re.fullmatch(r"(/[a-zA-Z?]*)(?:\s+(.*?))?\s*", line, re.DOTALL)
        try:
            if words is None:
                if text := line.strip():
                    self._answer(text)
                return False
            return self._obey(words[1].lower(), words[2] or "")
        except (OpenELMError, RuntimeError) as error:  # the backend's errors, such as of allocation, are RuntimeErrors
            say(f"error: {error}")
        except MemoryError:
            say("error: not enough memory for this turn")
        return False

    def _answer(self, text: str) -> None:
        stats = None
        space = "\n" if self._has_answered and not self._is_interactive else ""  # where no prompt divides answers
        with TextView() as view:
            try:
                for chunk in self._chat.reply(text, on_prefill=view.on_prefill):
                    view.add(f"{space}{chunk.text}")
                    space = ""
                    self._has_answered = True
                    stats = chunk.stats
            except KeyboardInterrupt:
                pass
        print_stats(stats)

    def _obey(self, typed: str, argument: str) -> bool:
        command = _ALIASES.get(typed, typed)
        if command not in _COMMANDS:
            near = get_close_matches(typed, [*_COMMANDS, *_ALIASES], 1)
            meant = f"did you mean {near[0]}?" if near else "see /help."
            raise PromptError(f"unknown command {typed}; {meant} A space before it makes it a message")
        if argument and not _COMMANDS[command][0]:
            raise PromptError(f"{typed} takes nothing after it; got {argument}")
        if command == "/quit":
            return True
        if command == "/help":
            self._help()
        elif command == "/reset":
            self._chat.reset()
            self._note("new conversation")
        elif command == "/undo":
            removed = self._chat.undo()
            self._note("there is nothing to take back" if removed is None else f"took back: {removed}")
        elif command == "/system":
            self._system(argument)
        elif command == "/save":
            self._save(argument)
        return False

    def _help(self) -> None:
        width = max(len(f"{name} {takes}") for name, (takes, _) in _COMMANDS.items()) + 2
        columns = max(shutil.get_terminal_size().columns, width + 20)
        for name, (takes, what) in _COMMANDS.items():
            lines = textwrap.wrap(what, columns - width)
            write_error(f"{f'{name} {takes}':{width}}" + f"\n{'':{width}}".join(lines), is_asked=True)
        write_error("Ctrl-C stops an answer, or clears the line.", is_asked=True)

    def _system(self, text: str) -> None:
        if text:
            self._chat.system = None if text == _NONE else text
        write_error(clean(f"system message: {self._chat.system or _NONE}"), is_asked=True)

    def _save(self, name: str) -> None:
        if not name.endswith((*_JSON_ENDINGS, *_TEXT_ENDINGS)):
            endings = f"{', '.join((*_JSON_ENDINGS, *_TEXT_ENDINGS[:-1]))} or {_TEXT_ENDINGS[-1]}"
            raise OutputError(f"/save takes the name of a file that ends in {endings}; got {name or 'no name'}")
        messages = self._chat.messages
        if not messages:
            raise OutputError("there is nothing to save yet")
        path = user_path(name)
        if path.exists() and path.resolve() not in self._saved:
            raise OutputError(f"{name} already exists; choose another name")
        write_file(path, _as_json(messages) if name.endswith(_JSON_ENDINGS) else _as_text(messages), overwrite=True)
        self._saved.add(path.resolve())
        self._note(f"saved {len(messages)} messages in {name}")

    def _note(self, text: str) -> None:
        """Tell a person; a program that writes into a pipe need not know."""
        if self._is_interactive:
            lines = textwrap.wrap(text, shutil.get_terminal_size().columns)
            write_error(styled("\n".join(lines), "dim", stream=sys.stderr))


def _as_json(messages: list[dict[str, str]]) -> str:
    """One record, as `tune` and `generate --input` read them."""
    import json

    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def _as_text(messages: list[dict[str, str]]) -> str:
    return "\n\n".join(f"{message['role']}:\n{message['content'].strip()}" for message in messages) + "\n"


@contextmanager
def _context_warnings() -> Iterator[None]:
    """Say each time that a conversation outgrows the model's context, and what to do."""
    before: Any = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, ContextLengthWarning):
            say(f"warning: {message}; /reset starts a new conversation")
        else:
            before(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", ContextLengthWarning)
        warnings.showwarning = show
        yield
