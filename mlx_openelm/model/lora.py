"""Low-rank adapters: LoRA and DoRA on linear layers and on the token embedding, quantized or not.

LoRA (arXiv:2106.09685) adds `scale * x A B` to the output of a layer, with scale alpha / rank, or alpha / sqrt(rank) if
rank-stabilized (arXiv:2312.03732). DoRA (arXiv:2402.09353) rescales the adapted weights of each output to a learned
norm; gradients treat their current norm as a constant, as in its section 4.3.

Tensors are named and shaped as in mlx-lm: `lora_a` (input, rank), `lora_b` (rank, output), `m` (output,). If the output
is tied to the embedding, it reads the base embedding, as in CoreNet.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import AdapterError, ConfigError, shorten
from ..quantization import dequantized, matrix_shape
from .openelm import OpenELM

ADAPTER_METHODS = ("lora", "dora")
LARGEST_RANK = 8192  # more than any matrix of the published models has use for
MAGNITUDE = "m"  # last part of the parameter name
LINEAR_TARGETS = ("qkv_proj", "out_proj", "proj_1", "proj_2")
EMBEDDING_TARGET = "token_embeddings"
EMBEDDING = f"transformer.{EMBEDDING_TARGET}"  # its path


@dataclass(frozen=True)
class AdapterConfig:
    """Which matrices get an adapter, and its settings.

    Raises:
        ConfigError: if a value is out of range; the message names the field.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # probability of dropping each element of the adapter's input
    rank_stabilized: bool = False
    targets: tuple[str, ...] = LINEAR_TARGETS
    layers: int = 0  # only this many of the last layers; 0: all

    def __post_init__(self) -> None:
        if self.method not in ADAPTER_METHODS:
            raise ConfigError(f"unknown method {self.method!r} (choose from {', '.join(ADAPTER_METHODS)})")
        if self.rank < 1:
            raise ConfigError(f"rank must be positive; got {self.rank}")
        if self.rank > LARGEST_RANK:
            raise ConfigError(f"rank must be at most {LARGEST_RANK:,}; got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1; got {self.dropout}")
        if self.layers < 0:
            raise ConfigError(f"layers must not be negative; got {self.layers}")

    @property
    def scale(self) -> float:
        """Factor of the product of both matrices."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class Adapter(nn.Module):
    """A layer with a low-rank update: what linear layers and embeddings share."""

    def __init__(self, rank: int, scale: float, dropout: float, inputs: int, outputs: int):
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.lora_a = mx.zeros((inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))
        self._dropout_key: mx.array | None = None
        self._settled: mx.array | None = None

    @property
    def base(self) -> nn.Module:
        """The layer without its adapter."""
        raise NotImplementedError

    def cache_scales(self) -> None:
        """Compute the DoRA scale once, for decoding: it stays the same while nothing is trained."""
        if MAGNITUDE in self:
            self._settled = self._ratio()
            mx.eval(self._settled)

    def _add_magnitude(self) -> None:
        self._base_squared = mx.square(dequantized(self.base, mx.float32)).sum(axis=1)  # one value per row
        self.m = mx.sqrt(self._base_squared)
        mx.eval(self._base_squared, self.m)

    def _ratio(self) -> mx.array:
        raise NotImplementedError

    def _dropped(self, x: mx.array) -> mx.array:
        if not (self.training and self.dropout and self._dropout_key is not None):
            return x
        kept = mx.random.bernoulli(1 - self.dropout, x.shape, key=self._dropout_key)
        return mx.where(kept, x * (1 / (1 - self.dropout)), mx.zeros((), x.dtype))


class LoRALinear(Adapter):
    """A linear layer (outputs, inputs) with an adapter."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float = 0.0, magnitude: bool = False):
        outputs, inputs = matrix_shape(linear)
        super().__init__(rank, scale, dropout, inputs, outputs)
        self.linear = linear
        if magnitude:
            self._add_magnitude()

    @property
    def base(self) -> nn.Module:
        """The linear layer without its adapter."""
        return self.linear

    def __call__(self, x: mx.array) -> mx.array:
        """(..., inputs) to (..., outputs)."""
        y = self.linear(x)
        y = y + (self.scale * ((self._dropped(x) @ self.lora_a) @ self.lora_b)).astype(y.dtype)
        if MAGNITUDE not in self:
            return y
        return _times(y, self._ratio() if self._settled is None or self.training else self._settled)

    def _ratio(self) -> mx.array:
        """Learned norm over current norm of each output's weights, float32 (outputs,).

        |w + s a B|^2 = |w|^2 + 2 s (w a) B + s^2 |a B|^2. The base layer itself computes w a, so quantized weights are
        never dequantized.
        """
        through_base = self.linear(mx.stop_gradient(self.lora_a).T).astype(mx.float32)  # (rank, outputs)
        a, b = (mx.stop_gradient(matrix).astype(mx.float32) for matrix in (self.lora_a, self.lora_b))
        cross, own = (b * through_base).sum(axis=0), (b * (a.T @ a @ b)).sum(axis=0)
        return _over_length(self.m, self._base_squared + 2 * self.scale * cross + self.scale**2 * own)


