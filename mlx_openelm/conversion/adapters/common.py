"""What adapters of every form have in common: which matrices they may be on, and one scale for all of them."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ...errors import AdapterError
from ...model.adapters import SavedAdapter
from ...model.lora import EMBEDDING, EMBEDDING_TARGET
from ..source import LARGEST_PADDING

_PATH = re.compile(rf"transformer\.({EMBEDDING_TARGET}|layers\.\d+\.(attn\.(qkv_proj|out_proj)|ffn\.proj_[12]))")


def check_path(path: str) -> None:
    """Make sure that a matrix is one that may have an adapter here.

    Raises:
        AdapterError: if it is another one, such as `lm_head`.
    """
    if not _PATH.fullmatch(path):
        raise AdapterError(
            f"there is an adapter on {path}; an OpenELM has them on {EMBEDDING} and on qkv_proj, out_proj, proj_1 and "
            "proj_2 of its layers"
        )


def check_pairs(tensors: Mapping[str, mx.array]) -> None:
    """Make sure that each `lora_a` has a `lora_b` of its rank, and that nothing stands alone.

    Raises:
        AdapterError: naming what is missing or does not fit.
    """
    for name in tensors:
        path, _, _ = name.rpartition(".")
        missing = [part for part in ("lora_a", "lora_b") if f"{path}.{part}" not in tensors]
        if missing:
            raise AdapterError(f"the adapter is incomplete: {path} has no {missing[0]}")
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise AdapterError(f"{path} has matrices of {a.shape} and {b.shape}, which have no product")


def with_one_scale(tensors: Mapping[str, mx.array], scales: Mapping[str, float]) -> tuple[dict[str, mx.array], float]:
    """The commonest of the scales, and tensors that mean the same under it: others are multiplied into `lora_b`.

    Args:
        scales: of each path; none is zero.
    """
    values = list(scales.values())
    common = max(dict.fromkeys(values), key=values.count)
    scaled = dict(tensors)
    for path, scale in scales.items():
        if not math.isclose(scale, common):
            scaled[f"{path}.lora_b"] = tensors[f"{path}.lora_b"].astype(mx.float32) * (scale / common)
    return scaled, common


def with_vocabulary(adapter: SavedAdapter, vocab_size: int) -> SavedAdapter:
    """An adapter without the rows that fill its vocabulary up behind `vocab_size`, as CoreNet's have them."""
    name = f"{EMBEDDING}.lora_a"
    if name not in adapter.tensors or not 0 < adapter.tensors[name].shape[0] - vocab_size < LARGEST_PADDING:
        return adapter
    return replace(adapter, tensors={**adapter.tensors, name: adapter.tensors[name][:vocab_size]})


def check_number(name: str, value: Any) -> float:
    """A positive number.

    Raises:
        AdapterError: if it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise AdapterError(f"{name} must be a positive number; got {value!r}")
    return float(value)
