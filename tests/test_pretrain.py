import json
import math
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from conftest import heard, killed_at, launched, run
from mlx_openelm import TrainingResult, load
from mlx_openelm.commands import progress
from mlx_openelm.errors import ConfigError, OutputError, TrainingError
from mlx_openelm.files.fields import Fields
from mlx_openelm.machine.device import memory_limit_bytes
from mlx_openelm.runs import checkpoint_folders
from mlx_openelm.training import loop, trainer as trainer_module
from mlx_openelm.training.checkpoints import load_checkpoint
from mlx_openelm.training.optimizer import Update
from mlx_openelm.training.pretrain import initial_parameters, pretraining_steps
from mlx_openelm.training.pretrain_recipe import PretrainRecipe


def test_fresh_weights_follow_corenets_rule(recipe):
    config = recipe.model
    parameters = initial_parameters(recipe)
    for name, p in parameters.items():
        if p.ndim == 1:
            assert mx.all(p == 1).item()
            continue
        expected = p.shape[1] ** -0.5
        if name.endswith(("out_proj.weight", "proj_2.weight")):
            expected = (2 * config.num_transformer_layers * config.model_dim) ** -0.5
        assert np.array(p).std() == pytest.approx(expected, rel=0.1), name
    assert not mx.array_equal(parameters["transformer.token_embeddings.weight"][0], mx.zeros(32))
    again, other = initial_parameters(recipe), initial_parameters(replace(recipe, seed=1))
    name = "transformer.layers.0.ffn.proj_1.weight"
    assert mx.array_equal(again[name], parameters[name])
    assert not mx.array_equal(other[name], parameters[name])


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"], line["validation_loss"]) for line in lines]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, recipe, corpus, tokenizer):
    run = tmp_path_factory.mktemp("whole") / "run"
    list(pretraining_steps(recipe, corpus, tokenizer, run))
    return run


def test_a_run_learns_and_leaves_models(whole_run, recipe):
    found = losses(whole_run)
    assert found[-1][1] < found[0][1] - 0.5
    assert [step for step, *_ in found] == list(range(1, 13))
    assert [step for step, _, _, held_out in found if held_out is not None] == [6, 12]
    names = [path.name for path in checkpoint_folders(whole_run)]
    assert names == ["step-00000006", "step-00000009", "step-00000012"]
    model, text = load(whole_run / "checkpoints" / names[-1])
    assert text.vocab_size == 400
    assert mx.all(mx.isfinite(model(mx.array([[1, 2, 3]])))).item()


def test_mlx_keeps_few_freed_buffers_and_wires_the_weights_during_a_run(
    tmp_path, recipe, corpus, tokenizer, monkeypatch
):
    wired = []

    @contextmanager
    def wiring():
        wired.append(True)
        try:
            yield
        finally:
            wired.append(False)

    def limit():
        found = mx.set_cache_limit(0)
        mx.set_cache_limit(found)
        return found

    monkeypatch.setattr(loop, "wired_memory", wiring)
    before = mx.set_cache_limit(1 << 40)
    try:
        steps = pretraining_steps(recipe, corpus, tokenizer, tmp_path / "run")
        next(steps)
        assert limit() == memory_limit_bytes() // 4
        assert wired == [True]
        steps.close()
        assert limit() == 1 << 40
        assert wired == [True, False]
    finally:
        mx.set_cache_limit(before)


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(tmp_path, whole_run, recipe, corpus, tokenizer, stop):
    steps = pretraining_steps(recipe, corpus, tokenizer, tmp_path / "run")
    for _ in range(stop):
        next(steps)
    steps.close()
    list(pretraining_steps(recipe, corpus, tokenizer, tmp_path / "run", resume=True))
    assert losses(tmp_path / "run") == losses(whole_run)


@pytest.mark.parametrize("step", [1, 7, 12])
def test_a_run_that_was_interrupted_during_an_update_goes_on_bit_for_bit(
    tmp_path, whole_run, recipe, corpus, tokenizer, monkeypatch, step
):
    finish, left = Update.finish, [step]

    def interrupted(update):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return finish(update)

    monkeypatch.setattr(Update, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(pretraining_steps(recipe, corpus, tokenizer, tmp_path / "run"))
    assert checkpoint_folders(tmp_path / "run")[-1].name == f"step-{step:08}"
    list(pretraining_steps(recipe, corpus, tokenizer, tmp_path / "run", resume=True))
    assert losses(tmp_path / "run") == losses(whole_run)


def test_a_run_that_lost_its_last_checkpoint_goes_on_bit_for_bit(tmp_path, whole_run, recipe, corpus, tokenizer):
    shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    damaged = tmp_path / "run" / "checkpoints" / "step-00000009" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    said = []
    list(pretraining_steps(recipe, corpus, tokenizer, tmp_path / "run", resume=True, callback=heard(said)))
    assert "step-00000009 is damaged" in said[0]
    assert losses(tmp_path / "run") == losses(whole_run)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"learning_rate": 0.02}, "learning_rate 0.01 -> 0.02"), ({"seed": 5}, "seed 0 -> 5")],
)
def test_another_recipe_cannot_go_on(whole_run, recipe, corpus, tokenizer, change, named):
    with pytest.raises(TrainingError, match=named):
        next(pretraining_steps(replace(recipe, **change), corpus, tokenizer, whole_run, resume=True))


