"""What `doctor` finds, with the machine replaced."""

import json
import shutil
from pathlib import Path

import pytest

from mlx_openelm.commands.app import run
from mlx_openelm.machine import device, doctor


@pytest.fixture
def machine(monkeypatch):
    """A fast Linux machine without a GPU."""

    def change(**values):
        settings = {
            "on_cpu": True,
            "tf32": False,
            "platform": "linux",
            "gflops": 100.0,
            "compiler": "/usr/bin/g++",
            "installed": [],
            "used": None,
            **values,
        }
        monkeypatch.setattr(device, "on_cpu", lambda: settings["on_cpu"])
        monkeypatch.setattr(device, "rounds_float32", lambda: settings["tf32"])
        monkeypatch.setattr(device, "device_name", lambda: "a device")
        monkeypatch.setattr(doctor.sys, "platform", settings["platform"])
        monkeypatch.setattr(doctor, "_matmul_gflops", lambda: settings["gflops"])
        monkeypatch.setattr(shutil, "which", lambda name: settings["compiler"])
        monkeypatch.setattr(doctor, "installed_blas", lambda: iter(settings["installed"]))
        monkeypatch.setattr(doctor, "blas_in_use", lambda: settings["used"])
        monkeypatch.delenv("LD_PRELOAD", raising=False)
        return " ".join(doctor.examine().advice)

    return change


def test_a_fast_cpu_is_told_of_16_bit_arithmetic_alone(machine):
    advice = machine()
    assert "16-bit" in advice
    assert "OpenBLAS" not in advice
    assert "g++" not in advice


@pytest.mark.parametrize(("gflops", "said"), [(19.9, True), (20.0, False)])
def test_a_slow_blas_is_named_with_what_to_install(machine, gflops, said):
    assert ("libopenblas0-pthread" in machine(gflops=gflops)) == said


def test_what_is_installed_but_not_used_is_named(machine, monkeypatch):
    library, own = Path("/lib/libopenblas.so.0"), Path("/x/mlx_cpu.libs/libblas-1.so.3")
    assert "OPENELM_MLX_BLAS is set; unset it" in machine(gflops=1.0, installed=[library], used=own)
    monkeypatch.delenv("OPENELM_MLX_BLAS")
    assert "start with LD_PRELOAD=/lib/libopenblas.so.0" in machine(gflops=1.0, installed=[library], used=own)


def test_a_library_that_was_found_is_not_there_for_programs(machine):
    library = Path("/lib/libopenblas.so.0").resolve()
    assert f"unless they start with LD_PRELOAD={library}" in machine(installed=[library], used=library)


def test_a_missing_compiler_is_named(machine):
    assert "g++ is missing" in machine(compiler=None)


def test_on_a_gpu_there_is_nothing_to_advise(machine):
    assert machine(on_cpu=False, gflops=1.0, compiler=None) == ""


def test_a_gpu_that_rounds_float32_is_named(machine):
    assert "MLX_ENABLE_TF32=0" in machine(on_cpu=False, tf32=True)


def test_a_mac_on_its_cpu_is_told_why(machine):
    assert "not Apple silicon" in machine(platform="darwin", gflops=1.0, compiler=None)


@pytest.mark.parametrize("words", [["doctor"], ["doctor", "--json"]])
def test_advice_of_the_command_names_flags(machine, words, capsys):
    assert "unless `dtype` is set" in machine()
    assert run(words) == 0
    assert "unless --dtype is set" in capsys.readouterr().out


def test_findings_are_measured_and_can_be_written_as_json():
    found = doctor.examine()
    assert found.float32_matmul_gflops > 0
    assert found.versions["openelm-mlx"]
    assert found.memory_bytes >= found.memory_limit_bytes > 0
    assert json.loads(json.dumps(found.to_dict()))["python"] == found.python
