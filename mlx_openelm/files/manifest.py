"""Manifests: a record of what this package wrote into a folder, so that nothing else is ever replaced or removed.

The manifest of a complete folder lists its files with a signature of each. A folder that is still being written
contains a marker file, `UNFINISHED`.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..errors import OpenELMError, OutputError
from ..version import __version__
from .json_file import read_json_object

MANIFEST = ".openelm-mlx.json"
UNFINISHED = ".openelm-mlx.unfinished"
_CLUTTER = {".DS_Store"}  # macOS creates it in every folder opened in Finder
_LONGEST_MANIFEST = 1 << 24  # bytes
_BLOCK_BYTES, _BLOCKS = 1 << 16, 16


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder, which lists all its files."""
    files = {str(path.relative_to(folder)): _signature(path) for path in _files(folder) if path.name != UNFINISHED}
    values = {"openelm_mlx_version": __version__, "files": files}
    (folder / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        values = read_json_object(folder / MANIFEST, OutputError, optional=True, max_bytes=_LONGEST_MANIFEST)
        return dict(values.table("files"))
    except OpenELMError:  # whatever stands there, this package did not write it
        return {}


def foreign(folder: Path) -> Iterator[str]:
    """Relative names of what this package did not write into a folder, or what changed since."""
    listed = _read_manifest(folder)
    folders = {parent for name in listed for parent in Path(name).parents}
    for path in _files(folder):
        name = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            ours = name in folders
        elif path.name in _CLUTTER or name in (Path(MANIFEST), Path(UNFINISHED)):
            ours = bool(listed)
        else:
            ours = str(name) in listed and _is_unchanged(path, listed[str(name)])
        if not ours:
            yield str(name)


def _is_unchanged(path: Path, mark: object) -> bool:
    """Whether a file still matches its manifest entry; for a large file, the modification time must match too."""
    found = _signature(path)
    if not isinstance(mark, dict) or not found or found["bytes"] > _BLOCK_BYTES * _BLOCKS:
        return bool(found) and found == mark
    return found["bytes"] == mark.get("bytes") and found["blake2b"] == mark.get("blake2b")


def _files(folder: Path) -> Iterator[Path]:
    """All files and links below a folder, and all empty folders."""
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and any(Path(entry.path).iterdir()):
                waiting.append(Path(entry.path))
            else:
                yield Path(entry.path)


def _signature(path: Path) -> dict[str, Any]:
    """Size, modification time and hash of a regular file; of a large file, only blocks spread over it are hashed."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        return {}
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        for number in range(_BLOCKS + 1):
            file.seek(max(0, found.st_size - _BLOCK_BYTES) * number // _BLOCKS)
            digest.update(file.read(_BLOCK_BYTES))
    return {"bytes": found.st_size, "modified_ns": found.st_mtime_ns, "blake2b": digest.hexdigest()}


def flush(folder: Path) -> None:
    """Flush all files of a folder to disk (fsync)."""
    for path in _files(folder):
        if path.is_file():
            _sync(path)
    _sync(folder)


def flush_entry(path: Path) -> None:
    """Flush the directory entry of a file or folder to disk (fsync)."""
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def touch(path: Path) -> None:
    """Create an empty file; fails if it exists."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def remove_unfinished(folder: Path) -> None:
    """Remove a folder that contains `UNFINISHED`; the marker goes last, so that the folder stays recognizable."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name != UNFINISHED:
                os.unlink(entry.path)
    with suppress(FileNotFoundError):
        os.unlink(folder / UNFINISHED)
    os.rmdir(folder)


def remove_written(folder: Path) -> None:
    """Remove the listed files of a folder, then the manifest, then the folder if it is empty."""
    listed = _read_manifest(folder)
    folders = set()
    for path in list(_files(folder)):
        name = path.relative_to(folder)
        folders |= set(name.parents)
        if path.is_dir() and not path.is_symlink():
            folders.add(name)
        elif str(name) in listed or path.name in _CLUTTER:
            os.unlink(path)
    for name in sorted(folders - {Path()}, reverse=True):
        os.rmdir(folder / name)
    left = os.listdir(folder)
    if left == [MANIFEST]:
        os.unlink(folder / MANIFEST)
    os.rmdir(folder)  # fails if anything else is left
