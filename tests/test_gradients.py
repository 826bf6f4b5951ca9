from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conftest import assert_close, random_model
from mlx_openelm.data.batch import TokenBatch, make_batch
from mlx_openelm.training.gradients import gradients_of
from mlx_openelm.training.loss import CrossEntropy
from mlx_openelm.training.pretrain import fresh_trainer


def gradients(recipe, corpus):
    trainer = fresh_trainer(recipe, corpus)
    sums, found = trainer._gradients(trainer.parameters, make_batch(trainer.data.step(0)))
    return np.array(sums), found


@pytest.mark.parametrize("packing", ["stream", "documents", "rows"])
def test_gradients_are_those_of_finite_differences(recipe, corpus, packing):
    trainer = fresh_trainer(replace(recipe, packing=packing, z_loss=0.01), corpus)
    batch = make_batch(trainer.data.step(0))
    _, found = trainer._gradients(trainer.parameters, batch)

    def total(parameters):
        sums = trainer._losses(parameters, batch)[0].tolist()
        return sums[0] + 0.01 * sums[1]

    for number, (name, parameter) in enumerate(trainer.parameters.items()):
        direction = mx.random.normal(parameter.shape, key=mx.random.key(number))
        direction = direction / mx.linalg.norm(direction)
        step = 0.02
        values = [total({**trainer.parameters, name: parameter + sign * step * direction}) for sign in (1, -1)]
        measured = (values[0] - values[1]) / (2 * step)
        computed = mx.sum(found[name] * direction).item()
        assert computed == pytest.approx(measured, rel=0.02, abs=0.03), name


@pytest.mark.parametrize("packing", ["stream", "documents", "rows"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("change", [{"loss_chunk": 5}, {"gradient_checkpointing": True}], ids=["chunks", "layers"])
def test_memory_savers_change_no_gradient(recipe, corpus, change, tied, packing):
    recipe = replace(recipe, packing=packing, model=replace(recipe.model, share_input_output_layers=tied))
    sums, expected = gradients(recipe, corpus)
    other, found = gradients(replace(recipe, **change), corpus)
    assert other == pytest.approx(sums, rel=1e-5)
    for name in expected:
        assert_close(found[name], expected[name], 1e-3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_in_bfloat16_the_gradient_of_a_frequent_token_loses_no_bits(recipe, tied):
    """A sum of 512 addends in bfloat16 would keep 8 bits, and differ with the order. So both ways sum in float32."""
    config = replace(recipe.model, share_input_output_layers=tied, max_context_length=512)
    parameters = dict(tree_flatten(random_model(config).parameters()))
    tokens = np.random.default_rng(0).integers(3, 400, (1, 513))
    tokens[:, :-1] = 7
    batch = make_batch(TokenBatch(tokens, np.zeros_like(tokens), np.ones((1, 512), bool)))
    found = []
    for layer_by_layer in (False, True):
        model = random_model(config)
        model.set_dtype(mx.bfloat16)
        gradients = gradients_of(model, CrossEntropy(), mx.bfloat16, layer_by_layer)
        found.append(gradients(parameters, batch)[1]["transformer.token_embeddings.weight"])
    assert mx.linalg.norm(found[1][7]).item() > 1
    assert_close(found[0][7], found[1][7], 1e-5 * mx.linalg.norm(found[1][7]).item())


def test_layer_by_layer_the_next_part_is_prepared_before_the_last_one_is_complete(recipe, corpus, monkeypatch):
    """The device would be idle while the host prepares a layer that it could have prepared before."""
    trainer = fresh_trainer(replace(recipe, gradient_checkpointing=True), corpus)
    batch, backward = make_batch(trainer.data.step(0)), trainer._gradients
    events = []

    def noted(event, function):
        return lambda *arguments: events.append(event) or function(*arguments)

    for name in ("_forward", "_backward"):
        setattr(backward, name, [noted(f"{name} {n}", run) for n, run in enumerate(getattr(backward, name))])
    backward._head = noted("_head", backward._head)
    monkeypatch.setattr(mx, "async_eval", noted("start", mx.async_eval))
    monkeypatch.setattr(mx, "eval", noted("wait", mx.eval))
    backward(trainer.parameters, batch)
    assert events[:6] == ["_forward 0", "start", "wait", "_forward 1", "start", "wait"]  # for nothing, for layer 0
    assert events[6:12] == ["_head", "wait", "start", "_backward 1", "wait", "start"]
    assert events[12:15] == ["_backward 0", "wait", "start"]
    assert events[15:] == ["wait", "start", "wait"]  # the embedding
