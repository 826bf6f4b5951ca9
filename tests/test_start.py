"""Tuning that starts from an adapter."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest

from conftest import SMALL_CONFIG, random_model, write_folder
from mlx_openelm import ExampleFormat, TuneRecipe, load_model
from mlx_openelm.errors import ConfigError, TrainingError
from mlx_openelm.training.start import load_start
from mlx_openelm.training.tune import make_trainer, prepare_tuning, tuning_steps

TOKENS = mx.array([[1, 20, 30, 40]])


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("start")
    write_folder(place / "model", random_model(SMALL_CONFIG), tokenizer)
    ends = ["river", "house", "fence"]
    write_lines(
        place / "a.jsonl", [{"instruction": f"Go {n % 5}", "output": f"to the {ends[n % 3]}."} for n in range(9)]
    )
    write_lines(
        place / "p.jsonl", [{"prompt": f"Go {n}", "chosen": f"to {n}.", "rejected": f"no {n}."} for n in range(8)]
    )
    return place


@pytest.fixture(scope="module")
def recipe(place):
    return TuneRecipe(
        model=str(place / "model"),
        data=str(place / "a.jsonl"),
        rank=4,
        steps=3,
        batch_size=4,
        learning_rate=0.02,
        dtype="float32",
        log_every=1,
        prompt_style="chat",
        chat_template="openelm",
    )


@pytest.fixture(scope="module")
def adapters(place, recipe):
    for method in ("lora", "dora", "full"):
        list(tuning_steps(prepare_tuning(replace(recipe, method=method)), place / method))
    return place


def continued(recipe, adapter, **changes):
    """A recipe as someone types it who starts from an adapter: without its settings."""
    plain = {"rank": TuneRecipe.rank, "prompt_style": "auto", "chat_template": ""}
    return replace(recipe, adapter=str(adapter), **{**plain, **changes})


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_training_begins_at_the_adapter_with_its_shape(adapters, recipe, method):
    tuning = prepare_tuning(continued(recipe, adapters / method))
    saved = mx.load(str(adapters / method / "adapters.safetensors"))
    assert set(tuning.parameters) == set(saved)
    assert all(mx.array_equal(tuning.parameters[name], saved[name]) for name in saved)
    assert tuning.recipe.method == method
    if method != "full":
        assert (tuning.recipe.rank, tuning.recipe.adapter_config.scale) == (4, 4.0)
    trainer = make_trainer(tuning)
    expected = load_model(adapters / "model", adapter=adapters / method)(TOKENS)
    assert mx.abs(trainer.current_model()(TOKENS) - expected).max().item() < 1e-4
    trainer.take_step()
    assert mx.abs(trainer.current_model()(TOKENS) - expected).max().item() > 1e-3


def test_preferences_after_answers_keep_the_format_and_compare_with_the_start(adapters, recipe, tmp_path):
    recipe = continued(
        recipe, adapters / "lora", data=str(adapters / "p.jsonl"), validation=0.3, method="dpo", beta=0.1
    )
    tuning = prepare_tuning(recipe)
    assert tuning.train.example_format == ExampleFormat("preference", prompt_style="chat")
    first, *_, last = tuning_steps(tuning, tmp_path / "run")
    assert first.validation["margin"] == pytest.approx(0, abs=1e-5)  # the reference is the adapter, not its base
    assert last.validation["margin"] > 0.01
    values = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert values["example_format"]["prompt_style"] == "chat"
    assert values["lora_parameters"]["rank"] == 4
    assert (tmp_path / "run" / "chat_template.jinja").exists()  # the base model has none


def test_a_remembered_plain_style_does_not_hide_an_instruction(place, recipe):
    start = load_start(replace(recipe, prompt_style="auto", chat_template=""))
    start.tokenizer.example_format = ExampleFormat("completion", separator="\n")
    assert start.example_format == ExampleFormat(separator="\n")
    start.tokenizer.example_format = ExampleFormat("instruction", indent=16)
    assert start.example_format == ExampleFormat(prompt_style="instruction", indent=16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 16}, "rank must be 4, as in the adapter .*; got 16; leave it out"),
        ({"method": "dora"}, "method must be 'lora'.*got 'dora'"),
        ({"alpha": 3.0}, "alpha must be 16.0"),
        ({"targets": ("qkv_proj",)}, "targets must be"),
        ({"layers": 1}, "layers must be left out"),
    ],
)
def test_another_shape_is_refused(adapters, recipe, change, said):
    with pytest.raises(ConfigError, match=said):
        load_start(continued(recipe, adapters / "lora", **change))


def test_a_run_from_another_adapter_cannot_go_on(adapters, recipe, tmp_path):
    shutil.copytree(adapters / "lora", tmp_path / "adapter")
    recipe = continued(recipe, tmp_path / "adapter")
    list(tuning_steps(prepare_tuning(recipe), tmp_path / "run"))
    longer = replace(recipe, steps=4)
    found = list(tuning_steps(prepare_tuning(longer), tmp_path / "run", resume=True))
    assert [metrics.step for metrics in found] == [4]
    path = tmp_path / "adapter" / "adapters.safetensors"
    mx.save_safetensors(str(path), {name: 2 * a for name, a in mx.load(str(path)).items()})
    with pytest.raises(TrainingError, match="the model, the data"):
        list(tuning_steps(prepare_tuning(replace(recipe, steps=5)), tmp_path / "run", resume=True))
