"""From examples to the rows of any step, which depend only on the seed and the step, as with a corpus."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from .batch import TokenBatch, target_mask
from .formats import Example, PreferencePair

_WIDTH_STEP = 32  # row widths are rounded up to multiples of this, because each is compiled once
_WINDOW = 16  # batches whose examples are sorted by length together


class ExampleBatches:
    """The rows of every step: each example once per epoch, in a new order every epoch.

    A step has `batch_size` entries: rows with one example, packed rows with several, or pairs of rows, the chosen
    answer first. Entries that an epoch's examples do not fill are padding.

    Attributes:
        steps_per_epoch: number of steps until every example was seen.
        rows_per_entry: 2 for pairs, otherwise 1.
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
            max_length: maximum number of tokens that a row predicts, L.
            pack: put several examples into a row of `max_length`, without attending to one another; otherwise each has
                its own row, and examples of similar length share a batch.
        """
        self._sequences = list(zip(*(example.sequences for example in examples), strict=True))
        self._lengths = _lengths(self._sequences)
        self._max_length = max_length
        self._batch_size = batch_size
        self._seed = seed
        self._pack = pack
        self.rows_per_entry = len(self._sequences)
        assert not pack or self.rows_per_entry == 1, "pairs are not packed"
        assert self._lengths.max() <= max_length + 1, "an example is longer than a row"
        num_entries = len(self._lengths)
        if pack:
            self._order, self._row_starts = _packed(self._lengths, max_length + 1, np.random.default_rng(seed))
            num_entries = len(self._row_starts) - 1
        self.steps_per_epoch = -(-num_entries // batch_size)

    def step(self, step: int, first: int = 0, count: int | None = None) -> TokenBatch:
        """Entries `first` to `first + count` (exclusive) of a step's `batch_size`; each process takes its own."""
        epoch, place = divmod(step, self.steps_per_epoch)
        batch = self._epoch(epoch)[place]
        width = self._max_length
        if not self._pack:
            width = row_width(self._lengths[np.concatenate(batch)].max(), width)
        filled = [*batch, *[np.zeros(0, int)] * (self._batch_size - len(batch))]
        return _rows(self._sequences, filled[first : None if count is None else first + count], width, self._pack)

    @lru_cache(maxsize=2)  # noqa: B019, one object a run
    def _epoch(self, epoch: int) -> list[list[np.ndarray]]:
        """Indices of the examples in each entry of each batch."""
        chance = np.random.default_rng([self._seed, epoch])
        order = chance.permutation(len(self._lengths))
        if self._pack:
            order = self._swapped(order)
            entries = np.split(order, self._row_starts[1:-1])
            entries = [entries[number] for number in chance.permutation(len(entries))]
            return [entries[start : start + self._batch_size] for start in range(0, len(entries), self._batch_size)]
        batches = []
        for window in np.split(order, range(_WINDOW * self._batch_size, len(order), _WINDOW * self._batch_size)):
            window = window[np.argsort(self._lengths[window], kind="stable")]
            batches += np.split(window, range(self._batch_size, len(window), self._batch_size))
        return [list(batches[number][:, None]) for number in chance.permutation(len(batches))]

    def _swapped(self, order: np.ndarray) -> np.ndarray:
        """The packed examples with those of equal length swapped: new neighbours, the same number of rows."""
        swapped = np.empty_like(order)
        by_length = order[np.argsort(self._lengths[order], kind="stable")]
        swapped[np.argsort(self._lengths[self._order], kind="stable")] = by_length
        return swapped


def all_rows(
    examples: Sequence[Example] | Sequence[PreferencePair], batch_size: int, first: int = 0, stride: int = 1
) -> Iterator[TokenBatch]:
    """Every example or pair once, for validation: the longest first, so that memory runs out at once or never.

    Args:
        first, stride: yield every `stride`-th batch, starting with batch `first`, for one of several processes.
    """
    sequences = list(zip(*(example.sequences for example in examples), strict=True))
    lengths = _lengths(sequences)
    order = np.argsort(-lengths, kind="stable")
    for start in range(first * batch_size, len(order), stride * batch_size):
        batch = order[start : start + batch_size]
        yield _rows(sequences, list(batch[:, None]), row_width(lengths[batch].max(), lengths.max() - 1), isolated=False)


def _lengths(sequences: Sequence[Sequence[Example]]) -> np.ndarray:
    return np.array([[len(example.tokens) for example in column] for column in sequences]).max(axis=0)


def row_width(longest: int, limit: int) -> int:
    """Width, in predicted tokens, of a batch whose longest example has `longest` tokens; at most `limit`."""
    return min(-(-(int(longest) - 1) // _WIDTH_STEP) * _WIDTH_STEP, int(limit))


def _packed(lengths: np.ndarray, size: int, chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the examples row by row, (N,), and where each row begins among them, with the end, (rows + 1,).

    Best fit, longest first: each example goes into the row with the least room that suffices.
    """
    shuffled = chance.permutation(len(lengths))
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # rows by their remaining room
    rooms = 0  # bit n is set if a row has room n, so that the least sufficient room is found at once
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


def _rows(
    sequences: Sequence[Sequence[Example]], entries: Sequence[np.ndarray], width: int, isolated: bool
) -> TokenBatch:
    """Rows from entries of examples, which are concatenated in a row; a pair has two rows."""
    shape = len(entries) * len(sequences), width + 1
    tokens, segments, mask = np.zeros(shape, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, bool)
    for row, (numbers, column) in enumerate((numbers, column) for numbers in entries for column in sequences):
        start = 0
        for segment, number in enumerate(numbers):
            example = column[number]
            stop = start + len(example.tokens)
            tokens[row, start:stop], mask[row, start:stop] = example.tokens, example.completion_mask
            segments[row, start:stop] = segment
            start = stop
    return TokenBatch(tokens, segments, mask[:, 1:] & target_mask(segments, isolated=True), isolated)
