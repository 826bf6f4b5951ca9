"""Pre-training: the recipe, fresh weights, and the run.

The defaults are those of the paper where it gives one (OpenELM, arXiv:2404.14619, and CoreNet's configurations).
"""

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from ..config import OpenELMConfig
from ..conversion.read.config import config_from_dict
from ..data.batch import TokenBatch
from ..data.corpus import PACKINGS, Corpus, CorpusBatches, validation_rows
from ..data.text_files import Source
from ..errors import ConfigError
from ..files.lock import LockedFolder
from ..model.openelm import OpenELM, parameter_shapes
from ..tensors import save_arrays
from ..tokenizer.files import write_tokenizer
from ..tokenizer.tokenizer import Tokenizer
from .loop import Metrics, train
from .loss import CrossEntropy
from .optimizer import Tensors
from .recipe import Recipe
from .trainer import Trainer

RECIPES = Path(__file__).parents[1] / "assets" / "recipes" / "pretrain"


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """Everything that decides what a run from scratch computes.

    Raises:
        ConfigError: naming the field, if a value is impossible.
    """

    model: OpenELMConfig
    data: tuple[Source, ...] = ()
    tokenizer: str = ""  # file, folder or hub id
    train_tokenizer: int = 0  # pieces of a vocabulary to be made from the data; 0 takes `tokenizer`
    steps: int = 350_000
    batch_size: int = 2048  # rows a step, over all processes
    micro_batch_size: int = 0  # rows that one process computes at once; 0: all of its own
    sequence_length: int = 2048
    packing: str = "stream"  # "documents": as "stream", but none sees another; "rows": one document a row
    min_characters: int = 0
    min_tokens: int = 0
    validation_share: float = 0.02  # of the documents
    validation_rows: int = 200
    learning_rate: float = 0.0024
    warmup_steps: int = 5000
    z_loss: float = 1e-4

    folder: ClassVar[Path] = RECIPES
    free: ClassVar[frozenset[str]] = Recipe.free | {"micro_batch_size", "validation_rows"}
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {**Recipe._choices, "packing": PACKINGS}
    _positive: ClassVar[tuple[str, ...]] = (*Recipe._positive, "sequence_length")
    _not_negative: ClassVar[tuple[str, ...]] = (
        *Recipe._not_negative,
        *("micro_batch_size", "min_characters", "min_tokens", "validation_rows"),
    )
    _shares: ClassVar[tuple[str, ...]] = (*Recipe._shares, "validation_share")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length > self.model.max_context_length:
            raise ConfigError(
                f"sequence_length must be at most {self.model.max_context_length}, the model's context; "
                f"got {self.sequence_length}"
            )

    @classmethod
    def _read(cls, name: str, value: Any, default: Any, folder: Path) -> Any:
        if name == "model":
            return _model(value)
        if name == "data":
            return tuple(_source(entry, folder) for entry in (value if isinstance(value, list) else [value]))
        if name == "tokenizer" and value and (folder / str(value)).exists():
            return str(folder / value)
        return super()._read(name, value, default, folder)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as YAML and JSON can hold it; `from_dict` reads it back equal."""
        return {**asdict(self), "model": self.model.to_dict(), "data": [asdict(source) for source in self.data]}


def _model(value: object) -> OpenELMConfig:
    if isinstance(value, str):
        return OpenELMConfig.preset(value)
    if not isinstance(value, dict):
        raise ConfigError(f"model must be a name such as 270M, or a table of widths; got {value!r}")
    if "num_query_heads" in value or "model_type" in value:
        return config_from_dict(value)
    try:
        return OpenELMConfig.layerwise(**value)
    except TypeError as error:
        raise ConfigError(f"model: {str(error).split('.')[-1]}") from error


def _source(value: object, folder: Path) -> Source:
    if isinstance(value, str):
        value = {"path": value}
    try:
        source = Source(**value)  # type: ignore[arg-type]
    except TypeError as error:
        names = ", ".join(entry.name for entry in fields(Source))
        raise ConfigError(f"data: {value!r} is not a source (fields: {names})") from error
    return replace(source, path=str(folder / source.path))


class CorpusRows:
    """The rows of a corpus that a recipe asks for, to train on and to validate with."""

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


def _std(recipe: PretrainRecipe, name: str, shape: tuple[int, ...]) -> float:
    """Embedding and output: model_dim^-0.5. qkv_proj, proj_1: in_features^-0.5. out_proj, proj_2: depth divides too."""
    if name.endswith(("out_proj.weight", "proj_2.weight")):
        return (2 * recipe.model.num_transformer_layers * recipe.model.model_dim) ** -0.5
    return shape[1] ** -0.5


def fresh_trainer(recipe: PretrainRecipe, corpus: Corpus, group: mx.distributed.Group | None = None) -> Trainer:
    """A trainer of a whole network with fresh weights.

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


def pretrain(
    recipe: PretrainRecipe,
    corpus: Corpus,
    tokenizer: Tokenizer,
    run: Path | LockedFolder,
    *,
    resume: bool = False,
    group: mx.distributed.Group | None = None,
    on_step: Callable[[Metrics], None] = lambda metrics: None,
    on_message: Callable[[str], None] = lambda message: None,
) -> Generator[Metrics, None, None]:
    """Train from scratch to the recipe's last step; see `train`. A checkpoint is a model folder.

    Raises:
        TrainingError: if the run cannot start or continue; the last good checkpoint stays.
    """
    trainer = fresh_trainer(recipe, corpus, group)

    def write(folder: Path, parameters: Tensors) -> None:
        save_arrays(folder / "model.safetensors", parameters, {"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(recipe.model.to_dict(), indent=2) + "\n")
        write_tokenizer(tokenizer, folder)

    yield from train(trainer, tokenizer, run, write, resume=resume, on_step=on_step, on_message=on_message)
