"""The one training loop: pre-training, full fine-tuning, adapters and preferences differ in what they hand to it.

It validates, saves, tells of itself, and goes on where a run that was killed stopped.
"""

import json
import math
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import OutputError, TrainingError
from ..files.output import move_away, write_file
from ..generation.text import generate
from ..machine.device import peak_memory_bytes
from ..tokenizer.tokenizer import Tokenizer
from .checkpoints import (
    Checkpoint,
    WriteParameters,
    check_fresh,
    checkpoint_folders,
    load_checkpoint,
    remove_old_checkpoints,
    run_lock,
    save_checkpoint,
    together,
)
from .optimizer import learning_rate
from .trainer import Trainer

_SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class Metrics:
    """Figures of a step; a line of `metrics.jsonl`."""

    step: int  # how many are done
    loss: float | None  # what the objective minimises: for text cross-entropy, nats per token; none before the first
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens: int  # that counted so far; of preferences, pairs
    tokens_per_second: float
    peak_memory_bytes: int
    more: dict[str, float]  # further sums of the objective: z_loss; or margin and accuracy
    validation_loss: float | None = None
    validation: dict[str, float] | None = None  # further sums there
    sample: str | None = None  # what the model writes after the recipe's prompt, at each validation

    def to_dict(self) -> dict[str, Any]:
        """All figures on one level."""
        values = asdict(self)
        values.update(values.pop("more"))
        values.update({f"validation_{name}": figure for name, figure in (values.pop("validation") or {}).items()})
        return values


def train(
    trainer: Trainer,
    tokenizer: Tokenizer | None,
    run: Path,
    write: WriteParameters,
    *,
    resume: bool = False,
    on_step: Callable[[Metrics], None] = lambda metrics: None,
    on_message: Callable[[str], None] = lambda message: None,
) -> Generator[Metrics, None, None]:
    """Train to the recipe's last step; yields figures each `log_every` steps and at each validation.

    Checkpoints go to `run/checkpoints`, figures to `run/metrics.jsonl`. Closing the iterator, or an interrupt within
    it, saves a checkpoint first. Only the first process writes.

    Args:
        tokenizer: for samples; without it there are none.
        write: puts parameters into the folder of a checkpoint.
        resume: go on from the last checkpoint that can be read.
        on_step: called with every step's figures.
        on_message: called with what a person should know.
    Raises:
        TrainingError: if the run cannot start or go on; the last good checkpoint stays.
    """
    with run_lock(run, trainer.group):
        yield from _train(trainer, tokenizer, run, write, resume, on_step, on_message)


def _train(
    trainer: Trainer,
    tokenizer: Tokenizer | None,
    run: Path,
    write: WriteParameters,
    resume: bool,
    on_step: Callable[[Metrics], None],
    on_message: Callable[[str], None],
) -> Generator[Metrics, None, None]:
    recipe = trainer.recipe
    writes = trainer.group.rank() == 0
    progress = _Progress()
    if resume:
        progress = together(trainer.group, lambda: _resume(trainer, run, on_message))
        if writes:  # the run may have been killed before it did so
            remove_old_checkpoints(run, recipe.keep_checkpoints, progress.best_step)
    else:
        together(trainer.group, lambda: check_fresh(run))
    together(trainer.group, lambda: _cut_metrics(run, trainer.step, recipe.checkpoint_every) if writes else None)

    saved = trainer.step
    started, started_at = time.perf_counter(), progress.tokens

    def save() -> None:
        state = {
            **asdict(progress),
            "step": trainer.step,
            "data": trainer.data.fingerprint,
            "recipe": recipe.to_dict(),
        }
        save_checkpoint(run, Checkpoint(trainer.parameters, trainer.moments, state), write, recipe.keep_checkpoints)

    def savetogether() -> None:
        nonlocal saved
        together(trainer.group, save if writes else lambda: None)
        saved = trainer.step

    loss, *more = trainer.objective.names

    def validated(metrics: Metrics) -> Metrics:
        nonlocal started
        paused = time.perf_counter()
        found = trainer.validation()
        sample = _sample(trainer, tokenizer) if writes and tokenizer and recipe.sample_prompt else None
        started += time.perf_counter() - paused  # the speed is that of training
        if not math.isfinite(found[loss]):
            return replace(metrics, sample=sample)
        if metrics.step:  # what is kept has to have been trained
            progress.add(found[loss], metrics.step)
        further = {name: found[name] for name in more}
        return replace(metrics, validation_loss=found[loss], validation=further, sample=sample)

    def finish(metrics: Metrics) -> Generator[Metrics, None, None]:
        """Validate after a step, tell of it and save, as it is due."""
        is_last = metrics.step == recipe.steps
        if metrics.step % recipe.validate_every == 0 or is_last:
            metrics = validated(metrics)
        is_told = metrics.step % recipe.log_every == 0 or metrics.validation_loss is not None or is_last
        if is_told:
            together(trainer.group, lambda: _append_metrics(run, metrics) if writes else None)
        progress.pending = None
        on_step(metrics)
        if is_told:
            yield metrics
        if metrics.step % recipe.checkpoint_every == 0 or is_last or progress.best_step == metrics.step:
            savetogether()

    try:
        if recipe.validate_first and trainer.step == 0:
            metrics = validated(Metrics(0, None, 0.0, learning_rate(recipe, 0), 0, 0.0, peak_memory_bytes(), {}))
            if metrics.validation_loss is not None:
                together(trainer.group, lambda: _append_metrics(run, metrics) if writes else None)
                yield metrics
        if progress.pending is not None:
            yield from finish(Metrics(**progress.pending))
        while trainer.step < recipe.steps and not (recipe.early_stop and progress.worse >= recipe.early_stop):
            rate = learning_rate(recipe, trainer.step)
            figures = trainer.take_step()
            progress.tokens += int(figures["count"])
            metrics = Metrics(
                trainer.step,
                figures[loss],
                figures["gradient_norm"],
                rate,
                progress.tokens,
                (progress.tokens - started_at) / (time.perf_counter() - started),
                peak_memory_bytes(),
                {name: figures[name] for name in more},
            )
            progress.pending = asdict(metrics)
            yield from finish(metrics)
    finally:
        if writes and trainer.step > saved:
            save()


