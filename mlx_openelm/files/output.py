"""Writing without loss: new content is written aside under a lock, then renamed, so that old or new is always there.

* Links are resolved first: what is written is where they lead.
* A folder lists what was written into it (`manifest`). It is replaced or removed only if all its files are listed and
  unchanged, and never if a source of the operation or the current folder lies in it.
* What was not there at the start is not replaced at the end.
* Temporary names are unpredictable and lie beside the target. The next process that locks the target removes what a
  killed one left, or puts it back (`lock`).
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
from .names import aside_name, identity, reported
from .rename import exchange, rename_new


class OutputFile:
    """A file that nobody else may write; `output_file` makes it."""

    def __init__(self, name: Path, target: Path, overwrite: bool):
        self.name = name
        self.path = target
        self._found = identity(target)
        if target.is_dir():
            raise OutputError(f"{name} is a folder; a file is needed here")
        if self._found is not None and not stat.S_ISREG(os.lstat(target).st_mode):
            raise OutputError(f"{name} is not a regular file, and only those are replaced")
        if self._found is not None and not overwrite:
            raise OutputExistsError(name)

    def protect(self, *sources: str | Path | None) -> None:
        """Make sure that the file is none that the operation reads.

        Raises:
            OutputError: if it is one of the sources.
        """
        for source in _existing(sources):
            if self._found is not None and source.samefile(self.path):
                raise OutputError(f"{self.name} is also an input; choose another `output`")

    def write(self, content: str | bytes) -> None:
        """Write the whole content at once; see `replaced`."""
        with self.replaced() as file:
            file.write(content.encode() if isinstance(content, str) else content)

    def remove(self) -> None:
        """Remove the file, unless another one has taken its place."""
        with reported(self.name):
            if self._found is not None and identity(self.path, content=False) == self._found[:2]:
                os.unlink(self.path)
            self._found = None

    @contextmanager
    def replaced(self) -> Iterator[BinaryIO]:
        """A file to write the new content to. It takes its place when the block is done; if that fails, it goes.

        Raises:
            OutputError: if it cannot be written, or somebody else has changed the file in the meantime.
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
    """A folder that nobody else may write; `output_folder` makes it."""

    def __init__(self, name: Path, target: Path, overwrite: bool):
        self.name = name
        self.path = target
        self._found = identity(target)
        if self._found is None:
            return
        if not overwrite:
            raise OutputExistsError(name)
        if not target.is_dir():
            raise OutputError(f"{name} is not a folder; a folder is needed here")
        with suppress(FileNotFoundError):  # the current folder was deleted
            if _lies_in(Path.cwd(), target):
                raise OutputError(f"replacing {name} would remove the current folder; choose another `output`")
        self._check_foreign()

    def protect(self, *sources: str | Path | None) -> None:
        """Make sure that replacing the folder does not remove what the operation reads.

        Raises:
            OutputError: if a source, or a file that a link in it leads to, lies in the folder that would be replaced.
        """
        for source in _existing(sources) if self._found is not None else ():
            for entry in (source, *(source.iterdir() if source.is_dir() else ())):
                if _lies_in(Path(os.path.realpath(entry)), self.path):
                    raise OutputError(
                        f"replacing {self.name} would remove its source {source}; choose another `output`"
                    )

    @contextmanager
    def replaced(self, durable: bool = False) -> Iterator[Path]:
        """A folder to write the new content into. It takes its place when the block is done; if that fails, it goes.

        Args:
            durable: have it on disk before the block is left, because something else is given up for it.
        Raises:
            OutputError: if it cannot be written, or somebody else has changed the folder in the meantime.
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
        """Put the new content where the old one is, and remove that."""
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
                f"{self.name} cannot be replaced: openelm-mlx did not write {', '.join(names)}, or it was "
                "changed since; choose another `output`"
            )


@contextmanager
def output_file(path: str | Path, *, overwrite: bool = False) -> Iterator[OutputFile]:
    """A file to be written, locked against other processes until the block is left.

    Args:
        path: a link is followed; folders above are made, and removed again if the file does not come about.
        overwrite: whether an existing file may be replaced.
    Raises:
        OutputExistsError: if it exists and may not be replaced.
        OutputLockedError: if another process is writing it.
        OutputError: if it is not a regular file, or cannot be written.
    """
    with lock(path) as target:
        with reported(Path(path)):
            output = OutputFile(Path(path), target, overwrite)
        yield output


@contextmanager
def output_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[OutputFolder]:
    """A folder to be written, locked against other processes until the block is left.

    Args:
        path: a link is followed; folders above are made, and removed again if the folder does not come about.
        overwrite: whether a folder that this package wrote may be replaced.
    Raises:
        OutputExistsError: if it exists and may not be replaced.
        OutputLockedError: if another process is writing it.
        OutputError: if replacing it would remove anything that this package did not write, or it cannot be written.
    """
    with lock(path) as target:
        with reported(Path(path)):
            output = OutputFolder(Path(path), target, overwrite)
        yield output


def write_file(path: str | Path, content: str | bytes, *, overwrite: bool = False) -> None:
    """Write a whole file at once; see `output_file`."""
    with output_file(path, overwrite=overwrite) as output:
        output.write(content)


def remove_folder(folder: Path) -> bool:
    """Remove a folder if this package wrote all that is in it and nothing was changed since; whether it was removed.

    It disappears at once: a killed process leaves no half of it.

    Raises:
        OutputError: if the folder cannot be read or renamed.
    """
    with reported(folder):
        if identity(folder) is None or folder.is_symlink() or any(foreign(folder)):
            return False
    with reported(folder):
        gone = aside_name(folder, "old")
        rename_new(folder, gone)
    with suppress(OSError):  # the next process that locks the folder above does it
        remove_written(gone)
    return True


def move_away(path: Path, name: str) -> Path:
    """Rename a file or folder within its folder, with a number behind `name` if that is taken; where it is now.

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
    """Rename what was written to a target that did not exist at the start."""
    try:
        rename_new(aside, target)
    except FileExistsError:
        raise _changed(name) from None


def _changed(name: Path) -> OutputError:
    return OutputError(f"another process wrote {name} in the meantime; it was left as it is")


def _existing(sources: tuple[str | Path | None, ...]) -> Iterator[Path]:
    """The sources that are files or folders on this machine."""
    for source in sources:
        with suppress(OSError):  # a name too long for a path
            if source and Path(source).exists():
                yield Path(source)


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it."""
    return any(place.exists() and place.samefile(folder) for place in (path, *path.parents))
