"""Gradients of a training step: of the whole network at once, or layer by layer with little memory.

Layer by layer, only what goes from layer to layer is kept, each layer is computed a second time on the way back, and
its gradients are evaluated before the next one's turn: no more than one layer's activations exist at a time.
Checkpointing within one graph promises the same, but leaves the order to MLX, and recomputed activations wait there
until weight gradients are evaluated.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from .device import DTYPES
from .loss import token_losses
from .model import OpenELM, segment_mask
from .optimizer import Tensors
from .recipe import Recipe

Gradients = Callable[[Tensors, mx.array, mx.array], tuple[mx.array, Tensors]]

_LAYERS = "transformer.layers."
_EMBEDDING = "transformer.token_embeddings.weight"


def gradients_of(model: OpenELM, recipe: Recipe) -> Gradients:
    """A function of parameters (float32), ids (B, L + 1) and segments (B, L + 1), with a row's documents numbered.

    It gives the sums of cross-entropy, log(Z)^2 and counted tokens, float32 (3,), and the gradients of the sum that the
    recipe trains, float32. Both ways of `recompute_layers` give the same.
    """
    return LayerwiseBackward(model, recipe) if recipe.recompute_layers else mx.compile(partial(_at_once, model, recipe))


def batch_losses(
    model: OpenELM, recipe: Recipe, parameters: Tensors, tokens: mx.array, segments: mx.array
) -> tuple[mx.array, mx.array]:
    """The sums (3,), and the weighted sum to differentiate, ()."""
    _set(model, recipe, parameters)
    within = segments[:, :-1] if recipe.packing == "documents" else None
    return _losses(model, recipe, model.transformer(tokens[:, :-1], segments=within), tokens, segments)


class LayerwiseBackward:
    """The way back through a network, one layer at a time."""

    def __init__(self, model: OpenELM, recipe: Recipe):
        self._recipe = recipe
        self._model = model
        self._layers = range(len(model.transformer.layers))
        self._forward = [mx.compile(partial(self._run_layer, layer)) for layer in self._layers]
        self._backward = [mx.compile(partial(self._layer_gradients, layer)) for layer in self._layers]
        self._head = mx.compile(mx.value_and_grad(self._run_head, argnums=(0, 1)))
        self._embedding_gradient = mx.compile(mx.grad(self._run_embedding))

    def __call__(self, parameters: Tensors, tokens: mx.array, segments: mx.array) -> tuple[mx.array, Tensors]:
        """Sums and gradients, evaluated; see `gradients_of`."""
        masks = [segment_mask(segments[:, :-1])] if self._recipe.packing == "documents" else []
        own = [_named(parameters, f"{_LAYERS}{layer}.") for layer in self._layers]
        rest = {name: p for name, p in parameters.items() if not name.startswith(_LAYERS)}

        x = parameters[_EMBEDDING].astype(DTYPES[self._recipe.dtype])[tokens[:, :-1]]
        inputs = []
        for layer in self._layers:
            inputs.append(x)
            x = self._forward[layer](own[layer], x, masks)
            mx.eval(x)
        (_, sums), (of_rest, of_x) = self._head(rest, x, tokens, segments)
        mx.eval(sums, of_rest, of_x)
        found = dict(of_rest)
        for layer in reversed(self._layers):
            of_own, of_x = self._backward[layer](own[layer], inputs.pop(), masks, of_x)
            mx.eval(of_own, of_x)
            found.update({f"{_LAYERS}{layer}.{name}": gradient for name, gradient in of_own.items()})
        of_embedding = self._embedding_gradient(parameters[_EMBEDDING], tokens, of_x)
        found[_EMBEDDING] = found[_EMBEDDING] + of_embedding
        mx.eval(found[_EMBEDDING])
        return sums, {name: found[name] for name in parameters}

    def _run_layer(self, layer: int, own: Tensors, x: mx.array, masks: list[mx.array]) -> mx.array:
        module = self._model.transformer.layers[layer]
        _set(module, self._recipe, own)
        return module(x, None, *masks)

    def _layer_gradients(
        self, layer: int, own: Tensors, x: mx.array, masks: list[mx.array], of_output: mx.array
    ) -> tuple[Tensors, mx.array]:
        """Gradients of the layer's parameters and input, from that of its output."""

        def product(own: Tensors, x: mx.array) -> mx.array:
            return (self._run_layer(layer, own, x, masks) * of_output).sum()

        return mx.grad(product, argnums=(0, 1))(own, x)

    def _run_head(self, rest: Tensors, x: mx.array, tokens: mx.array, segments: mx.array) -> tuple[mx.array, mx.array]:
        _set(self._model, self._recipe, rest)
        sums, total = _losses(self._model, self._recipe, self._model.transformer.norm(x), tokens, segments)
        return total, sums

    def _run_embedding(self, weight: mx.array, tokens: mx.array, of_x: mx.array) -> mx.array:
        return (weight[tokens[:, :-1]] * of_x.astype(mx.float32)).sum()


def _at_once(
    model: OpenELM, recipe: Recipe, parameters: Tensors, tokens: mx.array, segments: mx.array
) -> tuple[mx.array, Tensors]:
    def total(parameters: Tensors) -> tuple[mx.array, mx.array]:
        sums, total = batch_losses(model, recipe, parameters, tokens, segments)
        return total, sums

    (_, sums), gradients = mx.value_and_grad(total)(parameters)
    return sums, gradients


def _losses(
    model: OpenELM, recipe: Recipe, hidden: mx.array, tokens: mx.array, segments: mx.array
) -> tuple[mx.array, mx.array]:
    counted = segments[:, 1:] >= 0
    if recipe.packing == "documents":  # BOS of the next document does not follow from this one
        counted = counted & (segments[:, 1:] == segments[:, :-1])
    losses = token_losses(model, hidden, tokens[:, 1:], counted, z_weight=recipe.z_loss, chunk=recipe.loss_chunk)
    return mx.stack([losses.cross_entropy, losses.z_loss, counted.sum().astype(mx.float32)]), losses.total


def _set(module: Any, recipe: Recipe, parameters: Mapping[str, mx.array]) -> None:
    """Give a module its parameters, in the type to compute in."""
    dtype = DTYPES[recipe.dtype]
    module.update(tree_unflatten([(name, p.astype(dtype)) for name, p in parameters.items()]))


def _named(parameters: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
