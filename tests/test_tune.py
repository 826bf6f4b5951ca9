import json
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from conftest import SMALL_CONFIG, assert_close, heard, killed_at, launched, random_model, refused, run, write_folder
from mlx_openelm import load, load_model
from mlx_openelm.errors import AdapterError, ConfigError, DataError, TrainingError
from mlx_openelm.runs import checkpoint_folders
from mlx_openelm.training import trainer as trainer_module, tune as tune_module
from mlx_openelm.training.memory import tuning_memory
from mlx_openelm.training.tune import make_trainer, prepare_tuning, tuning_steps
from mlx_openelm.training.tune_recipe import RECIPES, TuneRecipe

CONFIG = SMALL_CONFIG


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """A model, and examples of three kinds."""
    root = tmp_path_factory.mktemp("tune")
    write_folder(root / "model", random_model(CONFIG), tokenizer)
    places = ["river", "garden", "house", "fence"]
    answers = [{"prompt": f"The fox {n % 7} ran", "completion": f" to the {places[n % 4]}."} for n in range(24)]
    write_lines(root / "answers.jsonl", answers)
    write_lines(root / "valid.jsonl", answers[:6])
    pairs = [{"prompt": "The fox", "chosen": f" ran to {n % 4}.", "rejected": f" was {n % 3} gone."} for n in range(16)]
    write_lines(root / "pairs.jsonl", pairs)
    return root


@pytest.fixture(scope="module")
def recipe(files):
    return TuneRecipe(
        model=str(files / "model"),
        data=str(files / "answers.jsonl"),
        validation=str(files / "valid.jsonl"),
        rank=4,
        steps=12,
        batch_size=4,
        learning_rate=0.02,
        dropout=0.1,
        dtype="float32",
        log_every=1,
        validate_every=6,
        checkpoint_every=3,
    )


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"], line["validation_loss"]) for line in lines]


def tuned(recipe, run, **options):
    return list(tuning_steps(prepare_tuning(recipe), run, **options))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, recipe):
    folder = tmp_path_factory.mktemp("whole") / "run"
    tuned(recipe, folder)
    return folder


def test_a_run_learns_and_leaves_an_adapter(whole_run, files):
    found = losses(whole_run)
    assert [step for step, *_ in found] == list(range(13))
    assert found[0][1] is None
    assert found[0][3] > found[6][3] > found[12][3]
    model = load_model(files / "model", adapter=whole_run)
    plain = load_model(files / "model")
    tokens = mx.array([[1, 20, 30]])
    assert mx.abs(model(tokens) - plain(tokens)).max().item() > 0.1


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("objective", ["cross-entropy", "dpo"])
def test_every_method_and_objective_learns(tmp_path, recipe, files, method, objective):
    recipe = replace(recipe, method=method, objective=objective, beta=0.1)
    if objective == "dpo":
        recipe = replace(recipe, data=str(files / "pairs.jsonl"), validation="0.25")
    found = tuned(recipe, tmp_path / "run")
    assert found[-1].validation_loss < found[0].validation_loss - 0.02
    if objective == "dpo":
        assert found[0].validation["margin"] == pytest.approx(0, abs=1e-5)
        assert found[-1].validation["margin"] > 0.05
    model = load_model(files / "model", adapter=tmp_path / "run")
    assert mx.all(mx.isfinite(model(mx.array([[1, 2, 3]])))).item()


def test_the_reference_is_the_model_as_it_was(recipe, files):
    recipe = replace(recipe, objective="dpo", data=str(files / "pairs.jsonl"), validation="", learning_rate=0.05)
    trainer = make_trainer(prepare_tuning(recipe))
    rows = trainer.data.step(0)
    from mlx_openelm.data.batch import make_batch

    before = trainer._prepare(make_batch(rows))["reference"]
    plain = load_model(files / "model")
    logits = plain(mx.array(rows.tokens[:, :-1]))
    logprobs = mx.take_along_axis(logits - mx.logsumexp(logits, axis=-1, keepdims=True),
                                  mx.array(rows.tokens[:, 1:, None]), axis=-1)[..., 0]  # fmt: skip
    assert_close(before, (logprobs * mx.array(rows.loss_mask)).sum(axis=1), 1e-4)
    for _ in range(4):
        trainer.take_step()
    assert_close(trainer._prepare(make_batch(rows))["reference"], before, 1e-5)


