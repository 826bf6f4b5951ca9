"""Gradients of a training step: of the whole network at once, or layer by layer with less memory.

Layer by layer, only the inputs of the layers are kept. The backward pass recomputes each layer and evaluates its
gradients before it starts the next, so the activations of only one layer exist at a time (in the forward pass, where
they are few, those of two). Checkpointing within one
graph promises the same, but leaves the order to MLX, which keeps recomputed activations until it evaluates the weight
gradients.

The trained parameters are a subset of the network's, given by name. The others stay in the network with their own
dtype, and no gradient is computed below the lowest trained layer.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..data.batch import Batch
from ..machine.compiler import compile_function
from ..model.forward_context import ForwardContext, segment_mask
from ..model.lora import MAGNITUDE, invalidate_scales, set_dropout_keys
from ..model.openelm import OpenELM
from .loss import Objective
from .optimizer import Tensors

Gradients = Callable[[Tensors, Batch], tuple[mx.array, Tensors]]

_LAYERS = "transformer.layers."
_EMBEDDING = "transformer.token_embeddings."


def gradients_of(model: OpenELM, objective: Objective, dtype: mx.Dtype, gradient_checkpointing: bool) -> Gradients:
    """A function of the trained parameters (float32) and a batch that returns sums and gradients.

    The sums are those of the objective, float32 (K,); the gradients are those of the sum to differentiate, float32 by
    name. A batch may contain a random key as `dropout`. The result does not depend on `gradient_checkpointing`.

    Args:
        dtype: dtype to compute in.
    """
    if gradient_checkpointing:
        return LayerwiseBackward(model, objective, dtype)
    return compile_function(partial(_at_once, model, objective, dtype))


def batch_losses(
    model: OpenELM, objective: Objective, dtype: mx.Dtype, parameters: Tensors, batch: Batch
) -> tuple[mx.array, mx.array]:
    """The objective's sums, float32 (K,), and the sum to differentiate, ()."""
    set_parameters(model, dtype, parameters)
    embeddings, of_embedding = model.transformer.token_embeddings, _named(parameters, _EMBEDDING)
    layers = model.transformer.layers
    keys = _dropout_keys(batch, len(layers))
    for place, module in enumerate((*layers, embeddings)):
        set_dropout_keys(module, *keys[place : place + 1])
    set_parameters(embeddings, mx.float32, of_embedding)  # see `LayerwiseBackward._embedded`
    hidden = model.transformer(batch["inputs"], segments=batch.get("segments"))
    set_parameters(embeddings, dtype, of_embedding)  # a tied output computes in `dtype`
    return objective(model, hidden, batch, _trains_output(model, parameters))


