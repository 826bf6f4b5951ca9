"""`--verbose` and `--quiet`, before the name of a command or after it."""

import json
import re

import pytest

from conftest import refused, run
from mlx_openelm import __version__
from mlx_openelm.commands import streams, terminal, verbosity
from mlx_openelm.commands.app import all_commands

WORDS = ["-p", "Once upon a time", "-n", "3"]


@pytest.fixture(autouse=True)
def usual():
    yield
    verbosity.reset_verbosity()


def test_verbose_says_what_ran_where_and_the_result_stays():
    usual = run("generate", *WORDS)
    for arguments in (["-v", "generate", *WORDS], ["generate", *WORDS, "--verbose"]):
        status, out, err = run(*arguments)
        assert (status, out) == usual[:2]
        assert f"openelm-mlx: openelm-mlx {__version__}, Python 3." in err
        assert re.search(r"openelm-mlx: openelm-tiny is the folder /.+\n", err)
        assert re.search(r"openelm-mlx: loaded openelm-tiny in \d+\.\d\d s: [\d,]+ bytes, to compute in float32\n", err)
    assert usual[2] == ""


def test_verbose_says_where_an_error_comes_from():
    status, out, err = run("info", "nowhere", "-v")
    assert (status, out) == (2, "")
    assert "Traceback" in err
    assert err.splitlines()[-1] == refused("info", "nowhere").rstrip("\n")


def test_quiet_leaves_warnings_and_errors(capsys):
    verbosity.set_verbosity(verbose=False, quiet=True)
    terminal.say("12 of 20 prompts already answered")
    terminal.write_error("an example")
    terminal.say("warning: the loss did not improve")
    terminal.say("error: no data")
    terminal.write("the result")
    assert capsys.readouterr() == (
        "the result\n",
        "openelm-mlx: warning: the loss did not improve\nopenelm-mlx: error: no data\n",
    )


def test_quiet_shows_no_progress_on_a_terminal(monkeypatch):
    monkeypatch.setattr(streams.sys.stderr, "isatty", lambda: True, raising=False)
    assert streams.is_terminal(streams.sys.stderr)
    verbosity.set_verbosity(verbose=False, quiet=True)
    assert not streams.is_terminal(streams.sys.stderr)


def test_a_quiet_run_prints_its_result_alone(tmp_path):
    records = [{"prompt": f"{number} and", "completion": f" {number + 1}."} for number in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["tune", "-d", tmp_path / "data.jsonl", "--steps", 1, "--validation", 0.25]
    loud, quiet = run(*words, "-o", tmp_path / "loud"), run(*words, "-o", tmp_path / "quiet", "--quiet")
    assert loud[0] == quiet[0] == 0
    assert "step 1 of 1" in loud[2]
    assert [line for line in quiet[2].splitlines() if not line.startswith("openelm-mlx: warning: ")] == []
    assert quiet[1] == loud[1].replace("/loud", "/quiet")


def test_both_at_once_are_refused():
    assert "--verbose and --quiet are mutually exclusive" in run("-v", "generate", *WORDS, "--quiet")[2]


def test_every_command_has_them():
    for name, command in all_commands().items():
        spellings = {spelling for option in command.params for spelling in option.opts}
        assert {"-v", "--verbose", "--quiet"} <= spellings, name
