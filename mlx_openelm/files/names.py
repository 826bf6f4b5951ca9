"""Paths of outputs, what tells whether they changed, and the names beside them that are used while they are written."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from ..errors import OutputError

_LONGEST_NAME = 150  # bytes of a target's name that temporary names repeat; file systems allow 255 in all


def resolved(path: str | Path) -> Path:
    """An absolute path without links and `..`, whether it exists or not.

    Raises:
        OutputError: if links form a loop, or the path cannot be resolved.
    """
    with reported(Path(path)):
        try:
            target = Path(os.path.realpath(Path(path).expanduser()))
        except RuntimeError as error:  # no such user
            raise OutputError(f"{path} cannot be written: {error}") from error
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if not target.name:
            raise OutputError(f"{path} cannot be written: it is the root of the file system")
        return target


def identity(path: Path, content: bool = True) -> tuple[int, ...] | None:
    """What tells whether a path still leads to the same file or folder, and a file, to the same content."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    more = (found.st_size, found.st_mtime_ns) if content and stat.S_ISREG(found.st_mode) else ()
    return (found.st_dev, found.st_ino, *more)


@contextmanager
def reported(name: Path, within: Path | None = None) -> Iterator[None]:
    """Failures of the system as an `OutputError` that names the output, and the file if it lies elsewhere."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None
        elsewhere = within is not None and where is not None and not Path(os.fsdecode(where)).is_relative_to(within)
        more = f": {os.fsdecode(where)}" if where is not None and elsewhere else ""
        raise OutputError(f"{name} cannot be written: {error.strerror or error}{more}") from error


def lock_name(target: Path) -> Path:
    """The file that whoever writes to a target holds a lock on."""
    return target.with_name(f".{_stem(target)}.openelm-mlx.lock")


def aside_name(target: Path, kind: str) -> Path:
    """A name beside a target that nobody can foresee.

    Args:
        kind: `new` for content that has yet to take its place (or to go back there), `old` for what is being removed.
    """
    return target.with_name(f".{_stem(target)}.openelm-mlx-{kind}-{secrets.token_hex(8)}")


_ASIDE = re.compile(r"\.(.+)\.openelm-mlx-(new|old)-[0-9a-f]{16}", re.DOTALL)
_LOCK = re.compile(r"\.(.+)\.openelm-mlx\.lock", re.DOTALL)
_SHORTENED = re.compile(r".+~[0-9a-f]{16}", re.DOTALL)


def leftovers(folder: Path, target: Path | None = None) -> dict[Path, list[tuple[str, Path]]]:
    """What writers have beside their targets now, or left there: kind (`new`, `old` or `lock`) and path, by target.

    Args:
        target: the one to look for; by default all, except those whose names are too long to be told.
    """
    found: dict[Path, list[tuple[str, Path]]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            aside, lock = _ASIDE.fullmatch(entry.name), _LOCK.fullmatch(entry.name)
            match = aside or lock
            if match is None or entry.is_symlink():  # links are not ours
                continue
            if target is not None and match[1] == _stem(target):
                place = target
            elif target is None and not _SHORTENED.fullmatch(match[1]):
                place = folder / match[1]
            else:
                continue
            found.setdefault(place, []).append((aside[2] if aside else "lock", Path(entry.path)))
    return found


def _stem(target: Path) -> str:
    """A target's name, or the beginning of a long one with a hash of it."""
    raw = os.fsencode(target.name)
    if len(raw) <= _LONGEST_NAME:
        return target.name
    return raw[:100].decode("utf-8", "ignore") + "~" + blake2b(raw, digest_size=8).hexdigest()
