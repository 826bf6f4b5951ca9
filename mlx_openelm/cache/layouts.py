"""How the keys and values of a layer stand in arrays: in full, quantized, or in a window that turns.

A layer's buffers are a tuple of arrays (B, K, S, ...) with a place for each token. A place is an array () int32, so
that a compiled step can be told another one each time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

Buffers = tuple[mx.array, ...]


@dataclass(frozen=True)
class FullKV:
    """Keys and values (B, K, S, D) as the layer made them."""

    def new(self, keys: mx.array, values: mx.array, length: int) -> Buffers:
        """Empty buffers with so many places, for keys and values of this kind."""
        return _zeros(keys, length), _zeros(values, length)

    def grown(self, buffers: Buffers, used: int, length: int) -> Buffers:
        """The first `used` places in longer buffers."""
        return tuple(_grown(array, used, length) for array in buffers)

    def write(self, buffers: Buffers, place: mx.array, keys: mx.array, values: mx.array) -> Buffers:
        """With the keys and values of L new tokens from a place on."""
        return _written(buffers, place, (keys, values))

    def read(self, buffers: Buffers, queries: mx.array, end: int) -> mx.array:
        """What the newest tokens' queries (B, H, L, D) read causally from `end` tokens."""
        keys, values = (array[..., :end, :] for array in buffers)
        return attention(queries, keys, values)

    def read_all(self, buffers: Buffers, queries: mx.array, mask: mx.array) -> mx.array:
        """What queries read from those places of whole buffers that the mask, bool and broadcast, leaves."""
        keys, values = buffers
        return attention(queries, keys, values, mask)


