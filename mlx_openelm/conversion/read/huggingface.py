"""Folders in the Hugging Face layout, from Apple, the MLX community or `convert`."""

import json
from pathlib import Path
from typing import Any

from ...config import OpenELMConfig
from ...errors import ConfigError, SourceError, WeightsError, quoted, readable
from ...tensors import LazyTensor, read_safetensors
from ..source import Source, make_source, plain_names
from .config import read_config_file


def read_huggingface(folder: Path, config: OpenELMConfig | None = None) -> Source:
    """Open the model in a folder with `config.json` and one or more safetensors files, or PyTorch files.

    Args:
        config: replaces the configuration in the folder.
    Raises:
        SourceError: if the folder has no configuration or no weights.
        ConfigError, WeightsError: if a file is damaged or the files do not match.
    """
    path = folder / "config.json"
    if config is None and not path.exists():
        if (folder / "adapter_config.json").exists():
            raise SourceError(f"{folder} is an adapter; pass its model, and this folder as `adapter`")
        raise SourceError(f"{folder} has no config.json; set `config`, or choose another folder")
    written = read_json(path) if path.exists() else {}
    quantization = written.get("quantization")
    if quantization is not None and not isinstance(quantization, dict):
        raise ConfigError(f"{path}: quantization must be an object; got {quantization!r}")
    return make_source(
        config or read_config_file(path),
        _read_weights(folder),
        quantization,
        name=folder.resolve().name,
        folder=folder,
        is_chat=_is_chat(folder),
        is_converted="openelm_mlx_version" in written,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConfigError: if the file cannot be read or contains something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must contain a JSON object")
    return values


def _is_chat(folder: Path) -> bool:
    """Whether the model was tuned on conversations, according to its chat template or its name."""
    path = folder / "tokenizer_config.json"
    if path.exists() and "<|assistant|>" in str(read_json(path).get("chat_template")):
        return True
    repository = folder.resolve().parts[-3:]  # a folder in the hub's cache is named after a commit
    return any("instruct" in part.lower() for part in repository)


def _read_weights(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a folder under their plain names; safetensors files are preferred to PyTorch's."""
    paths = _shards(folder, "model", "safetensors")
    read = read_safetensors
    if not paths:
        paths = _shards(folder, "pytorch_model", "bin")
        read = _read_torch_file
    if not paths:
        raise SourceError(f"{folder} has no model.safetensors" + _hint(folder))
    tensors: dict[str, LazyTensor] = {}
    for path in paths:
        shard = read(path)
        twice = tensors.keys() & shard.keys()
        if twice:
            raise WeightsError(f"{path} contains {readable(min(twice))}, which another file in {folder} contains too")
        tensors.update(shard)
    return plain_names(tensors)


def _read_torch_file(path: Path) -> dict[str, LazyTensor]:
    from .torch_file import read_torch_file  # seldom needed

    return read_torch_file(path)


def _shards(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The files with the weights: a whole one, as in transformers, else those of the index, else all shards."""
    whole, index_path = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
    if not index_path.exists():
        return [whole] if whole.exists() else sorted(folder.glob(f"{stem}*.{suffix}"))
    index = read_json(index_path)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise WeightsError(f"{index_path} is damaged: its weight_map is not a map to file names")
    for name in places.values():
        if name != Path(name).name or name in ("", ".", ".."):
            raise WeightsError(f"{index_path} names {quoted(name)}, which is not a file of its folder")
    if whole.exists():  # the index is of an earlier state of the folder
        return [whole]
    paths = [folder / name for name in sorted(set(places.values()))]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise WeightsError(f"{folder} is incomplete: {missing[0]} is missing; download it again")
    return paths


def _hint(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.pt"))
    return f"; `openelm-mlx convert {folder / others[0]}` reads a CoreNet checkpoint" if others else ""
