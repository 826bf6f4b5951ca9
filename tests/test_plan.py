"""What a run will do, before it does it."""

from dataclasses import replace

import mlx.core as mx
import pytest

from conftest import SMALL_CONFIG
from mlx_openelm.model.design import fit
from mlx_openelm.training import plan as plan_module
from mlx_openelm.training.callback import TrainingCallback
from mlx_openelm.training.memory import fitting_rows, pretraining_memory
from mlx_openelm.training.plan import estimated_plan, plan_of
from mlx_openelm.training.pretrain import Pretraining, prepare_pretraining
from mlx_openelm.training.pretrain_recipe import PretrainRecipe


@pytest.fixture(autouse=True)
def speed(monkeypatch):
    monkeypatch.setattr(plan_module, "_tokens_per_second", lambda recipe: 1000.0)


@pytest.fixture
def data(tmp_path):
    documents = [f"The fox number {n} went to the river and slept until it was {n * n}." for n in range(600)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents))
    return str(tmp_path / "*.txt")


def test_the_plan_of_a_prepared_run_has_the_counts_of_its_corpus(recipe, corpus, tokenizer):
    recipe = replace(recipe, steps=100, validate_every=30, validation_rows=6)
    plan = plan_of(Pretraining(recipe, tokenizer, corpus, steps_taken=75), num_processes=2)
    assert (plan.num_tokens, plan.num_documents) == (corpus.num_tokens, corpus.num_documents)
    assert plan.num_documents + plan.held_out_documents == 300
    assert plan.tokens_of_run == 100 * 4 * 16
    assert plan.epochs == pytest.approx(plan.tokens_of_run / corpus.num_tokens, rel=0.01)
    validations = 2 * 6 * 16  # after steps 90 and 100
    assert plan.held_out_tokens > 6 * 16
    assert plan.seconds == pytest.approx((25 * 4 * 16 + validations / 3) / 2000)
    whole = replace(plan, steps_taken=0, recipe=replace(plan.recipe, validate_first=True))
    assert whole.seconds == pytest.approx((100 * 4 * 16 + 5 * 6 * 16 / 3) / 2000)


def test_an_estimate_reads_little_and_writes_nothing(data, tmp_path, recipe):
    recipe = PretrainRecipe(model=replace(recipe.model, vocab_size=300), data=data)
    before = sorted(tmp_path.rglob("*"))
    plan = estimated_plan(recipe)
    assert sorted(tmp_path.rglob("*")) == before
    assert not plan.is_exact
    assert plan.num_documents + plan.held_out_documents == pytest.approx(600, rel=0.1)
    prepared = prepare_pretraining(recipe, tmp_path / "run", mx.distributed.init(), TrainingCallback())
    exact = plan_of(prepared)
    assert plan.num_tokens == pytest.approx(exact.num_tokens, rel=0.7)
    assert prepared.recipe.train_tokenizer == recipe.model.vocab_size == prepared.tokenizer.vocab_size


def test_a_large_batch_is_split_so_that_its_memory_fits(monkeypatch):
    recipe = PretrainRecipe(model="270M").resolved(10**11, 10**8)
    whole = pretraining_memory(recipe)
    monkeypatch.setattr("mlx_openelm.training.memory.memory_limit_bytes", lambda: 32 << 30)
    rows = fitting_rows(recipe)
    split = pretraining_memory(replace(recipe, micro_batch_size=rows))
    assert 0 < rows < recipe.batch_size
    assert split.peak_bytes <= 16 << 30 < whole.peak_bytes
    assert fitting_rows(PretrainRecipe(model=SMALL_CONFIG).resolved(10**6, 10**3)) == 0


def test_a_large_model_is_timed_by_two_of_its_layers():
    small, large = fit(5_000_000, vocab_size=4096), PretrainRecipe(model="270M").model
    assert plan_module._trial_model(small) == small
    trial = plan_module._trial_model(large)
    assert trial.num_transformer_layers == 2
    assert trial.layer_parameters == large.layer_parameters[7:9]
