"""Adapters in the format of PEFT 0.21: `adapter_config.json` and `adapter_model.safetensors`.

PEFT stores the matrices transposed and names them by their path in the Hugging Face model. One rank, one alpha and one
method apply to all matrices, with exceptions for ranks and alphas. As here, a tied output uses the base embedding.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import AdapterError, OpenELMError, quoted, readable, shorten
from ...files.fields import Fields
from ...files.paths import exists
from ...model.adapters import CONFIG_FILE, SavedAdapter, read_adapter_config, read_tensors, write_template
from ...model.lora import EMBEDDING, EMBEDDING_TARGET, MAGNITUDE
from ...tensors import save_arrays
from ..read.torch_file import read_torch_file
from ..source import plain_name
from .common import check_number, check_pairs, check_path, with_one_scale
from .patterns import Pattern

TENSOR_FILE, OLD_TENSOR_FILE = "adapter_model.safetensors", "adapter_model.bin"
_MOST_PATTERNS = 1000
_PREFIX = "base_model.model."
_PARTS = {
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": MAGNITUDE,
}

_USED_KEYS = {
    "alpha_pattern",
    "base_model_name_or_path",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "use_dora",
    "use_rslora",
}
_IGNORED_KEYS = {
    "auto_mapping": "a class of another library",
    "corda_config": "initialization, see init_lora_weights",
    "eva_config": "initialization, see init_lora_weights",
    "exclude_modules": "follows from the tensors",
    "inference_mode": "whether another library trains it",
    "layers_pattern": "follows from the tensors",
    "layers_to_transform": "follows from the tensors",
    "loftq_config": "initialization, see init_lora_weights",
    "lora_ga_config": "initialization, see init_lora_weights",
    "megatron_config": "how another library splits its work",
    "megatron_core": "how another library splits its work",
    "peft_version": "another library's version",
    "qalora_group_size": "only with use_qalora, which is refused",
    "revision": "of the base on the hub, which the user chooses",
    "runtime_config": "how another library runs",
    "target_modules": "follows from the tensors",
    "task_type": "a head for another task would be in modules_to_save, which is refused",
    "velora_config": "how another library saves memory during training",
}
_REFUSED_KEYS = {  # refused if set, with the reason
    "alora_invocation_tokens": "the adapter applies only after certain tokens",
    "arrow_config": "it mixes several adapters",
    "bias": "unknown choice of biases",
    "ensure_weight_tying": "the adapter of the embedding is applied to a tied output too",
    "fan_in_fan_out": "the matrices of OpenELM are (output, input)",
    "init_lora_weights": "training started from a changed base; PEFT can save the adapter as plain LoRA "
    "(path_initial_model_for_weight_conversion)",
    "kasa_config": "a method other than LoRA and DoRA",
    "layer_replication": "layers of the base are replicated",
    "lora_bias": "biases were trained, but OpenELM has none",
    "modules_to_save": "whole matrices were trained in addition to the adapter",
    "monteclora_config": "a method other than LoRA and DoRA",
    "target_parameters": "adapters on parameters are not supported, only those on matrices",
    "trainable_token_indices": "single rows of the embedding were trained in addition to the adapter",
    "use_bdlora": "a method other than LoRA and DoRA",
    "use_qalora": "a method other than LoRA and DoRA",
}
# With any choice of biases the adapter has none, because OpenELM has none; a tensor with one is refused.
_HARMLESS = {"bias": ("none", "all", "lora_only"), "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica")}


def is_peft(folder: Path) -> bool:
    """Whether a folder contains a PEFT adapter."""
    return exists(folder / TENSOR_FILE) or exists(folder / OLD_TENSOR_FILE)


def read_peft(folder: Path) -> SavedAdapter:
    """Read a PEFT adapter from its folder.

    Raises:
        AdapterError: if it is damaged, or more than LoRA or DoRA on the matrices of an OpenELM.
    """
    values, stored = read_adapter_config(folder), _read_stored(folder)
    try:
        _check_keys(values)
        tensors = _rename(stored)
        ranks = {name.removesuffix(".lora_a"): a.shape[1] for name, a in tensors.items() if name.endswith(".lora_a")}
        scales = _scales(values, ranks)
        _check_method(values, tensors)
        tensors, scale = with_one_scale(tensors, scales)
        dropout = values.get("lora_dropout") or 0.0
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise AdapterError(f"lora_dropout must be at least 0 and below 1; got {quoted(dropout)}")
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from error
    is_uniform = not values.get("rank_pattern") and not values.get("alpha_pattern")
    return SavedAdapter(
        "dora" if values.flag("use_dora", False) else "lora",
        scale,
        tensors,
        float(dropout),
        float(values["lora_alpha"]) if is_uniform else None,
        values.flag("use_rslora", False) if is_uniform else False,
    )


def write_peft(folder: Path, adapter: SavedAdapter) -> None:
    """Write an adapter in PEFT's format to an existing folder.

    Raises:
        AdapterError: if PEFT's format cannot represent it.
    """
    ranks = adapter.ranks
    _check_writable(adapter)
    rank = Counter(rank for rank, _ in ranks.values()).most_common(1)[0][0]
    alpha = _alpha(adapter, rank)
    others = {path: other for path, (other, _) in ranks.items() if other != rank}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.get("name"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilized,
        "use_dora": any(magnitude for _, magnitude in ranks.values()),
        "target_modules": _target_modules(adapter),
        "rank_pattern": {re.escape(path): other for path, other in others.items()},
        "alpha_pattern": {re.escape(path): _alpha(adapter, other) for path, other in others.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
    }
    tensors = {}
    for name, tensor in adapter.tensors.items():
        path, _, part = name.rpartition(".")
        kind = "lora_embedding_" if path == EMBEDDING else "lora_"
        ending = "" if path == EMBEDDING else ".weight"
        names = {"lora_a": f"{kind}A{ending}", "lora_b": f"{kind}B{ending}", MAGNITUDE: "lora_magnitude_vector"}
        tensors[f"{_PREFIX}{path}.{names[part]}"] = tensor.T
    save_arrays(folder / TENSOR_FILE, tensors, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_template(folder, adapter)


def _check_keys(values: Mapping[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise AdapterError(
            f"peft_type is {quoted(values.get('peft_type'))}; only LORA is supported, which includes DoRA"
        )
    for key, value in values.items():
        is_unset = value in (None, False, "", [], {})  # what PEFT writes for unused settings
        if is_unset or key in _USED_KEYS or key in _IGNORED_KEYS or value in _HARMLESS.get(key, ()):
            continue
        reason = _REFUSED_KEYS.get(key, "not a known setting, and ignoring it could change the result")
        raise AdapterError(f"{key} is {quoted(value)}: {reason}")


def _read_stored(folder: Path) -> Mapping[str, mx.array]:
    if exists(folder / TENSOR_FILE):
        return read_tensors(folder / TENSOR_FILE)
    try:
        return {name: tensor.read() for name, tensor in read_torch_file(folder / OLD_TENSOR_FILE).items()}
    except OpenELMError as error:
        raise AdapterError(str(error)) from error


def _rename(stored: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The adapter's tensors, with the names and layout of this package."""
    tensors: dict[str, mx.array] = {}
    adapter_names = set()
    for name, tensor in stored.items():
        path, part, adapter_name = _place(name)
        adapter_names.add(adapter_name)
        check_path(path)
        if (path == EMBEDDING) != ("embedding" in part) and _PARTS[part] != MAGNITUDE:
            raise AdapterError(f"{readable(name)} does not match the layer type of {path}")
        own = f"{path}.{_PARTS[part]}"
        if own in tensors and len(adapter_names) == 1:
            raise AdapterError(f"there are two tensors for {own}; one is called {readable(name)}")
        tensors[own] = tensor.T
    if len(adapter_names) > 1:
        raise AdapterError(f"there are several adapters: {shorten(sorted(adapter_names))}; only one is supported")
    if not tensors:
        raise AdapterError("the adapter has no tensors")
    check_pairs(tensors)
    return tensors


