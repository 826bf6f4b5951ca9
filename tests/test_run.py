"""Evaluating tasks: results, what a folder keeps, and what is refused."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from conftest import SMALL_CONFIG, launched, random_model, refused, run, write_folder
from mlx_openelm import load
from mlx_openelm.errors import EvaluationError
from mlx_openelm.evaluation.result_files import read_report
from mlx_openelm.evaluation.run import EvaluationCallback, EvaluationOptions, evaluate, prepare
from mlx_openelm.evaluation.scorer import ScorerConfig

CONFIG = replace(SMALL_CONFIG, max_context_length=128)
WORDS = ("the", "fox", "river", "house", "cold", "stones", "water", "garden", "red", "morning")


def arc(count, seed=0):
    chance = random.Random(seed)
    say = lambda least, most: " ".join(chance.choice(WORDS) for _ in range(chance.randint(least, most)))  # noqa: E731
    return [
        {
            "question": say(3, 8) + "?",
            "choices": {"text": [say(1, 3) + str(n) for n in range(4)], "label": list("ABCD")},
            "answerKey": chance.choice("ABCD"),
        }
        for _ in range(count)
    ]


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A model, another one, and data of two tasks."""
    place = tmp_path_factory.mktemp("evaluate")
    write_folder(place / "model", random_model(CONFIG), tokenizer)
    write_folder(place / "other", random_model(CONFIG, seed=1), tokenizer)
    for name, seed in (("arc_easy", 0), ("arc_challenge", 1)):
        write_records(place / "data" / name / "test.jsonl", arc(30, seed))
        write_records(place / "data" / name / "train.jsonl", arc(9, seed + 2))
    return place


@pytest.fixture(scope="module")
def loaded(place):
    return load(place / "model")


def options(place, **changes):
    return EvaluationOptions(data=place / "data", **changes)


def values(report):
    return {of.task: (of.metrics, of.num_items, of.prompt_hash) for of in report.results}


def scores(report):
    return [score.log_likelihood for of in report.results for item in of.items for score in item.scores]


def test_every_item_of_every_task_is_scored(place, loaded):
    report = evaluate(*loaded, ["arc_easy", "arc_challenge"], options(place), name="tiny")
    assert [(of.task, of.num_items, of.num_available) for of in report.results] == [
        ("arc_easy", 30, 30),
        ("arc_challenge", 30, 30),
    ]
    assert set(report.results[0].metrics) == {"acc", "acc_norm"}
    right = sum(item.metrics["acc"] for item in report.results[0].items)
    assert report.results[0].metrics["acc"].value == right / 30


def test_a_limit_takes_the_first_items(place, loaded):
    whole = evaluate(*loaded, ["arc_easy"], options(place))
    part = evaluate(*loaded, ["arc_easy"], options(place, limit=7))
    assert part.results[0].num_available == 30
    assert [item.prompt_hash for item in part.results[0].items] == [
        item.prompt_hash for item in whole.results[0].items[:7]
    ]


@pytest.mark.parametrize("config", [ScorerConfig(share=False), ScorerConfig(memory_bytes=50_000)])
def test_the_way_of_scoring_changes_no_answer(place, loaded, config):
    plain = evaluate(*loaded, ["arc_easy"], options(place, shots=2))
    other = evaluate(*loaded, ["arc_easy"], options(place, shots=2, scorer=config))
    assert values(plain) == values(other)
    assert scores(plain) == pytest.approx(scores(other), abs=1e-4)


def test_progress_is_told(place, loaded):
    told = []

    class Teller(EvaluationCallback):
        def on_task(self, task, num_items):
            told.append((task, num_items))

        def on_items(self, num_items):
            told.append(num_items)

        def on_result(self, result):
            told.append(result.num_items)

    evaluate(*loaded, ["arc_easy"], options(place, limit=10), callback=Teller())
    assert told == [("arc_easy", 10), 4, 6, 10]


