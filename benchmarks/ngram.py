"""A 5-gram model with modified Kneser-Ney smoothing, the baseline for a small network on the same tokens.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section 3.
"""

from dataclasses import dataclass

import numpy as np

ORDER = 5


@dataclass(frozen=True)
class _Level:
    """N-grams of one length, packed into sorted integers, with their counts and what follows from them."""

    grams: np.ndarray  # sorted
    counts: np.ndarray
    contexts: np.ndarray  # all but the last token, sorted
    totals: np.ndarray  # sum of the counts, for each context
    reserved: np.ndarray  # sum of the discounts, for each context


class KneserNey:
    """Probabilities of tokens given the four before them."""

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int = ORDER):
        """Count a stream of ids (L,)."""
        self.vocab_size = vocab_size
        self.bits = int(vocab_size - 1).bit_length()
        assert self.bits * order < 64, "n-grams are packed into 64 bits"
        self.discounts: list[np.ndarray] = []
        self.levels: list[_Level] = []
        grams, counts = np.unique(self._packed(tokens, order), return_counts=True)
        for length in range(order, 0, -1):
            self._add_level(grams, counts)
            # Shorter n-grams are counted by the number of different tokens that precede them.
            grams, counts = np.unique(grams & np.uint64((1 << self.bits * (length - 1)) - 1), return_counts=True)

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """Cross-entropy of each token in nats, (L - 4,), without the first tokens, which have no full context."""
        order = len(self.levels)
        probability = np.full(len(tokens) - order + 1, 1 / self.vocab_size)
        for length, level, discounts in zip(range(1, order + 1), self.levels[::-1], self.discounts[::-1], strict=True):
            grams = self._packed(tokens[order - length :], length)
            at, seen = _find(level.contexts, grams >> np.uint64(self.bits))
            place, known = _find(level.grams, grams)
            counts = np.where(known, level.counts[place], 0)
            direct = (counts - discounts[np.minimum(counts, 3)]) / level.totals[at]
            probability = np.where(seen, direct + level.reserved[at] / level.totals[at] * probability, probability)
        return -np.log(probability)

    def _packed(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """Every run of `length` tokens as one integer, with the first token in the highest bits."""
        ids = tokens.astype(np.uint64)
        packed = np.zeros(len(ids) - length + 1, np.uint64)
        for at in range(length):
            packed = packed << np.uint64(self.bits) | ids[at : len(ids) - length + 1 + at]
        return packed

    def _add_level(self, grams: np.ndarray, counts: np.ndarray) -> None:
        ones, twos, threes, fours = (max(1, int((counts == n).sum())) for n in (1, 2, 3, 4))
        share = ones / (ones + 2 * twos)
        raw = [0, 1 - 2 * share * twos / ones, 2 - 3 * share * threes / twos, 3 - 4 * share * fours / threes]
        discounts = np.clip(raw, [0, 0.01, 0.01, 0.01], [0, 1, 2, 3])  # at least some mass for unseen n-grams
        contexts, starts = np.unique(grams >> np.uint64(self.bits), return_index=True)
        totals = np.add.reduceat(counts, starts)
        reserved = np.add.reduceat(discounts[np.minimum(counts, 3)], starts)
        self.levels.append(_Level(grams, counts, contexts, totals, reserved))
        self.discounts.append(discounts)


def _find(sorted_values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The position of each wanted value, and whether it was found."""
    place = np.searchsorted(sorted_values, wanted).clip(max=len(sorted_values) - 1)
    return place, sorted_values[place] == wanted
