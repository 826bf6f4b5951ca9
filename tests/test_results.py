import math
import random

import pytest

from conftest import graded
from mlx_openelm.errors import EvaluationError
from mlx_openelm.evaluation.items import Item
from mlx_openelm.evaluation.requests import Request
from mlx_openelm.evaluation.results import GroupResult, ItemRecord, SuiteAverage, TaskResult, item_hash


def task_of(likelihoods, name="piqa", metric="acc_norm", **more):
    return TaskResult.of(name, graded(likelihoods), metric=metric, **more)


def test_a_task_has_its_metrics_with_standard_errors():
    found = task_of([[-1, -2], [-3, -2], [-1, -9], [-1, -3]], shots=5, version=1.0, data={"path": "x.jsonl"})
    assert found.main.value == 0.75
    assert found.main.stderr == pytest.approx(0.25)
    assert found.metrics["acc"] == found.main
    assert (found.num_items, found.num_right("acc"), found.version, found.shots) == (4, 3, "1.0", 5)
    assert found.problems == []


def test_the_order_of_items_does_not_matter():
    items = graded([[-1 - number % 3, -2] for number in range(30)])
    mixed = random.Random(0).sample(items, 30)
    assert TaskResult.of("piqa", mixed, metric="acc") == TaskResult.of("piqa", items, metric="acc")


def test_a_task_without_items_has_no_value():
    found = task_of([], num_failed=3)
    assert math.isnan(found.main.value)
    assert found.problems == ["3 failed"]
    assert found.majority is None


def test_truncated_and_not_finite_items_are_counted():
    items = graded([[-1, math.nan], [-math.inf, -2], [-1, -2]]) + graded([[-1, -2]], start=3, is_truncated=True)
    found = TaskResult.of("race", items, metric="acc")
    assert found.problems == ["1 truncated", "2 not finite"]
    assert found.main.value == 0.5  # NaN counts as the likeliest, as in lm-eval


def test_the_majority_is_the_most_frequent_position():
    golds = [(0,), (2,), (2,), (1,)]
    found = TaskResult.of("arc_easy", graded([[-1, -2, -3]] * 4, golds), metric="acc")
    assert found.gold_counts == (1, 1, 2)
    assert found.majority == 0.5


@pytest.mark.parametrize("metric", ["mc2", "pct_stereotype"])
def test_there_is_no_majority_where_positions_say_nothing(metric):
    found = TaskResult.of("x", graded([[-1, -2]] * 3, metrics=[metric]), metric=metric)
    assert found.majority is None
    assert found.num_right(metric) == pytest.approx(3 if metric == "pct_stereotype" else 3 * 0.7310586)


def test_an_unknown_metric_is_refused():
    with pytest.raises(EvaluationError, match="unknown metric"):
        TaskResult.of("x", [], metric="accuracy")


def test_prompts_have_a_hash_that_depends_on_all_of_their_text():
    def of(*requests):
        return item_hash(Item(0, tuple(Request(*texts) for texts in requests), ("",) * len(requests), (0,)))

    different = [
        of(("a", "b")),
        of(("ab", "")),
        of(("", "ab")),
        of(("a", "b"), ("a", "b")),
        of(("a", "c")),
        of(("a\udc80", "b")),
    ]
    assert len(set(different)) == len(different)
    assert of(("a", "b")) == different[0]
    assert all(len(one) == 16 for one in different)


def test_a_record_keeps_no_texts():
    (item,) = graded([[-1, -2]])
    record = ItemRecord.of(item)
    assert "question" in item.item.requests[0].context
    assert "question" not in repr(record)
    assert record.scores == item.scores


def test_a_group_weighs_its_tasks_by_their_items():
    one = task_of([[-1, -2], [-1, -2]], "mmlu_a", shots=5, version="1")
    two = task_of([[-1, -2]] + [[-3, -2]] * 5, "mmlu_b", shots=5, version="1", num_failed=1)
    group = GroupResult.of_tasks("mmlu", [one, two])
    assert group.main.value == 3 / 8
    assert group.num_right("acc") == 3
    assert group.gold_counts == (8,)
    assert (group.members, group.shots, group.version, group.num_items) == (("mmlu_a", "mmlu_b"), 5, "1", 8)
    assert group.problems == ["1 failed"]
    assert group.main.stderr == pytest.approx(math.sqrt(two.main.stderr**2 * 6 * 5 / 6 / 8))


def test_a_task_without_items_does_not_spoil_its_group():
    one, empty = task_of([[-1, -2], [-3, -2]], "mmlu_a"), task_of([], "mmlu_b", num_failed=2)
    group = GroupResult.of_tasks("mmlu", [empty, one])
    assert group.main.value == 0.5
    assert group.problems == ["2 failed"]
    assert math.isnan(GroupResult.of_tasks("mmlu", [empty]).main.value)


def test_the_average_of_a_suite_weighs_all_tasks_alike_and_names_the_doubtful():
    one = task_of([[-1, -2], [-3, -2]], "a")
    two = task_of([[-1, -2]] * 10, "b", num_failed=1)
    average = SuiteAverage.of([one, two])
    assert average == SuiteAverage(0.75, one.main.stderr / 2, ("a", "b"), ("b",))
    assert SuiteAverage.of([one, task_of([[-1, -2]], "c")]).stderr is None
