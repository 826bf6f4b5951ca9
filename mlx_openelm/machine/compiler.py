"""Compiled functions, and the private folder for what MLX's compiler writes and loads.

On the CPU, MLX compiles each kernel with a C++ compiler into `$TMPDIR/mlx/VERSION/cpu/lib*.so`, and loads what is
already there, whoever put it there. On a shared machine that folder is usually below `/tmp`, where every user can
create it first. So before anything is compiled, TMPDIR becomes a folder that nobody else can write: the user's cache,
where kernels outlive the process, else a new temporary folder. Only the C library's copy of TMPDIR changes, which MLX
reads at each compilation: Python's own temporary files, and `os.environ`, stay as they were.
"""

import atexit
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from .device import on_cpu

_FOLDER = "openelm-mlx"
_VARIABLE = "TMPDIR"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

_NOT_QUOTABLE = set('"$`\\\n')  # MLX passes the folder to a shell, between double quotes

_lock = threading.Lock()
_chosen: list[Path | None] = []  # the folder of this process, once it is known
_replaced: list[str | None] = []  # the value of TMPDIR in os.environ when it was replaced
_plain: list[None] = []  # one entry for each context of `uncompiled`


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, with its kernels in a private folder; without such a folder, return it uncompiled."""
    return mx.compile(function) if not _plain and use_private_folder() else function


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within this context, `compile_function` returns functions as they are, for a result to compare with."""
    _plain.append(None)
    try:
        yield
    finally:
        _plain.pop()


def use_private_folder() -> bool:
    """Let MLX write and load its kernels in a folder that no other user can write; on Metal it needs none.

    Returns:
        False if no such folder can be created: then nothing must be compiled.
    """
    if mx.metal.is_available() and not on_cpu():
        return True
    with _lock:
        if not _chosen:
            _chosen.append(_cache_folder() or _temporary_folder())
        current = os.environ.get(_VARIABLE)
        if _chosen[0] is not None and _replaced != [current]:  # not yet, or the program has changed it since
            os.putenv(_VARIABLE, str(_chosen[0]))  # not os.environ: that is the program's
            _replaced[:] = [current]
        return _chosen[0] is not None


def _cache_folder() -> Path | None:
    """The user's folder for kernels; `None` if it cannot be created or used, or others can change what is in it."""
    base = _caches()
    if base is None:
        return None
    folder = base / _FOLDER
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = base.resolve(strict=True) / _FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
        reason = _objection(folder)
    except OSError:
        return None
    if reason is not None:
        warnings.warn(f"{folder} {reason}, so kernels are compiled again in each process", stacklevel=4)
        return None
    return _usable(folder)


def _usable(folder: Path) -> Path | None:
    """The subfolder for this kind of machine, because a home may be shared; `None` if kernels cannot be run there."""
    kernels = folder / os.uname().machine
    try:
        folder.chmod(0o700)
        kernels.mkdir(mode=0o700, exist_ok=True)
        usable = os.access(kernels, os.W_OK | os.X_OK) and not os.statvfs(kernels).f_flag & getattr(os, "ST_NOEXEC", 0)
    except OSError:
        return None
    return kernels if usable and not _NOT_QUOTABLE & set(str(kernels)) else None


def _caches() -> Path | None:
    """Where this user's programs keep what can be made again; `None` for a user without a home."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if not home.is_absolute() or not home.is_dir():
        return None
    return home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"


def _objection(folder: Path) -> str | None:
    """Why others could change what is in a folder (whose parents are no links); `None` if they cannot."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    if found.st_mode & _WRITABLE_BY_OTHERS:
        return "can be written by other users"
    for parent in folder.parents:
        found = parent.lstat()
        if found.st_uid not in (0, os.geteuid()):
            return f"is in {parent}, which belongs to another user"
        writers = found.st_mode & _WRITABLE_BY_OTHERS
        if writers == stat.S_IWGRP and _is_own_group(found.st_gid):
            continue
        if writers and not found.st_mode & stat.S_ISVTX:
            return f"is in {parent}, which can be written by other users"
    return None


def _is_own_group(number: int) -> bool:
    """Whether a group has this user as its only member, as on systems that give each user a group."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and number == user.pw_gid and set(group.gr_mem) <= {user.pw_name}


def _temporary_folder() -> Path | None:
    """A new folder with a name that nobody can guess, for this process only; `None` if nothing can be written."""
    import tempfile

    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}-")).absolute()
    except OSError:
        return None
    atexit.register(_remove, folder, os.getpid())
    return folder if not _NOT_QUOTABLE & set(str(folder)) else None


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a child, which has a copy of everything
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
