"""Locating model folders: on disk, in this package, or on the Hugging Face hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import SourceError
from .files.paths import check_links, exists, is_folder, user_path
from .runs import trained_model

BUILT_IN_MODEL = "openelm-tiny"  # continues text
BUILT_IN_CHAT_MODEL = "openelm-tiny-instruct"
_ASSETS = Path(__file__).parent / "assets"
BUILT_IN_MODELS = {name: _ASSETS / name for name in (BUILT_IN_MODEL, BUILT_IN_CHAT_MODEL)}  # included in the package

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_folder(name: str | Path, revision: str | None = None) -> Path:
    """The model folder for a path, a hub id, or the name of a built-in model.

    The folder of a training run stands for its best checkpoint. A model on the hub is downloaded unless it is cached;
    an interrupted download is resumed.

    Args:
        revision: branch, tag or commit of the repository on the hub.
    Raises:
        SourceError: if the folder or repository does not exist, or the hub cannot be reached.
    """
    path = user_path(name)
    if is_folder(path):
        return check_links(trained_model(path))
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


@dataclass(frozen=True)
class DownloadedFile:
    """A file of a data set on the hub.

    Attributes:
        path: where it is in the cache.
        name: its path in the repository.
        revision: the commit that it comes from.
    """

    path: Path
    name: str
    revision: str


def download_data_file(repo_id: str, name: str, revision: str | None = None) -> DownloadedFile:
    """Download one file of a data set on the hub, unless it is cached.

    Args:
        name: path of the file in the repository; `*` stands for any characters.
        revision: commit, branch or tag; by default the newest. The hub is not asked about a cached file of a commit.
    Raises:
        HubUnreachableError: if the hub does not answer.
        SourceError: if the repository does not exist, or not exactly one of its files has that name.
    """
    from .hub_client import fetch_data_file

    return DownloadedFile(*fetch_data_file(repo_id, name, revision))


def _download(repo_id: str, revision: str | None) -> Path:
    from .hub_client import fetch_snapshot

    return fetch_snapshot(repo_id, revision)
