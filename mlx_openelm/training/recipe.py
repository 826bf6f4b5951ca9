"""What every way of training has in common: the fields of a recipe, their defaults, and the YAML they are written in.

`PretrainRecipe` and `TuneRecipe` add what is theirs, and defaults of their own.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ConfigError, shorten
from ..machine.device import DTYPES
from .loss import DEFAULT_CHUNK

if TYPE_CHECKING:
    from typing_extensions import Self

_OLD_NAMES = {  # of fields, in recipes and runs that were written until 2026-11-25
    "accumulate": "grad_accumulation_steps",
    "clip": "max_grad_norm",
    "final_learning_rate": "min_lr_ratio",
}
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How parameters are moved: steps, optimizer, precision, and when to look and to save.

    Raises:
        ConfigError: naming the field, if a value is impossible.
    """

    steps: int
    batch_size: int
    learning_rate: float
    min_lr_ratio: float = 0.1  # as a share of the largest
    initial_learning_rate: float = 1e-6
    warmup_steps: int = 0
    schedule: str = "cosine"  # from the largest rate to the final one: "cosine", "linear" or "constant"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices
    max_grad_norm: float = 1.0  # largest norm of the gradient; 0: none
    z_loss: float = 0.0
    dtype: str = "bfloat16"  # to compute in; what is trained and the optimizer are kept in float32
    recompute_layers: bool = False  # gradient checkpointing: less memory, one more forward pass
    loss_chunk: int = DEFAULT_CHUNK  # tokens whose logits stand in memory at once
    seed: int = 0
    log_every: int = 10
    validate_first: bool = False  # before the first step too
    validate_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    early_stop: int = 0  # validations in a row without a better loss that end the run; 0: never
    sample_prompt: str = ""  # continued at each validation

    @property
    def warmup(self) -> int:
        """Steps until the largest learning rate."""
        return self.warmup_steps

    folder: ClassVar[Path]  # of the recipes that come with the package
    # Fields that change how a run is watched, kept and computed, but not what it computes.
    free: ClassVar[frozenset[str]] = frozenset(
        {"log_every", "validate_every", "validate_first", "checkpoint_every", "keep_checkpoints", "sample_prompt"}
        | {"early_stop", "steps", "recompute_layers", "loss_chunk"}
    )
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {"schedule": SCHEDULES}
    _positive: ClassVar[tuple[str, ...]] = (
        *("steps", "batch_size", "learning_rate", "log_every", "validate_every", "checkpoint_every"),
        *("keep_checkpoints", "loss_chunk"),
    )
    _not_negative: ClassVar[tuple[str, ...]] = (
        "warmup_steps",
        "max_grad_norm",
        "z_loss",
        "weight_decay",
        "early_stop",
        "seed",
    )
    _shares: ClassVar[tuple[str, ...]] = ("beta1", "beta2")

    def __post_init__(self) -> None:
        for name in self._positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive; got {getattr(self, name)}")
        for name in self._not_negative:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative; got {getattr(self, name)}")
        for name in self._shares:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")
        for name, known in {"dtype": tuple(DTYPES), **self._choices}.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r} (choose from {', '.join(known)})")

    @classmethod
    def named(cls, name: str) -> Path:
        """The file of a recipe: one that is named, or one that comes with the package, as in `270M`.

        Raises:
            ConfigError: if there is neither.
        """
        path = Path(name)
        if path.exists():
            return path
        packaged = {entry.stem: entry for entry in sorted(cls.folder.glob("*.yaml"))}
        if name not in packaged:
            raise ConfigError(f"{name} does not exist; the recipes of the package are {', '.join(packaged)}")
        return packaged[name]

    @classmethod
    def from_file(cls, path: Path, overrides: Mapping[str, str] | None = None, folder: Path | None = None) -> "Self":
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
            raise ConfigError(f"{path} must contain a table of settings")
        try:
            return cls.from_dict({**_renamed(values), **changes}, folder or path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: Path = Path()) -> "Self":
        """Read a recipe; every field is used or refused.

        Args:
            folder: what paths are relative to.
        Raises:
            ConfigError: naming the field.
        """
        known = {entry.name: entry for entry in fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"unknown recipe field: {shorten(unknown)} (choose from {', '.join(known)})")
        missing = [
            name
            for name, entry in known.items()
            if entry.default is MISSING and entry.default_factory is MISSING and name not in values
        ]
        if missing:
            raise ConfigError(f"{shorten(missing)} is missing")
        return cls(**{name: cls._read(name, value, known[name].default, folder) for name, value in values.items()})

    @classmethod
    def _read(cls, name: str, value: Any, default: Any, folder: Path) -> Any:
        """The value of one field as YAML gives it; kinds of recipes read fields of their own here."""
        return _typed(name, value, default)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as YAML and JSON can hold it; `from_dict` reads it back equal."""
        return asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Fields in which another recipe (of `to_dict`) would train another model: its value -> this one's."""
        own = json.loads(json.dumps(self.to_dict()))
        # A field that an older recipe did not have has its default there.
        defaults = {e.name: e.default for e in fields(self) if e.default is not MISSING}
        other = {**json.loads(json.dumps(defaults)), **_renamed(other)}
        names = sorted((set(own) | set(other)) - self.free)
        return [f"{n} {other.get(n)!r} -> {own.get(n)!r}" for n in names if own.get(n) != other.get(n)]


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a file under the names of today; where it has both, the old one stays and is refused as unknown."""
    return {
        name if _OLD_NAMES.get(name, name) in values else _OLD_NAMES.get(name, name): value
        for name, value in values.items()
    }


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list"}


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
        raise ConfigError(f"{name} must be {_KINDS[kind]}; got {value!r}")
    return value
