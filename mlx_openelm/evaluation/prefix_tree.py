"""Sequences of ids that share prefixes, divided into chunks in which every shared prefix occurs once.

Sorted, the sequences are the leaves of a tree from left to right. Each one adds the tokens that it does not share with
the one before, so that a walk over them meets every node of the tree once. A chunk is a part of this walk. A token
attends to its ancestors: to some of those before the chunk, which are the path from the root to the chunk's first
token, and to some in the chunk. So only the keys and values of one path have to be kept between chunks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .encoding import TokenRequest


class Target(NamedTuple):
    """A token whose probability is asked for: after node `node`, as part of request `request`.

    Nodes below the number of kept ones are those of the path before the chunk; then follow the chunk's.
    """

    node: int
    token: int
    request: int


@dataclass
class Chunk:
    """A part of the walk: C tokens after the P tokens of a path.

    Attributes:
        num_kept: P, of the path as the previous chunk left it (the first P nodes of what it kept).
        tokens: ids (C,).
        positions: of the tokens in their texts (C,).
        num_ancestors: how many of the kept nodes are ancestors (C,); they are the first ones.
        ancestors: the ancestors in the chunk, the token itself included, bool (C, C); row i belongs to token i.
        targets: the tokens whose probabilities are asked for.
        path: nodes that the next chunk may follow: the first `path_kept` kept ones, then these tokens of the chunk.
    """

    num_kept: int
    tokens: np.ndarray
    positions: np.ndarray
    num_ancestors: np.ndarray
    ancestors: np.ndarray
    targets: list[Target]
    path_kept: int
    path: list[int]


@dataclass
class _Part:
    """A chunk that is being filled."""

    num_kept: int
    tokens: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    runs: list[tuple[int, int, list[int]]] = field(default_factory=list)  # length, kept ancestors, ancestors in it
    targets: list[Target] = field(default_factory=list)
    length: int = 0


class PrefixTree:
    """The walk over the tree of many sequences, chunk by chunk; the path stays between calls of `chunks`.

    Args:
        chunk_size: most tokens of a chunk.
        share: whether to share prefixes at all.
    """

    def __init__(self, chunk_size: int, share: bool = True):
        self.chunk_size = chunk_size
        self._share = share
        self._path_ids = np.empty(0, np.int32)
        self._kept = 0  # of the path, how many nodes come before the chunk
        self._slots: list[int] = []  # and where in the chunk the others are

    def chunks(self, requests: Sequence[TokenRequest]) -> Iterator[Chunk]:
        """Chunks that contain all requests; targets name them by their position."""
        part = _Part(self._kept)
        for number in self._order(requests):
            inputs = requests[number].inputs
            shared = _num_equal(inputs, self._path_ids) if self._share else 0
            self._cut(shared)
            targets = _targets(requests[number], number)
            self._ask(part, targets, 0, shared)
            while shared < len(inputs):
                if part.length == self.chunk_size:
                    yield self._finished(part)
                    part = _Part(self._kept)
                end = min(len(inputs), shared + self.chunk_size - part.length)
                self._append(part, inputs[shared:end], shared)
                self._ask(part, targets, shared, end)
                shared = end
        if part.length or part.targets:
            yield self._finished(part)

    def clear(self) -> None:
        """Forget the path; the next chunk follows nothing."""
        self._cut(0)

    def _order(self, requests: Sequence[TokenRequest]) -> list[int]:
        """Depth first; at each node, the child on the path that is left comes first, then the others by id."""
        keys = [request.inputs.astype(">u4").tobytes() for request in requests]
        shared = [_num_equal(request.inputs, self._path_ids) for request in requests]
        return sorted(range(len(requests)), key=lambda number: (-shared[number], keys[number]))

    def _cut(self, length: int) -> None:
        self._path_ids = self._path_ids[:length]
        self._slots = self._slots[: max(0, length - self._kept)]
        self._kept = min(self._kept, length)

    def _append(self, part: _Part, ids: np.ndarray, position: int) -> None:
        part.runs.append((len(ids), self._kept, list(self._slots)))
        part.tokens.append(ids)
        part.positions.append(np.arange(position, position + len(ids), dtype=np.int32))
        self._slots += range(part.length, part.length + len(ids))
        self._path_ids = np.concatenate([self._path_ids, ids])
        part.length += len(ids)

    def _ask(self, part: _Part, targets: list[tuple[int, int, int]], start: int, end: int) -> None:
        """Add the targets that follow the nodes of the path from a depth to another."""
        for depth, token, request in targets:
            if start <= depth < end:
                node = depth if depth < self._kept else part.num_kept + self._slots[depth - self._kept]
                part.targets.append(Target(node, token, request))

    def _finished(self, part: _Part) -> Chunk:
        none = np.empty(0, np.int32)
        num_ancestors = np.repeat([kept for _, kept, _ in part.runs], [length for length, _, _ in part.runs])
        chunk = Chunk(
            num_kept=part.num_kept,
            tokens=np.concatenate([none, *part.tokens]),
            positions=np.concatenate([none, *part.positions]),
            num_ancestors=num_ancestors.astype(np.int32),
            ancestors=_ancestors(part),
            targets=part.targets,
            path_kept=self._kept,
            path=self._slots,
        )
        self._kept += len(self._slots)
        self._slots = []
        return chunk


def tree_size(requests: Sequence[TokenRequest]) -> int:
    """Number of nodes: the tokens that have to be computed if every shared prefix is computed once."""
    rows = sorted((request.inputs for request in requests), key=lambda ids: ids.astype(">u4").tobytes())
    before = np.empty(0, np.int32)
    total = 0
    for row in rows:
        total += len(row) - _num_equal(row, before)
        before = row
    return total


def _targets(request: TokenRequest, number: int) -> list[tuple[int, int, int]]:
    """The depth of the node before each scored token, the token, and the request."""
    first = len(request.ids) - request.num_scored
    return [(first + i - 1, token, number) for i, token in enumerate(request.ids[first:].tolist())]


def _num_equal(row: np.ndarray, other: np.ndarray) -> int:
    """Number of equal ids at the beginning of both."""
    length = min(len(row), len(other))
    differs = np.flatnonzero(row[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def _ancestors(part: _Part) -> np.ndarray:
    found = np.zeros((part.length, part.length), bool)
    start = 0
    for length, _, slots in part.runs:
        rows = slice(start, start + length)
        found[rows, slots] = True
        found[rows, rows] = np.tri(length, dtype=bool)
        start += length
    return found
