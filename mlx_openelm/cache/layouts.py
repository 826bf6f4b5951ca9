"""How the keys and values of one layer are stored: in full, quantized, or in a rotating window.

A layer's buffers are a tuple of arrays (B, K, S, ...) with one slot per token. In the decoding step a slot number is an
array () int32, so that a compiled step can be called with another one each time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..kernels import cpu
from ..kernels.fused import attend_quantized, can_attend_quantized
from ..machine.device import choices, on_cpu

Buffers = tuple[mx.array, ...]


@dataclass(frozen=True)
class FullKV:
    """Keys and values (B, K, S, D) as the layer computed them."""

    num_arrays: ClassVar[int] = 2
    is_quantized: ClassVar[bool] = False

    def allocate(self, keys: mx.array, values: mx.array, length: int) -> Buffers:
        """Empty buffers with `length` slots for keys and values of this type."""
        return _zeros(keys, length), _zeros(values, length)

    def grow(self, buffers: Buffers, used: int, length: int) -> Buffers:
        """Buffers with `length` slots that begin with the first `used` ones."""
        return tuple(_grown(array, used, length) for array in buffers)

    def write(self, buffers: Buffers, slot: mx.array, keys: mx.array, values: mx.array) -> Buffers:
        """Buffers with the keys and values of L new tokens from a slot on."""
        return _written(buffers, slot, (keys, values))

    def extend(
        self, buffers: Buffers, offset: int, keys: mx.array, values: mx.array, queries: mx.array
    ) -> tuple[Buffers, mx.array]:
        """Write L tokens behind `offset` others; attention output of the last of them, by queries (B, H, _, D)."""
        buffers = self.write(buffers, mx.array(offset), keys, values)
        return buffers, self.attend(buffers, queries, offset + keys.shape[2])

    def attend(self, buffers: Buffers, queries: mx.array, end: int) -> mx.array:
        """Causal attention of the newest tokens' queries (B, H, L, D) over the first `end` slots."""
        keys, values = (array[..., :end, :] for array in buffers)
        return attention(queries, keys, values)

    def attend_masked(self, buffers: Buffers, queries: mx.array, mask: mx.array) -> mx.array:
        """Attention over the slots of whole buffers that a mask, bool and broadcast to (B, H, L, S), allows."""
        keys, values = buffers
        return attention(queries, keys, values, mask)

    def unread(self, buffers: Buffers) -> Buffers:
        """Buffers that a step may write without reading them: unless they are evaluated, their graph grows."""
        return ()

    def to_arrays(self, buffers: Buffers, num_tokens: int) -> Buffers:
        """The slots in use, to be kept in a file."""
        return tuple(array[..., :num_tokens, :] for array in buffers)

    def from_arrays(self, arrays: Sequence[mx.array], num_tokens: int) -> Buffers:
        """Buffers of what `to_arrays` gave.

        Raises:
            ValueError: if an array holds another number of tokens.
        """
        _check_length(arrays, num_tokens)
        return tuple(arrays)


