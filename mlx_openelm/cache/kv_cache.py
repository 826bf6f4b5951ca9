"""The keys and values of all layers for a batch of rows."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache

import mlx.core as mx

from ..machine.device import on_cpu
from .config import CacheConfig, kv_group_size
from .layouts import Buffers, FullKV, QuantizedKV, RotatingKV

GROWTH_STEP = 256  # tokens; a buffer that grew with every token would be copied with every token


class KVCache:
    """Keys and values of every layer for one batch of rows.

    Layers differ in width: layer i keeps arrays for num_kv_heads[i] heads. All rows write to the same slot, `offset`; a
    row that is shorter than others begins at a later slot. A forward pass hands each layer's queries, keys and values
    to `attend` and calls `advance` once at its end, so that all layers see one `offset`.

    Attributes:
        offset: slot of the next token.
        layout: how each layer's buffers are written and read.
    """

    def __init__(self, num_layers: int, config: CacheConfig = CacheConfig(), rope_base: float = 10_000):  # noqa: B008
        self.config = config
        self._rope_base = rope_base
        self._buffers: list[Buffers] = [()] * num_layers  # () of a layer that has none yet, or whose are taken
        self.clear()

    def __repr__(self) -> str:
        return f"KVCache({self.offset:,} tokens, {self.config.label}, {self.nbytes / 2**20:,.1f} MiB)"

    def clear(self) -> None:
        """Forget everything."""
        self.offset = 0
        self._row_offsets: list[int] | None = None  # of rows that were joined
        config = self.config
        self.layout = FullKV() if config.window is None else RotatingKV(config.window, config.sinks, self._rope_base)
        self._buffers = [()] * len(self._buffers)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """If a forward pass within fails, leave the cache empty instead of filled for some layers only."""
        try:
            yield
        except BaseException:
            self.clear()
            raise

    @property
    def row_offsets(self) -> mx.array | None:
        """First slot of each row, (B,) int32; None if all rows begin at slot 0."""
        return None if self._row_offsets is None else mx.array(self._row_offsets, mx.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.offset - min(self._row_offsets or [0])

    @property
    def positions(self) -> int:
        """Position of the next token in the text, the same for all rows."""
        assert self._row_offsets is None, "rows with offsets of their own need a StepCache"
        return self.offset

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Store keys and values (B, K, L, D) of L new tokens; attention output of the last ones' queries (B, H, _, D).

        The offset stays until `advance`.
        """
        buffers = self._with_room(layer, keys.shape[2]) or self._new(keys, values)
        self._buffers[layer], output = self.layout.extend(buffers, self.offset, keys, values, queries)
        return output

    def advance(self, num_tokens: int) -> None:
        """Move the offset after a forward pass over `num_tokens` tokens."""
        self.offset += num_tokens
        if self.config.bits and self.longest >= self.config.quantize_after:
            self.quantize()

    def quantize(self) -> None:
        """Quantize what is stored, and all that follows, to the configuration's bits."""
        if self.is_quantized or self.config.bits is None:
            return
        layout = QuantizedKV(self.config.bits, kv_group_size(self._buffers[0][0].shape[-1]))
        self._buffers = [layout.quantize(*buffers) for buffers in self._buffers]
        self.layout = layout

    @property
    def can_trim(self) -> bool:
        """Whether `trim` can remove tokens; a window that is full has overwritten what came before them."""
        return self.config.window is None or self.offset <= self.config.window

    def trim(self, num_tokens: int) -> None:
        """Remove the last `num_tokens` tokens; their slots are used again."""
        assert 0 <= num_tokens <= self.offset, f"cannot remove {num_tokens} of {self.offset} tokens"
        assert self.can_trim or num_tokens == 0, "a full window cannot be trimmed"
        self.offset -= num_tokens

    def has_room(self, num_tokens: int) -> bool:
        """Whether `num_tokens` more tokens fit into the buffers as they are."""
        first = self._buffers[0]
        return bool(first) and first[0].shape[2] >= min(self.offset + num_tokens, self.config.window or math.inf)

    def take_buffers(self, num_tokens: int) -> list[Buffers]:
        """Hand the buffers of all layers, with room for `num_tokens` more tokens, to a decoding step.

        The cache does not hold them until `restore_buffers`, so that the step may reuse their memory.
        """
        taken = [self._with_room(layer, num_tokens) for layer in range(len(self._buffers))]
        assert all(taken), "a cache without a token has no buffers yet"
        self._buffers = [()] * len(taken)
        return taken

    def restore_buffers(self, buffers: Sequence[Buffers], num_tokens: int) -> None:
        """Take back the buffers of all layers, with `num_tokens` more tokens in them."""
        self._buffers = list(buffers)
        self.advance(num_tokens)

    @property
    def buffers(self) -> tuple[Buffers, ...]:
        """The buffers of each layer; () of one that has none."""
        return tuple(self._buffers)

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers that exist, to evaluate or to count."""
        return [array for buffers in self._buffers for array in buffers]

    @property
    def unread(self) -> list[mx.array]:
        """Buffers that the next step may not read; see `FullKV.unread`."""
        return [array for buffers in self._buffers for array in self.layout.unread(buffers)]

    @property
    def nbytes(self) -> int:
        """Memory that the buffers take, in bytes."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values are stored in the configuration's bits by now."""
        return self.layout.is_quantized

    def to_arrays(self) -> dict[str, mx.array]:
        """What a cache of one row holds, by name, to be kept in a file."""
        assert self._row_offsets is None, "rows that were joined are not kept in files"
        assert all(self._buffers) or not self.offset, "buffers that are taken cannot be kept"
        return {
            f"layers.{layer}.{part}": array
            for layer, buffers in enumerate(self._buffers if self.offset else [])
            for part, array in enumerate(self.layout.to_arrays(buffers, self.offset))
        }

    def from_arrays(self, arrays: Mapping[str, mx.array], num_tokens: int, quantized: bool) -> None:
        """Fill an empty cache with what `to_arrays` gave.

        Raises:
            KeyError: if an array is missing.
            ValueError: if one has another shape than it should.
        """
        if quantized and self.config.bits is None:
            raise ValueError("quantized arrays contradict the configuration")
        if quantized and self.config.bits is not None:
            head_dim = arrays["layers.0.0"].shape[-1] * 32 // self.config.bits
            self.layout = QuantizedKV(self.config.bits, kv_group_size(head_dim))
        for layer in range(len(self._buffers) if num_tokens else 0):
            parts = [arrays[f"layers.{layer}.{part}"] for part in range(self.layout.num_arrays)]
            self._buffers[layer] = self.layout.from_arrays(parts, num_tokens)
        self.offset = num_tokens

    def join(self, other: "KVCache", row: int | None = None) -> None:
        """Take in another cache of one row: as a further row, or in place of one that is finished.

        All rows then end at the same slot.
        """
        assert self.config.window is None, "a window holds one row"
        assert self.config == other.config, "all rows of a cache have one configuration"
        if self.is_quantized != other.is_quantized:
            self.quantize()
            other.quantize()
        if self._row_offsets is None:
            self._row_offsets = [0] * self._buffers[0][0].shape[0]
        self._free_slots([kept for kept in range(len(self._row_offsets)) if kept != row])
        shift = max(0, other.offset - self.offset)  # of the rows here, if the new one is longer
        row_offset = self.offset + shift - other.offset
        length = buffer_length(self.offset + shift)
        for layer, (buffers, more) in enumerate(zip(self._buffers, other._buffers, strict=True)):
            self._buffers[layer] = ()
            if shift or buffers[0].shape[2] < length:
                buffers = tuple(_moved(array, self.offset, shift, length) for array in buffers)
            more = tuple(array[..., : other.offset, :] for array in more)
            self._buffers[layer] = _with_row(buffers, more, row, row_offset)
        self.offset += shift
        self._row_offsets = [old + shift for old in self._row_offsets]
        if row is None:
            self._row_offsets.append(row_offset)
        else:
            self._row_offsets[row] = row_offset

    def keep(self, rows: Sequence[int]) -> None:
        """Remove all rows but these."""
        assert self._row_offsets is not None, "rows that were never joined stay together"
        self._free_slots(rows)
        chosen = mx.array(list(rows))
        for layer, buffers in enumerate(self._buffers):
            self._buffers[layer] = tuple(array[chosen] for array in buffers)
        self._row_offsets = [self._row_offsets[row] for row in rows]

    def _free_slots(self, rows: Sequence[int]) -> None:
        """Cut off the slots before the first of these rows begins, if they are many."""
        row_offsets = self._row_offsets or []
        unused = min((row_offsets[row] for row in rows), default=0) // GROWTH_STEP * GROWTH_STEP
        if unused:
            for layer, buffers in enumerate(self._buffers):
                self._buffers[layer] = tuple(array[..., unused:, :] for array in buffers)
            self.offset -= unused
            self._row_offsets = [offset - unused for offset in row_offsets]

    def _with_room(self, layer: int, num_tokens: int) -> Buffers:
        buffers = self._buffers[layer]
        end = self.offset + num_tokens
        if not buffers or buffers[0].shape[2] >= end:
            return buffers
        self._buffers[layer] = ()
        return self.layout.grow(buffers, self.offset, buffer_length(end))

    def _new(self, keys: mx.array, values: mx.array) -> Buffers:
        return self.layout.allocate(keys, values, buffer_length(self.offset + keys.shape[2]))