def _place(name: str) -> tuple[str, str, str]:
    """Path of the matrix, part and adapter name, which PEFT leaves out of the names of tensors in most files."""
    *path, last = plain_name(name).removesuffix(".weight").split(".")
    adapter_name = ""
    if last not in _PARTS and path and path[-1] in _PARTS:
        adapter_name, last = last, path.pop()
    if path and path[0] in ("layers", EMBEDDING_TARGET):  # trained without the output of the model
        path.insert(0, "transformer")
    if last not in _PARTS or not path or path[0] not in ("transformer", "lm_head"):
        raise AdapterError(f"{readable(name)} is not a tensor of an adapter")
    return ".".join(path), last, adapter_name


def _scales(values: Fields, ranks: Mapping[str, int]) -> dict[str, float]:
    """Factor of the product of both matrices, for each path."""
    scales = {}
    is_stabilized = values.flag("use_rslora", False)
    patterns = {name: _patterns(name, values.get(name)) for name in ("rank_pattern", "alpha_pattern")}
    for path, found in ranks.items():
        rank = check_number("r", _setting(patterns["rank_pattern"], path, values.get("r")))
        alpha = check_number("lora_alpha", _setting(patterns["alpha_pattern"], path, values.get("lora_alpha")))
        if rank != found:
            raise AdapterError(f"{path} has rank {found}, but {CONFIG_FILE} says {rank:g}")
        scales[path] = alpha / (math.sqrt(rank) if is_stabilized else rank)
    return scales


