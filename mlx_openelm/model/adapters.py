"""Adapters on disk, in the format of stock mlx-lm: `adapters.safetensors` and `adapter_config.json`.

Full fine-tuning saves the same two files, with the parameters under their own names.
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
from ..errors import AdapterError, OpenELMError, quoted, readable, shorten
from ..files.fields import Fields
from ..files.json_file import read_json_object
from ..files.paths import exists
from ..quantization import matrix_shape
from ..tensors import checked_cast, dtype_name, read_safetensors, save_arrays
from ..tokenizer.chat_template import TEMPLATE_FILE
from ..tokenizer.example_format import ExampleFormat, format_entry, saved_format
from ..tokenizer.tokenizer import Tokenizer
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
LARGEST_NUMBER = 1_000_000  # far beyond any scale


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from its files, with this package's tensor names.

    Attributes:
        method: `lora`, `dora` or `full`; with `full` the tensors replace the model's own.
        scale: factor of the product of `lora_a` and `lora_b`.
        tensors: `PATH.lora_a` (inputs, rank), `PATH.lora_b` (rank, outputs) and, for DoRA, `PATH.m` (outputs,).
        alpha, rank_stabilized: what the scale was computed from, if known.
        base: name and widths of the model that the adapter was made for, if known.
        chat_template: of the tuned model, if it is not that of the base.
        example_format: of the examples that it was tuned on, if known.

    Raises:
        AdapterError: if a number or a tensor cannot be right, whatever the format.
    """

    method: str
    scale: float
    tensors: dict[str, mx.array]
    dropout: float = 0.0
    alpha: float | None = None
    rank_stabilized: bool = False
    base: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    example_format: ExampleFormat | None = None

    def __post_init__(self) -> None:
        if not abs(self.scale) <= LARGEST_NUMBER:
            raise AdapterError(f"scale must be a number up to {LARGEST_NUMBER:,}; got {quoted(self.scale)}")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout must be at least 0 and below 1; got {quoted(self.dropout)}")
        if self.alpha is not None and not abs(self.alpha) <= LARGEST_NUMBER:
            raise AdapterError(f"alpha must be a number up to {LARGEST_NUMBER:,}; got {quoted(self.alpha)}")
        for name, tensor in self.tensors.items():
            if not mx.issubdtype(tensor.dtype, mx.floating):
                kind = dtype_name(tensor.dtype)
                raise AdapterError(f"{readable(name)} has type {kind}; an adapter has floating-point numbers")
            if self.method == "full" or not name.endswith((".lora_a", ".lora_b")):
                continue
            if tensor.ndim != 2:
                raise AdapterError(f"{readable(name)} must be a matrix; it has the shape {tensor.shape}")
            if not tensor.size:
                raise AdapterError(f"{readable(name)} of shape {tensor.shape} is empty")

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Give a model's tokenizer what the adapter records: its chat template and the format of its examples."""
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        if self.example_format is not None:
            tokenizer.example_format = self.example_format

    @property
    def ranks(self) -> dict[str, tuple[int, bool]]:
        """The rank of each path, and whether it has magnitudes (DoRA)."""
        return {
            name.removesuffix(".lora_a"): (a.shape[1], name.removesuffix("lora_a") + MAGNITUDE in self.tensors)
            for name, a in self.tensors.items()
            if name.endswith(".lora_a")
        }


def save_adapter(
    folder: Path,
    tensors: Mapping[str, mx.array],
    method: str,
    config: AdapterConfig | None,
    base: Mapping[str, Any],
    chat_template: str | None = None,
    example_format: ExampleFormat | None = None,
) -> None:
    """Write an adapter into an existing folder.

    Args:
        tensors: see `SavedAdapter`.
        config: the adapter's settings; `None` if the method is `full`.
        base: the description of its model from `about_base`.
        chat_template, example_format: see `SavedAdapter`.
    """
    saved = SavedAdapter(
        method,
        1.0,
        dict(tensors),
        base=dict(base),
        chat_template=chat_template,
        example_format=example_format,
    )
    if config is not None:
        saved = replace(
            saved,
            scale=config.scale,
            dropout=config.dropout,
            alpha=config.alpha,
            rank_stabilized=config.rank_stabilized,
        )
    write_adapter(folder, saved)


def write_adapter(folder: Path, adapter: SavedAdapter) -> None:
    """Write an adapter into an existing folder.

    mlx-lm finds matrices by the number of adapted layers, counted from the end, and by their names within a layer.
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
        values["rank_stabilized"] = adapter.rank_stabilized
    values["base"] = adapter.base
    values |= format_entry(adapter.example_format)
    values["openelm_mlx_version"] = __version__
    save_arrays(folder / TENSOR_FILE, adapter.tensors, {"format": "mlx"})
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_template(folder, adapter)


def write_template(folder: Path, adapter: SavedAdapter) -> None:
    """Write the adapter's chat template, if it has one, where `transformers` looks for it."""
    if adapter.chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(adapter.chat_template, encoding="utf-8")


