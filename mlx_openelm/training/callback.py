"""What a training run reports: the metrics of its steps, and the callback that receives them."""

from dataclasses import asdict, dataclass
from typing import Any

from ..runs import EVALUATION


@dataclass(frozen=True)
class Metrics:
    """Metrics of one step; one line of `metrics.jsonl`."""

    step: int  # steps completed
    loss: float | None  # training loss; for text, cross-entropy in nats per token; None before the first step
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens: int  # tokens in the loss so far; for preferences, pairs
    tokens_per_second: float
    peak_memory_bytes: int
    more: dict[str, float]  # the objective's other metrics: z_loss; for DPO, margin and accuracy
    validation_loss: float | None = None
    validation: dict[str, float] | None = None  # the objective's other metrics on the held-out rows
    evaluation: dict[str, float] | None = None  # figures of the checkpoint metric; the first one counts
    sample: str | None = None  # `sample_prompt` and the model's continuation, at each validation

    def to_dict(self) -> dict[str, Any]:
        """All metrics as a flat dict."""
        values = asdict(self)
        values.update(values.pop("more"))
        values.update({f"validation_{name}": figure for name, figure in (values.pop("validation") or {}).items()})
        values.update({f"{EVALUATION}{name}": figure for name, figure in (values.pop("evaluation") or {}).items()})
        return values


class TrainingCallback:
    """Receives the events of a run; every method does nothing until a subclass overrides it.

    With several processes, each has its own callback. A callback is a context manager, so that it can close what it
    opens.
    """

    def __enter__(self) -> "TrainingCallback":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def on_tokenizing(self, done_bytes: int, total_bytes: int) -> None:
        """Called while `pretrain` tokenizes its corpus, in the first process."""

    def on_prepared(self, num_steps: int) -> None:
        """Called once before training, with the total number of steps."""

    def on_begin(self, step: int) -> None:
        """Called once the run starts or is restored, with the number of steps already taken."""

    def on_step(self, metrics: Metrics) -> None:
        """Called after every step."""

    def on_validating(self, done_batches: int, total_batches: int) -> None:
        """Called during each validation, before its first batch and after each, with those of this process."""

    def on_evaluating(self, done_items: int, total_items: int) -> None:
        """Called while the run evaluates its checkpoint metric, if that reports its progress."""

    def on_metrics(self, metrics: Metrics) -> None:
        """Called when metrics are logged: every `log_every` steps and at each validation or evaluation."""

    def on_testing(self, done_batches: int, total_batches: int) -> None:
        """Called while the test file is measured, like `on_validating`."""

    def on_message(self, message: str) -> None:
        """Called with what the user should know, such as a damaged checkpoint that was skipped."""
