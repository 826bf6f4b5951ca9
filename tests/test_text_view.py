"""What a terminal shows of a generation: the prompt being read, the text, messages after it, statistics."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from mlx_openelm.commands import terminal, text_view
from mlx_openelm.commands.text_view import PrefillProgress, TextView, answer_bar, print_stats, prompt_end, stats_line
from mlx_openelm.generation.text import Stats


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    """Stdout and stderr as one terminal, from the call on: pytest sets its own before each test."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")

    def replaced(columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        found = Terminal()
        monkeypatch.setattr(sys, "stdout", found)
        monkeypatch.setattr(sys, "stderr", found)
        return found

    return replaced


def seen(screen):
    """What is left on a screen, without what was written over or removed."""
    text = re.sub(r"[^\n]*\n(\x1b\[\?25h)?\r\x1b\[1A\x1b\[2K", "", screen.getvalue())
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    return re.sub(r"[^\n]*\r", "", text)


class TestMessages:
    def test_a_message_never_runs_into_text(self, screen):
        found = screen()
        with TextView("Once upon") as view:
            view.add(" a time")
            terminal.say("warning: it is late")
            view.add(" there was")
        terminal.say("done")
        assert seen(found) == "Once upon a time there was\nopenelm-mlx: warning: it is late\nopenelm-mlx: done\n"

    def test_a_message_about_an_error_in_the_middle_begins_a_line(self, screen):
        found = screen()
        terminal.write("half a", end="")
        terminal.say("error: no memory")
        terminal.write("more")
        terminal.say("end")
        assert seen(found) == "half a\nopenelm-mlx: error: no memory\nmore\nopenelm-mlx: end\n"

    def test_what_fails_before_the_text_leaves_no_empty_line(self, screen):
        found = screen()
        with pytest.raises(ValueError, match="x"), TextView("Once upon"):
            raise ValueError("x")
        assert found.getvalue() == ""

    def test_where_text_and_messages_part_they_come_at_once(self, capsys):
        with TextView("Once upon") as view:
            view.add(" a time")
            terminal.say("warning: it is late")
            assert capsys.readouterr() == ("Once upon a time", "openelm-mlx: warning: it is late\n")


class TestPrefill:
    def test_a_long_wait_says_how_much_is_read(self, screen):
        found = screen()
        progress = PrefillProgress()
        progress(0, 1082)
        progress.show()
        assert "reading the prompt: 0 of 1,082 tokens" in found.getvalue()
        progress(512, 1082)
        progress._line.refresh()
        assert "reading the prompt: 512 of 1,082 tokens" in found.getvalue()
        progress.close()
        assert seen(found).strip() == ""

    def test_a_short_one_says_nothing(self, screen, monkeypatch):
        found = screen()
        progress = PrefillProgress()
        progress(0, 7)
        progress.close()
        progress.show()  # the timer was already on its way
        assert found.getvalue() == ""

    def test_it_appears_by_itself(self, screen, monkeypatch):
        monkeypatch.setattr(text_view, "_PATIENCE", 0.0)
        found = screen()
        progress = PrefillProgress()
        progress._timer.join(30)
        progress.close()
        assert "reading the prompt" in found.getvalue()

    def test_elsewhere_nothing_waits_in_the_background(self):
        assert PrefillProgress()._timer is None

    def test_loading_says_so_where_nothing_is_downloaded(self, screen, monkeypatch, tmp_path):
        lines = []
        monkeypatch.setattr(text_view, "StatusLine", lambda text: lines.append(text) or SimpleNamespace(close=str))
        found = screen()
        monkeypatch.chdir(tmp_path)
        for names in (("openelm-tiny", None), (".", "openelm-tiny"), ("apple/OpenELM-3B",), (".", "apple/OpenELM-3B")):
            with text_view.loading(*names):
                terminal.say("warning: it is late")
        assert lines == ["loading openelm-tiny", f"loading {tmp_path.name}"]
        assert found.getvalue() == "openelm-mlx: warning: it is late\n" * 4

    def test_the_line_is_gone_when_the_text_comes(self, screen):
        found = screen()
        with TextView("Once") as view:
            view.on_prefill(0, 1000)
            view.on_prefill.show()
            view.add(" upon")
        assert seen(found) == "Once upon\n"


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("The fox", "The fox"),
        ("fox " * 500 + "ran", "… " + "fox " * 99 + "ran"),
        ("x" * 1000, "… " + "x" * 400),
        ("\n".join(f"line {number}" for number in range(9)), "… line 3\nline 4\nline 5\nline 6\nline 7\nline 8"),
    ],
)
def test_of_a_long_prompt_the_end_is_shown(prompt, shown):
    assert prompt_end(prompt) == shown


class TestStats:
    def test_speeds_say_what_they_count(self):
        assert (
            stats_line(Stats(1082, 21, 2.0, 3.0, 2**20, reused_tokens=1000))
            == "82 prompt tokens at 41.0/s after 1,000 cached, 21 generated at 6.7/s, peak memory 1.0 MiB"
        )
        assert (
            stats_line(Stats(8, 21, 4.0, 40.0, 2**20, drafted_tokens=10, accepted_tokens=4))
            == "8 prompt tokens at 2.0/s, 21 generated at 0.5/s (40% of 10 draft tokens accepted), peak memory 1.0 MiB"
        )

    def test_a_single_token_has_no_speed(self):
        assert "1 generated, peak" in stats_line(Stats(8, 1, 4.0, 0.0, 0))

    @pytest.mark.parametrize("columns", [40, 60, 80, 120])
    def test_lines_break_between_words(self, screen, columns):
        found = screen(columns)
        print_stats(Stats(1082, 20, 2.0, 4.0, 2**20, reused_tokens=1000, seed=2**62), 2**62)
        lines = found.getvalue().splitlines()
        assert max(map(len, lines)) <= columns
        assert " ".join(lines).endswith(f"; repeat with --seed {2**62}")

    def test_no_one_looks(self, capsys):
        print_stats(Stats(8, 1, 4.0, 0.0, 0))
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("columns", [40, 80])
def test_answers_have_a_bar_that_fits(screen, columns):
    found = screen(columns)
    with answer_bar(20, 3) as moved:
        moved(700)
        shown = found.getvalue()
    for line in re.split("[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)):
        assert len(line) <= columns
    assert "answers" in shown
    assert "3/20" in shown


def test_reading_a_prompt_from_a_keyboard_says_so(screen, monkeypatch):
    from mlx_openelm.commands import generate

    found = screen()
    keyboard = SimpleNamespace(isatty=lambda: True, buffer=io.BytesIO(b"The fox"))
    monkeypatch.setattr(sys, "stdin", keyboard)
    assert generate._read_stdin() == "The fox"
    assert "Ctrl-D" in found.getvalue()
