"""From rows of ids on the host to the arrays of a step."""

from dataclasses import dataclass
from typing import TypedDict

import mlx.core as mx
import numpy as np

_SIZES = 8  # allowed numbers of scored positions per batch shape; each is compiled once


class Batch(TypedDict, total=False):
    """Arrays of a step: B rows of L tokens, of which N positions are scored."""

    inputs: mx.array  # ids (B, L)
    segments: mx.array  # number of the document or example within its row, (B, L); only if isolated
    positions: mx.array  # scored positions in the flattened rows, (N,); only if not all are scored
    targets: mx.array  # ids to predict there, (N,)
    weights: mx.array  # float32 (N,): 1 where the loss mask is set, 0 for padding
    rows: mx.array  # row of each scored position, (N,)
    reference: mx.array  # DPO: log-probabilities of the rows under the reference model, (B,)
    dropout: mx.array  # random key of the step


@dataclass(frozen=True)
class TokenBatch:
    """Rows of one step: ids, their documents, and the loss mask.

    Position i predicts position i + 1. Negative `segments` are padding. `isolated` rows hold several documents that do
    not attend to one another.
    """

    tokens: np.ndarray  # int32 (B, L + 1)
    segments: np.ndarray  # int32 (B, L + 1), counted within the row
    loss_mask: np.ndarray  # bool (B, L): whether predicting position i + 1 counts in the loss
    isolated: bool = False

    def part(self, start: int, stop: int) -> "TokenBatch":
        """Rows from `start` to `stop`, exclusive."""
        cut = slice(start, stop)
        return TokenBatch(self.tokens[cut], self.segments[cut], self.loss_mask[cut], self.isolated)


def target_mask(segments: np.ndarray, isolated: bool) -> np.ndarray:
    """Positions with a token to predict, bool (..., L), from segments (..., L + 1).

    Padding is not predicted, and if `isolated`, neither is the first token of the next document.
    """
    mask = segments[..., 1:] >= 0
    return mask & (segments[..., 1:] == segments[..., :-1]) if isolated else mask


def make_batch(rows: TokenBatch) -> Batch:
    """The arrays of a step; see `Batch`.

    Logits are computed only where the loss mask is set, which is at few positions in examples with short answers. Their
    number is rounded up to one of eight per batch shape, so that few shapes have to be compiled.
    """
    inputs, targets, mask = rows.tokens[:, :-1], rows.tokens[:, 1:].reshape(-1), rows.loss_mask.reshape(-1)
    batch: Batch = {"inputs": mx.array(inputs)}
    if rows.isolated:
        batch["segments"] = mx.array(rows.segments[:, :-1])
    positions, weights = np.arange(mask.size), mask
    share = -(-mask.size // _SIZES)
    size = share * max(1, -(-mask.sum() // share))
    if size < mask.size:
        positions, weights = np.flatnonzero(mask), np.arange(size) < mask.sum()
        positions = np.pad(positions, (0, size - positions.size))  # with weight 0
        batch["positions"] = mx.array(positions.astype(np.int32))
    batch["targets"] = mx.array(targets[positions])
    batch["weights"] = mx.array(weights.astype(np.float32))
    batch["rows"] = mx.array((positions // inputs.shape[1]).astype(np.int32))
    return batch