@dataclass
class _Progress:
    """What a run knows beside its parameters; a part of each checkpoint's state."""

    tokens: int = 0
    best_loss: float | None = None  # on held-out rows
    best_step: int | None = None
    worse: int = 0  # validations in a row that were no better
    pending: dict[str, Any] | None = None  # figures of a step that was taken, but not yet validated and told of

    def add(self, loss: float, step: int) -> None:
        """Take in the loss on held-out rows after a step."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.worse = loss, step, 0
        else:
            self.worse += 1


def _resume(trainer: Trainer, run: Path, on_message: Callable[[str], None]) -> _Progress:
    damaged: list[Path] = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            checkpoint = load_checkpoint(folder)
        except TrainingError as error:
            on_message(f"{error}; going back to the one before")
            damaged.append(folder)
            continue
        state = checkpoint.state
        found = trainer.recipe.differences(state["recipe"])
        if state.get("data", state.get("corpus")) != trainer.data.fingerprint:
            found.append("the model, the data or how it is read")
        if found:
            raise TrainingError(f"{run} was trained otherwise: {'; '.join(found)}; name another --output to begin anew")
        # In the order of the network: the gradient's norm is a sum over it, and a file has an order of its own.
        trainer.parameters = {name: checkpoint.parameters[name] for name in trainer.parameters}
        trainer.moments = checkpoint.moments
        trainer.step = state["step"]
        if trainer.group.rank() == 0:
            for later in damaged:  # else they would count as the last ones
                on_message(f"what is left of it is now {move_away(later, f'damaged-{later.name}')}")
        return _Progress(**{e.name: state[e.name] for e in fields(_Progress) if e.name in state})
    raise TrainingError(f"{run} holds no checkpoint that can be read; start without --resume")


def _sample(trainer: Trainer, tokenizer: Tokenizer) -> str:
    """The recipe's prompt and how the model goes on with it now."""
    prompt = trainer.recipe.sample_prompt
    room = trainer.model.config.max_context_length - len(tokenizer.encode(prompt))
    model = trainer.current_model()
    model.eval()
    text = generate(model, tokenizer, prompt, max_tokens=min(_SAMPLE_TOKENS, room)) if room > 0 else ""
    model.train()
    return prompt + text


def _append_metrics(run: Path, metrics: Metrics) -> None:
    path = run / "metrics.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics.to_dict()) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _cut_metrics(run: Path, step: int, checkpoint_every: int) -> None:
    """Drop the lines of steps that will be taken again, or that were not written to the end.

    Raises:
        TrainingError: if a run begins where an earlier one, which had got to a checkpoint, left its metrics.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    try:
        content = path.read_text(encoding="utf-8")
        lines = [line for line in content.splitlines() if line.endswith("}")]
        steps = [int(json.loads(line)["step"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} holds no metrics of a run: {error}; name another --output") from error
    if step == 0 and max(steps, default=0) > checkpoint_every:
        raise TrainingError(f"{path} holds the metrics of a run whose checkpoints are gone; name another --output")
    kept = "".join(f"{line}\n" for line, of in zip(lines, steps, strict=True) if step and of <= step)
    if kept != content:
        write_file(path, kept, overwrite=True)