def test_only_the_last_layers_are_trained_in_full(recipe):
    tuning = prepare_tuning(replace(recipe, method="full", layers=1))
    assert {name.split(".")[2] for name in tuning.parameters} == {"1"}
    before = dict(tree_flatten(tuning.model.parameters()))
    trainer = make_trainer(tuning)
    trainer.take_step()
    after = dict(tree_flatten(trainer.current_model().parameters()))
    for name, array in before.items():
        assert mx.array_equal(after[name], array) == (not name.startswith("transformer.layers.1.")), name


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(tmp_path, whole_run, recipe, stop):
    steps = tuning_steps(prepare_tuning(recipe), tmp_path / "run")
    for _ in range(stop):
        next(steps)
    steps.close()
    tuned(recipe, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(whole_run)
    ours, theirs = (mx.load(str(folder / "adapters.safetensors")) for folder in (tmp_path / "run", whole_run))
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_reports_where_it_begins_and_how_far_each_validation_is(tmp_path, recipe):
    begins, validated = [], []
    signs = {"on_begin": begins.append, "on_validating": lambda done, total: validated.append((done, total))}
    tuned(replace(recipe, steps=6), tmp_path / "run", callback=heard(**signs))
    assert (begins, validated) == ([0], [(0, 2), (1, 2), (2, 2)] * 2)  # six examples in batches of four
    begins.clear()
    tuned(replace(recipe, steps=7), tmp_path / "run", resume=True, callback=heard(**signs))
    assert begins == [6]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rank": 8}, "rank 4 -> 8"),
        ({"seed": 5}, "seed 0 -> 5"),
        ({"dropout": 0.0}, "dropout 0.1 -> 0.0"),
    ],
)
def test_another_recipe_cannot_go_on(whole_run, recipe, change, named):
    with pytest.raises(TrainingError, match=named):
        tuned(replace(recipe, **change), whole_run, resume=True)


def test_other_examples_cannot_go_on(tmp_path, whole_run, recipe):
    shutil.copytree(whole_run, tmp_path / "run")
    data = tmp_path / "answers.jsonl"
    data.write_text(Path(recipe.data).read_text().replace("river", "woods"))
    with pytest.raises(TrainingError, match="the model, the data"):
        tuned(replace(recipe, data=str(data)), tmp_path / "run", resume=True)


def test_the_same_examples_may_lie_elsewhere_and_steps_be_added(tmp_path, whole_run, recipe):
    shutil.copytree(whole_run, tmp_path / "run")
    data = shutil.copy(recipe.data, tmp_path / "moved.jsonl")
    found = tuned(replace(recipe, data=str(data), steps=14), tmp_path / "run", resume=True)
    assert [metrics.step for metrics in found] == [13, 14]


def test_another_model_of_the_same_widths_cannot_go_on(tmp_path, whole_run, recipe, tokenizer):
    other = random_model(CONFIG, seed=1)
    norms = {n: a for n, a in tree_flatten(random_model(CONFIG).parameters()) if a.ndim == 1}
    other.update(tree_unflatten(list(norms.items())))
    write_folder(tmp_path / "other", other, tokenizer)
    with pytest.raises(TrainingError, match="the model, the data"):
        tuned(replace(recipe, model=str(tmp_path / "other")), whole_run, resume=True)


