"""Cross-entropy and z-loss of a network, without ever holding the logits of all tokens at once.

The gradient of a token's losses by its logits is known as soon as the logits are: softmax, scaled, less one at the
target. So each chunk of tokens gives its losses and its share of the gradients in one go, and its logits are dropped.
Nothing is computed twice, as it would be with checkpointing.
"""

from typing import NamedTuple

import mlx.core as mx

from .cpu import exponential
from .model import OpenELM

DEFAULT_CHUNK = 256  # tokens


class TokenLosses(NamedTuple):
    """Sums over the counted tokens, float32 ()."""

    cross_entropy: mx.array
    z_loss: mx.array  # log(Z)^2
    total: mx.array  # cross_entropy + weight * z_loss; the one that can be differentiated


def token_losses(
    model: OpenELM,
    hidden: mx.array,
    targets: mx.array,
    counted: mx.array,
    *,
    z_weight: float = 0.0,
    chunk: int = DEFAULT_CHUNK,
) -> TokenLosses:
    """Losses of the tokens that follow, and gradients for `hidden` and the output matrix once they are asked for.

    Args:
        hidden: what `model.transformer` gives, (B, L, M).
        targets: the token after each, (B, L).
        counted: which of them count, bool (B, L).
        chunk: tokens, over all rows, whose logits stand in memory at once.
    Source: z-loss as in PaLM, arXiv:2204.02311, section 5.
    """
    weight = model.output_weight  # (V, M)
    flat, targets, counted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), counted.reshape(-1)
    constant_hidden, constant_weight = mx.stop_gradient(flat), mx.stop_gradient(weight)
    cross_entropy = z_loss = mx.zeros(())
    weight_gradient = mx.zeros(weight.shape, mx.float32)
    hidden_gradients: list[mx.array] = []
    for start in range(0, flat.shape[0], chunk):
        part = slice(start, start + chunk)
        # Only after the chunk before is done, whichever order the graph would be computed in.
        (rows,) = mx.depends([constant_hidden[part]], [cross_entropy, weight_gradient, *hidden_gradients[-1:]])
        losses, of_rows, of_weight = _chunk(rows, constant_weight, targets[part], counted[part], z_weight)
        cross_entropy, z_loss = cross_entropy + losses[0], z_loss + losses[1]
        weight_gradient = weight_gradient + of_weight
        hidden_gradients.append(of_rows)
    at_targets = mx.where(counted[:, None], -constant_hidden.astype(mx.float32), mx.zeros(()))
    weight_gradient = weight_gradient.at[targets].add(at_targets)
    total = _with_gradients(
        cross_entropy + z_weight * z_loss, (flat, weight), (mx.concatenate(hidden_gradients), weight_gradient)
    )
    return TokenLosses(cross_entropy, z_loss, total)


def _with_gradients(value: mx.array, arguments: tuple[mx.array, ...], gradients: tuple[mx.array, ...]) -> mx.array:
    """A value as a function of arguments by which its gradients are known already."""

    @mx.custom_function
    def known(*arguments: mx.array) -> mx.array:
        return value

    @known.vjp
    def known_vjp(arguments, cotangent, output):  # type: ignore[no-untyped-def]
        return tuple((cotangent * g).astype(a.dtype) for a, g in zip(arguments, gradients, strict=True))

    return known(*arguments)  # type: ignore[return-value]


def _chunk(
    hidden: mx.array, weight: mx.array, targets: mx.array, counted: mx.array, z_weight: float
) -> tuple[tuple[mx.array, mx.array], mx.array, mx.array]:
    """Losses of T tokens, and the gradients of their weighted sum: float32 (T, M), and (V, M) without the targets."""
    counts = counted.astype(mx.float32)
    logits = (hidden @ weight.T).astype(mx.float32)  # (T, V)
    largest = logits.max(axis=-1, keepdims=True)
    powers = exponential(logits - largest)  # 0 to 1
    total = powers.sum(axis=-1)
    log_z = mx.log(total) + largest[:, 0]
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    losses = (counts * (log_z - picked)).sum(), (counts * log_z * log_z).sum()

    # Softmax is powers / total; the division waits until the vocabulary is summed over, where there is less to divide.
    scale = (counts * (1 + 2 * z_weight * log_z) / total)[:, None]  # (T, 1)
    powers = powers.astype(hidden.dtype)
    of_hidden = scale * (powers @ weight).astype(mx.float32) - counts[:, None] * weight[targets].astype(mx.float32)
    of_weight = powers.T @ (scale * hidden.astype(mx.float32)).astype(hidden.dtype)
    return losses, of_hidden, of_weight.astype(mx.float32)
