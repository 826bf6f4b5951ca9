"""What a run of pre-training will do: its model, its data, its steps, and about how much memory and time it takes."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import OpenELMConfig
from ..data.batch import TokenBatch, make_batch
from ..data.text_files import SEPARATOR, TextSource, read_documents
from ..machine.device import DTYPES
from ..model.openelm import OpenELM
from .gradients import gradients_of
from .loss import CrossEntropy
from .memory import StepMemory, fitting_rows, pretraining_memory
from .pretrain import Pretraining, initial_parameters
from .pretrain_recipe import PretrainRecipe

_FORWARD = 1 / 3  # of the work of a training step: without the gradients
_WHOLE = 20_000_000  # parameters up to which a whole model is timed, not two of its layers
_TRIAL_TOKENS = (64, 64, 512)  # the first trial compiles; a slow machine skips the last
_TRIAL_SECONDS = 2.0
_SAMPLE_BYTES, _SAMPLE_DOCUMENTS = 1 << 18, 200
_UNPACKED = {".gz": 3.0, ".zst": 3.0, ".parquet": 2.0}  # bytes of text in a byte of the file, about
_BYTES_PER_TOKEN = 0.3  # times the binary logarithm of the vocabulary, for English


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        recipe: without open fields.
        num_tokens, num_documents: to train on; estimated before the data is tokenized.
        held_out_tokens, held_out_documents: for validation.
        is_exact: whether the data has been counted.
        steps_taken: by the run that this one continues.
        tokens_per_second: of one process, by a trial of a few rows.
    """

    recipe: PretrainRecipe
    num_files: int
    num_tokens: int
    num_documents: int
    held_out_tokens: int
    held_out_documents: int
    is_exact: bool
    memory: StepMemory
    tokens_per_second: float
    num_processes: int
    steps_taken: int = 0

    @property
    def tokens_of_run(self) -> int:
        """Tokens in all rows of all steps."""
        return self.recipe.steps * self.recipe.batch_size * self.recipe.sequence_length

    @property
    def seconds(self) -> float:
        """About how long the steps take that are left, with their validations."""
        left = max(0, self.recipe.steps - self.steps_taken) * self.recipe.batch_size * self.recipe.sequence_length
        return (left + _FORWARD * self._validated_tokens) / (self.tokens_per_second * self.num_processes)

    @property
    def _validated_tokens(self) -> int:
        """Tokens of all rows of the validations that are left."""
        recipe = self.recipe
        rows = math.ceil(self.held_out_tokens / recipe.sequence_length)
        rows = min(recipe.validation_rows or rows, rows)
        times = math.ceil(recipe.steps / recipe.validate_every) - self.steps_taken // recipe.validate_every
        times += recipe.validate_first and self.steps_taken == 0
        return max(0, times) * rows * recipe.sequence_length

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.recipe.steps / self.recipe.steps_per_epoch(self.num_tokens, self.num_documents)

    def to_dict(self) -> dict[str, Any]:
        """All figures and the recipe, for JSON."""
        own = {**asdict(self), "recipe": self.recipe.to_dict(), "memory": self.memory.to_dict()}
        return {
            **own,
            "parameters": self.recipe.model.num_parameters,
            "tokens": self.tokens_of_run,
            "epochs": self.epochs,
            "seconds": self.seconds,
        }


def plan_of(pretraining: Pretraining, num_processes: int = 1) -> Plan:
    """What a prepared run will do."""
    corpus, recipe = pretraining.corpus, pretraining.recipe
    return Plan(
        recipe,
        sum(len(source.files()) for source in recipe.data),
        corpus.num_tokens,
        corpus.num_documents,
        sum(file.num_tokens for file in corpus.validation),
        sum(file.num_documents for file in corpus.validation),
        True,
        pretraining_memory(recipe, num_processes),
        _tokens_per_second(recipe),
        num_processes,
        pretraining.steps_taken,
    )


