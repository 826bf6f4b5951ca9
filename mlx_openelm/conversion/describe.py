"""Sizes and memory needs of a model, layer by layer."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..cache.config import KV_GROUP_SIZES, CacheConfig, kv_bytes_per_layer, kv_cache_bytes
from ..config import OpenELMConfig
from ..model.adapters import SavedAdapter, check_adapter
from ..quantization import PackedTensor
from .source import Source


@dataclass(frozen=True)
class LayerInfo:
    """Widths and sizes of one layer."""

    query_heads: int
    kv_heads: int
    ffn_dim: int
    parameters: int
    nbytes: int
    kv_bytes_per_token: int  # keys and values in 16 bits


@dataclass(frozen=True)
class ModelInfo:
    """Shape and size of a model; `nbytes` counts the tensors on disk."""

    name: str
    model_dim: int
    head_dim: int
    vocab_size: int
    max_context_length: int
    gated_ffn: bool
    tied_embeddings: bool
    layers: tuple[LayerInfo, ...]
    parameters: int
    nbytes: int
    kv_bytes_per_token: int  # in 16 bits
    kv_cache_bytes: dict[str, int]  # at full context length, by kind of cache
    weights: dict[str, int]  # storage type: number of tensors

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per parameter, including the scales of quantized groups."""
        return self.nbytes * 8 / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}


def describe(source: Source) -> ModelInfo:
    """Describe an opened model; no tensor is read."""
    config = source.config
    layers = []
    for layer in range(config.num_transformer_layers):
        prefix = f"transformer.layers.{layer}."
        layers.append(
            LayerInfo(
                config.num_query_heads[layer],
                config.num_kv_heads[layer],
                config.ffn_dims[layer],
                config.layer_parameters[layer],
                sum(tensor.nbytes for name, tensor in source.tensors.items() if name.startswith(prefix)),
                kv_bytes_per_layer(config)[layer],
            )
        )
    return ModelInfo(
        name=source.name,
        model_dim=config.model_dim,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_context_length=config.max_context_length,
        gated_ffn=config.ffn_with_glu,
        tied_embeddings=config.share_input_output_layers,
        layers=tuple(layers),
        parameters=config.num_parameters,
        nbytes=source.nbytes,
        kv_bytes_per_token=kv_cache_bytes(config, 1),
        kv_cache_bytes={
            kind.label: kv_cache_bytes(config, config.max_context_length, cache=kind) for kind in _kinds(config)
        },
        weights=dict(Counter(_kind(tensor) for tensor in source.tensors.values())),
    )


def _kinds(config: OpenELMConfig) -> list[CacheConfig]:
    kinds = [CacheConfig()]
    if config.head_dim % min(KV_GROUP_SIZES) == 0:
        kinds += [CacheConfig(bits=8), CacheConfig(bits=4)]
    window = config.max_context_length // 4
    return [*kinds, CacheConfig(window=window)] if window > CacheConfig.sinks else kinds


@dataclass(frozen=True)
class AdapterInfo:
    """Method and size of an adapter."""

    method: str
    rank: int  # the largest one; 0 after full fine-tuning
    scale: float
    parameters: int
    matrices: dict[str, int]  # name within a layer: number of matrices with an adapter


def describe_adapter(source: Source, adapter: SavedAdapter) -> AdapterInfo:
    """Describe an adapter of an opened model.

    Raises:
        AdapterError: if the adapter does not fit the model.
    """
    paths = [name.rpartition(".")[0] for name in adapter.tensors]
    if adapter.method != "full":
        paths = list(adapter.ranks)
        check_adapter(adapter, {name: tensor.shape for name, tensor in source.tensors.items()})
    return AdapterInfo(
        adapter.method,
        max((rank for rank, _ in adapter.ranks.values()), default=0),
        adapter.scale,
        sum(tensor.size for tensor in adapter.tensors.values()),
        dict(Counter(path.split(".")[-1] for path in paths)),
    )


def _kind(tensor: object) -> str:
    if isinstance(tensor, PackedTensor):
        quantization = tensor.quantization
        return f"{quantization.bits}-bit {quantization.mode}, group {quantization.group_size}"
    return str(tensor.dtype).removeprefix("mlx.core.")  # type: ignore[attr-defined]
