from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from conftest import assert_close
from mlx_openelm.data.batch import make_batch
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
