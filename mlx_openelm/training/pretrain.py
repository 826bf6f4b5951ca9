"""Pre-training: the recipe, the initial weights, and the run.

The defaults are the paper's where it states a value (OpenELM, arXiv:2404.14619, and CoreNet's configurations).
"""

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from ..config import FFN_MULTIPLIERS, QKV_MULTIPLIERS, OpenELMConfig
from ..conversion.read.config import config_from_dict
from ..conversion.write.model_card import trained_card, write_card
from ..data.batch import TokenBatch
from ..data.corpus import PACKINGS, Corpus, CorpusBatches, Filters, prepare_corpus, validation_rows
from ..data.text_files import TextSource
from ..data.train_tokenizer import train_tokenizer
from ..errors import ConfigError, quoted
from ..files.fields import Fields
from ..files.lock import LockedFolder
from ..files.paths import exists
from ..model.openelm import OpenELM, parameter_shapes
from ..tensors import save_arrays
from ..tokenizer.files import find_tokenizer, write_tokenizer
from ..tokenizer.tokenizer import Tokenizer
from .checkpoints import together
from .loop import Metrics, train
from .loss import CrossEntropy
from .optimizer import Tensors
from .recipe import Recipe, changed, setting
from .trainer import Trainer

RECIPES = Path(__file__).parents[1] / "assets" / "recipes" / "pretrain"


