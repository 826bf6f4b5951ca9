"""Standard streams that are closed, full or of another encoding, and what a terminal may get to see."""

import codecs
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import SMALL_CONFIG, random_model, run, write_folder
from mlx_openelm.commands import bench, streams, terminal, tune
from mlx_openelm.commands.progress import TrainingView
from mlx_openelm.errors import PromptError

ESCAPES = "\x1b]0;title\x07 \x9b31m \r \x08 \u202e"
ESCAPED = r"\u001b]0;title\u0007 \u009b31m \u000d \u0008 \u202e"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("streams")
    write_folder(place / "small", random_model(SMALL_CONFIG), tokenizer)
    write_folder(place / "[red]a:smile:", random_model(SMALL_CONFIG), tokenizer)
    return place


def redirected(place, command, *redirections, **environment):
    """A command of a shell with such redirections: exit status, stdout, stderr."""
    line = f'exec "$@" {" ".join(redirections)}'
    done = subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-m", "mlx_openelm", *command.split()],
        capture_output=True,
        cwd=place,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent.parent), **environment},
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr.decode()


GENERATE = "generate -m small -p Once -n 2"
COMMANDS = ["--version", "--help", "tune --help", "info small", "design --params 270M --json", "doctor", GENERATE]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
class TestFull:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_full_stdout_is_one_line_and_status_2(self, place, command):
        status, _, err = redirected(place, command, ">/dev/full")
        assert (status, err) == (2, "openelm-mlx: error: stdout cannot be written: No space left on device\n")

    def test_a_full_stderr_changes_nothing(self, place):
        assert redirected(place, GENERATE, "2>/dev/full")[0] == 0
        assert redirected(place, "info missing", "2>/dev/full")[0] == 2
        assert redirected(place, "info missing", ">/dev/full", "2>/dev/full")[0] == 2

    def test_a_stdout_that_cannot_be_written_is_one_line(self, place):
        status, _, err = redirected(place, "--version", "1</dev/null")
        assert (status, err) == (2, "openelm-mlx: error: stdout cannot be written: Bad file descriptor\n")


class TestClosed:
    @pytest.mark.parametrize("command", ["--version", "tune --help", "info small", GENERATE])
    def test_a_closed_stdout_is_no_error(self, place, command):
        assert redirected(place, command, ">&-")[::2] == (0, "")

    def test_a_closed_stderr_is_no_error(self, place):
        status, out, _ = redirected(place, GENERATE, "2>&-")
        assert status == 0
        assert out
        assert redirected(place, "info missing", "2>&-")[0] == 2

    def test_all_three_closed(self, place):
        assert redirected(place, "info small", "<&-", ">&-", "2>&-")[0] == 0

    def test_a_closed_stdin_is_empty(self, place):
        status, out, err = redirected(place, "generate -m small -p - -n 2", "<&-")
        assert (status, out, err) == (2, b"", "openelm-mlx: error: the prompt is empty\n")

    def test_a_closed_stream_is_not_the_next_file(self, place):
        """Files take the lowest free number: without the null device, text for stdout would end up in one."""
        command = "generate -m small -p Once -n 2 --prompt-cache closed.cache"
        assert redirected(place, command, ">&-")[0] == 0
        assert redirected(place, command, ">&-")[::2] == (0, "")

    def test_a_stdin_that_cannot_be_read_is_one_line(self, monkeypatch):
        with open(os.devnull, "wb", buffering=0) as unreadable:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=unreadable))
            with pytest.raises(PromptError, match="stdin cannot be read"):
                streams.read_stdin()


class TestReaderGone:
    @pytest.mark.parametrize("command", ["tune --help", "info small", GENERATE])
    def test_nothing_is_said(self, place, command):
        read, write = os.pipe()
        os.close(read)
        words = [sys.executable, "-m", "mlx_openelm", *command.split()]
        done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, cwd=place, timeout=60)
        os.close(write)
        assert (done.returncode, done.stderr) == (1, b"")


