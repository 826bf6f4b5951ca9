"""Adapters on disk, in the form that stock mlx-lm reads too: `adapters.safetensors` and `adapter_config.json`.

What full fine-tuning trained is kept in the same form, with parameters under their own names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..config import OpenELMConfig
from ..errors import AdapterError, OpenELMError, shorten
from ..quantization import matrix_shape
from ..tensors import read_safetensors, save_arrays
from ..version import __version__
from .lora import (
    ADAPTER_METHODS,
    EMBEDDING_TARGET,
    LINEAR_TARGETS,
    MAGNITUDE,
    AdapterConfig,
    adapters,
    cache_scales,
    wrap,
)
from .openelm import OpenELM

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapters.safetensors"
TUNING_METHODS = (*ADAPTER_METHODS, "full")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it was read, under the names that this package uses.

    Attributes:
        method: `lora`, `dora`, or `full`: then the tensors take the places of the model's own.
        scale: what the product of `lora_a` and `lora_b` is multiplied by.
        tensors: `PATH.lora_a` (inputs, rank), `PATH.lora_b` (rank, outputs) and, of DoRA, `PATH.m` (outputs,).
        alpha, rank_stabilised: what the scale was made of, where that is known.
        base: name and widths of the model that it was made for, where that is known.
    """

    method: str
    scale: float
    tensors: dict[str, mx.array]
    dropout: float = 0.0
    alpha: float | None = None
    rank_stabilised: bool = False
    base: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, tuple[int, bool]]:
        """Of each path, the rank, and whether it has magnitudes."""
        return {
            name.removesuffix(".lora_a"): (a.shape[1], name.removesuffix("lora_a") + MAGNITUDE in self.tensors)
            for name, a in self.tensors.items()
            if name.endswith(".lora_a")
        }


def save_adapter(
    folder: Path, tensors: Mapping[str, mx.array], method: str, config: AdapterConfig | None, base: Mapping[str, Any]
) -> None:
    """Write an adapter into a folder that exists.

    Args:
        tensors: see `SavedAdapter`.
        config: what it was made by; `None` where the method is `full`.
        base: what `about_base` says of its model.
    """
    saved = SavedAdapter(method, 1.0, dict(tensors), base=dict(base))
    if config is not None:
        saved = replace(
            saved,
            scale=config.scale,
            dropout=config.dropout,
            alpha=config.alpha,
            rank_stabilised=config.rank_stabilised,
        )
    write_adapter(folder, saved)


def write_adapter(folder: Path, adapter: SavedAdapter) -> None:
    """Write an adapter into a folder that exists.

    Layers are counted from the end and matrices named within a layer, because that is how mlx-lm finds them.
    """
    values: dict[str, Any] = {"fine_tune_type": adapter.method}
    layers = {int(path.split(".")[2]) for path in adapter.tensors if path.startswith("transformer.layers.")}
    count = adapter.base.get("num_transformer_layers")
    values["num_layers"] = count - min(layers, default=count) if count else -1  # all
    if adapter.method != "full":
        ranks = adapter.ranks
        values["lora_parameters"] = {
            "rank": max(rank for rank, _ in ranks.values()),
            "scale": adapter.scale,
            "dropout": adapter.dropout,
            "keys": sorted({_key(path) for path in ranks}),
        }
        values["alpha"] = adapter.alpha
        values["rank_stabilised"] = adapter.rank_stabilised
    values["base"] = adapter.base
    values["openelm_mlx_version"] = __version__
    save_arrays(folder / TENSOR_FILE, adapter.tensors, {"format": "mlx"})
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def about_base(name: str, config: OpenELMConfig) -> dict[str, Any]:
    """What an adapter remembers of its model, for messages."""
    names = ("num_transformer_layers", "model_dim", "vocab_size", "share_input_output_layers")
    return {"name": name, **{key: getattr(config, key) for key in names}}


