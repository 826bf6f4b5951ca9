"""Runs that choose their best checkpoint by a figure of the model instead of the validation loss."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_openelm
from conftest import SMALL_CONFIG, assert_close, heard, launched, random_model, write_folder
from mlx_openelm import CheckpointMetric, PretrainRecipe, TuneRecipe, load_model, pretrain, tune
from mlx_openelm.errors import ConfigError, DataError, EvaluationError, TrainingError
from mlx_openelm.runs import best_checkpoint, checkpoint_folders, newest_state

TOKENS = mx.array([[1, 20, 30, 40]])


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("metric")
    write_folder(place / "model", random_model(SMALL_CONFIG), tokenizer)
    records = [{"prompt": f"{number} and", "completion": f" {number + 1}."} for number in range(12)]
    (place / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (place / "story.txt").write_text("\n<|endoftext|>\n".join(f"The fox read {n} books." for n in range(40)))
    return place


@pytest.fixture(scope="module")
def recipe(files):
    return TuneRecipe(
        model=files / "model",
        data=files / "data.jsonl",
        validation=0.25,
        rank=2,
        steps=6,
        learning_rate=0.02,
        dropout=0.1,
        dtype="float32",
        log_every=1,
        validate_every=1,
        keep_checkpoints=1,
        validate_first=False,
    )


class Fixed(CheckpointMetric):
    """Figures that are known beforehand, one after the other."""

    def __init__(self, *figures, name="fixed", fingerprint=""):
        self.name, self.fingerprint = name, fingerprint
        self.figures = list(figures)

    def evaluate(self, model, tokenizer, group, on_progress):
        return {self.name: self.figures.pop(0)}


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_kept(run):
    return [int(folder.name[5:]) for folder in checkpoint_folders(run)]


def test_the_best_checkpoint_is_the_one_with_the_highest_figure(tmp_path, recipe, files):
    seen = []

    def score(model, tokenizer):
        seen.append((model.training, tokenizer.vocab_size, np.array(model(TOKENS))))
        return [0.1, 0.4, 0.9, 0.9, 0.8, 0.2][len(seen) - 1]

    result = tune(recipe, tmp_path / "run", evaluate=score)
    assert (result.step, result.evaluation, result.evaluation_before) == (3, {"score": 0.9}, None)
    assert ", score 0.9000" in repr(result)
    found = lines(tmp_path / "run")
    assert [line["evaluation_score"] for line in found] == [0.1, 0.4, 0.9, 0.9, 0.8, 0.2]
    losses = [line["validation_loss"] for line in found]
    assert losses[-1] == min(losses)  # by which the last checkpoint would be the best
    assert result.validation_loss == losses[2]
    assert steps_kept(tmp_path / "run") == [3, 6]
    assert [(training, size) for training, size, _ in seen] == [(False, 400)] * 6
    kept = load_model(files / "model", adapter=tmp_path / "run", dtype=mx.float32)
    assert_close(kept(TOKENS), seen[2][2], 1e-5)  # it was called with the parameters of that step
    last = load_model(files / "model", adapter=checkpoint_folders(tmp_path / "run")[-1], dtype=mx.float32)
    assert_close(last(TOKENS), seen[5][2], 1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_evaluating_changes_nothing_about_the_training(tmp_path, recipe, method):
    recipe = replace(recipe, method=method, steps=3)
    tune(recipe, tmp_path / "plain")
    tune(recipe, tmp_path / "evaluated", evaluate=lambda model, tokenizer: model(TOKENS).max().item())
    names = ("loss", "gradient_norm", "validation_loss")
    plain, evaluated = lines(tmp_path / "plain"), lines(tmp_path / "evaluated")
    assert [[line[name] for name in names] for line in plain] == [[line[name] for name in names] for line in evaluated]
    assert all("evaluation_metric" in line for line in evaluated)


def test_evaluations_have_an_interval_of_their_own_and_the_last_step_is_evaluated(tmp_path, recipe):
    recipe = replace(recipe, validate_every=2, evaluate_every=4, validate_first=True)
    progress = []

    class Slow(Fixed):
        def evaluate(self, model, tokenizer, group, on_progress):
            on_progress(3, 8)
            return {**super().evaluate(model, tokenizer, group, on_progress), "other": 7}

    metric, callback = Slow(0.1, 0.2, 0.15), heard(on_evaluating=lambda done, total: progress.append((done, total)))
    result = tune(recipe, tmp_path / "run", evaluate=metric, callback=callback)
    found = {line["step"]: line.get("evaluation_fixed") for line in lines(tmp_path / "run")}
    assert found == {0: 0.1, 1: None, 2: None, 3: None, 4: 0.2, 5: None, 6: 0.15}
    assert progress == [(3, 8)] * 3
    assert (result.step, result.evaluation) == (4, {"fixed": 0.2, "other": 7.0})
    assert result.evaluation_before == {"fixed": 0.1, "other": 7.0}


def test_a_run_stops_early_when_the_figure_no_longer_improves_even_without_validation(tmp_path, recipe):
    recipe = replace(recipe, validation="", early_stop=2)
    result = tune(recipe, tmp_path / "run", evaluate=Fixed(0.1, 0.3, 0.3, 0.2, 0.9))
    assert (result.stopped_early, result.step, result.metrics.step) == (True, 2, 4)
    assert result.validation_loss is None
    again = tune(recipe, tmp_path / "run", evaluate=Fixed(), resume=True)
    assert (again.stopped_early, again.metrics, again.evaluation) == (True, None, {"fixed": 0.3})
    with pytest.raises(DataError, match="early_stop needs validation examples"):
        tune(recipe, tmp_path / "other")


def test_a_resumed_run_keeps_the_best_so_far(tmp_path, recipe):
    tune(replace(recipe, steps=4), tmp_path / "run", evaluate=Fixed(0.1, 0.8, 0.3, 0.4))
    result = tune(recipe, tmp_path / "run", evaluate=Fixed(0.5, 0.6), resume=True)
    assert (result.step, result.evaluation) == (2, {"fixed": 0.8})
    result = tune(replace(recipe, steps=7), tmp_path / "run", evaluate=Fixed(0.9), resume=True)
    assert result.step == 7
    assert steps_kept(tmp_path / "run") == [7]


def test_an_evaluation_that_was_interrupted_is_made_again(tmp_path, recipe):
    figures = [0.1, KeyboardInterrupt(), 0.5, 0.2, 0.3, 0.4, 0.45]

    def score(model, tokenizer):
        if isinstance(figure := figures.pop(0), KeyboardInterrupt):
            raise figure
        return figure

    recipe = replace(recipe, early_stop=9)
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, tmp_path / "run", evaluate=score)
    result = tune(recipe, tmp_path / "run", evaluate=score, resume=True)
    assert [line["evaluation_score"] for line in lines(tmp_path / "run")] == [0.1, 0.5, 0.2, 0.3, 0.4, 0.45]
    assert (result.step, newest_state(tmp_path / "run")["worse"]) == (2, 4)


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        (Fixed(name="other"), "metric fixed -> other"),
        (None, "metric fixed -> validation loss"),
        (Fixed(fingerprint="2"), "the items or the data of the metric fixed"),
    ],
)
@pytest.mark.parametrize("steps", [2, 3])
def test_another_metric_cannot_continue_a_run(tmp_path, recipe, evaluate, said, steps):
    tune(replace(recipe, steps=2), tmp_path / "run", evaluate=Fixed(1, 2, fingerprint="1"))
    with pytest.raises(TrainingError, match=said):
        tune(replace(recipe, steps=steps), tmp_path / "run", evaluate=evaluate, resume=True)


def test_a_metric_cannot_continue_a_run_without_one(tmp_path, recipe):
    tune(replace(recipe, steps=1), tmp_path / "run")
    with pytest.raises(TrainingError, match="metric validation loss -> fixed"):
        tune(recipe, tmp_path / "run", evaluate=Fixed(), resume=True)


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), 1e39])
def test_a_figure_that_is_not_finite_does_not_count(tmp_path, recipe, figure):
    messages = []
    metric = Fixed(0.1, figure, 0.05)
    result = tune(replace(recipe, steps=3), tmp_path / "run", evaluate=metric, callback=heard(messages))
    assert (result.step, result.evaluation) == (1, {"fixed": 0.1})
    assert messages == ["fixed is not finite at step 2; it does not count"]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("found", [None, "much", {}, {1: 0.5}, {"a": None}, [0.5]])
def test_what_is_no_figure_stops_the_run_and_keeps_what_was_trained(tmp_path, recipe, found):
    def score(model, tokenizer):
        return found

    with pytest.raises(TrainingError, match="score must return a number, or numbers by name; got "):
        tune(recipe, tmp_path / "run", evaluate=score)
    assert steps_kept(tmp_path / "run") == [1]


def test_a_model_that_cannot_be_evaluated_is_refused_before_the_first_step(tmp_path, recipe):
    class Strict(Fixed):
        def check(self, model, tokenizer):
            raise EvaluationError(f"a context of {model.config.max_context_length} is too short")

    steps = []
    with pytest.raises(EvaluationError, match="a context of 64 is too short"):
        tune(recipe, tmp_path / "run", evaluate=Strict(), callback=heard(on_step=steps.append))
    assert (steps, steps_kept(tmp_path / "run")) == ([], [])
    tune(replace(recipe, steps=1), tmp_path / "run", evaluate=Fixed(1))


def test_a_recipe_with_tasks_needs_their_metric(tmp_path, recipe):
    with pytest.raises(ConfigError, match=r"also pass evaluate=TaskMetric\(\['arc_easy', 'piqa'\]\)"):
        tune(replace(recipe, evaluate="arc_easy, piqa"), tmp_path / "run")


def test_a_pretrained_model_is_chosen_by_the_figure_too(files, tmp_path):
    recipe = PretrainRecipe(
        model=SMALL_CONFIG,
        data=str(files / "story.txt"),
        tokenizer=str(files / "model" / "tokenizer.model"),
        sequence_length=16,
        steps=3,
        batch_size=2,
        warmup_steps=0,
        dtype="float32",
        validate_every=1,
    )
    result = pretrain(recipe, tmp_path / "run", evaluate=Fixed(0.2, 0.7, 0.6))
    assert (result.step, result.evaluation) == (2, {"fixed": 0.7})
    assert best_checkpoint(tmp_path / "run") == result.checkpoint
    with pytest.raises(TrainingError, match="metric fixed -> other"):
        pretrain(replace(recipe, steps=4), tmp_path / "run", evaluate=Fixed(name="other"), resume=True)
    result = pretrain(replace(recipe, steps=4), tmp_path / "run", evaluate=Fixed(0.65), resume=True)
    assert (result.step, result.evaluation) == (2, {"fixed": 0.7})


def test_the_figures_of_the_first_process_count_to_the_bit(tmp_path):
    (tmp_path / "ask.py").write_text(
        "import mlx.core as mx\n"
        "from mlx_openelm.training.checkpoint_metric import as_metric, figures_of\n"
        "group = mx.distributed.init()\n"
        "metric = as_metric(lambda model, tokenizer: {'a': 1 / 3 + group.rank(), 'b': float('nan'), 'c': -0.1})\n"
        "open(f'found-{group.rank()}', 'w').write(repr(figures_of(metric, None, None, group, print)))\n"
    )
    words = [*launched(2), sys.executable, str(tmp_path / "ask.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path(mlx_openelm.__file__).parents[1])}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = repr({"a": 1 / 3, "b": float("nan"), "c": -0.1})
    assert [(tmp_path / f"found-{rank}").read_text() for rank in range(2)] == [expected] * 2