class LoRAEmbedding(Adapter):
    """An embedding (vocabulary, width) with an adapter on its vectors; a tied output uses the base embedding."""

    def __init__(self, embedding: nn.Module, rank: int, scale: float, dropout: float = 0.0, magnitude: bool = False):
        super().__init__(rank, scale, dropout, *matrix_shape(embedding))
        self.embedding = embedding
        if magnitude:
            self._add_magnitude()

    @property
    def base(self) -> nn.Module:
        """The embedding without its adapter."""
        return self.embedding

    def __call__(self, tokens: mx.array) -> mx.array:
        """Ids (...) to vectors (..., width)."""
        y = self.embedding(tokens).astype(self.lora_a.dtype)  # MLX returns bfloat16 for some quantized embeddings
        added = self.scale * (self._dropped(self.lora_a[tokens]) @ self.lora_b)
        if MAGNITUDE not in self:
            return y + added.astype(y.dtype)
        settled = self._settled is not None and not self.training
        ratio = self._settled[tokens] if settled else self._ratio(tokens)  # type: ignore[index]
        return _times(y + added.astype(y.dtype), ratio[..., None])

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states (..., width) to logits (..., vocabulary), by the base embedding."""
        return self.embedding.as_linear(x)

    def _ratio(self, tokens: mx.array | None = None) -> mx.array:
        """Learned norm over current norm of the vectors of `tokens` (...) or of all ids, float32 (...)."""
        tokens = mx.arange(self.lora_a.shape[0]) if tokens is None else tokens
        base = self.embedding(tokens).astype(mx.float32)
        a, b = (mx.stop_gradient(matrix).astype(mx.float32) for matrix in (self.lora_a, self.lora_b))
        added = self.scale * (a[tokens] @ b)
        squared = self._base_squared[tokens] + (2 * base * added + added * added).sum(axis=-1)
        return _over_length(self.m[tokens], squared)


def add_adapter(model: OpenELM, config: AdapterConfig, seed: int = 0) -> None:
    """Add a new adapter to a model. The output does not change yet, because `lora_b` is zero.

    Raises:
        AdapterError: if a target is unknown, with a list of those that exist, or the model has too few layers.
    """
    paths = adapter_paths(model, config.targets, config.layers)
    keys = mx.random.split(mx.random.key(seed), len(paths))
    wrap(model, dict.fromkeys(paths, (config.rank, config.method == "dora")), config.scale, config.dropout)
    for (_, module), key in zip(adapters(model), keys, strict=True):
        bound = 1 / math.sqrt(module.lora_a.shape[0])
        module.lora_a = mx.random.uniform(-bound, bound, module.lora_a.shape, key=key)
    mx.eval(model.parameters())


def wrap(model: OpenELM, ranks: Mapping[str, tuple[int, bool]], scale: float, dropout: float = 0.0) -> None:
    """Wrap the matrices at these paths in adapters of zeros.

    Args:
        ranks: path: its rank, and whether it has magnitudes (DoRA).
    """
    modules = dict(model.named_modules())
    wrapped = []
    for path, (rank, magnitude) in ranks.items():
        kind = LoRAEmbedding if path.endswith(EMBEDDING_TARGET) else LoRALinear
        wrapped.append((path, kind(modules[path], rank, scale, dropout, magnitude)))
    model.update_modules(tree_unflatten(wrapped))


def adapter_paths(model: OpenELM, targets: Sequence[str], layers: int = 0) -> list[str]:
    """Paths of the matrices that `targets` name: the embedding first, then layer by layer.

    Args:
        targets: last parts of paths, such as `qkv_proj`.
        layers: only this many of the last layers; 0: all.
    Raises:
        AdapterError: if a target is unknown, with a list of those that exist, or the model has fewer layers.
    """
    unknown = [target for target in targets if target not in (*LINEAR_TARGETS, EMBEDDING_TARGET)]
    if unknown or not targets:
        known = ", ".join((*LINEAR_TARGETS, EMBEDDING_TARGET))
        raise AdapterError(f"{shorten(unknown) or 'an empty list of targets'} matches no matrix (choose from {known})")
    paths = [EMBEDDING] if EMBEDDING_TARGET in targets else []
    for layer in last_layers(model, layers):
        for target in LINEAR_TARGETS:
            if target in targets:
                part = "attn" if target in ("qkv_proj", "out_proj") else "ffn"
                paths.append(f"transformer.layers.{layer}.{part}.{target}")
    return paths


def last_layers(model: OpenELM, layers: int) -> range:
    """Indices of the last `layers` layers; 0: of all.

    Raises:
        AdapterError: if the model has fewer layers.
    """
    count = model.config.num_transformer_layers
    if layers > count:
        raise AdapterError(f"layers must be at most {count}, the depth of the model; got {layers}")
    return range(count - (layers or count), count)


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """The adapters of a model with their paths: the embedding first, then layer by layer."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Adapter)]
    yield from sorted(found, key=lambda entry: _place(entry[0]))


