"""The training loop, shared by pre-training, full fine-tuning, adapters and preference tuning.

It validates, saves checkpoints, reports metrics, and resumes an interrupted run where it stopped: on the CPU equal to
the bit to a run without interruption; on GPUs up to rounding where the embedding is trained (see `docs/tuning.md`).
"""

import json
import math
import os
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from pathlib import Path

from ..errors import OutputError, TrainingError
from ..files.json_file import parse_json_object
from ..files.lock import LockedFolder
from ..files.output import output_file
from ..files.paths import check_regular, exists
from ..generation.sampling import SamplingConfig
from ..generation.text import generate
from ..machine.device import limited_cache, peak_memory_bytes, wired_memory
from ..runs import METRICS
from ..tokenizer.tokenizer import Tokenizer
from .callback import Metrics, TrainingCallback
from .checkpoint_metric import CheckpointMetric, figures_of, metric_state
from .checkpoints import (
    Checkpoint,
    WriteParameters,
    check_fresh,
    clear_begun,
    mark_begun,
    remove_old_checkpoints,
    run_lock,
    save_checkpoint,
    together,
)
from .optimizer import learning_rate
from .resume import Progress, resume_run
from .trainer import Trainer

_SAMPLE_TOKENS = 60


def train(
    trainer: Trainer,
    tokenizer: Tokenizer | None,
    run: Path | LockedFolder,
    write: WriteParameters,
    *,
    resume: bool = False,
    callback: TrainingCallback | None = None,
    metric: CheckpointMetric | None = None,
) -> Generator[Metrics, None, None]:
    """Train to the recipe's last step; yields metrics every `log_every` steps and at each validation or evaluation.

    Checkpoints go to `run/checkpoints`, metrics to `run/metrics.jsonl`. If the iterator is closed or interrupted, it
    saves a checkpoint first. Only the first process writes.

    Args:
        tokenizer: for text samples and the metric; None: neither.
        run: folder of the run, or its lock from `run_lock`.
        write: writes the parameters into a checkpoint folder.
        resume: continue from the last readable checkpoint.
        callback: receives every step, the progress of validations, and messages for the user.
        metric: says which checkpoint is the best; by default, the validation loss does.
    Raises:
        TrainingError: if the run cannot start or continue; the last good checkpoint is kept.
    """
    with run_lock(run, trainer.group) as folder, wired_memory(), limited_cache():
        running = _Run(trainer, tokenizer, folder.path, write, callback or TrainingCallback(), metric)
        running.begin(resume)
        try:
            yield from running.steps()
        finally:
            running.end()


