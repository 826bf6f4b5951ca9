"""Folders in the Hugging Face layout: Apple's own, those of the MLX community, and those that `convert` wrote."""

import json
from pathlib import Path
from typing import Any

from ...config import OpenELMConfig
from ...errors import ConfigError, SourceError, WeightsError
from ...tensors import LazyTensor, read_safetensors
from ..source import Source, make_source
from .config import read_config_file

_INDEX = "model.safetensors.index.json"


def read_huggingface(folder: Path, config: OpenELMConfig | None = None) -> Source:
    """The model in a folder with `config.json` and one or many safetensors files.

    Args:
        config: to be used in place of the folder's.
    Raises:
        SourceError: if there are no weights in the folder.
        ConfigError, WeightsError: if a file is damaged or the files do not belong together.
    """
    path = folder / "config.json"
    if config is None and not path.exists():
        if (folder / "adapter_config.json").exists():
            raise SourceError(f"{folder} is an adapter; give its model, and this folder as `adapter`")
        raise SourceError(f"{folder} has no config.json; set `config`, or give another folder")
    written = read_json(path) if path.exists() else {}
    quantization = written.get("quantization")
    if quantization is not None and not isinstance(quantization, dict):
        raise ConfigError(f"{path}: quantization must be a table; got {quantization!r}")
    return make_source(
        config or read_config_file(path),
        _read_shards(folder),
        quantization,
        name=folder.resolve().name,
        folder=folder,
        is_chat=_is_chat(folder),
        is_converted="openelm_mlx_version" in written,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file.

    Raises:
        ConfigError: if it cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must contain a table of settings")
    return values


def _is_chat(folder: Path) -> bool:
    """Whether the model was tuned on conversations: its template says so, or else its name."""
    path = folder / "tokenizer_config.json"
    if path.exists() and "<|assistant|>" in str(read_json(path).get("chat_template")):
        return True
    repository = folder.resolve().parts[-3:]  # in the hub's cache a folder is named after a commit
    return any("instruct" in part.lower() for part in repository)


def _read_shards(folder: Path) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for path in _shards(folder):
        shard = read_safetensors(path)
        twice = tensors.keys() & shard.keys()
        if twice:
            raise WeightsError(f"{path} holds {min(twice)}, which another file of {folder} holds too")
        tensors.update(shard)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".inv_freq")}  # follows from RoPE


def _shards(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        index = read_json(folder / _INDEX)
        places = index.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise WeightsError(f"{folder / _INDEX} is damaged: its weight_map names no files")
        paths = [folder / name for name in sorted(set(places.values()))]
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise WeightsError(f"{folder} is incomplete: {missing[0]} is missing; download it again")
        return paths
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise SourceError(f"{folder} has no model.safetensors" + _hint(folder))
    return paths


def _hint(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.pt"))
    return f"; `openelm-mlx convert {folder / others[0]}` reads a CoreNet checkpoint" if others else ""
