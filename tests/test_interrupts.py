"""Ctrl-C at chosen moments: always one line and status 130."""

import os
import signal
import subprocess
import sys

import pytest

from conftest import SMALL_CONFIG, random_model, write_folder

INTERRUPTED = "openelm-mlx: error: interrupted\n"
# Presses Ctrl-C when a module is about to be imported; `{then}` is what happens next.
ON_IMPORT = """
import os, signal, sys
class Pressing:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                {then}
sys.modules.pop({module!r}, None)
sys.meta_path.insert(0, Pressing())
from mlx_openelm.cli import main
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    return write_folder(tmp_path_factory.mktemp("interrupts") / "small", random_model(SMALL_CONFIG), tokenizer)


def python(code, *words):
    """A program with these arguments, which Ctrl-C reaches as in a shell: exit status, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return done.returncode, done.stdout, done.stderr


IMPORTED = ["mlx_openelm.commands.interrupts", "mlx_openelm.commands.app", "typer", "mlx_openelm.commands.terminal"]
BY_GENERATE = ["mlx_openelm.commands.generate", "mlx.core", "numpy", "sentencepiece", "mlx_openelm.generation.engine"]


@pytest.mark.parametrize("module", [*IMPORTED, *BY_GENERATE])
def test_while_a_module_is_imported(model, module):
    code = ON_IMPORT.format(module=module, then="pass")
    assert python(code, "generate", "-m", model, "-p", "x", "-n", 2) == (130, "", INTERRUPTED)


@pytest.mark.parametrize("error", ["ImportError('not a NumPy issue')", "SystemError('no result')"])
def test_an_extension_that_turns_it_into_another_error(model, error):
    code = ON_IMPORT.format(module="numpy", then=f"raise {error}")
    assert python(code, "generate", "-m", model, "-p", "x", "-n", 2) == (130, "", INTERRUPTED)


def test_twice(model):
    code = ON_IMPORT.format(module="mlx.core", then="os.kill(os.getpid(), signal.SIGINT)")
    assert python(code, "info", model) == (130, "", INTERRUPTED)


def test_while_the_line_is_printed(model):
    code = "import os, signal, mlx_openelm.commands.terminal as t; say = t.say\n"
    code += "def twice(message):\n    say(message)\n    os.kill(os.getpid(), signal.SIGINT)\n"
    code += "t.say = twice\nfrom mlx_openelm.cli import main\nmain()"
    status, out, err = python(code, "info", "missing")
    assert (status, out) == (130, "")
    assert err.splitlines()[1:] == [INTERRUPTED.strip()]


def test_where_python_cannot_raise_it(model):
    """Python prints an exception that a finalizer raises, and continues."""
    code = "import os, signal\nclass Last:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGINT)\n"
    code += "        [n for n in range(9)]\n"
    code += "import mlx_openelm.commands.app as app\ndef run(words):\n    Last()\n    import time\n    time.sleep(20)\n"
    code += "app.run = run\nfrom mlx_openelm.cli import main\nmain()"
    assert python(code, "info", model) == (130, "", INTERRUPTED)


def test_at_the_end_the_work_is_done():
    code = "import atexit, os, signal; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
    code += "from mlx_openelm.cli import main\nmain()"
    status, out, err = python(code, "--version")
    assert (status, err) == (0, "")
    assert out.startswith("openelm-mlx ")
    assert python(code, "info", "missing")[0] == 2


def test_where_it_is_ignored_it_stays_ignored():
    """As for a job that a shell starts in the background."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += ON_IMPORT.format(module="typer", then="pass")
    assert python(code, "--version")[::2] == (0, "")


def test_a_bug_keeps_its_traceback():
    code = "import mlx_openelm.commands.app as app; app._status = lambda words: 1 / 0\n"
    code += "from mlx_openelm.cli import main\nmain()"
    status, _, err = python(code, "--version")
    assert status == 1
    assert "ZeroDivisionError" in err


def test_a_generation_says_so_and_keeps_what_was_written(model):
    code = "import os, signal, mlx_openelm.commands.text_view as g; write = g.write\n"
    code += "def pressed(text, **options):\n    write(text, **options)\n    g.write = write\n"
    code += "    os.kill(os.getpid(), signal.SIGINT)\n"
    code += "g.write = pressed\nfrom mlx_openelm.cli import main\nmain()"
    status, out, err = python(code, "generate", "-m", model, "-p", "The fox", "-n", 40)
    assert (status, err) == (130, INTERRUPTED)
    assert out.endswith("\n")


def test_saving_is_not_interrupted(tmp_path):
    code = "import os, signal; from mlx_openelm.commands import interrupts as i\ni.watch_signal()\n"
    code += "with i.uninterrupted():\n    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "print('saved', signal.getsignal(signal.SIGINT) is i._on_interrupt)"
    assert python(code) == (0, "saved True\n", "")


def test_it_is_acknowledged_while_the_main_thread_computes():
    """The main thread waits in C until the message was printed, so Python cannot have handled the signal before."""
    code = """
import ctypes, os, signal, threading, time
from mlx_openelm.commands import interrupts, terminal
interrupts.watch_signal()
reader, writer = os.pipe()
def say(message):
    print(message)
    os.write(writer, b"x")
terminal.say = say
found = ctypes.create_string_buffer(4)
for seconds, number in ((0.5, signal.SIGINT), (20, None)):  # the second one only if nothing was printed
    act = (lambda: os.kill(os.getpid(), signal.SIGINT)) if number else (lambda: os.write(writer, b"late"))
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a timer's thread takes it, so that C is not interrupted
try:
    with interrupts.acknowledging("stopping"):
        ctypes.CDLL(None).read(reader, found, 4)
        print("read")
except KeyboardInterrupt:
    print(found.value.decode())
"""
    status, out, err = python(code)
    assert (status, out, err) == (0, "stopping\nx\n", "")


def test_a_second_one_ends_the_process_at_once():
    """The main thread blocks the signal and waits in C, so only the other thread can have ended the process."""
    code = """
import ctypes, os, signal, threading, time
from mlx_openelm.commands import interrupts
interrupts.watch_signal()
reader, writer = os.pipe()
def press():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)  # two signals that wait at the same time would be one
    os.kill(os.getpid(), signal.SIGINT)
timers = [threading.Timer(0.5, press), threading.Timer(20, lambda: os.write(writer, b"late"))]
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
for timer in timers:
    timer.daemon = True
    timer.start()
with interrupts.acknowledging("stopping"):
    ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(4), 4)
print("read")
"""
    status, out, err = python(code)
    assert (status, out) == (130, "")
    assert err.splitlines()[0] == "openelm-mlx: stopping"
    assert err.splitlines()[-1] == "openelm-mlx: error: interrupted; steps since the last checkpoint are lost"