def _patterns(name: str, table: Any) -> list[tuple[Pattern, Any]]:
    """The patterns of `rank_pattern` or `alpha_pattern` with their values."""
    if not isinstance(table or {}, dict):
        raise AdapterError(f"{name} must be an object; got {quoted(table)}")
    if len(table or {}) > _MOST_PATTERNS:
        raise AdapterError(f"{name} has {len(table):,} entries; at most {_MOST_PATTERNS:,} are supported")
    return [(Pattern(pattern), value) for pattern, value in (table or {}).items()]


def _setting(patterns: list[tuple[Pattern, Any]], path: str, default: Any) -> Any:
    """The value for a path: that of the first pattern that matches the end of the path, else the default."""
    return next((value for pattern, value in patterns if pattern.matches_path(path)), default)


def _check_method(values: Fields, tensors: Mapping[str, mx.array]) -> None:
    paths = {name.rpartition(".")[0] for name in tensors}
    without = [path for path in paths if f"{path}.{MAGNITUDE}" not in tensors]
    if not values.flag("use_dora", False):
        if len(without) < len(paths):
            raise AdapterError("there are DoRA magnitudes, but use_dora is false")
        return
    if EMBEDDING in paths:
        raise AdapterError(_COLUMNS)
    if without:
        raise AdapterError(f"the adapter is incomplete: {min(without)} has no DoRA magnitudes")


_COLUMNS = (
    f"DoRA on an embedding learns a norm for each column in PEFT, but for each token in MLX; the adapter of "
    f"{EMBEDDING} cannot be converted between them"
)


def _check_writable(adapter: SavedAdapter) -> None:
    if adapter.method == "full":
        raise AdapterError("PEFT has no format for full fine-tuning; use `merge` to write a model instead")
    magnitudes = {path: magnitude for path, (_, magnitude) in adapter.ranks.items()}
    if magnitudes.get(EMBEDDING):
        raise AdapterError(_COLUMNS)
    plain = [path for path, magnitude in magnitudes.items() if not magnitude]
    if plain and len(plain) < len(magnitudes):
        raise AdapterError(
            f"{plain[0]} has plain LoRA and others have DoRA, but in PEFT use_dora applies to all matrices; this "
            "adapter cannot be written in its format"
        )


def _alpha(adapter: SavedAdapter, rank: int) -> float:
    """The alpha that gives the adapter's scale at this rank; its original alpha where that is right."""
    divisor = math.sqrt(rank) if adapter.rank_stabilized else rank
    if adapter.alpha is not None and math.isclose(adapter.alpha / divisor, adapter.scale):
        alpha = adapter.alpha
    else:
        alpha = adapter.scale * divisor
    return round(alpha) if math.isclose(alpha, round(alpha)) else alpha


def _target_modules(adapter: SavedAdapter) -> list[str]:
    """The last parts of the paths if every layer has an adapter on them, else the whole paths."""
    paths = adapter.ranks
    ends = {path.rpartition(".")[2] for path in paths}
    num_layers = adapter.base.get("num_transformer_layers")
    num_expected = sum(1 if EMBEDDING.endswith(end) else num_layers or 0 for end in ends)
    return sorted(ends if len(paths) == num_expected else paths)
