import mlx.core as mx
import pytest

from mlx_openelm.training.memory import StepShape, step_memory
from mlx_openelm.training.optimizer import Moments


def test_a_trained_number_takes_its_gradient_and_two_moments(tiny_config, tiny_model):
    trained = {"a": mx.zeros((64, 32)), "b": mx.zeros((100,))}
    moments = Moments.zeros(trained)
    numbers = sum(array.size for array in trained.values())
    held = sum(array.nbytes for tree in (trained, moments.first, moments.second) for array in tree.values())
    shape = StepShape(tiny_config, rows=2, length=16, num_logits=32)
    memory = step_memory(shape, weights_bytes=1000, num_trained=numbers)
    assert memory.state_bytes == held  # gradients are as large as what they belong to
    assert memory.peak_bytes == 1000 + held + memory.activation_bytes


@pytest.mark.parametrize("more", [{"rows": 4}, {"length": 32}, {"num_logits": 200, "loss_chunk": 200}])
def test_more_of_anything_takes_more(tiny_config, more):
    usual = {"rows": 2, "length": 16, "num_logits": 32}
    small = step_memory(StepShape(tiny_config, **usual), 0, 10).activation_bytes
    assert step_memory(StepShape(tiny_config, **{**usual, **more}), 0, 10).activation_bytes > small
