"""Model folders on their way to disk, planned from shapes."""

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
_SMALL_FILES_BYTES = 10_000_000  # room for the tokenizer, the card and the like


def write_model(
    output: OutputFolder,
    config: OpenELMConfig,
    tensors: Mapping[str, Tensor],
    *,
    add_files: Callable[[Path], object] = lambda folder: None,
    on_written: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """Write a model folder that this package and stock mlx-lm read; it appears whole or not at all.

    Tensors are read one at a time.

    Args:
        add_files: writes what else belongs into the folder (tokenizer, card), given where.
        on_written: called with each tensor's name and size in bytes.
    Raises:
        DiskSpaceError: if the disk is too small.
        OutputError: if a file cannot be written.
    """
    shards = _plan_shards(tensors)
    _check_disk(output.path, sum(tensor.nbytes for tensor in tensors.values()))
    with output.replaced() as folder:
        _write_weights(folder, shards, on_written)
        _write_json(folder / "config.json", {**config.to_dict(), **_about(tensors)})
        _write_json(folder / "generation_config.json", _generation_config(config))
        add_files(folder)


def _check_disk(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < nbytes + _SMALL_FILES_BYTES:
        raise DiskSpaceError(folder, nbytes + _SMALL_FILES_BYTES, free)


def _plan_shards(tensors: Mapping[str, Tensor]) -> list[dict[str, LazyTensor]]:
    """Files of at most `SHARD_BYTES` each; the parts of a quantized matrix stay together."""
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
    """What `config.json` says beyond the network: who wrote it, the type of the tensors, how they are quantized.

    The commonest quantization stands for all, others under their matrix. A matrix that is not quantized needs no entry:
    readers, mlx-lm among them, look for its scales.
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
