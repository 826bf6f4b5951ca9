"""Complete training runs: from a recipe to a result, in a folder that is locked against other runs."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..errors import DataError
from ..files.lock import LockedFolder
from .checkpoints import best_checkpoint, check_fresh, check_output, checkpoint_folders, read_state, run_lock, together
from .evaluation import Evaluation, evaluate_run
from .loop import Metrics
from .pretrain import PretrainRecipe, prepare_pretraining, pretraining_steps
from .trainer import Trainer
from .tune import Tuning, prepare_tuning, tuning_steps
from .tune_recipe import TuneRecipe


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

    def on_metrics(self, metrics: Metrics) -> None:
        """Called when metrics are logged: every `log_every` steps and at each validation."""

    def on_testing(self, done_batches: int, total_batches: int) -> None:
        """Called while the test file is measured, like `on_validating`."""

    def on_message(self, message: str) -> None:
        """Called with what the user should know, such as a damaged checkpoint that was skipped."""


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training run.

    Attributes:
        folder: the run's folder; after `tune` it is also the adapter.
        checkpoint: folder of the checkpoint with the best validation loss; without validation, of the last one. None
            in a process that does not share the folder with the first one.
        step: number of steps at that checkpoint.
        validation_loss: the best validation loss, in nats per token (pairs: per pair).
        validation_loss_before: validation loss before the first step, if this call measured it.
        stopped_early: whether `early_stop` ended the run before its last step.
        metrics: the last metrics; None if no step was left to train.
        test: how well the adapter predicts the test file, if there is one.
    """

    folder: Path
    checkpoint: Path | None
    step: int | None
    validation_loss: float | None
    validation_loss_before: float | None
    stopped_early: bool
    metrics: Metrics | None
    test: Evaluation | None = None

    def __repr__(self) -> str:
        before = f", {self.validation_loss_before:.4f} before" if self.validation_loss_before is not None else ""
        loss = f", validation loss {self.validation_loss:.4f}{before}" if self.validation_loss is not None else ""
        step = f"step {self.step:,}" if self.step is not None else "its checkpoint is in another process's folder"
        tested = f", test loss {self.test.loss:.4f}" if self.test is not None else ""
        return f"TrainingResult({str(self.folder)!r}: {step}{loss}{tested})"


def tune(
    recipe: TuneRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    group: mx.distributed.Group | None = None,
    callback: TrainingCallback | None = None,
) -> TrainingResult:
    """Fine-tune a model on a data file or folder: LoRA, DoRA, full fine-tuning, or DPO.

    Args:
        recipe: such as `TuneRecipe(model="OpenELM-270M", data="answers.jsonl", steps=200)`.
        output: folder for the run and the adapter with the best validation loss.
        resume: continue from the last checkpoint in `output`.
        group: processes that share each step; by default, those that `mlx.launch` started.
        callback: receives progress, metrics and messages.
    Raises:
        OpenELMError: one of its subclasses; the last good checkpoint is kept.
    """
    group, callback = group or mx.distributed.init(), callback or TrainingCallback()
    return run_tuning(recipe, Path(output), resume, group, callback)


def run_tuning(
    recipe: TuneRecipe,
    output: Path,
    resume: bool,
    group: mx.distributed.Group,
    callback: TrainingCallback,
    on_tuning: Callable[[Tuning], None] | None = None,
) -> TrainingResult:
    """`tune`, for callers that need the model and the examples before training starts."""
    with run_lock(output, group) as run:
        together(group, lambda: check_output(run.path, resume))
        tuning = prepare_tuning(recipe)
        if on_tuning is not None:
            on_tuning(tuning)
        callback.on_prepared(tuning.recipe.steps)
        tested: list[Evaluation] = []

        def test(trainer: Trainer) -> None:
            if tuning.test is not None:
                tested.append(evaluate_run(trainer, tuning.test, callback.on_testing))

        steps = tuning_steps(
            tuning,
            run,
            resume=resume,
            group=group,
            on_begin=callback.on_begin,
            on_step=callback.on_step,
            on_validating=callback.on_validating,
            on_message=callback.on_message,
            on_end=test,
        )
        result = _taken(steps, tuning.recipe.steps, run, callback)
        return replace(result, test=tested[0] if tested else None)


def pretrain(
    recipe: PretrainRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    group: mx.distributed.Group | None = None,
    callback: TrainingCallback | None = None,
) -> TrainingResult:
    """Train a model from scratch; tokenizes the corpus first, and trains a tokenizer if the recipe asks for one.

    Args:
        recipe: such as `PretrainRecipe(model="270M", data="stories/*.txt", tokenizer="tokenizer.model")`.
        output: folder for the run; each checkpoint in it is a model folder.
        resume, group, callback: as for `tune`.
    Raises:
        OpenELMError: one of its subclasses; the last good checkpoint is kept.
    """
    if not recipe.data:
        raise DataError("no data given; set `data`, for example to stories/*.txt")
    group, callback = group or mx.distributed.init(), callback or TrainingCallback()
    with run_lock(Path(output), group) as run:
        if not resume:
            together(group, lambda: check_fresh(run.path))
        tokenizer, corpus = prepare_pretraining(
            recipe, run.path, group, on_tokenizing=callback.on_tokenizing, on_message=callback.on_message
        )
        callback.on_prepared(recipe.steps)
        steps = pretraining_steps(
            recipe,
            corpus,
            tokenizer,
            run,
            resume=resume,
            group=group,
            on_begin=callback.on_begin,
            on_step=callback.on_step,
            on_validating=callback.on_validating,
            on_message=callback.on_message,
        )
        return _taken(steps, recipe.steps, run, callback)


def _taken(
    steps: Generator[Metrics, None, None], num_steps: int, run: LockedFolder, callback: TrainingCallback
) -> TrainingResult:
    """Take all steps, then read the result from the run's folder."""
    before = last = None
    with closing(steps):
        for metrics in steps:
            callback.on_metrics(metrics)
            last = metrics
            before = metrics.validation_loss if metrics.step == 0 else before
    best = best_checkpoint(run.path)
    newest = read_state(checkpoint_folders(run.path)[-1]) if best is not None else {}
    return TrainingResult(
        folder=run.name,
        checkpoint=best,
        step=read_state(best)["step"] if best is not None else None,
        validation_loss=newest.get("best_loss"),
        validation_loss_before=before,
        stopped_early=last is not None and last.step < num_steps,
        metrics=last,
    )
