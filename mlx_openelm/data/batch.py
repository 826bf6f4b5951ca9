"""From rows of ids on the host to the arrays of a step."""

from dataclasses import dataclass
from typing import TypedDict

import mlx.core as mx
import numpy as np

_SIZES = 8  # numbers of counted positions that a shape of batch comes in; each is compiled once


class Batch(TypedDict, total=False):
    """Arrays of a step; B rows of L tokens, of which N positions are scored."""

    inputs: mx.array  # ids (B, L)
    segments: mx.array  # documents or examples of a row, numbered, (B, L); only where they may not see one another
    positions: mx.array  # of the N scored ones, counted over all rows, (N,); only where not all are scored
    targets: mx.array  # ids of their successors, (N,)
    weights: mx.array  # float32 (N,): 1 for those that count, 0 for those that fill the shape up
    rows: mx.array  # which row each of them stands in, (N,)
    reference: mx.array  # of preferences: log-probabilities of the rows before training, (B,)
    dropout: mx.array  # the random key of the step


@dataclass(frozen=True)
class TokenBatch:
    """Rows of one step: ids (B, L + 1), which documents they belong to, and which of them count.

    Position i predicts position i + 1. Negative `segments` are padding. `isolated` rows hold several documents, none
    of which may see another.
    """

    tokens: np.ndarray  # int32 (B, L + 1)
    segments: np.ndarray  # int32 (B, L + 1), counted within the row
    counted: np.ndarray  # bool (B, L): whether the loss of position i + 1 counts
    isolated: bool = False

    def part(self, start: int, stop: int) -> "TokenBatch":
        """Rows `start` to before `stop`."""
        cut = slice(start, stop)
        return TokenBatch(self.tokens[cut], self.segments[cut], self.counted[cut], self.isolated)


def counted_targets(segments: np.ndarray, isolated: bool) -> np.ndarray:
    """Positions whose successor counts, bool (..., L), of segments (..., L + 1): no padding, and if `isolated` not the
    first token of the next document, which does not follow from this one.
    """
    counted = segments[..., 1:] >= 0
    return counted & (segments[..., 1:] == segments[..., :-1]) if isolated else counted


def make_batch(rows: TokenBatch) -> Batch:
    """The arrays that a step computes with; see `Batch`.

    Logits are computed only where they can count: of examples with short answers, that is few. Their number is rounded
    up to one of eight for a shape, so that few shapes have to be compiled.
    """
    inputs, targets, counted = rows.tokens[:, :-1], rows.tokens[:, 1:].reshape(-1), rows.counted.reshape(-1)
    batch: Batch = {"inputs": mx.array(inputs)}
    if rows.isolated:
        batch["segments"] = mx.array(rows.segments[:, :-1])
    places, weights = np.arange(counted.size), counted
    share = -(-counted.size // _SIZES)
    size = share * max(1, -(-counted.sum() // share))
    if size < counted.size:
        places, weights = np.flatnonzero(counted), np.arange(size) < counted.sum()
        places = np.pad(places, (0, size - places.size))  # with weight 0
        batch["positions"] = mx.array(places.astype(np.int32))
    batch["targets"] = mx.array(targets[places])
    batch["weights"] = mx.array(weights.astype(np.float32))
    batch["rows"] = mx.array((places // inputs.shape[1]).astype(np.int32))
    return batch
