import csv
import io
import json
import math
from dataclasses import replace

import pytest

from conftest import graded
from mlx_openelm.commands import tables
from mlx_openelm.errors import EvaluationError
from mlx_openelm.evaluation.report import EvaluationReport
from mlx_openelm.evaluation.results import GroupResult, TaskResult

MACHINE = {"chip": "a chip", "versions": {"mlx": "1"}, "commit": None}
ZERO_SHOT = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "sciq", "winogrande")


def right(number, of, **more):
    """Items of which the first `number` are right."""
    return graded([[-1, -2] if place < number else [-2, -1] for place in range(of)], **more)


def task_of(name, number=3, of=4, metric="acc", shots=0, **more):
    return TaskResult.of(name, right(number, of), metric=metric, shots=shots, version="1.0", **more)


def report_of(*results, model="apple/OpenELM-270M", **more):
    return EvaluationReport(model, more.pop("adapter", None), "float32", "current", results, machine=MACHINE, **more)


def columns_of(report):
    table = report.table()
    return {row[0]: dict(zip(table.headings, row, strict=True)) for section in table.sections for row in section}


def test_a_task_stands_beside_its_published_figure():
    row = columns_of(report_of(task_of("sciq", 850, 1000), task_of("piqa", 1282, 1838, "acc_norm")))["sciq"]
    assert row["ours"] == "85.00"
    assert row["published"] == "84.70"
    assert row["points above"] == "+0.30"
    assert row["items above"] == "+3"
    assert row["standard error"] == "1.13"
    assert row["majority"] == "100.00"
    assert row["items"] == "1,000"
    assert len(row["prompts"]) == 8


def test_no_items_are_compared_where_not_all_were_scored():
    report = report_of(task_of("sciq", 85, 100), task_of("boolq", 1, 2), limit=100)
    assert "items above" not in report.table().headings
    assert columns_of(report)["sciq"]["points above"] == "+0.30"
    assert any("sciq 100 of 1,000, boolq 2 of 3,270" in note for note in report.table().notes)


def test_the_nearer_of_two_metrics_is_marked_and_the_main_one_is_compared():
    items = graded([[-1, -2], [-2, -1]] * 500)
    mixed = [replace(item, metrics={"acc": 1.0, "acc_norm": item.metrics["acc_norm"]}) for item in items]
    report = report_of(TaskResult.of("sciq", mixed, metric="acc_norm"), task_of("boolq"))
    row = columns_of(report)["sciq"]
    assert (row["acc"], row["acc_norm"]) == ("100.00~", "50.00")
    assert row["points above"] == "-34.70"
    assert report.to_dict()["results"]["sciq"]["nearer_metric"] == "acc"
    assert any(note.startswith("~ the nearer") for note in report.table().notes)
    assert not any(note.startswith("~") for note in report_of(task_of("boolq")).table().notes)


def test_tasks_that_are_asked_in_other_words_today_are_named():
    race = TaskResult.of("race", right(1, 2), metric="acc", version="3")
    note = "race: asked as lm-eval asks today; the protocol `paper` asks as was published"
    assert note in report_of(race).table().notes
    assert note not in report_of(replace(race, protocol="paper", version="2")).table().notes
    assert note not in report_of(race, model="openelm-tiny").table().notes


def test_marks_keep_a_column_in_line():
    one = TaskResult.of("piqa", graded([[-1, -2]]), metric="acc_norm")  # equal: the likelier metric is the nearer one
    other = TaskResult.of("boolq", graded([[-1, -2]]), metric="acc")
    third = TaskResult.of("race", graded([[-1, -2]], metrics=["acc"]), metric="acc")
    rows = columns_of(report_of(one, other, third))
    assert [rows[name]["acc_norm"] for name in ("piqa", "boolq", "race")] == ["100.00~", "100.00 ", ""]


