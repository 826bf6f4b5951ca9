"""Locating model folders: on disk, in this package, or on the Hugging Face hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SourceError
from .files.paths import check_links, exists, is_folder, user_path

BUILT_IN_MODEL = "openelm-tiny"  # included in the package
_BUILT_IN_FOLDER = Path(__file__).parent / "assets" / BUILT_IN_MODEL

# The files to download from a repository; PyTorch copies, images and code are not needed.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model"]
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_folder(name: str | Path, revision: str | None = None) -> Path:
    """The model folder for a path, a hub id, or the name of the built-in model.

    A model on the hub is downloaded unless it is cached; an interrupted download is resumed.

    Args:
        revision: branch, tag or commit of the repository on the hub.
    Raises:
        SourceError: if the folder or repository does not exist, or the hub cannot be reached.
    """
    path = user_path(name)
    if is_folder(path):
        return check_links(path)
    if str(name) == BUILT_IN_MODEL:
        return _BUILT_IN_FOLDER
    if exists(path):
        raise SourceError(f"{name} is a file; a model is a folder (use `convert` for .pt files)")
    if isinstance(name, Path) or not _REPO_ID.fullmatch(name) or name.startswith("."):
        raise SourceError(f"{name} does not exist; expected a folder, or a hub id like apple/OpenELM-270M-Instruct")
    return _download(name, revision)


def cached_file(repo_id: str, name: str) -> Path | None:
    """The path of a file of a hub repository in the local cache; `None` if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, name)
    return Path(found) if isinstance(found, str) else None


def download_file(repo_id: str, name: str) -> Path:
    """Download one file of a hub repository, unless it is cached; returns its path.

    Raises:
        SourceError: if it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo_id):
        return Path(hf_hub_download(repo_id, name, etag_timeout=5))


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(repo_id):
        return check_links(Path(snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS)))


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn exceptions of the hub's client into a `SourceError` with a one-line message."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise SourceError(f"{repo_id} is gated: request access on its page, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{repo_id} is neither a local folder nor a repository on the Hugging Face hub") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repo_id} has no such revision") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{repo_id} is neither a local folder nor in the Hugging Face cache, and the hub cannot be reached"
        ) from error
    except EntryNotFoundError as error:
        raise SourceError(f"{repo_id} has no such file") from error
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{repo_id} cannot be downloaded: {reason[:200]}") from error
