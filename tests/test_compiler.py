"""The folder of MLX's compiler: nobody else can write it, whatever is in the way."""

import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_openelm.machine import compiler

MACHINE = os.uname().machine
PACKAGE = Path(compiler.__file__).parents[1]
pytestmark = pytest.mark.skipif(mx.metal.is_available(), reason="Metal's kernels are not in TMPDIR")


@pytest.fixture
def given(monkeypatch, tmp_path):
    """What the C library is told, in a process that has compiled nothing, with an empty cache and temporary folder."""
    told = {}
    monkeypatch.setattr(os, "putenv", told.__setitem__)
    monkeypatch.setattr(compiler, "_chosen", [])
    monkeypatch.setattr(compiler, "_replaced", [])
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("home", "shared"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(
        os, "environ", {**os.environ, "TMPDIR": str(tmp_path / "shared"), "HOME": str(tmp_path / "home")}
    )
    os.environ.pop("XDG_CACHE_HOME", None)
    monkeypatch.setattr(sys, "platform", "linux")
    return told


def used():
    """The folder that the compiler is told to use, whose mode and owner are checked."""
    told = {}
    putenv, os.putenv = os.putenv, told.__setitem__
    try:
        assert compiler.use_private_folder()
    finally:
        os.putenv = putenv
    assert list(told) == ["TMPDIR"]
    folder = Path(told["TMPDIR"])
    if folder.name == MACHINE:
        assert stat.S_IMODE(folder.lstat().st_mode) == 0o700
        folder = folder.parent
    assert stat.S_IMODE(folder.lstat().st_mode) == 0o700
    assert folder.lstat().st_uid == os.geteuid()
    assert folder.is_absolute()
    return folder


def is_temporary(folder, tmp_path):
    return folder.parent == tmp_path / "shared" and not any(folder.iterdir())


def test_kernels_are_kept_in_the_users_cache(given, tmp_path):
    folder = tmp_path / "home/.cache/openelm-mlx"
    assert used() == folder
    (folder / MACHINE / "kernel.so").touch()
    compiler._chosen.clear()  # as in the next process
    compiler._replaced.clear()
    assert used() == folder
    assert [path.name for path in folder.rglob("*.so")] == ["kernel.so"]
    assert os.environ["TMPDIR"] == str(tmp_path / "shared")  # for everybody but MLX


def test_the_c_library_is_told_once_and_again_when_the_program_changes_it(given, tmp_path):
    folder = used()
    assert compiler.use_private_folder()
    assert given == {}
    os.environ["TMPDIR"] = "/somewhere/else"
    assert used() == folder


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "{}/mine"}, "mine/openelm-mlx"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache/openelm-mlx"),
        ("linux", {"XDG_CACHE_HOME": ""}, "home/.cache/openelm-mlx"),
        ("darwin", {}, "home/Library/Caches/openelm-mlx"),
    ],
)
def test_the_systems_place_for_caches_is_used(given, monkeypatch, tmp_path, platform, variables, expected):
    monkeypatch.setattr(sys, "platform", platform)
    (tmp_path / "home/Library").mkdir()
    os.environ.update({name: value.format(tmp_path) for name, value in variables.items()})
    assert used() == tmp_path / expected


def test_a_cache_on_another_disk_may_be_linked(given, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home/.cache").symlink_to(tmp_path / "disk")
    assert used() == tmp_path / "disk/openelm-mlx"


def a_link(folder, tmp_path, monkeypatch):
    (tmp_path / "trap").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "trap")


def a_dangling_link(folder, tmp_path, monkeypatch):
    folder.symlink_to(tmp_path / "trap")


def a_file(folder, tmp_path, monkeypatch):
    folder.touch()


def of_another_user(folder, tmp_path, monkeypatch):
    folder.mkdir(mode=0o700)
    lstat = Path.lstat

    def elsewhere(path):
        found = list(lstat(path))
        found[stat.ST_UID] += path == folder
        return os.stat_result(found)

    monkeypatch.setattr(Path, "lstat", elsewhere)


def in_a_folder_of_another_user(folder, tmp_path, monkeypatch):
    of_another_user(folder, tmp_path, monkeypatch)
    lstat = Path.lstat
    folder.parent.chmod(0o755)
    monkeypatch.setattr(Path, "lstat", lambda path: lstat(folder if path == folder.parent else path))


def writable(mode):
    def others_can_write(folder, tmp_path, monkeypatch):
        folder.mkdir()
        folder.chmod(mode)

    return others_can_write


def in_a_writable_folder(folder, tmp_path, monkeypatch):
    folder.parent.chmod(0o777)


