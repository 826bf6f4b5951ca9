"""From rows of ids to the arrays of a step."""

import numpy as np
import pytest

from mlx_openelm.data.batch import TokenBatch, make_batch, target_mask


def test_padding_is_not_predicted_and_isolated_documents_do_not_predict_each_other():
    segments = np.array([[0, 0, 1, 1, -1], [0, 0, 0, 0, 0]])
    assert target_mask(segments, isolated=False).tolist() == [[True, True, True, False], [True] * 4]
    assert target_mask(segments, isolated=True).tolist() == [[True, False, True, False], [True] * 4]


def rows(mask, isolated=False):
    mask = np.array(mask, bool)
    shape = mask.shape[0], mask.shape[1] + 1
    return TokenBatch(np.arange(np.prod(shape)).reshape(shape).astype(np.int32), np.zeros(shape, int), mask, isolated)


def test_every_position_is_scored_if_all_of_them_count():
    batch = make_batch(rows([[True, True, True], [True, True, True]]))
    assert batch["inputs"].tolist() == [[0, 1, 2], [4, 5, 6]]
    assert batch["targets"].tolist() == [1, 2, 3, 5, 6, 7]
    assert batch["weights"].tolist() == [1, 1, 1, 1, 1, 1]
    assert batch["rows"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.keys() == {"inputs", "targets", "weights", "rows"}


def test_few_positions_are_picked_and_filled_up_to_one_of_eight_sizes():
    mask = np.zeros((2, 16), bool)
    mask[0, 3] = mask[1, [0, 15]] = True
    mask[1, 7:9] = True
    batch = make_batch(rows(mask))
    assert batch["positions"].tolist() == [3, 16, 23, 24, 31, 0, 0, 0]  # of 32, in steps of 4
    assert batch["weights"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert batch["targets"].tolist()[:5] == [4, 18, 25, 26, 33]
    assert batch["rows"].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]


def test_nothing_to_score_still_has_a_shape():
    batch = make_batch(rows(np.zeros((1, 16), bool)))
    assert batch["weights"].tolist() == [0, 0]


@pytest.mark.parametrize("isolated", [False, True])
def test_segments_are_there_only_if_rows_are_isolated(isolated):
    batch = make_batch(rows([[True, True]], isolated))
    assert ("segments" in batch) == isolated
    if isolated:
        assert batch["segments"].tolist() == [[0, 0]]


def test_a_part_has_its_own_rows():
    whole = rows([[True, False], [False, True], [True, True]], isolated=True)
    part = whole.part(1, 3)
    assert part.tokens.tolist() == whole.tokens[1:].tolist()
    assert part.segments.tolist() == whole.segments[1:].tolist()
    assert part.loss_mask.tolist() == [[False, True], [True, True]]
    assert part.isolated