def adapter_parameters(model: OpenELM) -> dict[str, mx.array]:
    """Tensors of a model's adapters by name, in float32."""
    parameters = {}
    for path, module in adapters(model):
        for name in ("lora_a", "lora_b", MAGNITUDE):
            if name in module:
                parameters[f"{path}.{name}"] = module[name].astype(mx.float32)
    return parameters


def cache_scales(model: OpenELM) -> None:
    """Compute the DoRA scales of all adapters once, for decoding."""
    for _, module in adapters(model):
        module.cache_scales()


def invalidate_scales(module: nn.Module) -> None:
    """Discard what `cache_scales` computed, after parameters have changed."""
    for _, adapter in adapters(module):
        adapter._settled = None


def set_dropout_keys(module: nn.Module, key: mx.array | None = None) -> None:
    """Give each adapter in a module its own random key, split from `key`; without a key nothing is dropped."""
    found = [adapter for _, adapter in adapters(module)]
    keys = [None] * len(found) if key is None or not found else list(mx.random.split(key, len(found)))
    for adapter, own in zip(found, keys, strict=True):
        adapter._dropout_key = own


def _over_length(magnitude: mx.array, squared: mx.array) -> mx.array:
    """Learned norm over current norm; 1 for a row of zeros, which has no direction, and NaN if the norm overflows."""
    ratio = mx.where(squared > 0, magnitude / mx.sqrt(mx.maximum(squared, 1e-30)), 1.0)
    return mx.where(squared < math.inf, ratio, math.nan)


def _times(y: mx.array, ratio: mx.array) -> mx.array:
    """`y * ratio`, computed in float32: bfloat16 would round a ratio near 1 to steps of 1/256."""
    return (y.astype(mx.float32) * ratio).astype(y.dtype)


def _place(path: str) -> tuple[int, int]:
    parts = path.split(".")
    layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
    order = (*LINEAR_TARGETS, EMBEDDING_TARGET)
    return layer, order.index(parts[-1]) if parts[-1] in order else 0
