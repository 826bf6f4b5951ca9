"""The model card: the README of a model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...version import __version__
from ..source import Source

if TYPE_CHECKING:
    from ..convert import Conversion


def model_card(conversion: Conversion, source: Source, command: str) -> str:
    """The model card in Markdown: the model's properties, its source, and the command that created it."""
    config = conversion.config
    quantization = conversion.quantization
    kind = conversion.dtype
    if quantization is not None:
        kind = f"{quantization.bits}-bit ({quantization.mode}, groups of {quantization.group_size}), the rest {kind}"
    tokenizer = conversion.tokenizer or "none"
    heads = f"{min(config.num_query_heads)} to {max(config.num_query_heads)}"
    widths = f"{min(config.ffn_dims)} to {max(config.ffn_dims)}"
    use = "chat" if source.chat_template is not None else 'generate --prompt "Once upon a time there was"'
    return f"""---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- openelm
---

# {conversion.folder.name}

An OpenELM model ([arXiv:2404.14619](https://arxiv.org/abs/2404.14619)) in MLX format.

| | |
|---|---|
| parameters | {conversion.num_parameters:,} |
| weights | {kind} |
| size | {conversion.output_bytes / 2**20:,.1f} MiB, {conversion.bits_per_weight:.2f} bits per weight |
| layers | {config.num_transformer_layers}, with {heads} query heads and FFN widths {widths} |
| vocabulary | {config.vocab_size:,} |
| context | {config.max_context_length:,} tokens |
| source | {source.name} |
| tokenizer | {tokenizer} |

Created with openelm-mlx {__version__}:

```
{command}
```

Usage:

```
openelm-mlx {use} --model {conversion.folder.name}
```

The weights keep the licence of their source.
"""