def read_adapter(folder: Path) -> SavedAdapter:
    """An adapter that this package or mlx-lm wrote.

    Raises:
        AdapterError: if a file is missing, damaged or says what no adapter can be.
    """
    values = read_adapter_config(folder)
    method = values.get("fine_tune_type", "lora")
    if method not in TUNING_METHODS:
        raise AdapterError(
            f"{folder / CONFIG_FILE}: unknown fine_tune_type {method!r} (choose from {', '.join(TUNING_METHODS)})"
        )
    lora = values.get("lora_parameters") or {}
    if not isinstance(lora, dict) or (method != "full" and "scale" not in lora):
        raise AdapterError(f"{folder / CONFIG_FILE} has no table lora_parameters with a scale")
    for name, value in (
        *((name, lora.get(name, 0.0)) for name in ("scale", "dropout")),
        ("alpha", values.get("alpha")),
    ):
        if type(value) not in (int, float) and not (name == "alpha" and value is None):
            raise AdapterError(f"{folder / CONFIG_FILE}: {name} must be a number; got {value!r}")
    return SavedAdapter(
        method,
        float(lora.get("scale", 1.0)),
        read_tensors(folder / TENSOR_FILE),
        float(lora.get("dropout", 0.0)),
        values.get("alpha"),
        bool(values.get("rank_stabilised", False)),
        values.get("base") or {},
    )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The table in an `adapter_config.json`.

    Raises:
        AdapterError: if there is none.
    """
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{folder} is not an adapter: {CONFIG_FILE} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise AdapterError(f"{folder / CONFIG_FILE} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{folder / CONFIG_FILE} must contain a table of settings")
    return values


def read_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a safetensors file.

    Raises:
        AdapterError: if it is missing or damaged.
    """
    try:
        return {name: tensor.read() for name, tensor in read_safetensors(path).items()}
    except OpenELMError as error:
        raise AdapterError(str(error)) from error


def apply_adapter(model: OpenELM, adapter: SavedAdapter) -> None:
    """Put an adapter on the model that it was made for, in the type that the model computes in.

    Raises:
        AdapterError: if it was made for another one; with the widths of both.
    """
    dtype = model.transformer.norm.weight.dtype
    if adapter.method == "full":
        _check_full(model, adapter)
        model.update(tree_unflatten([(name, a.astype(dtype)) for name, a in adapter.tensors.items()]))
        return
    ranks = adapter.ranks
    layers = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)
    modules = {path: module for path, module in model.named_modules() if isinstance(module, layers)}
    check_adapter(adapter, {f"{path}.weight": matrix_shape(module) for path, module in modules.items()})
    wrap(model, ranks, adapter.scale, adapter.dropout)
    for path, module in adapters(model):
        for name in ("lora_a", "lora_b"):
            module[name] = adapter.tensors[f"{path}.{name}"].astype(dtype)
        if ranks[path][1]:
            module[MAGNITUDE] = adapter.tensors[f"{path}.{MAGNITUDE}"].astype(mx.float32)
    mx.eval(model.parameters())
    cache_scales(model)


def check_adapter(adapter: SavedAdapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that the matrices of an adapter belong to those of a model.

    Args:
        shapes: of the model's parameters by name, as if none were quantized.
    Raises:
        AdapterError: naming the path and both widths.
    """
    known = (*LINEAR_TARGETS, EMBEDDING_TARGET)
    if not adapter.ranks:
        raise AdapterError("the adapter holds no lora_a")
    expected = set()
    for path, (rank, magnitude) in adapter.ranks.items():
        if f"{path}.weight" not in shapes or path.split(".")[-1] not in known:
            raise AdapterError(f"the adapter is for another model: this one has no {path}{_made_for(adapter)}")
        rows, columns = shapes[f"{path}.weight"]
        inputs, outputs = (rows, columns) if path.endswith(EMBEDDING_TARGET) else (columns, rows)
        wanted = {"lora_a": (inputs, rank), "lora_b": (rank, outputs), **({MAGNITUDE: (rows,)} if magnitude else {})}
        for name, shape in wanted.items():
            expected.add(f"{path}.{name}")
            found = adapter.tensors.get(f"{path}.{name}")
            if found is None:
                raise AdapterError(f"the adapter is incomplete: {path}.{name} is missing")
            if found.shape != shape:
                raise AdapterError(
                    f"the adapter is for another model: {path}.{name} has the shape {found.shape}, and {shape} is "
                    f"needed here{_made_for(adapter)}"
                )
    rest = [name for name in adapter.tensors if name not in expected]
    if rest:
        raise AdapterError(f"the adapter holds {shorten(rest)}, which belongs to no adapter")


def _check_full(model: OpenELM, adapter: SavedAdapter) -> None:
    own = dict(tree_flatten(model.parameters()))
    for name, tensor in adapter.tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            if name.removesuffix("weight") + "scales" in own:
                raise AdapterError(f"the model is quantized, and {name} was trained in full; use the model in full too")
            here = f"and {own[name].shape} is needed here" if name in own else "which is not there"
            raise AdapterError(
                f"the adapter is for another model: {name} has the shape {tensor.shape}, {here}{_made_for(adapter)}"
            )


def _made_for(adapter: SavedAdapter) -> str:
    base = adapter.base
    if not base:
        return ""
    return (
        f" (it was made for {base.get('name')}: {base.get('num_transformer_layers')} layers of {base.get('model_dim')})"
    )


def _key(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[3:]) if path.startswith("transformer.layers.") else path
