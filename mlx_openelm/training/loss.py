"""Training losses, computed without ever holding the logits of all tokens at once.

The gradient of the loss with respect to a token's logits is known as soon as the logits are: softmax, scaled, minus
one at the target. So each chunk of tokens yields its losses and its share of the gradients in one pass, and its logits
are freed. Nothing is computed twice, as it would be with checkpointing.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import mlx.core as mx

from ..data.batch import Batch
from ..kernels.cpu import exponential
from ..model.openelm import OpenELM

DEFAULT_CHUNK = 256  # tokens


class Objective(Protocol):
    """A loss computed from hidden states."""

    names: ClassVar[tuple[str, ...]]  # names of its sums, except for the last

    def __call__(
        self, model: OpenELM, hidden: mx.array, batch: Batch, trains_output: bool
    ) -> tuple[mx.array, mx.array]:
        """Sums over the batch, float32 (K,), and the sum to differentiate, ().

        The last sum is the number of tokens or pairs in the loss; callers divide the other sums by it.

        Args:
            hidden: output of `model.transformer`, (B, L, M).
            trains_output: whether the output matrix gets a gradient.
        """


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the tokens in the loss mask, plus weighted z-loss."""

    z_weight: float = 0.0
    chunk: int = DEFAULT_CHUNK
    names: ClassVar[tuple[str, ...]] = ("loss", "z_loss")

    def __call__(
        self, model: OpenELM, hidden: mx.array, batch: Batch, trains_output: bool
    ) -> tuple[mx.array, mx.array]:
        """See `Objective`; the count is in tokens."""
        losses = token_losses(
            model,
            at_positions(hidden, batch),
            batch["targets"],
            batch["weights"],
            z_weight=self.z_weight,
            chunk=self.chunk,
            trains_output=trains_output,
        )
        return mx.stack([losses.cross_entropy, losses.z_loss, batch["weights"].sum()]), losses.total


class TokenLosses(NamedTuple):
    """Weighted sums over tokens, float32 ()."""

    cross_entropy: mx.array
    z_loss: mx.array  # log(Z)^2
    total: mx.array  # cross_entropy + z_weight * z_loss; the only one that is differentiable