class TestFolder:
    def test_holds_everything_that_the_report_says(self, place, loaded, tmp_path):
        report = evaluate(*loaded, ["arc_easy"], options(place), output=tmp_path / "run", name="tiny")
        read = read_report(tmp_path / "run")
        assert values(read) == values(report)
        assert scores(read) == scores(report)
        names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
        assert {"scores.jsonl", "results.json", "results.csv", "table.md", "items/arc_easy.jsonl"} <= names
        (theirs,) = (tmp_path / "run" / "lm-eval").rglob("results_*.json")
        assert (
            json.loads(theirs.read_text())["results"]["arc_easy"]["acc,none"] == report.results[0].metrics["acc"].value
        )
        (samples,) = (tmp_path / "run" / "lm-eval").rglob("samples_arc_easy_*.jsonl")
        assert len(samples.read_text().splitlines()) == 30

    def test_known_scores_are_not_computed_again(self, place, loaded, tmp_path, monkeypatch):
        first = evaluate(*loaded, ["arc_easy"], options(place), output=tmp_path / "run")
        monkeypatch.setattr("mlx_openelm.evaluation.scorer.Scorer._compute", lambda *_: 1 / 0)
        again = evaluate(*loaded, ["arc_easy"], options(place), output=tmp_path / "run")
        assert values(again) == values(first)

    def test_other_tasks_join_the_report(self, place, loaded, tmp_path):
        evaluate(*loaded, ["arc_easy"], options(place), output=tmp_path / "run")
        report = evaluate(*loaded, ["arc_challenge"], options(place), output=tmp_path / "run")
        assert [of.task for of in report.results] == ["arc_easy", "arc_challenge"]
        assert [len(of.items) for of in read_report(tmp_path / "run").results] == [30, 30]

    def test_another_limit_begins_another_report_and_keeps_the_scores(self, place, loaded, tmp_path):
        evaluate(*loaded, ["arc_easy"], options(place), output=tmp_path / "run")
        report = evaluate(*loaded, ["arc_challenge"], options(place, limit=3), output=tmp_path / "run")
        assert [of.task for of in report.results] == ["arc_challenge"]

    def test_another_model_is_refused(self, place, loaded, tmp_path):
        evaluate(*loaded, ["arc_easy"], options(place, limit=2), output=tmp_path / "run")
        other = load(place / "other")
        with pytest.raises(EvaluationError, match="another model: its weights differ"):
            evaluate(*other, ["arc_easy"], options(place, limit=2), output=tmp_path / "run")

    @pytest.mark.parametrize("name", ["notes.txt", "config.json"])
    def test_a_folder_with_anything_else_is_left_alone(self, place, loaded, tmp_path, name):
        (tmp_path / name).write_text("mine")
        with pytest.raises(EvaluationError, match=f"not the folder of an evaluation, it contains {name}"):
            evaluate(*loaded, ["arc_easy"], options(place), output=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]


class TestLongPrompts:
    def test_are_counted(self, place, loaded):
        report = evaluate(*loaded, ["arc_easy"], options(place, shots=8, max_truncated=1.0))
        assert report.results[0].num_truncated > 0
        assert report.results[0].problems

    def test_too_many_are_refused_with_what_to_do(self, place, loaded):
        with pytest.raises(EvaluationError, match=r"arc_easy with 8 shots: \d+ prompts exceed .* more than 10% of all"):
            evaluate(*loaded, ["arc_easy"], options(place, shots=8, max_truncated=0.1))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(EvaluationError, match="max_truncated must be a share from 0 to 1"):
        EvaluationOptions(max_truncated=share)


def test_data_are_checked_before_anything_is_loaded(place):
    with pytest.raises(Exception, match="unknown task 'arc_eazy'; did you mean arc_easy"):
        prepare(["arc_eazy"], options(place))
    with pytest.raises(Exception, match="no data for task piqa"):
        prepare(["piqa"], options(place))
    with pytest.raises(Exception, match="examples of task arc_easy need at least 10"):
        prepare(["arc_easy"], options(place, shots=10))


