"""The walk over a tree of ids: every shared prefix once, every token behind its ancestors."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mlx_openelm.evaluation.encoding import TokenRequest
from mlx_openelm.evaluation.prefix_tree import PrefixTree, tree_size

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=12)


def requests(rows, num_scored=1):
    return [TokenRequest(np.array(row, np.int32), min(num_scored, len(row) - 1)) for row in rows]


def nodes(rows):
    return {tuple(row[:end]) for row in rows for end in range(1, len(row))}


class Walk:
    """Follows chunks as a model would: a node is known by the ids from the root to it."""

    def __init__(self, tree):
        self.tree, self.path, self.computed, self.targets = tree, [], [], []

    def __call__(self, given):
        asked = []
        for chunk in self.tree.chunks(given):
            assert chunk.num_kept == len(self.path)
            assert len(chunk.tokens) <= self.tree.chunk_size
            own = []
            for i, token in enumerate(chunk.tokens.tolist()):
                assert not chunk.ancestors[i, i + 1 :].any()
                here = np.flatnonzero(chunk.ancestors[i, :i])
                before = [*self.path[: chunk.num_ancestors[i]], *(own[j] for j in here)]
                node = (*(before[-1] if before else ()), token)
                assert before == [node[:end] for end in range(1, len(node))]
                assert chunk.positions[i] == len(before)
                own.append(node)
            everything = self.path + own
            asked += [(everything[target.node], target.token, target.request) for target in chunk.targets]
            self.computed += own
            self.path = self.path[: chunk.path_kept] + [own[slot] for slot in chunk.path]
        return asked


@given(rows=ROWS, chunk_size=st.integers(1, 7), num_scored=st.integers(1, 3))
@settings(max_examples=120, deadline=None)
def test_every_node_is_computed_once_and_every_target_asked(rows, chunk_size, num_scored):
    walk = Walk(PrefixTree(chunk_size))
    given_ = requests(rows, num_scored)
    asked = walk(given_)
    assert sorted(walk.computed) == sorted(nodes(rows))
    assert tree_size(given_) == len(nodes(rows))
    expected = []
    for number, (row, request) in enumerate(zip(rows, given_, strict=True)):
        first = len(row) - request.num_scored
        expected += [(tuple(row[:place]), row[place], number) for place in range(first, len(row))]
    assert sorted(asked) == sorted(expected)
    for number in range(len(rows)):  # the sums over a request's tokens are in their order
        depths = [len(node) for node, _, request in asked if request == number]
        assert depths == sorted(depths)


@given(first=ROWS, second=ROWS, chunk_size=st.integers(1, 7))
@settings(max_examples=80, deadline=None)
def test_the_last_path_of_a_call_is_used_by_the_next(first, second, chunk_size):
    walk = Walk(PrefixTree(chunk_size))
    walk(requests(first))
    path, before = walk.path[-1] if walk.path else (), len(walk.computed)
    walk(requests(second))
    again = walk.computed[before:]
    known = {path[:end] for end in range(1, len(path) + 1)}
    assert sorted(again) == sorted(nodes(second) - known)


def test_without_sharing_every_token_of_every_request_is_computed():
    rows = [[1, 2, 3], [1, 2, 4], [1, 2, 3]]
    walk = Walk(PrefixTree(4, share=False))
    walk(requests(rows))
    assert len(walk.computed) == 6


def test_after_clear_nothing_is_known():
    walk = Walk(PrefixTree(8))
    walk(requests([[1, 2, 3]]))
    walk.tree.clear()
    walk.path = []
    walk(requests([[1, 2, 4]]))
    assert walk.computed == [(1,), (1, 2)] * 2


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_shared_few_shot_examples_cost_one_pass(chunk_size):
    shots = [7] * 50
    rows = [[*shots, question, *answer] for question in range(5) for answer in ([1], [2, 3])]
    assert tree_size(requests(rows, 2)) == 50 + 5 + 5
    walk = Walk(PrefixTree(chunk_size))
    walk(requests(rows, 2))
    assert len(walk.computed) == 60
