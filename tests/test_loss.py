import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from conftest import assert_close, random_model
from mlx_openelm.loss import token_losses

TOKENS = mx.random.randint(0, 400, (2, 21), key=mx.random.key(0))
COUNTED = mx.random.uniform(shape=(2, 20), key=mx.random.key(1)) > 0.2


def plain_losses(model):
    """The same by MLX's own differentiation of the whole logits."""
    logits = model(TOKENS[:, :-1])
    log_z = mx.logsumexp(logits, axis=-1)
    picked = mx.take_along_axis(logits, TOKENS[:, 1:, None], axis=-1)[..., 0]
    zero = mx.zeros(())
    return mx.where(COUNTED, log_z - picked, zero).sum() + 0.3 * mx.where(COUNTED, log_z * log_z, zero).sum()


def losses(model, chunk):
    hidden = model.transformer(TOKENS[:, :-1])
    return token_losses(model, hidden, TOKENS[:, 1:], COUNTED, z_weight=0.3, chunk=chunk)


def test_by_hand():
    class Flat:  # a network whose logits are given
        output_weight = mx.eye(3)

    logits = mx.log(mx.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]])) + 2
    found = token_losses(Flat, logits, mx.array([[1, 0]]), mx.array([[True, True]]))
    assert found[0].item() == pytest.approx(-math.log(0.25) - math.log(0.1), rel=1e-5)
    assert found[1].item() == pytest.approx(2 * 2.0**2, rel=1e-5)
    found = token_losses(Flat, logits, mx.array([[1, 0]]), mx.array([[True, False]]))
    assert found[0].item() == pytest.approx(-math.log(0.25), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 1000])
def test_chunks_give_the_loss_and_gradients_of_the_whole(tiny_config, chunk, tied):
    model = random_model(replace(tiny_config, share_input_output_layers=tied))
    whole, expected = nn.value_and_grad(model, lambda: plain_losses(model))()
    parts, found = nn.value_and_grad(model, lambda: losses(model, chunk).total)()
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
    expected = dict(tree_flatten(expected))
    for name, gradient in tree_flatten(found):
        assert_close(gradient, expected[name], 1e-4 * max(1.0, mx.abs(expected[name]).max().item()))
    values = losses(model, chunk)
    assert (values.cross_entropy + 0.3 * values.z_loss).item() == pytest.approx(whole.item(), rel=1e-5)
