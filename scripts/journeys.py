"""Runs every command of the README and the tutorials as written, in a new environment.

    python scripts/journeys.py [DOCUMENT ...] [--environment FOLDER]

Each document is a journey: its `sh` and `python` blocks run from top to bottom in a copy of the repository, with one
shell per command and `pip` and `openelm-mlx` of a new environment. `--environment` uses an existing one instead.

The kernels that MLX compiles on a CPU are kept for the next run of this script, because a compiler takes a second or
more for each of about a hundred.

There is no network for the commands themselves. Where one needs Apple's weights, there is a folder of that name with
those of a built-in model, and a `chat` gets its messages from here. Left out are only comments and the lines of
`LEFT_OUT`, with a reason. The first command that fails ends the run with its output.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "docs/tutorials/first-text.md",
    "docs/tutorials/convert.md",
    "docs/tutorials/tune-to-chat.md",
    "docs/tutorials/pretrain.md",
    "docs/tutorials/speed.md",
    "docs/how-to/many-prompts.md",
    "docs/how-to/python.md",
    "docs/how-to/llm.md",
    "docs/how-to/other-programs.md",
    "docs/how-to/check-your-machine.md",
]
LEFT_OUT = {  # beginnings of lines, and why they do not run
    "uv tool install": "needs uv",
    "pipx install": "needs pipx",
    "pip install ./native": "another job of the workflow builds it",
    "openelm-mlx pretrain --config 270M": "takes days",
}
APPLE = {"OpenELM-270M": "openelm-tiny", "OpenELM-1_1B-Instruct": "openelm-tiny-instruct"}
CHAT = "What does a cow say?\n/quit\n"  # one message: a model that was hardly tuned answers at length
_CACHE = Path("~/.cache/openelm-mlx/journeys")  # for what can be made again; without network, that is little else
_SECONDS = 300  # more than this is a command that hangs
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Runs in the new environment, which alone has MLX: a built-in model in the layout of Apple's repositories.
_SMALL_MODEL = """
import json, sys
from pathlib import Path
from mlx_openelm import convert
folder = Path(sys.argv[1])
folder.parent.mkdir(exist_ok=True)
convert(sys.argv[2], folder, dequantize=True, dtype="float16")
config = json.loads((folder / "config.json").read_text())
del config["openelm_mlx_version"]
for path in folder.iterdir():
    if path.name not in ("model.safetensors", "tokenizer.model"):
        path.unlink()
(folder / "config.json").write_text(json.dumps(config))
"""


class Block(NamedTuple):
    """A block of a document that runs."""

    language: str
    text: str
    line: int


def blocks(document: str) -> list[Block]:
    """The blocks of a document, from top to bottom; those of Python are one program, where the last of them is."""
    found = [
        Block(match[1], match[2], document.count("\n", 0, match.start()) + 2) for match in _BLOCK.finditer(document)
    ]
    python = [block for block in found if block.language == "python"]
    program = "\n".join(block.text for block in python)
    return [
        block._replace(text=program) if block.language == "python" else block
        for block in found
        if block.language == "sh" or block is python[-1]
    ]


def commands(block: Block) -> Iterator[str]:
    """The commands of a `sh` block; one that ends with a backslash goes on in the next line."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def left_out(command: str) -> str | None:
    """Why a command does not run, if it does not."""
    return next((reason for start, reason in LEFT_OUT.items() if command.startswith(start)), None)


