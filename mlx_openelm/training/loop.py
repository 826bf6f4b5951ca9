"""The training loop, shared by pre-training, full fine-tuning, adapters and preference tuning.

It validates, saves checkpoints, reports metrics, and resumes an interrupted run where it stopped: on the CPU equal to
the bit to a run without interruption; on GPUs up to rounding where the embedding is trained (see `docs/tuning.md`).
"""

import json
import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import OutputError, TrainingError
from ..files.json_file import parse_json_object
from ..files.lock import LockedFolder
from ..files.output import move_away, output_file
from ..files.paths import check_regular, exists
from ..generation.sampling import SamplingConfig
from ..generation.text import generate
from ..machine.device import limited_cache, peak_memory_bytes, wired_memory
from ..runs import METRICS, checkpoint_folders
from ..tokenizer.tokenizer import Tokenizer
from .callback import Metrics, TrainingCallback
from .checkpoints import (
    Checkpoint,
    WriteParameters,
    check_fresh,
    check_parameters,
    clear_begun,
    load_checkpoint,
    mark_begun,
    remove_old_checkpoints,
    run_lock,
    save_checkpoint,
    together,
)
from .optimizer import learning_rate
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
) -> Generator[Metrics, None, None]:
    """Train to the recipe's last step; yields metrics every `log_every` steps and at each validation.

    Checkpoints go to `run/checkpoints`, metrics to `run/metrics.jsonl`. If the iterator is closed or interrupted, it
    saves a checkpoint first. Only the first process writes.

    Args:
        tokenizer: for text samples; None: no samples.
        run: folder of the run, or its lock from `run_lock`.
        write: writes the parameters into a checkpoint folder.
        resume: continue from the last readable checkpoint.
        callback: receives every step, the progress of validations, and messages for the user.
    Raises:
        TrainingError: if the run cannot start or continue; the last good checkpoint is kept.
    """
    with run_lock(run, trainer.group) as folder, wired_memory(), limited_cache():
        running = _Run(trainer, tokenizer, folder.path, write, callback or TrainingCallback())
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
    ):
        self._trainer = trainer
        self._recipe = trainer.recipe
        self._tokenizer = tokenizer
        self._folder = folder
        self._write = write
        self._callback = callback
        self._base = os.path.relpath(os.getcwd(), folder)  # what the recipe's relative paths are relative to
        self._writes = trainer.group.rank() == 0
        self._loss, *self._more = trainer.objective.names
        self._progress = _Progress()

    def begin(self, resume: bool) -> None:
        """Start a new run, or restore the last checkpoint."""
        if resume:
            self._progress = together(
                self._trainer.group, lambda: _resume(self._trainer, self._folder, self._callback.on_message)
            )
        else:
            together(self._trainer.group, lambda: check_fresh(self._folder))
        self._in_first_process(self._tidy)
        self._saved = self._trainer.step
        self._callback.on_begin(self._trainer.step)
        self._started, self._tokens_before = time.perf_counter(), self._progress.tokens

    def steps(self) -> Generator[Metrics, None, None]:
        """Take all remaining steps."""
        recipe, progress = self._recipe, self._progress
        if recipe.validate_first and self._trainer.step == 0:
            metrics = Metrics(0, None, 0.0, learning_rate(recipe, 0), 0, 0.0, peak_memory_bytes(), {})
            metrics = self._validated(metrics)
            if metrics.validation_loss is not None:
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
        is_reported = metrics.step % recipe.log_every == 0 or metrics.validation_loss is not None or is_last
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
        if metrics.step:  # the untrained model cannot be the best checkpoint
            self._progress.add(loss, metrics.step)
        further = {name: found[name] for name in self._more}
        return replace(metrics, validation_loss=loss, validation=further, sample=sample)

    def _save(self) -> None:
        trainer = self._trainer
        state = {
            **asdict(self._progress),
            "step": trainer.step,
            "data": trainer.data.fingerprint,
            "recipe": self._recipe.to_dict(),
            "folder": self._base,
        }
        checkpoint = Checkpoint(trainer.parameters, trainer.moments, state)
        save_checkpoint(self._folder, checkpoint, self._write, self._recipe.keep_checkpoints)

    def _in_first_process(self, action: Callable[[], object]) -> None:
        """Run an action in the first process only; if it fails, the other processes fail too."""
        together(self._trainer.group, action if self._writes else lambda: None)


@dataclass
class _Progress:
    """The progress of a run; part of each checkpoint's state."""

    tokens: int = 0
    best_loss: float | None = None  # best validation loss
    best_step: int | None = None
    worse: int = 0  # consecutive validations without improvement
    pending: dict[str, Any] | None = None  # metrics of a step that was taken, but not yet validated and reported

    def add(self, loss: float, step: int) -> None:
        """Record the validation loss after a step."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.worse = loss, step, 0
        else:
            self.worse += 1


def _resume(trainer: Trainer, run: Path, on_message: Callable[[str], None]) -> _Progress:
    damaged: list[Path] = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            checkpoint = load_checkpoint(folder)
            progress = _progress_of(checkpoint, folder)
            found = _changes(trainer, checkpoint)
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


def _changes(trainer: Trainer, checkpoint: Checkpoint) -> list[str]:
    """What would make the result of a resumed run different."""
    state = checkpoint.state
    found = trainer.recipe.differences(state.get("recipe") or {})
    if state.get("data", state.get("corpus")) != trainer.data.fingerprint:
        found.append("the model, the data or how the data is read")
    return found


def _progress_of(checkpoint: Checkpoint, folder: Path) -> _Progress:
    state = checkpoint.state
    pending = state.get("pending")
    if pending is not None and set(pending) != {entry.name for entry in fields(Metrics)}:
        raise TrainingError(f"{folder} is damaged: the pending metrics in state.json are incomplete")
    return _Progress(**{e.name: state[e.name] for e in fields(_Progress) if state.get(e.name) is not None})


def _sample(trainer: Trainer, tokenizer: Tokenizer) -> str:
    """The recipe's prompt with the model's current continuation."""
    prompt = trainer.recipe.sample_prompt
    room = trainer.model.config.max_context_length - len(tokenizer.encode(prompt))
    model = trainer.current_model()
    model.eval()
    options: dict[str, Any] = {"max_tokens": min(_SAMPLE_TOKENS, room), "sampling": SamplingConfig()}
    text = generate(model, tokenizer, prompt, **options) if room > 0 else ""
    model.train()
    return prompt + text


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
