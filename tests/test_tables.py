import io
import re
import sys

import pytest

from mlx_openelm.commands import tables
from mlx_openelm.commands.design import _show
from mlx_openelm.commands.inspect import doctor, info
from mlx_openelm.commands.tables import in_lines, line_width, write_list, write_table, write_text
from mlx_openelm.commands.terminal import byte_bar, step_bar
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.machine import doctor as doctor_module
from mlx_openelm.model.design import design

HEADINGS = ["layer", "query heads", "parameters", "KV bytes/token"]
ROWS = [["0", "12", "1,234,567", "1,536"], ["10", "4", "234,567", "512"]]
TOTAL = [["total", "16", "1,469,134", "2,048"]]


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a function prints at this width, in lines."""

    def call(width, function, *arguments, **options):
        monkeypatch.setattr(tables, "line_width", lambda: width)
        function(*arguments, **options)
        return capsys.readouterr().out.splitlines()

    return call


def test_a_table_that_fits(printed):
    assert printed(None, write_table, HEADINGS, [ROWS, TOTAL]) == [
        "layer  query heads  parameters  KV bytes/token",
        "----------------------------------------------",
        "    0           12   1,234,567           1,536",
        "   10            4     234,567             512",
        "----------------------------------------------",
        "total           16   1,469,134           2,048",
    ]
    assert printed(46, write_table, HEADINGS, [ROWS, TOTAL])[0] == "layer  query heads  parameters  KV bytes/token"


def test_headings_are_wrapped_first(printed):
    lines = printed(45, write_table, HEADINGS, [ROWS], left=[0])
    assert lines[:4] == [
        "       query                       KV",
        "layer  heads  parameters  bytes/token",
        "-------------------------------------",
        "0         12   1,234,567        1,536",
    ]


def test_columns_that_do_not_fit_follow_below_with_the_first_ones(printed):
    assert printed(25, write_table, HEADINGS, [ROWS]) == [
        "       query",
        "layer  heads  parameters",
        "------------------------",
        "    0     12   1,234,567",
        "   10      4     234,567",
        "",
        "                KV",
        "layer  bytes/token",
        "------------------",
        "    0        1,536",
        "   10          512",
    ]


def test_every_value_is_there_at_every_width(printed):
    for width in range(20, 60):
        lines = printed(width, write_table, HEADINGS, [ROWS, TOTAL])
        text = "\n".join(lines)
        assert all(cell in text for row in [*ROWS, *TOTAL] for cell in row)
        assert max(map(len, lines)) <= width


def test_rows_are_numbered_if_what_they_are_about_is_too_wide_to_repeat(printed):
    rows = [["a-long-name", "4 bits", "12.5"], ["another-name", "float32", "3.5"]]
    lines = printed(24, write_table, ["model", "weights", "tokens/s"], [rows], left=[0, 1], num_keys=2)
    assert lines == [
        "#  model         weights",
        "------------------------",
        "1  a-long-name   4 bits",
        "2  another-name  float32",
        "",
        "#  tokens/s",
        "-----------",
        "1      12.5",
        "2       3.5",
    ]


def test_wide_characters_take_two_places(printed):
    lines = printed(None, write_table, ["model", "n"], [[["火車", "1"], ["train", "2"]]], left=[0])
    assert lines[2:] == ["火車   1", "train  2"]


def test_what_a_terminal_would_obey_is_escaped(printed):
    assert printed(None, write_table, ["m"], [[["a\x1b[2Jb"]]])[2] == "a\\u001b[2Jb"


def test_values_of_a_list_go_on_below_their_beginning(printed):
    values = {"width": "1,280", "vocabulary": "32,000 tokens, tied to the output"}
    assert printed(30, write_list, values) == [
        "width       1,280",
        "vocabulary  32,000 tokens,",
        "            tied to the output",
    ]
    assert printed(None, write_list, values)[1] == "vocabulary  32,000 tokens, tied to the output"


def test_lines_of_a_value_begin_below_each_other(printed):
    values = {"KV cache": "at 512 tokens:\n 1.4 MiB full, in 16 bits\n10.2 MiB other", "x": "y"}
    assert printed(26, write_list, values) == [
        "KV cache  at 512 tokens:",
        "           1.4 MiB full,",
        "          in 16 bits",
        "          10.2 MiB other",
        "x         y",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("width", "has_speed"), [(40, False), (60, True), (120, True)])
def test_a_bar_of_bytes_shows_its_numbers_whole(monkeypatch, width, has_speed):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    with byte_bar("tokenizing") as update:
        update(1, 999 << 20)
        update(900 << 20, 999 << 20)
    lines = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", sys.stderr.getvalue()).replace("\r", "\n").splitlines()
    last = [line for line in lines if line.strip()][-1]
    assert "tokenizing" in last
    assert "900.0/999.0 MiB" in last
    assert re.search(r"\d:\d\d:\d\d$", last.rstrip())
    assert ("B/s" in last) == has_speed
    assert len(last) <= width


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_bar_that_counts_shows_its_numbers_whole(monkeypatch, width):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    with step_bar("validating") as update:
        update(1, 20_000)
        update(15_000, 20_000)
    lines = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", sys.stderr.getvalue()).replace("\r", "\n").splitlines()
    last = [line for line in lines if line.strip()][-1]
    assert re.fullmatch(r"validating [━╺╸]+ 15000/20000 \d:\d\d:\d\d", last.rstrip())
    assert len(last) <= width


def test_headings_are_bold_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    write_table(["n"], [[["1"]]])
    assert sys.stdout.getvalue() == "\x1b[1mn\x1b[0m\n-\n1\n"


def test_a_word_longer_than_a_line_stays_whole(printed):
    path = "/a/path/that/is/longer-than/the-line"
    assert printed(20, write_text, f"see {path} now", "  ") == ["see", f"  {path}", "  now"]
    assert printed(20, write_text, "one\ntwo") == ["one", "two"]


def test_parts_stay_whole():
    parts = ["step 10: loss 2.5", "validation loss 2.6 (perplexity 13.5)", "120 tokens/s"]
    assert in_lines(parts, None) == "step 10: loss 2.5, validation loss 2.6 (perplexity 13.5), 120 tokens/s"
    assert in_lines(parts, 60) == ("step 10: loss 2.5, validation loss 2.6 (perplexity 13.5),\n  120 tokens/s")
    assert in_lines(parts, 45).splitlines() == [
        "step 10: loss 2.5,",
        "  validation loss 2.6 (perplexity 13.5),",
        "  120 tokens/s",
    ]


def test_a_part_longer_than_a_line_is_divided_between_words():
    assert in_lines(["step 10: loss 2.5", "validation loss 2.6 (perplexity 13.5)", "12 tokens/s"], 30).splitlines() == [
        "step 10: loss 2.5,",
        "  validation loss 2.6",
        "    (perplexity 13.5),",
        "  12 tokens/s",
    ]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(tables, "is_terminal", lambda stream: stream is sys.stdout)


@pytest.mark.usefixtures("terminal")
def test_the_width_is_that_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert line_width() == 60
    monkeypatch.setenv("COLUMNS", "5")
    assert line_width() == 20
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(sys, "__stdout__", None)
    assert line_width() == 80


def test_a_pipe_has_no_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert line_width() is None


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("command", ["info", "design", "doctor"])
@pytest.mark.usefixtures("terminal")
def test_commands_fit_their_terminal(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    if command == "info":
        info()
        expected = ["6,067,456", "983,680", "5.09", "3,840"]
    elif command == "design":
        found = design(OpenELMConfig.preset("3B"))
        _show(found, uniform=False)
        both = [*found.layerwise.layer_parameters, *found.uniform.layer_parameters, found.layerwise.num_parameters]
        expected = [f"{number:,}" for number in both]
    else:
        monkeypatch.setattr(doctor_module, "_matmul_gflops", lambda: 1.5)
        doctor(only=None, output=None)
        expected = ["GFLOP/s", "MiB,"]
    lines = capsys.readouterr().out.splitlines()
    too_long = [line for line in lines if len(line) > width and len(line.split()) > 1]  # a path is not divided
    assert too_long == []
    words = {word for line in lines for word in line.split()}
    assert {word.rstrip(",") for word in expected} <= {word.rstrip(",") for word in words}
