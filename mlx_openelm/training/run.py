"""Complete training runs: from a recipe to a result, in a folder that is locked against other runs."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..errors import DataError
from ..files.lock import LockedFolder
from ..runs import best_checkpoint, newest_state, read_state
from .callback import Metrics, TrainingCallback
from .checkpoints import check_output, run_lock, together
from .held_out import HeldOutLoss, evaluate_run
from .loop import changed_error
from .pretrain import Pretraining, prepare_pretraining, pretraining_steps
from .pretrain_recipe import PretrainRecipe
from .trainer import Trainer
from .tune import Tuning, prepare_tuning, tuning_steps
from .tune_recipe import TuneRecipe


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
    test: HeldOutLoss | None = None

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
        if resume and (done := _finished(recipe, run)) is not None:
            return done
        tuning = prepare_tuning(recipe)
        if on_tuning is not None:
            on_tuning(tuning)
        callback.on_prepared(tuning.recipe.steps)
        tested: list[HeldOutLoss] = []

        def test(trainer: Trainer) -> None:
            if tuning.test is not None:
                tested.append(evaluate_run(trainer, tuning.test, callback.on_testing))

        steps = tuning_steps(tuning, run, resume=resume, group=group, callback=callback, on_end=test)
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
    group, callback = group or mx.distributed.init(), callback or TrainingCallback()
    return run_pretraining(recipe, Path(output), resume, group, callback)


def run_pretraining(
    recipe: PretrainRecipe,
    output: Path,
    resume: bool,
    group: mx.distributed.Group,
    callback: TrainingCallback,
    on_pretraining: Callable[[Pretraining], None] | None = None,
) -> TrainingResult:
    """`pretrain`, for callers that need the recipe's open fields and the data before training starts."""
    if not recipe.data:
        raise DataError("no data given; set `data`, for example to stories/*.txt")
    with run_lock(output, group) as run:
        together(group, lambda: check_output(run.path, resume))
        if resume and (done := _finished(recipe, run)) is not None:
            return done
        state = newest_state(run.path) if resume else None
        before = None if state is None else state.table("recipe")
        if before is not None and (changes := recipe.continued(before).differences(before)):
            raise changed_error(run.path, changes)
        pretraining = prepare_pretraining(recipe, run.path, group, callback, before, state["step"] if state else 0)
        if on_pretraining is not None:
            on_pretraining(pretraining)
        recipe = pretraining.recipe
        callback.on_prepared(recipe.steps)
        steps = pretraining_steps(
            recipe, pretraining.corpus, pretraining.tokenizer, run, resume=resume, group=group, callback=callback
        )
        return _taken(steps, recipe.steps, run, callback)


def _finished(recipe: PretrainRecipe | TuneRecipe, run: LockedFolder) -> TrainingResult | None:
    """The result of a run that has no step left to take with this recipe; None if it may have one.

    Neither the model nor the data is read.
    """
    state = newest_state(run.path)
    before = state.table("recipe")
    if isinstance(recipe, PretrainRecipe):
        recipe = recipe.continued(before)
    stopped = bool(recipe.early_stop) and (state.get("worse") or 0) >= recipe.early_stop
    is_done = 0 < recipe.steps <= state["step"] or (recipe.steps > 0 and stopped)
    measures = isinstance(recipe, TuneRecipe) and bool(recipe.test)
    if not is_done or measures or state.get("pending") or recipe.differences(before):
        return None
    return _result(run, None, None, stopped_early=state["step"] < recipe.steps)


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
    return _result(run, before, last, stopped_early=last is not None and last.step < num_steps)


def _result(run: LockedFolder, before: float | None, last: Metrics | None, *, stopped_early: bool) -> TrainingResult:
    best = best_checkpoint(run.path)
    return TrainingResult(
        folder=run.name,
        checkpoint=best,
        step=read_state(best)["step"] if best is not None else None,
        validation_loss=newest_state(run.path).get("best_loss") if best is not None else None,
        validation_loss_before=before,
        stopped_early=stopped_early,
        metrics=last,
    )
