"""Locks against other writers, and the removal of what killed ones left.

Every output has a lock of its own, whoever writes it and wherever it lies. A lock is an empty file on which the holder
has an advisory lock of the system, so that it ends with the process, whatever ends that; the file holds the process
number for the message that others get.
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
from .names import aside_name, identity, leftovers, lock_name, reported, resolved
from .rename import rename_new

_FOLDER_LOCK = ".openelm-mlx.lock"  # in a folder that a process adds to
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # of some network file systems


@contextmanager
def lock(path: str | Path) -> Iterator[Path]:
    """Keep other writers from a path while the block runs; gives where its links lead.

    What a killed process left beside the path is removed, or put back if it was moved away and its successor had not
    arrived.

    Raises:
        OutputLockedError: if somebody else holds the lock, in this process or another.
        OutputError: if the folder above cannot be written to.
    """
    target = resolved(path)
    with _parents(Path(path), target), _hold(Path(path), lock_name(target)):
        with reported(Path(path)):
            for kind, left in leftovers(target.parent, target).get(target, []):
                _clear(kind, left, target)
        yield target


@dataclass(frozen=True)
class LockedFolder:
    """A folder to which this process alone adds; `lock_folder` makes it."""

    name: Path  # as it was given, for messages
    path: Path  # where its links lead


@contextmanager
def lock_folder(folder: str | Path, *subfolders: str) -> Iterator[LockedFolder]:
    """Keep other processes from adding to a folder while the block runs; it is made if it does not exist.

    Args:
        subfolders: what killed processes left is removed from these too.
    Raises:
        OutputLockedError: if somebody else holds the lock, in this process or another.
        OutputError: if the folder cannot be written to.
    """
    target = resolved(folder)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{folder} is a file; a folder is needed here")
    with _parents(Path(folder), target / _FOLDER_LOCK), _hold(Path(folder), target / _FOLDER_LOCK):
        with reported(Path(folder)):
            for inner in (target, *(target / name for name in subfolders)):
                if inner.is_dir():
                    _clear_all(inner)
        yield LockedFolder(Path(folder), target)


@contextmanager
def _parents(name: Path, target: Path) -> Iterator[None]:
    """The folders above a path; those that had to be made and are empty afterwards are removed."""
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
                # While it is held: who has opened it already will see that it is gone.
                if os.path.samestat(os.fstat(descriptor), os.lstat(lock_file)):
                    os.unlink(lock_file)
        held.release()


def _sign(name: Path, lock_file: Path, descriptor: int) -> None:
    """Write the process number into a lock file, unless the name leads to a file that is none."""
    found = os.fstat(descriptor)
    content = os.pread(descriptor, 20, 0)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or not (content.isdigit() or not content):
        raise OutputError(f"{name} cannot be written: {lock_file} is not a lock; move it away")
    with suppress(OSError):  # on a full disk nobody learns the number
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def _holder(lock_file: Path) -> int | None:
    try:
        return int(lock_file.read_text())
    except (OSError, ValueError):
        return None


def _clear_all(folder: Path) -> None:
    """Remove from a folder what killed writers left of any target; those that still write are told by their locks."""
    for target, left in leftovers(folder).items():
        with suppress(OutputError), _hold(target, lock_name(target)):
            for kind, path in left:
                _clear(kind, path, target)


def _clear(kind: str, left: Path, target: Path) -> None:
    """Remove or put back one thing that was left beside a target; the caller holds the target's lock.

    A file is always the beginning of new content. A folder without `UNFINISHED` is whole: new content, or the old one
    that it was exchanged for; if the target is missing, it is put there.
    """
    with suppress(OSError):
        if kind == "lock":
            return  # whoever held it removes it
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
