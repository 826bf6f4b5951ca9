"""The one training loop: pre-training, full fine-tuning, adapters and preferences differ in what they hand to it.

What is trained and its optimizer are float32; the step computes in the recipe's type. A gradient is the sum over
whatever counts in all micro-batches and processes, divided by its number: how a batch is split changes nothing.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from .backward import batch_losses, gradients_of, set_parameters
from .batch import Rows, make_batch
from .checkpoints import Checkpoint, WriteParameters, checkpoint_folders, load_checkpoint, save_checkpoint
from .device import DTYPES, peak_memory_bytes
from .errors import OpenELMError, OutputError, TrainingError
from .generate import generate
from .lora import set_dropout_keys
from .loss import Batch, Objective
from .model import OpenELM
from .optimizer import Moments, Tensors, adamw, clipped, learning_rate
from .recipe import Recipe
from .tokenizer import Tokenizer

_SAMPLE_TOKENS = 60


class TrainingData(Protocol):
    """Rows to train on and to validate with, the same whenever they are asked for."""

    rows_per_step: int
    rows_per_entry: int  # rows that stay together: 2 for pairs
    fingerprint: str  # of all that decides what the rows are

    def step(self, step: int, first: int = 0, count: int | None = None) -> Rows:
        """Rows `first` to `first + count` of a step's."""

    def validation(self, first: int, stride: int) -> Iterable[Rows]:
        """Every `stride`-th batch of held-out rows, from number `first` on."""


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


class Trainer:
    """Parameters, optimizer and data of a run, and the step that moves them on.

    Args:
        model: the network, whose parameters that are not trained stay as they are.
        parameters: what is trained, float32.
        micro_batch_size: rows that one process computes at once; 0: all of its own.
        prepare: adds to a batch what the objective needs beside it.
    Raises:
        TrainingError: if the batch cannot be split over the processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: OpenELM,
        parameters: Tensors,
        data: TrainingData,
        objective: Objective,
        *,
        micro_batch_size: int = 0,
        dropout: bool = False,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
        group: mx.distributed.Group | None = None,
    ):
        self.recipe = recipe
        self.model = model
        self.parameters = parameters
        self.data = data
        self.objective = objective
        self.group = group or mx.distributed.init()
        world = self.group.size()
        if data.rows_per_step % world:
            raise TrainingError(f"a batch of {data.rows_per_step} rows cannot be split over {world} processes")
        if data.rows_per_step // world % data.rows_per_entry:
            pairs = data.rows_per_step // data.rows_per_entry
            raise TrainingError(f"{pairs} pairs of answers cannot be split over {world} processes")
        self.moments = Moments.zeros(parameters)
        self.step = 0
        self._own_rows = data.rows_per_step // world
        self._micro_batch = min(micro_batch_size or self._own_rows, self._own_rows)
        self._dropout = dropout
        self._prepare = prepare
        dtype = DTYPES[recipe.dtype]
        self._gradients = gradients_of(model, objective, dtype, recipe.recompute_layers)
        self._losses = mx.compile(partial(batch_losses, model, objective, dtype))
        self._update = mx.compile(partial(_update, recipe))
        model.train()

    def take_step(self) -> dict[str, float]:
        """One step; gives the objective's figures, `gradient_norm`, and as `count` what they were divided by.

        A step in which nothing counts changes nothing.

        Raises:
            TrainingError: if the loss is no number; parameters stay as they were.
        """
        rows = self.data.step(self.step, self.group.rank() * self._own_rows, self._own_rows)
        sums: mx.array = mx.zeros((len(self.objective.names) + 1,))
        gradients: Tensors | None = None
        for start in range(0, self._own_rows, self._micro_batch):
            part = rows.part(start, start + self._micro_batch)
            if gradients is not None and not part.counted.any():
                continue
            batch = self._prepare(make_batch(part))
            if self._dropout:
                place = self.step * self.data.rows_per_step + self.group.rank() * self._own_rows + start
                batch["dropout"] = mx.random.key((self.recipe.seed + 1 << 32) + place)
            more, new = self._gradients(self.parameters, batch)
            sums = sums + more
            gradients = new if gradients is None else {name: g + new[name] for name, g in gradients.items()}
            mx.eval(sums, gradients)
        assert gradients is not None
        if self.group.size() > 1:
            sums, gradients = mx.distributed.all_sum(sums), tree_map(mx.distributed.all_sum, gradients)
        *figures, count = np.array(sums).tolist()
        if not count:
            self.step += 1
            return {**dict.fromkeys(self.objective.names, 0.0), "gradient_norm": 0.0, "count": 0}
        rate = learning_rate(self.recipe, self.step)
        found = self._update(mx.array(rate), self.parameters, gradients, self.moments, sums[-1])
        mx.eval(found)
        parameters, moments, norm, total = found
        if not all(math.isfinite(number) for number in (*figures, norm.item(), total.item())):
            raise TrainingError(
                f"the loss is no number at step {self.step + 1} (learning rate {rate:.3g}, gradient norm "
                f"{norm.item():.3g}); try a lower --learning-rate"
                + (", or --dtype bfloat16" if self.recipe.dtype == "float16" else "")
            )
        self.parameters, self.moments = parameters, Moments(*moments)
        self.step += 1
        means = dict(zip(self.objective.names, (figure / count for figure in figures), strict=True))
        return {**means, "gradient_norm": norm.item(), "count": int(count)}

    def validation(self) -> dict[str, float]:
        """The objective's figures on all held-out rows; not a number where there are none."""
        total = mx.zeros((len(self.objective.names) + 1,))
        for rows in self.data.validation(self.group.rank(), self.group.size()):
            total = total + self._losses(self.parameters, self._prepare(make_batch(rows)))[0]
            mx.eval(total)
        if self.group.size() > 1:
            total = mx.distributed.all_sum(total)
        *figures, count = np.array(total).tolist()
        return {n: f / count if count else math.nan for n, f in zip(self.objective.names, figures, strict=True)}

    def current_model(self) -> OpenELM:
        """The network with the present weights, to generate with."""
        set_parameters(self.model, DTYPES[self.recipe.dtype], self.parameters)
        set_dropout_keys(self.model)
        return self.model


