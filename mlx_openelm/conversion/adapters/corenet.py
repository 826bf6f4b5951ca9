"""Fine-tuning checkpoints of CoreNet: a model whose matrices lie under `base_layer`, and its adapter beside them.

Its code is adapted from PEFT's. The rank follows from the shapes. Alpha does not: it stands in the training
configuration, `model.lora.config`, for matrices whose name a regular expression matches.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import AdapterError, shorten
from ...model.adapters import SavedAdapter
from ...model.lora import EMBEDDING, MAGNITUDE
from ...tensors import LazyTensor
from ..read.config import read_config
from ..read.corenet import checkpoint_source, checkpoint_tensors, holds_adapter
from ..source import Source
from .common import check_number, check_pairs, check_path, with_one_scale

_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.([^.]+)(\.weight)?")
_PARTS = {
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": MAGNITUDE,
}
_IGNORED_KEYS = {
    "adapter_name": "the tensors carry it",
    "init_lora_weights": "how training began; each way leaves the base as it was",
}


class AlphaWarning(UserWarning):
    """An adapter does not say how much it counts, so the usual is assumed."""


@dataclass(frozen=True)
class LoRASettings:
    """What a training configuration says of the matrices whose name its regular expression matches."""

    regex: str
    rank: int
    alpha: float
    dropout: float = 0.0
    rank_stabilised: bool = False
    use_dora: bool = False

    @property
    def scale(self) -> float:
        """What the product of both matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def read_fine_tuned(
    path: Path, config: str | Path | None = None, alpha: float | None = None
) -> tuple[Source, SavedAdapter]:
    """The model and the adapter in a fine-tuning checkpoint.

    Args:
        config: as for `convert`; a CoreNet YAML file says the adapter's alpha too.
        alpha: in its place.
    Raises:
        OpenELMError: of the kind that fits, if the file is damaged or contradicts its configuration.
    Warns:
        AlphaWarning: if nothing says the adapter's alpha, which is taken to be the rank then.
    """
    tensors = checkpoint_tensors(path)
    base = {name.replace(".base_layer.", "."): t for name, t in tensors.items() if not _PART.fullmatch(name)}
    source = checkpoint_source(path, base, read_config(config) if config is not None else None)
    return source, _adapter(path, tensors, config, alpha)


def read_corenet_adapter(path: Path, config: str | Path | None = None, alpha: float | None = None) -> SavedAdapter:
    """The adapter in a fine-tuning checkpoint; see `read_fine_tuned`."""
    return _adapter(path, checkpoint_tensors(path), config, alpha)


def _adapter(
    path: Path, tensors: Mapping[str, LazyTensor], config: str | Path | None, alpha: float | None
) -> SavedAdapter:
    if not holds_adapter(tensors):
        raise AdapterError(f"{path} holds no adapter: it has no lora_A and no lora_embedding_A")
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
    alphas = {(own.alpha, own.rank, own.rank_stabilised) for own in of_path.values()}
    is_uniform = len(alphas) == 1
    first = next(iter(of_path.values()))
    return SavedAdapter(
        "dora" if any(name.endswith(f".{MAGNITUDE}") for name in parts) else "lora",
        scale,
        parts,
        max(own.dropout for own in of_path.values()),
        first.alpha if is_uniform else None,
        first.rank_stabilised if is_uniform else False,
    )


def _read_parts(tensors: Mapping[str, LazyTensor]) -> dict[str, mx.array]:
    """Tensors of the adapter under the names of this package, in its layout."""
    parts, adapter_names = {}, set()
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if not match:
            continue
        path, part, adapter_name, _ = match.groups()
        check_path(path)
        if (path == EMBEDDING) != ("embedding" in part):
            raise AdapterError(f"{name} belongs to a layer of another kind than {path} is")
        adapter_names.add(adapter_name)
        parts[f"{path}.{_PARTS[part]}"] = tensor.read().T
    if len(adapter_names) > 1:
        raise AdapterError(f"there are several adapters: {shorten(sorted(adapter_names))}; one can be read")
    check_pairs(parts)
    return parts


def _warn_of_alpha(path: Path, ranks: Mapping[str, int]) -> None:
    values = shorten(str(rank) for rank in sorted(set(ranks.values())))
    warnings.warn(
        f"{path.name} does not give the alpha of its adapter; assuming the rank, {values}, as in all that "
        "Apple published; set `alpha`, or `config` to a CoreNet YAML file, to change it",
        AlphaWarning,
        stacklevel=4,
    )


def _read_settings(config: str | Path | None) -> list[LoRASettings]:
    """The settings in a CoreNet training configuration; none, if it is a configuration of another kind or without."""
    path = Path(config).expanduser() if config is not None else Path()
    if path.suffix not in (".yaml", ".yml"):
        return []
    import yaml

    section: Any = yaml.safe_load(path.read_text(encoding="utf-8"))  # `read_config` has made sure that this is possible
    for key in ("model", "lora", "config"):
        section = section.get(key) if isinstance(section, dict) else None
    try:
        return [_read_entry(entry) for entry in section or []]
    except (AdapterError, KeyError, TypeError, re.error) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise AdapterError(f"model.lora.config of {path} cannot be read: {what}") from error


def _read_entry(entry: Mapping[str, Any]) -> LoRASettings:
    values = dict(entry["params"])
    unknown = values.keys() - {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"} - _IGNORED_KEYS.keys()
    if unknown:
        raise AdapterError(f"{shorten(sorted(unknown))} is not a known setting")
    re.compile(entry["regex"])
    return LoRASettings(
        entry["regex"],
        int(check_number("r", values["r"])),
        check_number("lora_alpha", values["lora_alpha"]),
        float(values.get("lora_dropout", 0.0)),
        bool(values.get("use_rslora", False)),
        bool(values.get("use_dora", False)),
    )


def _settings_of(path: str, rank: int, settings: list[LoRASettings], parts: Mapping[str, mx.array]) -> LoRASettings:
    """What holds for a matrix; where no configuration says it, the usual.

    Raises:
        AdapterError: if the configuration does not fit the tensors.
    """
    has_magnitude = f"{path}.{MAGNITUDE}" in parts
    if not settings:
        return LoRASettings("", rank, rank, use_dora=has_magnitude)
    found = next((own for own in settings if re.match(own.regex, path.removeprefix("transformer."))), None)
    if found is None:
        raise AdapterError(f"{path} has an adapter, and no regex of the configuration matches it")
    if found.rank != rank:
        raise AdapterError(f"{path} has the rank {rank}, and {found.rank} by the configuration")
    if found.use_dora != has_magnitude:
        kind = "DoRA" if has_magnitude else "LoRA"
        raise AdapterError(f"{path} has an adapter of {kind}, and use_dora is {found.use_dora} in the configuration")
    return found
