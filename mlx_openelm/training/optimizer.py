"""AdamW, the learning-rate schedule, and gradient clipping."""

import math
from typing import NamedTuple

import mlx.core as mx

from .recipe import Recipe

Tensors = dict[str, mx.array]


class Moments(NamedTuple):
    """AdamW's state: running means of the gradients and of their squares, float32, and the number of steps."""

    first: Tensors
    second: Tensors
    steps: mx.array  # () int32

    @classmethod
    def zeros(cls, parameters: Tensors) -> "Moments":
        """The state before the first step."""
        return cls(
            {name: mx.zeros_like(p) for name, p in parameters.items()},
            {name: mx.zeros_like(p) for name, p in parameters.items()},
            mx.array(0, mx.int32),
        )


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then the schedule, which ends at the final rate."""
    largest = recipe.learning_rate
    if step < recipe.warmup:
        return recipe.initial_learning_rate + (largest - recipe.initial_learning_rate) * step / recipe.warmup
    last = largest * recipe.min_lr_ratio
    progress = min(1.0, (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
    share = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return last + (largest - last) * share[recipe.schedule]


def clipped(gradients: Tensors, largest: float) -> tuple[Tensors, mx.array]:
    """Gradients scaled down if their global norm is above `largest` (0: never), and that norm, ()."""
    norm = mx.sqrt(sum((mx.sum(mx.square(g)) for g in gradients.values()), mx.zeros(())))
    if not largest:
        return gradients, norm
    factor = mx.minimum(1.0, largest / (norm + 1e-6))
    return {name: g * factor for name, g in gradients.items()}, norm


def adamw(
    recipe: Recipe, rate: mx.array, parameters: Tensors, gradients: Tensors, moments: Moments
) -> tuple[Tensors, Moments]:
    """Parameters and moments after a step, all float32; weight decay applies to matrices, not to norms.

    Source: Loshchilov and Hutter, arXiv:1711.05101, with the bias correction of Adam, as in PyTorch.
    """
    taken = moments.steps + 1
    steps = taken.astype(mx.float32)
    unbias1, unbias2 = 1 - mx.power(recipe.beta1, steps), 1 - mx.power(recipe.beta2, steps)
    new: Tensors = {}
    first: Tensors = {}
    second: Tensors = {}
    for name, p in parameters.items():
        g = gradients[name]
        first[name] = recipe.beta1 * moments.first[name] + (1 - recipe.beta1) * g
        second[name] = recipe.beta2 * moments.second[name] + (1 - recipe.beta2) * g * g
        if p.ndim > 1:
            p = p * (1 - rate * recipe.weight_decay)
        new[name] = p - rate * (first[name] / unbias1) / (mx.sqrt(second[name] / unbias2) + recipe.eps)
    return new, Moments(first, second, taken)
