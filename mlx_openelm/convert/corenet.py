"""Checkpoints of CoreNet, the PyTorch library that OpenELM was trained with, and what Apple's MLX port made of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from ..config import OpenELMConfig
from ..errors import ConfigError, WeightsError
from ..tensors import LazyTensor, read_safetensors
from .huggingface import read_json
from .source import Source, make_source
from .torch_file import read_torch_file


def read_checkpoints(paths: Sequence[Path], config: OpenELMConfig | None = None) -> Source:
    """The model in a CoreNet `.pt` file, or the average of several: Apple's final weights are such averages.

    Args:
        config: what the checkpoint was trained as; without it a `config.json` has to lie beside the first file.
    Raises:
        ConfigError: if nothing says what the configuration is.
        TorchFileError, WeightsError: if a file is damaged or the files do not belong together.
    """
    folder = paths[0].parent
    if config is None:
        if not (folder / "config.json").exists():
            raise ConfigError(
                f"{paths[0]} does not say how wide its layers are; name --config 270M, 450M, 1.1B or 3B, "
                "a CoreNet YAML file or a config.json"
            )
        config = OpenELMConfig.from_file(folder / "config.json")
    checkpoints = [_rename(read_torch_file(path)) for path in paths]
    for path, tensors in zip(paths[1:], checkpoints[1:], strict=True):
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in checkpoints[0].items()}:
            raise WeightsError(f"{path} holds other tensors than {paths[0]}, so that they have no average")
    tensors = checkpoints[0] if len(paths) == 1 else _average(checkpoints)
    name = paths[0].name if len(paths) == 1 else f"the average of {len(paths)} checkpoints"
    return make_source(
        config, tensors, has_padding=True, name=name, folder=folder, is_chat="instruct" in paths[0].name.lower()
    )


def read_apple_mlx(folder: Path, config: OpenELMConfig | None = None) -> Source:
    """The model in a folder of Apple's MLX port: CoreNet's names in `weights.safetensors`, full or 4-bit.

    Raises:
        ConfigError, WeightsError: if a file is damaged or the files do not belong together.
    """
    written = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    return make_source(
        config or OpenELMConfig.from_file(folder / "config.json"),
        _rename(read_safetensors(folder / "weights.safetensors")),
        written.get("quantization"),
        has_padding=True,
        name=folder.resolve().name,
        folder=folder,
        is_chat="instruct" in folder.resolve().name.lower(),
    )


def _rename(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """CoreNet's names to those of the Hugging Face checkpoints, which may stand there already."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("classifier."):
            name = name.replace("classifier.", "lm_head.", 1)
        elif not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        renamed[name] = tensor
    return renamed


def _average(checkpoints: Sequence[Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
    return {name: _mean([tensors[name] for tensors in checkpoints]) for name in checkpoints[0]}


def _mean(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Their mean, added up in float32."""

    def read_rows(start: int, stop: int) -> mx.array:
        total = mx.zeros((1,))
        for tensor in tensors:
            total = total + tensor.read_rows(start, stop)
        return (total / len(tensors)).astype(tensors[0].dtype)

    return LazyTensor(tensors[0].shape, tensors[0].dtype, read_rows)
