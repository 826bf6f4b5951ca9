"""Completion scripts: what the shells themselves make of them, where they are installed."""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from conftest import refused
from mlx_openelm.commands.app import all_commands
from mlx_openelm.commands.completion import described_commands
from mlx_openelm.commands.completion_scripts import _zsh_text, bash_script, fish_script, zsh_script
from mlx_openelm.training.tune_recipe import TuneRecipe

COMMANDS = described_commands()
SCRIPTS = {"bash": bash_script(COMMANDS), "zsh": zsh_script(COMMANDS), "fish": fish_script(COMMANDS)}
LINES = {  # what was typed: what is offered, and what is not
    "openelm-mlx ": (set(all_commands()), {"--help"}),
    "openelm-mlx ge": ({"generate"}, {"chat"}),
    "openelm-mlx --v": ({"--version", "--verbose"}, {"generate"}),
    "openelm-mlx generate --max": ({"--max-tokens", "--max-kv-size"}, {"--temperature"}),
    "openelm-mlx --quiet generate --te": ({"--temp", "--temperature"}, {"--max-tokens"}),
    "openelm-mlx generate --dtype ": ({"auto", "float16", "bfloat16", "float32"}, {"model", "a b.txt"}),
    "openelm-mlx generate -n ": (set(), {"model", "a b.txt", "chat"}),
    "openelm-mlx generate -m ": ({"openelm-tiny", "model"}, {"a b.txt"}),
    "openelm-mlx generate --input ": ({"a b.txt", "model"}, {"openelm-tiny"}),
    "openelm-mlx convert -q 4 ": ({"a b.txt", "model"}, {"generate"}),
    "openelm-mlx tune --method d": ({"dora", "dpo", "dora+dpo"}, {"lora"}),
    "openelm-mlx tune --config instruct-2": ({"instruct-270M"}, {"tiny"}),
    "openelm-mlx models re": ({"remove"}, {"list"}),
    "openelm-mlx completion ": ({"bash", "zsh", "fish"}, {"model"}),
}


def installed(shell):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"needs {shell}")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a file and a folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "a b.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ZDOTDIR", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    scripts = tmp_path / "home" / "scripts"
    scripts.mkdir()
    for shell, script in SCRIPTS.items():
        (scripts / f"openelm-mlx.{shell}").write_text(script)
    return scripts


@pytest.mark.parametrize("shell", [pytest.param(shell, marks=installed(shell)) for shell in SCRIPTS])
def test_the_shell_can_read_it(place, shell):
    done = subprocess.run([shell, "-n", str(place / f"openelm-mlx.{shell}")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def all_offered(by, line, wanted, unwanted):
    assert wanted <= by, f"{line!r}: {sorted(wanted - by)} missing of {sorted(by)}"
    assert by.isdisjoint(unwanted), f"{line!r}: {sorted(by & unwanted)}"


@installed("bash")
def test_bash_completes(place):
    code = ["source home/scripts/openelm-mlx.bash"]
    for line in LINES:
        words = line.split(" ")
        code.append(f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}")
        code.append("_openelm_mlx; printf '%s\\n' \"${COMPREPLY[@]}\" =====")
    code.append('COMP_WORDS=(openelm-mlx generate --dtype = fl); COMP_CWORD=4; _openelm_mlx; echo "${COMPREPLY[@]}"')
    done = subprocess.run(["bash", "--norc", "-c", "\n".join(code)], capture_output=True, text=True)
    assert done.stderr == ""
    *offered, after_equals = done.stdout.split("=====\n")
    assert after_equals == "float16 float32\n"
    for found, (line, (wanted, unwanted)) in zip(offered, LINES.items(), strict=True):
        all_offered(set(found.splitlines()), line, wanted, unwanted)


@installed("fish")
def test_fish_completes(place):
    code = "".join(f"complete -C '{line}'; echo =====\n" for line in [*LINES, "openelm-mlx generate --dtype=fl"])
    words = ["fish", "--no-config", "-c", f"source home/scripts/openelm-mlx.fish\n{code}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stderr == ""
    *offered, after_equals, _ = done.stdout.split("=====\n")
    assert [found.partition("\t")[0] for found in after_equals.splitlines()] == ["--dtype=float16", "--dtype=float32"]
    for found, (line, (wanted, unwanted)) in zip(offered, LINES.items(), strict=True):
        words = {option.partition("\t")[0].rstrip("/").replace("\\ ", " ") for option in found.splitlines()}
        all_offered(words, line, wanted, unwanted)


class Zsh:
    """An interactive zsh with the script, asked what it offers for a line: Tab writes all matches to a file."""

    SETUP = (
        "PS1=READY; autoload -Uz compinit; compinit -u -D; source home/scripts/openelm-mlx.zsh\n"
        'compadd() { builtin compadd -O offered "$@"; print -rl -- $offered >> home/offered; '
        'builtin compadd "$@" }\n'
        "print -r DONE-SETUP\n"
    )

    def __enter__(self):
        self.main, other = pty.openpty()
        environment = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            ["zsh", "-f", "-i"], stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
        )
        os.close(other)
        os.write(self.main, self.SETUP.encode())
        self.read_until(b"\nDONE-SETUP")
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.main)

    def read_until(self, text):
        """Read until the prompt behind a text: before it, the terminal itself would take Ctrl-U for the line."""
        seen, deadline = b"", time.monotonic() + 20
        while b"READY" not in seen.replace(b"\r", b"").partition(text)[2]:
            assert time.monotonic() < deadline, seen
            if select.select([self.main], [], [], 0.1)[0]:
                seen += os.read(self.main, 65536)
        return seen

    def offered(self, line):
        found = Path("home/offered")
        found.write_text("")
        os.write(self.main, f"{line}\t\x15print -r DONE-$(( 40 + 2 ))\n".encode())
        self.read_until(b"DONE-42")
        return {word.replace("\\ ", " ") for word in found.read_text().splitlines()}


@installed("zsh")
def test_zsh_completes(place):
    with Zsh() as zsh:
        for line, (wanted, unwanted) in LINES.items():
            all_offered(zsh.offered(line), line, wanted, unwanted)


def test_every_command_and_option_is_in_every_script():
    for name, command in all_commands().items():
        for script in SCRIPTS.values():
            assert re.search(rf"\b{name}\b", script)
        for option in command.params:
            for spelling in (*option.opts, *option.secondary_opts):
                if spelling.startswith("--"):
                    assert spelling in SCRIPTS["bash"]
                    assert spelling in SCRIPTS["zsh"]
                    assert f"--long-option {spelling[2:]}" in SCRIPTS["fish"]


def test_words_that_are_offered_are_accepted():
    values = {
        (command.name, spelling): option.value.words
        for command in COMMANDS
        for option in command.options
        if option.value
        for spelling in option.spellings
    }
    for method in values["tune", "--method"]:
        assert TuneRecipe.from_dict({"method": method})
    assert {"constant", "linear", "cosine"} == set(values["pretrain", "--schedule"])
    assert "tiny" in values["pretrain", "--config"]
    assert values["convert", "--to"] == ("peft", "mlx-lm", "openelm-mlx")


def test_no_text_ends_a_description_of_zsh():
    assert _zsh_text("a [b]: c\\d\n  e") == "a \\[b\\]\\: c\\\\d e"


def test_another_shell_is_named():
    assert "'tcsh' is not a shell that can be completed in; choose bash, zsh or fish" in refused("completion", "tcsh")
