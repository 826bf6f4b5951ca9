"""Merging an adapter into the weights of its model, row by row and in float32, and writing the result.

A merged matrix is w + s A B; with DoRA, each row is then scaled to its learned norm. An adapter on a tied embedding
changes only the input embedding, so the merged model is untied: its output matrix is the base embedding. Quantized
matrices are dequantized first. Quantizing the result again loses small changes; `merge` measures how much.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from .conversion.adapters.forms import open_adapter
from .conversion.open import open_model, open_source
from .conversion.source import Source, Tensor
from .conversion.write.folder import write_model
from .conversion.write.model_card import merged_card, write_card
from .errors import AdapterError
from .evaluation.divergence import NUM_TEXTS, divergences
from .files.output import OutputFolder, output_folder
from .files.paths import user_path
from .loading import dtype_named, load_source
from .model.adapters import SavedAdapter, check_adapter
from .model.lora import EMBEDDING, MAGNITUDE
from .model.openelm import parameter_shapes
from .quantization import PackedTensor, Quantization, pack
from .tensors import LazyTensor, checked_cast
from .tokenizer.files import write_tokenizer

_OUTPUT = "lm_head"


@dataclass(frozen=True)
class Merge:
    """The result of a merge."""

    folder: Path
    num_merged: int  # matrices
    unties: bool  # the output has its own matrix now
    dequantized: bool  # the base was quantized, the result is not
    output_bytes: int
    divergence: float | None = None  # KL(model with adapter, quantized result), nats per token
    adapter_divergence: float | None = None  # KL(model with adapter, model without), nats per token


def merge(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    quantization: Quantization | None = None,
    dtype: str = "auto",
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    force: bool = False,
    revision: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_measuring: Callable[[int, int], None] | None = None,
) -> Merge:
    """Merge an adapter into a model, and write the result with its tokenizer and a model card.

    Args:
        model: folder, hub id or name of the built-in model.
        adapter: see `open_adapter`.
        output: folder to write.
        quantization: quantize the result, and measure the loss as a KL divergence.
        dtype: type of the result; `auto` keeps that of the model.
        tokenizer, config, revision: as in `load`.
        force: replace a model folder at `output`.
        on_progress: called with the bytes written so far and the total bytes.
        on_measuring: called with the done and the total number of texts while that loss is measured.
    Raises:
        OpenELMError: a subclass for each kind of failure; nothing is written.
    """
    folder = user_path(output)
    with output_folder(folder, overwrite=force) as place:
        source, text, *_ = open_model([model], tokenizer=tokenizer, config=config, revision=revision)
        found = open_adapter(adapter, vocab_size=source.config.vocab_size)
        place.protect(source.folder, model, adapter, tokenizer, config)
        if text is not None:
            found.prepare(text)

        def add_files(staging: Path) -> None:
            write_card(staging, merged_card(folder, source, found, user_path(adapter).name, quantization))
            if text is not None:
                write_tokenizer(text, staging)

        result = _merge(place, source, found, quantization, dtype_named(dtype), add_files, on_progress)
    if quantization is None:
        return result
    report = on_measuring or (lambda done, total: None)
    report(0, NUM_TEXTS)
    base, merged = load_source(source), load_source(open_source([folder]))
    exact = load_source(merged_source(source, found))
    of_merged, of_base = divergences(exact, [merged, base], on_progress=report)
    return replace(result, divergence=of_merged, adapter_divergence=of_base)


def merged_source(source: Source, adapter: SavedAdapter, dtype: mx.Dtype | None = None) -> Source:
    """A model with an adapter merged into it; its tensors stay lazy, and rows are merged when read.

    Args:
        dtype: type of the result; by default that of the model.
    Raises:
        AdapterError: if the adapter does not fit the model.
    """
    dtype = dtype or source.tensors["transformer.norm.weight"].dtype
    tensors = {name: _in_full(name, tensor, dtype) for name, tensor in source.tensors.items()}
    config = source.config
    if adapter.method == "full":
        for name, tensor in adapter.tensors.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise AdapterError(f"the adapter is for another model, which has {name} of shape {tensor.shape}")
            tensors[name] = _of_array(checked_cast(name, tensor, dtype))
        return replace(source, tensors=dict(tensors))
    check_adapter(adapter, {name: tensor.shape for name, tensor in tensors.items()})
    if EMBEDDING in adapter.ranks and config.share_input_output_layers:
        config = replace(config, share_input_output_layers=False)
        tensors[f"{_OUTPUT}.weight"] = tensors[f"{EMBEDDING}.weight"]
    for path in adapter.ranks:
        tensors[f"{path}.weight"] = _merged(path, tensors[f"{path}.weight"], adapter, dtype)
    return replace(source, config=config, tensors=dict(tensors))


def write_merged(
    source: Source,
    adapter: SavedAdapter,
    folder: Path,
    *,
    quantization: Quantization | None = None,
    dtype: mx.Dtype | None = None,
    add_files: Callable[[Path], object] = lambda staging: None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Merge:
    """Write a model with an adapter merged into it.

    Args:
        quantization: quantize the result; its loss is not measured here, see `merge`.
        dtype: type of the result; by default that of the model.
        add_files: as in `write_model`.
        on_progress: as in `merge`.
        force: replace a model folder at `folder`.
    Raises:
        AdapterError: if the adapter does not fit the model.
        OutputError: if the folder exists or cannot be written.
    """
    with output_folder(folder, overwrite=force) as output:
        output.protect(source.folder)
        return _merge(output, source, adapter, quantization, dtype, add_files, on_progress)


def _merge(
    output: OutputFolder,
    source: Source,
    adapter: SavedAdapter,
    quantization: Quantization | None,
    dtype: mx.Dtype | None,
    add_files: Callable[[Path], object],
    on_progress: Callable[[int, int], None] | None,
) -> Merge:
    merged = merged_source(source, adapter, dtype)
    tensors: dict[str, Tensor] = {name: merged.tensors[name] for name in parameter_shapes(merged.config)}
    if quantization is not None:
        tensors = {
            name: pack(tensor, quantization) if quantization.fits(tensor.shape) else tensor  # type: ignore[arg-type]
            for name, tensor in tensors.items()
        }
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def on_written(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress is not None:
            on_progress(done, total)

    write_model(output, merged.config, tensors, sampling=merged.sampling, add_files=add_files, on_written=on_written)
    return Merge(
        output.name,
        len(adapter.ranks) or len(adapter.tensors),
        merged.config != source.config,
        quantization is None and any(isinstance(tensor, PackedTensor) for tensor in source.tensors.values()),
        total,
    )


def _in_full(name: str, tensor: Tensor, dtype: mx.Dtype) -> LazyTensor:
    full = tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor
    return full if full.dtype == dtype else full.map(lambda rows: checked_cast(name, rows, dtype), dtype)


def _of_array(array: mx.array) -> LazyTensor:
    return LazyTensor(array.shape, array.dtype, lambda start, stop: array[start:stop] if array.ndim else array)


def _merged(path: str, base: LazyTensor, adapter: SavedAdapter, dtype: mx.Dtype) -> LazyTensor:
    """The merged matrix (rows, columns) at `path`; each row is computed independently of the others."""
    parts: Mapping[str, mx.array] = {
        name: adapter.tensors[f"{path}.{name}"].astype(mx.float32)
        for name in ("lora_a", "lora_b", MAGNITUDE)
        if f"{path}.{name}" in adapter.tensors
    }
    a, b = parts["lora_a"], parts["lora_b"]
    left, right = (a, b) if path == EMBEDDING else (b.T, a.T)  # (rows, rank), (rank, columns)

    def read_rows(start: int, stop: int) -> mx.array:
        rows = base.read_rows(start, stop).astype(mx.float32) + adapter.scale * (left[start:stop] @ right)
        if MAGNITUDE in parts:
            length = checked_cast(path, mx.linalg.norm(rows, axis=1, keepdims=True), mx.float32, computed=True)
            rows = mx.where(length > 0, rows * (parts[MAGNITUDE][start:stop, None] / length), rows)
        return checked_cast(path, rows, dtype, computed=True)

    return LazyTensor(base.shape, dtype, read_rows)
