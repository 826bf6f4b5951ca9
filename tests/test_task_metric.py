"""The accuracy on tasks as the metric of a run, from Python and on the command line."""

import json
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import pytest
from made_up_tasks import made_up
from test_task import written

from conftest import SMALL_CONFIG, launched, random_model, refused, run, write_folder
from mlx_openelm import TaskMetric, TuneRecipe, load
from mlx_openelm.errors import DataError, EvaluationError, TaskError
from mlx_openelm.evaluation.run import EvaluationOptions, evaluate

CONFIG = replace(SMALL_CONFIG, max_context_length=512)


def put(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("tasks")
    write_folder(place / "model", random_model(CONFIG), tokenizer)
    for name in ("arc_easy", "sciq", "mmlu_anatomy", "mmlu_virology"):
        put(place / "tasks" / name / "test.jsonl", made_up(name)["test"])
        put(place / "tasks" / name / "train.jsonl", list(made_up(name).values())[-1])
    put(place / "data.jsonl", [{"prompt": f"{n} and", "completion": f" {n + 1}."} for n in range(12)])
    (place / "story.txt").write_text("\n<|endoftext|>\n".join(f"The fox read {n} books." for n in range(40)))
    return place


def figures(metric, files, on_progress=lambda done, total: None):
    return metric.evaluate(*load(files / "model", dtype=mx.float32), mx.distributed.init(), on_progress)


def test_the_figures_are_those_of_an_evaluation_and_first_their_average(files):
    seen = []
    metric = TaskMetric(["arc_easy", "sciq"], data=files / "tasks", limit=30)
    found = figures(metric, files, lambda done, total: seen.append((done, total)))
    options = EvaluationOptions(files / "tasks", limit=30)
    report = evaluate(*load(files / "model", dtype=mx.float32), ["arc_easy", "sciq"], options)
    expected = {result.task: result.main.value for result in report.results}
    assert list(found) == ["average", "arc_easy", "sciq"]
    assert found == {"average": pytest.approx(sum(expected.values()) / 2), **expected}
    assert (metric.name, metric.num_items) == ("arc_easy, sciq", 60)
    assert (seen[0], seen[-1]) == ((0, 60), (60, 60))
    assert seen == sorted(seen)


def test_a_single_task_or_group_has_no_average(files):
    metric = TaskMetric("mmlu_anatomy,mmlu_virology", data=files / "tasks", shots=0, limit=5)
    assert metric.name == "mmlu"
    assert list(figures(metric, files)) == ["mmlu"]
    assert list(figures(TaskMetric("sciq", data=files / "tasks", limit=5), files)) == ["sciq"]


def test_the_fingerprint_is_that_of_the_questions_whatever_their_files(files, tmp_path):
    metric = TaskMetric("sciq", data=files / "tasks", limit=10)
    records = made_up("sciq")["test"]
    (tmp_path / "same" / "sciq").mkdir(parents=True)
    (tmp_path / "same" / "sciq" / "test.json").write_text(json.dumps(records, indent=1))
    assert TaskMetric("sciq", data=str(tmp_path / "same"), limit=10).fingerprint == metric.fingerprint
    put(tmp_path / "other" / "sciq" / "test.jsonl", [{**records[0], "correct_answer": "?"}, *records[1:]])
    others = [
        TaskMetric("sciq", data=tmp_path / "other", limit=10),
        TaskMetric("sciq", data=files / "tasks", limit=11),
        TaskMetric("sciq", data=files / "tasks", limit=10, shots=1),
    ]
    assert len({metric.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_prompts_that_do_not_fit_are_found_without_scoring(files, tokenizer):
    metric = TaskMetric("sciq", data=files / "tasks", limit=10)
    metric.check(random_model(CONFIG), tokenizer)
    with pytest.raises(EvaluationError, match=r"sciq with 0 shots: \d+ prompts exceed the model's context"):
        metric.check(random_model(replace(CONFIG, max_context_length=32)), tokenizer)


def test_what_cannot_be_evaluated_is_refused(files):
    with pytest.raises(TaskError, match="did you mean arc_easy"):
        TaskMetric("arc_eazy", data=files / "tasks")
    with pytest.raises(DataError, match="arc_challenge"):
        TaskMetric("arc_challenge", data=files / "tasks")
    with pytest.raises(TaskError, match="no tasks given"):
        TaskMetric([])


class TestCommand:
    def words(self, files, run, *more):
        words = ["tune", "-m", files / "model", "-d", files / "data.jsonl", "-o", run, "--rank", "2", "--steps", "4"]
        words += ["--dtype", "float32", "--log-every", "1", "--learning-rate", "0.02", "--validate-every", "2"]
        return [*words, "--evaluate-data", files / "tasks", "--evaluate-limit", "20", *more]

    def test_tune_keeps_the_most_accurate_adapter(self, files, tmp_path):
        status, out, err = run(*self.words(files, tmp_path / "run", "--evaluate", "arc_easy,sciq"))
        assert status == 0, err
        said = "evaluates 40 items of arc_easy, sciq with each validation; the best checkpoint is the most accurate"
        assert said in err
        assert "evaluating: 40 items\n" in err
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        found = {line["step"]: line["evaluation_average"] for line in lines if "evaluation_average" in line}
        assert list(found) == [0, 2, 4]
        best = 4 if found[4] > found[2] else 2
        assert f"adapter from step {best} with the best average: {found[best]:.4f}, {found[0]:.4f} before tuning" in out
        assert f"average {found[2]:.4f}, arc_easy" in err
        options = EvaluationOptions(files / "tasks", limit=20)
        kept = load(files / "model", adapter=tmp_path / "run", dtype=mx.float32)
        report = evaluate(*kept, ["arc_easy", "sciq"], options)
        assert report.averages()["average"].value == pytest.approx(found[best])
        self.continues(tmp_path / "run", found[best])

    def continues(self, folder, best):
        """The settings are those of the run; others are refused."""
        status, out, err = run("tune", "--resume", folder)
        assert (status, err) == (0, "")
        assert f"is finished: 4 steps; best average: {best:.4f}" in out
        status, out, _ = run("tune", "--resume", folder, "--steps", "5", "--json")
        assert (status, json.loads(out)["last"]["step"]) == (0, 5)
        assert list(json.loads(out)["evaluation"]) == ["average", "arc_easy", "sciq"]
        _, _, err = run("tune", "--resume", folder, "--steps", "6", "--evaluate", "sciq")
        assert "these settings changed: metric arc_easy, sciq -> sciq" in err.splitlines()[-1]

    def test_pretrain_keeps_the_most_accurate_model(self, files, tmp_path):
        (tmp_path / "model.json").write_text(json.dumps(CONFIG.to_dict()))
        words = ["pretrain", "--model", tmp_path / "model.json", "--data", files / "story.txt", "-o", tmp_path / "run"]
        words += ["--tokenizer", files / "model" / "tokenizer.model", "--sequence-length", "16", "--steps", "4"]
        words += ["--batch-size", "2", "--dtype", "float32", "--evaluate", "sciq", "--evaluate-data", files / "tasks"]
        status, out, err = run(*words, "--evaluate-limit", "10", "--evaluate-every", "2", "--validate-every", "4")
        assert status == 0, err
        assert "evaluates 10 items of sciq every 2 steps" in err
        assert "trained 4 steps on 128 tokens; best sciq: 0." in out
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        found = {line["step"]: line["evaluation_sciq"] for line in lines if "evaluation_sciq" in line}
        assert list(found) == [2, 4]
        assert f"to use the checkpoint of step {4 if found[4] > found[2] else 2}:" in out
        status, out, _ = run("info", tmp_path / "run")
        assert "; best sciq 0." in out

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--evaluate", "arc_eazy"], "unknown task 'arc_eazy'; did you mean arc_easy or "),
            (["--evaluate", "sciq", "--evaluate-data", "missing"], "missing"),
            ([], "evaluate_data is for the tasks to evaluate; name them with --evaluate"),
        ],
    )
    def test_mistakes_are_one_line_before_anything_is_loaded(self, files, tmp_path, more, said):
        assert said in refused(*self.words(files, tmp_path / "run", *more))
        assert not (tmp_path / "run").exists()

    def test_a_recipe_names_task_files_beside_it(self, files, tmp_path):
        (tmp_path / "recipe").mkdir()
        task = written(tmp_path / "recipe")
        put(tmp_path / "recipe" / "data" / "mine" / "test.jsonl", [])
        (tmp_path / "recipe" / "r.yaml").write_text(f"evaluate: [{task.name}, sciq]\nevaluate_data: data\n")
        recipe = TuneRecipe.from_file(tmp_path / "recipe" / "r.yaml")
        assert recipe.evaluate == (str(task), "sciq")
        assert recipe.evaluate_data == str(tmp_path / "recipe" / "data")

    @pytest.mark.slow
    def test_two_processes_evaluate_together(self, files, tmp_path):
        more = ["--evaluate", "sciq", "--steps", "1", "--json"]
        words = [*launched(2), sys.executable, "-m", "mlx_openelm", *self.words(files, tmp_path / "run", *more)]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr + done.stdout
        first, last = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        expected = figures(TaskMetric("sciq", data=files / "tasks", limit=20), files)  # a new adapter changes nothing
        assert first["evaluation_sciq"] == pytest.approx(expected["sciq"])
        assert f'"evaluation": {{\n    "sciq": {last["evaluation_sciq"]}' in done.stdout
