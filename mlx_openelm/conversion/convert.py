"""Conversion of a source to a model folder: dtype, quantization, vocabulary padding and tokenizer."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..config import OpenELMConfig
from ..errors import ConfigError
from ..files.output import output_folder
from ..files.paths import exists, user_path
from ..machine.device import DTYPES, written_dtype
from ..model.adapters import about_base, check_adapter, write_adapter
from ..model.openelm import parameter_shapes
from ..quantization import PackedTensor, Quantization, pack
from ..runs import checkpoints_to_average
from ..tensors import LazyTensor, checked_cast
from ..tokenizer.chat_template import OPENELM
from ..tokenizer.files import JSON_FILE, tokenizer_files
from .open import TORCH_SUFFIXES, open_model
from .origin import origin_of
from .source import Source, Tensor
from .write.folder import write_model
from .write.model_card import adapter_card, model_card, write_card

ADAPTER_FOLDER = "adapter"  # inside the model folder


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote."""

    folder: Path
    config: OpenELMConfig
    dtype: str
    quantization: Quantization | None
    num_parameters: int
    bits_per_weight: float
    source_bytes: int
    output_bytes: int
    not_quantized: tuple[str, ...]  # matrices whose width is not a multiple of the group size
    tokenizer: str | None  # its origin
    warnings: tuple[str, ...]
    adapter: Path | None = None  # folder of the adapter found in the source

    def __repr__(self) -> str:
        stored = f"{self.quantization.bits}-bit {self.quantization.mode}" if self.quantization else self.dtype
        return (
            f"Conversion({str(self.folder)!r}: {self.num_parameters:,} parameters in {stored}, "
            f"{self.bits_per_weight:.2f} bits per weight, {self.output_bytes / 2**20:,.1f} MiB)"
        )