class LayerwiseBackward:
    """The backward pass of a network, one layer at a time."""

    def __init__(self, model: OpenELM, objective: Objective, dtype: mx.Dtype):
        self._model = model
        self._objective = objective
        self._dtype = dtype
        self._layers = range(len(model.transformer.layers))
        self._embed = compile_function(self._embedded)
        self._forward = [compile_function(partial(self._run_layer, layer)) for layer in self._layers]
        self._backward = [compile_function(partial(self._layer_gradients, layer)) for layer in self._layers]
        self._head = compile_function(self._head_gradients)
        self._embedding_gradients = compile_function(mx.grad(self._embedding_product))

    def __call__(self, parameters: Tensors, batch: Batch) -> tuple[mx.array, Tensors]:
        """Sums and gradients, already evaluated; see `gradients_of`."""
        masks = [segment_mask(batch["segments"])] if "segments" in batch else []
        keys = _dropout_keys(batch, len(self._layers))
        own = [_named(parameters, f"{_LAYERS}{layer}.") for layer in self._layers]
        of_embedding = _named(parameters, _EMBEDDING)
        lowest = 0 if of_embedding else next((layer for layer in self._layers if own[layer]), len(self._layers))

        lag = _Lag()
        x = self._embed(of_embedding, batch["inputs"], keys[-1:])
        inputs = {}
        for layer in self._layers:
            if layer >= lowest:
                inputs[layer] = x
            x = self._forward[layer](own[layer], x, masks, keys[layer : layer + 1])
            lag.overlap(x)
        rest = {name: p for name, p in parameters.items() if not name.startswith(_LAYERS)}
        sums, found, of_x = self._head(rest, x, batch)
        lag.follow(sums, found, of_x)
        for layer in reversed(range(lowest, len(self._layers))):
            of_own, of_x = self._backward[layer](own[layer], inputs.pop(layer), masks, keys[layer : layer + 1], of_x)
            lag.follow(of_own, of_x)
            found.update({f"{_LAYERS}{layer}.{name}": gradient for name, gradient in of_own.items()})
        if of_embedding:
            of_own = self._embedding_gradients(of_embedding, batch["inputs"], keys[-1:], of_x)
            for name, gradient in of_own.items():
                found[_EMBEDDING + name] = found[_EMBEDDING + name] + gradient
                lag.follow(found[_EMBEDDING + name])
        lag.wait()
        return sums, {name: found[name] for name in parameters}

    def _embedded(self, own: Tensors, inputs: mx.array, key: list[mx.array]) -> mx.array:
        """Cast after the lookup, because the gradient of a frequent token's row is a sum over all its occurrences."""
        module = self._model.transformer.token_embeddings
        set_parameters(module, mx.float32, own)
        set_dropout_keys(module, *key)
        return module(inputs).astype(self._dtype)

    def _embedding_product(self, own: Tensors, inputs: mx.array, key: list[mx.array], of_x: mx.array) -> mx.array:
        return (self._embedded(own, inputs, key) * of_x).sum()

    def _run_layer(self, layer: int, own: Tensors, x: mx.array, masks: list[mx.array], key: list[mx.array]) -> mx.array:
        module = self._model.transformer.layers[layer]
        set_parameters(module, self._dtype, own)
        set_dropout_keys(module, *key)
        mask = masks[0] if masks else None
        return module(x, ForwardContext.alone(self._model.config, x.shape[0], mask, module.training))

    def _layer_gradients(
        self, layer: int, own: Tensors, x: mx.array, masks: list[mx.array], key: list[mx.array], of_output: mx.array
    ) -> tuple[Tensors, mx.array]:
        """Gradients of the layer's parameters and of its input, given the gradient of its output."""

        def product(own: Tensors, x: mx.array) -> mx.array:
            return (self._run_layer(layer, own, x, masks, key) * of_output).sum()

        return mx.grad(product, argnums=(0, 1))(own, x)

    def _head_gradients(self, rest: Tensors, x: mx.array, batch: Batch) -> tuple[mx.array, Tensors, mx.array]:
        """Sums, and the gradients of the parameters outside the layers and of the last layer's output."""

        def total(rest: Tensors, x: mx.array) -> tuple[mx.array, mx.array]:
            set_parameters(self._model, self._dtype, rest)
            hidden = self._model.transformer.norm(x)
            sums, total = self._objective(self._model, hidden, batch, _trains_output(self._model, rest))
            return total, sums

        (_, sums), (of_rest, of_x) = mx.value_and_grad(total, argnums=(0, 1))(rest, x)
        return sums, of_rest, of_x


class _Lag:
    """Evaluates the parts of a pass so that the host prepares the next one while the device computes."""

    def __init__(self) -> None:
        self._running: tuple[Any, ...] = ()

    def overlap(self, *arrays: Any) -> None:
        """Start to compute arrays, then wait for those before: both may hold their temporary arrays at once."""
        mx.async_eval(*arrays)
        self.wait()
        self._running = arrays

    def follow(self, *arrays: Any) -> None:
        """Wait for the arrays before, then start to compute these; only their graph was made in the meantime."""
        self.wait()
        mx.async_eval(*arrays)
        self._running = arrays

    def wait(self) -> None:
        """Wait for the last arrays."""
        mx.eval(*self._running)


def set_parameters(module: Any, dtype: mx.Dtype, parameters: Mapping[str, mx.array]) -> None:
    """Set parameters of a module, cast to `dtype`; DoRA magnitudes are not cast."""
    cast = [(name, p if name.endswith(f".{MAGNITUDE}") else p.astype(dtype)) for name, p in parameters.items()]
    module.update(tree_unflatten(cast))
    invalidate_scales(module)


def _at_once(
    model: OpenELM, objective: Objective, dtype: mx.Dtype, parameters: Tensors, batch: Batch
) -> tuple[mx.array, Tensors]:
    def total(parameters: Tensors) -> tuple[mx.array, mx.array]:
        sums, total = batch_losses(model, objective, dtype, parameters, batch)
        return total, sums

    (_, sums), gradients = mx.value_and_grad(total)(parameters)
    return sums, gradients


def _dropout_keys(batch: Batch, num_layers: int) -> list[mx.array]:
    """One random key per layer, and a last one for the embedding; empty without dropout."""
    return list(mx.random.split(batch["dropout"], num_layers + 1)) if "dropout" in batch else []


def _trains_output(model: OpenELM, parameters: Mapping[str, mx.array]) -> bool:
    return model.output_name in parameters


def _named(parameters: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
