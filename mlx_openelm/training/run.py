"""Complete training runs: from a recipe to a result, in a folder that is locked against other runs."""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..errors import ConfigError, DataError
from ..files.lock import LockedFolder
from ..runs import best_checkpoint, newest_state, read_state
from .callback import Metrics, TrainingCallback
from .checkpoint_metric import CheckpointMetric, MetricFunction, as_metric, metric_changes
from .checkpoints import check_output, run_lock, together
from .held_out import HeldOutLoss, evaluate_run
from .pretrain import Pretraining, prepare_pretraining, pretraining_steps
from .pretrain_recipe import PretrainRecipe
from .resume import changed_error
from .trainer import Trainer
from .tune import Tuning, prepare_tuning, tuning_steps
from .tune_recipe import TuneRecipe


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training run.

    Attributes:
        folder: the run's folder; after `tune` it is also the adapter.
        checkpoint: folder of the best checkpoint, by the metric or the validation loss; without either, of the last
            one. None in a process that does not share the folder with the first one.
        step: number of steps at that checkpoint.
        validation_loss: its validation loss, in nats per token (pairs: per pair).
        validation_loss_before: validation loss before the first step, if this call measured it.
        stopped_early: whether `early_stop` ended the run before its last step.
        metrics: the last metrics; None if no step was left to train.
        test: how well the adapter predicts the test file, if there is one.
        evaluation: figures of that checkpoint by name, if the run has a metric; the first one counts.
        evaluation_before: figures before the first step, if this call measured them.
    """

    folder: Path
    checkpoint: Path | None
    step: int | None
    validation_loss: float | None
    validation_loss_before: float | None
    stopped_early: bool
    metrics: Metrics | None
    test: HeldOutLoss | None = None
    evaluation: Mapping[str, float] | None = None
    evaluation_before: Mapping[str, float] | None = None

    def __repr__(self) -> str:
        before = f", {self.validation_loss_before:.4f} before" if self.validation_loss_before is not None else ""
        loss = f", validation loss {self.validation_loss:.4f}{before}" if self.validation_loss is not None else ""
        step = f"step {self.step:,}" if self.step is not None else "its checkpoint is in another process's folder"
        tested = f", test loss {self.test.loss:.4f}" if self.test is not None else ""
        evaluated = "".join(f", {name} {value:.4f}" for name, value in (self.evaluation or {}).items())
        return f"TrainingResult({str(self.folder)!r}: {step}{loss}{evaluated}{tested})"


def tune(
    recipe: TuneRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    group: mx.distributed.Group | None = None,
    callback: TrainingCallback | None = None,
    evaluate: CheckpointMetric | MetricFunction | None = None,
) -> TrainingResult:
    """Fine-tune a model on a data file or folder: LoRA, DoRA, full fine-tuning, or DPO.

    Args:
        recipe: such as `TuneRecipe(model="OpenELM-270M", data="answers.jsonl", steps=200)`.
        output: folder for the run and its best adapter.
        resume: continue from the last checkpoint in `output`.
        group: processes that share each step; by default, those that `mlx.launch` started.
        callback: receives progress, metrics and messages.
        evaluate: a function of the model and its tokenizer that returns a figure, or several by name; or a
            `TaskMetric`. It is called every `evaluate_every` steps, and the best checkpoint is the one with the highest
            figure, instead of the lowest validation loss. Of several figures, the first counts.
    Raises:
        OpenELMError: one of its subclasses; the last good checkpoint is kept.
    """
    group, callback = group or mx.distributed.init(), callback or TrainingCallback()
    return run_tuning(recipe, Path(output), resume, group, callback, metric=_metric(recipe, evaluate))


def run_tuning(
    recipe: TuneRecipe,
    output: Path,
    resume: bool,
    group: mx.distributed.Group,
    callback: TrainingCallback,
    on_tuning: Callable[[Tuning], None] | None = None,
    metric: CheckpointMetric | None = None,
) -> TrainingResult:
    """`tune`, for callers that need the model and the examples before training starts."""
    with run_lock(output, group) as run:
        together(group, lambda: check_output(run.path, resume))
        if resume and (done := _finished(recipe, run, metric)) is not None:
            return done
        tuning = prepare_tuning(recipe, has_metric=metric is not None)
        if on_tuning is not None:
            on_tuning(tuning)
        callback.on_prepared(tuning.recipe.steps)
        tested: list[HeldOutLoss] = []

        def test(trainer: Trainer) -> None:
            if tuning.test is not None:
                tested.append(evaluate_run(trainer, tuning.test, callback.on_testing))

        steps = tuning_steps(tuning, run, resume=resume, group=group, callback=callback, metric=metric, on_end=test)
        result = _taken(steps, tuning.recipe.steps, run, callback)
        return replace(result, test=tested[0] if tested else None)


def pretrain(
    recipe: PretrainRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    group: mx.distributed.Group | None = None,
    callback: TrainingCallback | None = None,
    evaluate: CheckpointMetric | MetricFunction | None = None,
) -> TrainingResult:
    """Train a model from scratch; tokenizes the corpus first, and trains a tokenizer if the recipe asks for one.

    Args:
        recipe: such as `PretrainRecipe(model="270M", data="stories/*.txt", tokenizer="tokenizer.model")`.
        output: folder for the run; each checkpoint in it is a model folder.
        resume, group, callback, evaluate: as for `tune`.
    Raises:
        OpenELMError: one of its subclasses; the last good checkpoint is kept.
    """
    group, callback = group or mx.distributed.init(), callback or TrainingCallback()
    return run_pretraining(recipe, Path(output), resume, group, callback, metric=_metric(recipe, evaluate))


def run_pretraining(
    recipe: PretrainRecipe,
    output: Path,
    resume: bool,
    group: mx.distributed.Group,
    callback: TrainingCallback,
    on_pretraining: Callable[[Pretraining], None] | None = None,
    metric: CheckpointMetric | None = None,
) -> TrainingResult:
    """`pretrain`, for callers that need the recipe's open fields and the data before training starts."""
    if not recipe.data:
        raise DataError("no data given; set `data`, for example to stories/*.txt")
    with run_lock(output, group) as run:
        together(group, lambda: check_output(run.path, resume))
        if resume and (done := _finished(recipe, run, metric)) is not None:
            return done
        state = newest_state(run.path) if resume else None
        before = None if state is None else state.table("recipe")
        if state is not None and before is not None:
            changes = [*recipe.continued(before).differences(before), *metric_changes(metric, state)]
            if changes:
                raise changed_error(run.path, changes)
        pretraining = prepare_pretraining(recipe, run.path, group, callback, before, state["step"] if state else 0)
        if on_pretraining is not None:
            on_pretraining(pretraining)
        recipe = pretraining.recipe
        callback.on_prepared(recipe.steps)
        data = pretraining.corpus, pretraining.tokenizer
        steps = pretraining_steps(recipe, *data, run, resume=resume, group=group, callback=callback, metric=metric)
        return _taken(steps, recipe.steps, run, callback)


