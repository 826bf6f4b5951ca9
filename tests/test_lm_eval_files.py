import hashlib
import json
import math
from datetime import datetime, timezone

import pytest

from conftest import graded
from mlx_openelm.evaluation.lm_eval_files import lm_eval_names, lm_eval_results, lm_eval_samples
from mlx_openelm.evaluation.report import EvaluationReport
from mlx_openelm.evaluation.results import GroupResult, TaskResult

TIME = datetime(2024, 3, 15, 12, 30, 0, 250)
ITEMS = graded([[-1.5, -2], [-2, -1]])


def report_of(*results, **more):
    return EvaluationReport("apple/OpenELM-270M", more.pop("adapter", None), "float32", "current", results, **more)


def task_of(name, items=ITEMS, metric="acc", **more):
    return TaskResult.of(name, items, metric=metric, version=2.0, **more)


def results_of(*results, **more):
    text = json.dumps(lm_eval_results(report_of(*results, **more), TIME, 12.5))
    return json.loads(text, parse_constant=pytest.fail)


def test_a_task_has_the_keys_of_lm_eval():
    values = results_of(task_of("piqa", shots=5, num_available=1838), limit=2)
    assert values["results"] == {
        "piqa": {
            "name": "piqa",
            "alias": "piqa",
            "sample_len": 2,
            "acc,none": 0.5,
            "acc_stderr,none": 0.5,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": 0.5,
        }
    }
    assert values["versions"] == {"piqa": 2.0}
    assert values["n-shot"] == {"piqa": 5}
    assert values["n-samples"] == {"piqa": {"original": 1838, "effective": 2}}
    assert values["higher_is_better"] == {"piqa": {"acc": True, "acc_norm": True}}
    assert values["configs"]["piqa"]["num_fewshot"] == 5
    assert values["config"]["model_args"] == "pretrained=apple/OpenELM-270M"
    assert values["config"]["limit"] == 2
    assert values["model_name_sanitized"] == "apple__OpenELM-270M"
    assert (values["date"], values["total_evaluation_time_seconds"]) == (TIME.timestamp(), "12.5")
    assert "groups" not in values


def test_metrics_have_the_names_and_directions_of_lm_eval():
    mc2 = task_of("truthfulqa_mc2", graded([[-1, -2]] * 2, metrics=["mc2"]), "mc2")
    crows = task_of("crows_pairs_english", graded([[-1, -2]] * 2, metrics=["pct_stereotype"]), "pct_stereotype")
    values = results_of(mc2, crows)
    assert values["results"]["truthfulqa_mc2"]["acc,none"] == pytest.approx(0.7310586)
    assert values["higher_is_better"]["crows_pairs_english"] == {"pct_stereotype": False}


def test_a_standard_error_of_one_item_is_not_available():
    assert results_of(task_of("piqa", ITEMS[:1]))["results"]["piqa"]["acc_stderr,none"] == "N/A"


def test_a_group_is_among_results_and_groups():
    members = [task_of("mmlu_a"), task_of("mmlu_b")]
    values = results_of(*members, groups=(GroupResult.of_tasks("mmlu", members),))
    assert values["groups"]["mmlu"] == values["results"]["mmlu"]
    assert values["groups"]["mmlu"]["sample_count"] == {"acc,none": 4, "acc_norm,none": 4}
    assert values["group_subtasks"] == {"mmlu": ["mmlu_a", "mmlu_b"]}
    assert list(values["n-samples"]) == ["mmlu_a", "mmlu_b"]


def test_names_of_files_can_be_taken_apart_as_lm_eval_does():
    report = report_of(task_of("arc_easy"), task_of("commonsense/piqa"))
    names = lm_eval_names(report, TIME)
    assert lm_eval_names(report, TIME.replace(tzinfo=timezone.utc)) == names
    assert names[""] == "apple__OpenELM-270M/results_2024-03-15T12-30-00.000250.json"
    assert names["arc_easy"] == "apple__OpenELM-270M/samples_arc_easy_2024-03-15T12-30-00.000250.jsonl"
    for label, task in (("arc_easy", "arc_easy"), ("commonsense/piqa", "commonsense__piqa")):
        file = names[label].split("/")[1]
        assert names[label].count("/") == 1
        assert file[file.find("_") + 1 : file.rfind("_")] == task


def test_a_sample_has_what_lm_eval_writes():
    first, second = map(json.loads, lm_eval_samples(ITEMS))
    assert first == {
        "doc_id": 0,
        "doc": {"choices": ["choice 0", "choice 1"], "gold": [0]},
        "target": "0",
        "arguments": {
            "gen_args_0": {"arg_0": "question 0:", "arg_1": " choice 0"},
            "gen_args_1": {"arg_0": "question 0:", "arg_1": " choice 1"},
        },
        "resps": [[["-1.5", "False"]], [["-2.0", "False"]]],
        "filtered_resps": [["-1.5", "False"], ["-2.0", "False"]],
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "doc_hash": first["doc_hash"],
        "prompt_hash": hashlib.sha256(b"question 0:").hexdigest(),
        "target_hash": hashlib.sha256(b"0").hexdigest(),
        "acc": 1.0,
        "acc_norm": 1.0,
    }
    assert second["acc"] == 0.0
    assert second["doc_hash"] == first["doc_hash"]  # of equal choices and gold


def test_samples_are_json_whatever_the_scores():
    for line in lm_eval_samples(graded([[-math.inf, math.nan]], [(0, 1)], metrics=["mc2"])):
        values = json.loads(line, parse_constant=pytest.fail)
        assert values["acc"] is None
        assert values["resps"][0] == [["-inf", "False"]]
        assert values["target"] == "[0, 1]"


def test_lm_eval_prints_our_results():
    utils = pytest.importorskip("lm_eval.utils")
    members = [task_of("mmlu_a"), task_of("mmlu_b", ITEMS[:1])]
    crows = task_of("crows_pairs_english", graded([[-1, -2]] * 2, metrics=["pct_stereotype"]), "pct_stereotype")
    values = results_of(*members, crows, groups=(GroupResult.of_tasks("mmlu", members),))
    table = utils.make_table(values)
    for text in ("mmlu_a", "|acc_norm", "0.5000", "pct_stereotype", "N/A"):
        assert text in table, text
    assert "mmlu" in utils.make_table(values, "groups")
    names = list(lm_eval_names(report_of(task_of("arc_easy")), TIME).values())
    assert utils.get_results_filenames(names) == names[:1]
    assert utils.get_sample_results_filenames(names) == names[1:]
    assert utils.get_file_task_name(names[1].split("/")[1]) == "arc_easy"
