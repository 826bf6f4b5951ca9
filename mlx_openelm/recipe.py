"""How a model is trained: the fields of a recipe, their defaults, and the YAML files they are written in.

The defaults are those of the paper where it gives one (OpenELM, arXiv:2404.14619, and CoreNet's configurations).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .config import OpenELMConfig
from .data import PACKINGS
from .device import DTYPES
from .documents import Source
from .errors import ConfigError, shorten
from .loss import DEFAULT_CHUNK

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

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
    learning_rate: float = 0.0024
    final_learning_rate: float = 0.1  # as a share of the largest
    initial_learning_rate: float = 1e-6
    warmup_steps: int = 5000
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices
    clip: float = 1.0  # largest norm of the gradient; 0: none
    z_loss: float = 1e-4
    dtype: str = "bfloat16"  # to compute in; weights and optimizer are kept in float32
    recompute_layers: bool = False
    loss_chunk: int = DEFAULT_CHUNK  # tokens whose logits stand in memory at once
    seed: int = 0
    log_every: int = 10
    validate_every: int = 1000
    validation_rows: int = 200
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    sample_prompt: str = ""  # continued at each validation

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "sequence_length", "learning_rate", "log_every", "validate_every")
        for name in (*positive, "checkpoint_every", "keep_checkpoints", "loss_chunk"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it has to be positive")
        not_negative = (
            "micro_batch_size",
            "min_characters",
            "min_tokens",
            "warmup_steps",
            "clip",
            "z_loss",
        )
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it cannot be negative")
        for name in ("beta1", "beta2", "validation_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it has to be at least 0 and below 1")
        for name, known in (("packing", PACKINGS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; there are {', '.join(known)}")
        if self.sequence_length > self.model.max_context_length:
            raise ConfigError(
                f"sequence_length is {self.sequence_length} and the model's context {self.model.max_context_length}"
            )

    @classmethod
    def named(cls, name: str) -> Path:
        """The file of a recipe: one that is named, or one that comes with the package, as in `270M`.

        Raises:
            ConfigError: if there is neither.
        """
        path = Path(name)
        if path.exists():
            return path
        packaged = {entry.stem: entry for entry in sorted(RECIPES.glob("*.yaml"))}
        if name not in packaged:
            raise ConfigError(f"{name} does not exist; recipes that come with the package are {', '.join(packaged)}")
        return packaged[name]

    @classmethod
    def from_file(cls, path: Path, overrides: Mapping[str, str] | None = None, folder: Path | None = None) -> "Recipe":
        """Read a recipe from YAML.

        Args:
            overrides: further fields as they are typed on a command line.
            folder: what paths in it are relative to; by default, the file's own.
        Raises:
            ConfigError: with the file's name, if it cannot be read or a field is unknown or impossible.
        """
        import yaml

        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            changes = {name: yaml.safe_load(text) for name, text in (overrides or {}).items()}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no table of settings")
        try:
            return cls.from_dict({**values, **changes}, folder or path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: Path = Path()) -> "Recipe":
        """Read a recipe; every field is used or refused.

        Args:
            folder: what paths are relative to.
        Raises:
            ConfigError: naming the field.
        """
        known = {entry.name: entry for entry in fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"{shorten(unknown)} is not a field of a recipe; there are {', '.join(known)}")
        if "model" not in values:
            raise ConfigError("model is missing: a name like 270M, or a table of widths")
        read: dict[str, Any] = {"model": _model(values["model"])}
        for name, value in values.items():
            if name == "data":
                read[name] = tuple(_source(entry, folder) for entry in (value if isinstance(value, list) else [value]))
            elif name != "model":
                read[name] = _typed(name, value, known[name].default)
        if read.get("tokenizer") and (folder / read["tokenizer"]).exists():
            read["tokenizer"] = str(folder / read["tokenizer"])
        return cls(**read)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as YAML and JSON can hold it; `from_dict` reads it back equal."""
        return {**asdict(self), "model": self.model.to_dict(), "data": [asdict(source) for source in self.data]}

    def with_vocabulary(self, size: int) -> "Recipe":
        """The recipe for a model of as many ids as its tokenizer has."""
        return replace(self, model=replace(self.model, vocab_size=size))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Fields in which two recipes, as `to_dict` gives them, would train another model, with both values."""
    free = {"log_every", "validate_every", "validation_rows", "checkpoint_every", "keep_checkpoints", "sample_prompt"}
    free |= {"steps", "micro_batch_size", "recompute_layers", "loss_chunk"}
    names = sorted((set(one) | set(other)) - free)
    return [f"{n}: {one.get(n)!r} and {other.get(n)!r}" for n in names if one.get(n) != other.get(n)]


def _model(value: object) -> OpenELMConfig:
    if isinstance(value, str):
        return OpenELMConfig.preset(value)
    if not isinstance(value, dict):
        raise ConfigError(f"model is {value!r}; a name like 270M or a table of widths is expected")
    if "num_query_heads" in value or "model_type" in value:
        return OpenELMConfig.from_dict(value)
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
        raise ConfigError(f"data: {value!r} is no source; it has {names}") from error
    return replace(source, path=str(folder / source.path))


def _typed(name: str, value: Any, default: Any) -> Any:
    kind = type(default)
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, str):  # YAML takes 1e-6 for a text
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and value is None:
        return ""
    if type(value) is not kind:
        raise ConfigError(f"{name} is {value!r}; {kind.__name__} expected")
    return value
