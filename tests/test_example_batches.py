from collections import Counter

import numpy as np
import pytest

from mlx_openelm.data.example_batches import ExampleBatches, all_rows
from mlx_openelm.data.formats import Example, PreferencePair


def example(number, length, num_answer=2):
    """An example that can be told by its second token, and whose last tokens are the answer."""
    tokens = np.full(length, 7, np.int32)
    tokens[0], tokens[1], tokens[-1] = 1, number, 2
    return Example(tokens, np.arange(length) >= length - num_answer)


@pytest.fixture
def examples():
    lengths = np.random.default_rng(0).integers(4, 90, 101)
    return [example(1000 + number, int(length)) for number, length in enumerate(lengths)]


def contents(rows):
    """Numbers of the examples that are in the rows, and a check that each is there as a whole."""
    found = []
    for tokens, segments in zip(rows.tokens, rows.segments, strict=True):
        for segment in range(segments.max() + 1):
            run = tokens[segments == segment]
            assert (run[0], run[-1]) == (1, 2)
            found.append((int(run[1]), len(run)))
    return found


def epoch(batches, number=0):
    steps = range(number * batches.steps_per_epoch, (number + 1) * batches.steps_per_epoch)
    return [batches.step(step) for step in steps]


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "segments", "loss_mask"))


def whole(examples):
    return Counter((int(entry.tokens[1]), len(entry.tokens)) for entry in examples)


@pytest.mark.parametrize("pack", [False, True])
def test_every_example_is_seen_once_an_epoch_in_another_order(examples, pack):
    batches = ExampleBatches(examples, 8, max_length=100, pack=pack, seed=3)
    orders = [[found for rows in epoch(batches, number) for found in contents(rows)] for number in range(3)]
    for order in orders:
        assert Counter(order) == whole(examples)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("pack", [False, True])
def test_a_fresh_object_gives_the_same_rows(examples, pack):
    batches = ExampleBatches(examples, 8, max_length=100, pack=pack, seed=3)
    rows = [batches.step(step) for step in range(20)]
    for step in (19, 0, 7):
        fresh = ExampleBatches(examples, 8, max_length=100, pack=pack, seed=3)
        assert equal(fresh.step(step), rows[step])
        assert not equal(ExampleBatches(examples, 8, max_length=100, pack=pack, seed=4).step(step), rows[step])


@pytest.mark.parametrize("pack", [False, True])
def test_shares_of_two_processes_are_the_whole(examples, pack):
    batches = ExampleBatches(examples, 8, max_length=100, pack=pack, seed=0)
    for step, rows in enumerate(epoch(batches)):
        parts = [batches.step(step, first, 4) for first in (0, 4)]
        for name in ("tokens", "segments", "loss_mask"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(rows, name))


@pytest.mark.parametrize("pack", [False, True])
def test_as_many_tokens_count_as_there_are_answers(examples, pack):
    rows = epoch(ExampleBatches(examples, 8, max_length=100, pack=pack, seed=0))
    assert sum(int(row.loss_mask.sum()) for row in rows) == 2 * len(examples)


def test_examples_of_about_one_length_share_a_batch(examples):
    rows = epoch(ExampleBatches(examples, 8, max_length=100, seed=0))
    assert len(rows) == 13
    assert {row.tokens.shape[0] for row in rows} == {8}
    assert {row.tokens.shape[1] - 1 for row in rows} == {32, 64, 96}
    for row in rows:
        longest = max(length for _, length in contents(row))
        assert row.tokens.shape[1] - 1 - 32 < longest - 1 <= row.tokens.shape[1] - 1
    padding = sum(int((row.segments < 0).sum()) for row in rows)
    assert padding < 0.4 * sum(row.segments.size for row in rows)
    assert not any(row.isolated for row in rows)


def test_rows_without_an_example_are_padding(examples):
    batches = ExampleBatches(examples[:5], 8, max_length=100)
    rows = batches.step(0)
    assert batches.steps_per_epoch == 1
    assert (rows.segments[5:] == -1).all()
    assert not rows.loss_mask[5:].any()
    assert rows.loss_mask[:5].any(axis=1).all()


def test_a_row_by_hand():
    batches = ExampleBatches([example(50, 5)], 1, max_length=6)
    rows = batches.step(0)
    assert rows.tokens.tolist() == [[1, 50, 7, 7, 2, 0, 0]]  # not 32 wide, which is past the longest
    assert rows.segments.tolist() == [[0, 0, 0, 0, 0, -1, -1]]
    assert rows.loss_mask.tolist() == [[False, False, True, True, False, False]]
    assert rows.tokens.dtype == rows.segments.dtype == np.int32


def test_a_packed_row_by_hand():
    everything = [Example(entry.tokens, np.ones(len(entry.tokens), bool)) for entry in (example(50, 5), example(60, 3))]
    rows = ExampleBatches(everything, 1, max_length=8, pack=True).step(0)
    assert rows.tokens.tolist() == [[1, 50, 7, 7, 2, 1, 60, 2, 0]]
    assert rows.segments.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, -1]]
    # BOS of the second example is marked as an answer here, but does not follow from the first example.
    assert rows.loss_mask.tolist() == [[True, True, True, True, False, True, True, False]]
    assert rows.isolated


