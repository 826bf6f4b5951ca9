"""Installs a wheel or a source archive in an empty environment, and generates the first text with it.

python scripts/try_package.py dist/*.whl [--python python3.13]
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPT = "Once upon a time there was"


def run(*words: object, folder: Path) -> str:
    """The output of a command that must succeed; nothing of this checkout is visible to it."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the new environment")
    arguments = parser.parse_args()
    package = arguments.package.resolve()
    extra = "" if platform.system() == "Darwin" else "[cpu]"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(arguments.python, "-m", "venv", "environment", folder=folder)
        programs = folder / "environment" / "bin"
        run(programs / "python", "-m", "pip", "install", "--quiet", f"{package}{extra}", folder=folder)
        where = run(programs / "python", "-c", "import mlx_openelm; print(mlx_openelm.__file__)", folder=folder)
        assert where.startswith(str(folder.resolve())), where
        print(run(programs / "openelm-mlx", "--version", folder=folder))
        text = run(programs / "openelm-mlx", "generate", "--prompt", PROMPT, "--max-tokens", 20, folder=folder)
        assert text, "no text"
        print(f"{PROMPT} {text}" if PROMPT not in text else text)
        print(run(programs / "openelm-mlx", "doctor", folder=folder))


if __name__ == "__main__":
    main()
