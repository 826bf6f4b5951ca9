"""Which BLAS computes on a Linux CPU: a fast one that is installed, for the command line alone."""

import json
import os
import subprocess
import sys

import pytest

from conftest import refused, run
from mlx_openelm.commands import app
from mlx_openelm.machine import blas
from mlx_openelm.machine.device import has_fast_matmul

INSTALLED = list(blas.installed_blas())
NO_PRELOAD = {"LD_PRELOAD": "", "OPENELM_MLX_BLAS": ""}
LOADED = "from mlx_openelm.machine.blas import *; {}\nimport mlx.core as mx; print(blas_in_use())"
needs_both = pytest.mark.skipif(
    not INSTALLED or not sys.platform.startswith("linux") or blas.PathFinder.find_spec("mlx") is None,
    reason="needs MLX for Linux and a fast BLAS",
)


def printed(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **NO_PRELOAD, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that is searched first, and no other."""
    monkeypatch.setattr(blas, "_FOLDERS", ())
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "none"))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"relative::{tmp_path}")
    return tmp_path


def test_libraries_with_threads_come_first_and_those_for_64_bit_integers_never(folder):
    for name in ("libopenblas.so.0", "libmkl_rt.so.2", "libopenblas64.so.0", "libopenblasp.so.0", "libblas.so.3"):
        (folder / name).touch()
    assert [path.name for path in blas.installed_blas()] == ["libopenblasp.so.0", "libopenblas.so.0", "libmkl_rt.so.2"]


def test_what_is_no_library_is_passed_over(folder, monkeypatch):
    (folder / "libopenblas.so.0").write_text("no library")
    monkeypatch.setattr(blas, "_replaces_own", lambda: True)
    monkeypatch.setattr(blas, "_global_symbols", dict)
    monkeypatch.setenv(blas.VARIABLE, "")
    assert blas.load_fast_blas() is None


class FakeLibrary:
    def __init__(self, config=None, symbols=blas._SYMBOLS):
        for name in symbols:
            setattr(self, name, 1)
        if config is not None:
            self.openblas_get_config = type("Function", (), {"__call__": lambda self: config})()


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (FakeLibrary(b"OpenBLAS 0.3.30 DYNAMIC_ARCH"), None),
        (FakeLibrary(b"OpenBLAS 0.3.30 USE64BITINT DYNAMIC_ARCH"), "64-bit integers"),
        (FakeLibrary(b"OpenBLAS", symbols=("cblas_sgemm", "cblas_dgemm")), "no function cblas_cgemm"),
        (FakeLibrary(), "neither OpenBLAS nor MKL"),
    ],
)
def test_a_library_must_fit_mlx(monkeypatch, library, said):
    import ctypes

    modes = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode=0: modes.append(mode) or library)
    found = blas._load("/lib/x.so", known=True)
    assert found is None if said is None else said in found
    assert (ctypes.RTLD_GLOBAL in modes) == (said is None)


@needs_both
def test_it_takes_the_place_of_the_one_in_mlx():
    used = printed(LOADED.format("load_fast_blas()"))
    assert os.path.samefile(used, INSTALLED[0])
    assert not blas.is_bundled(blas.Path(used))


@needs_both
@pytest.mark.parametrize(
    ("code", "environment"),
    [
        ("load_fast_blas()", {"OPENELM_MLX_BLAS": "off"}),
        ("import mlx.core; assert load_fast_blas() is None", {}),
        ("from mlx_openelm import load; load()", {}),  # the library leaves the process as it is
    ],
)
def test_mlx_keeps_its_own(code, environment):
    assert blas.is_bundled(blas.Path(printed(LOADED.format(code), **environment)))


@needs_both
def test_a_preloaded_library_stays():
    code = LOADED.format("assert load_fast_blas() is None")
    assert os.path.samefile(printed(code, LD_PRELOAD=str(INSTALLED[0])), INSTALLED[0])


@needs_both
def test_the_environment_may_name_the_library():
    assert os.path.samefile(
        printed(LOADED.format("load_fast_blas()"), OPENELM_MLX_BLAS=str(INSTALLED[-1])), INSTALLED[-1]
    )
    message = refused("doctor", **{**NO_PRELOAD, "OPENELM_MLX_BLAS": "/none/libblas.so"})
    assert "OPENELM_MLX_BLAS: '/none/libblas.so' cannot be loaded" in message


@needs_both
@pytest.mark.parametrize(("setting", "fast"), [("", True), ("off", False)])
def test_the_command_line_finds_it(setting, fast):
    status, out, err = run("doctor", "--json", **{**NO_PRELOAD, "OPENELM_MLX_BLAS": setting})
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert ("mlx_cpu.libs" in found["blas"]) != fast
    assert any("LD_PRELOAD=" in advice for advice in found["advice"]) == fast  # for programs of one's own
    assert any("OPENELM_MLX_BLAS is set" in advice for advice in found["advice"]) != fast


def test_only_commands_that_compute_look_for_it(monkeypatch, capsys):
    looked = []
    monkeypatch.setattr(app, "load_fast_blas", lambda: looked.append(True))
    for arguments in (["info"], ["--help"], ["--version"], ["design", "--params", "5M"]):
        app.run(arguments)
    assert looked == []
    app.run(["generate", "--prompt", ""])
    assert looked == [True]
    assert {name for name in app._WITHOUT_PRODUCTS if name} < app.all_commands().keys()


def test_a_process_knows_whether_its_products_are_fast():
    used = blas.blas_in_use()
    assert has_fast_matmul() == (used is None or not blas.is_bundled(used))
