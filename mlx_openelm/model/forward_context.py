"""What all layers of one forward pass share: where tokens stand, what they attend to, and which kernels compute it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..cache.layouts import attention, differentiable_attention
from ..config import OpenELMConfig
from ..kernels import cpu
from ..kernels.fused import add_and_normalize
from ..machine.device import choices, on_cpu
from .fused_attention import FusedAttention
from .rope import Rope, TokenRope

NORM_EPS = 1e-6


@dataclass(frozen=True)
class ForwardContext:
    """What all layers of one forward pass share."""

    rows: int
    rotate: Rope | TokenRope
    attend: Callable[[int, mx.array, mx.array, mx.array], mx.array]  # layer, queries (or only the last), keys, values
    last_only: bool = False  # the last layer computes only the last token's hidden state
    fused: FusedAttention | None = None  # of a decoding step with the kernels of `kernels/fused.py`

    def add_and_norm(self, x: mx.array, update: mx.array | None, norm: nn.RMSNorm) -> tuple[mx.array, mx.array]:
        """Hidden states with an update, if there is one, and the norm of these."""
        if update is None:
            return x, norm(x)
        if self.fused is not None and update.dtype == x.dtype:
            return add_and_normalize(x, update, norm.weight, NORM_EPS)
        if on_cpu() and not norm.training:
            return cpu.add_and_normalize(x, update, norm.weight, NORM_EPS)
        x = x + update
        return x, norm(x)

    @classmethod
    def alone(
        cls, config: OpenELMConfig, rows: int, mask: mx.array | None = None, training: bool = False
    ) -> "ForwardContext":
        """A pass over whole rows without a cache; `mask` as from `segment_mask`, by default causal."""
        read = blockwise_attention if training else attention
        attend = lambda layer, queries, keys, values: read(queries, keys, values, mask)  # noqa: E731
        return cls(rows, Rope(config.rope_freq_constant, 0), attend)


def blockwise_attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    """`attention` of equally many queries and keys, in blocks of queries, each with only the keys that it may see.

    Gradients need the scores, which no fused kernel keeps; in blocks, nearly half of them are never computed.
    """
    block = choices().attention_block
    blocks = []
    for start in range(0, queries.shape[2], block):
        end = start + block
        seen = mask[..., start:end, :end] if mask is not None else None
        # The mask is not an argument: a checkpoint differentiates by all of them, and the fused backward of CUDA
        # has no gradient for a mask.
        read = mx.checkpoint(partial(differentiable_attention, mask=seen))
        blocks.append(read(queries[:, :, start:end], keys[:, :, :end], values[:, :, :end]))
    return mx.concatenate(blocks, axis=2)


def segment_mask(segments: mx.array) -> mx.array:
    """Mask, bool (B, 1, L, L): each token attends to itself and to earlier tokens of its segment (B, L)."""
    positions = mx.arange(segments.shape[1])
    causal = positions[None, :] <= positions[:, None]
    return (segments[:, None, :, None] == segments[:, None, None, :]) & causal