def test_another_corpus_cannot_go_on(whole_run, recipe, corpus, tokenizer):
    with pytest.raises(TrainingError, match="the model, the data"):
        next(pretraining_steps(recipe, replace(corpus, fingerprint="other"), tokenizer, whole_run, resume=True))


def test_a_run_is_not_overwritten(whole_run, recipe, corpus, tokenizer):
    with pytest.raises(TrainingError, match="resume"):
        next(pretraining_steps(recipe, corpus, tokenizer, whole_run))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, recipe, corpus, tokenizer, monkeypatch):
    steps = pretraining_steps(recipe, corpus, tokenizer, tmp_path / "run")
    for _ in range(4):
        next(steps)
    monkeypatch.setattr(trainer_module, "learning_rate", lambda recipe, step: math.inf)
    with pytest.raises(TrainingError, match="not finite at step"):
        list(steps)
    folders = checkpoint_folders(tmp_path / "run")
    assert all(mx.all(mx.isfinite(a)).item() for f in folders for a in mx.load(str(f / "model.safetensors")).values())


@pytest.mark.parametrize("where", ["checkpoint", "metrics"])
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    tmp_path, recipe, corpus, tokenizer, monkeypatch, where
):
    steps = pretraining_steps(recipe, corpus, tokenizer, tmp_path / "run")
    for _ in range(4):
        next(steps)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    if where == "checkpoint":
        monkeypatch.setattr(mx, "save_safetensors", full)
    else:
        (tmp_path / "run" / "metrics.jsonl").unlink()
        (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"(step-00000006|metrics\.jsonl) cannot be written"):
        list(steps)
    monkeypatch.undo()
    folders = checkpoint_folders(tmp_path / "run")
    assert "step-00000003" in [folder.name for folder in folders]
    load_checkpoint(folders[-1])
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_samples_are_written_at_each_validation(tmp_path, whole_run, recipe, corpus, tokenizer):
    recipe = replace(recipe, sample_prompt="The fox")
    found = list(pretraining_steps(recipe, corpus, tokenizer, tmp_path / "run"))
    samples = [metrics.sample for metrics in found]
    assert all(sample.startswith("The fox") for sample in (samples[5], samples[11]))
    assert [step for step, sample in enumerate(samples, start=1) if sample] == [6, 12]
    assert losses(tmp_path / "run") == losses(whole_run)


