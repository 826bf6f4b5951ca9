"""Downloading from the Hugging Face hub: a short first contact, few retries, and a line where nothing arrives."""

import fnmatch
import logging
import queue
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import HubUnreachableError, OpenELMError, SourceError, one_line
from .files.paths import check_links

# The files to download from a repository; images and code are not needed, and PyTorch's weights only without others.
# The card says which licence the weights have.
_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "README.md"]
_TORCH_PATTERNS = ["pytorch_model*.bin"]
_TIMEOUT = 5.0  # seconds in which the hub must begin to answer
_FIRST_CONTACT = 8.0  # seconds for its first answer, the look-up of its address included
_RETRIES = 4  # of the hub's client, without progress in between
_LONGEST_WAIT = 20.0  # seconds that the hub may ask to wait before a retry
_SILENCE = 15.0  # seconds after which a line says what is being waited for
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RETRY = re.compile(r"Retrying in|Waiting (?P<seconds>[\d.]+)s before retry|Trying to resume")


def find_cached_file(repo_id: str, name: str) -> Path | None:
    """See `hub.cached_file`."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, name)
    return Path(found) if isinstance(found, str) else None


def fetch_file(repo_id: str, name: str) -> Path:
    """See `hub.download_file`."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo_id), progress_lines(repo_id) as progress, _few_retries(repo_id, progress):
        try:
            _file_names(repo_id, None)
        except Exception:
            cached = find_cached_file(repo_id, name)
            if cached is None:
                raise
            return cached
        return Path(hf_hub_download(repo_id, name, etag_timeout=_TIMEOUT))


def fetch_data_file(repo_id: str, name: str, revision: str | None) -> tuple[Path, str, str]:
    """See `hub.download_data_file`: the path in the cache, the name in the repository and the commit."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if revision is not None and _COMMIT.fullmatch(revision) and "*" not in name:
        found = try_to_load_from_cache(repo_id, name, revision=revision, repo_type="dataset")
        if isinstance(found, str):
            return Path(found), name, revision
    with _hub_errors(repo_id), progress_lines(repo_id, "dataset") as progress, _few_retries(repo_id, progress):
        answer = _data_answer(repo_id, revision)
        names = [file.rfilename for file in answer.siblings or []]
        matches = [known for known in names if known == name or fnmatch.fnmatchcase(known, name)]
        if len(matches) != 1:
            what = f"{len(matches)} files like {name}" if matches else f"no file {name}"
            raise SourceError(f"{repo_id} has {what} (revision {answer.sha})")
        path = hf_hub_download(repo_id, matches[0], revision=answer.sha, repo_type="dataset", etag_timeout=_TIMEOUT)
        return Path(path), matches[0], str(answer.sha)


def fetch_snapshot(repo_id: str, revision: str | None) -> Path:
    """The folder in the cache with the files of a repository; what is missing is downloaded.

    Raises:
        SourceError: if the repository or revision does not exist, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    def snapshot(patterns: list[str], **options: Any) -> Path:
        return check_links(Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, **options)))

    with _hub_errors(repo_id), progress_lines(repo_id) as progress, _few_retries(repo_id, progress):
        try:
            names = _file_names(repo_id, revision)
        except RevisionNotFoundError:
            raise
        except Exception as error:
            try:
                folder = snapshot(_PATTERNS, local_files_only=True)
                has_safetensors = any(folder.glob("*.safetensors"))
                return folder if has_safetensors else snapshot(_PATTERNS + _TORCH_PATTERNS, local_files_only=True)
            except LocalEntryNotFoundError:
                raise error from None
        has_safetensors = any(name.endswith(".safetensors") for name in names)
        return snapshot(_PATTERNS if has_safetensors else _PATTERNS + _TORCH_PATTERNS, etag_timeout=_TIMEOUT)


def _file_names(repo_id: str, revision: str | None) -> list[str]:
    """Names of a model repository's files; raises as `_first_answer` does."""
    return [file.rfilename for file in _first_answer(repo_id, revision).siblings or []]


@cache
def _data_answer(repo_id: str, revision: str | None) -> Any:
    """What the hub says about a data set; it is asked once, because a data set may have many files."""
    return _first_answer(repo_id, revision, "dataset")


