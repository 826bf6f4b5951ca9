import json
import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest

from conftest import graded
from mlx_openelm.commands import tables
from mlx_openelm.errors import EvaluationError
from mlx_openelm.evaluation.comparison import compare, mcnemar
from mlx_openelm.evaluation.report import EvaluationReport
from mlx_openelm.evaluation.results import GroupResult, TaskResult

RIGHT, WRONG = [-1, -2], [-2, -1]


def task_of(answers, name="piqa", metric="acc", shots=0, **more):
    """A task whose items are right where there is a 1."""
    items = graded([RIGHT if answer == "1" else WRONG for answer in answers], **more)
    return TaskResult.of(name, items, metric=metric, shots=shots, version="1")


def report_of(*results, model="base", **more):
    return EvaluationReport(model, more.pop("adapter", None), "float32", "current", results, **more)


def test_flips_are_counted_in_both_directions():
    found = compare(report_of(task_of("11110000")), report_of(task_of("11001111"), model="4bit"))
    acc, acc_norm = found.differences
    assert (acc.metric, acc_norm.metric) == ("acc", "acc_norm")
    assert (acc.num_items, acc.num_lost, acc.num_gained) == (8, 2, 4)
    assert (acc.first, acc.second, acc.difference) == (0.5, 0.75, 0.25)
    assert acc.p_value == pytest.approx(2 * (1 + 6 + 15) / 64)
    # differences 0 0 -1 -1 1 1 1 1: mean 0.25, squares 6, variance (6 - 8/16) / 7
    assert acc.stderr == pytest.approx(math.sqrt(5.5 / 7 / 8))


def test_a_model_is_as_good_as_itself():
    report = report_of(task_of("1101"))
    (acc, _) = compare(report, report).differences
    assert (acc.difference, acc.num_lost, acc.num_gained, acc.p_value, acc.stderr) == (0, 0, 0, 1, 0)


def test_mcnemars_test_by_hand():
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(5, 0) == mcnemar(0, 5)
    assert mcnemar(1, 9) == 2 * (1 + 10) / 1024
    assert mcnemar(4, 4) == 1


@pytest.mark.parametrize("seed", range(20))
def test_mcnemars_test_is_the_sum_of_all_as_uneven_outcomes(seed):
    draw = random.Random(seed)
    lost, gained = draw.randint(0, 60), draw.randint(0, 60)
    total = lost + gained
    uneven = sum(math.comb(total, k) for k in range(total + 1) if abs(2 * k - total) >= abs(lost - gained))
    assert mcnemar(lost, gained) == pytest.approx(float(Fraction(uneven, 2**total)))


def test_mcnemars_test_of_many_flips():
    assert mcnemar(5000, 5000) == 1
    assert mcnemar(4900, 5100) == pytest.approx(0.0466, abs=0.0001)  # by the normal approximation with correction
    assert mcnemar(0, 10_000) == 0


def test_only_common_items_are_compared_and_the_others_counted():
    first, second = task_of("1100"), task_of("11001111")
    found = compare(report_of(first), report_of(second)).differences[0]
    assert (found.num_items, found.num_only_first, found.num_only_second) == (4, 0, 4)
    assert found.difference == 0
    swapped = compare(report_of(second), report_of(first))
    assert any("4 items only in the first run, 0 only in the second" in note for note in swapped.table().notes)


def test_other_questions_are_refused():
    first, second = task_of("11"), replace(task_of("11", prompt="another question"), protocol="paper", version="2")
    with pytest.raises(EvaluationError, match=r"piqa, item 0: .* differ in protocol \(current and paper\), version"):
        compare(report_of(first), report_of(second))
    with pytest.raises(EvaluationError, match="their prompts only"):
        compare(report_of(first), report_of(task_of("11", prompt="another question")))
    with pytest.raises(EvaluationError, match="asked different questions"):
        compare(report_of(first), report_of(task_of("11", golds=[(1,), (0,)])))


