"""The models on this machine: those of the package, in the Hugging Face cache, and in a folder."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config import OpenELMConfig
from ..errors import ConfigError, OpenELMError, OutputError, SourceError
from ..files.json_file import read_json_object
from ..files.output import remove_folder
from ..files.paths import is_folder, user_path
from .read.config import config_of

BUILT_IN, CACHE, FOLDER = "built in", "Hugging Face cache", "folder"
_ASSETS = Path(__file__).parents[1] / "assets"
_DEPTH = 2  # of models in a folder: MODEL, or OWNER/MODEL as in the folders of LM Studio
_WEIGHTS = (".safetensors", ".bin", ".npz")


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine. Times are those of the file system, which may note reading once a day or never."""

    name: str  # as `--model` takes it
    place: str  # BUILT_IN, CACHE or FOLDER
    folder: Path
    parameters: int
    storage: str  # such as `bfloat16`, `4-bit affine` or `incomplete`
    nbytes: int  # of all its files; in the cache, of all revisions
    last_used: datetime | None  # when its weights were last read

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        used = None if self.last_used is None else self.last_used.isoformat(timespec="seconds")
        return {**asdict(self), "folder": str(self.folder), "last_used": used}


def local_models(folder: str | Path = ".") -> list[LocalModel]:
    """All OpenELM models of the package, in the Hugging Face cache, and in a folder or the folders in it.

    No weights are opened, so that looking is no use.

    Raises:
        SourceError: if the folder does not exist.
    """
    path = user_path(folder)
    if not is_folder(path):
        raise SourceError(f"{folder} is not a folder")
    found = [_model(place.name, BUILT_IN, place, [place]) for place in built_in_models()]
    for repository in sorted(_cache().glob("models--*--*")):
        if (snapshot := _snapshot(repository)) is not None:
            name = repository.name.removeprefix("models--").replace("--", "/", 1)
            found.append(_model(name, CACHE, snapshot, [repository / "blobs"]))
    for place in _folders(path, _DEPTH):
        name = str(folder) if place == path else os.path.join(folder, place.relative_to(path))
        found.append(_model(os.path.normpath(name), FOLDER, place, [place]))
    return [model for model in found if model is not None]


def built_in_models() -> list[Path]:
    """Folders of the models that come with the package."""
    return sorted(path.parent for path in _ASSETS.glob("*/config.json"))


def remove_model(model: LocalModel) -> None:
    """Remove a model from the disk.

    Raises:
        SourceError: if it belongs to the package.
        OutputError: if its folder holds anything that this package did not write, or that was changed since.
    """
    if model.place == BUILT_IN:
        raise SourceError(f"{model.name} belongs to the package and cannot be removed alone")
    if model.place == CACHE:
        repository = model.folder.parents[1]
        shutil.rmtree(repository / "refs", ignore_errors=True)  # first: without it nothing seems to be cached
        shutil.rmtree(repository)
        shutil.rmtree(repository.parent / ".locks" / repository.name, ignore_errors=True)
    elif not remove_folder(model.folder):
        raise OutputError(
            f"{model.name} holds files that openelm-mlx did not write, or that were changed since; "
            "look at them and remove the folder yourself"
        )


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _snapshot(repository: Path) -> Path | None:
    """The files of a repository in the cache: of its main branch, or of the revision that came last."""
    try:
        main = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = None
    if main is not None and main.is_dir():
        return main
    snapshots = [path for path in (repository / "snapshots").glob("*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """Folders with a config.json: this one, or those within it; folders that cannot be read are left out."""
    if os.path.isfile(folder / "config.json"):
        yield folder
    elif depth:
        try:
            with os.scandir(folder) as entries:
                inner = sorted(entry.path for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        except OSError:
            return
        for path in inner:
            yield from _folders(Path(path), depth - 1)


def _model(name: str, place: str, folder: Path, holders: list[Path]) -> LocalModel | None:
    """What a folder holds; `None` if it is no OpenELM."""
    try:
        written = read_json_object(folder / "config.json", ConfigError)
        config = config_of(written, folder / "config.json")
        files = [path.stat() for holder in holders for path in holder.rglob("*") if path.is_file()]
        weights = [path.stat() for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file()]
    except (OpenELMError, OSError):
        return None
    used = max((found.st_atime for found in weights), default=None)
    return LocalModel(
        name=name,
        place=place,
        folder=folder,
        parameters=config.num_parameters,
        storage=_storage(config, sum(found.st_size for found in weights), written),
        nbytes=sum(found.st_size for found in files),
        last_used=None if used is None else datetime.fromtimestamp(used).astimezone(),
    )


def _storage(config: OpenELMConfig, nbytes: int, written: Mapping[str, Any]) -> str:
    """How the weights are stored, from the configuration and their size."""
    quantization, dtype = written.get("quantization"), written.get("torch_dtype")
    if not nbytes:
        return "incomplete"
    if isinstance(quantization, dict):
        return f"{quantization.get('bits', '?')}-bit {quantization.get('mode', 'affine')}"
    if isinstance(dtype, str) and dtype.isidentifier():
        return dtype
    return "16-bit" if nbytes * 8 < 24 * config.num_parameters else "32-bit"
