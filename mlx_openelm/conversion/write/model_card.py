"""The README of a model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...version import __version__
from ..source import Source

if TYPE_CHECKING:
    from ..convert import Conversion


def model_card(conversion: Conversion, source: Source, command: str) -> str:
    """Markdown that says what the model is, where it came from and which command made it."""
    config = conversion.config
    quantization = conversion.quantization
    kind = conversion.dtype
    if quantization is not None:
        kind = f"{quantization.bits} bits ({quantization.mode}, groups of {quantization.group_size}), else {kind}"
    tokenizer = conversion.tokenizer or "none: the folder holds the network alone"
    heads = f"{min(config.num_query_heads)} to {max(config.num_query_heads)}"
    widths = f"{min(config.ffn_dims)} to {max(config.ffn_dims)}"
    use = "chat" if source.is_chat else 'generate --prompt "Once upon a time there was"'
    return f"""---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- openelm
---

# {conversion.folder.name}

An OpenELM ([arXiv:2404.14619](https://arxiv.org/abs/2404.14619)) in the format of MLX.

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

Made by openelm-mlx {__version__} with

```
{command}
```

Use it with

```
openelm-mlx {use} --model {conversion.folder.name}
```

The weights keep the licence of their source.
"""