def test_an_interrupt_within_a_validation_loses_nothing(tmp_path, whole_run, recipe, monkeypatch):
    original = trainer_module.Trainer.validation

    def interrupted(trainer, *arguments):
        if trainer.step == 6:
            raise KeyboardInterrupt
        return original(trainer, *arguments)

    monkeypatch.setattr(trainer_module.Trainer, "validation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(recipe, tmp_path / "run")
    monkeypatch.undo()
    tuned(recipe, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(whole_run)


def test_a_damaged_checkpoint_is_not_published(tmp_path, whole_run, recipe, files):
    shutil.copytree(whole_run, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "step-00000012" / "adapters.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:500])
    steps = tuning_steps(prepare_tuning(recipe), tmp_path / "run", resume=True)
    assert next(steps).step == 10
    steps.close()
    names = [folder.name for folder in checkpoint_folders(tmp_path / "run")]
    assert names == ["step-00000006", "step-00000009", "step-00000010"]
    load(files / "model", adapter=tmp_path / "run")


@pytest.mark.parametrize("damage", ["step", "pending", "parameters", "empty"])
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path, whole_run, recipe, damage):
    shutil.copytree(whole_run, tmp_path / "run")
    newest = checkpoint_folders(tmp_path / "run")[-1]
    state = json.loads((newest / "state.json").read_text())
    if damage == "step":
        (newest / "state.json").write_text(json.dumps({**state, "step": 10**9}))
    elif damage == "pending":
        (newest / "state.json").write_text(json.dumps({**state, "pending": {"step": state["step"]}}))
    elif damage == "parameters":
        arrays = mx.load(str(newest / "adapters.safetensors"))
        mx.save_safetensors(str(newest / "adapters.safetensors"), {name: a[:1] for name, a in arrays.items()})
    else:
        (newest / "adapters.safetensors").write_bytes(b"")
    said = []
    steps = tuning_steps(prepare_tuning(recipe), tmp_path / "run", resume=True, callback=heard(said))
    assert next(steps).step == 10
    steps.close()
    assert any("falling back to the previous checkpoint" in message for message in said)


def test_metrics_that_are_not_metrics_stop_a_resumed_run(tmp_path, whole_run, recipe):
    for line in ('{"a": 1}', '{"step": "3"}', "[3]", "[" * 10_000, '{"step": 3, "x": {"y": 1}'):
        shutil.copytree(whole_run, tmp_path / "run", dirs_exist_ok=True)
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write(line + "\n")
        with pytest.raises(TrainingError, match=r"metrics\.jsonl, line \d+"):
            next(tuning_steps(prepare_tuning(recipe), tmp_path / "run", resume=True))


def test_an_adapter_larger_than_the_memory_is_refused_before_it_is_allocated(recipe, monkeypatch):
    monkeypatch.setattr(tune_module, "memory_limit_bytes", lambda: 1 << 20)
    with pytest.raises(TrainingError, match=r"an adapter of rank 8,192 has [\d,]+ parameters.*reduce `rank`"):
        prepare_tuning(replace(recipe, rank=8192))


def test_a_line_that_was_cut_off_is_dropped(tmp_path, recipe, whole_run):
    shutil.copytree(whole_run, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    tuned(replace(recipe, steps=13), tmp_path / "run", resume=True)
    assert [step for step, *_ in losses(tmp_path / "run")] == list(range(14))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulated_batches_make_the_step_of_one_large_one(recipe, method):
    recipe = replace(recipe, dropout=0.0, method=method)
    one = make_trainer(prepare_tuning(recipe))
    two = make_trainer(prepare_tuning(replace(recipe, batch_size=1, grad_accumulation_steps=4)))
    for _ in range(2):
        assert two.take_step() == pytest.approx(one.take_step(), rel=1e-4)
    for name, p in one.parameters.items():
        assert_close(two.parameters[name], p, 1e-3)


def test_layer_by_layer_makes_the_same_run(tmp_path, whole_run, recipe):
    tuned(replace(recipe, gradient_checkpointing=True), tmp_path / "run")
    one, other = losses(tmp_path / "run"), losses(whole_run)
    for step in (6, 12):
        assert one[step][3] == pytest.approx(other[step][3], rel=1e-3)


def test_packed_rows_learn_the_same_examples(recipe):
    """Each packed row is a batch of examples on their own: the summed losses agree."""
    recipe = replace(recipe, dropout=0.0, learning_rate=1e-9, batch_size=24)
    alone = make_trainer(prepare_tuning(recipe))
    packed = make_trainer(prepare_tuning(replace(recipe, pack=True, max_length=64, batch_size=12)))
    assert packed.data.steps_per_epoch == 1
    one, other = alone.take_step(), packed.take_step()
    assert other["count"] == one["count"]
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_the_loss_is_that_of_answers_alone(recipe, files):
    """By hand: the mean over answer tokens, EOS among them, of all examples of a step."""
    trainer = make_trainer(prepare_tuning(replace(recipe, dropout=0.0)))
    rows = trainer.data.step(0)
    plain = load_model(files / "model")
    logits = np.array(plain(mx.array(rows.tokens[:, :-1])))
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    picked = np.take_along_axis(logprobs, rows.tokens[:, 1:, None], axis=-1)[..., 0]
    figures = trainer.take_step()
    assert figures["count"] == rows.loss_mask.sum()
    assert figures["loss"] == pytest.approx(-picked[rows.loss_mask].mean(), rel=1e-4)


def test_a_step_without_a_target_changes_nothing(recipe):
    trainer = make_trainer(prepare_tuning(recipe))
    rows = trainer.data.step(0)
    trainer.data.step = lambda *arguments: replace(rows, loss_mask=np.zeros_like(rows.loss_mask))
    before = dict(trainer.parameters)
    assert trainer.take_step()["count"] == 0
    assert trainer.step == 1
    assert all(mx.array_equal(trainer.parameters[name], p) for name, p in before.items())


def test_the_adapter_that_is_kept_is_the_best(tmp_path, recipe, monkeypatch):
    found = iter([5.0, 4.0, 3.0, 3.5, 3.6, 3.7])
    monkeypatch.setattr(trainer_module.Trainer, "validation", lambda *_: {"loss": next(found), "z_loss": 0.0})
    recipe = replace(recipe, validate_every=1, early_stop=2, keep_checkpoints=1)
    metrics = tuned(recipe, tmp_path / "run")
    assert [m.validation_loss for m in metrics] == [5.0, 4.0, 3.0, 3.5, 3.6]  # two in a row were no better
    folders = checkpoint_folders(tmp_path / "run")
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000004"]
    kept = mx.load(str(tmp_path / "run" / "adapters.safetensors"))
    best = mx.load(str(folders[0] / "adapters.safetensors"))
    assert all(mx.array_equal(kept[name], best[name]) for name in best)


def test_a_better_loss_begins_the_count_of_early_stop_anew(tmp_path, recipe, monkeypatch):
    losses = [5.0, 4.0, 4.5, 3.0, 3.5, 2.0, 2.5, 2.6, 9.0]
    found = iter(losses)
    monkeypatch.setattr(trainer_module.Trainer, "validation", lambda *_: {"loss": next(found), "z_loss": 0.0})
    metrics = tuned(replace(recipe, validate_every=1, early_stop=2), tmp_path / "run")
    assert [m.validation_loss for m in metrics] == losses[:8]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, recipe, files, monkeypatch):
    steps = tuning_steps(prepare_tuning(recipe), tmp_path / "run")
    for _ in range(5):
        next(steps)
    monkeypatch.setattr(trainer_module, "learning_rate", lambda recipe, step: float("inf"))
    with pytest.raises(TrainingError, match=r"not finite at step 5 \(learning rate inf, gradient norm [\d.]+\)"):
        list(steps)
    model = load_model(files / "model", adapter=tmp_path / "run")
    assert mx.all(mx.isfinite(model(mx.array([[1, 2, 3]])))).item()


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_packaged_recipes_are_read(name):
    recipe = TuneRecipe.from_file(TuneRecipe.named(name))
    assert TuneRecipe.from_dict(recipe.to_dict()) == recipe


def test_packaged_recipes_have_apples_numbers():
    published = {
        "270M": (5, 2e-5, "hinge"),
        "450M": (8, 3e-5, "hinge"),
        "1.1B": (5, 5e-5, "sigmoid"),
        "3B": (10, 1e-4, "hinge"),
    }
    for size, numbers in published.items():
        recipe = TuneRecipe.from_file(TuneRecipe.named(f"instruct-{size}"))
        assert (recipe.epochs, recipe.learning_rate, recipe.preference_loss) == numbers
        assert (recipe.objective, recipe.beta, recipe.max_length, recipe.max_prompt) == ("dpo", 0.01, 1024, 512)
        assert (recipe.batch_size * recipe.grad_accumulation_steps, recipe.warmup_share, recipe.schedule) == (
            16,
            0.1,
            "cosine",
        )
    recipe = TuneRecipe.from_file(TuneRecipe.named("commonsense"))
    assert (recipe.rank, recipe.alpha, recipe.dropout, recipe.weight_decay) == (32, 32, 0.1, 0)
    assert set(recipe.targets) == {"token_embeddings", "qkv_proj", "out_proj", "proj_1", "proj_2"}
    assert (recipe.steps, recipe.warmup_steps, recipe.batch_size * recipe.grad_accumulation_steps) == (4375, 1000, 16)
    assert recipe.learning_rate * recipe.min_lr_ratio == pytest.approx(3e-5)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"method": "full", "quantized": True}, AdapterError, "quantized, so it cannot be fully fine-tuned"),
        ({"layers": 3}, AdapterError, "layers must be at most 2, .*got 3"),
        ({"layers": 3, "method": "full"}, AdapterError, "layers must be at most 2, .*got 3"),
        ({"targets": ("q_proj",)}, AdapterError, "q_proj matches no matrix \\(choose from qkv_proj"),
        ({"max_length": 65}, ConfigError, "at most 64, the model's context length; got 65"),
        ({"objective": "dpo"}, DataError, "in the completion format; this method needs prompt, chosen and rejected"),
        (
            {"data": "pairs.jsonl", "validation": ""},
            DataError,
            "in the preference format; this method needs a text or an answer",
        ),
        ({"data": ""}, DataError, "no data given"),
        ({"data": "missing.jsonl"}, DataError, "missing.jsonl"),
        ({"validation": "1.5"}, DataError, "validation share .*got 1.5"),
        ({"validation": "0"}, DataError, "validation share .*got 0"),
        ({"validation": "", "early_stop": 2}, DataError, "early_stop needs validation examples"),
    ],
)
def test_what_cannot_be_tuned_is_refused(recipe, files, tmp_path, change, error, said):
    change = dict(change)
    if change.pop("quantized", False):
        model = random_model(replace(CONFIG, ffn_dim_divisor=64))
        write_folder(tmp_path / "m", model)
        from mlx_openelm.conversion.convert import convert

        convert(tmp_path / "m", tmp_path / "q", quantize=4, group_size=32, tokenizer="none")
        change |= {"model": str(tmp_path / "q"), "tokenizer": str(files / "model" / "tokenizer.model")}
    if change.get("data"):
        change["data"] = str(files / change["data"])
    with pytest.raises(error, match=said):
        prepare_tuning(replace(recipe, **change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 0}, "rank must be positive; got 0"),
        ({"method": "other"}, r"unknown method 'other' \(choose from lora, dora, full, dpo, dora\+dpo, full\+dpo\)"),
        ({"schedule": "step"}, "unknown schedule 'step'"),
        ({"pack": True, "objective": "dpo"}, "mutually exclusive"),
        ({"dropout": 1.0}, "dropout must be .*got 1.0"),
        ({"seed": -1}, "got -1"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"columns": 3}, "columns"),
        ({"targets": 3}, "targets must be names"),
    ],
)
def test_impossible_settings_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        TuneRecipe.from_dict(change)


