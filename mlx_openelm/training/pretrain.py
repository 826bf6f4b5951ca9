"""Pre-training: the initial weights, the data, and the run."""

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..conversion.write.model_card import trained_card, write_card
from ..data.batch import TokenBatch
from ..data.corpus import Corpus, CorpusBatches, Filters, prepare_corpus, validation_rows
from ..data.train_tokenizer import train_tokenizer
from ..files.lock import LockedFolder
from ..files.paths import exists
from ..model.openelm import OpenELM, parameter_shapes
from ..tensors import save_arrays
from ..tokenizer.files import find_tokenizer, write_tokenizer
from ..tokenizer.tokenizer import Tokenizer
from .callback import Metrics, TrainingCallback
from .checkpoint_metric import CheckpointMetric
from .checkpoints import together
from .loop import train
from .loss import CrossEntropy
from .memory import fitting_rows
from .optimizer import Tensors
from .pretrain_recipe import PretrainRecipe
from .trainer import Trainer


class CorpusRows:
    """The rows of a corpus, as the recipe defines them, for training and validation."""

    def __init__(self, recipe: PretrainRecipe, corpus: Corpus):
        self._recipe = recipe
        self._corpus = corpus
        self._batches = CorpusBatches(corpus, recipe.batch_size, recipe.sequence_length, recipe.packing, recipe.seed)
        self.step = self._batches.step
        self.rows_per_step = recipe.batch_size
        self.rows_per_entry = 1
        self.fingerprint = corpus.fingerprint

    def validation(self, first: int, stride: int) -> Iterator[TokenBatch]:
        """Every `stride`-th held-out row."""
        recipe = self._recipe
        isolated = recipe.packing == "documents"
        return validation_rows(
            self._corpus, recipe.sequence_length, recipe.validation_rows, first, stride, isolated=isolated
        )


def initial_parameters(recipe: PretrainRecipe) -> Tensors:
    """Initial parameters by name, float32, by CoreNet's rule: matrices are normal, see `_std`; norms are 1."""
    keys = mx.random.split(mx.random.key(recipe.seed), 1 + len(parameter_shapes(recipe.model)))
    parameters = {}
    for key, (name, shape) in zip(keys[1:], parameter_shapes(recipe.model).items(), strict=True):
        if len(shape) == 1:
            parameters[name] = mx.ones(shape)
        else:
            parameters[name] = mx.random.normal(shape, key=key) * _std(recipe, name, shape)
    mx.eval(parameters)
    return parameters


def _std(recipe: PretrainRecipe, name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a matrix's initial weights.

    Embedding and output: model_dim^-0.5. qkv_proj, proj_1: in_features^-0.5. out_proj, proj_2: (2 * num_layers *
    model_dim)^-0.5.
    """
    if name.endswith(("out_proj.weight", "proj_2.weight")):
        return (2 * recipe.model.num_transformer_layers * recipe.model.model_dim) ** -0.5
    return shape[1] ** -0.5


def fresh_trainer(recipe: PretrainRecipe, corpus: Corpus, group: mx.distributed.Group | None = None) -> Trainer:
    """A trainer for a whole network with initial weights.

    Raises:
        TrainingError: if the batch cannot be split over the processes.
    """
    return Trainer(
        recipe,
        OpenELM(recipe.model),
        initial_parameters(recipe),
        CorpusRows(recipe, corpus),
        CrossEntropy(recipe.z_loss, recipe.loss_chunk),
        micro_batch_size=recipe.micro_batch_size,
        group=group,
    )


@dataclass(frozen=True)
class Pretraining:
    """A recipe without open fields, and the data, ready for training."""

    recipe: PretrainRecipe
    tokenizer: Tokenizer
    corpus: Corpus
    steps_taken: int = 0  # by the run that this one continues


def prepare_pretraining(
    recipe: PretrainRecipe,
    run: Path,
    group: mx.distributed.Group,
    callback: TrainingCallback,
    before: Mapping[str, Any] | None = None,
    steps_taken: int = 0,
) -> Pretraining:
    """Set a recipe's open fields and tokenize its data; the first process writes what does not exist.

    Args:
        before, steps_taken: the recipe of the run that this one continues, from `to_dict`, and its steps so far.
    Raises:
        DataError: if the data cannot be read.
        TokenizerError: if there is no tokenizer, or it does not fit the model.
    """
    for source in recipe.data:
        source.files()  # before a tokenizer is trained, which takes a while
    is_first = group.rank() == 0
    is_sized = recipe.batch_size > 0
    if before is not None:
        recipe = recipe.continued(before)
    filters = Filters(recipe.min_characters, recipe.min_tokens, recipe.validation_share)
    vocabulary = run / "tokenizer.model"
    size = recipe.vocabulary if before is None or exists(vocabulary) else recipe.train_tokenizer

    def make_vocabulary() -> None:
        if is_first and size and not exists(vocabulary):
            callback.on_message(f"training a tokenizer with {size:,} tokens")
            train_tokenizer(recipe.data, size, vocabulary)

    def find_corpus() -> Corpus:
        return prepare_corpus(recipe.data, tokenizer, filters, run / "corpus", callback.on_tokenizing)

    together(group, make_vocabulary)
    if size:
        tokenizer = Tokenizer(vocabulary)
    else:
        tokenizer, _ = find_tokenizer(str(recipe.tokenizer) or None, None, recipe.model.vocab_size)
    corpus = together(group, lambda: find_corpus() if is_first else None)  # the others read it from disk
    corpus = corpus or find_corpus()
    recipe = replace(recipe.resolved(corpus.num_tokens, corpus.num_documents, group.size()), train_tokenizer=size)
    if not is_sized and not recipe.micro_batch_size:
        recipe = replace(recipe, micro_batch_size=fitting_rows(recipe, group.size()))
    return Pretraining(recipe, tokenizer, corpus, steps_taken)


def pretraining_steps(
    recipe: PretrainRecipe,
    corpus: Corpus,
    tokenizer: Tokenizer,
    run: Path | LockedFolder,
    *,
    resume: bool = False,
    group: mx.distributed.Group | None = None,
    callback: TrainingCallback | None = None,
    metric: CheckpointMetric | None = None,
) -> Generator[Metrics, None, None]:
    """Train from scratch to the recipe's last step, yielding metrics; see `train`. Each checkpoint is a model folder.

    Args:
        recipe: without open fields, as `prepare_pretraining` returns it.
    Raises:
        TrainingError: if the run cannot start or continue; the last good checkpoint is kept.
    """
    trainer = fresh_trainer(recipe, corpus, group)
    name = (run.path if isinstance(run, LockedFolder) else run).resolve().name
    bos = recipe.model.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    config = replace(recipe.model, bos_token_id=bos, eos_token_id=tokenizer.eos_token_id)

    def write(folder: Path, parameters: Tensors) -> None:
        save_arrays(folder / "model.safetensors", parameters, {"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        write_tokenizer(tokenizer, folder)
        write_card(folder, trained_card(name, config, _settings(recipe)))

    yield from train(trainer, tokenizer, run, write, resume=resume, callback=callback, metric=metric)


def _settings(recipe: PretrainRecipe) -> dict[str, str]:
    """The settings of a run for its card: nothing about where its data was."""
    return {
        "steps of the run": f"{recipe.steps:,}, of {recipe.batch_size:,} rows of {recipe.sequence_length:,} tokens",
        "learning rate": f"{recipe.learning_rate:g}, {recipe.schedule}",
        "seed": str(recipe.seed),
    }
