"""Without the packages that this one depends on: help, the version and `doctor` work, and the rest is one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_openelm
from conftest import run
from mlx_openelm.commands.app import all_commands
from mlx_openelm.packages import _BACKENDS, install_command, missing_package

HINT = re.compile(r'optional_package\("([^"]+)", "[^"]+", "([^"]+)"\)')

PREPARED = """
import importlib.abc, json, os, sys
missing = {"mlx", "mlx_lm", "numpy", "sentencepiece", "tokenizers", "huggingface_hub", "safetensors", "filelock",
           "yaml", "transformers", "matplotlib", "pyarrow", "zstandard"}
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ImportError(REASON.format(name), name=name)
sys.meta_path.insert(0, Missing())
"""
MISSING = "No module named {!r}"
BROKEN = "libmlx.so: cannot open shared object file: No such file or directory"


def without_packages(code, reason=MISSING, *words):
    """A program where only Typer and what it needs are installed: exit status, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-c", f"REASON = {reason!r}\n{PREPARED}\n{code}", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "100"},
    )
    return done.returncode, done.stdout, done.stderr


MAIN = "from mlx_openelm.cli import main; main()"


def test_every_command_has_its_help():
    code = "import contextlib, io; from mlx_openelm.commands.app import _COMMANDS, run\nfound = {}\n"
    code += "for name in _COMMANDS:\n    with contextlib.redirect_stdout(io.StringIO()) as said:\n"
    code += "        status = run([name, '--help'])\n    found[name] = status, said.getvalue()\n"
    code += "print(json.dumps(found))"
    status, out, err = without_packages(code)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found.keys() == all_commands().keys()
    for name, command in all_commands().items():
        assert found[name][0] == 0
        for option in command.params:
            spelling = max(option.opts, key=len)
            assert spelling in found[name][1] or not spelling.startswith("--"), (name, spelling)


def test_the_version():
    status, out, err = without_packages(MAIN, MISSING, "--version")
    assert (status, err) == (0, "")
    assert out.startswith("openelm-mlx ")


@pytest.mark.parametrize("reason", [MISSING, BROKEN])
def test_doctor_says_what_to_install(reason):
    status, out, err = without_packages(MAIN, reason, "doctor", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["device"] == "none: MLX cannot be loaded"
    assert found["memory_bytes"] > 0
    assert "pip install" in found["advice"][0]
    assert "none: MLX cannot be loaded" in without_packages(MAIN, reason, "doctor")[1]


@pytest.mark.slow
def test_shells_can_complete():
    for shell in ("bash", "zsh", "fish"):
        status, out, err = without_packages(MAIN, BROKEN, "completion", shell)
        assert (status, err) == (0, "")
        assert out == run("completion", shell)[1]


COMMANDS = ["info", "generate -p x", "tune -o out -d x", "pretrain --config tiny -o out", "design --params 1B", "chat"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_refused_in_one_line(command, tmp_path):
    status, out, err = without_packages(MAIN, BROKEN, *command.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("openelm-mlx: error: MLX cannot be loaded (libmlx.so: ")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_still_found():
    _, _, err = without_packages(MAIN, MISSING, "generate", "--prmpt", "x")
    assert "No such option: --prmpt; did you mean --prompt?" in err


def test_the_line_names_what_can_be_installed_on_this_system(monkeypatch):
    error = ImportError(BROKEN, name="mlx.core")
    monkeypatch.setattr(sys, "platform", "linux")
    assert '`pip install --upgrade "mlx[cpu]"`' in missing_package(error)
    assert '`pip install --upgrade "mlx[cuda13]"` for an NVIDIA GPU' in missing_package(error)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert missing_package(error).endswith("`pip install --upgrade mlx`")
    assert missing_package(ImportError("no yaml", name="yaml")).endswith("`pip install pyyaml`")


def test_what_hints_name_is_what_the_extras_install():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for extra, requirement in _BACKENDS.items():
        assert extras[extra][0].startswith(f"{requirement}>=")
    code = Path(mlx_openelm.__file__).parent
    calls = [found for path in code.rglob("*.py") for found in HINT.findall(path.read_text(encoding="utf-8"))]
    assert {("matplotlib.figure", "plot"), ("zstandard", "train")} <= set(calls)
    for name, extra in calls:
        package = name.partition(".")[0].replace("_", "-")
        assert any(requirement.startswith(package) for requirement in extras[extra]), name
    needed = [re.split(r"[>\[]", requirement)[0] for requirement in project["dependencies"]]
    assert {"pyyaml", "huggingface-hub"} <= set(needed)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("/home/a/project/.venv", "pip install matplotlib"),
        ("/home/a/.local/share/pipx/venvs/openelm-mlx", "pipx runpip openelm-mlx install matplotlib"),
        (
            "/home/a/.local/share/uv/tools/openelm-mlx",
            "uv pip install --python /home/a/.local/share/uv/tools/openelm-mlx matplotlib",
        ),
    ],
)
def test_the_command_installs_into_this_environment(monkeypatch, prefix, expected):
    monkeypatch.setattr(sys, "prefix", prefix)
    assert install_command("matplotlib") == expected


def test_a_module_of_this_package_is_a_bug():
    assert missing_package(ImportError("cannot import name 'x'", name="mlx_openelm.config")) is None


class TestAnOlderMLX:
    """pip only warns where another package needs one, and it has bugs that give wrong text."""

    def run(self, *words):
        code = f"import sys, mlx.core as mx; mx.__version__ = '0.30.6'; {MAIN}"
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    def test_commands_are_refused_in_one_line(self):
        status, out, err = self.run("generate", "-p", "x")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "MLX cannot be loaded (version 0.30.6 is installed, but 0.32.1 or newer is needed); install" in err

    def test_doctor_says_what_to_install(self):
        status, out, err = self.run("doctor", "--json")
        assert (status, err) == (0, "")
        assert "0.32.1 or newer" in json.loads(out)["advice"][0]
        assert json.loads(out)["versions"]["mlx"]
