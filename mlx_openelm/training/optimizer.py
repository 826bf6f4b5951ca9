"""AdamW, the learning-rate schedule, and gradient clipping."""

import math
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from ..machine.compiler import compile_function
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
    """Learning rate of a step, counted from 0: linear warm-up, then the schedule, which ends at the final rate.

    A constant rate ends there only with `decay_steps`: warm-up, stable, decay (Hu et al., arXiv:2404.06395).
    """
    largest = recipe.learning_rate
    if step < recipe.warmup:
        return recipe.initial_learning_rate + (largest - recipe.initial_learning_rate) * step / recipe.warmup
    last = largest * recipe.min_lr_ratio
    progress = min(1.0, (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
    constant = min(1.0, max(0, recipe.steps - step) / recipe.decay_steps) if recipe.decay_steps else 1.0
    share = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": constant}
    return last + (largest - last) * share[recipe.schedule]


class AdamW:
    """The optimizer: a step changes one tensor after the other, so that it needs little memory beside the state.

    Weight decay applies to matrices, not to norms.

    Source: Loshchilov and Hutter, arXiv:1711.05101, with the bias correction of Adam, as in PyTorch.
    """

    def __init__(self, recipe: Recipe):
        self._factors = compile_function(partial(_factors, recipe))
        self._parameter = compile_function(partial(_parameter, recipe))
        self._first = compile_function(partial(_first, recipe))
        self._second = compile_function(partial(_second, recipe))

    def begin(
        self, rate: float, parameters: Tensors, gradients: Tensors, moments: Moments, count: mx.array
    ) -> "Update":
        """Compute new parameters; nothing is changed yet.

        Args:
            gradients: sums over `count` tokens or pairs, float32, like all tensors here.
        """
        factors = Factors(*self._factors(mx.array(rate), gradients, moments.steps, count))
        mx.eval(factors)  # frees the squares of the gradients first
        new, total = {}, mx.zeros(())
        for name, p in parameters.items():
            new[name] = self._parameter(factors, p, gradients[name], moments.first[name], moments.second[name])
            total = total + new[name].sum()
            mx.async_eval(new[name], total)
        mx.eval(total)
        return Update(self, new, factors, total, gradients, moments)


class Factors(NamedTuple):
    """Numbers that all tensors of a step share, float32 ()."""

    rate: mx.array
    divisor: mx.array  # of gradients, which are sums
    norm: mx.array  # of all gradients, divided
    clip: mx.array  # reduces the norm to `max_grad_norm`
    unbias1: mx.array  # divides the first moment
    unbias2: mx.array


class Update:
    """A step of the optimizer that has begun: the new parameters are known, and the moments are still the old ones.

    Attributes:
        parameters: new parameters.
        norm: norm of the gradient before clipping.
        total: sum of all new parameters; not finite if one of them is not.
    """

    def __init__(
        self,
        optimizer: AdamW,
        parameters: Tensors,
        factors: Factors,
        total: mx.array,
        gradients: Tensors,
        moments: Moments,
    ):
        self.parameters = parameters
        self.norm: float = factors.norm.item()  # type: ignore[assignment]
        self.total: float = total.item()  # type: ignore[assignment]
        self._optimizer, self._factors = optimizer, factors
        self._gradients, self._old = gradients, moments
        self._first: Tensors = {}
        self._second: Tensors = {}

    @property
    def is_finite(self) -> bool:
        """Whether the gradient and all new parameters are finite."""
        return math.isfinite(self.norm) and math.isfinite(self.total)

    def finish(self) -> Moments:
        """The new moments; the old ones and the gradients are removed from their dictionaries, to free their memory.

        Drop the old parameters first. After an interruption, a second call completes what is left.
        """
        before: list[mx.array] = []
        for name in self.parameters:
            for new, old, compute in (
                (self._first, self._old.first, self._optimizer._first),
                (self._second, self._old.second, self._optimizer._second),
            ):
                if name not in new:
                    moment = compute(self._factors, old[name], self._gradients[name])
                    mx.async_eval(moment)
                    mx.eval(before)  # not further ahead than one tensor, because each needs memory
                    before = [moment]
                    new[name] = moment
                old.pop(name, None)
            self._gradients.pop(name, None)
        steps = self._old.steps + 1
        mx.eval(before, steps)
        return Moments(self._first, self._second, steps)


def _factors(recipe: Recipe, rate: mx.array, gradients: Tensors, steps: mx.array, count: mx.array) -> Factors:
    norm = mx.sqrt(sum((mx.sum(mx.square(g / count)) for g in gradients.values()), mx.zeros(())))
    clip = mx.minimum(1.0, recipe.max_grad_norm / (norm + 1e-6)) if recipe.max_grad_norm else mx.ones(())
    taken = (steps + 1).astype(mx.float32)
    return Factors(rate, count, norm, clip, 1 - mx.power(recipe.beta1, taken), 1 - mx.power(recipe.beta2, taken))


def _first(recipe: Recipe, factors: Factors, moment: mx.array, gradient: mx.array) -> mx.array:
    return recipe.beta1 * moment + (1 - recipe.beta1) * _clipped(factors, gradient)


def _second(recipe: Recipe, factors: Factors, moment: mx.array, gradient: mx.array) -> mx.array:
    g = _clipped(factors, gradient)
    return recipe.beta2 * moment + (1 - recipe.beta2) * g * g


def _parameter(
    recipe: Recipe, factors: Factors, p: mx.array, gradient: mx.array, first: mx.array, second: mx.array
) -> mx.array:
    factors = Factors(*factors)  # a compiled function gets a plain tuple
    first = _first(recipe, factors, first, gradient) / factors.unbias1
    second = _second(recipe, factors, second, gradient) / factors.unbias2
    if p.ndim > 1:
        p = p * (1 - factors.rate * recipe.weight_decay)
    return p - factors.rate * first / (mx.sqrt(second) + recipe.eps)


def _clipped(factors: Factors, gradient: mx.array) -> mx.array:
    factors = Factors(*factors)
    return gradient / factors.divisor * factors.clip
