"""A default stands once: in the field of a recipe. Options, help and signatures follow from it."""

import ast
import inspect
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest

import mlx_openelm
from conftest import run
from mlx_openelm.commands.app import all_commands
from mlx_openelm.commands.recipe_options import tune_recipe
from mlx_openelm.errors import ConfigError
from mlx_openelm.training.pretrain_recipe import PretrainRecipe
from mlx_openelm.training.recipe import Recipe
from mlx_openelm.training.setting import changed, setting, setting_of
from mlx_openelm.training.tune_recipe import TuneRecipe

RECIPES = {"tune": TuneRecipe, "pretrain": PretrainRecipe}


@pytest.mark.parametrize("command", RECIPES)
def test_every_field_is_an_option_with_its_default_and_help(command):
    options = {option.name: option for option in all_commands()[command].params}
    for entry in fields(RECIPES[command]):
        option, setting = options[entry.name], setting_of(entry)
        assert option.opts[0] == f"--{entry.name.replace('_', '-')}"
        assert option.help.startswith(setting.help.removesuffix("."))
        assert all(choice in option.help for choice in setting.choices)
        expected = ",".join(entry.default) if isinstance(entry.default, tuple) else entry.default
        assert option.default == (None if expected in ("", MISSING) else expected), entry.name


def test_help_shows_every_field_in_its_group():
    shown = run("tune", "--help")[1]
    for group in {setting_of(entry).group for entry in fields(TuneRecipe)}:
        assert f"─ {group} ─" in shown
    assert shown.index("Model and data") < shown.index("Optimizer") < shown.index("Compute")


def test_no_file_of_commands_writes_down_a_default_of_a_recipe():
    names = {entry.name for recipe in RECIPES.values() for entry in fields(recipe)}
    for module in RECIPES:
        path = Path(mlx_openelm.__file__).parent / "commands" / f"{module}.py"
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and function.name == module:
                assert names.isdisjoint(argument.arg for argument in function.args.args)


def test_parameters_with_the_name_of_a_field_have_its_default():
    """Where a library function repeats a parameter of a recipe's, it must agree or leave the default out."""
    from mlx_openelm.data.dataset import ExampleOptions
    from mlx_openelm.model.lora import AdapterConfig
    from mlx_openelm.training.dpo import DPO
    from mlx_openelm.training.loss import CrossEntropy

    recipe = {entry.name: entry.default for entry in fields(TuneRecipe)}
    allowed = {("ExampleOptions", "max_length")}  # a recipe takes the model's context length
    for repeated in (ExampleOptions, AdapterConfig, DPO, CrossEntropy):
        for name, parameter in inspect.signature(repeated).parameters.items():
            if name in recipe and recipe[name] is not MISSING and (repeated.__name__, name) not in allowed:
                assert parameter.default in (inspect.Parameter.empty, recipe[name]), f"{repeated.__name__}.{name}"


def test_a_command_line_overrides_a_file_and_a_file_the_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("rank: 4\nsteps: 7\nlearning_rate: 1e-3\n")
    recipe = tune_recipe(str(path), {"rank": 2})
    assert (recipe.rank, recipe.steps, recipe.learning_rate, recipe.alpha) == (2, 7, 1e-3, 16.0)
    assert tune_recipe(str(path), {"epochs": 2.0}).steps == 0  # else the file's steps would hide them


