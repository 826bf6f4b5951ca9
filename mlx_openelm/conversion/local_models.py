"""The models on this machine: those of the package, in the Hugging Face cache, and in a folder.

A folder may also hold adapters and training runs, which `--adapter` and `--model` take.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config import OpenELMConfig
from ..errors import ConfigError, OpenELMError, OutputError, SourceError
from ..files.json_file import read_json_object
from ..files.output import remove_folder
from ..files.paths import is_folder, user_path
from ..runs import best_checkpoint, is_run, step_of
from .read.config import config_of

BUILT_IN, CACHE, FOLDER = "built in", "Hugging Face cache", "folder"
MODEL, ADAPTER, RUN = "model", "adapter", "run"
_ASSETS = Path(__file__).parents[1] / "assets"
_DEPTH = 2  # of models in a folder: MODEL, or OWNER/MODEL as in the folders of LM Studio
_SIGNS = ("config.json", "adapter_config.json")
_WEIGHTS = (".safetensors", ".bin", ".npz")


@dataclass(frozen=True)
class LocalModel:
    """A model, an adapter or a training run on this machine.

    Times are those of the file system, which may note reading once a day or never.
    """

    name: str  # as `--model` takes it, or `--adapter`
    place: str  # BUILT_IN, CACHE or FOLDER
    folder: Path
    parameters: int | None  # None for an adapter: only its weights would tell
    storage: str  # such as `bfloat16`, `4-bit affine`, `incomplete`, `lora adapter` or `run, step 40`
    nbytes: int  # of all its files; in the cache, of all revisions
    last_used: datetime | None  # when its weights were last read
    kind: str = MODEL

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        used = None if self.last_used is None else self.last_used.isoformat(timespec="seconds")
        return {**asdict(self), "folder": str(self.folder), "last_used": used}


def local_models(folder: str | Path = ".") -> list[LocalModel]:
    """All OpenELM models of the package, in the Hugging Face cache, and in a folder or the folders in it.

    In a folder, adapters and training runs are listed too.

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
        found.append(_in_folder(os.path.normpath(name), place))
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
    elif model.kind == RUN:
        raise OutputError(f"{model.name} is a training run; remove its folder yourself")
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
    """Folders of models, adapters and runs: this one, or those within it; folders that cannot be read are left out."""
    if any(os.path.isfile(folder / name) for name in _SIGNS) or is_run(folder):
        yield folder
    elif depth:
        try:
            with os.scandir(folder) as entries:
                inner = sorted(entry.path for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        except OSError:
            return
        for path in inner:
            yield from _folders(Path(path), depth - 1)


def _in_folder(name: str, folder: Path) -> LocalModel | None:
    """The model, adapter or run in a folder; `None` if there is nothing that can be used."""
    if os.path.isfile(folder / "config.json"):
        return _model(name, FOLDER, folder, [folder])
    if os.path.isfile(folder / "adapter_config.json"):
        return _adapter(name, folder)
    best = best_checkpoint(folder)
    if best is None:
        return None
    trained = _in_folder(name, best)
    if trained is None:
        return None
    what = f"{RUN}, step {step_of(best):,}"
    return replace(trained, folder=folder, kind=RUN, storage=what, nbytes=_size([folder]))


def _adapter(name: str, folder: Path) -> LocalModel | None:
    """The adapter in a folder, from its configuration alone; `None` if that cannot be read."""
    try:
        written = read_json_object(folder / "adapter_config.json", ConfigError)
        method = written.get("fine_tune_type")
        if not isinstance(method, str) or not method.isidentifier():  # PEFT's, or an old one of mlx-lm
            method = "dora" if written.get("use_dora") is True else "lora"
        return LocalModel(
            name=name,
            place=FOLDER,
            folder=folder,
            parameters=None,
            storage=f"{method} adapter",
            nbytes=_size([folder]),
            last_used=_last_used(folder),
            kind=ADAPTER,
        )
    except (OpenELMError, OSError):
        return None


def _size(holders: Iterable[Path]) -> int:
    """Bytes of all files in some folders."""
    return sum(path.stat().st_size for holder in holders for path in holder.rglob("*") if path.is_file())


def _last_used(folder: Path) -> datetime | None:
    """When the weights in a folder were last read."""
    weights = (path.stat() for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
    used = max((found.st_atime for found in weights), default=None)
    return None if used is None else datetime.fromtimestamp(used).astimezone()


def _model(name: str, place: str, folder: Path, holders: list[Path]) -> LocalModel | None:
    """What a folder holds; `None` if it is no OpenELM."""
    try:
        written = read_json_object(folder / "config.json", ConfigError)
        config = config_of(written, folder / "config.json")
        weights = [path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file()]
        return LocalModel(
            name=name,
            place=place,
            folder=folder,
            parameters=config.num_parameters,
            storage=_storage(config, sum(path.stat().st_size for path in weights), written),
            nbytes=_size(holders),
            last_used=_last_used(folder),
        )
    except (OpenELMError, OSError):
        return None


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
