"""Direct preference optimization: to make chosen answers likelier than rejected ones, against what the model was.

Of a pair, the margin is beta times how much more the model now prefers the chosen answer than it did. The gradient of
the loss by a token's log-probability is the same for all tokens of an answer and follows from the margin. So a step
first finds the margins, without gradients, and then goes back through a cross-entropy whose weights they decide.

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
    """The loss of pairs: rows 2i of a batch are chosen, rows 2i + 1 rejected.

    Raises:
        ConfigError: if beta is not positive, or the loss is none of `PREFERENCE_LOSSES`.
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
        """See `Objective`; the count is in pairs. `batch` also needs `reference`, by `reference_logprobs`."""
        gained = row_logprobs(model, hidden, batch, self.chunk) - batch["reference"]  # (2P,)
        margins = self.beta * (gained[0::2] - gained[1::2])
        losses, slopes = self.of_margins(margins)
        exists = mx.zeros(gained.shape).at[batch["rows"]].add(batch["weights"])[0::2] > 0  # not padding
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
        """Losses of margins, and their derivatives."""
        if self.loss == "sigmoid":
            return mx.logaddexp(mx.zeros(()), -margins), -mx.sigmoid(-margins)
        return mx.maximum(0.0, 1 - margins), mx.where(margins < 1, -1.0, 0.0)


def row_logprobs(model: OpenELM, hidden: mx.array, batch: Batch, chunk: int = DEFAULT_CHUNK) -> mx.array:
    """Log-probability of what counts in each row, float32 (B,), without a gradient."""
    found = token_logprobs(model, at_positions(hidden, batch), batch["targets"], chunk)
    return mx.zeros(batch["inputs"].shape[0]).at[batch["rows"]].add(found * batch["weights"])


def reference_logprobs(model: OpenELM, dtype: mx.Dtype, parameters: Tensors, batch: Batch) -> mx.array:
    """What `row_logprobs` gives with these parameters in place of those that are trained, and no dropout."""
    set_parameters(model, dtype, parameters)
    set_dropout_keys(model)
    return row_logprobs(model, model.transformer(batch["inputs"]), batch)
