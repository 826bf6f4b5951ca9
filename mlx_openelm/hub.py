"""Locating model folders: on disk, in this package, or on the Hugging Face hub."""

import re
from pathlib import Path

from .errors import SourceError
from .files.paths import check_links, exists, is_folder, user_path

BUILT_IN_MODEL = "openelm-tiny"  # continues text
BUILT_IN_CHAT_MODEL = "openelm-tiny-instruct"
_ASSETS = Path(__file__).parent / "assets"
BUILT_IN_MODELS = {name: _ASSETS / name for name in (BUILT_IN_MODEL, BUILT_IN_CHAT_MODEL)}  # included in the package

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_folder(name: str | Path, revision: str | None = None) -> Path:
    """The model folder for a path, a hub id, or the name of a built-in model.

    A model on the hub is downloaded unless it is cached; an interrupted download is resumed.

    Args:
        revision: branch, tag or commit of the repository on the hub.
    Raises:
        SourceError: if the folder or repository does not exist, or the hub cannot be reached.
    """
    path = user_path(name)
    if is_folder(path):
        return check_links(path)
    if str(name) in BUILT_IN_MODELS:
        return BUILT_IN_MODELS[str(name)]
    if exists(path):
        raise SourceError(f"{name} is a file; a model is a folder (use `convert` for .pt files)")
    if isinstance(name, Path) or not _REPO_ID.fullmatch(name) or name.startswith("."):
        raise SourceError(f"{name} does not exist; expected a folder, or a hub id like apple/OpenELM-270M-Instruct")
    return _download(name, revision)


def cached_file(repo_id: str, name: str) -> Path | None:
    """The path of a file of a hub repository in the local cache; `None` if it is not cached."""
    from .hub_client import find_cached_file

    return find_cached_file(repo_id, name)


def download_file(repo_id: str, name: str) -> Path:
    """Download one file of a hub repository, unless it is cached; returns its path.

    Raises:
        HubUnreachableError: if the hub does not answer: then no other repository needs to be tried.
        SourceError: if the repository or file does not exist or is not open to this user.
    """
    from .hub_client import fetch_file

    return fetch_file(repo_id, name)


def _download(repo_id: str, revision: str | None) -> Path:
    from .hub_client import fetch_snapshot

    return fetch_snapshot(repo_id, revision)
