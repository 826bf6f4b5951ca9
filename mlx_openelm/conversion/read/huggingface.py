"""Folders in the Hugging Face layout, from Apple, the MLX community or `convert`."""

from pathlib import Path

from ...config import OpenELMConfig
from ...errors import ConfigError, SourceError, WeightsError, quoted
from ...files.json_file import read_json_object
from ...files.paths import exists
from ...tensors import LazyTensor, read_safetensors
from ..source import Source, make_source
from .config import read_config_file

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_LARGEST_INDEX = 1 << 25  # bytes


def read_huggingface(folder: Path, config: OpenELMConfig | None = None) -> Source:
    """Open the model in a folder with `config.json` and one or more safetensors files.

    Args:
        config: replaces the configuration in the folder.
    Raises:
        SourceError: if the folder has no configuration or no weights.
        ConfigError, WeightsError: if a file is damaged or the files do not match.
    """
    path = folder / "config.json"
    if config is None and not exists(path):
        if exists(folder / "adapter_config.json"):
            raise SourceError(f"{folder} is an adapter; pass its model, and this folder as `adapter`")
        raise SourceError(f"{folder} has no config.json; set `config`, or choose another folder")
    written = read_json_object(path, ConfigError, optional=True)
    quantization = written.get("quantization")
    if quantization is not None and not isinstance(quantization, dict):
        raise ConfigError(f"{path}: quantization must be an object; got {quoted(quantization)}")
    return make_source(
        config or read_config_file(path),
        _read_shards(folder),
        quantization,
        name=folder.resolve().name,
        folder=folder,
        is_chat=_is_chat(folder),
        is_converted="openelm_mlx_version" in written,
    )


def _is_chat(folder: Path) -> bool:
    """Whether the model was tuned on conversations, according to its chat template or its name."""
    path = folder / "tokenizer_config.json"
    if "<|assistant|>" in str(read_json_object(path, ConfigError, optional=True).get("chat_template")):
        return True
    repository = folder.resolve().parts[-3:]  # a folder in the hub's cache is named after a commit
    return any("instruct" in part.lower() for part in repository)


def _read_shards(folder: Path) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for path in _shards(folder):
        shard = read_safetensors(path)
        twice = tensors.keys() & shard.keys()
        if twice:
            raise WeightsError(f"{path} contains {min(twice)}, which another file in {folder} contains too")
        tensors.update(shard)
    return {
        name: tensor for name, tensor in tensors.items() if not name.endswith(".inv_freq")
    }  # RoPE frequencies are computed


def _shards(folder: Path) -> list[Path]:
    if exists(folder / _INDEX):
        index = read_json_object(folder / _INDEX, WeightsError, max_bytes=_LARGEST_INDEX)
        places = index.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise WeightsError(f"{folder / _INDEX} is damaged: its weight_map is not a map to file names")
        for name in places.values():
            if name != Path(name).name or name in ("", ".", ".."):
                raise WeightsError(f"{folder / _INDEX} names {quoted(name)}, which is not a file of its folder")
        paths = [folder / name for name in sorted(set(places.values()))]
        missing = [path.name for path in paths if not exists(path)]
        if missing and exists(folder / _WHOLE):  # the index is of an earlier state of the folder
            return [folder / _WHOLE]
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
