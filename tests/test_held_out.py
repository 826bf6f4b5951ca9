import json
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from conftest import SMALL_CONFIG, random_model, refused, run, write_folder
from mlx_openelm import TrainingCallback, TuneRecipe, held_out_loss, load, tune
from mlx_openelm.errors import ConfigError, DataError


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("evaluation")
    write_folder(place / "model", random_model(SMALL_CONFIG), tokenizer)
    ends = ["river", "house", "fence"]
    records = [{"prompt": f"The fox {n} ran", "completion": f" to the {ends[n % 3]}."} for n in range(14)]
    write_lines(place / "train.jsonl", records[:9])
    write_lines(place / "test.jsonl", records[9:])
    write_lines(place / "pairs.jsonl", [{"prompt": "A", "chosen": f" {n}.", "rejected": f" no {n}."} for n in range(6)])
    return place


@pytest.fixture(scope="module")
def recipe(place):
    return TuneRecipe(
        model=str(place / "model"),
        data=str(place / "train.jsonl"),
        validation=0.3,
        test=str(place / "test.jsonl"),
        rank=4,
        steps=4,
        batch_size=2,
        learning_rate=0.02,
        dtype="float32",
        validate_every=1,
    )


@pytest.fixture(scope="module")
def adapter(place, recipe):
    tune(recipe, place / "run")
    return place / "run"


def test_the_loss_is_the_mean_over_the_answers_tokens(place, recipe, adapter):
    """By hand, one example at a time."""
    model, tokenizer = load(place / "model", adapter=adapter, dtype=mx.float32)
    total = count = 0
    for line in (place / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        before = tokenizer.encode(record["prompt"])
        tokens = [*tokenizer.encode(record["prompt"] + record["completion"]), tokenizer.eos_token_id]
        logits = np.array(model(mx.array([tokens]))[0])
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        total -= sum(logprobs[place - 1, tokens[place]] for place in range(len(before), len(tokens)))
        count += len(tokens) - len(before)
    seen = []
    found = held_out_loss(replace(recipe, adapter=str(adapter)), lambda *progress: seen.append(progress))
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert (found.num_examples, found.num_tokens) == (5, count)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]  # batches of two


def test_a_run_ends_with_the_test_of_its_best_adapter(place, recipe, monkeypatch):
    from mlx_openelm.training import trainer

    losses = iter([5.0, 4.0, 3.0, 3.5, 3.6])
    monkeypatch.setattr(trainer.Trainer, "validation", lambda *_: {"loss": next(losses), "z_loss": 0.0})
    seen = []

    class Seeing(TrainingCallback):
        def on_testing(self, done_batches, total_batches):
            seen.append((done_batches, total_batches))

    result = tune(recipe, place / "best", callback=Seeing())
    assert (result.step, seen[-1]) == (2, (3, 3))
    found = held_out_loss(replace(recipe, adapter=str(place / "best")))
    assert result.test.loss == pytest.approx(found.loss, rel=1e-5)
    last = held_out_loss(replace(recipe, adapter=str(place / "best" / "checkpoints" / "step-00000004")))
    assert abs(last.loss - found.loss) > 1e-3
    again = tune(recipe, place / "best", resume=True)  # a finished run measures alone
    assert again.test.loss == pytest.approx(found.loss, rel=1e-5)
    assert "test loss" in repr(again)


def test_a_folder_brings_its_own_test_file(place, recipe, tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text((place / f"{name}.jsonl").read_text())
    result = tune(replace(recipe, data=str(tmp_path), test="", steps=1), tmp_path / "run")
    assert result.test.num_examples == 5


def test_pairs_are_measured_at_the_end_of_their_run(place, recipe, tmp_path):
    pairs = replace(recipe, data=str(place / "pairs.jsonl"), test=str(place / "pairs.jsonl"), method="dpo", beta=0.1)
    result = tune(pairs, tmp_path / "run")
    assert result.test.perplexity is None
    assert result.test.more["margin"] > 0
    assert "perplexity" not in repr(result.test)


def test_what_cannot_be_measured_is_told(place, recipe):
    with pytest.raises(DataError, match="preference pairs, whose loss depends on the model that tuning began with"):
        held_out_loss(replace(recipe, test=str(place / "pairs.jsonl")))
    with pytest.raises(DataError, match="set `test`"):
        held_out_loss(replace(recipe, test=""))
    with pytest.raises(ConfigError, match="`separator` belongs between a plain prompt and its completion"):
        held_out_loss(replace(recipe, separator="\n", chat_template="openelm"))


def test_the_command_measures_without_training(place, recipe, adapter):
    words = ("tune", "-m", place / "model", "--test", place / "test.jsonl", "--batch-size", "2")
    status, base, err = run(*words)
    assert status == 0, err
    status, tuned, err = run(*words, "--adapter", adapter, "--json")
    assert status == 0, err
    found = json.loads(tuned)
    assert found["loss"] == pytest.approx(held_out_loss(replace(recipe, adapter=str(adapter))).loss, rel=1e-4)
    assert float(base.split("loss ")[1].split(",")[0]) > found["loss"]
    assert "with --output" in refused("tune", "-m", place / "model", "-d", place / "train.jsonl")
