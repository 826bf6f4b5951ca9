"""The recipe of pre-training: its fields, and the values of those that are left open.

The recipes of the published sizes have the paper's values (OpenELM, arXiv:2404.14619, and CoreNet's configurations).
What neither a recipe nor an option sets follows from the sizes of the model and of the data.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from ..config import FFN_MULTIPLIERS, PRESETS, QKV_MULTIPLIERS, OpenELMConfig
from ..conversion.read.config import config_from_dict, read_config
from ..data.corpus import PACKINGS
from ..data.text_files import TextSource
from ..errors import ConfigError, quoted
from ..files.fields import Fields
from ..files.paths import exists, user_path
from ..machine.device import DTYPES, compute_dtype
from .recipe import Recipe
from .setting import changed, setting

RECIPES = Path(__file__).parents[1] / "assets" / "recipes" / "pretrain"

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022 (arXiv:2203.15556)
_MOST_EPOCHS = 4.0  # more passes over the same text teach little (Muennighoff et al. 2023, arXiv:2305.16264)
_STEP_TOKENS = (4096, 524_288)  # fewest and most tokens of a step; between, a thousandth of the parameters
_LEARNING_RATE, _LEARNING_RATE_SIZE = 0.003, 10_000_000  # of a model of this size; larger ones get less
_WARMUP_SHARE = 0.03  # of all steps
_CHECKS_PER_RUN, _CHECK_STEPS = 20, 5  # a short run has fewer, or validations would take most of its time
_OPEN = {  # what marks a field as open
    "steps": 0,
    "batch_size": 0,
    "micro_batch_size": 0,
    "sequence_length": 0,
    "learning_rate": 0.0,
    "warmup_steps": -1,
    "dtype": "auto",
    "validate_every": 0,
    "checkpoint_every": 0,
    "tokenizer": "",
    "train_tokenizer": 0,
}


_DATA = "Model and data"
_MOST_FILES = 1_000_000  # of a numbered source


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """Everything that determines the result of pre-training.

    Raises:
        ConfigError: naming the field, if a value is invalid.
    """

    model: OpenELMConfig = setting(
        MISSING,
        "Configuration file from `design`, published size such as 270M, or a mapping of dimensions (in a recipe).",
        _DATA,
        is_path=True,
    )
    data: tuple[TextSource, ...] = setting(
        (), "Text file or pattern, or a list of sources with weights (in a recipe).", _DATA, is_path=True
    )
    tokenizer: str | Path = setting("", "Tokenizer file, folder or hub id.", _DATA, is_path=True)
    train_tokenizer: int = setting(
        0,
        "Train a tokenizer with N tokens on the data; 0: the model's vocabulary, if no `tokenizer` is given.",
        _DATA,
        at_least=0,
    )
    sequence_length: int = setting(0, "Tokens per row; 0: the model's context length.", _DATA, at_least=0)
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
    epochs: float = setting(
        0.0,
        f"Passes over the data, if no steps are given; 0: up to {_MOST_EPOCHS:g}, "
        f"for {TOKENS_PER_PARAMETER} tokens per parameter.",
        "Optimizer",
        at_least=0,
        can_change=True,
    )
    steps: int = changed(
        Recipe, "steps", 0, help="Optimizer steps; 0: determined by the epochs.", above=None, at_least=0
    )
    batch_size: int = changed(
        Recipe,
        "batch_size",
        0,
        help="Rows per optimizer step, over all processes; 0: by the size of the model.",
        above=None,
        at_least=0,
    )
    micro_batch_size: int = setting(
        0,
        "Rows per forward and backward pass on each process; 0: all, or what fits if the batch size is open too.",
        "Compute",
        at_least=0,
        can_change=True,
    )
    learning_rate: float = changed(
        Recipe, "learning_rate", 0.0, help="Peak learning rate; 0: by the size of the model.", above=None, at_least=0
    )
    warmup_steps: int = changed(
        Recipe, "warmup_steps", -1, help=f"Warm-up steps; -1: {_WARMUP_SHARE:.0%} of all steps.", at_least=-1
    )
    validate_every: int = changed(
        Recipe,
        "validate_every",
        0,
        help=f"Steps between validations; 0: 1/{_CHECKS_PER_RUN} of the run, at least {_CHECK_STEPS}.",
        above=None,
        at_least=0,
    )
    checkpoint_every: int = changed(
        Recipe,
        "checkpoint_every",
        0,
        help=f"Steps between checkpoints; 0: 1/{_CHECKS_PER_RUN} of the run, at least {_CHECK_STEPS}.",
        above=None,
        at_least=0,
    )
    dtype: str = changed(
        Recipe,
        "dtype",
        "auto",
        help="Type to compute in: auto (float32 on a CPU, otherwise bfloat16), float16, bfloat16 or float32. "
        "Trained weights and optimizer state stay in float32.",
        choices=("auto", *DTYPES),
    )
    z_loss: float = changed(Recipe, "z_loss", 1e-4)

    folder: ClassVar[Path] = RECIPES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length > self.model.max_context_length:
            raise ConfigError(
                f"sequence_length must be at most {self.model.max_context_length}, the model's context length; "
                f"got {self.sequence_length}"
            )
        if self.train_tokenizer > self.model.vocab_size:
            raise ConfigError(
                f"train_tokenizer must be at most {self.model.vocab_size:,}, the model's vocabulary; "
                f"got {self.train_tokenizer}"
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

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """As in every recipe; where the data is does not matter: its content is compared when it is read."""
        entries = other.get("data") or ()
        placed = [
            {**entry, "path": source.path} if isinstance(entry, dict) else entry
            for entry, source in zip(entries, self.data, strict=False)
        ]
        return super().differences({**other, "data": [*placed, *entries[len(placed) :]]})

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary to train; 0 if `tokenizer` names one."""
        return self.train_tokenizer or (0 if self.tokenizer else self.model.vocab_size)

    def steps_per_epoch(self, num_tokens: int, num_documents: int) -> int:
        """Steps in which about every token of the data is seen once.

        Args:
            num_tokens, num_documents: of the data, without what is held out.
        """
        rows = num_documents if self.packing == "rows" else num_tokens / self.sequence_length
        return max(1, round(rows / self.batch_size))

    def resolved(self, num_tokens: int, num_documents: int, num_processes: int = 1) -> "PretrainRecipe":
        """The recipe with its open fields set, for this model and data of this size."""
        parameters = self.model.num_parameters
        length = self.sequence_length or self.model.max_context_length
        rate = _LEARNING_RATE * min(1.0, _LEARNING_RATE_SIZE / parameters) ** (1 / 3)
        sized = replace(
            self,
            sequence_length=length,
            batch_size=self.batch_size or _rows(parameters, length, num_processes),
            learning_rate=self.learning_rate or float(f"{rate:.2g}"),
            train_tokenizer=self.vocabulary,
            dtype=self.dtype if self.dtype != "auto" else str(compute_dtype(mx.float32)).removeprefix("mlx.core."),
        )
        per_epoch = sized.steps_per_epoch(num_tokens, num_documents)
        wanted = math.ceil(TOKENS_PER_PARAMETER * parameters / (sized.batch_size * length))
        of_epochs = self.epochs * per_epoch if self.epochs else min(wanted, _MOST_EPOCHS * per_epoch)
        steps = self.steps or max(1, round(of_epochs))
        every = max(min(_CHECK_STEPS, steps), math.ceil(steps / _CHECKS_PER_RUN))
        return replace(
            sized,
            steps=steps,
            warmup_steps=self.warmup_steps if self.warmup_steps >= 0 else round(_WARMUP_SHARE * steps),
            validate_every=self.validate_every or every,
            checkpoint_every=self.checkpoint_every or every,
        )

    def continued(self, before: Mapping[str, Any]) -> "PretrainRecipe":
        """The recipe with its open fields set as in the recipe of the run that it continues, from `to_dict`."""
        names = {name for name, value in _OPEN.items() if getattr(self, name) == value and name in before}
        if self.epochs:
            names.discard("steps")
        if self.tokenizer or self.train_tokenizer:
            names -= {"tokenizer", "train_tokenizer"}
        return replace(self, **{name: before[name] for name in names})


def _rows(num_parameters: int, length: int, num_processes: int) -> int:
    """Rows of a step for a model of this size, divisible by the number of processes."""
    fewest, most = _STEP_TOKENS
    tokens = min(most, max(fewest, 2 ** round(math.log2(num_parameters / 1000))))
    return max(1, round(tokens / length / num_processes)) * num_processes


def _model(value: object) -> OpenELMConfig:
    if isinstance(value, OpenELMConfig):
        return value
    if isinstance(value, str | os.PathLike):
        name = str(value)
        if name in PRESETS:
            return PRESETS[name]
        if not exists(user_path(name)):
            try:
                return OpenELMConfig.preset(name)
            except ConfigError:
                raise ConfigError(
                    f"model {quoted(name)} does not exist, and is not a published size ({', '.join(PRESETS)}); "
                    "`openelm-mlx design` writes a configuration"
                ) from None
        return read_config(name)
    if not isinstance(value, dict):
        raise ConfigError(f"model must be a file, a name such as 270M, or a table of widths; got {quoted(value)}")
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
        os.path.expanduser(read.text("path")),
        read.number("weight", default.weight),
        read.text("text_key", default.text_key),
        first,
        read.whole("last", default.last, at_most=first + _MOST_FILES),
    )
