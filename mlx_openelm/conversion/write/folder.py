"""Writing model folders; the shards are planned from shapes alone."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...config import OpenELMConfig
from ...errors import DiskSpaceError
from ...files.output import OutputFolder
from ...quantization import PackedTensor, Quantization
from ...tensors import LazyTensor, write_safetensors
from ...version import __version__
from ..source import Tensor

SHARD_BYTES = 5_000_000_000
_SMALL_FILES_BYTES = 10_000_000  # allowance for the tokenizer, the model card and so on


def write_model(
    output: OutputFolder,
    config: OpenELMConfig,
    tensors: Mapping[str, Tensor],
    *,
    sampling: Mapping[str, Any] | None = None,
    add_files: Callable[[Path], object] = lambda folder: None,
    on_written: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """Write a model folder that this package and stock mlx-lm can load; it appears only when complete.

    Tensors are read block by block.

    Args:
        sampling: see `Source`.
        add_files: called with the temporary folder; writes the other files (tokenizer, model card).
        on_written: called with a tensor's name and the bytes just written.
    Raises:
        DiskSpaceError: if the disk does not have enough free space.
        OutputError: if a file cannot be written.
    """
    shards = _plan_shards(tensors)
    _check_disk(output.path, sum(tensor.nbytes for tensor in tensors.values()))
    with output.replaced() as folder:
        _write_weights(folder, shards, on_written)
        _write_json(folder / "config.json", {**config.to_dict(), **_about(tensors)})
        _write_json(folder / "generation_config.json", {**_generation_config(config), **(sampling or {})})
        add_files(folder)


def _check_disk(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < nbytes + _SMALL_FILES_BYTES:
        raise DiskSpaceError(folder, nbytes + _SMALL_FILES_BYTES, free)


def _plan_shards(tensors: Mapping[str, Tensor]) -> list[dict[str, LazyTensor]]:
    """Distribute tensors over files of at most `SHARD_BYTES`; the parts of a quantized matrix stay together."""
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        filled += tensor.nbytes
        if isinstance(tensor, PackedTensor):
            path = name.removesuffix(".weight")
            shards[-1].update({f"{path}.{part}": lazy for part, lazy in tensor.parts.items()})
        else:
            shards[-1][name] = tensor
    return shards


def _write_weights(folder: Path, shards: list[dict[str, LazyTensor]], on_written: Callable[[str, int], None]) -> None:
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with open(folder / name, "wb") as file:
            write_safetensors(file, shard, {"format": "mlx"}, on_written)
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def _about(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The entries of `config.json` besides the network's shape: package version, dtype and quantization.

    The most common quantization is the default; matrices with another one get their own entries. Unquantized matrices
    need no entry: readers, including mlx-lm, check whether a matrix has scales.
    """
    dtype = str(tensors["transformer.norm.weight"].dtype).removeprefix("mlx.core.")
    about: dict[str, Any] = {"torch_dtype": dtype, "openelm_mlx_version": __version__}
    packed = {n.removesuffix(".weight"): t.quantization for n, t in tensors.items() if isinstance(t, PackedTensor)}
    if packed:
        kinds: list[Quantization] = list(packed.values())
        common = max(dict.fromkeys(kinds), key=kinds.count)
        others = {path: kind.to_dict() for path, kind in packed.items() if kind != common}
        about["quantization"] = about["quantization_config"] = {**common.to_dict(), **others}
    return about


def _generation_config(config: OpenELMConfig) -> dict[str, Any]:
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "max_length": config.max_context_length,
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
