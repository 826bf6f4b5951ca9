"""The dialects that configurations are written in: Hugging Face's, that of Apple's MLX port, and CoreNet's YAML.

A Hugging Face `config.json` gives multipliers, from which the widths of the layers follow, or spells the widths out, or
both; the other two name a published model. Every key is used, ignored by name, or refused.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...config import FIXED_SETTINGS, OpenELMConfig, check_positive, per_layer, query_heads
from ...errors import ConfigError, shorten

# Keys of Hugging Face configurations that cannot change what the network computes.
_IGNORED_KEYS = {
    "_name_or_path": "where a file came from",
    "architectures": "the class of another library",
    "auto_map": "code of another library, which is never run",
    "bos_token": "the tokenizer's",
    "chunk_size_feed_forward": "how another library splits its work",
    "dtype": "each tensor says its own type",
    "eos_token": "the tokenizer's",
    "initializer_range": "only for fresh weights, where CoreNet's own rule holds",
    "license": "a note",
    "openelm_mlx_version": "who wrote it",
    "output_attentions": "what another library returns",
    "output_hidden_states": "what another library returns",
    "pad_token_id": "nothing is padded with it",
    "padding_index": "nothing is padded with it",
    "quantization": "read where weights are",
    "quantization_config": "a copy of `quantization` for other libraries",
    "return_dict": "what another library returns",
    "torch_dtype": "each tensor says its own type",
    "transformers_version": "another library's version",
    "use_cache": "how another library generates",
}


def read_config(name: str | Path) -> OpenELMConfig:
    """The configuration that `config` names: a preset, a YAML file or a `config.json`, or a folder with one.

    Raises:
        ConfigError: if it is none of them.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return read_config_file(path / "config.json")
    if path.exists() or path.suffix in (".json", ".yaml", ".yml"):
        return read_config_file(path)
    return OpenELMConfig.preset(str(name))


def read_config_file(path: Path) -> OpenELMConfig:
    """The configuration in a `config.json`, or in a CoreNet training configuration in YAML.

    Raises:
        ConfigError: if the file cannot be read, or for what `config_from_dict` raises, with the file's name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        values = _corenet_section(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
        if not isinstance(values, dict):
            raise ConfigError("expected a table of settings")
        return config_from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error


def config_from_dict(values: Mapping[str, Any]) -> OpenELMConfig:
    """The configuration in the Hugging Face dialect, which `OpenELMConfig.to_dict` writes, or that of Apple's MLX port.

    Raises:
        ConfigError: naming the key and what is wrong with it.
    """
    if "model_name" in values:
        return _from_model_name(values)
    return _from_hugging_face(values)


def _corenet_section(text: str) -> dict[str, Any]:
    """The settings of the language model in a CoreNet training configuration, `model.language_modeling.general_gpt`."""
    import yaml

    try:
        section = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    for key in ("model", "language_modeling", "general_gpt"):
        section = section.get(key) if isinstance(section, dict) else None
    if not isinstance(section, dict) or "model_name" not in section:
        raise ConfigError("model.language_modeling.general_gpt.model_name is missing; is this a CoreNet configuration?")
    return section


def _from_model_name(values: Mapping[str, Any]) -> OpenELMConfig:
    """The form of Apple's MLX port and of CoreNet: a published model's name, and what was changed about it."""
    known = {"model_name", "vocab_size", "max_context_length", *_IGNORED_KEYS}
    _refuse_unknown(set(values) - known)
    config = OpenELMConfig.preset(_read("model_name", values["model_name"], str))
    changed = {name: _read(name, values[name], int) for name in ("vocab_size", "max_context_length") if name in values}
    return replace(config, **changed)


def _from_hugging_face(values: Mapping[str, Any]) -> OpenELMConfig:
    for name, only in FIXED_SETTINGS.items():
        if name in values and values[name] != only:
            raise ConfigError(f"{name} is {values[name]!r}; an OpenELM has {only!r}")
    read: dict[str, Any] = {}
    for field in fields(OpenELMConfig):
        if values.get(field.name) is not None:
            read[field.name] = _read(field.name, values[field.name], _KINDS[field.name])
    _refuse_unknown({*values} - {*_KINDS, *_IGNORED_KEYS, *FIXED_SETTINGS, "tie_word_embeddings"})
    missing = {"num_transformer_layers", "model_dim", "head_dim", "ffn_multipliers"} - set(read)
    if missing:
        raise ConfigError(f"{shorten(sorted(missing))} is missing")
    num_layers = read["num_transformer_layers"]
    check_positive("num_transformer_layers", num_layers)
    read["ffn_multipliers"] = per_layer("ffn_multipliers", read["ffn_multipliers"], num_layers)
    _add_heads(read)
    config = OpenELMConfig(**read)
    if values.get("tie_word_embeddings", config.share_input_output_layers) != config.share_input_output_layers:
        raise ConfigError("tie_word_embeddings and share_input_output_layers contradict each other")
    return config


def _add_heads(read: dict[str, Any]) -> None:
    """Heads per layer, from the lists or from the multipliers; where both are given they have to agree."""
    groups = read.get("num_gqa_groups", OpenELMConfig.num_gqa_groups)
    check_positive("num_gqa_groups", groups)
    if "qkv_multipliers" in read:
        shape = read["num_transformer_layers"], read["model_dim"], read["head_dim"]
        heads_per_layer = query_heads(*shape, read["qkv_multipliers"], groups)
        if read.setdefault("num_query_heads", heads_per_layer) != heads_per_layer:
            raise ConfigError(f"num_query_heads is not what qkv_multipliers {list(read['qkv_multipliers'])} give")
    if "num_query_heads" not in read:
        raise ConfigError("num_query_heads is missing, and so is qkv_multipliers, from which it would follow")
    read.setdefault("num_kv_heads", tuple(heads // groups for heads in read["num_query_heads"]))


def _refuse_unknown(names: set[str]) -> None:
    if names:
        raise ConfigError(f"{shorten(sorted(names))} is not a known setting, and ignoring it could change the result")


_KINDS: dict[str, Any] = {
    "num_transformer_layers": int,
    "model_dim": int,
    "head_dim": int,
    "num_query_heads": [int],
    "num_kv_heads": [int],
    "ffn_multipliers": [float],
    "vocab_size": int,
    "max_context_length": int,
    "num_gqa_groups": int,
    "qkv_multipliers": [float],
    "ffn_dim_divisor": int,
    "ffn_with_glu": bool,
    "activation_fn_name": str,
    "normalize_qk_projections": bool,
    "share_input_output_layers": bool,
    "rope_freq_constant": float,
    "rope_max_length": int,
    "bos_token_id": int,
    "eos_token_id": int,
}


def _read(name: str, value: Any, kind: Any) -> Any:
    """`value` as the kind of its key: a list kind takes one number for a list of one; floats take integers."""
    if isinstance(kind, list):
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple(_read(name, entry, kind[0]) for entry in entries)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} must be of type {kind.__name__}; got {value!r}")
    return value
