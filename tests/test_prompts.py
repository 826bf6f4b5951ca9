"""Prompts are lm-eval's and CoreNet's to the character: compared with hashes that their own code made."""

import hashlib
import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from made_up_tasks import CASES, COMMONSENSE, made_up, made_up_commonsense
from test_task import written

from conftest import GOLDEN
from mlx_openelm.errors import DataError, TaskError
from mlx_openelm.evaluation.prompts import check_records, items, prompt_hash
from mlx_openelm.evaluation.suites import find_tasks, suites
from mlx_openelm.evaluation.task_data import DataOrigin, Records, TaskData, read_task_data
from mlx_openelm.tokenizer import sandbox
from mlx_openelm.tokenizer.example_format import instruction_prompt

PROTOCOLS = {"current": "lm_eval_0.4.13.json", "paper": "lm_eval_0.4.2.json"}


def golden(name):
    return json.loads((GOLDEN / "evaluation" / name).read_text(encoding="utf-8"))


def write(folder, splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, records in splits.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made-up data of every task."""
    place = tmp_path_factory.mktemp("tasks")
    for name in dict(CASES):
        write(place / name, made_up(name))
    for name in COMMONSENSE:
        write(place / "commonsense" / name, {"test": made_up_commonsense(name)})
    return place


def prepared(folder, name, shots=None):
    (task,) = find_tasks([name])
    return (task if shots is None else task.with_shots(shots)), read_task_data(task, folder)


def hash_of(item):
    content = [[list(request) for request in item.requests], list(item.choices), item.gold[0]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("name", "shots"), CASES)
def test_prompts_are_those_of_lm_eval(folder, name, shots, protocol):
    expected = golden(PROTOCOLS[protocol])
    task, data = prepared(folder, name, shots)
    assert task.under(protocol).version == expected["versions"][name]
    found = [hash_of(item) for item in items(task, data, protocol=protocol)]
    assert found == expected["hashes"][f"{name} {shots}"].split()


def test_every_task_of_the_suites_is_compared_with_its_number_of_examples():
    compared = {(name.replace("mmlu_high_school_us_history", "mmlu"), shots) for name, shots in CASES}
    for suite in ("zero-shot", "openllm", "llm360"):
        assert set(suites()[suite].items()) <= compared


@pytest.mark.parametrize("subject", [task.name for task in find_tasks(["mmlu"])])
def test_the_heading_of_a_subject_has_blanks_and_in_the_paper_one_newline(subject):
    (task,) = find_tasks([subject])
    record = made_up("mmlu_world_religions")["test"][0]
    data = in_memory([{**record}])
    heading = f"questions (with answers) about {subject.removeprefix('mmlu_').replace('_', ' ')}."
    for protocol, newlines in (("current", "\n\n"), ("paper", "\n")):
        (item,) = items(task, data, protocol=protocol)
        assert item.requests[0].context.startswith(f"The following are multiple choice {heading}{newlines}")
        question = item.requests[0].context.partition(heading + newlines)[2]
        assert question.startswith(record["question"].strip())
        assert question.endswith("\nAnswer:")


class TestCommonsense:
    @pytest.mark.parametrize("name", COMMONSENSE)
    def test_prompts_and_candidates_are_those_of_corenet(self, folder, name):
        task, data = prepared(folder, f"commonsense/{name}")
        assert [hash_of(item) for item in items(task, data)] == golden("corenet.json")["hashes"][name].split()

    def test_an_example_in_full(self):
        example = golden("corenet.json")["example"]
        (task,) = find_tasks(["commonsense/ARC-Easy"])
        task = replace(task, num_choices=(2, 5))
        (item,) = items(task, in_memory([example["record"]]))
        assert [list(request) for request in item.requests] == example["requests"]
        assert item.choices[item.gold[0]] == example["record"]["output"]

    def test_the_prompt_is_the_one_that_tuning_uses(self, folder):
        task, data = prepared(folder, "commonsense/piqa")
        item = next(items(task, data))
        assert item.requests[0].context == instruction_prompt(data.test.rows[0]["instruction"], indent=16) + " " * 16

    def test_what_offers_no_answers_is_an_error(self):
        (task,) = find_tasks(["commonsense/piqa"])
        record = {"instruction": "Say something.\nAnswer format: anything", "input": "", "answer": "x"}
        with pytest.raises(
            DataError, match=r"test\.jsonl, record 1: choices cannot be computed: its last line offers no"
        ):
            next(items(task, in_memory([record])))


def in_memory(test, examples=None):
    """Data of a task without files."""

    def records(rows, name):
        return Records(Path(name), rows, DataOrigin(Path(name), "", len(rows)))

    return TaskData(records(test, "test.jsonl"), lambda: records(examples, "train.jsonl"))


def test_items_come_one_by_one(monkeypatch, folder):
    (task,) = find_tasks(["arc_easy"])
    first = made_up("arc_easy")["test"][0]
    endless = in_memory([first, *({"question": None} for _ in range(5))])
    assert next(items(task, endless)).index == 0  # the broken records after it are not looked at
    with pytest.raises(DataError, match="record 2"):
        check_records(task, endless)
    check_records(task, endless, limit=1)


def test_a_limit_takes_the_first_with_the_same_examples(folder):
    task, data = prepared(folder, "hellaswag", 10)
    assert list(items(task, data, limit=7)) == list(islice(items(task, data), 7))
    assert list(items(task.with_shots(0), data, shots=10, limit=7)) == list(items(task, data, limit=7))


def test_the_hash_covers_contexts_and_continuations(folder):
    task, data = prepared(folder, "arc_easy")
    found = list(items(task, data))
    assert prompt_hash(found) == prompt_hash(items(task, data))
    assert len({prompt_hash(found), prompt_hash(found[:-1]), prompt_hash(items(task, data, shots=1))}) == 3
    moved = [
        replace(item, requests=tuple((r.context + " ", r.continuation[1:]) for r in item.requests)) for item in found
    ]
    assert prompt_hash(moved) != prompt_hash(found)


def test_an_empty_choice_is_scored_as_a_blank_as_the_harness_does():
    (task,) = find_tasks(["piqa"])
    (item,) = items(task, in_memory([{"goal": "G", "sol1": "", "sol2": "S", "label": 1}]))
    assert [request.continuation for request in item.requests] == [" ", " S"]


def test_the_number_of_examples_of_a_task_with_its_own_is_fixed(folder):
    task, data = prepared(folder, "truthfulqa_mc2")
    assert task.with_shots(5).shots == 0
    assert list(items(task, data, shots=5, limit=3)) == list(items(task, data, limit=3))


def test_all_true_answers_count_and_in_the_paper_those_before_the_first_false_one():
    (task,) = find_tasks(["truthfulqa_mc2"])
    targets = {"choices": ["a", "b", "c", "d"], "labels": [1, 0, 1, 0]}
    data = in_memory([{"question": "?", "mc2_targets": targets}])
    assert [next(items(task, data, protocol=protocol)).gold for protocol in PROTOCOLS] == [(0, 2), (0,)]


def test_a_question_is_never_among_its_examples_today_and_was_left_out_of_them_in_the_paper():
    (task,) = find_tasks(["hellaswag"])
    rows = [
        {"activity_label": word, "ctx_a": word, "ctx_b": "", "endings": list("abcd"), "label": 0}
        for word in ("one", "two", "three")
    ]
    data = in_memory(rows[:1], rows * 3)

    def num_examples(protocol):
        context = next(items(task, data, shots=5, protocol=protocol)).requests[0].context
        assert context.count("one: one") == 1
        return context.count("\n\n")

    assert num_examples("current") == 5 > num_examples("paper")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"shots": -1}, TaskError, "shots must be from 0 to 1,000; got -1"),
        ({"shots": 60}, DataError, r"train\.jsonl has 60 records; 60 examples of task hellaswag need at least 61"),
        ({"limit": 0}, TaskError, "limit must be at least 1; got 0"),
        ({"protocol": "old"}, TaskError, r"unknown protocol 'old' \(choose from current, paper\)"),
    ],
)
def test_arguments_are_checked_before_the_first_item(folder, arguments, error, said):
    task, data = prepared(folder, "hellaswag")
    with pytest.raises(error, match=said):
        items(task, data, **arguments)


ARC = {"question": "Q", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"}
TWO = {"text": ["a", "b"], "label": ["1", "2"]}
UNEQUAL = {"text": ["a", "b", "c"], "label": ["1", "2"]}
BOOLQ = {"passage": "P", "question": "Q", "label": 1}
RACE = {"article": "A", "problems": [{"question": "Q", "answer": "A"}]}
WINOGRANDE = {"sentence": "The _ sat.", "option1": "cat", "option2": "hat", "answer": "1"}


def targets(labels):
    return {"question": "Q", "mc2_targets": {"choices": ["a", "b"], "labels": labels}}


@pytest.mark.parametrize(
    ("name", "record", "said"),
    [
        ("arc_easy", {**ARC, "answerKey": "B"}, r"the right answer 'B' is not among the labels \['1', '2', '3'\]"),
        ("arc_easy", {**ARC, "answerKey": ""}, "has no right answer: answerKey is ''$"),
        ("arc_easy", {**ARC, "choices": TWO}, "2 choices; task arc_easy declares 3 to 5"),
        ("arc_easy", {**ARC, "choices": UNEQUAL}, "3 choices, but 2 labels"),
        ("crows_pairs_english", {"sent_more": "", "sent_less": "S"}, "a choice is empty"),
        ("boolq", {**BOOLQ, "label": -1}, "has no right answer: label is -1; the published .* split validation"),
        ("boolq", {**BOOLQ, "label": 2}, "the right answer must be from 0 to 1; got 2"),
        ("winogrande", {**WINOGRANDE, "sentence": "No blank."}, "choices cannot be computed: substring not found"),
        ("winogrande", {**WINOGRANDE, "answer": ""}, "has no right answer"),
        ("truthfulqa_mc2", targets([1]), "2 choices need a 0 or 1"),
        ("truthfulqa_mc2", targets([0, 0]), "no right answer"),
        ("race", RACE, "choices cannot be computed: 'dict object'"),
    ],
)  # fmt: skip
def test_a_record_that_does_not_fit_is_named(name, record, said):
    (task,) = find_tasks([name])
    with pytest.raises(DataError, match=said) as caught:
        list(items(task, in_memory([record])))
    assert str(caught.value).startswith("test.jsonl, record 1")
    assert "\n" not in str(caught.value)


class TestTemplates:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"prompt": "{{ question"}, "prompt is not valid: unexpected end of template"),
            ({"description": "{% for %}"}, "description is not valid"),
            ({"choices": "answers |"}, "choices is not valid"),
            ({"choices": "answers | nothing"}, "choices is not valid: No filter named 'nothing'"),
            ({"gold": "(" * 5000}, "gold is not valid"),
        ],
    )
    def test_what_is_not_valid_is_named_with_the_file_before_the_first_item(self, tmp_path, changes, said):
        (task,) = find_tasks([str(written(tmp_path, **changes))])
        with pytest.raises(TaskError, match=re.escape(said)) as caught:
            items(task, in_memory([MINE]))
        assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}: ")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"prompt": "{{ qestion }}"}, "prompt cannot be computed: 'qestion' is undefined"),
            ({"choices": "anwers"}, "choices cannot be computed: 'anwers' is undefined"),
            ({"choices": "question"}, "choices must be a list; got 'Q'"),
            ({"choices": "[answers, 'b']"}, "a choice must be text"),
            ({"gold": "answers"}, "the right answer must be from 0 to 1"),
            ({"gold": "question"}, "the right answer 'Q' is not among the choices"),
            ({"prompt": "{{ ''.__class__.__mro__ }}"}, "unsafe"),
            ({"choices": "['x' * 999999999, 'y']"}, "too large"),
            ({"gold": "range(9 ** 9)"}, "too large"),
            ({"labels": ["A", "B", "C"], "gold": "'A'"}, "2 choices, but 3 labels"),
        ],
    )
    def test_what_does_not_fit_the_records_is_named_with_the_record(self, tmp_path, changes, said):
        (task,) = find_tasks([str(written(tmp_path, **changes))])
        with pytest.raises(DataError, match=re.escape(said)) as caught:
            list(items(task, in_memory([MINE])))
        assert str(caught.value).startswith("test.jsonl, record 1")

    def test_an_expression_that_takes_too_long_ends(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sandbox, "_LONGEST_SECONDS", 0.1)
        loops = "{% for a in s %}{% for b in s %}{% for c in s %}{% endfor %}{% endfor %}{% endfor %}"
        (task,) = find_tasks([str(written(tmp_path, prompt="{% set s = 'x' * 3000 %}" + loops))])
        with pytest.raises(DataError, match="takes longer than"):
            list(items(task, in_memory([MINE])))

    def test_newlines_at_the_end_of_a_template_are_kept_and_its_blocks_leave_theirs(self, tmp_path):
        prompt = "{% if true %}\n  {{ question }}\n{% endif %}\n\n"
        (task,) = find_tasks([str(written(tmp_path, prompt=prompt, description="D\n"))])
        assert next(items(task, in_memory([MINE]))).requests[0].context == "D\n\n  Q\n\n\n"

    def test_a_field_may_have_any_name(self, tmp_path):
        names = ("range", "topic", "choice", "context", "values", "loop", "class")
        record = {**MINE, **{name: f"<{name}>" for name in (*names, "self", "not a name", "")}}
        prompt = "{% if true %}" + "".join(f"{{{{ {name} }}}}" for name in names) + "{% endif %}"
        for more in ({}, {"prompt": prompt.replace("{% if true %}", "").replace("{% endif %}", "")}):
            (task,) = find_tasks([str(written(tmp_path, **{"prompt": prompt, **more}))])
            (item,) = items(task, in_memory([record]))
            assert item.requests[0].context == "".join(f"<{name}>" for name in names)

    def test_an_answer_may_be_more_than_its_choice(self, tmp_path):
        (task,) = find_tasks([str(written(tmp_path, continuation="It is {{ choice | upper }} ({{ question }})"))])
        item = next(items(task, in_memory([MINE])))
        assert item.choices == ("It is A (Q)", "It is B (Q)")
        assert [request.continuation for request in item.requests] == [" It is A (Q)", " It is B (Q)"]


MINE = {"question": "Q", "answers": ["a", "b"], "right": 1}
