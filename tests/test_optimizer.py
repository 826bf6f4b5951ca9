import math
from dataclasses import replace

import mlx.core as mx
import pytest

from conftest import assert_close
from mlx_openelm.training.optimizer import Moments, adamw, clipped, learning_rate
from mlx_openelm.training.pretrain import PretrainRecipe


@pytest.fixture
def recipe(tiny_config):
    return PretrainRecipe(
        model=tiny_config, steps=110, warmup_steps=10, learning_rate=1.0, initial_learning_rate=0.0, sequence_length=8
    )


@pytest.mark.parametrize(("schedule", "expected"), [("linear", 0.1 + 0.9 * 0.75), ("constant", 1.0)])
def test_other_schedules_by_hand(recipe, schedule, expected):
    recipe = replace(recipe, schedule=schedule)
    assert learning_rate(recipe, 5) == pytest.approx(0.5)
    assert learning_rate(recipe, 35) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (35, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)],
)
def test_learning_rate_by_hand(recipe, step, expected):
    assert learning_rate(recipe, step) == pytest.approx(expected)


def test_first_steps_of_adamw_by_hand(recipe):
    """With one and the same gradient the corrected moments are g and g^2: a step is the rate, whatever g is."""
    recipe = replace(recipe, weight_decay=0.1)
    parameters = {"matrix": mx.array([[1.0, -2.0]]), "norm": mx.array([1.0, 1.0])}
    gradients = {"matrix": mx.array([[0.5, -3.0]]), "norm": mx.array([1e-3, 0.0])}
    moments = Moments.zeros(parameters)
    for step in (1, 2):
        parameters, moments = adamw(recipe, mx.array(0.01), parameters, gradients, moments)
        assert moments.steps.item() == step
    decay = 1 - 0.01 * 0.1
    matrix = [((1.0 * decay - 0.01) * decay - 0.01), ((-2.0 * decay + 0.01) * decay + 0.01)]
    assert_close(parameters["matrix"], mx.array([matrix]), 1e-6)
    assert_close(parameters["norm"], mx.array([0.98, 1.0]), 1e-6)  # norms do not decay; no gradient, no change


@pytest.mark.torch
def test_adamw_is_pytorchs(recipe):
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.tensor([[0.3, -0.7], [1.1, 0.2]]))
    other = torch.optim.AdamW([p], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    parameters = {"m": mx.array(p.detach().numpy())}
    moments = Moments.zeros(parameters)
    for step in range(5):
        gradient = torch.tensor([[0.1, -0.2], [0.3, step * 0.1]])
        p.grad = gradient.clone()
        other.step()
        parameters, moments = adamw(recipe, mx.array(0.02), parameters, {"m": mx.array(gradient.numpy())}, moments)
    assert_close(parameters["m"], mx.array(p.detach().numpy()), 1e-6)


def test_clipping_keeps_the_direction():
    gradients = {"a": mx.array([3.0]), "b": mx.array([[4.0]])}
    short, norm = clipped(gradients, 1.0)
    assert norm.item() == pytest.approx(5.0)
    assert short["a"].item() == pytest.approx(0.6, rel=1e-5)
    assert clipped(gradients, 10.0)[0]["b"].item() == pytest.approx(4.0)
    assert clipped(gradients, 0.0)[0]["b"].item() == pytest.approx(4.0)
