"""Adapters in any supported format: this package and mlx-lm (one format), PEFT, and CoreNet fine-tuning checkpoints."""

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ...errors import AdapterError, ConfigError
from ...files.output import output_folder
from ...files.paths import check_links, exists, is_file, user_path
from ...model.adapters import TENSOR_FILE, SavedAdapter, read_adapter, write_adapter
from ...model.lora import EMBEDDING, EMBEDDING_TARGET
from ...tokenizer.chat_template import read_chat_template
from ..open import TORCH_SUFFIXES
from ..origin import origin_from_card
from ..write.model_card import adapter_card, write_card
from . import peft
from .common import with_vocabulary
from .corenet import read_corenet_adapter

FORMS = ("peft", "mlx-lm", "openelm-mlx")


@dataclass(frozen=True)
class AdapterConversion:
    """The result of converting an adapter."""

    folder: Path
    form: str
    method: str
    num_matrices: int
    warnings: tuple[str, ...]


def open_adapter(path: str | Path, *, vocab_size: int | None = None) -> SavedAdapter:
    """Read an adapter in any supported format.

    Args:
        path: a folder written by this package, mlx-lm or PEFT, or a CoreNet fine-tuning checkpoint.
        vocab_size: vocabulary size of the model; padding rows of a CoreNet adapter after it are left out.
    Raises:
        AdapterError: if it is none of these, damaged, or more than LoRA, DoRA or whole matrices of an OpenELM.
    Warns:
        AlphaWarning: for a CoreNet checkpoint, which does not contain its alpha.
    """
    path = user_path(path)
    if not exists(path):
        raise AdapterError(f"{path} does not exist; an adapter is a folder, or a CoreNet .pt file")
    if is_file(path):
        if path.suffix not in TORCH_SUFFIXES or path.name == peft.OLD_TENSOR_FILE:
            raise AdapterError(f"{path} is a file; an adapter is the folder that contains it, or a CoreNet .pt file")
        adapter = read_corenet_adapter(path)
        return adapter if vocab_size is None else with_vocabulary(adapter, vocab_size)
    check_links(path)
    if exists(path / TENSOR_FILE):
        return replace(read_adapter(path), chat_template=read_chat_template(path))
    if peft.is_peft(path):
        return replace(peft.read_peft(path), chat_template=read_chat_template(path))
    raise AdapterError(f"{path} holds no adapter: neither {TENSOR_FILE} nor {peft.TENSOR_FILE} exists")


def convert_adapter(
    adapter: str | Path, output: str | Path, *, to: str = "openelm-mlx", force: bool = False
) -> AdapterConversion:
    """Convert an adapter to another format; the folder appears only when complete.

    Args:
        adapter: folder written by this package, mlx-lm or PEFT.
        output: folder to write.
        to: `peft`, `mlx-lm` or `openelm-mlx`. The last two are one format, but `mlx-lm` pads all ranks with zeros to
            the largest one.
        force: replace an adapter at `output`.
    Raises:
        OpenELMError: a subclass for each kind of failure; nothing is written.
    """
    if to not in FORMS:
        raise ConfigError(f"unknown adapter format {to!r} (choose from {', '.join(FORMS)})")
    path = user_path(adapter)
    if is_file(path) and path.suffix in TORCH_SUFFIXES:
        raise AdapterError(
            f"{adapter} is a checkpoint with a model and an adapter; convert it as a model, "
            "which writes the adapter to a subfolder of `output`"
        )
    folder = user_path(output)
    with output_folder(folder, overwrite=force) as place:
        found = open_adapter(adapter)
        place.protect(path)
        warnings: tuple[str, ...] = ()
        if to == "mlx-lm":
            found, warnings = _for_mlx_lm(found)
        if to == "peft" and found.example_format is not None:
            warnings = (f"PEFT's format does not record that prompts were in {found.example_format.records} format",)
        write = peft.write_peft if to == "peft" else write_adapter
        with place.replaced() as staging:
            write(staging, found)
            base = str(found.base.get("name") or "MODEL")
            library = "peft" if to == "peft" else "mlx"
            card = adapter_card(folder.name, found.method, base, origin_from_card(path), found.chat_template, library)
            write_card(staging, card)
    return AdapterConversion(folder, to, found.method, len(found.ranks) or len(found.tensors), warnings)


def _for_mlx_lm(adapter: SavedAdapter) -> tuple[SavedAdapter, tuple[str, ...]]:
    """The adapter in a form that stock mlx-lm can load, and warnings where mlx-lm computes something else with it.

    The loader of mlx-lm uses one rank and one method for all matrices, and applies the adapter of the embedding to a
    tied output too.
    """
    magnitudes = {path: magnitude for path, (_, magnitude) in adapter.ranks.items()}
    linear = [magnitude for path, magnitude in magnitudes.items() if path != EMBEDDING]
    if any(linear) and not all(linear):
        raise AdapterError("some matrices have DoRA and others plain LoRA, but mlx-lm supports only one method for all")
    warnings = []
    if EMBEDDING in magnitudes and adapter.base.get("share_input_output_layers", True):
        warnings.append(
            f"stock mlx-lm applies the adapter of {EMBEDDING_TARGET} to a tied output too: its results differ"
        )
    if magnitudes.get(EMBEDDING) is False and any(linear):
        warnings.append(f"stock mlx-lm treats plain LoRA on {EMBEDDING_TARGET} as DoRA: its results differ")
    return _with_one_rank(adapter), tuple(warnings)


def _with_one_rank(adapter: SavedAdapter) -> SavedAdapter:
    """The same adapter with all ranks padded to the largest one, by columns of zeros in A and rows of zeros in B."""
    rank = max((rank for rank, _ in adapter.ranks.values()), default=0)
    tensors = dict(adapter.tensors)
    for path, (own, _) in adapter.ranks.items():
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        tensors[f"{path}.lora_a"] = mx.pad(a, [(0, 0), (0, rank - own)])
        tensors[f"{path}.lora_b"] = mx.pad(b, [(0, rank - own), (0, 0)])
    return replace(adapter, tensors=tensors)
