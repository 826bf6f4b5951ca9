"""What training minimises, without ever holding the logits of all tokens at once.

The gradient of a token's losses by its logits is known as soon as the logits are: softmax, scaled, less one at the
target. So each chunk of tokens gives its losses and its share of the gradients in one go, and its logits are dropped.
Nothing is computed twice, as it would be with checkpointing.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import mlx.core as mx

from ..data.batch import Batch
from ..model.cpu_layers import exponential
from ..model.openelm import OpenELM

DEFAULT_CHUNK = 256  # tokens


class Objective(Protocol):
    """A loss of hidden states."""

    names: ClassVar[tuple[str, ...]]  # of its sums but the last

    def __call__(
        self, model: OpenELM, hidden: mx.array, batch: Batch, trains_output: bool
    ) -> tuple[mx.array, mx.array]:
        """Sums over the batch, float32 (K,), and the sum to differentiate, ().

        The last sum is the number of tokens or pairs that count, which the others are to be divided by.

        Args:
            hidden: what `model.transformer` gives, (B, L, M).
            trains_output: whether the output matrix gets a gradient.
        """


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the tokens that count, and a share of z-loss."""

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
    total: mx.array  # cross_entropy + z_weight * z_loss; the one that can be differentiated


def at_positions(hidden: mx.array, batch: Batch) -> mx.array:
    """Hidden states (B, L, M) of those tokens whose successors may count, (N, M)."""
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
    """Losses of the tokens that follow, and gradients for `hidden` and the output matrix once they are asked for.

    Args:
        hidden: states of N tokens, (N, M).
        targets: the token after each, (N,).
        weights: how much each counts, float32 (N,).
        chunk: tokens whose logits stand in memory at once.
        trains_output: with a gradient for the output matrix, which is then not quantized.
    Source: z-loss as in PaLM, arXiv:2204.02311, section 5.
    """
    constant_hidden = mx.stop_gradient(hidden)
    cross_entropy = z_loss = mx.zeros(())
    weight = model.output_weight if trains_output else None  # (V, M)
    weight_gradient = mx.zeros(weight.shape if weight is not None else (), mx.float32)
    hidden_gradients: list[mx.array] = []
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        # Only after the chunk before is done, whichever order the graph would be computed in.
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
    weight_gradient = weight_gradient.at[targets].add(at_targets)
    total = _with_gradients(value, (hidden, weight), (of_hidden, weight_gradient))
    return TokenLosses(cross_entropy, z_loss, total)


def token_logprobs(model: OpenELM, hidden: mx.array, targets: mx.array, chunk: int = DEFAULT_CHUNK) -> mx.array:
    """Log-probabilities of the tokens that follow, float32 (N,), of states (N, M); no gradient goes through them."""
    hidden = mx.stop_gradient(hidden)
    found: list[mx.array] = []
    for start in range(0, hidden.shape[0], chunk):
        (rows,) = mx.depends([hidden[start : start + chunk]], found[-1:]) if found else [hidden[:chunk]]
        found.append(-_cross_entropy(model.logits(rows), targets[start : start + chunk])[0])
    return mx.concatenate(found)


def _with_gradients(value: mx.array, arguments: tuple[mx.array, ...], gradients: tuple[mx.array, ...]) -> mx.array:
    """A value as a function of arguments by which its gradients are known already."""
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
    """Of T tokens: their cross-entropy and log(Z), (T,); softmax as powers (T, V) over their sum (T,). All float32."""
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
    """Losses of T tokens, and the gradient of their weighted sum by the hidden states, (T, M); of any output matrix."""
    cross_entropy, log_z, powers, total = _cross_entropy(model.logits(hidden), targets)
    scale = weights * (1 + 2 * z_weight * log_z) / total
    of_logits = (scale[:, None] * powers).at[mx.arange(targets.size), targets].add(-weights)
    _, (of_hidden,) = mx.vjp(model.logits, [hidden], [of_logits.astype(hidden.dtype)])
    return ((weights * cross_entropy).sum(), (weights * log_z * log_z).sum()), of_hidden


def _training_chunk(
    hidden: mx.array, weight: mx.array, targets: mx.array, weights: mx.array, z_weight: float
) -> tuple[tuple[mx.array, mx.array], mx.array, mx.array]:
    """As `_chunk`, float32, with the gradient by the output matrix, (V, M) but for the targets' own share."""
    cross_entropy, log_z, powers, total = _cross_entropy(hidden @ weight.T, targets)

    # Softmax is powers / total; the division waits until the vocabulary is summed over, where there is less to divide.
    scale = (weights * (1 + 2 * z_weight * log_z) / total)[:, None]  # (T, 1)
    powers = powers.astype(hidden.dtype)
    of_hidden = scale * (powers @ weight).astype(mx.float32) - weights[:, None] * weight[targets].astype(mx.float32)
    of_weight = powers.T @ (scale * hidden.astype(mx.float32)).astype(hidden.dtype)
    losses = (weights * cross_entropy).sum(), (weights * log_z * log_z).sum()
    return losses, of_hidden, of_weight.astype(mx.float32)
