import json
import math

import pytest

from conftest import graded
from mlx_openelm.errors import EvaluationError
from mlx_openelm.evaluation.items import ItemResult
from mlx_openelm.evaluation.report import EvaluationReport
from mlx_openelm.evaluation.requests import Score
from mlx_openelm.evaluation.result_files import (
    item_file_name,
    item_lines,
    read_items,
    read_report,
    report_files,
)
from mlx_openelm.evaluation.results import ItemRecord, TaskResult


def records(*likelihoods, **more):
    return tuple(map(ItemRecord.of, graded(likelihoods, **more)))


def test_items_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "items.jsonl"
    items = records([-1.25, -2], [-3, -4], metrics=["acc", "mc2"])
    path.write_text("".join(item_lines(items)))
    assert read_items(path) == items
    assert read_items(str(path)) == items
    assert "question" not in path.read_text()


def test_rounded_scores_are_kept(tmp_path):
    (first,) = graded([[-1, -2]])
    result = ItemResult(first.item, (Score(-1.0, True, True, -1.5), Score(-2.0, False, False, -2.5)), first.metrics)
    (tmp_path / "items.jsonl").write_text("".join(item_lines([ItemRecord.of(result)])))
    assert read_items(tmp_path / "items.jsonl") == (ItemRecord.of(result),)


def test_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(item_lines(records([-math.inf, math.nan], metrics=["mc2"]))))
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["log_likelihoods"] == [None, None]
    (item,) = read_items(path)
    assert not item.is_finite
    assert math.isnan(item.metrics["mc2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("gold"), "line 1: gold is missing"),
        (lambda values: values.update(log_likelihoods="x"), "log_likelihoods must be a list of numbers"),
        (lambda values: values.update(log_likelihoods=[True, False]), "log_likelihoods must be a list of numbers"),
        (lambda values: values.update(is_greedy=[True]), "line 1: its lists differ in length"),
        (lambda values: values.update(index=-1), "index must be a number from 0"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    path = tmp_path / "items.jsonl"
    (line,) = item_lines(records([-1, -2]))
    values = json.loads(line)
    change(values)
    path.write_text(json.dumps(values) + "\n")
    with pytest.raises(EvaluationError, match=message):
        read_items(path)


def test_an_item_that_occurs_twice_is_refused(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(2 * next(item_lines(records([-1, -2]))))
    with pytest.raises(EvaluationError, match="item 0 occurs twice"):
        read_items(path)


def test_names_of_files_have_no_folders():
    assert item_file_name("commonsense/piqa") == "commonsense__piqa.jsonl"
    assert item_file_name("hellaswag@10") == "hellaswag@10.jsonl"
    assert "/" not in item_file_name("../x")


def report_of(*names):
    results = [TaskResult.of(name, graded([[-1, -2], [-2, -1]]), metric="acc", version="1") for name in names]
    return EvaluationReport("openelm-tiny", None, "float32", "current", tuple(results))


def write(report, folder):
    for name, content in report_files(report):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = report_of("piqa", "commonsense/piqa")
    write(report, tmp_path)
    assert read_report(tmp_path) == report
    assert read_report(str(tmp_path)).results[1].items == report.results[1].items


def test_a_report_may_lack_items_but_not_some_of_them(tmp_path):
    write(report_of("piqa", "sciq"), tmp_path)
    (tmp_path / "items" / "sciq.jsonl").unlink()
    assert [len(result.items) for result in read_report(tmp_path).results] == [2, 0]
    (line, _) = (tmp_path / "items" / "piqa.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "items" / "piqa.jsonl").write_text(line)
    with pytest.raises(EvaluationError, match=r"piqa\.jsonl has 1 items; expected 2"):
        read_report(tmp_path)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match=r"is not a finished evaluation: results\.json is missing"):
        read_report(tmp_path)
