"""Random networks with the widths of published models but few layers, the same on every device."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..config import PRESETS, OpenELMConfig
from ..loading import assemble
from ..model.openelm import OpenELM, parameter_shapes
from ..quantization import Quantization

_VOCABULARY = 2048
_ENDS = (0, -1)  # the first and the last layer, which are the narrowest and the widest


def sample_config(size: str) -> OpenELMConfig:
    """The first and the last layer of a published size, with a small vocabulary."""
    config = PRESETS[size]
    return replace(
        config,
        num_transformer_layers=len(_ENDS),
        num_query_heads=tuple(config.num_query_heads[end] for end in _ENDS),
        num_kv_heads=tuple(config.num_kv_heads[end] for end in _ENDS),
        ffn_multipliers=tuple(config.ffn_multipliers[end] for end in _ENDS),
        qkv_multipliers=None,
        vocab_size=_VOCABULARY,
    )


@lru_cache(maxsize=2)
def sample_arrays(config: OpenELMConfig) -> Mapping[str, np.ndarray]:
    """Random float32 parameters by name; norms too, so that a forgotten one shows."""
    random = np.random.default_rng(0)
    arrays = {}
    for name, shape in parameter_shapes(config).items():
        values = random.standard_normal(shape, np.float32)
        arrays[name] = 1 + 0.1 * values if len(shape) == 1 else values * np.float32(shape[-1] ** -0.5)
    return arrays


def sample_network(config: OpenELMConfig, dtype: mx.Dtype) -> OpenELM:
    """A network with these parameters on the default device."""
    return assemble(config, {name: mx.array(array) for name, array in sample_arrays(config).items()}, {}, dtype)


def packed_arrays(
    config: OpenELMConfig, quantization: Quantization, dtype: mx.Dtype
) -> tuple[dict[str, mx.array], dict[str, Quantization]]:
    """The same parameters in a type, with all matrices quantized, and the quantization of each; for `assemble`."""
    arrays: dict[str, mx.array] = {}
    packed: dict[str, Quantization] = {}
    for name, values in sample_arrays(config).items():
        array = mx.array(values).astype(dtype)
        if array.ndim == 1:
            arrays[name] = array
            continue
        path = name.removesuffix(".weight")
        packed[path] = quantization
        arrays.update({f"{path}.{part}": one for part, one in quantization.quantize(array).items()})
    mx.eval(arrays)
    return arrays, packed


def sample_tokens(rows: int, length: int) -> mx.array:
    """Random ids (rows, length), the same in every call."""
    return mx.array(np.random.default_rng(length).integers(3, _VOCABULARY, (rows, length)).astype(np.int32))
