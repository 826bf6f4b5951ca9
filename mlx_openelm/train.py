"""The one training loop: pre-training, full fine-tuning, adapters and preferences differ in what they hand to it.

What is trained and its optimizer are float32; the step computes in the recipe's type. A gradient is the sum over
whatever counts in all micro-batches and processes, divided by its number: how a batch is split changes nothing.
"""

import json
import math
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from .backward import batch_losses, gradients_of, set_parameters
from .batch import Rows, make_batch
from .checkpoints import Checkpoint, WriteParameters, checkpoint_folders, load_checkpoint, save_checkpoint
from .device import DTYPES, peak_memory_bytes
from .errors import OutputError, TrainingError
from .generate import generate
from .loss import Batch, Objective
from .model import OpenELM
from .optimizer import Moments, Tensors, adamw, clipped, learning_rate
from .recipe import Recipe
from .tokenizer import Tokenizer

_SAMPLE_TOKENS = 60


class TrainingData(Protocol):
    """Rows to train on and to validate with, the same whenever they are asked for."""

    rows_per_step: int
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
    seen = 0
    best: tuple[float, int | None] = math.inf, None  # loss on held-out rows, and its step
    worse = 0  # validations in a row that were no better
    if resume:
        state = _resume(trainer, run, on_message)
        seen, worse = state["tokens"], state.get("worse", 0)
        best = math.inf if state["best_loss"] is None else state["best_loss"], state["best_step"]
    elif checkpoint_folders(run):
        raise TrainingError(f"{run} holds checkpoints already; --resume goes on with them, or name another --output")
    if writes:
        run.mkdir(parents=True, exist_ok=True)
        _cut_metrics(run / "metrics.jsonl", trainer.step)

    def save() -> None:
        state = {
            "step": trainer.step,
            "tokens": seen,
            "best_loss": best[0] if math.isfinite(best[0]) else None,
            "best_step": best[1],
            "worse": worse,
            "data": trainer.data.fingerprint,
            "recipe": recipe.to_dict(),
        }
        checkpoint = Checkpoint(trainer.parameters, trainer.moments, state)
        save_checkpoint(run, checkpoint, write, recipe.keep_checkpoints)

    loss, *more = trainer.objective.names

    def validated(metrics: Metrics) -> Metrics:
        nonlocal best, worse
        found = trainer.validation()
        sample = _sample(trainer, tokenizer) if writes and tokenizer and recipe.sample_prompt else None
        if not math.isfinite(found[loss]):
            return replace(metrics, sample=sample)
        worse = 0 if found[loss] < best[0] else worse + 1
        best = min(best, (found[loss], trainer.step), key=lambda pair: pair[0])
        further = {name: found[name] for name in more}
        return replace(metrics, validation_loss=found[loss], validation=further, sample=sample)

    saved = trainer.step
    started, started_at = time.perf_counter(), seen
    try:
        if recipe.validate_first and trainer.step == 0:
            metrics = validated(Metrics(0, None, 0.0, learning_rate(recipe, 0), 0, 0.0, peak_memory_bytes(), {}))
            best, worse = (math.inf, None), 0  # of what is trained
            if metrics.validation_loss is not None:
                if writes:
                    _append_metrics(run / "metrics.jsonl", metrics)
                yield metrics
            started = time.perf_counter()
        while trainer.step < recipe.steps and not (recipe.early_stop and worse >= recipe.early_stop):
            rate = learning_rate(recipe, trainer.step)
            figures = trainer.take_step()
            seen += int(figures["count"])
            metrics = Metrics(
                trainer.step,
                figures[loss],
                figures["gradient_norm"],
                rate,
                seen,
                (seen - started_at) / (time.perf_counter() - started),
                peak_memory_bytes(),
                {name: figures[name] for name in more},
            )
            is_last = trainer.step == recipe.steps
            if trainer.step % recipe.validate_every == 0 or is_last:
                metrics = validated(metrics)
            on_step(metrics)
            if trainer.step % recipe.log_every == 0 or metrics.validation_loss is not None:
                if writes:
                    _append_metrics(run / "metrics.jsonl", metrics)
                yield metrics
            if trainer.step % recipe.checkpoint_every == 0 or is_last or best[1] == trainer.step:
                if writes:
                    save()
                saved = trainer.step
    finally:
        if writes and trainer.step > saved:
            save()


def _resume(trainer: Trainer, run: Path, on_message: Callable[[str], None]) -> dict[str, Any]:
    folders = checkpoint_folders(run)
    for folder in reversed(folders):
        try:
            checkpoint = load_checkpoint(folder)
        except TrainingError as error:
            on_message(f"{error}; going back to the one before")
            continue
        found = trainer.recipe.differences(checkpoint.state["recipe"])
        if checkpoint.state["data"] != trainer.data.fingerprint:
            found.append("the files of the data, their vocabulary or the filters")
        if found:
            raise TrainingError(f"{run} was trained otherwise: {'; '.join(found)}")
        # In the order of the network: the gradient's norm is a sum over it, and a file has an order of its own.
        trainer.parameters = {name: checkpoint.parameters[name] for name in trainer.parameters}
        trainer.moments = checkpoint.moments
        trainer.step = checkpoint.state["step"]
        return checkpoint.state
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


def _append_metrics(path: Path, metrics: Metrics) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics.to_dict()) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps that will be taken again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines() if step else []
    lines = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
