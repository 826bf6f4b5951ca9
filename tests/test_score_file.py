"""Scores that outlive a run."""

import math

import pytest

from mlx_openelm.errors import EvaluationError
from mlx_openelm.evaluation.requests import Request, Score
from mlx_openelm.evaluation.score_file import ScoreFile

ABOUT = {"weights": "abc", "tokenizer": "def", "dtype": "float32"}
SCORES = [
    (Request("The fox", " ran"), Score(-1.25, True)),
    (Request("", "é\n😀"), Score(-1e-17, False, True, -1.0)),
    (Request("a", "b"), Score(-math.pi, False)),
]


@pytest.fixture
def path(tmp_path):
    ScoreFile(tmp_path / "scores.jsonl", ABOUT).add(SCORES)
    return tmp_path / "scores.jsonl"


def test_scores_are_read_as_they_were_written(path):
    found = ScoreFile(path, ABOUT)
    assert [found.get(request) for request, _ in SCORES] == [score for _, score in SCORES]
    assert found.get(Request("The fox", "ran")) is None
    assert len(found) == 3


def test_context_and_continuation_are_told_apart(path):
    assert ScoreFile(path, ABOUT).get(Request("The fox ", "ran")) is None


def test_a_score_without_the_rounded_one_does_not_answer_for_both(path):
    found = ScoreFile(path, ABOUT)
    assert found.get(SCORES[0][0], needs_rounded=True) is None
    assert found.get(SCORES[1][0], needs_rounded=True) == SCORES[1][1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_stays_so(tmp_path, value):
    ScoreFile(tmp_path / "s", ABOUT).add([(SCORES[0][0], Score(value, False))])
    assert not ScoreFile(tmp_path / "s", ABOUT).get(SCORES[0][0]).is_finite


def test_cut_off_at_any_byte_it_keeps_whole_lines_and_goes_on(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found = ScoreFile(path, ABOUT)
        known = whole[:length].count(b"\n") - 1
        assert len(found) == max(0, known)
        found.add(SCORES[max(0, known) :])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ABOUT)
def test_scores_of_another_model_are_refused_by_what_differs(path, name):
    with pytest.raises(EvaluationError, match=f"another model: its {name} differ"):
        ScoreFile(path, {**ABOUT, name: "other"})


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[]\n", b'{"prompt": 3}\n', b'{"prompt": "a", "log_likelihood": "b"}\n', b"\xff\n"]
)
def test_a_damaged_line_is_named(path, line):
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(EvaluationError, match="line 5"):
        ScoreFile(path, ABOUT)
