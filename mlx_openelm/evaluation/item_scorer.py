"""Scores items in batches: what is known from an earlier run is taken from its file, and processes share the rest."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .items import Item
from .requests import Request, Score
from .score_file import ScoreFile
from .scorer import FAILED, Scorer

_BATCH_SECONDS = 5.0  # about; of a killed run, this much work is done again
_LARGEST_BATCH = 1024  # items
_NONE = float("nan")
_COLUMNS = 4  # float64 numbers that stand for a score between processes


class ScoredItem(NamedTuple):
    """An item and the scores of its requests; `None` if one of them cannot be scored."""

    item: Item
    scores: tuple[Score, ...] | None


class ItemScorer:
    """Scores items, batch by batch.

    A batch has as many items as take some seconds. So the first scores come at once, and chunks of many items later.

    Args:
        scorer: scores requests.
        file: known scores, to which new ones are added.
        group: processes that share the items: each scores a contiguous part, and all get all scores.
    """

    def __init__(self, scorer: Scorer, file: ScoreFile | None = None, group: mx.distributed.Group | None = None):
        self._scorer = scorer
        self._file = file
        self._group = group if group is not None and group.size() > 1 else None
        self._size = 4

    def __call__(
        self, items: Iterable[Item], on_progress: Callable[[int], None] = lambda num_items: None
    ) -> Iterator[ScoredItem]:
        """The items with their scores, in order.

        Args:
            on_progress: called after each batch with the number of its items, on several processes of all of them.
        """
        if self._group is None:
            yield from self._in_batches(items, on_progress)
        else:
            yield from self._shared(list(items), self._group, on_progress)

    def _in_batches(self, items: Iterable[Item], on_progress: Callable[[int], None]) -> Iterator[ScoredItem]:
        left = iter(items)
        while batch := list(islice(left, self._size)):
            start = time.perf_counter()
            found = self._scores([request for item in batch for request in item.requests])
            self._adapt(time.perf_counter() - start)
            on_progress(len(batch))
            for item in batch:
                scores = tuple(found[request] for request in item.requests)
                yield ScoredItem(item, None if any(score is FAILED for score in scores) else scores)

    def _scores(self, requests: Sequence[Request]) -> dict[Request, Score]:
        found: dict[Request, Score] = {}
        rounded = self._scorer.config.emulate_bfloat16
        for request in requests if self._file is not None else ():
            score = self._file.get(request, rounded) if self._file is not None else None
            if score is not None:
                found[request] = score
        new = [request for request in dict.fromkeys(requests) if request not in found]
        scores = list(zip(new, self._scorer.score(new), strict=True))
        if self._file is not None:
            self._file.add((request, score) for request, score in scores if score is not FAILED)
        return found | dict(scores)

    def _adapt(self, seconds: float) -> None:
        if seconds < _BATCH_SECONDS / 2:
            self._size = min(_LARGEST_BATCH, self._size * 2)
        elif seconds > _BATCH_SECONDS * 2:
            self._size = max(1, self._size // 2)

    def _shared(
        self, items: list[Item], group: mx.distributed.Group, on_progress: Callable[[int], None]
    ) -> Iterator[ScoredItem]:
        """Score this process's part, then exchange all scores as the bits of float64 numbers."""
        borders = [len(items) * rank // group.size() for rank in range(group.size() + 1)]
        parts = [items[start:end] for start, end in pairwise(borders)]
        lengths = [sum(len(item.requests) for item in part) for part in parts]
        own = [
            number
            for found in self._in_batches(parts[group.rank()], lambda count: on_progress(count * group.size()))
            for number in _numbers(found)
        ]
        sent = np.zeros((max(lengths), _COLUMNS))
        sent[: len(own)] = own
        bits = np.ascontiguousarray(sent).view(np.uint32)
        received = np.array(mx.distributed.all_gather(mx.array(bits), group=group, stream=mx.cpu)).view(np.float64)
        for part, block in zip(parts, received.reshape(group.size(), -1, _COLUMNS), strict=True):
            rows = iter(block.tolist())
            for item in part:
                yield _from_numbers(item, list(islice(rows, len(item.requests))))


def _numbers(found: ScoredItem) -> list[list[float]]:
    """A row for each request: the log-likelihood, two flags, and the rounded value or NaN; all NaN without scores."""
    if found.scores is None:
        return [[float("nan")] * _COLUMNS for _ in found.item.requests]
    return [
        [
            score.log_likelihood,
            score.is_greedy,
            score.is_truncated,
            float("nan") if score.rounded is None else score.rounded,
        ]
        for score in found.scores
    ]


def _from_numbers(item: Item, rows: list[list[float]]) -> ScoredItem:
    if any(row[1] != row[1] for row in rows):
        return ScoredItem(item, None)
    scores = [Score(row[0], bool(row[1]), bool(row[2]), None if row[3] != row[3] else row[3]) for row in rows]
    return ScoredItem(item, tuple(scores))
