"""Cross-entropy and z-loss of a network, without ever holding the logits of all tokens at once."""

from functools import partial

import mlx.core as mx

from .model import OpenELM


def token_losses(
    model: OpenELM, hidden: mx.array, targets: mx.array, counted: mx.array, chunk: int = 0
) -> tuple[mx.array, mx.array]:
    """Sums over the counted tokens of the cross-entropy and of log(Z)^2, in float32.

    Args:
        hidden: what `model.transformer` gives, (B, L, M).
        targets: the token after each, (B, L).
        counted: which of them count, bool (B, L).
        chunk: positions, over all rows, whose logits stand in memory at once; in training they are computed a second
            time on the way back. 0 takes all at once, which is faster.
    Source: z-loss as in PaLM, arXiv:2204.02311, section 5.
    """
    hidden, targets, counted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), counted.reshape(-1)
    parameters = _output_parameters(model)
    if not 0 < chunk < hidden.shape[0]:
        return _sums(parameters, hidden, targets=targets, counted=counted)
    cross_entropy = z_loss = mx.zeros(())
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        one = mx.checkpoint(partial(_sums, targets=targets[part], counted=counted[part]))
        more = one(parameters, hidden[part])
        cross_entropy, z_loss = cross_entropy + more[0], z_loss + more[1]
    return cross_entropy, z_loss


def _output_parameters(model: OpenELM) -> dict[str, mx.array]:
    """What the logits are computed with: named, so that gradients reach it through recomputation."""
    tied = model.config.share_input_output_layers
    return dict((model.transformer.token_embeddings if tied else model.lm_head).parameters())


def _sums(
    parameters: dict[str, mx.array], hidden: mx.array, *, targets: mx.array, counted: mx.array
) -> tuple[mx.array, mx.array]:
    logits = (hidden @ parameters["weight"].T).astype(mx.float32)
    log_z = mx.logsumexp(logits, axis=-1)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    zero = mx.zeros(())
    return mx.where(counted, log_z - picked, zero).sum(), mx.where(counted, log_z * log_z, zero).sum()
