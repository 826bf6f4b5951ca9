"""One training step, whatever is trained.

Trained parameters and optimizer state are float32; the step computes in the recipe's dtype. Gradients are summed over
all tokens (or pairs) in the loss, in all micro-batches and processes, and divided by their number, so the result does
not depend on how a batch is split.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from ..data.batch import Batch, TokenBatch, make_batch
from ..errors import TrainingError
from ..machine.compiler import compile_function
from ..machine.device import DTYPES
from ..model.lora import cache_scales, set_dropout_keys
from ..model.openelm import OpenELM
from .gradients import batch_losses, gradients_of, set_parameters
from .loss import Objective
from .optimizer import AdamW, Moments, Tensors, Update, learning_rate
from .recipe import Recipe


class TrainingData(Protocol):
    """Rows for training and validation; the same arguments always return the same rows."""

    rows_per_step: int
    rows_per_entry: int  # rows that stay together: 2 for pairs
    fingerprint: str  # hash of everything that determines the rows

    def step(self, step: int, first: int = 0, count: int | None = None) -> TokenBatch:
        """Rows `first` to `first + count` (exclusive) of a step."""

    def validation(self, first: int, stride: int) -> Iterable[TokenBatch]:
        """Every `stride`-th batch of held-out rows, starting with batch `first`."""


class Trainer:
    """Parameters, optimizer state and data of a run, and the step that updates them.

    Args:
        model: the network; parameters that are not in `parameters` stay frozen.
        parameters: trained parameters by name, float32.
        micro_batch_size: rows that a process computes at once; 0: all of its rows.
        prepare: adds what else the objective needs to a batch.
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
        self._gradients = gradients_of(model, objective, dtype, recipe.gradient_checkpointing)
        self._losses = compile_function(partial(batch_losses, model, objective, dtype))
        self._optimizer = AdamW(recipe)
        self._interruption: KeyboardInterrupt | None = None
        self._num_validation_batches: int | None = None
        model.train()

    def take_step(self) -> dict[str, float]:
        """Take one step; returns the objective's metrics, `gradient_norm`, and `count`, which they were divided by.

        A step with nothing in the loss leaves parameters and optimizer state unchanged. A KeyboardInterrupt while a
        step is being completed is raised by `raise_interruption`, or by the next step.

        Raises:
            TrainingError: if the loss or the gradient is not finite; parameters stay unchanged.
        """
        self.raise_interruption()
        rows = self.data.step(self.step, self.group.rank() * self._own_rows, self._own_rows)
        sums: mx.array = mx.zeros((len(self.objective.names) + 1,))
        gradients: Tensors | None = None
        for start in range(0, self._own_rows, self._micro_batch):
            part = rows.part(start, start + self._micro_batch)
            if gradients is not None and not part.loss_mask.any():
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
        update = self._optimizer.begin(rate, self.parameters, gradients, self.moments, sums[-1])
        if not (update.is_finite and all(math.isfinite(figure) for figure in figures)):
            raise TrainingError(
                f"loss or gradient is not finite at step {self.step + 1} (learning rate {rate:.3g}, gradient norm "
                f"{update.norm:.3g}); try a lower `learning_rate`"
                + (", or `dtype=bfloat16`" if self.recipe.dtype == "float16" else "")
            )
        self._complete(update)
        means = dict(zip(self.objective.names, (figure / count for figure in figures), strict=True))
        return {**means, "gradient_norm": update.norm, "count": int(count)}

    def raise_interruption(self) -> None:
        """Raise the KeyboardInterrupt that arrived when a step could no longer be undone, if there was one."""
        if (interruption := self._interruption) is not None:
            self._interruption = None
            raise interruption

    def _complete(self, update: Update) -> None:
        """Take over an update. The old state is freed on the way, so from here on it can only be completed."""
        while True:
            try:
                self.parameters = update.parameters
                self.moments = update.finish()
                break
            except KeyboardInterrupt as interruption:
                self._interruption = interruption
        self.step += 1

    def validation(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, float]:
        """The objective's metrics, averaged over the validation set, or NaN without one.

        Args:
            on_progress: see `measured`.
        """
        if self._num_validation_batches is None:  # they are the same at each validation
            self._num_validation_batches = sum(1 for _ in self._validation_rows())
        return self.measure(self._validation_rows(), self._num_validation_batches, on_progress)

    def measure(
        self,
        batches: Iterable[TokenBatch],
        num_batches: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, float]:
        """The objective's metrics with the current parameters; see `measured`."""
        return measured(
            lambda rows: self._losses(self.parameters, self._prepare(make_batch(rows)))[0],
            self.objective.names,
            batches,
            num_batches,
            self.group,
            on_progress,
        )

    def _validation_rows(self) -> Iterable[TokenBatch]:
        return self.data.validation(self.group.rank(), self.group.size())

    def current_model(self) -> OpenELM:
        """The network with the current parameters, for generation."""
        set_parameters(self.model, DTYPES[self.recipe.dtype], self.parameters)
        set_dropout_keys(self.model)
        return self.model

    @contextmanager
    def inference(self) -> Iterator[OpenELM]:
        """The network with the current parameters, in evaluation mode; then it is in training mode again."""
        model = self.current_model()
        model.eval()
        cache_scales(model)
        try:
            yield model
        finally:
            model.train()


def measured(
    sums_of: Callable[[TokenBatch], mx.array],
    names: Sequence[str],
    batches: Iterable[TokenBatch],
    num_batches: int,
    group: mx.distributed.Group,
    on_progress: Callable[[int, int], None],
) -> dict[str, float]:
    """An objective's metrics, averaged over held-out rows, or NaN if there are none; every process takes part.

    Args:
        sums_of: the sums of the metrics over a batch, and their count last, float32 (K,).
        names: names of the metrics.
        batches: this process's share of the rows.
        num_batches: their number.
        on_progress: called with the done and the total number of batches in this process, before the first batch and
            after each.
    """
    total = mx.zeros((len(names) + 1,))
    for done, rows in enumerate(batches):
        if done == 0:
            on_progress(0, num_batches)
        total = total + sums_of(rows)
        mx.eval(total)
        on_progress(done + 1, num_batches)
    if group.size() > 1:
        total = mx.distributed.all_sum(total)
    *figures, count = np.array(total).tolist()
    return {n: f / count if count else math.nan for n, f in zip(names, figures, strict=True)}
