"""Pre-training: the step, and the loop around it.

Weights and optimizer are float32; the step computes in the recipe's type. A gradient is the sum over the counted tokens
of all micro-batches and processes, divided by their number: how a batch is split changes nothing.
"""

import json
import math
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from .backward import batch_losses, gradients_of
from .checkpoints import Checkpoint, checkpoint_folders, load_checkpoint, save_checkpoint
from .data import Batches, Corpus, Rows, validation_rows
from .errors import OutputError, TrainingError
from .generate import generate
from .model import OpenELM, parameter_shapes
from .optimizer import Moments, Tensors, adamw, clipped, learning_rate
from .recipe import Recipe, differences
from .tokenizer import Tokenizer

_SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class Metrics:
    """Figures of a step; a line of `metrics.jsonl`."""

    step: int  # how many are done
    loss: float  # cross-entropy, nats per token
    z_loss: float  # log(Z)^2, before it is weighted
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens: int  # seen so far
    tokens_per_second: float
    validation_loss: float | None = None
    sample: str | None = None  # what the model writes after the recipe's prompt, at each validation


def initial_parameters(recipe: Recipe) -> Tensors:
    """Fresh weights, float32, by CoreNet's rule: see the table in the docstring of `_std`; norms are 1."""
    keys = mx.random.split(mx.random.key(recipe.seed), 1 + len(parameter_shapes(recipe.model)))
    parameters = {}
    for key, (name, shape) in zip(keys[1:], parameter_shapes(recipe.model).items(), strict=True):
        if len(shape) == 1:
            parameters[name] = mx.ones(shape)
        else:
            parameters[name] = mx.random.normal(shape, key=key) * _std(recipe, name, shape)
    mx.eval(parameters)
    return parameters


def _std(recipe: Recipe, name: str, shape: tuple[int, ...]) -> float:
    """Embedding and output: model_dim^-0.5. qkv_proj, proj_1: in_features^-0.5. out_proj, proj_2: depth divides too."""
    if name.endswith(("out_proj.weight", "proj_2.weight")):
        return (2 * recipe.model.num_transformer_layers * recipe.model.model_dim) ** -0.5
    return shape[1] ** -0.5


class Trainer:
    """Parameters, optimizer and data of a run, and the step that moves them on."""

    def __init__(self, recipe: Recipe, corpus: Corpus, group: mx.distributed.Group | None = None):
        self.recipe = recipe
        self.corpus = corpus
        self.group = group or mx.distributed.init()
        world = self.group.size()
        if recipe.batch_size % world:
            raise TrainingError(f"a batch of {recipe.batch_size} rows cannot be split over {world} processes")
        self.model = OpenELM(recipe.model)
        self.parameters = initial_parameters(recipe)
        self.moments = Moments.zeros(self.parameters)
        self.step = 0
        self._own_rows = recipe.batch_size // world
        self._first_row = self.group.rank() * self._own_rows
        self._batches = Batches(corpus, recipe.batch_size, recipe.sequence_length, recipe.packing, recipe.seed)
        self._gradients = gradients_of(self.model, recipe)
        self._losses = mx.compile(partial(batch_losses, self.model, recipe))
        self._update = mx.compile(partial(_update, recipe))

    def take_step(self) -> tuple[float, float, float, int]:
        """One step; gives cross-entropy, z-loss, the gradient's norm, and the tokens that counted.

        Raises:
            TrainingError: if the loss is no number; parameters stay as they were.
        """
        recipe = self.recipe
        size = min(recipe.micro_batch_size or self._own_rows, self._own_rows)
        rows = self._batches.step(self.step, self._first_row, self._own_rows)
        sums: mx.array = mx.zeros((3,))
        gradients: Tensors | None = None
        for start in range(0, self._own_rows, size):
            tokens, segments = _arrays(rows, slice(start, start + size))
            more, new = self._gradients(self.parameters, tokens, segments)
            sums = sums + more
            gradients = new if gradients is None else {name: g + new[name] for name, g in gradients.items()}
            mx.eval(sums, gradients)
        assert gradients is not None
        if self.group.size() > 1:
            sums, gradients = mx.distributed.all_sum(sums), tree_map(mx.distributed.all_sum, gradients)
        rate = mx.array(learning_rate(recipe, self.step))
        parameters, moments, norm, total = self._update(rate, self.parameters, gradients, self.moments, sums[2])
        mx.eval(parameters, moments, norm, total)
        cross_entropy, z_loss, count, length = (float(number) for number in (*np.array(sums), np.array(norm)))
        if not all(math.isfinite(number) for number in (cross_entropy, length, float(np.array(total)))):
            raise TrainingError(f"the loss is no number at step {self.step + 1}; try a lower --learning-rate")
        self.parameters, self.moments = parameters, Moments(*moments)
        self.step += 1
        return cross_entropy / count, z_loss / count, length, int(count)

    def validation_loss(self) -> float:
        """Cross-entropy on the held-out documents, nats per token."""
        total = mx.zeros((3,))
        share = self.group.rank(), self.group.size()
        for rows in validation_rows(self.corpus, self.recipe.sequence_length, self.recipe.validation_rows, *share):
            total = total + self._losses(self.parameters, *_arrays(rows, slice(None)))[0]
            mx.eval(total)
        if self.group.size() > 1:
            total = mx.distributed.all_sum(total)
        cross_entropy, _, count = (float(number) for number in np.array(total))
        return cross_entropy / count if count else float("nan")

    def current_model(self) -> OpenELM:
        """The network with the present weights, to generate with."""
        self.model.update(tree_unflatten(list(self.parameters.items())))
        return self.model


