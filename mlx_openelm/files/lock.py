"""Locks against other writers, and the removal of what killed ones left."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError, OutputLockedError
from .manifest import UNFINISHED, foreign, remove_unfinished, remove_written
from .names import ASIDE, identity, reported, resolved, stem
from .rename import rename_new

_LOCK = ".openelm-mlx.lock"  # in a folder that a process adds to

_locked: dict[Path, int] = {}  # what this process holds locks on, and in which thread


@contextmanager
def lock(path: str | Path) -> Iterator[Path]:
    """Keep other processes from writing to a path while the block runs; gives where its links lead.

    A lock on a folder (`lock_folder`) covers everything in it. What a killed process left beside the path is removed,
    or put back if it was moved away and its successor had not arrived.

    Raises:
        OutputLockedError: if another process holds the lock.
        OutputError: if the folder above cannot be written to.
    """
    target = resolved(path)
    with _parents(path, target), _hold(Path(path), target, target.with_name(f".{stem(target)}.openelm-mlx.lock")):
        with reported(Path(path)):
            _clean(target.parent, target)
        yield target


@contextmanager
def lock_folder(folder: Path, *subfolders: str) -> Iterator[None]:
    """Keep other processes from adding to a folder while the block runs; it is made if it does not exist.

    Args:
        subfolders: what killed processes left is removed from these too.
    Raises:
        OutputLockedError: if another process holds the lock.
        OutputError: if the folder cannot be written to.
    """
    target = resolved(folder)
    with _parents(folder, target / _LOCK), _hold(folder, target, target / _LOCK):
        with reported(folder):
            for inner in (target, *(target / name for name in subfolders)):
                if inner.is_dir():
                    _clean(inner)
        yield


@contextmanager
def _parents(name: str | Path, target: Path) -> Iterator[None]:
    """The folders above a path; those that had to be made and are empty afterwards are removed."""
    missing = []
    folder = target.parent
    while not folder.exists() and folder.name:
        missing.append(folder)
        folder = folder.parent
    try:
        with reported(Path(name)):
            os.makedirs(target.parent, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                os.rmdir(folder)


@contextmanager
def _hold(name: Path, target: Path, lock_file: Path) -> Iterator[None]:
    if any(_locked.get(place) == threading.get_ident() for place in (target, *target.parents)):
        yield
        return
    from filelock import FileLock, Timeout

    held = FileLock(lock_file)
    try:
        with reported(name):
            held.acquire(blocking=False)
    except OutputError as error:
        if isinstance(error.__cause__, Timeout):
            raise OutputLockedError(name, _holder(lock_file)) from None
        raise
    try:
        _locked[target] = threading.get_ident()
        with suppress(OSError):
            lock_file.write_text(str(os.getpid()))
        yield
    finally:
        _locked.pop(target, None)
        with suppress(OSError):
            os.unlink(lock_file)  # while it is held: who has opened it already will see that it is gone
        held.release()


def _holder(lock_file: Path) -> int | None:
    try:
        return int(lock_file.read_text())
    except (OSError, ValueError):
        return None


def _clean(folder: Path, target: Path | None = None) -> None:
    """Remove from a folder what killed processes left of one target, or of all; the caller holds the lock.

    Files are always beginnings of new content. A folder without `UNFINISHED` is whole: the old content behind its
    successor, or, if the target is missing, the one that has to be put there.
    """
    with os.scandir(folder) as entries:
        found = [(entry, match[1]) for entry in entries if (match := ASIDE.fullmatch(entry.name))]
    for entry, name in found:
        path = Path(entry.path)
        if target is not None and name != stem(target):
            continue
        with suppress(OSError):
            if entry.is_symlink():
                continue  # not ours
            if not entry.is_dir():
                os.unlink(path)
            elif (path / UNFINISHED).exists() or not any(path.iterdir()):
                remove_unfinished(path)
            elif identity(place := target or path.with_name(name)) is None:
                rename_new(path, place)
            elif not any(foreign(path)):
                remove_written(path)
