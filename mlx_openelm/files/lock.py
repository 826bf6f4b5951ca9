"""Locks against concurrent writers, and cleanup after killed ones.

Every output has its own lock, whichever process writes it and wherever it is. A lock is a small file on which the
holder takes an advisory lock of the operating system, so it is released when the process ends for any reason. It
contains the process id of the holder, for the error message that other processes show.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError, OutputLockedError
from .manifest import UNFINISHED, foreign, remove_unfinished, remove_written
from .names import aside_name, check_folder_name, identity, leftovers, lock_name, reported, resolved
from .rename import rename_new

_FOLDER_LOCK = ".openelm-mlx.lock"  # in a folder to which a process adds files
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # from some network file systems


@contextmanager
def lock(path: str | Path) -> Iterator[Path]:
    """Lock a path against other writers while the block runs; yields the path with its links resolved.

    Files that a killed process left beside the path are removed first. If that process was killed between moving the
    old content away and moving the new content in, the content is put back.

    Raises:
        OutputLockedError: if another holder has the lock, in this process or another one.
        OutputError: if the parent folder is not writable.
    """
    target = resolved(path)
    with _parents(Path(path), target), _hold(Path(path), lock_name(target)):
        with reported(Path(path)):
            for kind, left in leftovers(target.parent, target).get(target, []):
                _clear(kind, left, target)
        yield target


@dataclass(frozen=True)
class LockedFolder:
    """A folder to which only this process adds files; created by `lock_folder`."""

    name: Path  # as the caller gave it, for messages
    path: Path  # with its links resolved


@contextmanager
def lock_folder(folder: str | Path, *subfolders: str) -> Iterator[LockedFolder]:
    """Lock a folder while the block runs, so that no other process adds files to it; it is created if missing.

    Args:
        subfolders: names of subfolders; leftovers of killed processes are removed from these too.
    Raises:
        OutputLockedError: if another holder has the lock, in this process or another one.
        OutputError: if the folder is not writable, or has the name of a model file.
    """
    check_folder_name(folder)
    target = resolved(folder)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{folder} is a file; expected a folder")
    with _parents(Path(folder), target / _FOLDER_LOCK), _hold(Path(folder), target / _FOLDER_LOCK):
        with reported(Path(folder)):
            for inner in (target, *(target / name for name in subfolders)):
                if inner.is_dir():
                    _clear_all(inner)
        yield LockedFolder(Path(folder), target)


@contextmanager
def _parents(name: Path, target: Path) -> Iterator[None]:
    """Create missing parent folders of a path; on exit, remove those created here that are still empty."""
    missing = []
    folder = target.parent
    try:
        with reported(name):
            while not folder.exists():
                missing.append(folder)
                folder = folder.parent
            os.makedirs(target.parent, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                os.rmdir(folder)


@contextmanager
def _hold(name: Path, lock_file: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    descriptors: list[int] = []
    held = FileLock(lock_file, on_acquired=descriptors.append, fallback_to_soft=False)
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise OutputLockedError(name, _holder(lock_file)) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise OutputError(f"{name} cannot be written: {error.strerror or error}: {lock_file}") from error
    signed: list[int] = []
    try:
        for descriptor in descriptors:
            _sign(name, lock_file, descriptor)
            signed.append(descriptor)
        yield
    finally:
        for descriptor in signed:
            with suppress(OSError):
                # Unlink while the lock is held: a process that has the file open will notice that it is gone.
                if os.path.samestat(os.fstat(descriptor), os.lstat(lock_file)):
                    os.unlink(lock_file)
        held.release()


def _sign(name: Path, lock_file: Path, descriptor: int) -> None:
    """Write the process id into a lock file; refuse a file under its name that is not a lock."""
    found = os.fstat(descriptor)
    content = os.pread(descriptor, 20, 0)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or not (content.isdigit() or not content):
        raise OutputError(f"{name} cannot be written: {lock_file} is not a lock file; move or delete it")
    with suppress(OSError):  # on a full disk, others do not learn the process id
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def _holder(lock_file: Path) -> int | None:
    try:
        return int(lock_file.read_text())
    except (OSError, ValueError):
        return None


def _clear_all(folder: Path) -> None:
    """Remove leftovers of killed writers from a folder, for every target that no running writer has locked."""
    for target, left in leftovers(folder).items():
        with suppress(OutputError), _hold(target, lock_name(target)):
            for kind, path in left:
                _clear(kind, path, target)


def _clear(kind: str, left: Path, target: Path) -> None:
    """Remove or restore one leftover beside a target; the caller holds the target's lock.

    A leftover file is always incomplete new content. A folder without `UNFINISHED` is complete: it is the new content,
    or the old content after the exchange. If the target is missing, the folder is renamed to the target.
    """
    with suppress(OSError):
        if kind == "lock":
            return  # removed by whoever held it
        if not left.is_dir():
            os.unlink(left)
        elif kind == "old":
            remove_written(left)
        elif (left / UNFINISHED).exists() or not any(left.iterdir()):
            remove_unfinished(left)
        elif identity(target) is None:
            rename_new(left, target)
        elif not any(foreign(left)):
            gone = aside_name(target, "old")
            rename_new(left, gone)
            remove_written(gone)
