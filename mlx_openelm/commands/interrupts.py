"""Ctrl-C: one line and status 130, whatever it interrupts.

Python has loaded what this module imports before it runs any program. Everything else is imported by functions, because
Ctrl-C during an import at the top would print a traceback.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from types import FrameType, TracebackType
    from typing import NoReturn

INTERRUPTED = 130  # the exit status after Ctrl-C
_main_thread = 0
_pressed = False  # whether Ctrl-C was pressed


def watch_hooks() -> None:
    """Print one line instead of a traceback for a Ctrl-C that nothing catches."""
    sys.excepthook = _on_uncaught
    sys.unraisablehook = _on_unraisable


def watch_signal() -> None:
    """Note every Ctrl-C; where it is ignored, as in a shell's background jobs, it stays ignored."""
    import _thread
    import signal

    global _main_thread
    _main_thread = _thread.get_ident()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_interrupt)


def is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: an extension that it interrupts while it is loaded may raise another error."""
    if _pressed and isinstance(error, ImportError):
        return True
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def ignore() -> None:
    """Ignore Ctrl-C from now on: the work is done, and Python only cleans up."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_interrupted() -> NoReturn:
    """Print one line and end the process at once, without the clean-up that a second Ctrl-C would interrupt."""
    ignored = False
    while not ignored:
        try:
            ignore()
            ignored = True
        except KeyboardInterrupt:
            continue
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            continue
    try:
        os.write(2, b"openelm-mlx: error: interrupted\n")
    finally:
        os._exit(INTERRUPTED)


def acknowledging(message: str) -> AbstractContextManager[None]:
    """A context in which Ctrl-C, or a request to end, is answered with a message at once.

    Python itself notices a signal only when the computation in progress returns, which may take minutes. So the system
    writes the signal's number to a pipe, and another thread prints the message. A second Ctrl-C ends the process at
    once.
    """
    import signal
    import threading
    from contextlib import contextmanager

    def answer(reader: int) -> None:
        from .terminal import say

        presses, is_answered = 0, False
        while data := os.read(reader, 1):
            if data[0] in (signal.SIGINT, signal.SIGTERM) and not is_answered:
                say(message)
                is_answered = True
            presses += data[0] == signal.SIGINT
            if presses > 1:
                _end_at_once()

    @contextmanager
    def answering() -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=answer, args=(reader,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writer)
            thread.join(timeout=1)
            os.close(reader)

    return answering()


def uninterrupted() -> AbstractContextManager[None]:
    """A context in which Ctrl-C and requests to end are ignored, to save what would otherwise be lost."""
    import signal
    from contextlib import contextmanager

    @contextmanager
    def ignoring() -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return ignoring()


def _end_at_once() -> NoReturn:
    shown_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides it
    try:
        os.write(2, shown_cursor + b"openelm-mlx: error: interrupted; steps since the last checkpoint are lost\n")
    finally:
        os._exit(INTERRUPTED)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt


def _on_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if is_interrupt(error):
        end_interrupted()
    sys.__excepthook__(kind, error, traceback)


def _on_unraisable(found: sys.UnraisableHookArgs) -> None:
    """Raise a Ctrl-C again that came where Python cannot raise errors, such as in a finalizer."""
    if issubclass(found.exc_type, KeyboardInterrupt):
        import _thread
        import signal

        # A real signal also interrupts a system call; another thread sends it, so that this one can leave the hook.
        _thread.start_new_thread(signal.pthread_kill, (_main_thread, signal.SIGINT))
    else:
        sys.__unraisablehook__(found)
