"""Renames that replace nothing by mistake, by the system calls of Linux and macOS where there are any."""

import errno
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from .names import aside_name


def rename_new(old: Path, new: Path) -> None:
    """Rename a file or folder.

    Raises:
        FileExistsError: if there is something under the new name.
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
    os.rename(old, new)  # of folders, fails by itself unless `new` is missing or empty


def exchange(one: Path, other: Path) -> None:
    """Let two folders change places: at once where the system can, else by two renames that can be undone."""
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
    """Rename with a flag, by the system call of Linux or macOS; false if the system or file system has none."""
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
    """The call, and its flags from <linux/fs.h> and <sys/stdio.h>."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD
        return lambda old, new, flag: library.renameat2(here, old, here, new, flag), {"exclusive": 1, "exchange": 2}
    if hasattr(library, "renamex_np"):
        return library.renamex_np, {"exclusive": 4, "exchange": 2}
    return None, {}
