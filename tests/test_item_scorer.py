"""Items in batches: known scores are reused, and what cannot be scored is said."""

import math

import pytest

from mlx_openelm.evaluation import item_scorer
from mlx_openelm.evaluation.item_scorer import ItemScorer, _from_numbers, _numbers
from mlx_openelm.evaluation.items import Item
from mlx_openelm.evaluation.requests import Request, Score
from mlx_openelm.evaluation.score_file import ScoreFile
from mlx_openelm.evaluation.scorer import FAILED, ScorerConfig


class Lengths:
    """A scorer whose scores are lengths, and which keeps what it was asked."""

    def __init__(self, **config):
        self.config = ScorerConfig(**config)
        self.calls = []

    def score(self, requests):
        self.calls.append(list(requests))
        rounded = 0.0 if self.config.emulate_bfloat16 else None
        return [
            Score(-float(len(request.continuation)), False, False, rounded) if request.continuation else FAILED
            for request in requests
        ]


def items(count, choices=("a", "bb", "ccc")):
    return [Item(n, tuple(Request(f"Q{n}", choice) for choice in choices), choices, (0,)) for n in range(count)]


def test_every_item_gets_the_scores_of_its_requests_in_order():
    found = list(ItemScorer(Lengths())(items(50)))
    assert [scored.item.index for scored in found] == list(range(50))
    assert all([score.log_likelihood for score in scored.scores] == [-1, -2, -3] for scored in found)


def test_batches_grow_while_they_take_little_time():
    scorer = Lengths()
    progress = []
    list(ItemScorer(scorer)(items(100), progress.append))
    assert progress == [4, 8, 16, 32, 40]
    assert len(scorer.calls) == 5


def test_batches_shrink_when_they_take_long(monkeypatch):
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(item_scorer.time, "perf_counter", lambda: next(clock))
    progress = []
    list(ItemScorer(Lengths())(items(9), progress.append))
    assert progress == [4, 2, 1, 1, 1]


def test_items_are_drawn_as_they_are_needed():
    def endless():
        number = 0
        while True:
            yield from items(1)
            number += 1
            assert number < 10

    assert next(ItemScorer(Lengths())(endless())).scores is not None


def test_equal_requests_are_scored_once():
    scorer = Lengths()
    list(ItemScorer(scorer)(items(4, ("a", "a", "b"))))
    assert [len(call) for call in scorer.calls] == [8]


def test_known_scores_are_not_computed_again(tmp_path):
    about = {"weights": "a"}
    first = list(ItemScorer(Lengths(), ScoreFile(tmp_path / "s", about))(items(6)))
    scorer = Lengths()
    again = list(ItemScorer(scorer, ScoreFile(tmp_path / "s", about))(items(8)))
    assert again[:6] == first
    assert sum(map(len, scorer.calls)) == 6


def test_rounded_scores_are_computed_if_only_the_others_are_known(tmp_path):
    about = {"weights": "a"}
    list(ItemScorer(Lengths(), ScoreFile(tmp_path / "s", about))(items(2)))
    found = list(ItemScorer(Lengths(emulate_bfloat16=True), ScoreFile(tmp_path / "s", about))(items(2)))
    assert all(score.rounded == 0 for scored in found for score in scored.scores)


def test_an_item_with_a_request_that_cannot_be_scored_has_no_scores(tmp_path):
    file = ScoreFile(tmp_path / "s", {"weights": "a"})
    for _ in range(2):
        found = list(ItemScorer(Lengths(), file)(items(1) + items(1, ("a", ""))))
        assert [scored.scores is None for scored in found] == [False, True]


@pytest.mark.parametrize(
    "scores",
    [(Score(-1.5, True), Score(-math.pi, False, True, -2.0)), (Score(math.nan, False), Score(-1.0, True)), None],
)
def test_processes_exchange_scores_to_the_bit(scores):
    (item,) = items(1, ("a", "b"))
    found = _from_numbers(item, _numbers(item_scorer.ScoredItem(item, scores)))
    assert repr(found.scores) == repr(scores)
