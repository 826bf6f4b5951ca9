"""The OpenELM network, top to bottom (paper: arXiv:2404.14619).

Parameters have the names of the Hugging Face checkpoints. In shapes: B batch, L new tokens, S cached tokens plus L,
H query heads, K key/value heads, D head_dim, M model_dim, F this layer's FFN width, V vocabulary.
"""

import warnings
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..cache.config import CacheConfig
from ..cache.kv_cache import KVCache, StepCache
from ..config import OpenELMConfig
from ..kernels import cpu
from ..machine.device import on_cpu
from .forward_context import NORM_EPS, ForwardContext, segment_mask
from .fused_attention import FusedAttention
from .rope import Rope

if TYPE_CHECKING:
    from ..generation.sampling import SamplingConfig


class ContextLengthWarning(UserWarning):
    """The text is longer than the context that the model was trained with, so its quality falls."""


class OpenELM(nn.Module):
    """A decoder-only language model whose layers differ in width.

    Attributes:
        sampling: how text is sampled by default, as the model's `generation_config.json` says; `None`: greedily.
    """

    sampling: "SamplingConfig | None" = None

    def __init__(self, config: OpenELMConfig):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        if not config.share_input_output_layers:
            self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)

    def __call__(self, tokens: mx.array, cache: KVCache | None = None) -> mx.array:
        """Logits of the token after each input token.

        Args:
            tokens: ids (B, L).
            cache: keys and values of earlier tokens; those of `tokens` are added.

        Returns:
            (B, L, V) in the dtype of the weights.

        Warns:
            ContextLengthWarning: once, when a sequence grows past `max_context_length`.
        """
        return self.logits(self.transformer(tokens, cache))

    def __repr__(self) -> str:
        config = self.config
        dtype = str(self.transformer.norm.weight.dtype).removeprefix("mlx.core.")
        bits = next((f"{layer.bits} bits, " for _, layer in self.named_modules() if hasattr(layer, "bits")), "")
        return (
            f"OpenELM({config.num_parameters:,} parameters in {bits}{dtype}, {config.num_transformer_layers} layers, "
            f"model_dim {config.model_dim})"
        )

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., M); a separate method, so that prefill can skip positions."""
        if self.config.share_input_output_layers:
            return self.transformer.token_embeddings.as_linear(hidden)
        return self.lm_head(hidden)

    @property
    def output_name(self) -> str:
        """Name of the parameter that computes `logits`."""
        tied = self.config.share_input_output_layers
        return "transformer.token_embeddings.weight" if tied else "lm_head.weight"

    @property
    def output_weight(self) -> mx.array:
        """The matrix (V, M) that computes `logits`, in an unquantized model."""
        return (self.transformer.token_embeddings if self.config.share_input_output_layers else self.lm_head).weight

    def make_cache(self, config: CacheConfig = CacheConfig()) -> KVCache:  # noqa: B008, frozen
        """An empty cache for one batch of sequences."""
        return KVCache(self.config.num_transformer_layers, config, self.config.rope_freq_constant)


class Transformer(nn.Module):
    """Embedding, layers and the last norm: tokens (B, L) to hidden states (B, L, M).

    `segments` (B, L) numbers the documents in a row; tokens attend only to their own document.
    """

    def __init__(self, config: OpenELMConfig):
        super().__init__()
        self.config = config
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = [Layer(config, layer) for layer in range(config.num_transformer_layers)]
        self.norm = nn.RMSNorm(config.model_dim, eps=NORM_EPS)

    def __call__(
        self,
        tokens: mx.array,
        cache: KVCache | None = None,
        segments: mx.array | None = None,
        last_only: bool = False,
        fused: bool = False,
    ) -> mx.array:
        """Hidden states (B, L, M); with `last_only`, those of the last tokens alone, (B, 1, M).

        With `fused`, tokens behind those in a cache are computed with fused kernels, which must work here.
        """
        B, L = tokens.shape
        self.warn_past_context(cache, L)
        if cache is None:
            mask = None if segments is None else segment_mask(segments)
            return self.run(tokens, ForwardContext.alone(self.config, B, mask, self.training))
        with cache.guarded():
            hidden = self.run(tokens, self.forward_context(B, cache, last_only and L > 1, fused))
            cache.advance(L)
        return hidden

    def forward_context(
        self, rows: int, cache: KVCache | StepCache, last_only: bool = False, fused: bool = False
    ) -> ForwardContext:
        """A pass over tokens that follow those in a cache, with fused kernels if they work here."""
        base = self.config.rope_freq_constant
        kernels = FusedAttention(cache, base) if fused else None
        return ForwardContext(rows, Rope(base, cache.positions), cache.attend, last_only, kernels)

    def run(self, tokens: mx.array, context: ForwardContext) -> mx.array:
        """Run all layers in this context: tokens (B, L) to hidden states."""
        B, L = tokens.shape
        x = self.token_embeddings(tokens).astype(self.norm.weight.dtype)  # (B, L, M)
        if L == 1:
            x = x.reshape(B, -1)  # saves two reshapes per matrix product
        update = None
        for layer in self.layers:
            x, update = layer.run(x, update, context)
        _, normed = context.add_and_norm(x, update, self.norm)
        return normed.reshape(B, -1, x.shape[-1])

    def warn_past_context(self, cache: KVCache | None, num_new: int) -> None:
        """Warn if `num_new` more tokens exceed the trained context, unless a window keeps distances within it."""
        limit = self.config.max_context_length
        if cache is not None and cache.config.window is not None and cache.config.window <= limit:
            return
        length = cache.longest if cache is not None else 0
        if length <= limit < length + num_new:
            warnings.warn(
                f"the text exceeds the {limit} positions that the model was trained with",
                ContextLengthWarning,
                stacklevel=3,
            )


class Layer(nn.Module):
    """Attention and feed-forward network, each with a norm before it and a residual connection."""

    def __init__(self, config: OpenELMConfig, layer: int):
        super().__init__()
        self.is_last = layer == config.num_transformer_layers - 1
        self.attn = Attention(config, layer)
        self.ffn = FeedForward(config, layer)
        self.attn_norm = nn.RMSNorm(config.model_dim, eps=NORM_EPS)
        self.ffn_norm = nn.RMSNorm(config.model_dim, eps=NORM_EPS)

    def __call__(self, x: mx.array, context: ForwardContext) -> mx.array:
        """Hidden states (B, L, M), or (B, M) for one token per row."""
        x, update = self.run(x, None, context)
        return x + update

    def run(self, x: mx.array, update: mx.array | None, context: ForwardContext) -> tuple[mx.array, mx.array]:
        """Hidden states and what is to be added to them, of the layer before and then of this one.

        The next layer adds it, because a sum and the norm that follows are one kernel on a GPU.
        """
        last_only = context.last_only and self.is_last
        x, normed = context.add_and_norm(x, update, self.attn_norm)
        read = self.attn(normed, context, last_only)
        x, normed = context.add_and_norm(x[:, -1:] if last_only else x, read, self.ffn_norm)
        return x, self.ffn(normed)


class Attention(nn.Module):
    """Grouped-query attention with this layer's number of heads, normalized queries and keys, and RoPE."""

    def __init__(self, config: OpenELMConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.num_query_heads = config.num_query_heads[layer]
        self.num_kv_heads = config.num_kv_heads[layer]
        self.head_dim = config.head_dim
        self.normalize_qk = config.normalize_qk_projections

        num_heads = self.num_query_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(config.model_dim, num_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.num_query_heads * self.head_dim, config.model_dim, bias=False)
        if self.normalize_qk:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=NORM_EPS)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=NORM_EPS)

    def __call__(self, x: mx.array, context: ForwardContext, last_only: bool = False) -> mx.array:
        B = context.rows
        qkv = self.qkv_proj(x).reshape(B, -1, self.num_query_heads + 2 * self.num_kv_heads, self.head_dim)
        if context.fused is None:
            read = context.attend(self.layer, *self._heads(qkv, context, last_only))
        else:
            read = context.fused(self, qkv)
        read = swap_heads(read)  # (B, L, H, D)
        shape = (B,) if x.ndim == 2 else read.shape[:2]
        return self.out_proj(read.reshape(*shape, -1))

    def _heads(self, qkv: mx.array, context: ForwardContext, last_only: bool) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values, normalized and rotated, of heads (B, L, H + 2K, D)."""
        queries, keys, values = self._heads_on_cpu(qkv, context) if on_cpu() else self._heads_on_gpu(qkv, context)
        return queries[:, :, -1:] if last_only else queries, keys, values

    def _heads_on_gpu(self, qkv: mx.array, context: ForwardContext) -> tuple[mx.array, mx.array, mx.array]:
        H, K = self.num_query_heads, self.num_kv_heads
        queries, keys, values = mx.split(swap_heads(qkv), [H, H + K], axis=1)
        if self.normalize_qk:  # before RoPE: the checkpoints were trained in this order
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return context.rotate(queries), context.rotate(keys), values

    def _heads_on_cpu(self, qkv: mx.array, context: ForwardContext) -> tuple[mx.array, mx.array, mx.array]:
        """As `_heads_on_gpu`, in fewer operations: on the CPU, a norm and a rotation are many."""
        H, K = self.num_query_heads, self.num_kv_heads
        norms = (self.q_norm.weight, self.k_norm.weight) if self.normalize_qk else None
        if not self.training:
            table = context.rotate.table(qkv.shape[1], self.head_dim)
            found = cpu.normalize_and_rotate(qkv, norms, table, H, NORM_EPS)
            if found is not None:
                return found
        heads, values = mx.split(swap_heads(qkv), [H + K], axis=1)
        if norms is not None:
            counts = zip((H, K), norms, strict=True)
            weight = mx.concatenate([mx.broadcast_to(w, (count, 1, self.head_dim)) for count, w in counts])
            heads = cpu.rms_norm(heads, None, NORM_EPS) * weight
        queries, keys = mx.split(context.rotate(heads), [H], axis=1)
        return queries, keys, values


class FeedForward(nn.Module):
    """The feed-forward network with this layer's width, gated (`proj_1` holds gate, then input) or plain."""

    def __init__(self, config: OpenELMConfig, layer: int):
        super().__init__()
        self.gated = config.ffn_with_glu
        self.activation = config.activation_fn_name
        ffn_dim = config.ffn_dims[layer]
        self.proj_1 = nn.Linear(config.model_dim, 2 * ffn_dim if self.gated else ffn_dim, bias=False)
        self.proj_2 = nn.Linear(ffn_dim, config.model_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        hidden = self.proj_1(x)  # (B, L, 2F) or (B, L, F)
        if not self.gated:
            return self.proj_2(activate(self.activation, hidden))
        if self.activation == "swish" and not self.training:
            product = cpu.gated(hidden)
            if product is not None:
                return self.proj_2(product)
        if hidden.shape[:-1] == (1,):  # one token: halves that lie apart, so that Metal need not copy their product
            gate, hidden = mx.split(hidden.reshape(2, -1), 2)
        else:
            gate, hidden = mx.split(hidden, 2, axis=-1)
        return self.proj_2(activate(self.activation, gate) * hidden)


def swap_heads(x: mx.array) -> mx.array:
    """(B, L, H, D) to (B, H, L, D), or back."""
    B, one, other, D = x.shape
    if 1 in (one, other):  # the order in memory stays the same
        return x.reshape(B, other, one, D)
    return x.transpose(0, 2, 1, 3)


def activate(name: str, x: mx.array) -> mx.array:
    """Apply an activation by its name in the configuration.

    This uses plain operations: MLX's own versions are compiled, which starts a C++ compiler on the CPU.
    """
    if name == "swish":
        return x * mx.sigmoid(x)
    if name == "gelu":
        return x * (1 + mx.erf(x * 2**-0.5)) / 2
    assert name == "relu", f"unknown activation {name}, which the configuration should have rejected"
    return mx.maximum(x, 0)


@lru_cache(maxsize=4)
def parameter_shapes(config: OpenELMConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter by name; nothing is allocated."""
    parameters = tree_flatten(OpenELM(config).parameters(), destination={})
    return MappingProxyType({name: array.shape for name, array in dict(parameters).items()})