def _arrays(rows: Rows, part: slice) -> tuple[mx.array, mx.array]:
    return mx.array(rows.tokens[part]), mx.array(rows.segments[part])


def _update(
    recipe: Recipe, rate: mx.array, parameters: Tensors, gradients: Tensors, moments: Moments, count: mx.array
) -> tuple[Tensors, Moments, mx.array, mx.array]:
    """New parameters and moments, the gradient's norm, and the sum of all parameters: no number if any of them is."""
    gradients = {name: g / count for name, g in gradients.items()}
    gradients, norm = clipped(gradients, recipe.clip)
    parameters, moments = adamw(recipe, rate, parameters, gradients, Moments(*moments))
    return parameters, moments, norm, sum((p.sum() for p in parameters.values()), mx.zeros(()))


def pretrain(
    recipe: Recipe,
    corpus: Corpus,
    tokenizer: Tokenizer,
    run: Path,
    *,
    resume: bool = False,
    group: mx.distributed.Group | None = None,
    on_step: Callable[[Metrics], None] = lambda metrics: None,
    on_message: Callable[[str], None] = lambda message: None,
) -> Generator[Metrics, None, None]:
    """Train to the recipe's last step; yields figures each `log_every` steps and at each validation.

    Checkpoints go to `run/checkpoints`, figures to `run/metrics.jsonl`. Closing the iterator, or an interrupt within
    it, saves a checkpoint first. Only the first process writes.

    Args:
        resume: go on from the last checkpoint that can be read.
        on_step: called with every step's figures.
        on_message: called with what a person should know.
    Raises:
        TrainingError: if the run cannot start or go on; the last good checkpoint stays.
    """
    trainer = Trainer(recipe, corpus, group)
    writes = trainer.group.rank() == 0
    seen = 0
    best: tuple[float, int | None] = math.inf, None
    if resume:
        state = _resume(trainer, run, on_message)
        seen, best = state["tokens"], (state["best_loss"] or math.inf, state["best_step"])
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
            "corpus": corpus.fingerprint,
            "recipe": recipe.to_dict(),
        }
        checkpoint = Checkpoint(trainer.parameters, trainer.moments, state)
        save_checkpoint(run, recipe.model, tokenizer, checkpoint, recipe.keep_checkpoints)

    saved = trainer.step
    started, started_at = time.perf_counter(), seen
    try:
        while trainer.step < recipe.steps:
            rate = learning_rate(recipe, trainer.step)
            loss, z_loss, norm, count = trainer.take_step()
            seen += count
            speed = (seen - started_at) / (time.perf_counter() - started)
            metrics = Metrics(trainer.step, loss, z_loss, norm, rate, seen, speed)
            is_last = trainer.step == recipe.steps
            if trainer.step % recipe.validate_every == 0 or is_last:
                found = trainer.validation_loss()
                best = min(best, (found, trainer.step))
                sample = _sample(trainer, tokenizer) if writes and recipe.sample_prompt else None
                metrics = replace(metrics, validation_loss=found, sample=sample)
            on_step(metrics)
            if trainer.step % recipe.log_every == 0 or metrics.validation_loss is not None:
                if writes:
                    _append_metrics(run / "metrics.jsonl", metrics)
                yield metrics
            if trainer.step % recipe.checkpoint_every == 0 or is_last:
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
        found = differences(checkpoint.state["recipe"], json.loads(json.dumps(trainer.recipe.to_dict())))
        if checkpoint.state["corpus"] != trainer.corpus.fingerprint:
            found.append("the files of the corpus, their vocabulary or the filters")
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
    room = trainer.recipe.model.max_context_length - len(tokenizer.encode(prompt))
    model = trainer.current_model()
    model.eval()
    text = generate(model, tokenizer, prompt, max_tokens=min(_SAMPLE_TOKENS, room)) if room > 0 else ""
    model.train()
    return prompt + text


def _append_metrics(path: Path, metrics: Metrics) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps that will be taken again."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
