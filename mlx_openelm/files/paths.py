"""Paths from users, and the files that are read from them: what a path leads to, and opening regular files only."""

import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from ..errors import OpenELMError, PathError, quoted

LARGEST_TEXT_BYTES = 1 << 22  # of a settings file that is read whole

_FOLDER, _FILE = "folder", "file"
_MISSING = (errno.ENOENT, errno.ENOTDIR)
_OTHER_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_LINKED_SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".bin", ".txt")  # that are read from model folders


def user_path(name: str | Path) -> Path:
    """The path that a user wrote, with `~` expanded; the system can look at it, and it may not exist.

    Raises:
        PathError: if the system refuses the path: too long, no permission, a loop of links, not text.
    """
    try:
        path = Path(name).expanduser()
        os.fsencode(path)
    except (RuntimeError, ValueError) as error:  # no such user; characters that no file name can have
        raise PathError(f"{_shown(name)} is not a valid path: {error}") from error
    _kind(path)
    return path


def exists(path: Path) -> bool:
    """Whether a path leads to anything; raises PathError if the system refuses to look."""
    return _kind(path) is not None


def is_file(path: Path) -> bool:
    """Whether a path leads to a regular file; raises PathError if the system refuses to look."""
    return _kind(path) == _FILE


def is_folder(path: Path) -> bool:
    """Whether a path leads to a folder; raises PathError if the system refuses to look."""
    return _kind(path) == _FOLDER


def _kind(path: Path) -> str | None:
    """`file`, `folder`, what else the path leads to, or None if it leads to nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno in _MISSING:
            return None
        raise PathError(f"{_shown(path)} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL character
        raise PathError(f"{_shown(path)} is not a valid path: {error}") from error
    return _FILE if stat.S_ISREG(mode) else _FOLDER if stat.S_ISDIR(mode) else _described(mode)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, without waiting: a FIFO, a socket, a device or a folder is refused.

    Raises:
        OSError: if it cannot be opened, or is not a regular file.
    """
    return open(path, "rb", opener=regular)


def regular(path: str | Path, flags: int) -> int:
    """The `opener` of `open` that `open_regular` uses, for files that are read in another mode."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, f"it is {_described(mode)}, not a regular file", str(path))
    return descriptor


def check_regular(path: Path, error: type[OpenELMError]) -> None:
    """Raise `error` unless a path leads to a readable regular file; for libraries that open paths themselves."""
    try:
        open_regular(path).close()
    except (OSError, ValueError) as reason:
        raise error(f"{_shown(path)} cannot be read: {_reason(reason)}") from reason


def read_bytes(path: Path, error: type[OpenELMError], max_bytes: int = LARGEST_TEXT_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        OpenELMError: as `error`, if it cannot be read or is larger than `max_bytes`.
    """
    try:
        with open_regular(path) as file:
            content = file.read(max_bytes + 1)
    except (OSError, ValueError) as reason:
        raise error(f"{_shown(path)} cannot be read: {_reason(reason)}") from reason
    if len(content) > max_bytes:
        raise error(f"{path} cannot be read: it is larger than {max_bytes:,} bytes")
    return content


def read_text(path: Path, error: type[OpenELMError], max_bytes: int = LARGEST_TEXT_BYTES) -> str:
    """The text of a regular file in UTF-8, with or without a byte order mark.

    Raises:
        OpenELMError: as `error`, if it cannot be read, is larger than `max_bytes`, or is not UTF-8.
    """
    content = read_bytes(path, error, max_bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{path} cannot be read: it is not UTF-8 text (byte {reason.start:,})") from reason


def check_links(folder: Path, names: Collection[str] = ()) -> Path:
    """Check that no file of a model folder is a link that leaves it; returns the folder.

    The folder itself may be a link, and the files of a snapshot in the hub's cache may be links to its blobs.

    Args:
        names: files that are read besides those with the usual endings.
    Raises:
        PathError: if a file that might be read leads elsewhere, or the folder cannot be listed.
    """
    try:
        allowed = [Path(os.path.realpath(folder))]
        snapshots, repository = allowed[0].parent, allowed[0].parent.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            allowed.append(repository / "blobs")
        with os.scandir(folder) as entries:
            links = [
                entry.path
                for entry in entries
                if entry.is_symlink() and (entry.name.endswith(_LINKED_SUFFIXES) or entry.name in names)
            ]
        for link in links:
            target = Path(os.path.realpath(link))
            if not any(target.is_relative_to(place) for place in allowed):
                raise PathError(f"{link} is a link to a file outside its folder; copy the file into the folder")
    except OSError as error:
        raise PathError(f"{folder} cannot be read: {error.strerror or error}") from error
    return folder


def _described(mode: int) -> str:
    return _OTHER_KINDS.get(stat.S_IFMT(mode), "a special file")


def _shown(path: str | Path) -> str:
    """A path for a message; a very long one, or one that is not text, is shortened and quoted."""
    text = str(path)
    return text if len(text) <= 300 and text.isprintable() else quoted(text)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
