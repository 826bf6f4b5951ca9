"""Adapters in any form: those of this package and of mlx-lm, those of PEFT, and CoreNet's fine-tuning checkpoints."""

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ...errors import AdapterError, ConfigError
from ...files.output import output_folder
from ...model.adapters import TENSOR_FILE, SavedAdapter, read_adapter, write_adapter
from ...model.lora import EMBEDDING, EMBEDDING_TARGET
from ..open import TORCH_SUFFIXES
from . import peft
from .common import with_vocabulary
from .corenet import read_corenet_adapter

FORMS = ("peft", "mlx-lm", "openelm-mlx")


@dataclass(frozen=True)
class AdapterConversion:
    """What the conversion of an adapter wrote."""

    folder: Path
    form: str
    method: str
    num_matrices: int
    warnings: tuple[str, ...]


def open_adapter(path: str | Path, *, vocab_size: int | None = None) -> SavedAdapter:
    """An adapter in any form.

    Args:
        path: a folder of this package, of mlx-lm or of PEFT, or a fine-tuning checkpoint of CoreNet.
        vocab_size: of the model that it is for; rows that fill up CoreNet's vocabulary behind it are left out.
    Raises:
        AdapterError: if it is none of them, damaged, or more than LoRA, DoRA or whole matrices of an OpenELM.
    Warns:
        AlphaWarning: for a checkpoint of CoreNet, which does not say its alpha.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise AdapterError(f"{path} does not exist; an adapter is a folder, or a CoreNet .pt file")
    if path.is_file():
        if path.suffix not in TORCH_SUFFIXES or path.name == peft.OLD_TENSOR_FILE:
            raise AdapterError(f"{path} is a file; an adapter is the folder of it, or a CoreNet .pt file")
        adapter = read_corenet_adapter(path)
        return adapter if vocab_size is None else with_vocabulary(adapter, vocab_size)
    if (path / TENSOR_FILE).exists():
        return read_adapter(path)
    if peft.is_peft(path):
        return peft.read_peft(path)
    raise AdapterError(f"{path} holds no adapter: neither {TENSOR_FILE} nor {peft.TENSOR_FILE} is in it")


def convert_adapter(
    adapter: str | Path, output: str | Path, *, to: str = "openelm-mlx", force: bool = False
) -> AdapterConversion:
    """Write an adapter in another form; the folder appears when it is whole.

    Args:
        adapter: folder of this package, of mlx-lm or of PEFT.
        to: `peft`, or `mlx-lm` and `openelm-mlx`, which are one form; for the former, ranks are made equal by zeros.
        force: replace an adapter at `output`.
    Raises:
        OpenELMError: of the kind that fits; nothing is written then.
    """
    if to not in FORMS:
        raise ConfigError(f"unknown adapter format {to!r} (choose from {', '.join(FORMS)})")
    path = Path(adapter).expanduser()
    if path.is_file() and path.suffix in TORCH_SUFFIXES:
        raise AdapterError(
            f"{adapter} is a checkpoint that holds model and adapter; convert it as a model, "
            "and the adapter is written to a subfolder of the `output`"
        )
    folder = Path(output).expanduser()
    with output_folder(folder, overwrite=force) as place:
        found = open_adapter(adapter)
        place.protect(path)
        warnings: tuple[str, ...] = ()
        if to == "mlx-lm":
            found, warnings = _for_mlx_lm(found)
        write = peft.write_peft if to == "peft" else write_adapter
        with place.replaced() as staging:
            write(staging, found)
    return AdapterConversion(folder, to, found.method, len(found.ranks) or len(found.tensors), warnings)


def _for_mlx_lm(adapter: SavedAdapter) -> tuple[SavedAdapter, tuple[str, ...]]:
    """An adapter as stock mlx-lm can load it, and where it computes something else with it.

    Its loader gives every matrix the same rank and method, and puts both on a tied output too.
    """
    magnitudes = {path: magnitude for path, (_, magnitude) in adapter.ranks.items()}
    linear = [magnitude for path, magnitude in magnitudes.items() if path != EMBEDDING]
    if any(linear) and not all(linear):
        raise AdapterError("some matrices have DoRA and others plain LoRA, and mlx-lm has one method for all")
    warnings = []
    if EMBEDDING in magnitudes and adapter.base.get("share_input_output_layers", True):
        warnings.append(f"stock mlx-lm puts the adapter of {EMBEDDING_TARGET} on a tied output too: its results differ")
    if magnitudes.get(EMBEDDING) is False and any(linear):
        warnings.append(f"stock mlx-lm takes plain LoRA on {EMBEDDING_TARGET} beside DoRA for DoRA: its results differ")
    return _with_one_rank(adapter), tuple(warnings)


def _with_one_rank(adapter: SavedAdapter) -> SavedAdapter:
    """The same adapter, where columns and rows of zeros make all ranks equal."""
    rank = max((rank for rank, _ in adapter.ranks.values()), default=0)
    tensors = dict(adapter.tensors)
    for path, (own, _) in adapter.ranks.items():
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        tensors[f"{path}.lora_a"] = mx.pad(a, [(0, 0), (0, rank - own)])
        tensors[f"{path}.lora_b"] = mx.pad(b, [(0, rank - own), (0, 0)])
    return replace(adapter, tensors=tensors)