def buffer_length(num_tokens: int) -> int:
    """Slots of a buffer for this many tokens: whole steps of growth."""
    return -(-num_tokens // GROWTH_STEP) * GROWTH_STEP


def _moved(array: mx.array, used: int, shift: int, length: int) -> mx.array:
    """A buffer of another length with the first `used` slots of this one, moved back by `shift`."""
    room = mx.zeros((*array.shape[:2], length, array.shape[3]), array.dtype)
    return mx.slice_update(room, array[..., :used, :], mx.array(shift), axes=(2,))


def _with_row(buffers: Buffers, more: Buffers, row: int | None, slot: int) -> Buffers:
    if row is not None:
        corner = mx.array([row, slot])
        return tuple(mx.slice_update(old, new, corner, axes=(0, 2)) for old, new in zip(buffers, more, strict=True))
    rows = (_moved(new, new.shape[2], slot, old.shape[2]) for old, new in zip(buffers, more, strict=True))
    return tuple(mx.concatenate([old, new]) for old, new in zip(buffers, rows, strict=True))


class StepCache:
    """A `KVCache` within a decoding step that may be compiled: slots are arrays, and buffers keep their length.

    Args:
        layout: of the buffers.
        offset: slot of the next token, () int32; as a number, it would be a constant of the compiled step.
        row_offsets: as of a `KVCache`.
        buffers: of all layers.
        num_tokens: new tokens per row.
    """

    def __init__(
        self,
        layout: FullKV,
        offset: mx.array,
        row_offsets: mx.array | None,
        buffers: Sequence[Buffers],
        num_tokens: int,
    ):
        self.layout = layout
        self.buffers = list(buffers)
        self._offset = offset
        self._row_offsets = row_offsets
        self._num_tokens = num_tokens
        self._masks: dict[int, mx.array] = {}  # by the number of heads

    @property
    def positions(self) -> mx.array:
        """Position of the next token in its text: () of all rows, or (B,) of each."""
        return self._offset if self._row_offsets is None else self._offset - self._row_offsets

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """As of a `KVCache`."""
        buffers = self.buffers[layer] = self.layout.write(self.buffers[layer], self._offset, keys, values)
        return self.layout.attend_masked(buffers, queries, self._mask_of(queries))

    def attend_quantized(self, layer: int, queries: mx.array, new: Buffers) -> mx.array:
        """As `attend`, of keys and values that are quantized already, with a fused kernel where it pays."""
        assert isinstance(self.layout, QuantizedKV)
        buffers = self.buffers[layer] = self.layout.write_quantized(self.buffers[layer], self._offset, new)
        read = self.layout.attend_fused(buffers, queries, self._offset, self._row_offsets)
        return read if read is not None else self.layout.attend_masked(buffers, queries, self._mask_of(queries))

    def _mask_of(self, queries: mx.array) -> mx.array:
        """Which slots each query (B, H, L, D) may attend to, bool, to broadcast to (B, H, L, S)."""
        if self._row_offsets is None:
            return self._seen
        B, H, L, _ = queries.shape
        heads = 1 if on_cpu() else H  # a GPU's attention copies a mask that is broadcast over heads, in every layer
        if heads not in self._masks:
            slots = _numbered(self.buffers[0][0].shape[2])
            own = slots >= self._row_offsets[:, None, None, None]
            self._masks[heads] = self._seen & mx.broadcast_to(own, (B, heads, L, slots.size))
        return self._masks[heads]

    @cached_property
    def _seen(self) -> mx.array:
        """Which slots hold a token that is not newer, (S,) or (L, S)."""
        slots = _numbered(self.buffers[0][0].shape[2])
        if self._num_tokens == 1:
            return slots <= self._offset
        return slots <= self._offset + _numbered(self._num_tokens)[:, None]


@lru_cache(maxsize=16)
def _numbered(count: int) -> mx.array:
    """Numbers from 0, (count,) int32, as a constant of a step, which it need not compute."""
    numbers = mx.arange(count)
    mx.eval(numbers)
    return numbers