def test_predicted_memory_counts_what_the_metrics_count(recipe, tmp_path):
    """On the CPU that is the process, Python and MLX included."""
    tuning = prepare_tuning(recipe)
    memory = tuning_memory(tuning)
    assert memory.total_bytes == memory.peak_bytes + memory.process_bytes
    (*_, last) = tuning_steps(tuning, tmp_path / "run")
    assert 0.7 < memory.total_bytes / last.peak_memory_bytes < 1.3


def test_memory_is_predicted_from_shapes(recipe):
    """Twice the rows, nearly twice the activations; checkpointing needs less; DoRA more. (How well: benchmarks.)"""
    small = tuning_memory(prepare_tuning(recipe))
    large = tuning_memory(prepare_tuning(replace(recipe, batch_size=8)))
    assert small.fits
    assert 1.5 < large.activation_bytes / small.activation_bytes < 2.1
    assert tuning_memory(prepare_tuning(replace(recipe, gradient_checkpointing=True))).peak_bytes < small.peak_bytes
    assert tuning_memory(prepare_tuning(replace(recipe, method="dora"))).peak_bytes > small.peak_bytes
    assert tuning_memory(prepare_tuning(replace(recipe, batch_size=8)), processes=2) == small


class TestCommand:
    def words(self, files, run, *more, processes=1):
        words = [sys.executable, "-m", "mlx_openelm", "tune", "-m", files / "model", "-d", files / "answers.jsonl"]
        words += ["--validation", files / "valid.jsonl", "-o", run, "--config", files / "recipe.yaml", *more]
        return [str(word) for word in (*launched(processes), *words)]

    @pytest.fixture(autouse=True)
    def written_recipe(self, files):
        (files / "recipe.yaml").write_text(
            "steps: 40\nbatch_size: 4\nrank: 4\nlearning_rate: 1e-2\ndropout: 0.1\ndtype: float32\nlog_every: 1\n"
            "validate_every: 20\ncheckpoint_every: 5\n"
        )

    def tune(self, files, run, *more, **options):
        return subprocess.run(self.words(files, run, *more, **options), capture_output=True, text=True, timeout=120)

    def test_shows_what_it_does(self, files, tmp_path):
        done = self.tune(files, tmp_path / "run", "--steps", "3", "--sample-prompt", "The fox")
        assert done.returncode == 0, done.stderr
        assert "24 examples in completion format, 6 for validation" in done.stderr
        assert re.search(r"The fox 0 ran\[\[ to the \w+\.\]\]", done.stderr)
        assert "trains 3,328 " in done.stderr
        assert "memory: about" in done.stderr
        assert "sample: The fox" in done.stderr
        assert "adapter from step 3 with the best validation loss" in done.stdout
        status, text, _ = run("generate", "-m", files / "model", "-a", tmp_path / "run", "-p", "The fox", "-n", "4")
        assert (status, bool(text.strip())) == (0, True)
        status, _, _ = run("merge", "-m", files / "model", "-a", tmp_path / "run", "-o", tmp_path / "merged")
        assert status == 0
        _, merged, _ = run("generate", "-m", tmp_path / "merged", "-p", "The fox", "-n", "4")
        assert merged == text
        assert run("plot", tmp_path / "run")[0] == 0

    def test_a_dry_run_writes_nothing(self, files, tmp_path):
        done = self.tune(files, tmp_path / "run", "--dry-run", "--json", "--rank", "8")
        found = json.loads(done.stdout)
        assert (found["examples"], found["validation_examples"], found["recipe"]["rank"]) == (24, 6, 8)
        assert found["recipe"]["learning_rate"] == 0.01  # of the file
        assert found["memory"]["fits"]
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_a_run_killed_at_any_step_goes_on_bit_for_bit(self, files, tmp_path, processes):
        assert self.tune(files, tmp_path / "whole", processes=processes).returncode == 0
        rng = random.Random(processes)
        stops = set()
        for _ in range(3):
            last = rng.randrange(9) + (max(stops) if stops else 0)
            stops.add(self.kill_at(files, tmp_path / "killed", min(last, 32), processes))
        more = ["--resume"] if checkpoint_folders(tmp_path / "killed") else []
        done = self.tune(files, tmp_path / "killed", *more, processes=processes)
        assert done.returncode == 0, done.stderr
        assert losses(tmp_path / "killed") == losses(tmp_path / "whole")

    def kill_at(self, files, run, step, processes):
        more = ["--resume"] if checkpoint_folders(run) else []
        return killed_at(self.words(files, run, *more, processes=processes), step)

    def test_an_adapter_is_resumed_by_its_folder_alone(self, files, tmp_path, monkeypatch):
        assert self.tune(files, tmp_path / "run", "--steps", "2").returncode == 0
        monkeypatch.chdir(tmp_path)
        status, out, err = run("tune", "--resume", "run")
        assert (status, err) == (0, "")
        assert out.splitlines()[0].startswith("run is finished: 2 steps; best validation loss: ")
        assert "openelm-mlx tune --resume run --steps 4" in out
        status, out, err = run("tune", "--resume", "run", "--json")
        assert (status, json.loads(out)["step"], err) == (0, 2, "")
        status, out, err = run("tune", "--resume", "run", "--steps", "3")
        assert status == 0, err
        assert "continuing after step 2 of 3" in err
        assert checkpoint_folders(tmp_path / "run")[-1].name == "step-00000003"

    @pytest.mark.slow
    def test_two_processes_make_the_same_run(self, files, tmp_path):
        more = ["--dropout", "0"]
        assert self.tune(files, tmp_path / "one", *more).returncode == 0
        done = self.tune(files, tmp_path / "two", *more, processes=2)
        assert done.returncode == 0, done.stderr
        one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
        assert [loss for _, loss, _, _ in two[1:]] == pytest.approx([loss for _, loss, _, _ in one[1:]], rel=1e-3)
        assert [found for *_, found in two if found] == pytest.approx([found for *_, found in one if found], rel=1e-3)

    def test_a_failure_of_one_process_ends_all(self, files, tmp_path):
        assert self.tune(files, tmp_path / "run", "--steps", "5").returncode == 0
        (tmp_path / "run" / "metrics.jsonl").unlink()
        (tmp_path / "run" / "metrics.jsonl").mkdir()  # which only the process that writes notices
        done = self.tune(files, tmp_path / "run", "--resume", processes=2)
        assert "metrics.jsonl is a folder" in done.stderr + done.stdout
        assert "another process of the run failed" in done.stderr + done.stdout

    def test_an_interrupt_keeps_the_adapter(self, files, tmp_path):
        process = subprocess.Popen(
            self.words(files, tmp_path / "run", "--steps", "100000"),
            stderr=subprocess.PIPE,
            text=True,
        )
        said = ""
        while "step 3 of" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert "to continue: openelm-mlx tune --resume " in said.splitlines()[-1]
        assert "stopping once the computation in progress is done" in said
        assert (tmp_path / "run" / "adapters.safetensors").exists()

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--method", "qlora"], "unknown method 'qlora'"),
            (["--data", "missing.jsonl"], "missing.jsonl"),
            (["--targets", "q_proj,qkv_proj"], "q_proj matches no matrix (choose from qkv_proj, out_proj"),
            (["--columns", "prompt=question"], "no column 'question'; the columns are prompt, completion"),
            (["--config", "other"], "the packaged recipes are commonsense"),
            (["--resume"], "no checkpoint"),
            (["--output", "/dev/null"], "is a file"),
            (
                ["--max-length", "3", "--too-long", "drop"],
                "no example to train on: 24 are longer than 3 tokens; the longest has",
            ),
        ],
    )
    def test_mistakes_are_one_line(self, files, tmp_path, more, said):
        done = self.tune(files, tmp_path / "run", *more)
        assert done.returncode == 2, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("openelm-mlx: error: ")
        assert said in last

    def test_the_adapter_is_asked_as_its_examples_were_and_so_is_the_merged_model(self, files, tmp_path):
        more = ["--steps", "2", "--separator", r"\n"]
        done = self.tune(files, tmp_path / "run", *more, "--prompt-style", "chat", "--chat-template", "openelm")
        assert "--separator belongs between a plain prompt and its completion" in done.stderr
        done = self.tune(files, tmp_path / "run", *more)
        assert done.returncode == 0, done.stderr
        assert re.search(r"The fox 0 ran\n\[\[ to the \w+\.\]\]", done.stderr)
        words = ("generate", "-p", "The fox", "-n", "3", "--json")
        found = json.loads(run(*words, "-m", files / "model", "-a", tmp_path / "run")[1])
        plain = json.loads(run(*words, "-m", files / "model", "-a", tmp_path / "run", "--raw")[1])
        assert found["stats"]["prompt_tokens"] == plain["stats"]["prompt_tokens"] + 1  # the separator
        assert run("merge", "-m", files / "model", "-a", tmp_path / "run", "-o", tmp_path / "merged")[0] == 0
        assert (
            json.loads(run(*words, "-m", tmp_path / "merged")[1])["stats"]["prompt_tokens"]
            == found["stats"]["prompt_tokens"]
        )

    def test_causes_and_memory_are_told(self, files, tmp_path):
        done = self.tune(files, tmp_path / "run", "--dry-run", "--max-length", "14", "--too-long", "drop")
        said = r"answers.jsonl: left out (\d+) of 24 examples: \1 are longer than 14 tokens; the longest has"
        assert re.search(said, done.stderr), done.stderr
        assert re.search(r"memory: about [\d.]+ MiB of [\d,.]+ MiB\n.*model .* MiB; gradients", done.stderr)

    def test_a_merge_says_what_it_costs(self, files, tmp_path):
        assert self.tune(files, tmp_path / "run", "--steps", "3").returncode == 0
        out = tmp_path / "q"
        status, said, err = run(
            "merge", "-m", files / "model", "-a", tmp_path / "run", "-o", out, "-q", "8", "--group-size", "32"
        )
        assert status == 0, err
        assert re.search(r"quantizing the result costs \d\.\d{4} nats per token", said)
        assert "already exists" in refused("merge", "-m", files / "model", "-a", tmp_path / "run", "-o", out)
        assert "holds no adapter" in refused(
            "merge", "-m", files / "model", "-a", files / "model", "-o", tmp_path / "r"
        )