def test_a_sequence_longer_than_the_context_is_refused(recipe):
    config = recipe.model
    with pytest.raises(ConfigError, match="at most 32, the model's context length; got 33"):
        PretrainRecipe(model=config, sequence_length=33)


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path):
        documents = [f"The fox number {n} went to the river {'and slept ' * (n % 5)}." for n in range(300)]
        (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents))
        (tmp_path / "recipe.yaml").write_text(
            "model: {num_transformer_layers: 2, model_dim: 32, head_dim: 8, num_gqa_groups: 2, ffn_dim_divisor: 16,\n"
            "        vocab_size: 300, max_context_length: 32}\n"
            "data: [{path: a.txt}]\ntrain_tokenizer: 300\nsteps: 50\nbatch_size: 4\nsequence_length: 16\n"
            "learning_rate: 1e-2\nwarmup_steps: 4\ndtype: float32\nlog_every: 1\n"
            "validate_every: 20\ncheckpoint_every: 5\n"
        )
        return tmp_path

    def command(self, files, run, *more, processes=1):
        words = [sys.executable, "-m", "mlx_openelm", "pretrain", "--config", files / "recipe.yaml", "-o", run, *more]
        return [str(word) for word in (*launched(processes), *words)]

    def train(self, files, run, *more, **options):
        return subprocess.run(self.command(files, run, *more, **options), capture_output=True, text=True, timeout=120)

    @pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_a_run_killed_at_any_step_goes_on_bit_for_bit(self, files, processes):
        assert self.train(files, files / "whole", processes=processes).returncode == 0
        expected = losses(files / "whole")
        shutil.copytree(files / "whole" / "corpus", files / "killed" / "corpus")
        shutil.copy(files / "whole" / "tokenizer.model", files / "killed")
        rng = random.Random(processes)
        stops = set()
        for _ in range(5):
            last = rng.randrange(7) + (max(stops) if stops else 0)  # a step that it gets to before it is killed
            stops.add(self.kill_at(files, files / "killed", min(last, 38), processes))
        more = ["--resume"] if checkpoint_folders(files / "killed") else []
        done = self.train(files, files / "killed", *more, processes=processes)
        assert done.returncode == 0, done.stderr
        assert losses(files / "killed") == expected
        assert len(stops) > 1

    def kill_at(self, files, run, step, processes):
        more = ["--resume"] if checkpoint_folders(run) else []
        return killed_at(self.command(files, run, *more, processes=processes), step)

    @pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
    def test_an_interrupt_saves_what_was_done(self, files, end):
        process = subprocess.Popen(
            self.command(files, files / "run", "--steps", "100000", "--checkpoint-every", "100000"),
            stderr=subprocess.PIPE,
            text=True,
        )
        said = ""
        while "step 3 of" not in said:
            said += process.stderr.readline()
        process.send_signal(end)
        said += process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert f"to continue: openelm-mlx pretrain --resume {files / 'run'}" in said.splitlines()[-1]
        (folder,) = checkpoint_folders(files / "run")
        assert int(folder.name.split("-")[1]) >= 3

    @pytest.mark.slow
    def test_two_processes_make_the_same_run(self, files):
        assert self.train(files, files / "one").returncode == 0
        done = self.train(files, files / "two", processes=2)
        assert done.returncode == 0, done.stderr
        one, two = losses(files / "one"), losses(files / "two")
        assert [step for step, *_ in two] == [step for step, *_ in one]
        assert [loss for _, loss, _, _ in two] == pytest.approx([loss for _, loss, _, _ in one], rel=1e-5)

    def test_a_batch_that_the_processes_cannot_share_is_one_line(self, files):
        done = self.train(files, files / "run", "--batch-size", "3", processes=2)
        assert "error: a batch of 3 rows cannot be split over 2 processes" in done.stderr + done.stdout
        assert "Traceback" not in done.stderr + done.stdout

    def test_fields_can_be_given(self, files):
        assert self.train(files, files / "run", "--steps", "3", "--batch-size=2").returncode == 0
        assert len(losses(files / "run")) == 3

    def test_a_first_run_needs_no_recipe_and_its_folder_is_all_that_others_need(self, files, monkeypatch):
        (files / "texts").mkdir()
        (files / "texts" / "a.txt").write_bytes((files / "a.txt").read_bytes())
        shape = ["--layers", 2, "--model-dim", 32, "--head-dim", 8, "--gqa", 2, "--vocab", 300, "--context", 32]
        monkeypatch.chdir(files)
        found = run("design", *shape, "--save", "toy.json")[1]
        line = 'openelm-mlx pretrain --model toy.json --data "TEXTS/*.txt" --output run'
        assert found.splitlines()[-1] == f"train it: {line}, with your texts in place of TEXTS"
        words = shlex.split(line.replace("TEXTS", "texts"))[1:]
        status, out, err = run(*words, "--steps", 4, "--dry-run")
        assert (status, out, (files / "run").exists()) == (0, "", False)
        assert "63,552 parameters, 2 layers, vocabulary 300" in err
        often = ("--validate-every", 1, "--checkpoint-every", 1)
        status, out, err = run(*words, "--steps", 4, "--batch-size", 4, *often)
        assert status == 0, err
        assert "training a tokenizer with 300 tokens" in err
        assert "4 of 4 rows of 32 tokens: 512 tokens" in err
        assert out.splitlines()[0].startswith("run: trained 4 steps on 512 tokens; best validation loss: ")
        assert '  openelm-mlx generate --model run --prompt "Once upon a time"' in out
        assert re.search(r"trained +4 of 4 steps", run("info", "run")[1])
        assert run("generate", "-m", "run", "-p", "The fox", "-n", 3)[0] == 0
        status, out, err = run("average", "run", "--output", "mean")
        assert (status, "averaging step-00000002, step-00000003, step-00000004" in err) == (0, True)
        monkeypatch.chdir(files / "texts")  # the run knows where its data is
        status, out, err = run("pretrain", "--resume", "../run")
        assert (status, err) == (0, "")
        assert out.startswith("../run is finished: 4 steps; best validation loss: ")
        assert "train it further: openelm-mlx pretrain --resume ../run --steps 8" in out
        status, out, err = run("pretrain", "--resume", "../run", "--steps", 6)
        assert status == 0, err
        assert "continuing after step 4 of 6" in err
        assert [step for step, *_ in losses(files / "run")] == [1, 2, 3, 4, 5, 6]
        status, out, err = run("pretrain", "--resume", "../run", "--learning-rate", 0.5)
        assert (status, out) == (2, "")
        assert "these settings changed: learning_rate 0.003 -> 0.5" in err

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--data", "x", "-o", "run"], "which model? use --model with a file of `openelm-mlx design --save`"),
            (["--model", "270M", "--data", "x"], "give the folder to write with --output"),
            (["--model", "270M", "-o", "run"], "no data given; set --data, for example to stories/*.txt"),
            (["--model", "270M", "-o", "run", "-d", "x/*.txt"], "x/*.txt matches no file: there is no folder x"),
            (["run", "--model", "270M"], "unexpected argument run; use --output run for a new run"),
            (["--resume"], "which run? use --resume RUN"),
            (["--resume", "missing"], "missing does not exist"),
            (["--resume", "one", "--output", "two"], "--resume one writes to one; leave out --output two"),
            (["--model", "270M", "--data-folder", "x", "-o", "run"], "--data-folder x is for the paths of a recipe"),
        ],
    )
    def test_what_is_missing_is_one_line(self, words, said, tmp_path, monkeypatch, capsys):
        from mlx_openelm.commands import app

        monkeypatch.chdir(tmp_path)
        assert app.run(["pretrain", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        assert not (tmp_path / "run" / "tokenizer.model").exists()

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--steps", "-1"], "steps must not be negative; got -1"),
            (["--frobs", "3"], "No such option: --frobs"),
            (["--learning-rate"], "Option '--learning-rate' requires an argument"),
            (["--sequence-length", "64"], "at most 32, the model's context length; got 64"),
            (["--data", "missing.txt"], "missing.txt does not exist"),
            (["--min-characters", "100000"], "no text left after the filters"),
            (["--train-tokenizer", "100000"], "at most 300, the model's vocabulary; got 100000"),
            (["--resume"], "no checkpoint to resume from|does not exist"),
        ],
    )
    def test_mistakes_are_one_line(self, files, more, said):
        done = self.train(files, files / "run", *more)
        assert done.returncode == 2, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("openelm-mlx: error: ")
        assert re.search(said, last), last


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": [{"path": 5}]}, "data: path must be text; got 5"),
        ({"data": [{"path": ["x" * 10**5]}]}, "data: path must be text; got"),
        ({"data": [{"path": "x", "weight": "a"}]}, "data: weight must be a number"),
        ({"data": [{"path": "x", "last": 10**9}]}, "last must be a number from 0 to 1,000,000"),
        ({"data": [{"text_key": "x"}]}, "is not a source"),
        ({"model": {"model_dim": 8, "head_dim": 4}}, "missing settings: num_transformer_layers"),
        ({"model": {"model_dim": "8", "head_dim": 4, "num_transformer_layers": 2}}, "model_dim must be of type int"),
        ({"model": {"model_dim": 8, "head_dim": 4, "num_transformer_layers": 10**9}}, "must be at most 10,000"),
    ],
)
def test_tables_of_a_recipe_are_read_with_their_types(recipe, change, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        PretrainRecipe.from_dict({**recipe.to_dict(), **change})
    assert len(str(raised.value)) < 300


def test_ctrl_c_says_what_is_saved_and_how_to_continue(tmp_path, capsys):
    for step in (10, 1012):
        (tmp_path / "my run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    with pytest.raises(SystemExit, match="130"), progress.resumable("pretrain", tmp_path / "my run"):
        raise KeyboardInterrupt
    run = tmp_path / "my run"
    said = f"interrupted; step 1,012 is saved in {run}; to continue: openelm-mlx pretrain --resume '{run}'"
    assert capsys.readouterr().err == f"openelm-mlx: error: {said}\n"
    with pytest.raises(SystemExit, match="130"), progress.resumable("tune", tmp_path / "other"):
        raise KeyboardInterrupt
    assert "interrupted before the first checkpoint; there is nothing to resume" in capsys.readouterr().err


def test_an_interrupted_run_that_is_resumed_with_fewer_steps_is_not_called_finished(monkeypatch, capsys, tmp_path):
    state = Fields({"step": 47, "recipe": {"steps": 400}}, "state.json", TrainingError)
    monkeypatch.setattr(progress, "newest_state", lambda folder: state)
    progress.report_finished(
        "pretrain", TrainingResult(tmp_path / "run", tmp_path, 47, None, None, False, None), as_json=False
    )
    said, what_to_do = capsys.readouterr().out.splitlines()
    assert said.endswith("run is already at step 47 of 400")
    assert what_to_do.endswith("run")
    assert "--steps" not in what_to_do
