"""Fine-tuning checkpoints of CoreNet: a model whose matrices are named `base_layer`, and the tensors of its adapter.

CoreNet's adapter code derives from PEFT's. The rank follows from the shapes, but alpha does not: the training
configuration sets it in `model.lora.config`, for all matrices whose name matches a regular expression.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ...errors import AdapterError, shorten
from ...files.fields import Fields
from ...files.paths import user_path
from ...files.yaml_file import read_yaml_object
from ...model.adapters import SavedAdapter
from ...model.lora import EMBEDDING, MAGNITUDE
from ...tensors import LazyTensor
from ..read.config import read_config
from ..read.corenet import checkpoint_source, checkpoint_tensors, holds_adapter
from ..source import Source
from .common import check_number, check_pairs, check_path, with_one_scale
from .patterns import Pattern

_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.([^.]+)(\.weight)?")
_PARTS = {
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": MAGNITUDE,
}
_IGNORED_KEYS = {
    "adapter_name": "part of the tensor names",
    "init_lora_weights": "initialization of training; no value changes the base",
}


class AlphaWarning(UserWarning):
    """A checkpoint does not contain the alpha of its adapter, so the rank is assumed."""


@dataclass(frozen=True)
class LoRASettings:
    """Settings of a training configuration for the matrices whose name matches `regex`."""

    regex: Pattern | None
    rank: int
    alpha: float
    dropout: float = 0.0
    rank_stabilized: bool = False
    use_dora: bool = False

    @property
    def scale(self) -> float:
        """Factor of the product of both matrices."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def read_fine_tuned(
    path: Path, config: str | Path | None = None, alpha: float | None = None
) -> tuple[Source, SavedAdapter]:
    """Open the model and read the adapter of a fine-tuning checkpoint.

    Args:
        config: as in `convert`; a CoreNet YAML file also sets the adapter's alpha.
        alpha: overrides the alpha of `config`.
    Raises:
        OpenELMError: a subclass, if the file is damaged or does not match the configuration.
    Warns:
        AlphaWarning: if alpha is given nowhere; it is then assumed to be the rank.
    """
    tensors = checkpoint_tensors(path)
    base = {name.replace(".base_layer.", "."): t for name, t in tensors.items() if not _PART.fullmatch(name)}
    source = checkpoint_source(path, base, read_config(config) if config is not None else None)
    return source, _adapter(path, tensors, config, alpha)


def read_corenet_adapter(path: Path, config: str | Path | None = None, alpha: float | None = None) -> SavedAdapter:
    """Read the adapter of a fine-tuning checkpoint; see `read_fine_tuned`."""
    return _adapter(path, checkpoint_tensors(path), config, alpha)


def _adapter(
    path: Path, tensors: Mapping[str, LazyTensor], config: str | Path | None, alpha: float | None
) -> SavedAdapter:
    if not holds_adapter(tensors):
        raise AdapterError(f"{path} holds no adapter: it has neither lora_A nor lora_embedding_A")
    try:
        parts = _read_parts(tensors)
        ranks = {name.removesuffix(".lora_a"): a.shape[1] for name, a in parts.items() if name.endswith(".lora_a")}
        settings = _read_settings(config)
        if alpha is not None:
            alpha = check_number("alpha", alpha)
        elif not settings:
            _warn_of_alpha(path, ranks)
        of_path = {matrix: _settings_of(matrix, rank, settings, parts) for matrix, rank in ranks.items()}
        if alpha is not None:
            of_path = {matrix: replace(own, alpha=alpha) for matrix, own in of_path.items()}
        parts, scale = with_one_scale(parts, {matrix: own.scale for matrix, own in of_path.items()})
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    alphas = {(own.alpha, own.rank, own.rank_stabilized) for own in of_path.values()}
    is_uniform = len(alphas) == 1
    first = next(iter(of_path.values()))
    return SavedAdapter(
        "dora" if any(name.endswith(f".{MAGNITUDE}") for name in parts) else "lora",
        scale,
        parts,
        max(own.dropout for own in of_path.values()),
        first.alpha if is_uniform else None,
        first.rank_stabilized if is_uniform else False,
    )


def _read_parts(tensors: Mapping[str, LazyTensor]) -> dict[str, mx.array]:
    """The adapter's tensors, with the names and layout of this package."""
    parts, adapter_names = {}, set()
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if not match:
            continue
        path, part, adapter_name, _ = match.groups()
        check_path(path)
        if (path == EMBEDDING) != ("embedding" in part):
            raise AdapterError(f"{name} does not match the layer type of {path}")
        adapter_names.add(adapter_name)
        parts[f"{path}.{_PARTS[part]}"] = tensor.read().T
    if len(adapter_names) > 1:
        raise AdapterError(f"there are several adapters: {shorten(sorted(adapter_names))}; only one is supported")
    check_pairs(parts)
    return parts


def _warn_of_alpha(path: Path, ranks: Mapping[str, int]) -> None:
    values = shorten(str(rank) for rank in sorted(set(ranks.values())))
    warnings.warn(
        f"{path.name} does not contain the alpha of its adapter; assuming the rank, {values}, as in every "
        "configuration that Apple published; set `alpha`, or `config` to a CoreNet YAML file, to change it",
        AlphaWarning,
        stacklevel=4,
    )


def _read_settings(config: str | Path | None) -> list[LoRASettings]:
    """The adapter settings of a CoreNet training configuration; empty for any other `config` or if it has none."""
    path = user_path(config) if config is not None else Path()
    if path.suffix not in (".yaml", ".yml"):
        return []
    lora = read_yaml_object(path, AdapterError).table("model").table("lora")
    entries = lora.list_of("config", dict, [])
    return [_read_entry(Fields(entry, f"{lora.where}: config", AdapterError)) for entry in entries]


def _read_entry(entry: Fields) -> LoRASettings:
    values = entry.table("params")
    unknown = values.keys() - {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"} - _IGNORED_KEYS.keys()
    if unknown:
        raise AdapterError(f"{entry.where}: unknown settings: {shorten(sorted(unknown))}")
    return LoRASettings(
        Pattern(entry.text("regex")),
        values.whole("r", at_least=1),
        check_number("lora_alpha", values.number("lora_alpha")),
        values.number("lora_dropout", 0.0, 0, 1),
        values.flag("use_rslora", False),
        values.flag("use_dora", False),
    )


def _settings_of(path: str, rank: int, settings: list[LoRASettings], parts: Mapping[str, mx.array]) -> LoRASettings:
    """The settings of a matrix; without a configuration, alpha is the rank.

    Raises:
        AdapterError: if the configuration does not match the tensors.
    """
    has_magnitude = f"{path}.{MAGNITUDE}" in parts
    if not settings:
        return LoRASettings(None, rank, rank, use_dora=has_magnitude)
    name = path.removeprefix("transformer.")
    found = next((own for own in settings if own.regex is not None and own.regex.matches(name)), None)
    if found is None:
        raise AdapterError(f"{path} has an adapter, but no pattern of the configuration matches it")
    if found.rank != rank:
        raise AdapterError(f"{path} has rank {rank}, but the configuration says {found.rank}")
    if found.use_dora != has_magnitude:
        kind = "DoRA" if has_magnitude else "LoRA"
        raise AdapterError(f"{path} has a {kind} adapter, but use_dora is {found.use_dora} in the configuration")
    return found
