"""How well a model predicts test examples: at the end of a run, or without training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..data.batch import make_batch
from ..data.dataset import ExampleSet, read_examples
from ..data.example_batches import all_rows
from ..errors import DataError
from ..machine.compiler import compile_function
from ..machine.device import DTYPES
from .gradients import batch_losses
from .loss import CrossEntropy
from .start import load_start
from .trainer import Trainer, measured
from .tune_recipe import TuneRecipe


@dataclass(frozen=True)
class HeldOutLoss:
    """The result of a test.

    Attributes:
        path: the test file.
        num_examples: examples, or pairs, in it.
        num_tokens: tokens in the loss: those of the answers, each with its end; of pairs, those of both answers.
        loss: mean loss in nats per token (pairs: per pair).
        more: the objective's other metrics; for pairs, margin and accuracy.
    """

    path: Path
    num_examples: int
    num_tokens: int
    loss: float
    more: dict[str, float]

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None for pairs, whose loss is not that of text."""
        return None if "accuracy" in self.more else math.exp(min(self.loss, 99))

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        counts = {"examples": self.num_examples, "tokens": self.num_tokens}
        return {"file": str(self.path), **counts, "loss": self.loss, "perplexity": self.perplexity, **self.more}

    def __repr__(self) -> str:
        perplexity = f", perplexity {self.perplexity:,.2f}" if self.perplexity is not None else ""
        return f"HeldOutLoss({str(self.path)!r}: {self.num_examples:,} examples, loss {self.loss:.4f}{perplexity})"


def _nothing(done: int, total: int) -> None:
    pass


def evaluate_run(trainer: Trainer, test: ExampleSet, on_progress: Callable[[int, int], None] = _nothing) -> HeldOutLoss:
    """Measure test examples with a run's current parameters; every process takes part."""
    size, group = trainer.recipe.batch_size, trainer.group
    batches = all_rows(test.examples, size, group.rank(), group.size())
    return _summary(test, trainer.measure(batches, _share(test, size, group), on_progress))


def held_out_loss(recipe: TuneRecipe, on_progress: Callable[[int, int], None] | None = None) -> HeldOutLoss:
    """Measure a model on test examples, read as `tune` reads them: those in the answers count, unless `train_on=all`.

    Args:
        recipe: with `test`, and the `model` and its `adapter`, if there is one.
        on_progress: called with the done and the total number of batches.
    Raises:
        OpenELMError: one of its subclasses, if anything is missing or contradictory; a DataError for preference pairs,
            whose loss depends on the model that tuning began with.
    """
    if not recipe.test:
        raise DataError("no test file given; set `test`")
    start = load_start(recipe)
    recipe = start.recipe
    test = read_examples(Path(recipe.test), start.tokenizer, start.options)
    if test.format == "preference":
        raise DataError(
            f"{recipe.test} has preference pairs, whose loss depends on the model that tuning began with; give `test` "
            "to the run that tunes on them"
        )
    start.check(test)
    objective = CrossEntropy(0.0, recipe.loss_chunk)
    losses = compile_function(partial(batch_losses, start.model, objective, DTYPES[recipe.dtype]))
    group = mx.distributed.init()
    batches = all_rows(test.examples, recipe.batch_size, group.rank(), group.size())
    found = measured(
        lambda rows: losses({}, make_batch(rows))[0],
        objective.names,
        batches,
        _share(test, recipe.batch_size, group),
        group,
        on_progress or _nothing,
    )
    return _summary(test, found)


def _share(test: ExampleSet, batch_size: int, group: mx.distributed.Group) -> int:
    """Number of this process's batches."""
    return len(range(group.rank(), -(-len(test.examples) // batch_size), group.size()))


def _summary(test: ExampleSet, found: dict[str, float]) -> HeldOutLoss:
    loss, *more = found
    tokens = sum(int(side.completion_mask.sum()) for example in test.examples for side in example.sequences)
    further = {name: found[name] for name in more if name != "z_loss"}
    return HeldOutLoss(test.path, len(test.examples), tokens, found[loss], further)
