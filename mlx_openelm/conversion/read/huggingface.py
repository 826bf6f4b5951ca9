"""Folders in the Hugging Face layout, from Apple, the MLX community or `convert`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config import OpenELMConfig
from ...errors import ConfigError, SourceError, WeightsError, quoted, readable
from ...files.json_file import read_json_object
from ...files.paths import check_links, exists
from ...tensors import LazyTensor, read_safetensors
from ...tokenizer.chat_template import OPENELM_TEMPLATE, is_openelm, read_chat_template, template_by_name
from ..source import Source, make_source, plain_names
from .config import config_of

_SAMPLING = "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"

_LARGEST_INDEX = 1 << 25  # bytes


def read_huggingface(folder: Path, config: OpenELMConfig | None = None) -> Source:
    """Open the model in a folder with `config.json` and one or more safetensors files, or PyTorch files.

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
        raise SourceError(
            f"{folder} has no config.json, so it is not a model; for bare weights, `convert` takes `config`"
        )
    written = read_json_object(path, ConfigError, optional=True)
    quantization = written.get("quantization")
    if quantization is not None and not isinstance(quantization, dict):
        raise ConfigError(f"{path}: quantization must be an object; got {quoted(quantization)}")
    is_converted = "openelm_mlx_version" in written
    config = config or config_of(written, path)
    names_eos = written.get("eos_token_id") is not None
    generation = folder / "generation_config.json"
    asked = read_json_object(generation, ConfigError, optional=True)
    more_eos = _generation_eos(asked, generation)
    if more_eos:
        config = config.with_eos(*more_eos, only=not names_eos)
    return make_source(
        config,
        _read_weights(folder),
        quantization,
        name=folder.resolve().name,
        folder=folder,
        names_eos=names_eos or bool(more_eos),
        chat_template=_chat_template(folder, is_converted),
        sampling=_sampling(asked),
        is_converted=is_converted,
    )


def _chat_template(folder: Path, is_converted: bool) -> str | None:
    """The chat template in a folder; without one, CoreNet's if the name is that of one of Apple's Instruct models.

    The name counts only for a folder that this package did not write. In the hub's cache it is the repository's.
    """
    template = read_chat_template(folder)
    if template is not None:
        return OPENELM_TEMPLATE if is_openelm(template) else template
    if is_converted:
        return None
    path = folder.resolve()
    in_cache = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    return template_by_name(path.parent.parent.name if in_cache else path.name)


def _generation_eos(values: Mapping[str, Any], path: Path) -> list[int]:
    """The ids in a `generation_config.json` that end a text."""
    value = values.get("eos_token_id")
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in tokens):
        raise ConfigError(f"{path}: eos_token_id must be an id or a list of ids; got {quoted(value)}")
    return tokens


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """How the model wants its text sampled, unchecked."""
    return {name: values[name] for name in _SAMPLING if values.get(name) is not None}


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
    if not exists(index_path):
        return [whole] if exists(whole) else sorted(folder.glob(f"{stem}*.{suffix}"))
    index = read_json_object(index_path, WeightsError, max_bytes=_LARGEST_INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise WeightsError(f"{index_path} is damaged: its weight_map is not a map to file names")
    for name in places.values():
        if name != Path(name).name or name in ("", ".", ".."):
            raise WeightsError(f"{index_path} names {quoted(name)}, which is not a file of its folder")
    if exists(whole):  # the index is of an earlier state of the folder
        return [whole]
    paths = [folder / name for name in sorted(set(places.values()))]
    missing = [path.name for path in paths if not exists(path)]
    if missing:
        raise WeightsError(f"{folder} is incomplete: {missing[0]} is missing; download it again")
    check_links(folder, [path.name for path in paths])
    return paths


def _hint(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.pt"))
    return f"; `openelm-mlx convert {folder / others[0]}` reads a CoreNet checkpoint" if others else ""
