"""The package as people install it: an editable install hides what is left out of the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mlx_openelm.self_test.golden import GOLDEN_FILE

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, place / name)
    shutil.copytree(ROOT / "mlx_openelm", place / "mlx_openelm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("golden", "__pycache__"))
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return next((place / "out").glob("*.whl"))


def test_it_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "mlx_openelm").rglob("*") if path.is_file()}
    assert names == {name for name in expected if "__pycache__" not in name}
    assert str(GOLDEN_FILE.relative_to(ROOT)) in names  # the self-test of an installed package needs it
    assert wheel.stat().st_size < 20_000_000


def test_what_is_installed_generates_outside_the_checkout(wheel, tmp_path):
    place = tmp_path / "site"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", place, wheel]
    assert subprocess.run(words, capture_output=True, timeout=120).returncode == 0
    code = "import mlx_openelm, sys; print(mlx_openelm.__file__); from mlx_openelm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "--prompt", "Once upon a time there was", "-n", "8"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    where, text = done.stdout.split("\n", 1)
    assert Path(where).is_relative_to(place)
    assert text.strip()