_DATA = "Model and data"
_MOST_FILES = 1_000_000  # of a numbered source


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """Everything that determines the result of pre-training.

    Raises:
        ConfigError: naming the field, if a value is invalid.
    """

    model: OpenELMConfig = setting(
        MISSING, "Published size such as 270M, or a mapping of dimensions (in a recipe).", _DATA
    )
    data: tuple[TextSource, ...] = setting(
        (), "Text file or pattern, or a list of sources with weights (in a recipe).", _DATA, is_path=True
    )
    tokenizer: str | Path = setting("", "Tokenizer file, folder or hub id.", _DATA, is_path=True)
    train_tokenizer: int = setting(
        0, "Train a tokenizer with a vocabulary of N tokens on the data; 0: use `tokenizer`.", _DATA, at_least=0
    )
    sequence_length: int = setting(2048, "Tokens per row.", _DATA, above=0)
    packing: str = setting(
        "stream",
        "stream: concatenate documents and split; documents: pack without attention across them; rows: one per row.",
        _DATA,
        choices=PACKINGS,
    )
    min_characters: int = setting(0, "Skip documents with fewer characters.", _DATA, at_least=0)
    min_tokens: int = setting(0, "Skip documents with fewer tokens.", _DATA, at_least=0)
    validation_share: float = setting(0.02, "Share of the documents to hold out.", _DATA, at_least=0, below=1)
    validation_rows: int = setting(
        200, "Maximum rows per validation; 0: all.", "Validation and checkpoints", at_least=0, can_change=True
    )
    steps: int = changed(Recipe, "steps", 350_000)
    batch_size: int = changed(Recipe, "batch_size", 2048)
    micro_batch_size: int = setting(
        0,
        "Rows per forward and backward pass on each process; 0: no gradient accumulation.",
        "Compute",
        at_least=0,
        can_change=True,
    )
    learning_rate: float = changed(Recipe, "learning_rate", 0.0024)
    warmup_steps: int = changed(Recipe, "warmup_steps", 5000)
    z_loss: float = changed(Recipe, "z_loss", 1e-4)

    folder: ClassVar[Path] = RECIPES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length > self.model.max_context_length:
            raise ConfigError(
                f"sequence_length must be at most {self.model.max_context_length}, the model's context length; "
                f"got {self.sequence_length}"
            )

    @classmethod
    def _placed(cls, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        placed = super()._placed(values, folder)
        if "data" in values:  # including glob patterns
            placed["data"] = [replace(source, path=str(folder / source.path)) for source in _sources(values["data"])]
        return placed

    @classmethod
    def _read(cls, name: str, value: Any, entry: "Field[Any]") -> Any:
        if name == "model":
            return _model(value)
        if name == "data":
            return _sources(value)
        return super()._read(name, value, entry)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a dict for YAML and JSON; `from_dict` restores an equal recipe."""
        return {**asdict(self), "model": self.model.to_dict(), "data": [asdict(source) for source in self.data]}


def _model(value: object) -> OpenELMConfig:
    if isinstance(value, OpenELMConfig):
        return value
    if isinstance(value, str):
        return OpenELMConfig.preset(value)
    if not isinstance(value, dict):
        raise ConfigError(f"model must be a name such as 270M, or a table of widths; got {quoted(value)}")
    if not {"num_query_heads", "model_type", "model_name"} & set(value):  # a table of what `layerwise` needs
        value = {"qkv_multipliers": QKV_MULTIPLIERS, "ffn_multipliers": FFN_MULTIPLIERS, **value}
    return config_from_dict(value)


def _sources(value: object) -> tuple[TextSource, ...]:
    return tuple(_source(entry) for entry in (value if isinstance(value, list | tuple) else [value]))


def _source(value: object) -> TextSource:
    if isinstance(value, TextSource):
        return value
    if isinstance(value, str | Path):
        value = {"path": str(value)}
    names = [entry.name for entry in fields(TextSource)]
    if not isinstance(value, dict) or "path" not in value or set(value) - set(names):
        raise ConfigError(f"data: {quoted(value)} is not a source (fields: {', '.join(names)})")
    read = Fields(value, "data", ConfigError)
    default = TextSource("")
    first = read.whole("first", default.first)
    return TextSource(
        read.text("path"),
        read.number("weight", default.weight),
        read.text("text_key", default.text_key),
        first,
        read.whole("last", default.last, at_most=first + _MOST_FILES),
    )


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


def prepare_pretraining(
    recipe: PretrainRecipe,
    run: Path,
    group: mx.distributed.Group,
    *,
    on_tokenizing: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
    on_message: Callable[[str], None] = lambda message: None,
) -> tuple[Tokenizer, Corpus]:
    """The tokenizer and the tokenized corpus of a run; the first process creates them if they do not exist.

    Raises:
        DataError: if the data cannot be read.
        TokenizerError: if there is no tokenizer, or it does not fit the model.
    """
    is_first = group.rank() == 0
    filters = Filters(recipe.min_characters, recipe.min_tokens, recipe.validation_share)
    vocabulary = run / "tokenizer.model"

    def make_vocabulary() -> None:
        if is_first and recipe.train_tokenizer and not exists(vocabulary):
            on_message(f"training a tokenizer with {recipe.train_tokenizer:,} tokens")
            train_tokenizer(recipe.data, recipe.train_tokenizer, vocabulary)

    def find_corpus() -> Corpus:
        return prepare_corpus(recipe.data, tokenizer, filters, run / "corpus", on_tokenizing)

    together(group, make_vocabulary)
    if recipe.train_tokenizer:
        tokenizer = Tokenizer(vocabulary)
    else:
        tokenizer, _ = find_tokenizer(recipe.tokenizer or None, None, recipe.model.vocab_size)
    corpus = together(group, lambda: find_corpus() if is_first else None)  # the others read it from disk
    return tokenizer, corpus or find_corpus()


def pretraining_steps(
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
    """Train from scratch to the recipe's last step, yielding metrics; see `train`. Each checkpoint is a model folder.

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

    yield from train(trainer, tokenizer, run, write, resume=resume, on_step=on_step, on_message=on_message)


def _settings(recipe: PretrainRecipe) -> dict[str, str]:
    """The settings of a run for its card: nothing about where its data was."""
    return {
        "steps of the run": f"{recipe.steps:,}, of {recipe.batch_size:,} rows of {recipe.sequence_length:,} tokens",
        "learning rate": f"{recipe.learning_rate:g}, {recipe.schedule}",
        "seed": str(recipe.seed),
    }