def test_runs_without_anything_in_common_are_refused():
    with pytest.raises(EvaluationError, match=r"no task is in both runs: piqa in the first, piqa \(5 shots\) in the"):
        compare(report_of(task_of("1")), report_of(task_of("1", shots=5)))
    with pytest.raises(EvaluationError, match="the second run has no items of piqa"):
        compare(report_of(task_of("1")), report_of(replace(task_of("1"), items=())))
    with pytest.raises(EvaluationError, match="have no item of piqa in common"):
        compare(report_of(task_of("1")), report_of(task_of("1", start=9)))


def test_tasks_of_one_run_only_are_named():
    found = compare(report_of(task_of("1"), task_of("1", "sciq")), report_of(task_of("1"), task_of("1", "race")))
    assert (found.only_first, found.only_second) == (("sciq",), ("race",))
    assert {of.task for of in found.differences} == {"piqa"}
    assert "only in the second run: race" in found.table().notes


def test_shares_of_probability_have_a_difference_but_no_flips():
    def of(*likelihoods):
        items = graded(likelihoods, metrics=["mc2"])
        return report_of(TaskResult.of("truthfulqa_mc2", items, metric="mc2"))

    (found,) = compare(of([-1, -1], [-1, -1]), of([-1, -1], [-1, -1 - math.log(3)])).differences
    assert found.difference == pytest.approx(0.125)
    assert (found.num_lost, found.num_gained, found.p_value) == (None, None, None)
    assert found.stderr == pytest.approx(0.125)


def test_rounded_scores_are_not_compared():
    items = [replace(item, metrics={"acc": 1.0, "acc_bf16": 0.0}) for item in graded([RIGHT])]
    report = report_of(TaskResult.of("boolq", items, metric="acc"))
    assert [of.metric for of in compare(report, report).differences] == ["acc"]


def test_what_all_rows_share_is_said_once():
    report = report_of(task_of("10", "commonsense/piqa"), task_of("01", "commonsense/boolq"))
    table = compare(report, report).table()
    assert table.shared == ["tasks commonsense/", "shots 0", "items 2"]
    assert (table.left, table.num_keys) == ([0, 1], 2)
    assert [row[:2] for row in table.sections[0]] == [
        *(["piqa", "acc"], ["piqa", "acc_norm"]),
        *(["boolq", "acc"], ["boolq", "acc_norm"]),
    ]


def test_a_group_is_compared_over_the_items_of_its_tasks():
    def of(one, two):
        members = [task_of(one, "mmlu_a", shots=5), task_of(two, "mmlu_b", shots=5)]
        return report_of(*members, groups=(GroupResult.of_tasks("mmlu", members),))

    found = compare(of("1100", "11"), of("1111", "10")).differences
    group = next(of for of in found if of.task == "mmlu" and of.metric == "acc")
    assert (group.num_items, group.num_lost, group.num_gained, group.shots) == (6, 1, 2, 5)


def test_doubtful_tasks_are_flagged():
    second = TaskResult.of("piqa", graded([RIGHT, WRONG], is_truncated=True), metric="acc")
    found = compare(report_of(task_of("10")), report_of(second))
    assert found.differences[0].problems == ("2 truncated in the second run",)
    assert found.table().sections[0][0][0] == "piqa !"


def test_the_table_and_json_say_the_same():
    first, second = report_of(task_of("1111000010")), report_of(task_of("1111011111"), model="tuned", adapter="a")
    found = compare(first, second)
    table = found.table()
    row = dict(zip(table.headings, table.sections[0][0], strict=True))
    assert (row["first"], row["second"], row["points"], row["lost"], row["gained"]) == (
        "50.00",
        "90.00",
        "+40.00",
        "0",
        "4",
    )
    assert row["p"] == "0.125"
    values = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert values["second"] == "tuned with adapter a, float32"
    assert values["differences"][0]["difference"] == pytest.approx(0.4)
    assert values["differences"][0]["num_gained"] == 4


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_table_fits(monkeypatch, capsys, width):
    monkeypatch.setattr(tables, "line_width", lambda: width)
    report = report_of(task_of("10" * 700, "commonsense/ARC-Challenge"), task_of("10", "commonsense/piqa"))
    table = compare(report, report).table()
    tables.write_table(table.headings, table.sections, left=table.left, num_keys=table.num_keys)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width