class TestCommand:
    def arguments(self, place, *more):
        return ["evaluate", "-m", str(place / "model"), "--data", str(place / "data"), "--tasks", "arc_easy", *more]

    def test_json_is_alone_on_stdout_and_may_come_with_a_folder_and_a_picture(self, place, tmp_path):
        pytest.importorskip("matplotlib")
        more = "--json", "--output", tmp_path / "run", "--plot", tmp_path / "a.png"
        status, out, err = run(*self.arguments(place, *more))
        assert status == 0, err
        found = json.loads(out)["results"]["arc_easy"]
        assert {"acc", "acc_norm", "stderr", "num_items", "num_truncated"} <= set(found)
        assert json.loads((tmp_path / "run" / "results.json").read_text())["results"]["arc_easy"]["acc"] == found["acc"]
        assert (tmp_path / "a.png").stat().st_size > 1000

    def test_two_models_are_compared_item_by_item(self, place, loaded, tmp_path):
        evaluate(*loaded, ["arc_easy"], options(place), output=tmp_path / "first")
        other = ["evaluate", "-m", str(place / "other"), *self.arguments(place)[3:]]
        status, out, err = run(*other, "--compare", tmp_path / "first")
        assert status == 0, err
        assert "acc_norm" in out
        assert "McNemar" in out
        assert "arc_easy: 30 items" in err

    def test_mistakes_are_said_in_one_line(self, place):
        assert "not a finished evaluation" in refused(*self.arguments(place, "--compare", "nowhere"))
        assert "none" in refused(*self.arguments(place, "--tokenizer", "none"))


@pytest.mark.parametrize("changes", [{"max_length": 0}, {"max_length": -1}, {"memory_bytes": 0}])
def test_a_scorer_without_length_or_memory_is_refused(changes):
    with pytest.raises(EvaluationError, match=f"{next(iter(changes))} must be at least 1"):
        ScorerConfig(**changes)


@pytest.mark.slow  # killed at 20 moments, a minute
def test_a_killed_run_continues_to_the_same_table(place, tmp_path):
    command = [
        *(sys.executable, "-m", "mlx_openelm", "evaluate", "-m", str(place / "model"), "--data", str(place / "data")),
        *("--tasks", "arc_easy,arc_challenge", "--shots", "2", "--output"),
    ]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    seconds = time.monotonic() - start
    whole = read_report(tmp_path / "whole")
    known = 0
    for number in range(20):
        folder = tmp_path / f"run-{number}"
        process = subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds * (0.3 + 0.7 * number / 20))
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = (folder / "scores.jsonl").read_bytes().count(b"\n") if (folder / "scores.jsonl").exists() else 0
        known += lines > 1
        subprocess.run([*command, str(folder)], check=True, capture_output=True)
        again = read_report(folder)
        assert values(again) == values(whole)
        assert scores(again) == pytest.approx(scores(whole), abs=1e-4)
    assert known > 3


@pytest.mark.slow
def test_two_processes_give_what_one_gives(place, tmp_path):
    found = []
    for processes in (1, 2):
        words = ["evaluate", "-m", place / "model", "-t", "arc_easy,arc_challenge", "--data", place / "data", "--json"]
        command = [*launched(processes), sys.executable, "-m", "mlx_openelm", *words, "-o", tmp_path / f"{processes}"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=True)
        json.loads(done.stdout)  # of the first process alone
        found.append(read_report(tmp_path / f"{processes}"))
    one, two = found
    assert values(one) == values(two)
    assert scores(one) == pytest.approx(scores(two), abs=1e-4)
    assert {path.name for path in (tmp_path / "2").iterdir()} >= {"scores.jsonl", "scores-1.jsonl"}
