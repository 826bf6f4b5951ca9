"""What follows from the model and the data where a recipe leaves a field open, and where its paths lead."""

import json
from dataclasses import replace

import pytest

from mlx_openelm import PRESETS
from mlx_openelm.errors import ConfigError, TrainingError
from mlx_openelm.model.design import fit
from mlx_openelm.runs import checkpoint_folder
from mlx_openelm.training.pretrain_recipe import PretrainRecipe
from mlx_openelm.training.setting import setting_of

SMALL = fit(5_000_000, vocab_size=4096, max_context_length=512)


def test_open_fields_follow_from_the_sizes_of_model_and_data():
    little = PretrainRecipe(model=SMALL).resolved(num_tokens=409_600, num_documents=100)
    assert (little.sequence_length, little.batch_size, little.train_tokenizer) == (512, 8, 4096)
    assert (little.steps, little.warmup_steps, little.validate_every, little.checkpoint_every) == (400, 12, 20, 20)
    assert (little.learning_rate, little.dtype) == (0.003, "float32")
    much = PretrainRecipe(model=SMALL).resolved(num_tokens=10**9, num_documents=10**6)
    assert much.steps * 4096 == pytest.approx(20 * SMALL.num_parameters, rel=0.001)
    large = PretrainRecipe(model="270M", tokenizer="t.model").resolved(10**11, 10**8)
    assert (large.batch_size * large.sequence_length, large.learning_rate, large.train_tokenizer) == (2**18, 0.001, 0)
    assert PretrainRecipe(model="270M").resolved(10**11, 10**8, num_processes=3).batch_size % 3 == 0


@pytest.mark.parametrize(("steps", "every"), [(3, 3), (12, 5), (100, 5), (101, 6)])
def test_a_short_run_is_not_validated_all_the_time(steps, every):
    recipe = PretrainRecipe(model=SMALL, steps=steps).resolved(409_600, 100)
    assert (recipe.validate_every, recipe.checkpoint_every) == (every, every)


def test_what_is_given_stays():
    given = {
        "steps": 7,
        "batch_size": 3,
        "sequence_length": 64,
        "learning_rate": 0.1,
        "warmup_steps": 0,
        "validate_every": 2,
        "checkpoint_every": 5,
        "dtype": "bfloat16",
        "train_tokenizer": 300,
    }
    recipe = PretrainRecipe(model=SMALL, **given).resolved(10**6, 10**3)
    assert {name: getattr(recipe, name) for name in given} == given
    assert PretrainRecipe(model=SMALL, epochs=2, batch_size=4).resolved(409_600, 100).steps == 400


def test_a_resumed_run_keeps_what_was_chosen_for_it_and_may_change_its_length():
    before = PretrainRecipe(model=SMALL, batch_size=16).resolved(409_600, 100)
    again = PretrainRecipe(model=SMALL).continued(before.to_dict())
    assert again == before.__class__.from_dict(before.to_dict())
    longer = PretrainRecipe(model=SMALL, epochs=10).continued(before.to_dict())
    assert longer.steps == 0
    assert replace(longer, steps=before.steps).differences(before.to_dict()) == []


def test_where_the_data_is_does_not_matter_but_its_weights_do():
    one = PretrainRecipe(model=SMALL, data=[{"path": "a/*.txt", "weight": 2.0}])
    assert PretrainRecipe(model=SMALL, data=[{"path": "b/a/*.txt", "weight": 2.0}]).differences(one.to_dict()) == []
    assert "data" in PretrainRecipe(model=SMALL, data=[{"path": "a/*.txt"}]).differences(one.to_dict())[0]
    assert PretrainRecipe(model=SMALL, data=[]).differences(one.to_dict()) != []


