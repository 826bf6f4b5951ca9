"""Model cards: the README of each folder with a model or an adapter, with the metadata that the hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import OpenELMConfig
from ...model.adapters import SavedAdapter
from ...quantization import Quantization
from ...version import __version__
from ..origin import CARD, UNKNOWN_LICENSE, Origin, origin_of
from ..source import Source

if TYPE_CHECKING:
    from ..convert import Conversion

_PAPER = "[arXiv:2404.14619](https://arxiv.org/abs/2404.14619)"
_NO_LICENSE = (
    "The licence is not known here: set `license` above before you publish these weights. It follows from the data and "
    "the model that they were made from."
)


def write_card(folder: Path, text: str) -> None:
    """Write a card into an existing folder."""
    (folder / CARD).write_text(text, encoding="utf-8", errors="replace")


def model_card(conversion: Conversion, source: Source, command: str) -> str:
    """The card of a converted model: its properties, its source, and the command that created it."""
    origin = origin_of(source.folder, source.config)
    quantization = conversion.quantization
    kind = conversion.dtype
    if quantization is not None:
        kind = f"{quantization.bits}-bit ({quantization.mode}, groups of {quantization.group_size}), the rest {kind}"
    rows = {
        "parameters": f"{conversion.num_parameters:,}",
        "weights": kind,
        "size": f"{conversion.output_bytes / 2**20:,.1f} MiB, {conversion.bits_per_weight:.2f} bits per weight",
        **_shape(conversion.config),
        "source": source.name,
        "tokenizer": conversion.tokenizer or "none",
    }
    name = conversion.folder.name
    relation = "quantized" if quantization is not None else None
    return _card(
        _metadata(origin, relation),
        name,
        f"An OpenELM model ({_PAPER}) in MLX format.",
        rows,
        command,
        f"openelm-mlx {_use(source.chat_template)} --model {name}",
        _terms(origin, source.name),
    )


def merged_card(
    folder: Path, source: Source, adapter: SavedAdapter, adapter_name: str, quantization: Quantization | None
) -> str:
    """The card of a model with an adapter merged into it."""
    origin = origin_of(source.folder, source.config)
    bits = f" --quantize {quantization.bits}" if quantization is not None else ""
    rows = {
        "base model": source.name,
        "adapter": f"{adapter_name} ({adapter.method})",
        **({"weights": f"{quantization.bits}-bit ({quantization.mode})"} if quantization is not None else {}),
        **_shape(source.config),
    }
    return _card(
        _metadata(origin, "finetune"),
        folder.name,
        f"{source.name} with the adapter {adapter_name} merged into it.",
        rows,
        f"openelm-mlx merge --model {source.name} --adapter {adapter_name} --output {folder.name}{bits}",
        f"openelm-mlx {_use(adapter.chat_template or source.chat_template)} --model {folder.name}",
        _terms(origin, source.name),
    )


def adapter_card(
    name: str, method: str, base_name: str, origin: Origin, chat_template: str | None = None, library: str = "mlx"
) -> str:
    """The card of an adapter.

    Args:
        name: of the folder.
        method: `lora`, `dora` or `full`.
        base_name: of its model, which may be a folder.
        origin: of its model.
        library: `mlx`, or `peft` for an adapter in that format.
    """
    metadata = _metadata(origin, "adapter", library)
    metadata["tags"].append("full" if method == "full" else "lora")
    what = "The fine-tuned parameters" if method == "full" else f"An adapter ({method})"
    return _card(
        metadata,
        name,
        f"{what} for {base_name}, an OpenELM model ({_PAPER}).",
        {"base model": base_name, "method": method},
        None,
        f"openelm-mlx {_use(chat_template)} --model {base_name} --adapter {name}",
        _terms(origin, base_name),
    )


def trained_card(name: str, config: OpenELMConfig, settings: dict[str, str]) -> str:
    """The card of a model that was trained from scratch; `settings` become rows of its table."""
    rows = {"parameters": f"{config.num_parameters:,}", **_shape(config), **settings}
    metadata = _metadata(Origin(), None)
    use = f"openelm-mlx {_use(None)} --model {name}"
    return _card(metadata, name, f"An OpenELM ({_PAPER}) trained from scratch.", rows, None, use, _NO_LICENSE)


def _metadata(origin: Origin, relation: str | None, library: str = "mlx") -> dict[str, Any]:
    """What the hub reads; a base model that is not on the hub is left out, because the hub refuses other names."""
    values: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if origin.base_model is not None:
        values["base_model"] = origin.base_model
        if relation is not None:
            values["base_model_relation"] = relation
    values["license"] = origin.license
    values |= {
        name: getattr(origin, name) for name in ("license_name", "license_link") if getattr(origin, name) is not None
    }
    return {**values, "tags": ["mlx", "openelm"]}


def _shape(config: OpenELMConfig) -> dict[str, str]:
    heads = f"{min(config.num_query_heads)} to {max(config.num_query_heads)}"
    widths = f"{min(config.ffn_dims)} to {max(config.ffn_dims)}"
    return {
        "layers": f"{config.num_transformer_layers}, with {heads} query heads and FFN widths {widths}",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_context_length:,} tokens",
    }


def _use(chat_template: str | None) -> str:
    return "chat" if chat_template is not None else 'generate --prompt "Once upon a time there was"'


def _terms(origin: Origin, source: str) -> str:
    if origin.license == UNKNOWN_LICENSE:
        return f"The weights keep the licence of {source}. {_NO_LICENSE}"
    return f"The weights keep the licence of {source}: {origin.license_name or origin.license}."


def _card(
    metadata: dict[str, Any], name: str, what: str, rows: dict[str, str], command: str | None, use: str, terms: str
) -> str:
    import yaml

    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    made = f"Created with openelm-mlx {__version__}"
    made += f":\n\n```\n{command}\n```" if command is not None else "."
    return (
        f"---\n{front}---\n\n# {name}\n\n{what}\n\n| | |\n|---|---|\n{table}\n\n{made}\n\n"
        f"Usage:\n\n```\n{use}\n```\n\n{terms}\n"
    )
