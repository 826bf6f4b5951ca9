"""The keys and values of all layers for rows of tokens, and the place where the next one goes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import mlx.core as mx

from .config import CacheConfig, kv_group_size
from .layouts import Buffers, FullKV, QuantizedKV, RotatingKV

GROWTH_STEP = 256  # tokens; a buffer that grew with every token would be copied with every token


class KVCache:
    """Keys and values of every layer for one batch of rows.

    Layers differ in width: layer i keeps arrays for num_kv_heads[i] heads. All rows write to the same place, `offset`;
    a row that is shorter than others starts further on. A forward pass hands each layer's queries, keys and values to
    `attend` and calls `advance` once at its end: all layers see one `offset`.

    Attributes:
        offset: the place where the next token goes.
        layout: how each layer's buffers are filled and read.
    """

    def __init__(self, num_layers: int, config: CacheConfig = CacheConfig(), rope_base: float = 10_000):  # noqa: B008
        self.config = config
        self._rope_base = rope_base
        self._buffers: list[Buffers] = [()] * num_layers  # () of a layer that has none yet, or whose are lent
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.offset = 0
        self._starts: list[int] | None = None  # of rows that were joined
        config = self.config
        self.layout = FullKV() if config.window is None else RotatingKV(config.window, config.sinks, self._rope_base)
        self._buffers = [()] * len(self._buffers)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A pass that breaks off within leaves the cache empty, and not filled for some layers only."""
        try:
            yield
        except BaseException:
            self.clear()
            raise

    @property
    def starts(self) -> mx.array | None:
        """Where each row's text begins, (B,) int32; `None` if all begin at 0."""
        return None if self._starts is None else mx.array(self._starts, mx.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.offset - min(self._starts or [0])

    @property
    def positions(self) -> int:
        """Position of the next token in the text, of all rows."""
        assert self._starts is None, "rows with starts of their own go on by steps"
        return self.offset

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Keep keys and values (B, K, L, D) of L new tokens; what the last of these read by their queries (B, H, _, D).

        The offset stays until `advance`.
        """
        buffers = self._with_room(layer, keys.shape[2]) or self._new(keys, values)
        if isinstance(self.layout, RotatingKV):
            self._buffers[layer], read = self.layout.extend(buffers, self.offset, keys, values, queries)
            return read
        buffers = self._buffers[layer] = self.layout.write(buffers, mx.array(self.offset), keys, values)
        return self.layout.read(buffers, queries, self.offset + keys.shape[2])

    def advance(self, num_tokens: int) -> None:
        """Move on after a forward pass over `num_tokens` tokens."""
        self.offset += num_tokens
        if self.config.bits and self.longest >= self.config.quantize_after:
            self.quantize()

    def quantize(self) -> None:
        """Keep keys and values in the configuration's bits from now on."""
        if self.is_quantized or self.config.bits is None:
            return
        layout = QuantizedKV(self.config.bits, kv_group_size(self._buffers[0][0].shape[-1]))
        self._buffers = [layout.packed(*buffers) for buffers in self._buffers]
        self.layout = layout

    @property
    def can_forget(self) -> bool:
        """Whether `trim` can take back tokens: a window that has turned has nothing to put in their places."""
        return self.config.window is None or self.offset <= self.config.window

    def trim(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` tokens; their room is used again."""
        assert 0 <= num_tokens <= self.offset, f"cannot forget {num_tokens} of {self.offset} tokens"
        assert self.can_forget or num_tokens == 0, "a window that has turned cannot go back"
        self.offset -= num_tokens

    def lend(self, num_tokens: int) -> list[Buffers]:
        """The buffers of all layers, with room for so many more tokens, to one who gives them back by `put_back`.

        They are not kept meanwhile: what is computed of them may take their memory.
        """
        lent = [self._with_room(layer, num_tokens) for layer in range(len(self._buffers))]
        assert all(lent), "a cache without a token has no buffers yet"
        self._buffers = [()] * len(lent)
        return lent

    def put_back(self, buffers: Sequence[Buffers], num_tokens: int) -> None:
        """Take the buffers of all layers again, in which so many more tokens stand."""
        self._buffers = list(buffers)
        self.advance(num_tokens)

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers that exist, to evaluate or to count."""
        return [array for buffers in self._buffers for array in buffers]

    @property
    def nbytes(self) -> int:
        """Memory that the buffers take, in bytes."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values stand in the configuration's bits by now."""
        return isinstance(self.layout, QuantizedKV)

    def to_arrays(self) -> dict[str, mx.array]:
        """What the buffers hold, by name, to be kept in a file; of one row."""
        assert self._starts is None, "rows that were joined are not kept in files"
        assert all(self._buffers) or not self.offset, "buffers that are lent cannot be kept"
        room = self.offset if self.config.window is None else min(self.offset, self.config.window)
        return {
            f"layers.{layer}.{part}": array if part == 2 and self.config.window else array[..., :room, :]
            for layer, buffers in enumerate(self._buffers)
            for part, array in enumerate(buffers)
        }

    def take_arrays(self, arrays: Mapping[str, mx.array], num_tokens: int, quantized: bool) -> None:
        """The opposite of `to_arrays`.

        Raises:
            KeyError: if an array is missing.
            ValueError: if one has another shape than it should.
        """
        if quantized and self.config.bits is not None:
            head_dim = arrays["layers.0.0"].shape[-1] * 32 // self.config.bits
            self.layout = QuantizedKV(self.config.bits, kv_group_size(head_dim))
        parts = range(6 if quantized else 3 if self.config.window else 2)
        room = num_tokens if self.config.window is None else min(num_tokens, self.config.window)
        for layer in range(len(self._buffers) if num_tokens else 0):
            self._buffers[layer] = tuple(arrays[f"layers.{layer}.{part}"] for part in parts)
            if any(array.shape[2] != room for array in self._buffers[layer][: 2 if self.config.window else 6]):
                raise ValueError(f"layer {layer} does not hold {room:,} tokens")
        self.offset = num_tokens

    def join(self, other: "KVCache", row: int | None = None) -> None:
        """Take in another cache of one row: as a further row, or in place of one that is done.

        The texts then end at the same place.
        """
        assert self.config.window is None, "a window serves one row"
        assert self.config == other.config, "rows of one cache are kept in one way"
        if self.is_quantized != other.is_quantized:
            self.quantize()
            other.quantize()
        if self._starts is None:
            self._starts = [0] * self._buffers[0][0].shape[0]
        self._give_back([place for place in range(len(self._starts)) if place != row])
        further = max(0, other.offset - self.offset)
        start = self.offset + further - other.offset
        length = _rounded(self.offset + further)
        for layer, (buffers, more) in enumerate(zip(self._buffers, other._buffers, strict=True)):
            self._buffers[layer] = ()
            if further or buffers[0].shape[2] < length:
                buffers = tuple(_moved(array, self.offset, further, length) for array in buffers)
            more = tuple(array[..., : other.offset, :] for array in more)
            self._buffers[layer] = _with_row(buffers, more, row, start)
        self.offset += further
        self._starts = [old + further for old in self._starts]
        if row is None:
            self._starts.append(start)
        else:
            self._starts[row] = start

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        assert self._starts is not None, "rows that were never joined stay together"
        self._give_back(rows)
        chosen = mx.array(list(rows))
        for layer, buffers in enumerate(self._buffers):
            self._buffers[layer] = tuple(array[chosen] for array in buffers)
        self._starts = [self._starts[row] for row in rows]

    def _give_back(self, rows: Sequence[int]) -> None:
        """The places before the texts of these rows, if they take much room."""
        starts = self._starts or []
        unused = min((starts[row] for row in rows), default=0) // GROWTH_STEP * GROWTH_STEP
        if unused:
            for layer, buffers in enumerate(self._buffers):
                self._buffers[layer] = tuple(array[..., unused:, :] for array in buffers)
            self.offset -= unused
            self._starts = [start - unused for start in starts]

    def _with_room(self, layer: int, num_tokens: int) -> Buffers:
        buffers = self._buffers[layer]
        end = self.offset + num_tokens
        if not buffers or buffers[0].shape[2] >= end:
            return buffers
        self._buffers[layer] = ()
        return self.layout.grown(buffers, self.offset, _rounded(end))

    def _new(self, keys: mx.array, values: mx.array) -> Buffers:
        return self.layout.new(keys, values, _rounded(self.offset + keys.shape[2]))


def _rounded(num_tokens: int) -> int:
    return -(-num_tokens // GROWTH_STEP) * GROWTH_STEP


def _moved(array: mx.array, used: int, further: int, length: int) -> mx.array:
    """The first `used` places of a buffer, so much further on in one of another length."""
    room = mx.zeros((*array.shape[:2], length, array.shape[3]), array.dtype)
    return mx.slice_update(room, array[..., :used, :], mx.array(further), axes=(2,))


def _with_row(buffers: Buffers, more: Buffers, row: int | None, start: int) -> Buffers:
    if row is not None:
        place = mx.array([row, start])
        return tuple(mx.slice_update(old, new, place, axes=(0, 2)) for old, new in zip(buffers, more, strict=True))
    rows = (_moved(new, new.shape[2], start, old.shape[2]) for old, new in zip(buffers, more, strict=True))
    return tuple(mx.concatenate([old, new]) for old, new in zip(buffers, rows, strict=True))


class StepCache:
    """Stands for a `KVCache` within a step that may be compiled: places are arrays, the buffers keep their length.

    Args:
        layout: of the buffers.
        offset: where the next token goes, () int32. As a number it would be a constant of the compiled step.
        starts: as of a `KVCache`.
        buffers: of all layers.
        num_tokens: how many tokens each row takes in.
    """

    def __init__(
        self, layout: FullKV, offset: mx.array, starts: mx.array | None, buffers: Sequence[Buffers], num_tokens: int
    ):
        self.buffers = list(buffers)
        self._layout = layout
        self._offset = offset
        self._starts = starts
        self._num_tokens = num_tokens

    @property
    def positions(self) -> mx.array:
        """Position of the next token in its text: () of all rows, or (B,) of each."""
        return self._offset if self._starts is None else self._offset - self._starts

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """As of a `KVCache`."""
        buffers = self.buffers[layer] = self._layout.write(self.buffers[layer], self._offset, keys, values)
        return self._layout.read_all(buffers, queries, self._mask)

    @cached_property
    def _mask(self) -> mx.array:
        """Which places of the buffers each token may read, bool, to broadcast to (B, H, L, S)."""
        places = mx.arange(self.buffers[0][0].shape[2])  # (S,)
        if self._num_tokens == 1:
            seen = places <= self._offset
        else:
            seen = places <= self._offset + mx.arange(self._num_tokens)[:, None]  # (L, S)
        return seen if self._starts is None else seen & (places >= self._starts[:, None, None, None])
