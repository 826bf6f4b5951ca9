"""The models that come with the package: they are there, small, and say something without a network."""

import json
import re

import pytest

from conftest import run
from mlx_openelm import SamplingConfig, generate, load
from mlx_openelm.hub import BUILT_IN_CHAT_MODEL, BUILT_IN_MODEL, BUILT_IN_MODELS, model_folder
from mlx_openelm.training.pretrain import RECIPES, PretrainRecipe

FOLDER = model_folder(BUILT_IN_MODEL)


@pytest.fixture(scope="module")
def built_in():
    return load()


@pytest.mark.parametrize("name", BUILT_IN_MODELS)
def test_each_is_small_enough_for_a_wheel(name):
    assert sum(path.stat().st_size for path in model_folder(name).iterdir()) < 7_500_000


@pytest.mark.parametrize("name", BUILT_IN_MODELS)
def test_each_has_a_card_and_the_attribution_of_its_corpus(name):
    card = (model_folder(name) / "README.md").read_text(encoding="utf-8")
    assert f"# {name}\n" in card
    for file in re.findall(r"\]\((?!http)([^)#]+)", card):
        assert (model_folder(name) / file).exists(), file


def test_only_the_chat_model_has_a_chat_template():
    assert {name: load(name)[1].has_chat_template for name in BUILT_IN_MODELS} == {
        BUILT_IN_MODEL: False,
        BUILT_IN_CHAT_MODEL: True,
    }


def test_it_is_what_its_recipe_says(built_in):
    model, tokenizer = built_in
    recipe = PretrainRecipe.from_file(RECIPES / "tiny.yaml")
    assert model.config == recipe.model
    assert tokenizer.vocab_size == recipe.train_tokenizer == 4096
    lines = [json.loads(line) for line in (FOLDER / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == recipe.steps
    assert lines[-1]["validation_loss"] < 3.7


def test_its_card_names_licences_and_losses():
    card = (FOLDER / "README.md").read_text()
    for words in ("CDLA-Sharing-1.0", "CC BY", "public domain", "nats per token", "5-gram", "bits per byte"):
        assert words.lower() in card.lower(), words
    assert len(re.findall(r"^\| \d+ \| \*\*", card, re.MULTILINE)) == 20
    assert (FOLDER / "ATTRIBUTION_african_storybook.md").exists()


def test_it_predicts_simple_english(built_in):
    """1.9 nats a token; 8.3 is chance."""
    import mlx.core as mx

    model, tokenizer = built_in
    text = "Once upon a time, there was a little girl named Lily. She loved to play with her toys in the park."
    tokens = mx.array([tokenizer.encode(text)])
    logits = model(tokens[:, :-1])
    picked = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    assert (mx.logsumexp(logits, axis=-1) - picked).mean().item() < 2.0


def test_greedy_text_is_english(built_in):
    text = generate(*built_in, "Once upon a time there was", max_tokens=60)
    words = re.findall(r"[a-z]+", text.lower())
    common = {"a", "the", "she", "he", "to", "and", "was", "with", "her", "his", "in", "it", "they", "one", "day"}
    assert len(words) > 30
    assert sum(word in common for word in words) > len(words) / 4


def test_sampled_text_repeats_with_its_seed(built_in):
    sampling = SamplingConfig(temperature=0.8, seed=3)
    one, other = (generate(*built_in, "The fox", max_tokens=20, sampling=sampling) for _ in range(2))
    assert one == other


def test_it_is_the_default_and_needs_no_network():
    status, out, err = run("generate", "--prompt", "Once upon a time there was", "-n", 20, HF_HUB_OFFLINE="1")
    assert (status, err) == (0, "")
    assert out.startswith(" a ")
    assert "4,788,224" in run("info")[1]
    assert run("info", "openelm-tiny")[1] == run("info")[1]


@pytest.mark.parametrize("name", BUILT_IN_MODELS)
def test_a_folder_of_the_same_name_comes_first(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_folder(name).resolve() == tmp_path / name
