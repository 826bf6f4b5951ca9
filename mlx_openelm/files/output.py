"""Safe writing: new content is written aside under a lock, then renamed, so that the old or the new always exists.

* Links are resolved first: the target of a link is replaced, not the link.
* A folder lists what was written into it (`manifest`). It is replaced or removed only if all its files are listed and
  unchanged, and never if it contains a source of the operation or the current folder.
* If the target did not exist at the start, nothing is replaced at the end.
* Temporary names are unpredictable and are created beside the target. The next process that locks the target removes
  the leftovers of a killed one, or puts them back (`lock`).
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from ..errors import OutputError, OutputExistsError
from .lock import lock
from .manifest import (
    UNFINISHED,
    flush,
    flush_entry,
    foreign,
    remove_unfinished,
    remove_written,
    touch,
    write_manifest,
)
from .names import aside_name, check_folder_name, identity, reported
from .rename import exchange, rename_new


class OutputFile:
    """An output file that this process has locked; created by `output_file`."""

    def __init__(self, name: Path, target: Path, overwrite: bool):
        self.name = name
        self.path = target
        self._found = identity(target)
        if target.is_dir():
            raise OutputError(f"{name} is a folder; expected a file")
        if self._found is not None and not stat.S_ISREG(os.lstat(target).st_mode):
            raise OutputError(f"{name} is not a regular file; only regular files can be replaced")
        if self._found is not None and not overwrite:
            raise OutputExistsError(name)

    def protect(self, *sources: str | Path | None) -> None:
        """Make sure that the operation does not read this file.

        Raises:
            OutputError: if the file is one of the sources.
        """
        for source in _existing(sources):
            if self._found is not None and source.samefile(self.path):
                raise OutputError(f"{self.name} is also an input; choose another `output`")

    def write(self, content: str | bytes) -> None:
        """Write the whole content; see `replaced`."""
        with self.replaced() as file:
            file.write(content.encode() if isinstance(content, str) else content)

    def remove(self) -> None:
        """Remove the file, unless it was replaced by another one."""
        with reported(self.name):
            if self._found is not None and identity(self.path, content=False) == self._found[:2]:
                os.unlink(self.path)
            self._found = None

    @contextmanager
    def replaced(self) -> Iterator[BinaryIO]:
        """Yield a temporary file for the new content, renamed to the target after the block; removed on failure.

        Raises:
            OutputError: if it cannot be written, or another process has changed the file in the meantime.
        """
        aside = aside_name(self.path, "new")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
        try:
            with reported(self.name):
                descriptor = os.open(aside, flags, 0o666 if self._found is None else 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(descriptor)
                if self._found is None:
                    _put(aside, self.path, self.name)
                elif identity(self.path) == self._found:
                    os.chmod(aside, stat.S_IMODE(os.lstat(self.path).st_mode))
                    os.replace(aside, self.path)
                else:
                    raise _changed(self.name)
                self._found = identity(self.path)
        finally:
            with suppress(OSError):
                os.unlink(aside)


class OutputFolder:
    """An output folder that this process has locked; created by `output_folder`."""

    def __init__(self, name: Path, target: Path, overwrite: bool):
        self.name = name
        self.path = target
        self._found = identity(target)
        if self._found is None:
            return
        if not overwrite:
            raise OutputExistsError(name)
        if not target.is_dir():
            raise OutputError(f"{name} is not a folder; expected a folder")
        with suppress(FileNotFoundError):  # the current folder was deleted
            if _lies_in(Path.cwd(), target):
                raise OutputError(f"replacing {name} would remove the current folder; choose another `output`")
        self._check_foreign()

    def protect(self, *sources: str | Path | None) -> None:
        """Make sure that replacing the folder does not remove what the operation reads.

        Raises:
            OutputError: if a source, or the target of a link in a source, is inside the folder to be replaced.
        """
        for source in _existing(sources) if self._found is not None else ():
            for entry in (source, *(source.iterdir() if source.is_dir() else ())):
                if _lies_in(Path(os.path.realpath(entry)), self.path):
                    raise OutputError(
                        f"replacing {self.name} would remove its source {source}; choose another `output`"
                    )

    @contextmanager
    def replaced(self, durable: bool = False) -> Iterator[Path]:
        """Yield a temporary folder for the new content, renamed to the target after the block; removed on failure.

        Args:
            durable: flush a new folder to disk too, because the caller then removes something that it supersedes.
        Raises:
            OutputError: if it cannot be written, or another process has changed the folder in the meantime.
        """
        aside = aside_name(self.path, "new")
        own: tuple[int, ...] | None = None
        try:
            with reported(self.name, within=aside):
                os.mkdir(aside, 0o777 if self._found is None else 0o700)
                own = identity(aside)
                touch(aside / UNFINISHED)
                yield aside
                write_manifest(aside)
                if durable or self._found is not None:
                    flush(aside)
                if self._found is None:
                    os.unlink(aside / UNFINISHED)
                    _put(aside, self.path, self.name)
                else:
                    self._exchange(aside)
                if durable or self._found is not None:
                    flush_entry(self.path)
                self._found = identity(self.path)
        finally:
            with suppress(OSError):  # the next process that writes here removes it
                if own is not None and identity(aside) == own:
                    remove_unfinished(aside)

    def _exchange(self, aside: Path) -> None:
        """Exchange the old content for the new, then remove the old."""
        os.chmod(aside, stat.S_IMODE(os.lstat(self.path).st_mode))
        if identity(self.path) != self._found:
            raise _changed(self.name)
        self._check_foreign()
        os.unlink(aside / UNFINISHED)
        exchange(aside, self.path)
        with suppress(OSError):  # the next process that writes here removes it
            gone = aside_name(self.path, "old")
            rename_new(aside, gone)
            remove_written(gone)

    def _check_foreign(self) -> None:
        if names := list(islice(foreign(self.path), 4)):
            raise OutputError(
                f"{self.name} cannot be replaced: openelm-mlx did not write {', '.join(names)}, or the content "
                "changed since; choose another `output`"
            )


@contextmanager
def output_file(path: str | Path, *, overwrite: bool = False) -> Iterator[OutputFile]:
    """A file to write, locked against other writers while the block runs.

    Args:
        path: links are followed; parent folders are created, and removed again if the file is not written.
        overwrite: whether an existing file may be replaced.
    Raises:
        OutputExistsError: if the file exists and may not be replaced.
        OutputLockedError: if another process is writing it.
        OutputError: if it is not a regular file, or cannot be written.
    """
    with lock(path) as target:
        with reported(Path(path)):
            output = OutputFile(Path(path), target, overwrite)
        yield output


@contextmanager
def output_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[OutputFolder]:
    """A folder to write, locked against other writers while the block runs.

    Args:
        path: links are followed; parent folders are created, and removed again if the folder is not written.
        overwrite: whether a folder that this package wrote may be replaced.
    Raises:
        OutputExistsError: if the folder exists and may not be replaced.
        OutputLockedError: if another process is writing it.
        OutputError: if replacing it would remove anything that this package did not write, or it cannot be written, or
            it has the name of a model file.
    """
    check_folder_name(path)
    with lock(path) as target:
        with reported(Path(path)):
            output = OutputFolder(Path(path), target, overwrite)
        yield output


def write_file(path: str | Path, content: str | bytes, *, overwrite: bool = False) -> None:
    """Write a whole file; see `output_file`."""
    with output_file(path, overwrite=overwrite) as output:
        output.write(content)


def remove_folder(folder: Path) -> bool:
    """Remove a folder if this package wrote all of its content and nothing changed since; returns whether it did.

    The folder is renamed first, so a killed process never leaves it half removed under its own name.

    Raises:
        OutputError: if the folder cannot be read or renamed.
    """
    with reported(folder):
        if identity(folder) is None or folder.is_symlink() or any(foreign(folder)):
            return False
    with reported(folder):
        gone = aside_name(folder, "old")
        rename_new(folder, gone)
    with suppress(OSError):  # the next process that locks the parent folder removes it
        remove_written(gone)
    return True


def move_away(path: Path, name: str) -> Path:
    """Rename a file or folder to `name` in the same parent, with a number appended if taken; returns the new path.

    Raises:
        OutputError: if it cannot be renamed.
    """
    with reported(path):
        number = 1
        while True:
            target = path.with_name(name if number == 1 else f"{name}-{number}")
            try:
                rename_new(path, target)
            except FileExistsError:
                number += 1
            else:
                return target


def _put(aside: Path, target: Path, name: Path) -> None:
    """Rename the new content to a target that did not exist at the start."""
    try:
        rename_new(aside, target)
    except FileExistsError:
        raise _changed(name) from None


def _changed(name: Path) -> OutputError:
    return OutputError(f"another process wrote {name} in the meantime; it was not replaced")


def _existing(sources: tuple[str | Path | None, ...]) -> Iterator[Path]:
    """The sources that are existing files or folders."""
    for source in sources:
        with suppress(OSError):  # a name too long for a path
            if source and Path(source).exists():
                yield Path(source)


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is the folder or is inside it."""
    return any(place.exists() and place.samefile(folder) for place in (path, *path.parents))
