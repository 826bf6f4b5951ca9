"""The progress of a run beside its parameters, and how an interrupted run gets back to it."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..files.output import move_away
from ..runs import checkpoint_folders
from .callback import Metrics
from .checkpoint_metric import CheckpointMetric, metric_changes
from .checkpoints import Checkpoint, check_parameters, load_checkpoint
from .trainer import Trainer


@dataclass
class Progress:
    """The progress of a run; part of each checkpoint's state."""

    tokens: int = 0
    best_loss: float | None = None  # validation loss of the best checkpoint
    best_step: int | None = None
    best_evaluation: dict[str, float] | None = None  # figures of the best checkpoint
    worse: int = 0  # consecutive validations without improvement; with a metric, evaluations
    pending: dict[str, Any] | None = None  # metrics of a step that was taken, but not yet validated and reported

    def add(self, metrics: Metrics, *, by_metric: bool) -> None:
        """Record the validation or evaluation after a step, if there was one.

        Args:
            by_metric: whether the evaluation says which checkpoint is the best, not the validation loss.
        """
        loss, figures = metrics.validation_loss, metrics.evaluation
        if by_metric and figures is not None:
            is_best = self.best_evaluation is None or _first(figures) > _first(self.best_evaluation)
        elif not by_metric and loss is not None:
            is_best = self.best_loss is None or loss < self.best_loss
        else:
            return
        if is_best:
            self.best_loss, self.best_evaluation, self.best_step, self.worse = loss, figures, metrics.step, 0
        else:
            self.worse += 1


def _first(figures: dict[str, float]) -> float:
    return next(iter(figures.values()))


def resume_run(
    trainer: Trainer, run: Path, metric: CheckpointMetric | None, on_message: Callable[[str], None]
) -> Progress:
    """Restore a trainer from the last checkpoint that can be read; later ones are moved away.

    Raises:
        TrainingError: if there is none, or the run would not go on as it began.
    """
    damaged: list[Path] = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            checkpoint = load_checkpoint(folder)
            progress = _progress_of(checkpoint, folder)
            found = _changes(trainer, metric, checkpoint)
            if not found:
                check_parameters(checkpoint, trainer.parameters, folder)
        except TrainingError as error:
            on_message(f"{error}; falling back to the previous checkpoint")
            damaged.append(folder)
            continue
        if found:
            raise changed_error(run, found)
        # Keep the network's order, which the file does not have: the gradient norm is summed in this order.
        trainer.parameters = {name: checkpoint.parameters[name] for name in trainer.parameters}
        trainer.moments = checkpoint.moments
        trainer.step = checkpoint.state["step"]
        if trainer.group.rank() == 0:
            for later in damaged:  # otherwise they would count as the latest checkpoints
                on_message(f"moved the damaged checkpoint to {move_away(later, f'damaged-{later.name}')}")
        return progress
    raise TrainingError(f"{run} has no readable checkpoint; start without `resume`")


def changed_error(run: Path, changes: Sequence[str]) -> TrainingError:
    """The error for a run that would not go on as it began."""
    return TrainingError(
        f"cannot resume {run}: these settings changed: {'; '.join(changes)}; choose another `output` to start over"
    )


def _changes(trainer: Trainer, metric: CheckpointMetric | None, checkpoint: Checkpoint) -> list[str]:
    """What would make the result of a resumed run different."""
    state = checkpoint.state
    found = trainer.recipe.differences(state.get("recipe") or {})
    if state.get("data", state.get("corpus")) != trainer.data.fingerprint:
        found.append("the model, the data or how the data is read")
    return [*found, *metric_changes(metric, state)]


def _progress_of(checkpoint: Checkpoint, folder: Path) -> Progress:
    state = checkpoint.state
    pending = state.get("pending")
    known = {entry.name: entry.default is MISSING for entry in fields(Metrics)}
    needed = {name for name, is_needed in known.items() if is_needed}  # a run of an earlier version has no others
    if pending is not None and not needed <= set(pending) <= set(known):
        raise TrainingError(f"{folder} is damaged: the pending metrics in state.json are incomplete")
    return Progress(**{e.name: state[e.name] for e in fields(Progress) if state.get(e.name) is not None})
