"""Paths of outputs, how a change of one is detected, and the temporary names beside it during a write."""

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

_MODEL_FILES = (".gguf", ".safetensors", ".npz", ".onnx", ".pt", ".pth", ".bin", ".ckpt", ".zip")
_LONGEST_ALLOWED = 255  # bytes of a name
_LONGEST_NAME = 150  # bytes of a target's name to repeat in temporary names; file systems allow 255 in total


def resolved(path: str | Path) -> Path:
    """The absolute path without links or `..`; it need not exist.

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


def check_folder_name(path: str | Path) -> None:
    """Make sure that a new folder does not get the name of a model file, which would not be what its user expects.

    Raises:
        OutputError: if it would.
    """
    ending = Path(path).suffix.lower()
    if ending in _MODEL_FILES and not os.path.isdir(path):
        raise OutputError(f"{path} would be a folder, not a {ending} file; choose another `output`")


def identity(path: Path, content: bool = True) -> tuple[int, ...] | None:
    """A key that stays equal while a path leads to the same file or folder; `None` if nothing exists there.

    The key is device and inode and, for a regular file unless `content` is false, size and modification time.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    more = (found.st_size, found.st_mtime_ns) if content and stat.S_ISREG(found.st_mode) else ()
    return (found.st_dev, found.st_ino, *more)


@contextmanager
def reported(name: Path, within: Path | None = None) -> Iterator[None]:
    """Turn an `OSError` into an `OutputError` that names the output, and the file if that is outside `within`."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None
        elsewhere = within is not None and where is not None and not Path(os.fsdecode(where)).is_relative_to(within)
        more = f": {os.fsdecode(where)}" if where is not None and elsewhere else ""
        raise OutputError(f"{name} cannot be written: {error.strerror or error}{more}") from error


def lock_name(target: Path) -> Path:
    """The lock file of a target."""
    return target.with_name(f".{_stem(target)}.openelm-mlx.lock")


def with_ending(target: Path, ending: str) -> Path:
    """A target's path with an ending appended to its name, which is cut if it would become too long."""
    whole = target.name + ending
    return target.with_name(whole if len(os.fsencode(whole)) <= _LONGEST_ALLOWED else _stem(target) + ending)


def aside_name(target: Path, kind: str) -> Path:
    """An unpredictable temporary name beside a target.

    Args:
        kind: `new` for content about to be renamed to the target (or back to it), `old` for content being removed.
    """
    return target.with_name(f".{_stem(target)}.openelm-mlx-{kind}-{secrets.token_hex(8)}")


_ASIDE = re.compile(r"\.(.+)\.openelm-mlx-(new|old)-[0-9a-f]{16}", re.DOTALL)
_LOCK = re.compile(r"\.(.+)\.openelm-mlx\.lock", re.DOTALL)
_SHORTENED = re.compile(r".+~[0-9a-f]{16}", re.DOTALL)


def leftovers(folder: Path, target: Path | None = None) -> dict[Path, list[tuple[str, Path]]]:
    """What current and killed writers keep beside their targets: kind (`new`, `old` or `lock`) and path, by target.

    Args:
        target: the only target to look for; by default all, except those whose names were too long to be kept in full.
    """
    found: dict[Path, list[tuple[str, Path]]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            aside, lock = _ASIDE.fullmatch(entry.name), _LOCK.fullmatch(entry.name)
            match = aside or lock
            if match is None or entry.is_symlink():  # we never create links
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
    """A target's name; a long name is cut, with a hash of it appended."""
    raw = os.fsencode(target.name)
    if len(raw) <= _LONGEST_NAME:
        return target.name
    return raw[:100].decode("utf-8", "ignore") + "~" + blake2b(raw, digest_size=8).hexdigest()