class _Run:
    """A run in progress, in a locked folder."""

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: Tokenizer | None,
        folder: Path,
        write: WriteParameters,
        callback: TrainingCallback,
        metric: CheckpointMetric | None,
    ):
        assert tokenizer is not None or metric is None, "a metric needs the tokenizer"
        self._trainer = trainer
        self._recipe = trainer.recipe
        self._tokenizer = tokenizer
        self._folder = folder
        self._write = write
        self._callback = callback
        self._metric = metric
        self._base = os.path.relpath(os.getcwd(), folder)  # what the recipe's relative paths are relative to
        self._writes = trainer.group.rank() == 0
        self._loss, *self._more = trainer.objective.names
        self._progress = Progress()

    def begin(self, resume: bool) -> None:
        """Start a new run, or restore the last checkpoint."""
        if resume:
            self._progress = together(
                self._trainer.group,
                lambda: resume_run(self._trainer, self._folder, self._metric, self._callback.on_message),
            )
        else:
            together(self._trainer.group, lambda: check_fresh(self._folder))
        if (metric := self._metric) is not None and (tokenizer := self._tokenizer) is not None:
            together(self._trainer.group, lambda: metric.check(self._trainer.model, tokenizer))
        self._in_first_process(self._tidy)
        self._saved = self._trainer.step
        self._callback.on_begin(self._trainer.step)
        self._started, self._tokens_before = time.perf_counter(), self._progress.tokens

    def steps(self) -> Generator[Metrics, None, None]:
        """Take all remaining steps."""
        recipe, progress = self._recipe, self._progress
        if recipe.validate_first and self._trainer.step == 0:
            metrics = Metrics(0, None, 0.0, learning_rate(recipe, 0), 0, 0.0, peak_memory_bytes(), {})
            metrics = self._evaluated(self._validated(metrics))
            if _is_measured(metrics):
                self._in_first_process(lambda: _append_metrics(self._folder, metrics))
                yield metrics
        if progress.pending is not None:
            yield from self._finished(Metrics(**progress.pending))
        while self._trainer.step < recipe.steps and not (recipe.early_stop and progress.worse >= recipe.early_stop):
            metrics = self._step()
            progress.pending = asdict(metrics)
            self._trainer.raise_interruption()
            yield from self._finished(metrics)

    def end(self) -> None:
        """Save unsaved progress, however the run ended."""
        if not self._writes:
            return
        if self._trainer.step > self._saved:
            self._save()
        elif not exists(self._folder / METRICS):
            clear_begun(self._folder)

    def _tidy(self) -> None:
        """Remove leftovers of an interrupted run that this run will write again."""
        step = self._trainer.step
        if step == 0:
            mark_begun(self._folder)
        else:  # the run may have been killed before it removed them
            remove_old_checkpoints(self._folder, self._recipe.keep_checkpoints, self._progress.best_step)
        _cut_metrics(self._folder, step)

    def _step(self) -> Metrics:
        rate = learning_rate(self._recipe, self._trainer.step)
        figures = self._trainer.take_step()
        self._progress.tokens += int(figures["count"])
        seconds = time.perf_counter() - self._started
        return Metrics(
            self._trainer.step,
            figures[self._loss],
            figures["gradient_norm"],
            rate,
            self._progress.tokens,
            (self._progress.tokens - self._tokens_before) / seconds,
            peak_memory_bytes(),
            {name: figures[name] for name in self._more},
        )

    def _finished(self, metrics: Metrics) -> Generator[Metrics, None, None]:
        """Validate, report and save after a step, whichever is due."""
        recipe, progress = self._recipe, self._progress
        is_last = metrics.step == recipe.steps
        if metrics.step % recipe.validate_every == 0 or is_last:
            metrics = self._validated(metrics)
        if metrics.step % (recipe.evaluate_every or recipe.validate_every) == 0 or is_last:
            metrics = self._evaluated(metrics)
        progress.add(metrics, by_metric=self._metric is not None)
        is_reported = metrics.step % recipe.log_every == 0 or _is_measured(metrics) or is_last
        if is_reported:
            self._in_first_process(lambda: _append_metrics(self._folder, metrics))
        progress.pending = None
        self._callback.on_step(metrics)
        if is_reported:
            yield metrics
        if metrics.step % recipe.checkpoint_every == 0 or is_last or progress.best_step == metrics.step:
            self._in_first_process(self._save)
            self._saved = metrics.step

    def _validated(self, metrics: Metrics) -> Metrics:
        paused = time.perf_counter()
        found = self._trainer.validation(self._callback.on_validating)
        sample = None
        if self._writes and self._tokenizer and self._recipe.sample_prompt:
            sample = _sample(self._trainer, self._tokenizer)
        self._started += time.perf_counter() - paused  # the speed counts training time only
        loss = found[self._loss]
        if not math.isfinite(loss):
            return replace(metrics, sample=sample)
        further = {name: found[name] for name in self._more}
        return replace(metrics, validation_loss=loss, validation=further, sample=sample)

    def _evaluated(self, metrics: Metrics) -> Metrics:
        if self._metric is None or self._tokenizer is None:
            return metrics
        paused = time.perf_counter()
        with self._trainer.inference() as model:
            group, on_progress = self._trainer.group, self._callback.on_evaluating
            found = figures_of(self._metric, model, self._tokenizer, group, on_progress)
        self._started += time.perf_counter() - paused
        figures = {name: value for name, value in found.items() if math.isfinite(value)}
        if list(figures)[:1] != list(found)[:1]:
            self._callback.on_message(f"{next(iter(found))} is not finite at step {metrics.step:,}; it does not count")
            return metrics
        return replace(metrics, evaluation=figures)

    def _save(self) -> None:
        trainer = self._trainer
        state = {
            **asdict(self._progress),
            "step": trainer.step,
            "data": trainer.data.fingerprint,
            "metric": metric_state(self._metric),
            "recipe": self._recipe.to_dict(),
            "folder": self._base,
        }
        checkpoint = Checkpoint(trainer.parameters, trainer.moments, state)
        save_checkpoint(self._folder, checkpoint, self._write, self._recipe.keep_checkpoints)

    def _in_first_process(self, action: Callable[[], object]) -> None:
        """Run an action in the first process only; if it fails, the other processes fail too."""
        together(self._trainer.group, action if self._writes else lambda: None)


def _sample(trainer: Trainer, tokenizer: Tokenizer) -> str:
    """The recipe's prompt with the model's current continuation."""
    prompt = trainer.recipe.sample_prompt
    room = trainer.model.config.max_context_length - len(tokenizer.encode(prompt))
    if room <= 0:
        return prompt
    with trainer.inference() as model:
        length = min(_SAMPLE_TOKENS, room)
        return prompt + generate(model, tokenizer, prompt, max_tokens=length, sampling=SamplingConfig())


def _is_measured(metrics: Metrics) -> bool:
    return metrics.validation_loss is not None or metrics.evaluation is not None


def _append_metrics(run: Path, metrics: Metrics) -> None:
    path = run / METRICS
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics.to_dict()) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _cut_metrics(run: Path, step: int) -> None:
    """Drop the metrics of steps that will be taken again, and an incomplete last line.

    Raises:
        TrainingError: if the file contains anything but metrics.
    """
    with output_file(run / METRICS, overwrite=True) as metrics:
        if not exists(metrics.path):
            return
        if step == 0:  # from a run that saved no checkpoint
            metrics.remove()
            return
        check_regular(metrics.path, TrainingError)
        content = metrics.path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        kept = bytearray()
        for number, line in enumerate(lines, start=1):
            where = f"{metrics.name}, line {number}"
            if parse_json_object(line.decode(errors="replace").rstrip(), where, TrainingError).whole("step") <= step:
                kept += line
        if kept != content:
            metrics.write(bytes(kept))
