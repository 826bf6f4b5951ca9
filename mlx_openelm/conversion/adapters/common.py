"""Code shared by all adapter formats: which matrices may have an adapter, and one common scale."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ...errors import AdapterError, quoted
from ...model.adapters import LARGEST_NUMBER, SavedAdapter
from ...model.lora import EMBEDDING, EMBEDDING_TARGET
from ..source import LARGEST_PADDING

_PATH = re.compile(rf"transformer\.({EMBEDDING_TARGET}|layers\.\d+\.(attn\.(qkv_proj|out_proj)|ffn\.proj_[12]))")


def check_path(path: str) -> None:
    """Make sure that the matrix at `path` may have an adapter.

    Raises:
        AdapterError: if it may not, such as `lm_head`.
    """
    if not _PATH.fullmatch(path):
        raise AdapterError(
            f"there is an adapter on {path}; OpenELM supports adapters on {EMBEDDING} and on qkv_proj, out_proj, "
            "proj_1 and proj_2 of the layers"
        )


def check_pairs(tensors: Mapping[str, mx.array]) -> None:
    """Make sure that `lora_a` (inputs, rank) and `lora_b` (rank, outputs) come in pairs of equal rank.

    Raises:
        AdapterError: naming the missing tensor, or the shapes that do not match.
    """
    for name in tensors:
        path, _, _ = name.rpartition(".")
        missing = [part for part in ("lora_a", "lora_b") if f"{path}.{part}" not in tensors]
        if missing:
            raise AdapterError(f"the adapter is incomplete: {path} has no {missing[0]}")
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise AdapterError(f"{path} has matrices of shapes {a.shape} and {b.shape}, which cannot be multiplied")


def with_one_scale(tensors: Mapping[str, mx.array], scales: Mapping[str, float]) -> tuple[dict[str, mx.array], float]:
    """Replace the scales of all paths by the most common one, which leaves the adapter's output unchanged.

    Args:
        tensors: adapter tensors by name.
        scales: scale of each path; not zero.
    Returns:
        The tensors, with any difference in scale multiplied into `lora_b` (in float32), and the common scale.
    Raises:
        AdapterError: if a product overflows.
    """
    values = list(scales.values())
    common = max(dict.fromkeys(values), key=values.count)
    scaled = dict(tensors)
    for path, scale in scales.items():
        if not math.isclose(scale, common):
            product = tensors[f"{path}.lora_b"].astype(mx.float32) * (scale / common)
            if not mx.all(mx.isfinite(product)).item():
                raise AdapterError(f"{path}.lora_b has values beyond the range of float32 with its scale of {scale:g}")
            scaled[f"{path}.lora_b"] = product
    return scaled, common


def with_vocabulary(adapter: SavedAdapter, vocab_size: int) -> SavedAdapter:
    """The adapter without the padding rows of CoreNet's vocabulary, which follow the first `vocab_size` rows."""
    name = f"{EMBEDDING}.lora_a"
    if name not in adapter.tensors or not 0 < adapter.tensors[name].shape[0] - vocab_size < LARGEST_PADDING:
        return adapter
    return replace(adapter, tensors={**adapter.tensors, name: adapter.tensors[name][:vocab_size]})


def check_number(name: str, value: Any) -> float:
    """The value as a float.

    Raises:
        AdapterError: if it is not a positive number, or far beyond any setting.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise AdapterError(f"{name} must be a positive number; got {quoted(value)}")
    if not value <= LARGEST_NUMBER:
        raise AdapterError(f"{name} must be a positive number up to {LARGEST_NUMBER:,}; got {quoted(value)}")
    return float(value)
