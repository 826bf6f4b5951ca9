"""Examples to the rows of any step, a function of the seed and the step alone, as with a corpus."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from .batch import TokenBatch, target_mask
from .formats import Example, PreferencePair

_WIDTH_STEP = 32  # rows come in few widths, each of which is compiled once
_WINDOW = 16  # batches whose examples are sorted by length together


class ExampleBatches:
    """The rows of every step: each example once an epoch, in an order of the epoch's own.

    A step has `batch_size` entries: a row with an example, a packed row with several, or a pair's two rows, the chosen
    answer first. Those that an epoch's last examples do not fill are padding.

    Attributes:
        steps_per_epoch: steps in which every example is seen.
        rows_per_entry: 2 for pairs, else 1.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[PreferencePair],
        batch_size: int,
        *,
        max_length: int,
        pack: bool = False,
        seed: int = 0,
    ):
        """Prepare batches.

        Args:
            max_length: tokens that a row predicts at most, L.
            pack: put examples together that share a row of `max_length` without seeing one another; otherwise each has
                its own, and those of about the same length share a batch.
        """
        self._sides = list(zip(*(example.sequences for example in examples), strict=True))
        self._lengths = _lengths(self._sides)
        self._max_length = max_length
        self._batch_size = batch_size
        self._seed = seed
        self._pack = pack
        self.rows_per_entry = len(self._sides)
        assert not pack or self.rows_per_entry == 1, "pairs are not packed"
        assert self._lengths.max() <= max_length + 1, "an example is longer than a row"
        num_entries = len(self._lengths)
        if pack:
            self._places, self._begins = _packed(self._lengths, max_length + 1, np.random.default_rng(seed))
            num_entries = len(self._begins) - 1
        self.steps_per_epoch = -(-num_entries // batch_size)

    def step(self, step: int, first: int = 0, count: int | None = None) -> TokenBatch:
        """Entries `first` to `first + count` of a step's `batch_size`; a process takes those that are its own."""
        epoch, place = divmod(step, self.steps_per_epoch)
        batch = self._epoch(epoch)[place]
        width = self._max_length
        if not self._pack:
            width = row_width(self._lengths[np.concatenate(batch)].max(), width)
        filled = [*batch, *[np.zeros(0, int)] * (self._batch_size - len(batch))]
        return _rows(self._sides, filled[first : None if count is None else first + count], width, self._pack)

    @lru_cache(maxsize=2)  # noqa: B019, one object a run
    def _epoch(self, epoch: int) -> list[list[np.ndarray]]:
        """Numbers of the examples in each entry of each batch."""
        chance = np.random.default_rng([self._seed, epoch])
        order = chance.permutation(len(self._lengths))
        if self._pack:
            order = self._swapped(order)
            entries = np.split(order, self._begins[1:-1])
            entries = [entries[number] for number in chance.permutation(len(entries))]
            return [entries[start : start + self._batch_size] for start in range(0, len(entries), self._batch_size)]
        batches = []
        for window in np.split(order, range(_WINDOW * self._batch_size, len(order), _WINDOW * self._batch_size)):
            window = window[np.argsort(self._lengths[window], kind="stable")]
            batches += np.split(window, range(self._batch_size, len(window), self._batch_size))
        return [list(batches[number][:, None]) for number in chance.permutation(len(batches))]

    def _swapped(self, order: np.ndarray) -> np.ndarray:
        """The packed examples, where those of one length have changed places: other neighbours, as many rows."""
        swapped = np.empty_like(order)
        by_length = order[np.argsort(self._lengths[order], kind="stable")]
        swapped[np.argsort(self._lengths[self._places], kind="stable")] = by_length
        return swapped


def all_rows(
    examples: Sequence[Example] | Sequence[PreferencePair], batch_size: int, first: int = 0, stride: int = 1
) -> Iterator[TokenBatch]:
    """Every example or pair once, to validate with: the longest first, so that memory runs short at once or never.

    Args:
        first, stride: of the batches, a process takes those that are its own.
    """
    sides = list(zip(*(example.sequences for example in examples), strict=True))
    lengths = _lengths(sides)
    order = np.argsort(-lengths, kind="stable")
    for start in range(first * batch_size, len(order), stride * batch_size):
        batch = order[start : start + batch_size]
        yield _rows(sides, list(batch[:, None]), row_width(lengths[batch].max(), lengths.max() - 1), isolated=False)


def _lengths(sides: Sequence[Sequence[Example]]) -> np.ndarray:
    return np.array([[len(example.tokens) for example in side] for side in sides]).max(axis=0)


def row_width(longest: int, limit: int) -> int:
    """Predicted tokens of a batch whose longest example has so many tokens, at most `limit`."""
    return min(-(-(int(longest) - 1) // _WIDTH_STEP) * _WIDTH_STEP, int(limit))


def _packed(lengths: np.ndarray, size: int, chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples row by row, (N,), and where each row begins among them, with the end, (rows + 1,).

    The longest first, each goes where the least room is left that it fits in.
    """
    shuffled = chance.permutation(len(lengths))
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # rows by how much room they have
    rooms = 0  # bit n is set where a row has room n: the least that is enough is found at once
    for number in shuffled[np.argsort(-lengths[shuffled], kind="stable")].tolist():
        length = int(lengths[number])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(number)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def _rows(sides: Sequence[Sequence[Example]], entries: Sequence[np.ndarray], width: int, isolated: bool) -> TokenBatch:
    """Entries of examples, one after another in a row; those of several sides in a row for each."""
    shape = len(entries) * len(sides), width + 1
    tokens, segments, answer = np.zeros(shape, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, bool)
    for row, (numbers, side) in enumerate((numbers, side) for numbers in entries for side in sides):
        start = 0
        for segment, number in enumerate(numbers):
            example = side[number]
            stop = start + len(example.tokens)
            tokens[row, start:stop], answer[row, start:stop] = example.tokens, example.completion_mask
            segments[row, start:stop] = segment
            start = stop
    return TokenBatch(tokens, segments, answer[:, 1:] & target_mask(segments, isolated=True), isolated)
