"""What was downloaded first: revision, name and hash of each data file, so that a later download is the same."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from ..errors import DataError, OutputError
from ..files.json_file import read_json_object
from ..files.output import write_file
from ..files.paths import exists
from .task import DataSource


@dataclass(frozen=True)
class DataLock:
    """The first download of a data file.

    Attributes:
        repository: on the hub.
        revision: the commit that it was downloaded from.
        file: its path in the repository.
        sha256: of its content.
    """

    repository: str
    revision: str
    file: str
    sha256: str


def read_lock(source: DataSource, split: str) -> DataLock | None:
    """What is known of the first download of a split's file; `None` if there was none.

    Raises:
        DataError: if the file that says so is damaged.
    """
    path = _path(source, split)
    if not exists(path):
        return None
    values = read_json_object(path, DataError)
    return DataLock(values.text("repository"), values.text("revision"), values.text("file"), values.text("sha256"))


def write_lock(source: DataSource, split: str, lock: DataLock) -> None:
    """Record the first download of a split's file; a cache that cannot be written is used without."""
    with suppress(OutputError):
        write_file(_path(source, split), json.dumps(asdict(lock), indent=2) + "\n", overwrite=True)


def _path(source: DataSource, split: str) -> Path:
    """One file for each data file, beside the hub's cache, so that no process overwrites what another recorded."""
    from huggingface_hub import constants

    key = sha256(f"{source.revision}/{source.files[split]}".encode()).hexdigest()[:16]
    folder = Path(constants.HF_HUB_CACHE).parent / "openelm-mlx" / source.repository.replace("/", "--")
    return folder / f"{key}.json"