def test_other_models_have_no_published_figures():
    report = report_of(task_of("piqa", metric="acc_norm"), task_of("sciq"), model="openelm-tiny")
    assert "published" not in report.table().headings
    assert report.published_averages() == {}
    assert not any(note.startswith("published") for note in report.table().notes)


def test_doubtful_tasks_and_averages_of_them_are_flagged():
    truncated = TaskResult.of("race", right(1, 2, is_truncated=True), metric="acc")
    report = report_of(truncated, task_of("sciq", num_failed=2))
    table = report.table()
    assert [row[0] for row in table.sections[0]] == ["race !", "sciq !"]
    assert table.sections[1][0][0] == "average !"
    assert columns_of(report)["race !"]["truncated"] == "2"
    assert columns_of(report)["sciq !"]["failed"] == "2"
    assert table.notes[:3] == ["! race: 2 truncated", "! sciq: 2 failed", "! average: includes race, sciq"]
    assert "no item was truncated, not finite or failed" in report_of(task_of("sciq")).table().notes


def test_suites_have_the_papers_average():
    report = report_of(*map(task_of, ZERO_SHOT))
    assert report.averages()["zero-shot average"].value == 0.75
    row = columns_of(report)["zero-shot average"]
    assert (row["ours"], row["published"], row["points above"]) == ("75.00", "54.37", "+20.63")
    assert list(report_of(*report.results[:6]).averages()) == ["average"]  # a part of the suite
    assert report_of(report.results[0]).averages() == {}


def test_what_all_tasks_share_is_said_once():
    table = report_of(task_of("commonsense/piqa"), task_of("commonsense/boolq"), adapter="a").table()
    assert table.shared == ["tasks commonsense/", "shots 0", "metric acc", "version 1.0"]
    assert [row[0] for row in table.sections[0]] == ["piqa", "boolq"]
    assert report_of(task_of("piqa")).table().shared == []
    alone = report_of(task_of("commonsense/piqa")).table()
    assert (alone.shared, alone.sections[0][0][0]) == ([], "commonsense/piqa")
    assert "shots" in report_of(task_of("piqa"), task_of("sciq", shots=5)).table().headings


def test_the_same_task_with_other_shots_is_another_row():
    report = report_of(task_of("piqa"), task_of("piqa", 1, 4, shots=5))
    assert report.table().num_keys == 2
    assert list(report.to_dict()["results"]) == ["piqa@0", "piqa@5"]
    assert EvaluationReport.from_json(report.to_json()).by_label().keys() == report.by_label().keys()


def test_a_group_stands_for_its_tasks():
    members = [task_of("mmlu_a", 1, 2, shots=5), task_of("mmlu_b", 4, 4, shots=5)]
    report = report_of(task_of("arc_easy"), *members, task_of("sciq"), groups=(GroupResult.of_tasks("mmlu", members),))
    assert [row[0] for row in report.table().sections[0]] == ["arc_easy", "mmlu", "sciq"]
    assert columns_of(report)["mmlu"]["published"] == "25.72"
    assert report.to_dict()["groups"]["mmlu"]["members"] == ["mmlu_a", "mmlu_b"]
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [line["task"] for line in lines] == ["arc_easy", "mmlu_a", "mmlu_b", "sciq", "mmlu"]
    assert float(lines[4]["acc"]) == pytest.approx(5 / 6)


def test_rounded_scores_have_columns_of_their_own():
    items = right(1, 2)
    both = [replace(item, metrics={"acc": 1.0, "acc_bf16": item.metrics["acc"]}) for item in items]
    row = columns_of(report_of(TaskResult.of("boolq", both, metric="acc")))["boolq"]
    assert (row["ours"], row["ours, bf16"]) == ("100.00", "50.00")