def _update(
    recipe: Recipe, rate: mx.array, parameters: Tensors, gradients: Tensors, moments: Moments, count: mx.array
) -> tuple[Tensors, Moments, mx.array, mx.array]:
    """New parameters and moments, the gradient's norm, and the sum of all parameters: no number if any of them is."""
    gradients = {name: g / count for name, g in gradients.items()}
    gradients, norm = clipped(gradients, recipe.clip)
    parameters, moments = adamw(recipe, rate, parameters, gradients, Moments(*moments))
    return parameters, moments, norm, sum((p.sum() for p in parameters.values()), mx.zeros(()))


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
    recipe = trainer.recipe
    writes = trainer.group.rank() == 0
    progress = _Progress()
    if resume:
        progress = _together(trainer.group, lambda: _resume(trainer, run, on_message))
    else:
        _together(trainer.group, lambda: _check_fresh(run))
    if writes:
        _together(trainer.group, lambda: _cut_metrics(run, trainer.step))
    else:
        _together(trainer.group, lambda: None)

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

    def save_together() -> None:
        nonlocal saved
        _together(trainer.group, save if writes else lambda: None)
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
        progress.pending = None
        on_step(metrics)
        if metrics.step % recipe.log_every == 0 or metrics.validation_loss is not None or is_last:
            _together(trainer.group, lambda: _append_metrics(run, metrics) if writes else None)
            yield metrics
        if metrics.step % recipe.checkpoint_every == 0 or is_last or progress.best_step == metrics.step:
            save_together()

    try:
        if recipe.validate_first and trainer.step == 0:
            metrics = validated(Metrics(0, None, 0.0, learning_rate(recipe, 0), 0, 0.0, peak_memory_bytes(), {}))
            if metrics.validation_loss is not None:
                _together(trainer.group, lambda: _append_metrics(run, metrics) if writes else None)
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


_T = TypeVar("_T")


def _together(group: mx.distributed.Group, action: Callable[[], _T]) -> _T:
    """Do what can fail in one process; if it does, the others end too, instead of waiting for it.

    Raises:
        OpenELMError: the process's own, or a `TrainingError` in the others.
    """
    failure: OpenELMError | None = None
    try:
        result = action()
    except OpenELMError as error:
        failure = error
    if group.size() > 1:
        failed = mx.distributed.all_sum(mx.array(float(failure is not None)))
        if failure is None and float(np.array(failed)):
            raise TrainingError("another process of the run could not go on; it says why")
        mx.eval(failed)
    if failure is not None:
        raise failure
    return result


def _check_fresh(run: Path) -> None:
    if checkpoint_folders(run):
        raise TrainingError(f"{run} holds checkpoints already; --resume goes on with them, or name another --output")


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
                shutil.rmtree(later, ignore_errors=True)
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


def _cut_metrics(run: Path, step: int) -> None:
    """Make the folder, and drop the lines of steps that will be taken again, or that were not written to the end."""
    path = run / "metrics.jsonl"
    try:
        run.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        if lines or path.exists():
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
