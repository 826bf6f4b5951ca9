"""Tasks as files, and the names that lead to them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from mlx_openelm.errors import TaskError
from mlx_openelm.evaluation import task as task_module
from mlx_openelm.evaluation.prompts import items
from mlx_openelm.evaluation.suites import find_tasks, suites, task_names
from mlx_openelm.evaluation.task import Task, read_tasks
from mlx_openelm.evaluation.task_data import read_task_data

FOLDER = Path(task_module.__file__).parent.parent / "assets" / "tasks"
MINE = {
    "name": "mine",
    "version": "1",
    "fields": {"question": "text", "answers": "texts", "right": "label"},
    "prompt": "{{ question }}",
    "choices": "answers",
    "gold": "right",
}


def written(folder, file="mine.yaml", **changes):
    """A task file of `MINE` with changes; `...` leaves a field out."""
    values = {key: value for key, value in {**MINE, **changes}.items() if value is not ...}
    path = folder / file
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def test_suites_have_the_shots_of_the_papers_tables():
    def table(name):
        return {task.name: task.shots for task in find_tasks([name])}

    zero = {"arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "sciq", "winogrande"}
    assert table("zero-shot") == dict.fromkeys(sorted(zero), 0)
    openllm = table("openllm")
    mmlu = {name: openllm.pop(name) for name in list(openllm) if name.startswith("mmlu_")}
    assert openllm == {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "winogrande": 5}
    assert len(mmlu) == 57
    assert set(mmlu.values()) == {5}
    more = {"crows_pairs_english": 25, "piqa": 0, "race": 0}
    assert table("llm360") == {**openllm, **mmlu, **more}
    assert len(table("commonsense")) == 8


def test_the_numbers_of_records_are_those_of_the_published_sets():
    assert sum(task.source.documents for task in find_tasks(["mmlu"])) == 14_042
    assert {task.name: task.source.documents for task in find_tasks(["zero-shot"])} == {
        "arc_challenge": 1172,
        "arc_easy": 2376,
        "boolq": 3270,
        "hellaswag": 10_042,
        "piqa": 1838,
        "sciq": 1000,
        "winogrande": 1267,
    }


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["arc_easy"], ["arc_easy"]),
        (["piqa"], ["piqa"]),
        ("piqa,boolq", ["piqa", "boolq"]),
        (["commonsense/piqa"], ["commonsense/piqa"]),
        (["openbookqa"], ["commonsense/openbookqa"]),
        (["ARC-Easy, boolq", "piqa"], ["commonsense/ARC-Easy", "boolq", "piqa"]),
        (["mmlu_college_[bc]*y"], ["mmlu_college_biology", "mmlu_college_chemistry"]),
        (["piqa", "piqa,zero-shot"], ["piqa", "arc_challenge", "arc_easy", "boolq", "hellaswag", "sciq", "winogrande"]),
    ],
)  # fmt: skip
def test_names_lead_to_tasks(names, found):
    assert [task.name for task in find_tasks(names)] == found


def test_a_task_of_two_suites_with_different_shots_occurs_twice():
    both = [task.shots for task in find_tasks(["zero-shot", "openllm"]) if task.name == "arc_challenge"]
    assert both == [0, 25]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("arc-easy", "did you mean arc_easy or commonsense/ARC-Easy?"),
        ("PIQA", "did you mean piqa or commonsense/piqa?"),
        ("hela_swag", "did you mean hellaswag or commonsense/hellaswag?"),
        ("siqa", "did you mean commonsense/social_i_qa?"),
        ("mmlu_anatomi", "did you mean mmlu_anatomy"),
        ("truthfulqa", "did you mean truthfulqa_mc2?"),
        ("llm-360", "did you mean llm360?"),
        ("xyz", "suites: zero-shot, openllm, llm360, commonsense; a task file ends in .yaml"),
        ("nothing*", "no task matches 'nothing*'"),
        ("gone.yaml", "gone.yaml does not exist"),
        (" , ", "no tasks given"),
    ],
)
def test_an_unknown_name_is_an_error_with_similar_ones(name, said):
    with pytest.raises(TaskError) as caught:
        find_tasks([name])
    assert said in str(caught.value)


def test_every_name_is_found_and_every_file_explains_itself():
    for name in task_names():
        assert find_tasks([name])
    for path in FOLDER.glob("*.yaml"):
        if path.stem != "suites":
            assert all(task.version and task.source.licence and task.source.documents for task in read_tasks(path))
    assert {name for suite in suites().values() for name in suite} <= set(task_names())


def test_downloads_are_bound_to_a_commit():
    """But for the one repository whose commit is not known: its first download is recorded."""
    unbound = {task.name for name in task_names() for task in find_tasks([name]) if not task.source.revision}
    assert {name for name in unbound if not name.startswith("commonsense/")} == {"crows_pairs_english"}


class TestFile:
    def test_a_users_file_is_a_task(self, tmp_path):
        path = written(tmp_path, shots={"default": 2, "sampler": "first_n"}, metrics=["acc", "acc_norm"])
        (task,) = find_tasks([str(path)])
        assert (task.name, task.shots, task.metrics, task.version) == ("mine", 2, ("acc", "acc_norm"), "1")
        assert task.examples.sampler == "first_n"
        assert task.path == path
        assert [task.shots for task in find_tasks([f"{path}, piqa"])] == [2, 0]

    def test_a_path_may_have_a_comma(self, tmp_path):
        assert find_tasks([str(written(tmp_path, "a,b.yaml"))])[0].name == "mine"

    def test_variants_change_fields(self, tmp_path):
        variants = {"one_more": {"documents": 3}, "two": {"choices": ["x", "y", "z"], "metrics": ["acc_norm"]}}
        first, second = read_tasks(
            written(tmp_path, name="mine/{variant}", variants=variants, documents=9, group="mine")
        )
        assert (first.name, first.topic, first.source.documents) == ("mine/one_more", "one more", 3)
        assert (second.name, second.source.documents, second.choices) == ("mine/two", 9, ("x", "y", "z"))
        assert (first.num_choices, second.num_choices) == ((2, 1000), (3, 3))
        assert second.metrics == ("acc_norm",)

    def test_the_papers_protocol_changes_fields(self, tmp_path):
        (task,) = read_tasks(written(tmp_path, paper={"version": "0", "prompt": "Q: {{ question }}"}))
        assert task.under("current") == task
        paper = task.under("paper")
        assert (paper.version, paper.prompt) == ("0", "Q: {{ question }}")
        assert dataclasses.replace(paper, version=task.version, prompt=task.prompt) == task

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"promt": "x"}, r"mine\.yaml: unknown field: promt \(did you mean prompt\?\)"),
            ({"shots": {"splitt": "dev"}}, r"shots: unknown field: splitt \(did you mean split\?\)"),
            ({"data": {"revison": "x"}}, r"data: unknown field: revison \(did you mean revision\?\)"),
            ({"paper": {"metrics": ["acc"]}}, r"paper: unknown field: metrics \(choose from version,"),
            ({"version": ...}, "version is missing"),
            ({"name": "../up"}, "name must be of letters, digits, _, -, . and /; got '../up'"),
            ({"name": "a b"}, "name must be of letters"),
            ({"name": "x" * 101}, "name must be of letters"),
            ({"sha256": {"test": "12"}}, "sha256: test must have 64 hexadecimal digits; got '12'"),
            ({"version": 1}, "version must be text; got 1"),
            ({"gold": ...}, "gold is missing"),
            ({"choices": ...}, "choices is missing"),
            ({"choices": [1, 2]}, "choices must be a list of str"),
            ({"kind": "generate"}, "unknown kind 'generate'"),
            ({"kind": "partial"}, "ending is missing"),
            ({"kind": "partial", "ending": "x"}, "the choices are the prompts"),
            ({"ending": "x"}, "ending belongs to kind partial"),
            (
                {"metrics": ["f1"]},
                r"unknown metric for kind multiple_choice: f1 \(choose from acc, acc_norm, acc_bytes\)",
            ),
            ({"metrics": []}, "metrics must name at least one"),
            ({"kind": "stereotype", "metrics": ["acc"]}, "choose from pct_stereotype, likelihood_diff"),
            ({"num_choices": [5, 3]}, "num_choices must be a number, or the least and the largest"),
            ({"num_choices": 0}, "num_choices must be a number from 1"),
            ({"fields": {"question": "string"}}, r"unknown question 'string' \(choose from text, texts"),
            ({"gold": "{{ right }}"}, "gold is an expression, so it is written without braces"),
            ({"shots": {"sampler": "balanced"}}, "unknown sampler 'balanced'"),
            ({"variants": {"a": {}}}, r"must contain \{variant\}"),
            ({"name": "{variant}", "variants": {"a": {"name": "b"}}}, "unknown field: name"),
        ],
    )
    def test_mistakes_are_one_line_with_the_file(self, tmp_path, changes, said):
        path = written(tmp_path, **changes)
        with pytest.raises(TaskError, match=said) as caught:
            find_tasks([str(path)])
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_a_task_can_be_compared_and_copied():
    (task,) = find_tasks(["piqa"])
    assert isinstance(task, Task)
    assert task.with_shots(3).with_shots(0) == task
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.shots = 3


def test_the_example_in_the_documentation_asks_what_it_says(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "capitals.yaml").write_text(block, encoding="utf-8")
    records = [json.loads(record) for record in re.findall(r'`(\{"country".*?\})`', text)]
    others = [{"country": name, "cities": ["A", "B"], "right": 0} for name in ("X", "Y")]
    for name, rows in (("capitals", records), ("examples", others)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (task,) = find_tasks([str(tmp_path / "capitals.yaml")])
    (item,) = items(task, read_task_data(task))
    assert item.requests[0].context.count("Question:") == 3
    assert item.requests[0].context.endswith("What is the capital of Japan?\nAnswer:")
    assert [request.continuation for request in item.requests] == [" Kyoto", " Tokyo"]
    described = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE))))
    assert set(task_module._FIELDS) <= described