class TestEncodings:
    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
    def test_json_stays_json(self, place, encoding):
        prompt = "日本é😀"
        command = f"generate -m small -p {prompt} -n 2 --json"
        status, out, err = redirected(place, command, PYTHONIOENCODING=encoding, PYTHONUTF8="1")
        assert (status, err) == (0, "")
        assert json.loads(out.decode(encoding))["prompt"] == prompt

    def test_text_is_escaped(self):
        written = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
        codecs.register_error("openelm-mlx", streams._escape_unencodable)
        written.reconfigure(errors="openelm-mlx")
        written.write("a 日 😀 \udcff")
        written.flush()
        assert written.buffer.getvalue() == rb"a \u65e5 \ud83d\ude00 \udcff"

    def test_a_path_that_is_no_utf8(self, place):
        status, _, err = redirected(place, b"info a\xff".decode(errors="surrogateescape"))
        assert (status, err.count("\n")) == (2, 1)
        assert r"a\udcff does not exist" in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    """Terminals in the place of stdout and stderr, from the call on: pytest sets its own before each test."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def replaced():
        found = SimpleNamespace(out=Terminal(), err=Terminal())
        monkeypatch.setattr(sys, "stdout", found.out)
        monkeypatch.setattr(sys, "stderr", found.err)
        return found

    return replaced


class TestEscapes:
    def test_a_terminal_gets_no_control_characters(self, screen):
        seen = screen()
        terminal.write(f"{ESCAPES}\tand\r\n\n", end="")
        assert seen.out.getvalue() == f"{ESCAPED}\tand\r\n\n"

    def test_elsewhere_text_stays_as_it_is(self, capsys):
        terminal.write(ESCAPES, end="")
        terminal.write("\x1b[31mred", end="")
        assert capsys.readouterr().out == f"{ESCAPES}\x1b[31mred"

    def test_all_control_characters_and_no_others(self):
        for number in (*range(0x20), *range(0x7F, 0xA0)):
            assert (streams.clean(chr(number)) == chr(number)) == (chr(number) in "\t\n"), number
        for kept in ("é", "日本", "😀", "\u200d", "\u00ad", "שלום", " ~\u00a0"):
            assert streams.clean(kept) == kept

    def test_messages_are_cleaned_wherever_they_go(self, capsys):
        terminal.say(f"unknown key {ESCAPES}")
        assert (
            capsys.readouterr().err
            == "openelm-mlx: unknown key " + " ".join(ESCAPED.replace(r"\u000d ", "").split()) + "\n"
        )

    def test_json_on_a_terminal_can_be_read_again(self, screen):
        seen = screen()
        terminal.print_json({"text": ESCAPES})
        written = seen.out.getvalue()
        assert not set(written) & set("\x1b\x07\x9b\r\x08\u202e")
        assert json.loads(written) == {"text": ESCAPES}

    def test_samples_of_a_run(self, screen):
        seen = screen()
        with TrainingView() as view:
            view.on_prepared(2)
            metrics = SimpleNamespace(
                step=1,
                sample=f"[red]x[/red] :smile: {ESCAPES}",
                loss=None,
                validation_loss=None,
                evaluation=None,
                more={},
            )
            view.on_metrics(metrics)
        assert "[red]x[/red] :smile:" in seen.err.getvalue()
        assert "\x1b]0;" not in seen.err.getvalue()
        assert r"\u001b]0;title\u0007" in seen.err.getvalue()

    def test_a_resumed_run_begins_at_its_step_and_a_validation_has_a_bar_of_its_own(self, screen):
        screen()
        with TrainingView() as view:
            view.on_prepared(30)
            view.on_begin(12)
            training, validation = view._bar.tasks
            assert (training.description, training.completed, training.total) == ("training", 12, 30)
            assert not validation.visible
            view.on_validating(0, 4)
            assert (validation.description, validation.visible, validation.total) == ("validating", True, 4)
            view.on_validating(3, 4)
            assert (validation.completed, training.completed) == (3, 12)
            view.on_validating(4, 4)
            assert not validation.visible
            view.on_evaluating(0, 60)
            assert (validation.description, validation.visible, validation.total) == ("evaluating", True, 60)
            view.on_evaluating(60, 60)
            assert not validation.visible
            view.on_validating(0, 4)
            assert (validation.description, validation.visible) == ("validating", True)

    def test_without_a_terminal_the_first_validation_is_announced(self, capsys):
        with TrainingView() as view:
            view.on_prepared(30)
            view.on_begin(0)
            for _ in range(2):
                for done in range(3):
                    view.on_validating(done, 2)
                    view.on_evaluating(done * 10, 20)
        assert capsys.readouterr().err == "openelm-mlx: validating: 2 batches\nopenelm-mlx: evaluating: 20 items\n"

    def test_examples_of_tuning(self, screen, monkeypatch):
        screen()
        monkeypatch.setattr("mlx_openelm.data.dataset.marked", lambda example, tokenizer: [(ESCAPES, False)])
        assert tune._marked(None, None) == f"\x1b[2m{ESCAPED}\x1b[0m"
        monkeypatch.setenv("NO_COLOR", "1")
        assert tune._marked(None, None) == ESCAPED

    def test_names_of_models_are_not_markup(self, place, screen):
        seen = screen()
        with bench._Status("loading") as status:
            status.show("[red]a:smile:\x1b[31m")
            status.stop()
        assert r"[red]a:smile:\u001b[31m" in seen.err.getvalue()
        status, out, _ = run("info", place / "[red]a:smile:")
        assert status == 0
        assert out.startswith("[red]a:smile:\n")


class TestStyles:
    @pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
    def test_are_off_where_the_environment_says_so(self, screen, monkeypatch, name, value):
        seen = screen()
        styled = streams.styled("x", "bold", stream=seen.out)
        assert styled == "\x1b[1mx\x1b[0m"
        monkeypatch.setenv(name, value)
        assert streams.styled("x", "bold", "green", stream=seen.out) == "x"
        streams.console().print("x", style="bold red")
        assert seen.out.getvalue() == "x\n"

    def test_an_empty_variable_says_nothing(self, screen, monkeypatch):
        seen = screen()
        monkeypatch.setenv("NO_COLOR", "")
        assert streams.has_styles(seen.out)

    def test_a_pipe_has_none(self):
        assert streams.styled("x", "dim", stream=io.StringIO()) == "x"

    def test_a_closed_stream_is_no_terminal(self):
        closed = io.StringIO()
        closed.close()
        assert not streams.is_terminal(closed)
        assert not streams.is_terminal(None)

    def test_help_has_none(self):
        status, out, _ = run("tune", "--help", NO_COLOR="1", FORCE_COLOR="1")
        assert status == 0
        assert "\x1b" not in out
        assert "--learning-rate" in out
