"""Fine-tuning: which parameters are trained, on which examples, and the run.

LoRA, DoRA and full fine-tuning differ in the trained parameters; cross-entropy and DPO differ in the objective.
"""

import filecmp
import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..conversion.origin import CARD, Origin, origin_of_model
from ..conversion.write.model_card import adapter_card, write_card
from ..data.batch import Batch, TokenBatch
from ..data.dataset import ExampleSet, read_splits
from ..data.example_batches import ExampleBatches, all_rows
from ..errors import AdapterError, DataError, OutputError, TrainingError
from ..files.lock import LockedFolder
from ..files.output import OutputFile, move_away, output_file
from ..files.paths import exists
from ..machine.compiler import compile_function
from ..machine.device import DTYPES, memory_limit_bytes
from ..model.adapters import CONFIG_FILE, TENSOR_FILE, SavedAdapter, about_base, save_adapter
from ..model.lora import MAGNITUDE, AdapterConfig, adapter_parameters, adapter_paths, add_adapter, last_layers
from ..model.openelm import OpenELM
from ..quantization import matrix_shape
from ..runs import best_checkpoint, read_state
from ..tensors import as_bytes
from ..tokenizer.chat_template import TEMPLATE_FILE
from ..tokenizer.tokenizer import Tokenizer
from .callback import Metrics, TrainingCallback
from .checkpoint_metric import CheckpointMetric
from .checkpoints import load_checkpoint, run_lock
from .dpo import DPO, reference_logprobs
from .loop import train
from .loss import CrossEntropy, Objective
from .optimizer import Tensors
from .start import load_start
from .trainer import Trainer
from .tune_recipe import TuneRecipe

_BYTES_PER_PARAMETER = 32  # of an adapter: its value, and what an update needs besides


