"""Keys and values of the tokens that a model has seen already."""

import mlx.core as mx

from .config import OpenELMConfig

GROWTH_STEP = 256  # tokens; a buffer that grew with every token would be copied with every token


class KVCache:
    """Keys and values of every layer for one batch of rows, and the position where the next token goes.

    Layers differ in width: layer i keeps two arrays of shape (B, num_kv_heads[i], S, head_dim). A forward pass hands
    each layer's new keys and values to `update` and calls `advance` once at its end: all layers see one `offset`.
    """

    def __init__(self, num_layers: int):
        self.offset = 0
        self._keys: list[mx.array | None] = [None] * num_layers
        self._values: list[mx.array | None] = [None] * num_layers

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep a layer's keys and values of L new tokens, each (B, K, L, D); get those of all S tokens.

        The offset stays until `advance`.
        """
        end = self.offset + keys.shape[2]
        kept_keys = self._keys[layer] = _with_room(self._keys[layer], self.offset, end, keys)
        kept_values = self._values[layer] = _with_room(self._values[layer], self.offset, end, values)
        kept_keys[..., self.offset : end, :] = keys
        kept_values[..., self.offset : end, :] = values
        return kept_keys[..., :end, :], kept_values[..., :end, :]

    def advance(self, num_tokens: int) -> None:
        """Move on after a forward pass over `num_tokens` tokens."""
        self.offset += num_tokens

    def trim(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` tokens; their room is used again."""
        assert 0 <= num_tokens <= self.offset, f"cannot forget {num_tokens} of {self.offset} tokens"
        self.offset -= num_tokens

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers that exist, to evaluate or to count."""
        return [array for array in (*self._keys, *self._values) if array is not None]

    @property
    def nbytes(self) -> int:
        """Memory that the buffers take, in bytes."""
        return sum(array.nbytes for array in self.arrays)


def kv_bytes_per_layer(config: OpenELMConfig, dtype: mx.Dtype = mx.float16) -> tuple[int, ...]:
    """Memory that each layer's keys and values of one token take, in bytes."""
    return tuple(2 * heads * config.head_dim * dtype.size for heads in config.num_kv_heads)


def kv_cache_bytes(config: OpenELMConfig, num_tokens: int, dtype: mx.Dtype = mx.float16) -> int:
    """Memory that cached keys and values of one sequence take, in bytes, without the room to grow."""
    return sum(kv_bytes_per_layer(config, dtype)) * num_tokens


def _with_room(kept: mx.array | None, used: int, end: int, like: mx.array) -> mx.array:
    """The buffer itself if it has `end` positions, else its first `used` positions in a longer one."""
    if kept is not None and kept.shape[2] >= end:
        return kept
    length = -(-end // GROWTH_STEP) * GROWTH_STEP
    batch, heads, _, width = like.shape
    if kept is None or used == 0:
        return mx.zeros((batch, heads, length, width), like.dtype)
    more = mx.zeros((batch, heads, length - used, width), like.dtype)
    return mx.concatenate([kept[..., :used, :], more], axis=2)