def _metric(
    recipe: PretrainRecipe | TuneRecipe, evaluate: CheckpointMetric | MetricFunction | None
) -> CheckpointMetric | None:
    if recipe.evaluate and evaluate is None:
        tasks = ", ".join(map(repr, recipe.evaluate))
        raise ConfigError(f"the recipe names tasks to evaluate; also pass evaluate=TaskMetric([{tasks}])")
    return as_metric(evaluate)


def _finished(
    recipe: PretrainRecipe | TuneRecipe, run: LockedFolder, metric: CheckpointMetric | None
) -> TrainingResult | None:
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
    changes = [*recipe.differences(before), *metric_changes(metric, state)]
    if not is_done or measures or state.get("pending") or changes:
        return None
    return _result(run, None, None, recipe.steps)


def _taken(
    steps: Generator[Metrics, None, None], num_steps: int, run: LockedFolder, callback: TrainingCallback
) -> TrainingResult:
    """Take all steps, then read the result from the run's folder."""
    first = last = None
    with closing(steps):
        for metrics in steps:
            callback.on_metrics(metrics)
            last = metrics
            first = metrics if metrics.step == 0 else first
    return _result(run, first, last, num_steps)


def _result(run: LockedFolder, first: Metrics | None, last: Metrics | None, num_steps: int) -> TrainingResult:
    """The result of a run that has no step left to take.

    Args:
        first: the metrics before the first step.
        last: the metrics of the last step that was taken, if there was one.
    """
    best = best_checkpoint(run.path)
    state = newest_state(run.path) if best is not None else {}
    return TrainingResult(
        folder=run.name,
        checkpoint=best,
        step=read_state(best)["step"] if best is not None else None,
        validation_loss=state.get("best_loss"),
        validation_loss_before=first.validation_loss if first is not None else None,
        stopped_early=(state.get("step", num_steps) if last is None else last.step) < num_steps,
        metrics=last,
        evaluation=state.get("best_evaluation"),
        evaluation_before=first.evaluation if first is not None else None,
    )