def convert(
    source: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    quantize: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    dequantize: bool = False,
    dtype: str = "auto",
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    chat_template: str | Path | None = None,
    keep_padding: bool = False,
    force: bool = False,
    revision: str | None = None,
    alpha: float | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """Convert OpenELM weights in any supported format to an MLX model folder.

    Tensors are streamed: peak memory stays near the size of the largest one. The folder appears only when complete.

    Args:
        source: a folder or hub id (Hugging Face, MLX community, Apple's MLX port, or written by this function), a
            CoreNet `.pt` file, or several of these, which are averaged. If the source is a CoreNet fine-tuning
            checkpoint, its adapter is written to the subfolder `adapter`.
        output: folder to write; by default the source's name in the current folder.
        quantize: bits per weight; without `quantize` and `mode`, a quantized source keeps its quantization.
        group_size: values that share a scale; 64 by default in affine mode.
        mode: `affine`, `mxfp4`, `mxfp8` or `nvfp4`.
        dequantize: write the matrices of a quantized source unquantized.
        dtype: `auto` (keeps a 16-bit type, converts float32 to bfloat16), `float16`, `bfloat16` or `float32`.
        config: a preset (`270M`, `450M`, `1.1B`, `3B`), a CoreNet YAML file or a `config.json`.
        tokenizer: file, folder or hub id; `"none"` writes the model without a tokenizer.
        chat_template: `openelm`, or a file with a Jinja template, in place of the source's own template.
        keep_padding: keep the padding rows of CoreNet's vocabulary.
        force: replace a model folder at `output`.
        revision: branch, tag or commit on the hub.
        alpha: alpha of the adapter in a fine-tuning checkpoint; by default the value in `config`, else the rank.
        on_progress: called with a tensor's name, the bytes written so far and the total bytes.
    Raises:
        OpenELMError: a subclass for each kind of failure; nothing is written.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    wanted = _wanted_quantization(quantize, group_size, mode, dequantize)
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"unknown dtype {dtype!r} (choose from auto, {', '.join(DTYPES)})")
    folder = user_path(output) if output is not None else _default_output(sources)
    with output_folder(folder, overwrite=force) as place:
        found, text, tokenizer_origin, adapter = open_model(
            sources,
            tokenizer=tokenizer,
            config=config,
            revision=revision,
            alpha=alpha,
            keep_padding=keep_padding,
            take_adapter=True,
            chat_template=chat_template,
        )
        template_file = None if chat_template == OPENELM else chat_template
        place.protect(*sources, config, template_file, found.folder, text.path if text else None)
        if adapter is not None:
            adapter = replace(adapter, base=about_base(folder.name, found.config))
            check_adapter(adapter, parameter_shapes(found.config))

        target_dtype = _target_dtype(dtype, found)
        tensors = {
            name: _converted(name, found.tensors[name], target_dtype, wanted, dequantize)
            for name in parameter_shapes(found.config)  # the same order, and so the same file, from every source
        }
        files = tokenizer_files(text) if text is not None else {}
        result = _summary(folder, found, tensors, target_dtype, tokenizer_origin)
        if files and JSON_FILE not in files:
            warning = f"{JSON_FILE} is not written, because it would give other ids: some programs need it"
            result = replace(result, warnings=(*result.warnings, warning))
        if adapter is not None:
            result = replace(result, adapter=folder / ADAPTER_FOLDER)
        command = _command(
            sources,
            quantize,
            group_size,
            mode,
            dequantize,
            dtype,
            config,
            tokenizer,
            chat_template,
            keep_padding,
            revision,
            alpha,
        )

        def add_files(staging: Path) -> None:
            write_card(staging, model_card(result, found, command))
            for name, content in files.items():
                (staging / name).write_bytes(content)
            if adapter is not None:
                (staging / ADAPTER_FOLDER).mkdir()
                write_adapter(staging / ADAPTER_FOLDER, adapter)
                origin = origin_of(found.folder, found.config)
                card = adapter_card(ADAPTER_FOLDER, adapter.method, folder.name, origin, found.chat_template)
                write_card(staging / ADAPTER_FOLDER, card)

        done_bytes = 0

        def on_written(name: str, nbytes: int) -> None:
            nonlocal done_bytes
            done_bytes += nbytes
            if on_progress is not None:
                on_progress(name, done_bytes, result.output_bytes)

        write_model(place, found.config, tensors, sampling=found.sampling, add_files=add_files, on_written=on_written)
        return result


def average(
    checkpoints: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    dtype: str = "float32",
    force: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """Write the average of several checkpoints of one run, as Apple did for its final weights; see `convert`.

    Args:
        checkpoints: model folders, or the folder of a run for its last checkpoints, as many as it keeps.
    Raises:
        TrainingError: if there are fewer than two.
        WeightsError: if the models have different configurations.
        OpenELMError: another subclass for each kind of failure; nothing is written.
    """
    given = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    return convert(checkpoints_to_average(given), output, dtype=dtype, force=force, on_progress=on_progress)


def _wanted_quantization(
    bits: int | None, group_size: int | None, mode: str | None, dequantize: bool
) -> Quantization | None:
    if bits is None and mode is None:
        if group_size is not None:
            raise ConfigError("`group_size` requires `quantize` or `mode`")
        return None
    if dequantize:
        raise ConfigError("`quantize` and `dequantize` are mutually exclusive")
    return Quantization.of(bits, group_size, mode)


def _default_output(sources: Sequence[str | Path]) -> Path:
    """The source's name in the current folder."""
    name = Path(str(sources[0]).rstrip("/")).name
    return Path(Path(name).stem if name.endswith(TORCH_SUFFIXES) else name or "OpenELM")


def _target_dtype(requested: str, source: Source) -> mx.Dtype:
    if requested != "auto":
        return DTYPES[requested]
    return written_dtype(source.tensors["transformer.norm.weight"].dtype)  # norms are never quantized


def _converted(name: str, tensor: Tensor, dtype: mx.Dtype, wanted: Quantization | None, dequantize: bool) -> Tensor:
    """A tensor as it will be written: checked, cast to `dtype`, and quantized where requested and possible."""
    if isinstance(tensor, PackedTensor):
        if not dequantize and wanted in (None, tensor.quantization):
            return tensor.cast(name.removesuffix(".weight"), dtype)
        tensor = tensor.dequantize()
    tensor = _cast(name, tensor, dtype)
    return pack(tensor, wanted) if wanted is not None and wanted.fits(tensor.shape) else tensor


def _cast(name: str, tensor: LazyTensor, dtype: mx.Dtype) -> LazyTensor:
    return tensor.map(lambda array: checked_cast(name, array, dtype), dtype)


def _summary(
    folder: Path, source: Source, tensors: dict[str, Tensor], dtype: mx.Dtype, tokenizer_origin: str | None
) -> Conversion:
    packed = [tensor.quantization for tensor in tensors.values() if isinstance(tensor, PackedTensor)]
    plain = [name for name, tensor in tensors.items() if len(tensor.shape) == 2 and isinstance(tensor, LazyTensor)]
    output_bytes = sum(tensor.nbytes for tensor in tensors.values())
    parameters = source.config.num_parameters
    warnings = []
    if dtype == mx.float16 and source.config.model_dim >= OpenELMConfig.preset("3B").model_dim:
        warnings.append("activations of the 3B model overflow float16, according to Apple; use `dtype=bfloat16`")
    return Conversion(
        folder=folder,
        config=source.config,
        dtype=str(dtype).removeprefix("mlx.core."),
        quantization=max(packed, key=packed.count) if packed else None,
        num_parameters=parameters,
        bits_per_weight=output_bytes * 8 / parameters,
        source_bytes=source.nbytes,
        output_bytes=output_bytes,
        not_quantized=tuple(plain) if packed else (),
        tokenizer=tokenizer_origin,
        warnings=tuple(warnings),
    )


def _command(
    sources: Sequence[str | Path],
    bits: int | None,
    group_size: int | None,
    mode: str | None,
    dequantize: bool,
    dtype: str,
    config: str | Path | None,
    tokenizer: str | Path | None,
    chat_template: str | Path | None,
    keep_padding: bool,
    revision: str | None,
    alpha: float | None,
) -> str:
    """The equivalent command line, without local folder paths."""
    words = ["openelm-mlx", "convert", *map(_without_folder, sources)]
    words += [] if bits is None else ["--quantize", str(bits)]
    words += [] if group_size is None else ["--group-size", str(group_size)]
    words += [] if mode is None else ["--mode", mode]
    words += ["--dequantize"] if dequantize else []
    words += [] if dtype == "auto" else ["--dtype", dtype]
    words += [] if config is None else ["--config", Path(config).name]
    words += [] if tokenizer is None else ["--tokenizer", _without_folder(tokenizer)]
    words += [] if chat_template is None else ["--chat-template", _without_folder(chat_template)]
    words += ["--keep-padding"] if keep_padding else []
    words += [] if revision is None else ["--revision", revision]
    words += [] if alpha is None else ["--alpha", f"{alpha:g}"]
    return shlex.join(words)


def _without_folder(source: str | Path) -> str:
    """A hub id unchanged; only the last part of a local path."""
    return Path(source).resolve().name if exists(Path(source)) else str(source)
