import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from conftest import assert_close, random_model
from mlx_openelm.training.loss import CrossEntropy, at_positions, token_logprobs, token_losses

TOKENS = mx.random.randint(0, 400, (2, 21), key=mx.random.key(0))
COUNTED = mx.random.uniform(shape=(2, 20), key=mx.random.key(1)) > 0.2


def plain_losses(model):
    """The same by MLX's own differentiation of the whole logits."""
    logits = model(TOKENS[:, :-1])
    log_z = mx.logsumexp(logits, axis=-1)
    picked = mx.take_along_axis(logits, TOKENS[:, 1:, None], axis=-1)[..., 0]
    zero = mx.zeros(())
    return mx.where(COUNTED, log_z - picked, zero).sum() + 0.3 * mx.where(COUNTED, log_z * log_z, zero).sum()


def losses(model, chunk, **options):
    hidden = model.transformer(TOKENS[:, :-1]).reshape(40, -1)
    weights = COUNTED.reshape(-1).astype(mx.float32)
    return token_losses(model, hidden, TOKENS[:, 1:].reshape(-1), weights, z_weight=0.3, chunk=chunk, **options)


def test_by_hand():
    class Flat:  # a network whose logits are given
        output_weight = mx.eye(3)

    logits = mx.log(mx.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])) + 2
    found = token_losses(Flat, logits, mx.array([1, 0]), mx.array([1.0, 1.0]))
    assert found[0].item() == pytest.approx(-math.log(0.25) - math.log(0.1), rel=1e-5)
    assert found[1].item() == pytest.approx(2 * 2.0**2, rel=1e-5)
    found = token_losses(Flat, logits, mx.array([1, 0]), mx.array([1.0, 0.0]))
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


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_frozen_output_gives_the_same_gradients_to_what_is_below(tiny_config, chunk, bits, tied):
    model = random_model(replace(tiny_config, share_input_output_layers=tied))
    if bits:
        nn.quantize(model, 32, bits)
    model.freeze()
    model.transformer.norm.unfreeze()
    model.transformer.layers[0].attn_norm.unfreeze()
    whole, expected = nn.value_and_grad(model, lambda: plain_losses(model))()
    parts, found = nn.value_and_grad(model, lambda: losses(model, chunk, trains_output=False).total)()
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
    expected = dict(tree_flatten(expected))
    assert len(expected) == 2
    for name, gradient in tree_flatten(found):
        assert_close(gradient, expected[name], 1e-4 * max(1.0, mx.abs(expected[name]).max().item()))


def test_log_probabilities_are_those_of_the_whole(tiny_model):
    hidden = tiny_model.transformer(TOKENS[:, :-1]).reshape(40, -1)
    targets = TOKENS[:, 1:].reshape(-1)
    expected = nn.losses.cross_entropy(tiny_model.logits(hidden), targets)
    assert_close(-token_logprobs(tiny_model, hidden, targets, chunk=7), expected, 1e-4)


def test_hidden_states_are_those_of_the_scored_positions():
    hidden = mx.arange(24).reshape(2, 4, 3)
    assert at_positions(hidden, {}).tolist() == hidden.reshape(8, 3).tolist()
    assert at_positions(hidden, {"positions": mx.array([0, 5])}).tolist() == [[0, 1, 2], [15, 16, 17]]


def test_cross_entropy_reports_its_sums_and_their_count(tiny_model):
    hidden = tiny_model.transformer(TOKENS[:, :-1])
    batch = {
        "positions": mx.array([3, 22, 0]),
        "targets": mx.array([5, 7, 9]),
        "weights": mx.array([1.0, 1.0, 0.0]),
    }
    sums, total = CrossEntropy(0.25)(tiny_model, hidden, batch, True)
    logprobs = token_logprobs(tiny_model, hidden.reshape(40, -1)[mx.array([3, 22])], mx.array([5, 7]))
    assert sums[0].item() == pytest.approx(-logprobs.sum().item(), rel=1e-5)
    assert sums[2].item() == 2.0
    assert total.item() == pytest.approx((sums[0] + 0.25 * sums[1]).item(), rel=1e-5)
    assert CrossEntropy().z_weight == 0.0
    assert CrossEntropy.names == ("loss", "z_loss")