def _first_answer(repo_id: str, revision: str | None, kind: str = "model") -> Any:
    """What the hub says about a repository. This is the first contact with the hub: short, without a retry, and in a
    thread of its own because the look-up of an address has no time limit.

    Raises:
        HubUnreachableError: if the hub does not answer, or not as a hub.
        Exception: an error of the hub's client: the hub answers, but refuses this repository.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise _unreachable(repo_id, "HF_HUB_OFFLINE is set")
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ask = _model_info if kind == "model" else _data_info
    threading.Thread(target=_put_result, args=(answers, ask, HfApi(), repo_id, revision), daemon=True).start()
    try:
        answer = answers.get(timeout=_FIRST_CONTACT)
    except queue.Empty:
        raise _unreachable(repo_id, "no answer") from None
    if isinstance(answer, Exception):
        status = getattr(getattr(answer, "response", None), "status_code", None)
        refused = status is not None and 400 <= status < 500 and status not in (408, 429)
        raise answer if refused or "Validation" in type(answer).__name__ else _unreachable(repo_id, answer)
    return answer


def _model_info(api: Any, repo_id: str, revision: str | None) -> Any:
    return api.model_info(repo_id, revision=revision, timeout=_TIMEOUT)


def _data_info(api: Any, repo_id: str, revision: str | None) -> Any:
    return api.dataset_info(repo_id, revision=revision, timeout=_TIMEOUT)


def _put_result(results: "queue.SimpleQueue[Any]", call: Callable[..., Any], *arguments: Any) -> None:
    try:
        results.put(call(*arguments))
    except Exception as error:
        results.put(error)


def _host() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc or constants.ENDPOINT


def _unreachable(repo_id: str, reason: object) -> HubUnreachableError:
    status = getattr(getattr(reason, "response", None), "status_code", None)
    what = f"the answer was status {status}" if status else one_line(reason)
    return HubUnreachableError(f"{repo_id} is not in the Hugging Face cache, and {_host()} cannot be reached: {what}")


class _Progress:
    """Whether the download of a repository advances, told by the size of its blobs in the cache."""

    def __init__(self, repo_id: str | None, kind: str = "model"):
        self._repo_id = repo_id
        self._kind = kind
        self._largest = self._size()

    def advanced(self) -> bool:
        """Whether there is more than ever before; a file that begins anew is no progress."""
        size = self._size()
        advanced = size > self._largest
        self._largest = max(size, self._largest)
        return advanced

    def _size(self) -> int:
        if self._repo_id is None:
            return 0
        from huggingface_hub import constants

        folder = Path(constants.HF_HUB_CACHE) / f"{self._kind}s--{self._repo_id.replace('/', '--')}" / "blobs"
        try:
            return sum(path.stat().st_size for path in folder.iterdir())
        except OSError:  # not there yet, or a file was renamed in between
            return 0


_watching = threading.Lock()


@contextmanager
def progress_lines(repo_id: str | None = None, kind: str = "model") -> Iterator[_Progress]:
    """Warn every 15 seconds that pass without progress in the download of `repo_id`; the outermost context does."""
    progress = _Progress(repo_id, kind)
    if not _watching.acquire(blocking=False):
        yield progress
        return
    done = threading.Event()

    def watch() -> None:
        started = time.monotonic()
        watched = _Progress(repo_id, kind)
        while not done.wait(_SILENCE):
            if not watched.advanced():
                waited = time.monotonic() - started
                warnings.warn(f"still waiting for {_host()} after {waited:.0f} seconds", stacklevel=1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield progress
    finally:
        done.set()
        _watching.release()


class _FewRetries(logging.Handler):
    """Receives what the hub's client would print, and ends its retries where they lead nowhere."""

    def __init__(self, repo_id: str, progress: _Progress):
        super().__init__()
        self._repo_id = repo_id
        self._progress = progress
        self._left = _RETRIES
        self._last = ""

    def handle(self, record: logging.LogRecord) -> bool:  # not `emit`: the hub's own filters do not matter here
        message = record.getMessage()
        retry = _RETRY.search(message)
        if retry is None or message.startswith("Error while"):
            self._last = message
        if retry is not None:
            self._left = _RETRIES if self._progress.advanced() else self._left - 1
            if float(retry["seconds"] or 0) > _LONGEST_WAIT:
                raise _unreachable(self._repo_id, f"it limits requests; try again in {retry['seconds']} seconds")
            if self._left < 0:
                raise _unreachable(self._repo_id, self._last)
        return True


@contextmanager
def _few_retries(repo_id: str, progress: _Progress) -> Iterator[None]:
    """Within this context the hub's client prints no warnings, and gives up sooner."""
    import huggingface_hub  # noqa: F401 -- sets up its logger

    logger = logging.getLogger("huggingface_hub")
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [_FewRetries(repo_id, progress)], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before


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
    except OpenELMError:
        raise
    except GatedRepoError as error:
        raise SourceError(f"{repo_id} is gated: request access on its page, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{repo_id} is neither a local folder nor a repository on the Hugging Face hub") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repo_id} has no such revision") from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(repo_id, error.__cause__ or "its connection was lost") from error
    except EntryNotFoundError as error:
        raise SourceError(f"{repo_id} has no such file") from error
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        raise SourceError(f"{repo_id} cannot be downloaded: {one_line(error)}") from error