@pytest.mark.parametrize(
    "trap",
    [a_link, a_dangling_link, a_file, of_another_user, in_a_folder_of_another_user, writable(0o777), writable(0o770),
     writable(0o702), writable(0o1777), in_a_writable_folder],
)  # fmt: skip
def test_a_folder_that_others_can_change_is_not_used(given, tmp_path, monkeypatch, recwarn, trap):
    folder = tmp_path / "home/.cache/openelm-mlx"
    folder.parent.mkdir()
    trap(folder, tmp_path, monkeypatch)
    instead = Path(compiler._temporary_folder())
    monkeypatch.setattr(compiler, "_temporary_folder", lambda: instead)
    assert compiler.use_private_folder()
    assert given == {"TMPDIR": str(instead)}
    assert is_temporary(instead, tmp_path)
    assert all(str(folder) in str(warning.message) for warning in recwarn)


def test_a_folder_that_others_can_only_read_becomes_private(given, tmp_path):
    folder = tmp_path / "home/.cache/openelm-mlx"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    assert used() == folder


def test_a_sticky_folder_and_the_users_own_group_may_be_above(given, tmp_path, monkeypatch):
    cache = tmp_path / "home/.cache"
    cache.mkdir()
    cache.chmod(0o1777)
    assert used() == cache / "openelm-mlx"
    cache.chmod(0o775)
    monkeypatch.setattr(compiler, "_is_own_group", lambda number: number == cache.stat().st_gid)
    compiler._chosen.clear()
    compiler._replaced.clear()
    assert used() == cache / "openelm-mlx"


def no_home(tmp_path, monkeypatch):
    os.environ["HOME"] = str(tmp_path / "missing")


def unknown_user(tmp_path, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)


def empty_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", lambda: Path(""))


def read_only(tmp_path, monkeypatch):
    def refuse(path, mode=0o777, parents=False, exist_ok=False):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)


def full_of_old_kernels_and_read_only(tmp_path, monkeypatch):
    (tmp_path / "home/.cache/openelm-mlx" / MACHINE).mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)


def without_programs(tmp_path, monkeypatch):
    statvfs = os.statvfs

    def noexec(path):
        found = list(statvfs(path))
        found[8] |= os.ST_NOEXEC
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", noexec)


def not_quotable(tmp_path, monkeypatch):
    (tmp_path / "$(touch x)").mkdir()
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "$(touch x)")


CANNOT = [not_quotable, no_home, unknown_user, empty_home, read_only, full_of_old_kernels_and_read_only]
CANNOT += [without_programs] if hasattr(os, "ST_NOEXEC") else []


@pytest.mark.parametrize("trouble", CANNOT)
def test_without_a_usable_cache_a_new_temporary_folder_is_used(given, tmp_path, monkeypatch, trouble):
    trouble(tmp_path, monkeypatch)
    folder = used()
    assert is_temporary(folder, tmp_path)
    assert not (tmp_path / "missing").exists()
    compiler._remove(folder, os.getpid() + 1)  # in a child that was forked
    assert folder.exists()
    compiler._remove(folder, os.getpid())
    assert not folder.exists()


def test_without_any_folder_nothing_is_compiled(given, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    no_home(tmp_path, monkeypatch)
    assert not compiler.use_private_folder()
    assert compiler.compile_function(len) is len
    assert given == {}


def test_a_group_with_other_members_is_not_the_users_own():
    import grp

    shared = [group.gr_gid for group in grp.getgrall() if len(group.gr_mem) > 1]
    assert not any(compiler._is_own_group(number) for number in [*shared, 2**31 - 7])


def test_every_compiled_function_of_the_package_uses_the_private_folder():
    calls = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"mx\.compile\(", path.read_text(encoding="utf-8"))
    }
    assert calls == {"machine/compiler.py"}


def test_within_a_context_nothing_is_compiled():
    def function(x):
        return x + 1

    with compiler.uncompiled():
        assert compiler.compile_function(function) is function
    assert compiler.compile_function(function) is not function


PLANTED = """
import os, subprocess, sys, tempfile
import mlx.core as mx
import mlx_openelm
assert "/planted" in os.environ["TMPDIR"]
from mlx_openelm.machine.compiler import compile_function
with mx.stream(mx.cpu):
    print(compile_function(lambda x: mx.sin(x) + 0.125 * mx.cos(x))(mx.array(0.0)).item())
print(tempfile.gettempdir(), os.environ["TMPDIR"])
"""


def test_mlx_writes_its_kernels_there_and_python_its_files_where_it_did(tmp_path):
    planted = tmp_path / "planted"
    planted.mkdir()
    environment = {
        **os.environ,
        "TMPDIR": str(planted),
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(PACKAGE.parent),
    }
    done = subprocess.run([sys.executable, "-c", PLANTED], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["0.125", str(planted), str(planted)], done.stderr
    assert not list(planted.iterdir())
    (kernel,) = (tmp_path / "openelm-mlx").rglob("lib*.so")
    assert kernel.stat().st_uid == os.geteuid()