def test_a_model_is_a_file_a_published_size_or_a_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.json").write_text(json.dumps(SMALL.to_dict()))
    (tmp_path / "toy.yaml").write_text(json.dumps(SMALL.to_dict()))
    (tmp_path / "recipe.yaml").write_text("model: toy.json\nsteps: 3\n")
    (tmp_path / "270M").mkdir()  # as after `--output 270M`
    assert PretrainRecipe(model="toy.json").model == PretrainRecipe(model="toy.yaml").model == SMALL
    assert PretrainRecipe(model="270M").model == PRESETS["270M"]
    monkeypatch.chdir("/")
    assert PretrainRecipe.from_file(tmp_path / "recipe.yaml").model == SMALL
    with pytest.raises(
        ConfigError, match=r"'toy' does not exist, and is not a published size .*`openelm-mlx design` writes"
    ):
        PretrainRecipe(model="toy")
    with pytest.raises(ConfigError, match=r"toy.json: this is the configuration of a model, not a recipe; pass it"):
        PretrainRecipe.from_file(tmp_path / "toy.json")
    with pytest.raises(ConfigError, match=r"recipe.yaml is a recipe, not the configuration of a model"):
        PretrainRecipe(model=str(tmp_path / "recipe.yaml"))


def test_paths_are_relative_to_what_names_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "recipe.yaml").write_text("model: 270M\ndata: [a.txt, ~/b.txt]\n")

    def paths(config, given=None, folder=None):
        return [source.path for source in PretrainRecipe.from_file(config, given, folder).data]

    assert paths(tmp_path / "recipe.yaml") == [str(tmp_path / "a.txt"), "/home/somebody/b.txt"]
    assert paths(tmp_path / "recipe.yaml", {"data": "c/*.txt"}) == ["c/*.txt"]
    assert paths("tiny", {"data": "~/c.txt"}) == ["/home/somebody/c.txt"]
    assert paths("tiny")[0] == "tinystories_*.txt"  # not of a folder in the package
    assert paths("tiny", folder="texts")[0] == "texts/tinystories_*.txt"
    assert PretrainRecipe(model="270M", tokenizer="~/t.model").tokenizer == "/home/somebody/t.model"


def test_a_run_is_continued_from_any_folder(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "one"
    folder = checkpoint_folder(run, 5)
    folder.mkdir(parents=True)
    recipe = PretrainRecipe(model=SMALL, data="texts/*.txt").resolved(409_600, 100)
    (folder / "state.json").write_text(json.dumps({"step": 5, "recipe": recipe.to_dict(), "folder": "../.."}))
    monkeypatch.chdir(tmp_path / "runs")
    found = PretrainRecipe.of_run(run, {"steps": 500})
    assert (found.data[0].path, found.steps, found.batch_size) == ("../texts/*.txt", 500, 8)
    assert PretrainRecipe.of_run(run, {"data": "other.txt"}).data[0].path == "other.txt"
    (folder / "state.json").write_text(json.dumps({"step": 5, "recipe": {"rank": 8}}))
    with pytest.raises(ConfigError, match="is a run of `tune`"):
        PretrainRecipe.of_run(run)
    with pytest.raises(TrainingError, match="does not exist"):
        PretrainRecipe.of_run(tmp_path / "missing")


def test_a_vocabulary_larger_than_the_models_is_refused():
    with pytest.raises(ConfigError, match="at most 4,096, the model's vocabulary; got 5000"):
        PretrainRecipe(model=SMALL, train_tokenizer=5000)


def test_the_nearest_field_is_suggested():
    with pytest.raises(ConfigError, match=r"unknown recipe field: learning_rat \(did you mean learning_rate\?\)"):
        PretrainRecipe.from_dict({"model": "270M", "learning_rat": 1})


def test_every_open_field_has_its_mark_as_default():
    recipe = PretrainRecipe(model=SMALL)
    for name in ("steps", "batch_size", "sequence_length", "learning_rate", "validate_every", "checkpoint_every"):
        assert getattr(recipe, name) == 0
        assert "; 0: " in setting_of(PretrainRecipe.__dataclass_fields__[name]).help