@dataclass(frozen=True)
class QuantizedKV(FullKV):
    """Keys and values in 4 or 8 bits: words, scales and offsets of the keys, then those of the values."""

    bits: int
    group_size: int

    def packed(self, keys: mx.array, values: mx.array) -> Buffers:
        """Keys and values in this layout."""
        return *mx.quantize(keys, self.group_size, self.bits), *mx.quantize(values, self.group_size, self.bits)

    def new(self, keys: mx.array, values: mx.array, length: int) -> Buffers:
        return tuple(_zeros(array, length) for array in self.packed(keys, values))

    def write(self, buffers: Buffers, place: mx.array, keys: mx.array, values: mx.array) -> Buffers:
        return _written(buffers, place, self.packed(keys, values))

    def read(self, buffers: Buffers, queries: mx.array, end: int) -> mx.array:
        return super().read(self._unpacked(tuple(array[..., :end, :] for array in buffers)), queries, end)

    def read_all(self, buffers: Buffers, queries: mx.array, mask: mx.array) -> mx.array:
        B, H, L, D = queries.shape
        K, S = buffers[0].shape[1:3]
        grouped = queries.reshape(B, K, H // K * L, D) * D**-0.5
        scores = self._product(grouped, buffers[:3], transpose=True)
        scores = mx.where(mask, scores.reshape(B, H, L, S), _lowest(scores.dtype))
        weights = mx.softmax(scores, axis=-1, precise=True).reshape(B, K, H // K * L, S)
        return self._product(weights, buffers[3:], transpose=False).reshape(B, H, L, D)

    def _product(self, x: mx.array, packed: Buffers, transpose: bool) -> mx.array:
        words, scales, offsets = packed
        return mx.quantized_matmul(
            x, words, scales, offsets, transpose=transpose, group_size=self.group_size, bits=self.bits
        )

    def _unpacked(self, buffers: Buffers) -> Buffers:
        parts = buffers[:3], buffers[3:]
        return tuple(
            mx.dequantize(words, scales, offsets, group_size=self.group_size, bits=self.bits)
            for words, scales, offsets in parts
        )


@dataclass(frozen=True)
class RotatingKV(FullKV):
    """The first tokens, the sinks, and behind them as many of the last ones as there is room for, in a ring.

    To a query the sinks seem to stand right before the oldest token of the ring, however far it is from them: distances
    stay within the window, and so within what the model was trained with (Xiao et al., arXiv:2309.17453, section 3.2).
    The third array keeps the sinks' keys (B, K, sinks + 1, D) as they were; its last place is for keys of no interest.
    """

    size: int
    sinks: int
    rope_base: float

    @property
    def ring(self) -> int:
        """How many tokens behind the sinks it holds."""
        return self.size - self.sinks

    def new(self, keys: mx.array, values: mx.array, length: int) -> Buffers:
        return *super().new(keys, values, min(length, self.size)), _zeros(keys, self.sinks + 1)

    def grown(self, buffers: Buffers, used: int, length: int) -> Buffers:
        keys, values, first = buffers
        length = min(length, self.size)
        return (*super().grown((keys, values), used, length), first) if keys.shape[2] < length else buffers

    def write(self, buffers: Buffers, place: mx.array, keys: mx.array, values: mx.array) -> Buffers:
        """With the keys and values of one new token; the place counts all tokens there ever were."""
        assert keys.shape[2] == 1, "a window takes several tokens by `extend`"
        first = mx.slice_update(buffers[2], keys, mx.minimum(place, self.sinks), axes=(2,))
        if buffers[0].shape[2] < self.size:
            return *_written(buffers[:2], place, (keys, values)), first
        slot = mx.where(place < self.size, place, self.sinks + (place - self.sinks) % self.ring)
        kept_keys, kept_values = _written(buffers[:2], slot, (keys, values))
        if self.sinks:
            shifted = self._shifted(first, mx.maximum(place - (self.size - 1), 0))
            kept_keys = mx.slice_update(kept_keys, shifted, mx.array(0), axes=(2,))
        return kept_keys, kept_values, first

    def read(self, buffers: Buffers, queries: mx.array, end: int) -> mx.array:
        return super().read(buffers[:2], queries, end)

    def read_all(self, buffers: Buffers, queries: mx.array, mask: mx.array) -> mx.array:
        return super().read_all(buffers[:2], queries, mask)

    def extend(
        self, buffers: Buffers, offset: int, keys: mx.array, values: mx.array, queries: mx.array
    ) -> tuple[Buffers, mx.array]:
        """Take in L tokens behind `offset` others, and what the last of them read by their queries (B, H, _, D).

        As long as the window is not full this is as in full; then each query sees its own sinks and last tokens.
        """
        room = self.size - offset
        if keys.shape[2] <= room:
            buffers = self._filled(buffers, offset, keys, values)
            return buffers, self.read(buffers, queries, offset + keys.shape[2])
        if room <= 0:
            return self._turned(buffers, offset, keys, values, queries)
        early = max(0, queries.shape[2] - (keys.shape[2] - room))  # queries of tokens for which there is room
        buffers = self._filled(buffers, offset, keys[..., :room, :], values[..., :room, :])
        parts = [self.read(buffers, queries[..., :early, :], self.size)] if early else []
        rest = keys[..., room:, :], values[..., room:, :], queries[..., early:, :]
        buffers, read = self._turned(buffers, self.size, *rest)
        return buffers, mx.concatenate([*parts, read], axis=2)

    def _filled(self, buffers: Buffers, offset: int, keys: mx.array, values: mx.array) -> Buffers:
        first = buffers[2]
        if offset < self.sinks:
            first = mx.slice_update(first, keys[..., : self.sinks - offset, :], mx.array(offset), axes=(2,))
        return *_written(buffers[:2], mx.array(offset), (keys, values)), first

    def _turned(
        self, buffers: Buffers, offset: int, keys: mx.array, values: mx.array, queries: mx.array
    ) -> tuple[Buffers, mx.array]:
        """`extend` of a full window."""
        B, H, num_queries, D = queries.shape
        K, L, ring, sinks = keys.shape[1], keys.shape[2], self.ring, self.sinks
        unread = L - num_queries  # new tokens whose queries nobody asks for
        turn = (offset - sinks) % ring  # slot of the oldest token, counted behind the sinks
        last = [mx.roll(array[..., sinks:, :], -turn, 2) for array in buffers[:2]]
        keys, values = mx.concatenate([last[0], keys], axis=2), mx.concatenate([last[1], values], axis=2)  # ring + L

        grouped = (queries * D**-0.5).reshape(B, K, H // K, num_queries, D)
        age = mx.arange(unread, L)[:, None] + ring - mx.arange(ring + L)[None, :]  # of a key, to a query
        scores = grouped @ keys[:, :, None].swapaxes(-1, -2)
        scores = mx.where((age >= 0) & (age < ring), scores, _lowest(scores.dtype))
        back = mx.fast.rope(
            queries * D**-0.5,
            D,
            traditional=False,
            base=self.rope_base,
            scale=-1.0,
            offset=offset + unread - self.size + 1,
        ).reshape(B, K, H // K, num_queries, D)
        first = buffers[2][..., :sinks, :]
        scores = mx.concatenate([back @ first[:, :, None].swapaxes(-1, -2), scores], axis=-1)
        weights = mx.softmax(scores, axis=-1, precise=True)
        seen = mx.concatenate([buffers[1][..., :sinks, :], values], axis=2)
        read = (weights @ seen[:, :, None]).reshape(B, H, num_queries, D)

        turn = (turn + L) % ring
        last = [mx.roll(array[..., -ring:, :], turn, 2) for array in (keys, values)]
        shift = mx.array(offset + L - self.size)
        full = (
            mx.concatenate([self._shifted(buffers[2], shift), last[0]], axis=2),
            mx.concatenate([buffers[1][..., :sinks, :], last[1]], axis=2),
        )
        return (*full, buffers[2]), read

    def _shifted(self, first: mx.array, shift: mx.array) -> mx.array:
        """The sinks' keys as if each stood so many places further on."""
        B, K, _, D = first.shape
        alone = first[..., : self.sinks, :].reshape(B, K * self.sinks, 1, D)  # so that all turn by the same angle
        shifted = mx.fast.rope(alone, D, traditional=False, base=self.rope_base, scale=1.0, offset=shift)
        return shifted.reshape(B, K, self.sinks, D)


def attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None = None) -> mx.array:
    """What queries (B, H, L, D) read from values (B, K, S, D): by the mask, or causally, aligned at the end."""
    seen = mask if mask is not None else "causal" if queries.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=seen)


def _zeros(like: mx.array, length: int) -> mx.array:
    batch, heads, _, width = like.shape
    return mx.zeros((batch, heads, length, width), like.dtype)


def _grown(array: mx.array, used: int, length: int) -> mx.array:
    if used == 0:
        return _zeros(array, length)
    return mx.concatenate([array[..., :used, :], _zeros(array, length - used)], axis=2)


def _written(buffers: Sequence[mx.array], place: mx.array, new: Sequence[mx.array]) -> Buffers:
    return tuple(mx.slice_update(array, part, place, axes=(2,)) for array, part in zip(buffers, new, strict=True))


def _lowest(dtype: mx.Dtype) -> mx.array:
    return mx.array(-math.inf, dtype)