def _files() -> list[str]:
    """The files of the repository as a clone has them, with those that are new."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for path in dict.fromkeys(listed) if path and os.path.lexists(ROOT / path)]


class Place:
    """A copy of the repository and an environment in which the commands run."""

    def __init__(self, folder: Path, environment: Path | None):
        self.home = folder / "home"
        self.home.mkdir()
        self.environment = environment or folder / "environment"
        if environment is None:
            subprocess.run([sys.executable, "-m", "venv", self.environment], check=True)
        self.programs = self.environment / "bin"
        self.repository = folder / "openelm-mlx"
        for path in _files():
            (self.repository / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, self.repository / path, follow_symlinks=False)
        self.before = {path.name for path in self.repository.iterdir()}

    def variables(self) -> dict[str, str]:
        """What the commands see: the new environment first, and no network behind the hub's client."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return {
            **kept,
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(_CACHE.expanduser()),
            "LLM_USER_PATH": str(self.home / "llm"),
            "HF_HUB_OFFLINE": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_COMPILE": "1",  # each module is compiled when it is first imported
            "PIP_CONSTRAINT": str(self.repository / "constraints.txt"),
        }

    def run(self, words: list[str], text: str = "", *, cached: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a program in the copy; `text` is what it reads."""
        variables = self.variables()
        if cached:  # pip finds its settings and what it downloaded before in the real home
            variables["HOME"] = os.environ.get("HOME", "/")
            del variables["XDG_CACHE_HOME"]
        try:
            return self._run(words, text, variables)
        except subprocess.TimeoutExpired as error:
            output = (error.output or b"").decode(errors="replace")
            sys.exit(f"{words[-1]}\n\ndid not end within {_SECONDS} s; its output so far:\n{output}")

    def _run(self, words: list[str], text: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd=self.repository,
            env=variables,
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
            check=False,
        )

    def provide(self) -> None:
        """The folders that the documents take for granted: Apple's models."""
        for name, built_in in APPLE.items():
            done = self.run([str(self.programs / "python"), "-c", _SMALL_MODEL, f"apple/{name}", built_in])
            if done.returncode:
                sys.exit(f"the small model cannot be made:\n{done.stdout}")

    def tidy(self) -> None:
        """Remove what a journey wrote, so that the next one starts as a reader does."""
        for path in self.repository.iterdir():
            if path.name not in self.before:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def run_document(name: str, place: Place) -> tuple[int, int]:
    """Run a document; returns how many commands ran and how many were left out.

    Raises:
        SystemExit: at the first command that fails.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    counts = [0, 0]
    has_models = False
    for block in blocks(text):
        steps = [block.text] if block.language == "python" else list(commands(block))
        for step in steps:
            reason = left_out(step)
            if reason is not None:
                counts[1] += 1
                print(f"  left out, {reason}: {step}", flush=True)
                continue
            installs = step.startswith("pip install")
            if not installs and not has_models:
                place.provide()
                has_models = True
            if installs and sys.platform.startswith("linux") and step.split("#")[0].strip() == "pip install .":
                counts[1] += 1
                print(f"  left out, for a Mac: {step}", flush=True)
                continue
            start = time.monotonic()
            words = [str(place.programs / "python"), "-c"] if block.language == "python" else ["bash", "-euc"]
            typed = CHAT if step.startswith("openelm-mlx chat") else ""
            done = place.run([*words, step], typed, cached=installs)
            shown = "the Python" if block.language == "python" else step
            print(f"  {time.monotonic() - start:5.1f} s  {shown}", flush=True)
            if done.returncode:
                sys.exit(f"{name}:{block.line}: exit status {done.returncode}\n{step}\n\n{done.stdout}")
            counts[0] += 1
    return counts[0], counts[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="*", default=DOCUMENTS)
    parser.add_argument("--environment", type=Path, help="an environment to use instead of a new one")
    arguments = parser.parse_args()
    start = time.monotonic()
    total = skipped = 0
    with tempfile.TemporaryDirectory() as folder:
        environment = arguments.environment.absolute() if arguments.environment is not None else None
        place = Place(Path(folder), environment)
        if "README.md" not in arguments.documents and environment is None:
            done = place.run(["bash", "-euc", 'pip install ".[cpu,llm,plot]"'], cached=True)
            if done.returncode:
                sys.exit(done.stdout)
        for name in arguments.documents:
            print(name, flush=True)
            ran, out = run_document(name, place)
            total, skipped = total + ran, skipped + out
            place.tidy()
    print(f"{total} commands ran in {time.monotonic() - start:.0f} s, {skipped} were left out")


if __name__ == "__main__":
    main()