def estimated_plan(recipe: PretrainRecipe, num_processes: int = 1) -> Plan:
    """About what a run would do, from the sizes of the files; nothing is written.

    Raises:
        DataError: if the data cannot be read.
    """
    files, nbytes, documents = 0, 0.0, 0.0
    for source in recipe.data:
        found, length = _sizes(source)
        files += len(found)
        nbytes += sum(found)
        documents += sum(found) / length
    tokens = nbytes / (_BYTES_PER_TOKEN * math.log2(recipe.model.vocab_size)) + documents
    kept = 1 - recipe.validation_share
    is_sized = recipe.batch_size > 0
    recipe = recipe.resolved(int(tokens * kept), max(1, int(documents * kept)), num_processes)
    if not is_sized and not recipe.micro_batch_size:
        recipe = replace(recipe, micro_batch_size=fitting_rows(recipe, num_processes))
    return Plan(
        recipe,
        files,
        int(tokens * kept),
        max(1, int(documents * kept)),
        int(tokens * recipe.validation_share),
        int(documents * recipe.validation_share),
        False,
        pretraining_memory(recipe, num_processes),
        _tokens_per_second(recipe),
        num_processes,
    )


def _sizes(source: TextSource) -> tuple[list[float], float]:
    """Bytes of text in each file of a source, about, and in a document, from a sample."""
    files = source.files()
    lengths = _lengths(read_documents(files[0], source.text_key))
    sizes = [path.stat().st_size * _UNPACKED.get(path.suffix.lower(), 1.0) for path in files]
    separator = len(SEPARATOR) + 2 if len(lengths) > 1 else 0
    return sizes, max(1.0, sum(lengths) / max(1, len(lengths)) + separator)


def _lengths(documents: Iterator[str]) -> list[int]:
    lengths: list[int] = []
    for text in itertools.islice(documents, _SAMPLE_DOCUMENTS):
        lengths.append(len(text.encode()))
        if sum(lengths) > _SAMPLE_BYTES:
            break
    return lengths


def _tokens_per_second(recipe: PretrainRecipe) -> float:
    """About how fast a step is: some rows are timed with the model, or with two layers of a large one."""
    trial = _trial_model(recipe.model)
    parameters = initial_parameters(replace(recipe, model=trial))
    objective = CrossEntropy(recipe.z_loss, recipe.loss_chunk)
    gradients = gradients_of(OpenELM(trial), objective, DTYPES[recipe.dtype], recipe.gradient_checkpointing)
    per_token, share = 0.0, 1.0
    for trial_number, num_tokens in enumerate(_TRIAL_TOKENS):
        if trial_number == 2 and per_token * num_tokens > _TRIAL_SECONDS:
            break
        length = min(recipe.sequence_length, num_tokens)
        shape = max(1, min(recipe.batch_size, num_tokens // length)), length + 1
        tokens = np.random.default_rng(0).integers(trial.vocab_size, size=shape).astype(np.int32)
        batch = make_batch(TokenBatch(tokens, np.zeros_like(tokens), np.ones((shape[0], length), bool)))
        started = time.perf_counter()
        mx.eval(gradients(parameters, batch))
        per_token = (time.perf_counter() - started) / (shape[0] * length)
        share = _work(recipe.model, recipe.sequence_length) / _work(trial, length)
    mx.reset_peak_memory()
    return 1 / (share * per_token)


def _trial_model(config: OpenELMConfig) -> OpenELMConfig:
    if config.num_parameters <= _WHOLE or config.num_transformer_layers <= 2:
        return config
    first = config.num_transformer_layers // 2 - 1
    middle = slice(first, first + 2)
    return replace(
        config,
        num_transformer_layers=2,
        num_query_heads=config.num_query_heads[middle],
        num_kv_heads=config.num_kv_heads[middle],
        ffn_multipliers=config.ffn_multipliers[middle],
        qkv_multipliers=None,
    )


def _work(config: OpenELMConfig, length: int) -> float:
    """Multiplications for one token of a row of this length, forwards."""
    attention = sum(config.num_query_heads) * config.head_dim * length
    return sum(config.layer_parameters) + config.vocab_size * config.model_dim + attention
