"""The keys, values and hidden states of one path of a prefix tree, and the attention of a chunk that follows it."""

import mlx.core as mx
import numpy as np

from ..cache.kv_cache import buffer_length
from ..cache.layouts import attention
from ..machine.device import on_cpu, plain_masked_attention
from .prefix_tree import Chunk


class PathCache:
    """What every layer computed for the nodes of a path, in one buffer per layer and kind.

    A chunk's keys and values are written behind those of the path; `keep` then moves those that stay.
    """

    def __init__(self, num_layers: int):
        self._num_layers = num_layers
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._keys: list[mx.array | None] = [None] * self._num_layers
        self._values: list[mx.array | None] = [None] * self._num_layers
        self._hidden: mx.array | None = None
        self.length = 0

    @property
    def hidden(self) -> mx.array:
        """Last hidden states (N, M) of the path and of the chunk."""
        assert self._hidden is not None, "no chunk was computed"
        return self._hidden

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers that exist."""
        return [array for array in (*self._keys, *self._values, self._hidden) if array is not None]

    @property
    def nbytes(self) -> int:
        """Memory of the buffers, in bytes."""
        return sum(array.nbytes for array in self.arrays)

    def extend(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write a chunk's keys and values (1, K, C, D); the buffers of the layer (1, K, N, D), which may be longer."""
        self._keys[layer] = keys = _written(self._keys[layer], keys, self.length)
        self._values[layer] = values = _written(self._values[layer], values, self.length)
        return keys, values

    def extend_hidden(self, hidden: mx.array) -> None:
        """Write a chunk's last hidden states (C, M)."""
        self._hidden = _written(self._hidden, hidden, self.length)

    def keep(self, chunk: Chunk) -> None:
        """After a chunk, keep the path that it leaves."""
        start = chunk.path_kept
        end = start + len(chunk.path)
        if chunk.path and not _is_range(chunk.path, start - self.length):
            slots = mx.array(np.array(chunk.path, np.int32) + self.length)
            self._keys = [_moved(array, slots, start) for array in self._keys]
            self._values = [_moved(array, slots, start) for array in self._values]
            self._hidden = _moved(self._hidden, slots, start)
        self.length = end


class ChunkAttention:
    """Attention of the tokens of a chunk to their ancestors, in blocks of queries.

    Ancestors lie near a token in the order of the walk, so that each block reads the path and a part of the chunk.

    Args:
        cache: of the path; the chunk's keys and values are added.
        chunk: the chunk.
        block: queries of a block.
    """

    def __init__(self, cache: PathCache, chunk: Chunk, block: int):
        self._cache = cache
        size = len(chunk.tokens)
        self._blocks = [_Block(chunk, start, min(start + block, size)) for start in range(0, size, block)]

    def __call__(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """The `attend` of a `ForwardContext`: queries (1, H, C, D), keys and values (1, K, C, D)."""
        keys, values = self._cache.extend(layer, keys, values)
        read = [block.attend(queries, keys, values) for block in self._blocks]
        return read[0] if len(read) == 1 else mx.concatenate(read, axis=2)


class _Block:
    """Queries `start` to `end`: they read the first `kept` nodes of the path, and the chunk's from `first` on.

    On a GPU they read whole steps of the buffers from their beginning, so that few shapes occur.
    """

    def __init__(self, chunk: Chunk, start: int, end: int):
        self.start, self.end = start, end
        own = chunk.ancestors[start:end, :end]
        self.slots = chunk.num_kept + int(np.argmax(own.any(axis=0))), chunk.num_kept + end
        self.kept = int(chunk.num_ancestors[start:end].max())
        if not on_cpu():
            self.kept, self.slots = chunk.num_kept, (chunk.num_kept, buffer_length(self.slots[1]))
        first, last = self.slots
        mask = np.zeros((end - start, self.kept + last - first), bool)
        mask[:, : self.kept] = np.arange(self.kept) < chunk.num_ancestors[start:end, None]
        mask[:, self.kept : self.kept + chunk.num_kept + end - first] = own[:, first - chunk.num_kept :]
        self.mask = mx.array(mask)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        own = queries[:, :, self.start : self.end]
        read = plain_attention if plain_masked_attention() else attention
        return read(own, self._read(keys), self._read(values), self.mask)

    def _read(self, array: mx.array) -> mx.array:
        first, end = self.slots
        if self.kept == first:
            return array[:, :, :end]
        if self.kept == 0:
            return array[:, :, first:end]
        return mx.concatenate([array[:, :, : self.kept], array[:, :, first:end]], axis=2)


def plain_attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    """`attention` with a mask (L, S), as matrix products and a softmax."""
    H, L, D = queries.shape[1:]
    K = keys.shape[1]
    rows = queries.reshape(1, K, H // K, L, D) * D**-0.5
    scores = rows @ keys[:, :, None].swapaxes(-1, -2)  # (1, K, H / K, L, S)
    scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    weights = mx.softmax(scores, axis=-1, precise=True)
    return (weights @ values[:, :, None]).reshape(1, H, L, D)


def _is_range(slots: list[int], first: int) -> bool:
    return slots == list(range(first, first + len(slots)))


def _written(buffer: mx.array | None, new: mx.array, start: int) -> mx.array:
    """The buffer with new slots behind the first `start` ones; slots are the last axis but one."""
    end = start + new.shape[-2]
    if buffer is None or buffer.shape[-2] < end:
        room = mx.zeros((*new.shape[:-2], buffer_length(end) - end, new.shape[-1]), new.dtype)
        parts = [new, room] if buffer is None else [buffer[..., :start, :], new, room]
        return mx.concatenate(parts, axis=-2)
    buffer[..., start:end, :] = new
    return buffer


def _moved(buffer: mx.array | None, slots: mx.array, start: int) -> mx.array | None:
    return buffer if buffer is None else _written(buffer, mx.take(buffer, slots, axis=-2), start)