def test_the_environment_names_the_model_unless_somebody_else_does(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: from-file\n")
    monkeypatch.setenv("OPENELM_MLX_MODEL", "from-environment")
    assert tune_recipe(None, {}).model == "from-environment"
    assert tune_recipe("commonsense", {}).model == "from-environment"
    assert tune_recipe(str(path), {}).model == "from-file"
    assert tune_recipe(None, {"model": "typed"}).model == "typed"


def test_paths_in_a_file_start_at_its_folder_and_typed_ones_at_the_current(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("model: 270M\ndata: stories/*.txt\ntokenizer: t.model\n")
    (folder / "t.model").touch()
    monkeypatch.chdir(tmp_path)
    recipe = PretrainRecipe.from_file("recipes/recipe.yaml")
    assert recipe.data[0].path == "recipes/stories/*.txt"
    assert recipe.tokenizer == "recipes/t.model"
    assert PretrainRecipe.from_file("recipes/recipe.yaml", {"data": "a/*.txt"}).data[0].path == "a/*.txt"
    assert PretrainRecipe.from_file("270M", {"data": "a/*.txt"}).data[0].path == "a/*.txt"


def typed_data(text, folder):
    """What `pretrain` says of data typed like this, none of which exists."""
    options = ("--config", "270M", "--data", text, "--train-tokenizer", 300, "--output", folder / "run")
    status, _, said = run("pretrain", *options)
    assert status == 2
    return said


@pytest.mark.parametrize("text", ["*.story", "a: b", "- a"])
def test_a_path_may_look_like_yaml(text, tmp_path):
    assert text in typed_data(text, tmp_path)


def test_lists_and_tables_are_typed_as_in_yaml(tmp_path):
    said = typed_data("[{path: x.txt, weight: 0}]", tmp_path)
    assert "the weight of x.txt must be positive; got 0" in said
    assert "the value of data is not valid YAML" in typed_data("{x", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be positive; got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1; got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1; got -0.1"),
        ({"layers": -1}, "layers must not be negative; got -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite; got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite; got inf"),
        ({"schedule": "step"}, r"unknown schedule 'step' \(choose from cosine, linear, constant\)"),
        ({"method": "qlora"}, r"unknown method 'qlora' \(choose from lora, dora, full, dpo, dora\+dpo, full\+dpo\)"),
        ({"rank": 2.5}, "rank must be a whole number; got 2.5"),
        ({"rank": True}, "rank must be a whole number; got True"),
        ({"evaluate": 3}, "evaluate must be names of tasks such as arc_easy; got 3"),
        ({"evaluate": "sciq", "evaluate_limit": -1}, "evaluate_limit must not be negative; got -1"),
        ({"evaluate_limit": 5}, "evaluate_limit is for the tasks to evaluate; name them with `evaluate`"),
        ({"pack": 1}, "pack must be true or false; got 1"),
        ({"alpha": "much"}, "alpha must be a number; got 'much'"),
        ({"alpha": 10**400}, "alpha must be a number"),
        ({"targets": 3}, "targets must be names such as qkv_proj; got 3"),
        ({"columns": [1]}, "columns must be a mapping"),
        ({"max_length": 1}, "max_length must be at least 2; got 1"),
        ({"pack": True, "method": "dpo"}, "pack and dpo are mutually exclusive"),
    ],
)
def test_an_impossible_value_is_refused_in_python_too(change, message):
    with pytest.raises(ConfigError, match=message):
        TuneRecipe(**change)
    with pytest.raises(ConfigError, match=message):
        TuneRecipe.from_dict(change)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("dpo", ("lora", "dpo")), ("dora+dpo", ("dora", "dpo")), ("dpo+full", ("full", "dpo"))],
)
def test_a_method_may_name_the_objective(method, expected):
    recipe = TuneRecipe(method=method)
    assert (recipe.method, recipe.objective) == expected


def test_limits_of_settings():
    @dataclass(frozen=True, kw_only=True)
    class Small(Recipe):
        steps: int = changed(Recipe, "steps", 1)
        batch_size: int = changed(Recipe, "batch_size", 1)
        learning_rate: float = changed(Recipe, "learning_rate", 1.0)
        width: int = setting(4, "Width.", "Compute", at_least=2)
        share: float = setting(0.5, "Share.", "Compute", above=0.25)
        folder: ClassVar[Path] = Path()

    assert Small(width=2).width == 2
    with pytest.raises(ConfigError, match="width must be at least 2; got 1"):
        Small(width=1)
    with pytest.raises(ConfigError, match=r"share must be above 0\.25; got 0\.25"):
        Small(share=0.25)
    assert setting_of(Small.__dataclass_fields__["steps"]).can_change