def about_base(name: str, config: OpenELMConfig) -> dict[str, Any]:
    """What an adapter records about its model, for error messages."""
    names = ("num_transformer_layers", "model_dim", "vocab_size", "share_input_output_layers")
    return {"name": name, **{key: getattr(config, key) for key in names}}


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter that this package or mlx-lm wrote.

    Raises:
        AdapterError: if a file is missing or damaged, or contains an invalid setting.
    """
    values = read_adapter_config(folder)
    method = values.text("fine_tune_type", "lora", choices=TUNING_METHODS)
    lora = values.table("lora_parameters")
    limits = -LARGEST_NUMBER, LARGEST_NUMBER
    scale = lora.number("scale", 1.0, *limits) if method == "full" else lora.number("scale", ..., *limits)
    dropout = lora.number("dropout", 0.0, *limits)
    alpha = values.number("alpha", None, *limits)
    base = values.table("base")
    # "rank_stabilised" was written until 2026-11-25
    rank_stabilized = values.flag("rank_stabilized", values.flag("rank_stabilised", False))
    example_format = saved_format(values)
    tensors = read_tensors(folder / TENSOR_FILE)
    try:
        return SavedAdapter(
            method, scale, tensors, dropout, alpha, rank_stabilized, dict(base), example_format=example_format
        )
    except AdapterError as error:
        raise AdapterError(f"{folder / TENSOR_FILE}: {error}") from error


def read_adapter_config(folder: Path) -> Fields:
    """The settings in an `adapter_config.json`.

    Raises:
        AdapterError: if the file is missing or is not a JSON object.
    """
    if not exists(folder / CONFIG_FILE):
        raise AdapterError(f"{folder} is not an adapter: {CONFIG_FILE} is missing")
    return read_json_object(folder / CONFIG_FILE, AdapterError)


def read_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a safetensors file.

    Raises:
        AdapterError: if it is missing or damaged.
    """
    try:
        return {name: tensor.read() for name, tensor in read_safetensors(path).items()}
    except OpenELMError as error:
        raise AdapterError(str(error)) from error


def apply_adapter(model: OpenELM, adapter: SavedAdapter, dtype: mx.Dtype | None = None) -> None:
    """Apply an adapter to the model that it was made for.

    Args:
        dtype: type of the adapter's matrices; by default the one that the model computes in.
    Raises:
        AdapterError: if it was made for another model; the message gives the shapes of both.
        WeightsError: if its values overflow the dtype that the model computes in.
    """
    dtype = dtype or model.transformer.norm.weight.dtype
    if adapter.method == "full":
        _check_full(model, adapter)
        model.update(tree_unflatten([(name, checked_cast(name, a, dtype)) for name, a in adapter.tensors.items()]))
        return
    ranks = adapter.ranks
    layers = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)
    modules = {path: module for path, module in model.named_modules() if isinstance(module, layers)}
    check_adapter(adapter, {f"{path}.weight": matrix_shape(module) for path, module in modules.items()})
    wrap(model, ranks, adapter.scale, adapter.dropout)
    for path, module in adapters(model):
        for name in ("lora_a", "lora_b"):
            module[name] = checked_cast(f"{path}.{name}", adapter.tensors[f"{path}.{name}"], dtype)
        if ranks[path][1]:
            module[MAGNITUDE] = adapter.tensors[f"{path}.{MAGNITUDE}"].astype(mx.float32)
    mx.eval(model.parameters())
    cache_scales(model)


def check_adapter(adapter: SavedAdapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the matrices of an adapter fit a model.

    Args:
        shapes: shapes of the model's parameters by name, as if none were quantized.
    Raises:
        AdapterError: if they do not fit; the message names the path and both shapes.
    """
    known = (*LINEAR_TARGETS, EMBEDDING_TARGET)
    if not adapter.ranks:
        raise AdapterError("the adapter contains no lora_a tensor")
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
                    f"the adapter is for another model: {path}.{name} has shape {found.shape}; this model needs "
                    f"{shape}{_made_for(adapter)}"
                )
    rest = [name for name in adapter.tensors if name not in expected]
    if rest:
        raise AdapterError(f"the adapter contains unexpected tensors: {shorten(rest)}")


def _check_full(model: OpenELM, adapter: SavedAdapter) -> None:
    own = dict(tree_flatten(model.parameters()))
    for name, tensor in adapter.tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            if name.removesuffix("weight") + "scales" in own:
                raise AdapterError(f"{name} was trained in full, but this model is quantized: use the unquantized one")
            here = f"this model needs {own[name].shape}" if name in own else "this model has no such parameter"
            raise AdapterError(
                f"the adapter is for another model: {name} has shape {tensor.shape}; {here}{_made_for(adapter)}"
            )


def _made_for(adapter: SavedAdapter) -> str:
    base = adapter.base
    if not base:
        return ""
    return (
        f" (it was made for {base.get('name')}: {base.get('num_transformer_layers')} layers, "
        f"model_dim {base.get('model_dim')})"
    )


def _key(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[3:]) if path.startswith("transformer.layers.") else path
