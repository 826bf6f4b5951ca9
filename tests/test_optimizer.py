import math
from dataclasses import replace

import mlx.core as mx
import pytest

from conftest import assert_close
from mlx_openelm.errors import ConfigError
from mlx_openelm.training.optimizer import AdamW, Moments, learning_rate
from mlx_openelm.training.pretrain_recipe import PretrainRecipe


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


@pytest.mark.parametrize(("step", "expected"), [(5, 0.5), (90, 1.0), (100, 0.1 + 0.9 / 2), (110, 0.1)])
def test_a_constant_rate_falls_over_the_last_steps(recipe, step, expected):
    recipe = replace(recipe, schedule="constant", decay_steps=20)
    assert learning_rate(recipe, step) == pytest.approx(expected)


def test_only_a_constant_rate_has_an_end_of_its_own(recipe):
    with pytest.raises(ConfigError, match="decay_steps needs the constant schedule; got cosine"):
        replace(recipe, decay_steps=20)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (35, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)],
)
def test_learning_rate_by_hand(recipe, step, expected):
    assert learning_rate(recipe, step) == pytest.approx(expected)


def updated(recipe, rate, parameters, gradients, moments, count=1.0):
    """New parameters and moments."""
    update = AdamW(recipe).begin(rate, parameters, dict(gradients), moments, mx.array(count))
    return update.parameters, update.finish()


def test_first_steps_of_adamw_by_hand(recipe):
    """With one and the same gradient the corrected moments are g and g^2: a step is the rate, whatever g is."""
    recipe = replace(recipe, weight_decay=0.1, max_grad_norm=0.0)
    parameters = {"matrix": mx.array([[1.0, -2.0]]), "norm": mx.array([1.0, 1.0])}
    gradients = {"matrix": mx.array([[0.5, -3.0]]), "norm": mx.array([1e-3, 0.0])}
    moments = Moments.zeros(parameters)
    for step in (1, 2):
        parameters, moments = updated(recipe, 0.01, parameters, gradients, moments)
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
        gradients = {"m": mx.array(gradient.numpy())}
        parameters, moments = updated(recipe, 0.02, parameters, gradients, moments)
    assert_close(parameters["m"], mx.array(p.detach().numpy()), 1e-6)


@pytest.mark.parametrize(("largest", "factor"), [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_clipping_keeps_the_direction(recipe, largest, factor):
    """The first moment shows the gradient; sums over two tokens are divided by two."""
    recipe = replace(recipe, max_grad_norm=largest, beta1=0.0)
    parameters = {"a": mx.array([0.0]), "b": mx.array([[0.0]])}
    gradients = {"a": mx.array([6.0]), "b": mx.array([[8.0]])}
    update = AdamW(recipe).begin(0.01, parameters, gradients, Moments.zeros(parameters), mx.array(2.0))
    assert update.norm == pytest.approx(5.0)
    first = update.finish().first
    assert first["a"].item() == pytest.approx(3.0 * factor, rel=1e-5)
    assert first["b"].item() == pytest.approx(4.0 * factor, rel=1e-5)


@pytest.fixture
def state():
    """Parameters, gradients and moments of some steps taken."""
    shapes = {"matrix": (300, 200), "other": (200, 200), "norm": (200,)}
    keys = iter(mx.random.split(mx.random.key(0), 12))
    parameters, gradients, first, second = (
        {name: mx.random.normal(shape, key=next(keys)) for name, shape in shapes.items()} for _ in range(4)
    )
    moments = Moments(first, {name: mx.square(v) for name, v in second.items()}, mx.array(3, mx.int32))
    mx.eval(parameters, gradients, moments)
    return parameters, gradients, moments


def copied(tensors):
    return {name: mx.array(array) for name, array in tensors.items()}


def test_an_update_needs_20_bytes_a_parameter(recipe):
    """16 are the state before: parameter, gradient and two moments."""
    optimizer, size = AdamW(recipe), 8 * 300 * 300
    parameters = {f"matrix {n}": mx.random.normal((300, 300), key=mx.random.key(n)) for n in range(8)}
    moments = Moments.zeros(parameters)
    mx.eval(moments)
    for _ in range(2):  # the first step traces
        gradients = copied(parameters)
        mx.eval(parameters, gradients)
        mx.synchronize()
        mx.reset_peak_memory()
        others = mx.get_active_memory() - 16 * size
        update = optimizer.begin(0.01, parameters, gradients, moments, mx.array(2.0))
        parameters = update.parameters
        moments = update.finish()
        assert (mx.get_peak_memory() - others) / size < 20.2


@pytest.mark.parametrize("calls", range(1, 13))
def test_an_interrupted_update_is_completed_by_a_second_call(recipe, state, calls, monkeypatch):
    parameters, gradients, moments = state
    untouched = Moments(copied(moments.first), copied(moments.second), moments.steps)
    expected = updated(recipe, 0.01, parameters, copied(gradients), untouched)[1]
    update = AdamW(recipe).begin(0.01, parameters, gradients, moments, mx.array(1.0))
    left, evaluate = [calls], mx.eval

    def interrupted(*arrays):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", interrupted)
    monkeypatch.setattr(mx, "async_eval", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update.finish()
        assert calls > 13, "there were fewer calls"
    found = update.finish()
    for new, whole in ((found.first, expected.first), (found.second, expected.second)):
        assert list(new) == list(whole)
        assert all(mx.array_equal(new[name], whole[name]) for name in whole)
    assert found.steps.item() == 4
    assert not gradients
    assert not moments.first


@pytest.mark.parametrize("change", [{"learning_rate": 1e39}, {"gradients": math.inf}, {"eps": 0.0}])
def test_what_is_not_finite_is_known_before_anything_changes(recipe, state, change):
    parameters, gradients, moments = state
    if "gradients" in change:
        gradients["other"] = gradients["other"] + change["gradients"]
    if "eps" in change:  # a moment of zero is divided by zero
        recipe = replace(recipe, eps=0.0)
        gradients["norm"] = moments.first["norm"] = moments.second["norm"] = mx.zeros((200,))
    before = [copied(tensors) for tensors in (parameters, moments.first, moments.second)]
    update = AdamW(recipe).begin(change.get("learning_rate", 0.01), parameters, gradients, moments, mx.array(1.0))
    assert not update.is_finite
    for old, tensors in zip(before, (parameters, moments.first, moments.second), strict=True):
        assert all(mx.array_equal(old[name], tensors[name]) for name in old)
