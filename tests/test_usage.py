"""What the command line says about words it does not know."""

import re
import shlex

import pytest

from conftest import refused, run
from mlx_openelm import __version__
from mlx_openelm.commands import usage
from mlx_openelm.commands.app import all_commands, run as run_here

COMMANDS = all_commands()
OPTIONS = {name: usage.spellings(command) for name, command in COMMANDS.items()}


def said(capsys, *arguments):
    """The one line that a mistake gets, in this process."""
    assert run_here(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err.removeprefix("openelm-mlx: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("lora --data x", "No such command 'lora'; use `openelm-mlx tune` (see `openelm-mlx --help`)"),
        ("fuse", "No such command 'fuse'; use `openelm-mlx merge`"),
        ("serve", "No such command 'serve'; use `mlx_lm.server --model FOLDER`"),
        ("generat", "No such command 'generat'; did you mean 'generate'?"),
        ("frobnicate", "No such command 'frobnicate' (see"),
        ("generate -n abc -p x", "--max-tokens must be a whole number; got 'abc' (see `openelm-mlx generate --help`)"),
        ("generate --temp hot -p x", "--temperature must be a number; got 'hot'"),
        ("tune --rank 1.5 -o x", "--rank must be a whole number; got '1.5'"),
        ("generate --kv-bits", "Option '--kv-bits' requires an argument (see `openelm-mlx generate --help`)"),
        ("generate -p x --json=yes", "Option '--json' does not take a value; got '--json=yes'"),
        ("convert x --q-bits 4", "No such option: --q-bits; use --quantize"),
        ("convert --hf-path x", "give the source without an option, as in `openelm-mlx convert x`"),
        ("convert --model", "give the source without an option, as in `openelm-mlx convert MODEL`"),
        ("info --model 'my run'", "give the model without an option, as in `openelm-mlx info 'my run'`"),
        ("info --model=x", "give the model without an option, as in `openelm-mlx info x`"),
        ("info -m x", "give the model without an option, as in `openelm-mlx info x`"),
        ("plot --run x", "give the run without an option, as in `openelm-mlx plot x`"),
        ("pretrain --run x", "No such option: --run; use --resume"),
        ("design --params 1M --output x", "No such option: --output; use --save"),
        ("design --params 1M --out x", "No such option: --out; use --save"),
        ("convert x --save y", "No such option: --save; use --output"),
        ("tune --iters 5 -o x", "No such option: --iters; use --steps"),
        ("generate --max_tokens 5", "No such option: --max_tokens; use --max-tokens"),
        ("generate --promt x", "No such option: --promt; did you mean --prompt?"),
        ("generate --frobnicate", "No such option: --frobnicate (see"),
        ("--model x generate", "--model; an option follows its command, as in `openelm-mlx generate --model`"),
        ("generate 'a story'", "unexpected argument 'a story'; give a text with --prompt"),
        ("info a b", "unexpected argument 'b' (see"),
    ],
)
def test_a_mistake_is_quoted_with_what_was_meant(capsys, arguments, message):
    assert message in said(capsys, *shlex.split(arguments))


def test_hints_lead_to_commands_and_options_that_exist():
    for hint in usage._COMMANDS_ELSEWHERE.values():
        for line in re.findall(r"`openelm-mlx ([^`]+)`", hint):
            name, *arguments = shlex.split(line)
            if name != "--version":
                COMMANDS[name].make_context(name, arguments, resilient_parsing=True)
    known = {spelling for spellings in OPTIONS.values() for spelling in spellings}
    assert set(usage._OPTIONS_ELSEWHERE.values()) <= known


@pytest.mark.parametrize("spelling", ["--version", "-V"])
def test_the_version_has_a_short_option(capsys, spelling):
    assert run_here([spelling]) == 0
    assert capsys.readouterr().out == f"openelm-mlx {__version__}\n"


def test_help_is_a_command_too(capsys):
    run_here(["help", "info"])
    assert "openelm-mlx info" in capsys.readouterr().out
    run_here(["help"])
    assert "generate" in capsys.readouterr().out


def test_temp_is_the_temperature():
    words = ["generate", "-p", "Once", "-n", "5", "--seed", "1"]
    assert run(*words, "--temp", "0.9") == run(*words, "--temperature", "0.9")
    assert "got -1" in refused(*words, "--temp", "-1")