def test_packed_rows_never_count_across_borders(examples):
    for rows in epoch(ExampleBatches(examples, 4, max_length=100, pack=True, seed=0)):
        assert rows.tokens.shape == (4, 101)
        assert rows.isolated
        assert (rows.segments[:, 1:] == rows.segments[:, :-1])[rows.loss_mask].all()
        assert (rows.tokens[:, 1:][rows.loss_mask] != 1).all()


def test_packing_fills_rows(examples):
    batches = ExampleBatches(examples, 1, max_length=100, pack=True, seed=0)
    tokens = sum(len(entry.tokens) for entry in examples)
    assert batches.steps_per_epoch <= 1.1 * tokens / 101
    neighbours = [{frozenset(contents(rows)) for rows in epoch(batches, number)} for number in range(2)]
    assert neighbours[0] != neighbours[1]


def test_packing_takes_a_large_set_quickly():
    lengths = np.random.default_rng(0).integers(20, 300, 20_000)
    batches = ExampleBatches([example(9, int(length)) for length in lengths], 8, max_length=2048, pack=True)
    rows = batches.steps_per_epoch * 8
    assert rows <= 1.01 * lengths.sum() / 2049 + 8


def test_an_example_that_fills_a_row():
    rows = ExampleBatches([example(50, 9), example(60, 9)], 2, max_length=8, pack=True).step(0)
    assert sorted(contents(rows)) == [(50, 9), (60, 9)]


@pytest.fixture
def pairs():
    lengths = np.random.default_rng(1).integers(4, 90, (21, 2)).tolist()
    return [PreferencePair(example(1000 + n, one), example(2000 + n, other)) for n, (one, other) in enumerate(lengths)]


def test_the_rows_of_a_pair_follow_each_other(pairs):
    batches = ExampleBatches(pairs, 4, max_length=100, seed=0)
    assert (batches.rows_per_entry, batches.steps_per_epoch) == (2, 6)
    seen = []
    for step, rows in enumerate(epoch(batches)):
        assert rows.tokens.shape[0] == 8
        found = [number for number, _ in contents(rows)]
        assert [number + 1000 for number in found[::2]] == found[1::2]
        seen += found[::2]
        part = batches.step(step, 2, 2)  # in pairs
        assert np.array_equal(part.tokens, rows.tokens[4:])
        assert np.array_equal(part.loss_mask, rows.loss_mask[4:])
    assert sorted(seen) == list(range(1000, 1021))


def test_pairs_are_not_packed(pairs):
    with pytest.raises(AssertionError, match="not packed"):
        ExampleBatches(pairs, 4, max_length=100, pack=True)


def test_examples_longer_than_a_row_are_our_mistake(examples):
    with pytest.raises(AssertionError, match="longer than a row"):
        ExampleBatches(examples, 4, max_length=20)


def test_validation_goes_through_all_examples_the_longest_first(examples):
    rows = list(all_rows(examples, 8))
    found = [entry for row in rows for entry in contents(row)]
    assert Counter(found) == whole(examples)
    assert [length for _, length in found] == sorted((len(entry.tokens) for entry in examples), reverse=True)
    assert [row.tokens.shape[0] for row in rows] == [8] * 12 + [5]
    assert {row.tokens.shape[1] - 1 for row in rows} == {found[0][1] - 1, 64, 32}  # no wider than the longest
    shared = [list(all_rows(examples, 8, first=first, stride=2)) for first in (0, 1)]
    assert all(equal(row, shared[number % 2][number // 2]) for number, row in enumerate(rows))


def test_validation_of_pairs(pairs):
    rows = list(all_rows(pairs, 4))
    found = [number for row in rows for number, _ in contents(row)]
    assert [number + 1000 for number in found[::2]] == found[1::2]
    assert sorted(found[::2]) == list(range(1000, 1021))


def test_windows_of_16_batches_are_sorted_by_length():
    """Each window of 16 batches of an epoch is cut into batches of neighbouring lengths: spreads stay small."""
    rng = np.random.default_rng(1)
    examples = [example(1000 + number, int(length)) for number, length in enumerate(rng.integers(4, 90, 16 * 4 * 3))]
    batches = ExampleBatches(examples, 4, max_length=100, seed=0)
    assert batches.steps_per_epoch == 48
    spreads = [np.ptp([length for _, length in contents(rows)]) for rows in epoch(batches)]
    assert max(spreads) < 86 / 3  # a window has 64 examples: four neighbours span a small part of all lengths
    assert np.mean(spreads) < 10


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
def test_steps_of_an_epoch_are_those_that_hold_every_entry(count):
    entries = [example(1000 + number, 50) for number in range(count)]
    assert ExampleBatches(entries, 4, max_length=60).steps_per_epoch == -(-count // 4)
    assert ExampleBatches(entries, 4, max_length=60, pack=True).steps_per_epoch == -(-count // 4)
