import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_openelm.errors import EvaluationError
from mlx_openelm.evaluation.items import Item
from mlx_openelm.evaluation.metrics import (
    METRICS,
    grade,
    mean,
    pooled_mean,
    pooled_standard_error,
    standard_error,
)
from mlx_openelm.evaluation.requests import Request, Score

LETTERS = "aé€ß日x "


def item_of(choices, gold=(0,)):
    return Item(0, tuple(Request("Q:", f" {choice}") for choice in choices), tuple(choices), tuple(gold))


def values(likelihoods, choices=("a", "b", "c"), gold=(0,), names=tuple(METRICS), rounded=None):
    rounded = rounded or [None] * len(likelihoods)
    scores = [Score(of, False, rounded=low) for of, low in zip(likelihoods, rounded, strict=True)]
    return grade(item_of(choices, gold), scores, names).metrics


def test_the_likeliest_choice_is_the_answer():
    assert values([-1, -2, -3], names=["acc"]) == {"acc": 1}
    assert values([-1, -0.5, -3], names=["acc"]) == {"acc": 0}


def test_acc_norm_divides_by_characters_and_acc_bytes_by_bytes():
    # per character -1, -0.9, -1.2; per byte -1, -0.9, -0.4
    found = values([-2, -2.7, -1.2], ("ab", "abc", "日"), (1,), ("acc", "acc_norm", "acc_bytes"))
    assert found == {"acc": 0, "acc_norm": 1, "acc_bytes": 0}


def test_equal_choices_count_as_the_first():
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert values([-5, -1, -1], gold=(1,), names=[name]) == {name: 1}
        assert values([-5, -1, -1], gold=(2,), names=[name]) == {name: 0}


def test_an_empty_choice_is_never_the_answer_per_character():
    assert values([-9, -1], ("word", ""), (0,), ["acc", "acc_norm"]) == {"acc": 0, "acc_norm": 1}
    assert values([0, -1], ("", "word"), (1,), ["acc_norm"]) == {"acc_norm": 0}  # 0/0 counts as lm-eval counts it


def test_the_probability_of_true_answers():
    likelihoods = [math.log(0.2), math.log(0.1), math.log(0.3), math.log(0.1)]
    assert values(likelihoods, "abcd", (0, 2), ["mc2"])["mc2"] == pytest.approx(0.5 / 0.7)


def test_answers_too_unlikely_for_a_float_still_have_a_share():
    assert values([-2000, -2000 + math.log(3)], "ab", (1,), ["mc2"])["mc2"] == pytest.approx(0.75)


def test_a_stereotype_counts_only_if_it_is_likelier():
    for likelihoods, expected in (([-1, -2], 1), ([-2, -1], 0), ([-1, -1], 0)):
        assert values(likelihoods, "ab", names=["pct_stereotype"]) == {"pct_stereotype": expected}


def test_the_difference_of_a_pair_in_nats():
    assert values([-2.5, -1], "ab", names=["likelihood_diff"]) == {"likelihood_diff": 1.5}
    assert values([-1, -2.5], "ab", names=["likelihood_diff"]) == {"likelihood_diff": 1.5}


def test_rounded_scores_have_values_of_their_own():
    found = values([-64.1, -64.0], "ab", (1,), ["acc"], rounded=[-64.0, -64.0])
    assert found == {"acc": 1, "acc_bf16": 0}


def test_scores_that_are_not_finite_are_graded_as_lm_eval_does():
    assert values([-1, math.nan, -3], gold=(1,), names=["acc"]) == {"acc": 1}
    assert values([-math.inf] * 3, gold=(0,), names=["acc"]) == {"acc": 1}
    assert math.isnan(values([-1, math.nan], "ab", names=["mc2"])["mc2"])
    assert math.isnan(values([-math.inf, -math.inf], "ab", names=["mc2"])["mc2"])


def test_an_unknown_metric_is_refused():
    with pytest.raises(EvaluationError, match="unknown metric 'f1'"):
        values([0], "a", names=["f1"])


def test_the_standard_error_by_hand():
    assert mean([1, 0, 0, 1]) == 0.5
    assert standard_error([1, 0, 0, 1]) == pytest.approx(math.sqrt(1 / 3) / 2)  # variance (4 x 0.25) / 3
    assert standard_error([1, 1]) == 0
    assert standard_error([1]) is None
    assert math.isnan(mean([]))


