"""The model that comes with the package: it is there, small, and says something without a network."""

import json
import re

import pytest

import mlx_openelm
from conftest import run
from mlx_openelm import SamplingConfig, generate, load
from mlx_openelm.hub import BUILT_IN_MODEL, model_folder
from mlx_openelm.training.pretrain_recipe import RECIPES, PretrainRecipe

FOLDER = model_folder(BUILT_IN_MODEL)


@pytest.fixture(scope="module")
def built_in():
    return load()


def test_it_is_small_enough_for_a_wheel():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 7_000_000


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
    assert "6,067,456" in run("info")[1]
    assert run("info", "openelm-tiny")[1] == run("info")[1]


def test_a_folder_of_its_name_goes_before(tmp_path, monkeypatch):
    (tmp_path / BUILT_IN_MODEL).mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_folder(BUILT_IN_MODEL).resolve() == tmp_path / BUILT_IN_MODEL
    assert mlx_openelm.hub.model_folder("openelm-tiny") == model_folder(BUILT_IN_MODEL)
