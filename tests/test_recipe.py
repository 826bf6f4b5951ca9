import pytest

from mlx_openelm import PRESETS
from mlx_openelm.errors import ConfigError
from mlx_openelm.training.pretrain_recipe import RECIPES, PretrainRecipe

# arXiv:2404.14619: the largest learning rate, and whether activations are recomputed.
PUBLISHED = {"270M": (0.0053, False), "450M": (0.0039, True), "1.1B": (0.0024, True), "3B": (0.0012, True)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_recipes_have_the_papers_numbers(size):
    recipe = PretrainRecipe.from_file(PretrainRecipe.named(size))
    assert (recipe.learning_rate, recipe.gradient_checkpointing) == PUBLISHED[size]
    assert recipe.model == PRESETS[size]
    assert recipe.steps == 350_000
    assert recipe.batch_size * recipe.sequence_length == 4_194_304
    assert (recipe.warmup_steps, recipe.initial_learning_rate, recipe.min_lr_ratio) == (5000, 1e-6, 0.1)
    assert (recipe.beta1, recipe.beta2, recipe.eps, recipe.weight_decay, recipe.max_grad_norm) == (
        0.9,
        0.95,
        1e-8,
        0.1,
        1.0,
    )
    assert (recipe.packing, recipe.min_characters, recipe.min_tokens, recipe.dtype) == ("rows", 200, 256, "bfloat16")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_recipes_read_back_equal(path):
    recipe = PretrainRecipe.from_file(path)
    assert PretrainRecipe.from_dict(recipe.to_dict()) == recipe


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PretrainRecipe.named("tiny") == RECIPES / "tiny.yaml"
    (tmp_path / "tiny").write_text("model: 270M\n")
    assert PretrainRecipe.from_file(PretrainRecipe.named("tiny")).model == PRESETS["270M"]
    with pytest.raises(ConfigError, match=r"missing does not exist.*270M"):
        PretrainRecipe.named("missing")


def test_a_mistake_in_an_option_is_not_the_files(tmp_path):
    with pytest.raises(ConfigError, match=r"^unknown packing 'nope'"):
        PretrainRecipe.from_file("tiny", {"packing": "nope"})
    path = tmp_path / "mine.yaml"
    path.write_text("model: 270M\npacking: nope\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown packing 'nope'"):
        PretrainRecipe.from_file(path, {"steps": 3})
    assert PretrainRecipe.from_file(path, {"packing": "rows"}).packing == "rows"


def test_fields_of_recipes_written_before_have_their_names_of_today(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("model: 270M\nclip: 0.5\nfinal_learning_rate: 0.2\n")
    recipe = PretrainRecipe.from_file(path)
    assert (recipe.max_grad_norm, recipe.min_lr_ratio) == (0.5, 0.2)
    path.write_text("model: 270M\nclip: 0.5\nmax_grad_norm: 0.2\n")
    with pytest.raises(ConfigError, match="unknown recipe field: clip"):
        PretrainRecipe.from_file(path)
    with pytest.raises(ConfigError, match="unknown recipe field: clip"):  # the command line has the new names alone
        PretrainRecipe.from_file(PretrainRecipe.named("270M"), {"clip": "1.0"})
