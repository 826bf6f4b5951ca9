"""Folders of models: on this disk, in this package, or downloaded from the Hugging Face hub by name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SourceError

BUILT_IN_MODEL = "openelm-tiny"  # comes with the package
_BUILT_IN_FOLDER = Path(__file__).parent / "assets" / BUILT_IN_MODEL

# All that is needed of a repository; the rest (PyTorch copies, pictures, code) stays where it is.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model"]
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder that a path, the built-in model's name or a hub id means.

    A hub's model is downloaded if need be; a download that was cut off goes on.

    Args:
        revision: branch, tag or commit of the hub's repository.
    Raises:
        SourceError: if there is no such folder, no such repository, or no way to reach it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if str(name) == BUILT_IN_MODEL:
        return _BUILT_IN_FOLDER
    if path.exists():
        raise SourceError(f"{name} is a file; a model is a folder (`convert` takes .pt files)")
    if isinstance(name, Path) or not _REPO_ID.fullmatch(name) or name.startswith("."):
        raise SourceError(f"{name} does not exist; give a folder, or a hub id like apple/OpenELM-270M-Instruct")
    return _download(name, revision)


def cached_file(repo_id: str, name: str) -> Path | None:
    """A file of a hub repository if it was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, name)
    return Path(found) if isinstance(found, str) else None


def download_file(repo_id: str, name: str) -> Path:
    """One file of a hub repository.

    Raises:
        SourceError: if it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo_id):
        return Path(hf_hub_download(repo_id, name, etag_timeout=5))


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(repo_id):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS))


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line."""
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
        raise SourceError(f"{repo_id} needs permission: ask for it on its page, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{repo_id} is neither a folder here nor a repository on the Hugging Face hub") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repo_id} has no such revision") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{repo_id} is neither a folder here nor in the Hugging Face cache, and the hub cannot be reached"
        ) from error
    except EntryNotFoundError as error:
        raise SourceError(f"{repo_id} does not hold the file") from error
    except Exception as error:  # the hub's client lets errors of several HTTP libraries through
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{repo_id} cannot be downloaded: {reason[:200]}") from error
