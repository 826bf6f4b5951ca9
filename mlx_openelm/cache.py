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

    def lend(self, num_tokens: int) -> tuple[list[mx.array], list[mx.array]]:
        """The buffers of all layers, with room for so many more tokens, to one who gives them back by `put_back`.

        They are not kept meanwhile: what is computed of them may take their memory.
        """
        end = self.offset + num_tokens
        keys, values = (
            [_with_room(kept, self.offset, end, kept) for kept in buffers if kept is not None]
            for buffers in (self._keys, self._values)
        )
        assert len(keys) == len(self._keys), "a cache without a token has no buffers yet"
        self._keys, self._values = [None] * len(keys), [None] * len(keys)
        return keys, values

    def put_back(self, keys: list[mx.array], values: list[mx.array], num_tokens: int) -> None:
        """Take the buffers of all layers again, in which so many more tokens stand."""
        self._keys, self._values = list(keys), list(values)
        self.offset += num_tokens

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers that exist, to evaluate or to count."""
        return [array for array in (*self._keys, *self._values) if array is not None]

    @property
    def nbytes(self) -> int:
        """Memory that the buffers take, in bytes."""
        return sum(array.nbytes for array in self.arrays)


class StepCache:
    """Stands for a `KVCache` within a compiled step: the position is an array, the buffers keep their length.

    Attributes:
        offset: where the next token goes, () int32. As a number it would be a constant of the compiled step.
        keys, values: buffers of all layers, (B, K, S, D).
    """

    def __init__(self, offset: mx.array, keys: list[mx.array], values: list[mx.array]):
        self.offset = offset
        self.keys = list(keys)
        self.values = list(values)

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep a layer's keys and values of L new tokens, each (B, K, L, D); get the whole buffers."""
        self.keys[layer] = mx.slice_update(self.keys[layer], keys, self.offset, axes=(2,))
        self.values[layer] = mx.slice_update(self.values[layer], values, self.offset, axes=(2,))
        return self.keys[layer], self.values[layer]

    def mask(self) -> mx.array:
        """Which places of the buffers hold the text through the next token, bool (S,)."""
        return mx.arange(self.keys[0].shape[2]) <= self.offset


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