def at_positions(hidden: mx.array, batch: Batch) -> mx.array:
    """Hidden states at the scored positions, (N, M), from those of all tokens, (B, L, M)."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat[batch["positions"]] if "positions" in batch else flat


def token_losses(
    model: OpenELM,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    *,
    z_weight: float = 0.0,
    chunk: int = DEFAULT_CHUNK,
    trains_output: bool = True,
) -> TokenLosses:
    """Losses of the next tokens, differentiable with respect to `hidden` and the output matrix.

    Args:
        hidden: hidden states of N tokens, (N, M).
        targets: ids of the next tokens, (N,).
        weights: weight of each token in the loss, float32 (N,).
        chunk: tokens whose logits are in memory at once.
        trains_output: also compute the gradient of the output matrix, which must not be quantized then.
    Source: z-loss as in PaLM, arXiv:2204.02311, section 5.
    """
    constant_hidden = mx.stop_gradient(hidden)
    cross_entropy = z_loss = mx.zeros(())
    weight = model.output_weight if trains_output else None  # (V, M)
    weight_gradient = mx.zeros(weight.shape if weight is not None else (), mx.float32)
    hidden_gradients: list[mx.array] = []
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        # Wait for the previous chunk, in whatever order the graph would be evaluated.
        (rows,) = mx.depends([constant_hidden[part]], [cross_entropy, weight_gradient, *hidden_gradients[-1:]])
        if weight is None:
            losses, of_rows = _chunk(model, rows, targets[part], weights[part], z_weight)
        else:
            constant = mx.stop_gradient(weight)
            losses, of_rows, of_weight = _training_chunk(rows, constant, targets[part], weights[part], z_weight)
            weight_gradient = weight_gradient + of_weight
        cross_entropy, z_loss = cross_entropy + losses[0], z_loss + losses[1]
        hidden_gradients.append(of_rows)
    value, of_hidden = cross_entropy + z_weight * z_loss, mx.concatenate(hidden_gradients)
    if weight is None:
        return TokenLosses(cross_entropy, z_loss, _with_gradients(value, (hidden,), (of_hidden,)))
    at_targets = -weights[:, None] * constant_hidden.astype(mx.float32)
    weight_gradient = weight_gradient.at[targets].add(at_targets)  # on GPUs in any order, as in the embedding
    total = _with_gradients(value, (hidden, weight), (of_hidden, weight_gradient))
    return TokenLosses(cross_entropy, z_loss, total)


def token_logprobs(model: OpenELM, hidden: mx.array, targets: mx.array, chunk: int = DEFAULT_CHUNK) -> mx.array:
    """Log-probabilities of the next tokens, float32 (N,), from hidden states (N, M), without a gradient."""
    hidden = mx.stop_gradient(hidden)
    found: list[mx.array] = []
    for start in range(0, hidden.shape[0], chunk):
        (rows,) = mx.depends([hidden[start : start + chunk]], found[-1:]) if found else [hidden[:chunk]]
        found.append(-_cross_entropy(model.logits(rows), targets[start : start + chunk])[0])
    return mx.concatenate(found)


def _with_gradients(value: mx.array, arguments: tuple[mx.array, ...], gradients: tuple[mx.array, ...]) -> mx.array:
    """A value as a function of arguments, with gradients that are already known."""
    dtypes = [argument.dtype for argument in arguments]

    @mx.custom_function
    def known(*arguments: mx.array) -> mx.array:
        return value

    @known.vjp
    def known_vjp(arguments, cotangent, output):  # type: ignore[no-untyped-def]
        found = [(cotangent * g).astype(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
        return tuple(found) if len(found) > 1 else found[0]

    return known(*arguments)  # type: ignore[return-value]


def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """For T tokens: cross-entropy and log(Z), (T,); softmax as powers (T, V) and their sum (T,). All float32."""
    logits = logits.astype(mx.float32)
    largest = logits.max(axis=-1, keepdims=True)
    powers = exponential(logits - largest)  # 0 to 1
    total = powers.sum(axis=-1)
    log_z = mx.log(total) + largest[:, 0]
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return log_z - picked, log_z, powers, total


def _chunk(
    model: OpenELM, hidden: mx.array, targets: mx.array, weights: mx.array, z_weight: float
) -> tuple[tuple[mx.array, mx.array], mx.array]:
    """Losses of T tokens, and the gradient of their weighted sum for the hidden states, (T, M); any output matrix."""
    cross_entropy, log_z, powers, total = _cross_entropy(model.logits(hidden), targets)
    scale = weights * (1 + 2 * z_weight * log_z) / total
    of_logits = (scale[:, None] * powers).at[mx.arange(targets.size), targets].add(-weights)  # one place per row
    _, (of_hidden,) = mx.vjp(model.logits, [hidden], [of_logits.astype(hidden.dtype)])
    return ((weights * cross_entropy).sum(), (weights * log_z * log_z).sum()), of_hidden


def _training_chunk(
    hidden: mx.array, weight: mx.array, targets: mx.array, weights: mx.array, z_weight: float
) -> tuple[tuple[mx.array, mx.array], mx.array, mx.array]:
    """As `_chunk`, in float32, plus the gradient of the output matrix, (V, M), without the targets' share."""
    cross_entropy, log_z, powers, total = _cross_entropy(hidden @ weight.T, targets)

    # Softmax is powers / total; dividing after the sum over the vocabulary takes fewer divisions.
    scale = (weights * (1 + 2 * z_weight * log_z) / total)[:, None]  # (T, 1)
    powers = powers.astype(hidden.dtype)
    of_hidden = scale * (powers @ weight).astype(mx.float32) - weights[:, None] * weight[targets].astype(mx.float32)
    of_weight = powers.T @ (scale * hidden.astype(mx.float32)).astype(hidden.dtype)
    losses = (weights * cross_entropy).sum(), (weights * log_z * log_z).sum()
    return losses, of_hidden, of_weight.astype(mx.float32)
