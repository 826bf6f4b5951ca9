"""Readers for the three configuration formats: Hugging Face, Apple's MLX port, and CoreNet's YAML.

A Hugging Face `config.json` contains multipliers, which determine the widths of the layers, or the widths themselves,
or both; the other two formats name a published model. Every key is either used, ignored by name, or refused.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...config import FIXED_SETTINGS, OpenELMConfig, check_size, per_layer, query_heads
from ...errors import ConfigError, quoted, shorten
from ...files.json_file import read_json_object
from ...files.paths import check_links, exists, is_folder, user_path
from ...files.yaml_file import read_yaml_object
from ...model.forward_context import NORM_EPS

# Keys of Hugging Face configurations that cannot change what the network computes.
_IGNORED_KEYS = {
    "_attn_implementation": "how another library computes attention",
    "_attn_implementation_autoset": "how another library computes attention",
    "_commit_hash": "origin of the file",
    "_name_or_path": "origin of the file",
    "architectures": "a class of another library",
    "auto_map": "remote code, which is never run",
    "bos_token": "belongs to the tokenizer",
    "chunk_size_feed_forward": "how another library splits its work",
    "dtype": "each tensor has its own type",
    "eos_token": "belongs to the tokenizer",
    "finetuning_task": "a note",
    "id2label": "names for the classes of another task",
    "initializer_range": "only for new weights, which follow CoreNet's rule",
    "is_decoder": "OpenELM is a decoder",
    "label2id": "names for the classes of another task",
    "license": "a note",
    "max_position_embeddings": "a limit, for which max_context_length is used",
    "model_max_length": "a limit, for which max_context_length is used",
    "name_or_path": "origin of the file",
    "openelm_mlx_version": "the version that wrote the file",
    "output_attentions": "what another library returns",
    "output_hidden_states": "what another library returns",
    "pad_token_id": "not used for padding",
    "padding_index": "not used for padding",
    "padding_side": "belongs to the tokenizer",
    "problem_type": "the loss of another task",
    "quantization": "read with the weights",
    "quantization_config": "a copy of `quantization` for other libraries",
    "return_dict": "what another library returns",
    "sep_token_id": "not used for padding",
    "tf_legacy_loss": "the loss of another library",
    "tokenizer_class": "a class of another library",
    "torch_dtype": "each tensor has its own type",
    "torchscript": "how another library compiles",
    "transformers_version": "another library's version",
    "unk_token_id": "belongs to the tokenizer",
    "unsloth_fixed": "a note of another library",
    "unsloth_version": "another library's version",
    "use_bfloat16": "each tensor has its own type",
    "use_cache": "how another library generates",
    **dict.fromkeys(
        (
            *("bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample"),
            *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
            *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens"),
            *("min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
            *("num_return_sequences", "output_scores", "prefix", "remove_invalid_values", "renormalize_logits"),
            *("repetition_penalty", "return_dict_in_generate", "suppress_tokens", "task_specific_params"),
            *("temperature", "top_k", "top_p", "typical_p"),
        ),
        "how another library generates",
    ),
}
# Other names for what this package knows, and what they must agree with.
_OTHER_NAMES = {
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_transformer_layers",
    "rope_theta": "rope_freq_constant",
}
# Accepted with this value only; it is what every OpenELM does.
_ONLY_VALUES: dict[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_encoder_decoder": False,
    "pretraining_tp": 1,
    "rms_norm_eps": NORM_EPS,
    "tie_encoder_decoder": False,
}
_UNSET: tuple[Any, ...] = (None, [], {})  # what other libraries write for settings that are not in use


def read_config(name: str | Path) -> OpenELMConfig:
    """The configuration that `name` refers to: a preset, a YAML file, a `config.json`, or a folder with one.

    Raises:
        ConfigError: if it is none of these, or for the reasons of `read_config_file`.
    """
    path = user_path(name)
    if is_folder(path):
        return read_config_file(check_links(path) / "config.json")
    if exists(path) or path.suffix in (".json", ".yaml", ".yml"):
        return read_config_file(path)
    return OpenELMConfig.preset(str(name))


def read_config_file(path: Path) -> OpenELMConfig:
    """Read a `config.json`, or a CoreNet training configuration in YAML.

    Raises:
        ConfigError: with the file's name, if it cannot be read or for the reasons of `config_from_dict`.
    """
    is_yaml = path.suffix in (".yaml", ".yml")
    values: Mapping[str, Any] = read_yaml_object(path, ConfigError) if is_yaml else read_json_object(path, ConfigError)
    if is_yaml and {"data", "steps", "learning_rate", "tokenizer"} & set(values):
        raise ConfigError(f"{path} is a recipe, not the configuration of a model; pass it as `config` of a run")
    return config_of(values, path, is_corenet=is_yaml and "num_transformer_layers" not in values)


def config_of(values: Mapping[str, Any], path: Path, *, is_corenet: bool = False) -> OpenELMConfig:
    """The configuration in values that were read from `path`.

    Raises:
        ConfigError: with the file's name, for the reasons of `config_from_dict`.
    """
    try:
        return config_from_dict(_corenet_section(values) if is_corenet else values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_from_dict(values: Mapping[str, Any]) -> OpenELMConfig:
    """Read a configuration in the Hugging Face format, which `OpenELMConfig.to_dict` writes, or of Apple's MLX port.

    Raises:
        ConfigError: naming the key and the problem.
    """
    if "model_name" in values:
        return _from_model_name(values)
    return _from_hugging_face(values)


def _corenet_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """The language model section of a CoreNet training configuration, `model.language_modeling.general_gpt`."""
    section: Any = values
    for key in ("model", "language_modeling", "general_gpt"):
        section = section.get(key) if isinstance(section, dict) else None
    if not isinstance(section, dict) or "model_name" not in section:
        raise ConfigError("model.language_modeling.general_gpt.model_name is missing; is this a CoreNet configuration?")
    return section


def _from_model_name(values: Mapping[str, Any]) -> OpenELMConfig:
    """The format of Apple's MLX port and of CoreNet: the name of a published model, with changed sizes if any."""
    known = {"model_name", "vocab_size", "max_context_length", *_IGNORED_KEYS}
    _refuse_unknown(set(values) - known)
    config = OpenELMConfig.preset(_read("model_name", values["model_name"], str))
    changed = {name: _read(name, values[name], int) for name in ("vocab_size", "max_context_length") if name in values}
    return replace(config, **changed)


