"""Direct preference optimization: makes chosen answers more likely than rejected ones, relative to a reference model.

The reference is the model before training. A pair's margin is beta times how much more the model prefers the chosen
answer than the reference does. The gradient of the loss with respect to a token's log-probability is the same for all
tokens of an answer and depends only on the margin. So a step first computes the margins, without gradients, and then
backpropagates through a cross-entropy whose weights follow from them.

Source: Rafailov et al., arXiv:2305.18290; the hinge loss as in SLiC, arXiv:2305.10425.
"""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..data.batch import Batch
from ..errors import ConfigError
from ..model.lora import set_dropout_keys
from ..model.openelm import OpenELM
from .gradients import set_parameters
from .loss import DEFAULT_CHUNK, at_positions, token_logprobs, token_losses
from .optimizer import Tensors

PREFERENCE_LOSSES = ("sigmoid", "hinge")


@dataclass(frozen=True)
class DPO:
    """The DPO loss of pairs: rows 2i of a batch are the chosen answers, rows 2i + 1 the rejected ones.

    Raises:
        ConfigError: if `beta` is not positive, or `loss` is not one of `PREFERENCE_LOSSES`.
    """

    beta: float = 0.01
    loss: str = "sigmoid"  # -log sigmoid(margin), or "hinge": max(0, 1 - margin)
    chunk: int = DEFAULT_CHUNK
    names: ClassVar[tuple[str, ...]] = ("loss", "margin", "accuracy")

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f"beta must be positive; got {self.beta}")
        if self.loss not in PREFERENCE_LOSSES:
            raise ConfigError(f"unknown preference_loss {self.loss!r} (choose from {', '.join(PREFERENCE_LOSSES)})")

    def __call__(
        self, model: OpenELM, hidden: mx.array, batch: Batch, trains_output: bool
    ) -> tuple[mx.array, mx.array]:
        """See `Objective`; the count is in pairs. `batch` must contain `reference`, from `reference_logprobs`."""
        gained = row_logprobs(model, hidden, batch, self.chunk) - batch["reference"]  # (2P,)
        margins = self.beta * (gained[0::2] - gained[1::2])
        losses, slopes = self.of_margins(margins)
        exists = row_sums(batch["weights"], batch["rows"], gained.size)[0::2] > 0  # not padding
        per_row = (mx.where(exists, slopes, 0.0)[:, None] * mx.array([-self.beta, self.beta])).reshape(-1)
        total = token_losses(
            model,
            at_positions(hidden, batch),
            batch["targets"],
            mx.stop_gradient(per_row)[batch["rows"]] * batch["weights"],
            chunk=self.chunk,
            trains_output=trains_output,
        ).total
        sums = [mx.where(exists, figures, 0.0).sum() for figures in (losses, margins, margins > 0)]
        return mx.stack([*sums, exists.sum().astype(mx.float32)]), total

    def of_margins(self, margins: mx.array) -> tuple[mx.array, mx.array]:
        """Losses of margins (P,) and their derivatives (P,)."""
        if self.loss == "sigmoid":
            return mx.logaddexp(mx.zeros(()), -margins), -mx.sigmoid(-margins)
        return mx.maximum(0.0, 1 - margins), mx.where(margins < 1, -1.0, 0.0)


def row_logprobs(model: OpenELM, hidden: mx.array, batch: Batch, chunk: int = DEFAULT_CHUNK) -> mx.array:
    """Log-probability of each row's tokens in the loss mask, summed, float32 (B,), without a gradient."""
    found = token_logprobs(model, at_positions(hidden, batch), batch["targets"], chunk)
    return row_sums(found * batch["weights"], batch["rows"], batch["inputs"].shape[0])


def row_sums(values: mx.array, rows: mx.array, num_rows: int) -> mx.array:
    """The sums of the values (N,) of each row, (num_rows,), given the row of each value, (N,).

    A scatter would add them with atomic operations on GPUs, in another order each time.
    """
    return mx.where(rows == mx.arange(num_rows)[:, None], values, 0.0).sum(axis=1)


def reference_logprobs(model: OpenELM, dtype: mx.Dtype, parameters: Tensors, batch: Batch) -> mx.array:
    """`row_logprobs` with these parameters instead of the trained ones, and without dropout, float32 (B,)."""
    set_parameters(model, dtype, parameters)
    set_dropout_keys(model)
    return row_logprobs(model, model.transformer(batch["inputs"]), batch)