def test_a_group_by_hand():
    assert pooled_mean([0.5, 1.0], [1, 3]) == 0.875
    # variances 0.25 and 1 of 2 and 3 items with 1 and 2 degrees of freedom: (0.25 + 2) / 3 / 5
    errors = [math.sqrt(0.25 / 2), math.sqrt(1 / 3)]
    assert pooled_standard_error(errors, [2, 3]) == pytest.approx(math.sqrt(2.25 / 3 / 5))
    assert pooled_standard_error([0.1, None], [2, 1]) is None
    assert math.isnan(pooled_mean([], []))


def by_lm_eval(likelihoods, choices, gold):
    """The formulas of lm-eval's multiple choice and TruthfulQA, written down once more."""
    lls = np.array(likelihoods)
    probabilities = np.exp(lls) / np.exp(lls).sum()
    return {
        "acc": float(np.argmax(lls) in gold),
        "acc_norm": float(np.argmax(lls / np.array([float(len(of)) for of in choices])) in gold),
        "acc_bytes": float(np.argmax(lls / np.array([float(len(of.encode())) for of in choices])) in gold),
        "mc2": float(probabilities[list(gold)].sum()),
    }


@pytest.mark.parametrize("seed", range(5))
def test_random_items_are_graded_as_lm_eval_grades_them(seed):
    draw = random.Random(seed)
    for _ in range(200):
        number = draw.randint(2, 6)
        choices = ["".join(draw.choices(LETTERS, k=draw.randint(1, 12))) for _ in range(number)]
        likelihoods = [-draw.randint(1, 12) / 2 for _ in range(number)]  # coarse, so that many are equal
        gold = tuple(draw.sample(range(number), draw.randint(1, number - 1)))
        found = values(likelihoods, choices, gold, ["acc", "acc_norm", "acc_bytes", "mc2"])
        assert found == pytest.approx(by_lm_eval(likelihoods, choices, gold))


@pytest.mark.parametrize("seed", range(3))
def test_standard_errors_are_those_of_lm_eval(seed):
    metrics = pytest.importorskip("lm_eval.api.metrics")
    draw = random.Random(seed)
    tasks = [[float(draw.random() < 0.4) for _ in range(draw.randint(2, 90))] for _ in range(7)]
    errors = [standard_error(of) for of in tasks]
    assert errors == pytest.approx([metrics.mean_stderr(of) for of in tasks])
    sizes = [len(of) for of in tasks]
    means = [mean(of) for of in tasks]
    assert pooled_standard_error(errors, sizes) == pytest.approx(metrics.pooled_sample_stderr(errors, sizes))
    assert pooled_mean(means, sizes) == pytest.approx(metrics.aggregate_subtask_metrics(means, sizes))
    assert pooled_mean(means, sizes) == pytest.approx(mean([value for of in tasks for value in of]))


def test_items_are_graded_by_lm_evals_own_code_alike():
    task = pytest.importorskip("lm_eval.api.task").ConfigurableTask
    draw = random.Random(0)
    names = ("acc", "acc_norm", "acc_bytes")
    for _ in range(300):
        number = draw.randint(2, 5)
        choices = ["".join(draw.choices(LETTERS, k=draw.randint(1, 9))) for _ in range(number)]
        likelihoods = [-draw.randint(1, 9) / 2 for _ in range(number)]
        gold = draw.randrange(number)
        stub = SimpleNamespace(
            config=SimpleNamespace(process_results=None, repeats=1),
            _metric_fn_list=dict.fromkeys(names),
            OUTPUT_TYPE="multiple_choice",
            multiple_input=0,
            multiple_target=0,
            doc_to_choice=lambda doc, choices=choices: choices,
            doc_to_target=lambda doc, gold=gold: gold,
        )
        theirs = task.process_results(stub, {}, [(of, False) for of in likelihoods])
        assert values(likelihoods, choices, (gold,), names) == theirs


def test_special_tasks_are_graded_by_lm_evals_own_code_alike():
    truthfulqa = pytest.importorskip("lm_eval.tasks.truthfulqa.utils")
    crows_pairs = pytest.importorskip("lm_eval.tasks.crows_pairs.utils")
    draw = random.Random(1)
    for _ in range(300):
        likelihoods = [-draw.randint(1, 60) / 4 for _ in range(draw.randint(2, 8))]
        labels = [1, *(draw.randint(0, 1) for _ in likelihoods[1:])]
        results = [(of, False) for of in likelihoods]
        gold = tuple(place for place, label in enumerate(labels) if label)
        theirs = truthfulqa.process_results_mc2({"mc2_targets": {"labels": labels}}, results)["acc"]
        assert values(likelihoods, ["x"] * len(labels), gold, ["mc2"])["mc2"] == pytest.approx(theirs)
        pair = values(likelihoods[:2], "ab", names=["likelihood_diff", "pct_stereotype"])
        assert pair == crows_pairs.process_results({}, results[:2])