def _from_hugging_face(values: Mapping[str, Any]) -> OpenELMConfig:
    values = _without_default_rope(values)
    for name, only in {**FIXED_SETTINGS, **_ONLY_VALUES}.items():
        if name in values and values[name] != only:
            raise ConfigError(f"{name} must be {only!r} for OpenELM; got {quoted(values[name])}")
    read: dict[str, Any] = {}
    for field in fields(OpenELMConfig):
        if values.get(field.name) is not None:
            read[field.name] = _read(field.name, values[field.name], _KINDS[field.name])
    known = {*_KINDS, *_IGNORED_KEYS, *FIXED_SETTINGS, *_ONLY_VALUES, *_OTHER_NAMES, "tie_word_embeddings"}
    _refuse_unknown({name for name, value in values.items() if value not in _UNSET} - known)
    missing = {"num_transformer_layers", "model_dim", "head_dim", "ffn_multipliers"} - set(read)
    if missing:
        raise ConfigError(f"missing settings: {shorten(sorted(missing))}")
    num_layers = read["num_transformer_layers"]
    check_size("num_transformer_layers", num_layers)
    read["ffn_multipliers"] = per_layer("ffn_multipliers", read["ffn_multipliers"], num_layers)
    _add_heads(read)
    config = OpenELMConfig(**read)
    if values.get("tie_word_embeddings", config.share_input_output_layers) != config.share_input_output_layers:
        raise ConfigError("tie_word_embeddings and share_input_output_layers disagree")
    for other, name in _OTHER_NAMES.items():
        own = getattr(config, name)
        if values.get(other) is not None and values[other] != own:
            raise ConfigError(f"{other} is {quoted(values[other])}, but {name} is {quoted(own)}")
    return config


def _without_default_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without a description of rotary embeddings that says they are not scaled."""
    plain = dict(values)
    for name in ("rope_scaling", "rope_parameters"):
        rope = plain.get(name)
        if isinstance(rope, dict) and {*rope} <= {"rope_type", "type", "rope_theta"}:
            if rope.get("rope_type", rope.get("type", "default")) != "default":
                continue
            del plain[name]
            if rope.get("rope_theta") is not None:
                plain.setdefault("rope_theta", rope["rope_theta"])
    return plain


def _add_heads(read: dict[str, Any]) -> None:
    """Set the heads per layer from the lists or the multipliers; if both are given, they must agree."""
    groups = read.get("num_gqa_groups", OpenELMConfig.num_gqa_groups)
    check_size("num_gqa_groups", groups)
    if "qkv_multipliers" in read:
        shape = read["num_transformer_layers"], read["model_dim"], read["head_dim"]
        heads_per_layer = query_heads(*shape, read["qkv_multipliers"], groups)
        if read.setdefault("num_query_heads", heads_per_layer) != heads_per_layer:
            raise ConfigError(f"num_query_heads does not match qkv_multipliers {list(read['qkv_multipliers'])}")
    if "num_query_heads" not in read:
        raise ConfigError("num_query_heads is missing, and there is no qkv_multipliers to compute it from")
    read.setdefault("num_kv_heads", tuple(heads // groups for heads in read["num_query_heads"]))


def _refuse_unknown(names: set[str]) -> None:
    if names:
        raise ConfigError(f"unknown settings: {shorten(sorted(names))}; ignoring them could change the result")


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
    "eos_token_id": [int],
}


def _read(name: str, value: Any, kind: Any) -> Any:
    """Check `value` against the type of its key; a number is accepted as a list of one, an integer as a float."""
    if isinstance(kind, list):
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple(_read(name, entry, kind[0]) for entry in entries)
    if kind is float and type(value) is int and abs(value) < 1 << 64:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} must be of type {kind.__name__}; got {quoted(value)}")
    return value