@pytest.mark.parametrize("width", [None, 40, 60, 80, 120])
def test_the_table_fits(monkeypatch, capsys, width):
    monkeypatch.setattr(tables, "line_width", lambda: width)
    commonsense = ("boolq", "social_i_qa", "ARC-Challenge")
    report = report_of(*(task_of(f"commonsense/{name}", of=1000) for name in commonsense), adapter="a")
    table = report.table()
    tables.write_table(table.headings, table.sections, left=table.left, num_keys=table.num_keys)
    lines = capsys.readouterr().out.splitlines()
    assert width is None or max(map(len, lines)) <= width
    assert sum("ARC-Challenge" in line for line in lines) == {None: 1, 40: 3, 60: 2, 80: 2, 120: 1}[width]


def test_json_says_it_all():
    report = report_of(
        task_of("piqa", metric="acc_norm", data={"path": "piqa/test.jsonl", "sha256": "0f"}),
        task_of("truthfulqa", of=0, number=0, num_failed=3),
        adapter="folder/adapter",
        limit=4,
        settings={"bos": True},
    )
    values = json.loads(report.to_json(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    piqa = values["results"]["piqa"]
    assert (piqa["acc"], piqa["acc_norm"], piqa["stderr"], piqa["num_items"]) == (0.75, 0.75, 0.25, 4)
    assert values["results"]["truthfulqa"]["acc"] is None
    again = EvaluationReport.from_json(report.to_json())
    assert math.isnan(again.results[1].main.value)
    assert again.results[0] == replace(report.results[0], items=())
    assert again.to_json() == report.to_json()
    assert again.with_items({"piqa": report.results[0].items}).results[0] == report.results[0]


def test_an_average_of_what_is_no_number_is_null():
    items = graded([[-1, math.nan], [-1, -2]], metrics=["mc2"])
    report = report_of(TaskResult.of("truthfulqa_mc2", items, metric="mc2"), task_of("piqa"))
    values = json.loads(report.to_json(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert (values["averages"]["average"]["value"], values["averages"]["average"]["stderr"]) == (None, None)
    assert columns_of(report)["average !"]["ours"] == "not a number"


def test_a_group_with_other_shots_is_another_row():
    members = [task_of("mmlu_a", 1, 2, shots=shots) for shots in (0, 5)]
    groups = tuple(GroupResult.of_tasks("mmlu", [member]) for member in members)
    report = report_of(*members, groups=groups)
    assert [(row.task, row.shots) for row in report.shown()] == [("mmlu", 0), ("mmlu", 5)]
    assert list(report.to_dict()["groups"]) == ["mmlu@0", "mmlu@5"]
    assert len(EvaluationReport.from_json(report.to_json()).groups) == 2


def test_mc2_is_also_called_acc():
    items = graded([[-1, -2]] * 2, metrics=["mc2"])
    values = report_of(TaskResult.of("truthfulqa_mc2", items, metric="mc2")).to_dict()["results"]["truthfulqa_mc2"]
    assert values["acc"] == values["mc2"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda values: values.pop("model"), "model is missing"),
        (lambda values: values["results"]["piqa"].update(shots=-1), "shots must be a number from 0"),
        (lambda values: values["results"]["piqa"].update(metric="f1"), "f1 is missing"),
        (lambda values: values["results"].update(piqa=3), "piqa must be an object"),
    ],
)
def test_a_damaged_report_is_refused(damage, message):
    values = report_of(task_of("piqa")).to_dict()
    damage(values)
    with pytest.raises(EvaluationError, match=message):
        EvaluationReport.from_json(json.dumps(values), "run/results.json")


def test_markdown_is_the_table_with_its_notes():
    text = report_of(task_of("arc_easy", metric="acc_norm"), task_of("sciq")).to_markdown()
    lines = text.splitlines()
    assert lines[0] == "shots 0, version 1.0"
    assert lines[2].startswith("| task | metric | ours | published |")
    assert lines[3].startswith("| --- | --- | ---: |")
    assert lines[4].startswith("| arc_easy | acc_norm | 75.00 | 45.08 |")
    assert "* no item was truncated, not finite or failed" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_a_report_prints_its_results():
    assert repr(report_of(task_of("piqa"))) == ("EvaluationReport('apple/OpenELM-270M',\n  piqa, 0 shots: acc 75.00\n)")