@dataclass(frozen=True)
class QuantizedKV(FullKV):
    """Keys and values in 4 or 8 bits: words, scales and biases of the keys, then those of the values."""

    num_arrays: ClassVar[int] = 6
    is_quantized: ClassVar[bool] = True

    bits: int
    group_size: int

    def quantize(self, keys: mx.array, values: mx.array) -> Buffers:
        """Keys and values in this layout."""
        return *mx.quantize(keys, self.group_size, self.bits), *mx.quantize(values, self.group_size, self.bits)

    def allocate(self, keys: mx.array, values: mx.array, length: int) -> Buffers:
        return tuple(_zeros(array, length) for array in self.quantize(keys, values))

    def write(self, buffers: Buffers, slot: mx.array, keys: mx.array, values: mx.array) -> Buffers:
        return self.write_quantized(buffers, slot, self.quantize(keys, values))

    def write_quantized(self, buffers: Buffers, slot: mx.array, new: Buffers) -> Buffers:
        """As `write`, of what `quantize` gave."""
        return _written(buffers, slot, new)

    def attend(self, buffers: Buffers, queries: mx.array, end: int) -> mx.array:
        return super().attend(self._dequantized(tuple(array[..., :end, :] for array in buffers)), queries, end)

    def attend_masked(self, buffers: Buffers, queries: mx.array, mask: mx.array) -> mx.array:
        B, H, L, D = queries.shape
        K, S = buffers[0].shape[1:3]
        # On a GPU, a product with one row is divided among more threads than one with several rows.
        rows = (H // K * L,) if on_cpu() else (H // K, L)
        if not on_cpu():
            buffers = tuple(array[:, :, None] for array in buffers)
        scores = self._product(queries.reshape(B, K, *rows, D) * D**-0.5, buffers[:3], transpose=True)
        scores = mx.where(mask, scores.reshape(B, H, L, S), _lowest(scores.dtype))
        weights = mx.softmax(scores, axis=-1, precise=True).reshape(B, K, *rows, S)
        return self._product(weights, buffers[3:], transpose=False).reshape(B, H, L, D)

    def attend_fused(
        self, buffers: Buffers, queries: mx.array, last: mx.array, row_offsets: mx.array | None
    ) -> mx.array | None:
        """Attention of one query per row over the slots from its row's first to the last, by a fused kernel.

        Returns:
            None where the kernel is of no use.
        """
        if queries.shape[2] > 1 or not can_attend_quantized(queries.shape[-1], buffers[0].shape[2]):
            return None
        return attend_quantized(queries, buffers, last, row_offsets, self.bits, self.group_size)

    def _product(self, x: mx.array, quantized: Buffers, transpose: bool) -> mx.array:
        words, scales, biases = quantized
        return mx.quantized_matmul(
            x, words, scales, biases, transpose=transpose, group_size=self.group_size, bits=self.bits
        )

    def _dequantized(self, buffers: Buffers) -> Buffers:
        parts = buffers[:3], buffers[3:]
        return tuple(
            mx.dequantize(words, scales, biases, group_size=self.group_size, bits=self.bits)
            for words, scales, biases in parts
        )


@dataclass(frozen=True)
class RotatingKV(FullKV):
    """The first tokens (attention sinks) and, in a ring behind them, as many of the last tokens as fit.

    With 2 sinks and 6 slots, after 9 tokens (numbered from 0) the next token replaces number 5:

        slot     0   1 | 2   3   4   5
        token    0   1 | 6   7   8   5
                 sinks   ring, its oldest token at (tokens - sinks) % ring

    A query sees the sinks directly before the oldest token of the ring, however far away they are, so that distances
    stay within the window and within what the model was trained on (Xiao et al., arXiv:2309.17453, section 3.2). For
    that the sinks' keys are rotated further with each token. The third array keeps them unrotated,
    (B, K, sinks + 1, D); its last slot takes the keys of all other tokens, which nobody reads.
    """

    num_arrays: ClassVar[int] = 3

    size: int
    sinks: int
    rope_base: float

    @property
    def ring(self) -> int:
        """Number of slots behind the sinks."""
        return self.size - self.sinks

    def allocate(self, keys: mx.array, values: mx.array, length: int) -> Buffers:
        return *super().allocate(keys, values, min(length, self.size)), _zeros(keys, self.sinks + 1)

    def grow(self, buffers: Buffers, used: int, length: int) -> Buffers:
        keys, values, unrotated = buffers
        length = min(length, self.size)
        return (*super().grow((keys, values), used, length), unrotated) if keys.shape[2] < length else buffers

    def write(self, buffers: Buffers, slot: mx.array, keys: mx.array, values: mx.array) -> Buffers:
        """Buffers with the keys and values of one new token; `slot` is the number of tokens before it."""
        assert keys.shape[2] == 1, "a window takes several tokens by `extend`"
        (unrotated,) = _written(buffers[2:], mx.minimum(slot, self.sinks), (keys,))
        if buffers[0].shape[2] < self.size:
            return *_written(buffers[:2], slot, (keys, values)), unrotated
        in_ring = mx.where(slot < self.size, slot, self.sinks + (slot - self.sinks) % self.ring)
        kept_keys, kept_values = _written(buffers[:2], in_ring, (keys, values))
        if self.sinks:
            rotated = self._rotated_sinks(unrotated, mx.maximum(slot - (self.size - 1), 0))
            kept_keys[..., : self.sinks, :] = rotated
        return kept_keys, kept_values, unrotated

    def extend(
        self, buffers: Buffers, offset: int, keys: mx.array, values: mx.array, queries: mx.array
    ) -> tuple[Buffers, mx.array]:
        """As `FullKV.extend`; of tokens beyond the window, each query sees its own sinks and last tokens."""
        room = self.size - offset
        if keys.shape[2] <= room:
            buffers = self._write_in_order(buffers, offset, keys, values)
            return buffers, self.attend(buffers, queries, offset + keys.shape[2])
        if room <= 0:
            return self._extend_full(buffers, offset, keys, values, queries)
        early = max(0, queries.shape[2] - (keys.shape[2] - room))  # queries of tokens for which there is room
        buffers = self._write_in_order(buffers, offset, keys[..., :room, :], values[..., :room, :])
        parts = [self.attend(buffers, queries[..., :early, :], self.size)] if early else []
        later = keys[..., room:, :], values[..., room:, :], queries[..., early:, :]
        buffers, output = self._extend_full(buffers, self.size, *later)
        return buffers, mx.concatenate([*parts, output], axis=2)

    def attend(self, buffers: Buffers, queries: mx.array, end: int) -> mx.array:
        return super().attend(buffers[:2], queries, end)

    def attend_masked(self, buffers: Buffers, queries: mx.array, mask: mx.array) -> mx.array:
        return super().attend_masked(buffers[:2], queries, mask)

    def unread(self, buffers: Buffers) -> Buffers:
        return buffers[2:]

    def to_arrays(self, buffers: Buffers, num_tokens: int) -> Buffers:
        return *super().to_arrays(buffers[:2], min(num_tokens, self.size)), buffers[2]

    def from_arrays(self, arrays: Sequence[mx.array], num_tokens: int) -> Buffers:
        _check_length(arrays[:2], min(num_tokens, self.size))
        return tuple(arrays)

    def _write_in_order(self, buffers: Buffers, offset: int, keys: mx.array, values: mx.array) -> Buffers:
        """Buffers with tokens for which there is room."""
        unrotated = buffers[2]
        if offset < self.sinks:
            new_sinks = keys[..., : self.sinks - offset, :]
            unrotated = mx.slice_update(unrotated, new_sinks, mx.array(offset), axes=(2,))
        return *_written(buffers[:2], mx.array(offset), (keys, values)), unrotated

    def _extend_full(
        self, buffers: Buffers, offset: int, keys: mx.array, values: mx.array, queries: mx.array
    ) -> tuple[Buffers, mx.array]:
        """`extend` of a full window by L tokens."""
        L = keys.shape[2]
        oldest = (offset - self.sinks) % self.ring
        in_order = [mx.roll(array[..., self.sinks :, :], -oldest, 2) for array in buffers[:2]]
        recent_keys = mx.concatenate([in_order[0], keys], axis=2)  # (B, K, ring + L, D), the oldest first
        recent_values = mx.concatenate([in_order[1], values], axis=2)
        sink_keys, sink_values = buffers[2][..., : self.sinks, :], buffers[1][..., : self.sinks, :]
        output = self._attend_windows(offset + L, queries, (sink_keys, recent_keys), (sink_values, recent_values))

        turn = (oldest + L) % self.ring
        ring_keys, ring_values = (
            mx.roll(array[..., -self.ring :, :], turn, 2) for array in (recent_keys, recent_values)
        )
        rotated = self._rotated_sinks(buffers[2], mx.array(offset + L - self.size))
        new_keys = mx.concatenate([rotated, ring_keys], axis=2)
        return (new_keys, mx.concatenate([sink_values, ring_values], axis=2), buffers[2]), output

    def _attend_windows(
        self,
        end: int,
        queries: mx.array,
        keys: tuple[mx.array, mx.array],
        values: tuple[mx.array, mx.array],
    ) -> mx.array:
        """Attention of the last n of `end` tokens (B, H, n, D), each over the sinks and its own window.

        Args:
            keys, values: of the sinks, unrotated, and of the recent tokens, oldest first.
        """
        B, H, n, D = queries.shape
        K, num_recent = keys[1].shape[1:3]
        grouped = (queries * D**-0.5).reshape(B, K, H // K, n, D)
        age = mx.arange(num_recent - n, num_recent)[:, None] - mx.arange(num_recent)[None, :]  # of a key, to a query
        scores = grouped @ keys[1][:, :, None].swapaxes(-1, -2)
        scores = mx.where((age >= 0) & (age < self.ring), scores, _lowest(scores.dtype))
        # Rotating a query back is the same as rotating the sinks forward, to right before the query's window.
        back = mx.fast.rope(
            queries * D**-0.5,
            D,
            traditional=False,
            base=self.rope_base,
            scale=-1.0,
            offset=end - n - self.size + 1,
        ).reshape(B, K, H // K, n, D)
        scores = mx.concatenate([back @ keys[0][:, :, None].swapaxes(-1, -2), scores], axis=-1)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return (weights @ mx.concatenate(list(values), axis=2)[:, :, None]).reshape(B, H, n, D)

    def _rotated_sinks(self, unrotated: mx.array, shift: mx.array) -> mx.array:
        """The sinks' keys as if each were `shift` positions further on."""
        B, K, count, D = unrotated.shape
        alone = unrotated.reshape(B, K * count, 1, D)  # so that all get the same angle; the last slot is cut off later
        rotated = mx.fast.rope(alone, D, traditional=False, base=self.rope_base, scale=1.0, offset=shift)
        return rotated.reshape(B, K, count, D)[..., : self.sinks, :]


def attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None = None) -> mx.array:
    """Attention of queries (B, H, L, D) over (B, K, S, D): masked, or causal with the last query at the last key."""
    read = cpu.attention(queries, keys, values, mask)
    return read if read is not None else differentiable_attention(queries, keys, values, mask)


def differentiable_attention(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None = None
) -> mx.array:
    """As `attention`, in MLX's own operation: its gradient does not compute it once more."""
    chosen = mask if mask is not None else "causal" if queries.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=chosen)


def _check_length(arrays: Sequence[mx.array], num_tokens: int) -> None:
    if any(array.shape[2] != num_tokens for array in arrays):
        raise ValueError(f"a layer does not hold {num_tokens:,} tokens")


def _zeros(like: mx.array, length: int) -> mx.array:
    batch, heads, _, width = like.shape
    return mx.zeros((batch, heads, length, width), like.dtype)


def _grown(array: mx.array, used: int, length: int) -> mx.array:
    if used == 0:
        return _zeros(array, length)
    return mx.concatenate([array[..., :used, :], _zeros(array, length - used)], axis=2)


def _written(buffers: Sequence[mx.array], slot: mx.array, new: Sequence[mx.array]) -> Buffers:
    if choices().indexed_writes and new[0].shape[2] == 1:
        index = slot.reshape(1, 1, 1, 1)
        return tuple(
            mx.put_along_axis(array, mx.broadcast_to(index, part.shape), part, axis=2)
            for array, part in zip(buffers, new, strict=True)
        )
    return tuple(mx.slice_update(array, part, slot, axes=(2,)) for array, part in zip(buffers, new, strict=True))


def _lowest(dtype: mx.Dtype) -> mx.array:
    return mx.array(-math.inf, dtype)