class ExampleRows:
    """The rows of examples, as the recipe defines them, for training and validation."""

    def __init__(self, recipe: TuneRecipe, examples: ExampleSet, held_out: ExampleSet | None, fingerprint: str):
        self._recipe = recipe
        self._held_out = held_out
        self._batches = ExampleBatches(
            examples.examples,
            recipe.batch_size * recipe.grad_accumulation_steps,
            max_length=recipe.max_length,
            pack=recipe.pack,
            seed=recipe.seed,
        )
        self.rows_per_entry = self._batches.rows_per_entry
        self.rows_per_step = recipe.batch_size * recipe.grad_accumulation_steps * self.rows_per_entry
        self.steps_per_epoch = self._batches.steps_per_epoch
        marks = [fingerprint, examples.fingerprint, held_out.fingerprint if held_out else ""]
        self.fingerprint = hashlib.sha256("".join(marks).encode()).hexdigest()

    def step(self, step: int, first: int = 0, count: int | None = None) -> TokenBatch:
        """Rows `first` to `first + count` (exclusive) of a step; both must be multiples of `rows_per_entry`."""
        share = None if count is None else count // self.rows_per_entry
        return self._batches.step(step, first // self.rows_per_entry, share)

    def validation(self, first: int, stride: int) -> Iterator[TokenBatch]:
        """Every `stride`-th batch of held-out examples."""
        if self._held_out is not None:
            yield from all_rows(self._held_out.examples, self._recipe.batch_size, first, stride)


@dataclass(frozen=True)
class Tuning:
    """A model and examples, ready for tuning.

    Attributes:
        recipe: the recipe with its open settings resolved: steps, warm-up, length, dtype.
        parameters: trained parameters by name, float32; a trainer takes them over.
        num_parameters: number of trained parameters.
        chat_template: recorded with the adapter, if it is not that of the base model.
        origin: base model on the hub and licence, for the card.
    """

    recipe: TuneRecipe
    model: OpenELM
    tokenizer: Tokenizer
    train: ExampleSet
    held_out: ExampleSet | None
    test: ExampleSet | None
    rows: ExampleRows
    parameters: Tensors
    num_parameters: int
    chat_template: str | None
    origin: Origin

    @property
    def base(self) -> dict[str, Any]:
        """What an adapter records about its base model."""
        return about_base(Path(self.recipe.model).name, self.model.config)

    @property
    def objective(self) -> Objective:
        """The objective that training minimises."""
        if self.recipe.objective == "dpo":
            return DPO(self.recipe.beta, self.recipe.preference_loss, self.recipe.loss_chunk)
        return CrossEntropy(self.recipe.z_loss, self.recipe.loss_chunk)


def prepare_tuning(recipe: TuneRecipe, *, has_metric: bool = False) -> Tuning:
    """Load the model, read the examples, and resolve the recipe's open settings.

    Args:
        has_metric: whether the run will have a `CheckpointMetric`, by which it can stop early.
    Raises:
        OpenELMError: one of its subclasses, if anything is missing or contradictory.
    """
    if not recipe.data:
        raise DataError("no data given; set `data` to a file or a folder")
    start = load_start(recipe)
    recipe, model, tokenizer = start.recipe, start.model, start.tokenizer
    share = _share(recipe.validation)
    validation = share if share is not None else str(recipe.validation) or None
    if not exists(Path(recipe.data)):
        raise DataError(f"{recipe.data} does not exist")
    examples, held_out, test = read_splits(
        Path(recipe.data),
        tokenizer,
        start.options,
        validation,
        recipe.seed,
        test=Path(recipe.test) if recipe.test else None,
    )
    start.check(examples)
    if (examples.format == "preference") != (recipe.objective == "dpo"):
        needed = (
            "prompt, chosen and rejected"
            if recipe.objective == "dpo"
            else "a text or an answer; use `method=dpo` for pairs"
        )
        raise DataError(f"{examples.path} is in the {examples.format} format; this method needs {needed}")
    if recipe.early_stop and held_out is None and not has_metric:
        raise DataError("early_stop needs validation examples; set `validation` to a file or a share such as 0.05")
    rows = ExampleRows(recipe, examples, held_out, _fingerprint(model))
    parameters = _trained(model, recipe, start.adapter)
    tokenizer.example_format = examples.example_format
    steps = recipe.steps or max(1, round(recipe.epochs * rows.steps_per_epoch))
    recipe = replace(recipe, steps=steps)
    count = sum(p.size for p in parameters.values())
    return Tuning(
        recipe,
        model,
        tokenizer,
        examples,
        held_out,
        test,
        rows,
        parameters,
        count,
        start.chat_template,
        origin_of_model(recipe.model, model.config),
    )


def tuning_steps(
    tuning: Tuning,
    output: Path | LockedFolder,
    *,
    resume: bool = False,
    group: mx.distributed.Group | None = None,
    callback: TrainingCallback | None = None,
    metric: CheckpointMetric | None = None,
    on_end: Callable[[Trainer], None] = lambda trainer: None,
) -> Generator[Metrics, None, None]:
    """Train to the recipe's last step, yielding metrics; see `train`. Each checkpoint is an adapter.

    When the run ends or is interrupted, `output` itself becomes the adapter with the best metric or validation loss;
    without either, the last one.

    Args:
        on_end: called after the last step with a trainer that has the parameters of that adapter.
    Raises:
        TrainingError: if the run cannot start or continue; the last good adapter is kept.
    """
    group, callback = group or mx.distributed.init(), callback or TrainingCallback()
    trainer = make_trainer(tuning, group)
    name = (output.path if isinstance(output, LockedFolder) else output).resolve().name
    template = tuning.chat_template
    names = (TENSOR_FILE, CONFIG_FILE, CARD, *([TEMPLATE_FILE] if template is not None else []))

    def write(folder: Path, parameters: Tensors) -> None:
        recipe = tuning.recipe
        about = tuning.base, template, tuning.train.example_format
        save_adapter(folder, parameters, recipe.method, recipe.adapter_config, *about)
        spoken = tuning.tokenizer.chat_template
        write_card(folder, adapter_card(name, recipe.method, Path(recipe.model).name, tuning.origin, spoken))

    with run_lock(output, group) as run, ExitStack() as claims:
        published = {}
        if group.rank() == 0:
            _move_foreign_away(run.path, names, callback.on_message)
            for name in names:
                published[name] = claims.enter_context(output_file(run.path / name, overwrite=True))
        try:
            yield from train(trainer, tuning.tokenizer, run, write, resume=resume, callback=callback, metric=metric)
        except BaseException:
            with suppress(OutputError):  # the error that ended the run is reported
                _publish(published, run.path)
            raise
        _publish(published, run.path)
        _take_best(trainer, run.path)
        on_end(trainer)


def make_trainer(tuning: Tuning, group: mx.distributed.Group | None = None) -> Trainer:
    """The trainer for a prepared model and examples.

    Raises:
        TrainingError: if the batch cannot be split over the processes.
    """
    recipe, group = tuning.recipe, group or mx.distributed.init()
    parameters = dict(tuning.parameters)
    tuning.parameters.clear()  # otherwise the initial values would stay in memory
    rows = max(1, recipe.batch_size // group.size()) * tuning.rows.rows_per_entry
    prepare: Callable[[Batch], Batch] = _unchanged
    if recipe.objective == "dpo":
        dtype = DTYPES[recipe.dtype]
        before = {name: p if name.endswith(f".{MAGNITUDE}") else p.astype(dtype) for name, p in parameters.items()}
        reference = compile_function(partial(reference_logprobs, tuning.model, dtype, before))

        def prepare(batch: Batch) -> Batch:
            found: Batch = {**batch, "reference": reference(batch)}
            mx.eval(found)
            return found

    return Trainer(
        recipe,
        tuning.model,
        parameters,
        tuning.rows,
        tuning.objective,
        micro_batch_size=rows,
        dropout=recipe.adapter_config is not None and recipe.dropout > 0,
        prepare=prepare,
        group=group,
    )


def _unchanged(batch: Batch) -> Batch:
    return batch


def _move_foreign_away(run: Path, names: Sequence[str], on_message: Callable[[str], None]) -> None:
    """Rename files in place of the final adapter, unless they are copies of those in the best checkpoint."""
    best = best_checkpoint(run)
    for path in (run / name for name in names):
        if exists(path) and (best is None or not _same(path, best / path.name)):
            place = move_away(path, f"{path.stem}-old{path.suffix}")
            on_message(f"{path} was not written by this run; moved it to {place.name}")


def _same(path: Path, other: Path) -> bool:
    return exists(other) and filecmp.cmp(path, other, shallow=False)


def _publish(outputs: Mapping[str, OutputFile], run: Path) -> None:
    """Copy the best adapter to the folder of the run."""
    folder = best_checkpoint(run)
    for name, output in outputs.items() if folder is not None else ():
        with open(folder / name, "rb") as best, output.replaced() as file:  # type: ignore[operator]
            shutil.copyfileobj(best, file)


def _take_best(trainer: Trainer, run: Path) -> None:
    """Give a trainer the parameters of the best checkpoint, which the first process reads for all."""
    best = best_checkpoint(run) if trainer.group.rank() == 0 else None
    if best is not None and read_state(best)["step"] != trainer.step:
        saved = load_checkpoint(best).parameters
        trainer.parameters = {name: saved[name] for name in trainer.parameters}
    if trainer.group.size() > 1:
        first = trainer.group.rank() == 0
        trainer.parameters = {
            name: mx.distributed.all_sum(p if first else mx.zeros_like(p)) for name, p in trainer.parameters.items()
        }


def _trained(model: OpenELM, recipe: TuneRecipe, start: SavedAdapter | None) -> Tensors:
    """The trained parameters of a model by name, float32; adds the adapter to the model, unless it has one already."""
    if recipe.adapter_config is not None:
        if start is None:
            _check_memory(model, recipe.adapter_config)
            add_adapter(model, recipe.adapter_config, recipe.seed)
        return adapter_parameters(model)
    own = dict(tree_flatten(model.parameters()))
    if any(name.endswith(".scales") for name in own):
        raise AdapterError(
            f"{recipe.model} is quantized, so it cannot be fully fine-tuned; "
            "convert it with `dequantize`, or use lora or dora"
        )
    layers = tuple(f"transformer.layers.{layer}." for layer in last_layers(model, recipe.layers))
    names = [name for name in own if not recipe.layers or name.startswith(layers)]
    names = names if start is None else [name for name in own if name in start.tensors]
    trained = {name: own[name].astype(mx.float32) for name in names}
    mx.eval(trained)
    return trained


def _check_memory(model: OpenELM, adapter: AdapterConfig) -> None:
    """Make sure that an adapter and its optimizer state fit into memory, before they are allocated."""
    modules: Any = dict(model.named_modules())
    paths = adapter_paths(model, adapter.targets, adapter.layers)
    count = sum(adapter.rank * sum(matrix_shape(modules[path])) for path in paths)
    needed, limit = count * _BYTES_PER_PARAMETER, memory_limit_bytes()
    if needed > limit:
        raise TrainingError(
            f"an adapter of rank {adapter.rank:,} has {count:,} parameters; training them needs {needed / 2**30:,.1f} "
            f"GiB, but this machine has {limit / 2**30:,.1f} GiB; reduce `rank`, or choose fewer `targets`"
        )


def _fingerprint(model: OpenELM) -> str:
    """A hash of the configuration and of the first row of each tensor, enough to tell models apart."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, array in dict(tree_flatten(model.parameters())).items():
        digest.update(name.encode() + bytes(as_bytes(array[0] if array.ndim > 1 else array)))
    return digest.hexdigest()


def _share(value: str | float | Path) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None
