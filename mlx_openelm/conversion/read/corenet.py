"""Checkpoints of CoreNet, the PyTorch library that OpenELM was trained with, and model folders of Apple's MLX port."""

from collections.abc import Mapping
from pathlib import Path

from ...config import OpenELMConfig
from ...errors import AdapterError, ConfigError
from ...files.json_file import read_json_object
from ...files.paths import exists
from ...tensors import LazyTensor, read_safetensors
from ...tokenizer.chat_template import template_by_name
from ..source import Source, make_source
from .config import read_config_file
from .torch_file import read_torch_file


def read_checkpoint(path: Path, config: OpenELMConfig | None = None) -> Source:
    """Open the model in a CoreNet `.pt` file.

    Args:
        config: configuration of the model; by default the `config.json` beside the file.
    Raises:
        ConfigError: if there is no configuration.
        AdapterError: if the file also contains an adapter, which would be lost.
        TorchFileError, WeightsError: if the file is damaged or does not match the configuration.
    """
    tensors = checkpoint_tensors(path)
    if holds_adapter(tensors):
        raise AdapterError(
            f"{path} holds a model and an adapter; separate them with `openelm-mlx convert {path.name}`, the only "
            "command that accepts such a file as a model"
        )
    return checkpoint_source(path, tensors, config)


def checkpoint_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a CoreNet `.pt` file, under their names in the Hugging Face checkpoints."""
    return _rename(read_torch_file(path))


def holds_adapter(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a checkpoint comes from fine-tuning with LoRA or DoRA."""
    return any(".lora_" in name for name in tensors)


def checkpoint_source(path: Path, tensors: Mapping[str, LazyTensor], config: OpenELMConfig | None) -> Source:
    """The model from the tensors of a checkpoint without adapter tensors; see `read_checkpoint`."""
    if config is None:
        if not exists(path.parent / "config.json"):
            raise ConfigError(
                f"{path} does not contain the widths of its layers; set `config` to 270M, 450M, 1.1B or 3B, "
                "a CoreNet YAML file or a config.json"
            )
        config = read_config_file(path.parent / "config.json")
    return make_source(
        config,
        tensors,
        has_padding=True,
        name=path.name,
        folder=path.parent,
        chat_template=template_by_name(path.stem),
    )


def read_apple_mlx(folder: Path, config: OpenELMConfig | None = None) -> Source:
    """Open a model folder of Apple's MLX port: CoreNet's names in `weights.safetensors`, unquantized or 4-bit.

    Raises:
        ConfigError, WeightsError: if a file is damaged or the files do not match.
    """
    written = read_json_object(folder / "config.json", ConfigError, optional=True)
    return make_source(
        config or read_config_file(folder / "config.json"),
        _rename(read_safetensors(folder / "weights.safetensors")),
        written.get("quantization"),
        has_padding=True,
        name=folder.resolve().name,
        folder=folder,
        chat_template=template_by_name(folder.resolve().name),
    )


def _rename(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Translate CoreNet's names to those of the Hugging Face checkpoints, which are kept if already used."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("classifier."):
            name = name.replace("classifier.", "lm_head.", 1)
        elif not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        renamed[name] = tensor
    return renamed
