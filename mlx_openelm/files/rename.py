"""Renames that never replace anything by mistake, with the system calls of Linux and macOS where available."""

import errno
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from .names import aside_name


def rename_new(old: Path, new: Path) -> None:
    """Rename a file or folder.

    Raises:
        FileExistsError: if the new name is taken.
    """
    if _rename_with_flag(old, new, "exclusive"):
        return
    if not old.is_dir():
        try:
            os.link(old, new, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            pass
        else:
            os.unlink(old)
            return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    os.rename(old, new)  # for folders, fails unless `new` is missing or empty


def exchange(one: Path, other: Path) -> None:
    """Exchange two folders: atomically where the system supports it, otherwise with renames that can be undone."""
    if _rename_with_flag(one, other, "exchange"):
        return
    aside = aside_name(other, "new")
    os.rename(other, aside)
    try:
        rename_new(one, other)
    except BaseException:
        rename_new(aside, other)
        raise
    os.rename(aside, one)


def _rename_with_flag(old: Path, new: Path, flag: str) -> bool:
    """Rename with a flag of the Linux or macOS system call; false if the system or file system has no such call."""
    import ctypes

    rename, flags = _system_rename()
    if rename is None or rename(os.fsencode(old), os.fsencode(new), flags[flag]) == 0:
        return rename is not None
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(old), None, str(new))


@cache
def _system_rename() -> tuple[Callable[[bytes, bytes, int], int] | None, dict[str, int]]:
    """The system call with its flags (see <linux/fs.h> and <sys/stdio.h>), or `None` if this system lacks it."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD
        return lambda old, new, flag: library.renameat2(here, old, here, new, flag), {"exclusive": 1, "exchange": 2}
    if hasattr(library, "renamex_np"):
        return library.renamex_np, {"exclusive": 4, "exchange": 2}
    return None, {}
