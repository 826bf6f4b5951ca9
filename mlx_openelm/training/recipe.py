"""Recipes: the settings of a training run, each with its default, limits and help text, and the YAML reader.

`PretrainRecipe` and `TuneRecipe` add their own settings. The options of `pretrain` and `tune` are generated from them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ConfigError, quoted, shorten
from ..files.paths import exists, user_path
from ..files.yaml_file import read_yaml_object
from ..machine.device import DTYPES
from ..runs import newest_state
from .loss import DEFAULT_CHUNK
from .setting import setting, setting_of, typed

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEDULES = ("cosine", "linear", "constant")
_OLD_NAMES = {  # of fields, in recipes and runs written until 2026-11-25
    "accumulate": "grad_accumulation_steps",
    "clip": "max_grad_norm",
    "final_learning_rate": "min_lr_ratio",
    "recompute_layers": "gradient_checkpointing",
    "rank_stabilised": "rank_stabilized",
}
_OF_A_MODEL = {"model_type", "num_transformer_layers", "model_dim", "model_name"}
_LARGEST_BATCH = 65_536
_OLD_VALUES = {("objective", "likelihood"): "cross-entropy"}


_OPTIMIZER = "Optimizer"
_COMPUTE = "Compute"
_RUN = "Validation and checkpoints"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of every training run: steps, optimizer, precision, validation and checkpoints.

    Raises:
        ConfigError: naming the field, if a value is invalid.
    """

    steps: int = setting(MISSING, "Optimizer steps.", _OPTIMIZER, above=0, can_change=True)
    batch_size: int = setting(
        MISSING, "Rows per optimizer step, over all processes.", _OPTIMIZER, above=0, at_most=_LARGEST_BATCH
    )
    learning_rate: float = setting(MISSING, "Peak learning rate.", _OPTIMIZER, above=0)
    min_lr_ratio: float = setting(0.1, "Final learning rate, as a share of the peak.", _OPTIMIZER, at_least=0)
    initial_learning_rate: float = setting(1e-6, "Learning rate at the start of warm-up.", _OPTIMIZER, at_least=0)
    warmup_steps: int = setting(0, "Warm-up steps.", _OPTIMIZER, at_least=0)
    schedule: str = setting("cosine", "Learning rate after warm-up.", _OPTIMIZER, choices=SCHEDULES)
    decay_steps: int = setting(
        0,
        "Steps at the end over which a constant rate falls to the final one; can be set when a run is resumed.",
        _OPTIMIZER,
        at_least=0,
        can_change=True,
    )
    beta1: float = setting(0.9, "AdamW beta1.", _OPTIMIZER, at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW beta2.", _OPTIMIZER, at_least=0, below=1)
    eps: float = setting(1e-8, "AdamW epsilon.", _OPTIMIZER, at_least=0)
    weight_decay: float = setting(0.1, "Weight decay, on matrices only.", _OPTIMIZER, at_least=0)
    max_grad_norm: float = setting(1.0, "Gradient norm to clip at; 0: no clipping.", _OPTIMIZER, at_least=0)
    z_loss: float = setting(0.0, "Weight of the z-loss; 0: none.", _OPTIMIZER, at_least=0)
    dtype: str = setting(
        "bfloat16",
        "Type to compute in: float16, bfloat16 or float32. Trained weights and optimizer state stay in float32.",
        _COMPUTE,
        choices=tuple(DTYPES),
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute layers in the backward pass: less memory, more time.", _COMPUTE, can_change=True
    )
    loss_chunk: int = setting(
        DEFAULT_CHUNK,
        "Compute the loss in chunks of N tokens to limit the memory of logits.",
        _COMPUTE,
        above=0,
        can_change=True,
    )
    seed: int = setting(0, "Random seed.", _COMPUTE, at_least=0, at_most=2**63 - 1)
    log_every: int = setting(10, "Steps between logged metrics.", _RUN, above=0, can_change=True)
    validate_first: bool = setting(False, "Validate before the first step too.", _RUN, can_change=True)
    validate_every: int = setting(1000, "Steps between validations.", _RUN, above=0, can_change=True)
    checkpoint_every: int = setting(1000, "Steps between checkpoints.", _RUN, above=0, can_change=True)
    keep_checkpoints: int = setting(3, "Checkpoints to keep, besides the best one.", _RUN, above=0, can_change=True)
    early_stop: int = setting(
        0, "Stop after N validations without improvement; 0: never.", _RUN, at_least=0, can_change=True
    )
    # These can change, because a run compares what is evaluated itself; see `CheckpointMetric.fingerprint`.
    evaluate: tuple[str, ...] = setting(
        (),
        "Tasks to evaluate during training; the best checkpoint is the most accurate one, not that of the lowest loss.",
        _RUN,
        can_change=True,
    )
    evaluate_data: str | Path = setting(
        "", "Folder with TASK/test.jsonl of these tasks; default: the hub's.", _RUN, is_path=True, can_change=True
    )
    evaluate_limit: int = setting(
        0, "Evaluate the first N items of each task; 0: all.", _RUN, at_least=0, can_change=True
    )
    evaluate_every: int = setting(
        0, "Steps between evaluations; 0: with each validation.", _RUN, at_least=0, can_change=True
    )
    sample_prompt: str = setting("", "Text to continue at each validation.", _RUN, can_change=True)

    folder: ClassVar[Path]  # of the packaged recipes

    @property
    def warmup(self) -> int:
        """Number of steps until the peak learning rate."""
        return self.warmup_steps

    def __post_init__(self) -> None:
        for entry in fields(self):
            given = getattr(self, entry.name)
            object.__setattr__(self, entry.name, self._checked(entry, given))
        if self.decay_steps and self.schedule != "constant":
            raise ConfigError(f"decay_steps needs the constant schedule; got {self.schedule}")
        for name in ("evaluate_data", "evaluate_limit"):
            if getattr(self, name) and not self.evaluate:
                raise ConfigError(f"{name} is for the tasks to evaluate; name them with `evaluate`")

    @classmethod
    def _checked(cls, entry: "Field[Any]", given: Any) -> Any:
        """The value of one field, read and checked on its own."""
        if setting_of(entry).is_path and isinstance(given, str) and given.startswith("~"):
            given = os.path.expanduser(given)
        value = cls._read(entry.name, given, entry)
        setting_of(entry).check(entry.name, value)
        return value

    @classmethod
    def named(cls, name: str | Path) -> Path:
        """The path of a recipe: an existing file, or a packaged recipe such as `270M`.

        Raises:
            ConfigError: if neither exists.
        """
        path = user_path(name)
        if exists(path):
            return path
        packaged = {entry.stem: entry for entry in sorted(cls.folder.glob("*.yaml"))}
        if str(name) not in packaged:
            raise ConfigError(f"{name} does not exist; the packaged recipes are {', '.join(packaged)}")
        return packaged[str(name)]

    @classmethod
    def from_file(
        cls, path: str | Path, overrides: Mapping[str, Any] | None = None, folder: str | Path | None = None
    ) -> "Self":
        """Read a recipe from a YAML file.

        Args:
            path: a file, or the name of a packaged recipe; see `named`.
            overrides: fields that replace those of the file; paths in them are relative to the current folder.
            folder: base of the relative paths in the file; by default, the file's folder, or the current one for a
                packaged recipe.
        Raises:
            ConfigError: naming the file, if it cannot be read, or a field is unknown or invalid.
        """
        path = cls.named(path)
        base = Path() if path.parent == cls.folder else path.parent  # nobody's data is in this package
        found = read_yaml_object(path, ConfigError)
        for entry in fields(cls):
            if overrides is not None and entry.name in overrides:
                cls._checked(entry, overrides[entry.name])  # such a mistake is not the file's
        try:
            values = cls._expanded(found)
            cls._check_names(values)
            return cls.from_dict(
                {**cls._placed(values, user_path(folder or base)), **cls._expanded(overrides or {}, old=False)}
            )
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """Read a recipe from a mapping such as `to_dict` returns; unknown fields are an error.

        Raises:
            ConfigError: naming the field.
        """
        values = cls._expanded(values, old=False)
        cls._check_names(values)
        missing = [
            entry.name
            for entry in fields(cls)
            if entry.default is MISSING and entry.default_factory is MISSING and entry.name not in values
        ]
        if missing:
            raise ConfigError(f"{shorten(missing)} is missing")
        return cls(**values)

    @classmethod
    def of_run(cls, run: Path, overrides: Mapping[str, Any] | None = None) -> "Self":
        """The recipe of a run, to continue it from any current folder.

        Args:
            overrides: fields that replace those of the run; paths in them are relative to the current folder.
        Raises:
            TrainingError: if there is no run to continue.
            ConfigError: if its recipe is of another kind, or a value is invalid.
        """
        state = newest_state(run)
        values = cls._expanded(state.table("recipe"))
        if set(values) - {entry.name for entry in fields(cls)}:
            kind = "pretrain" if "sequence_length" in values else "tune"
            raise ConfigError(f"{run} is a run of `{kind}`, which continues it")
        base = os.path.relpath(os.path.join(os.path.realpath(run), state["folder"])) if state.get("folder") else "."
        return cls.from_dict({**cls._placed(values, Path(base)), **cls._expanded(overrides or {}, old=False)})

    @classmethod
    def _check_names(cls, values: Mapping[str, Any]) -> None:
        known = [entry.name for entry in fields(cls)]
        if not (unknown := sorted(set(map(str, values)) - set(known))):
            return
        if _OF_A_MODEL & set(unknown):
            raise ConfigError("this is the configuration of a model, not a recipe; pass it as `model`")
        from difflib import get_close_matches

        close = [match[0] for name in unknown if (match := get_close_matches(name, known, 1))]
        hint = f"did you mean {shorten(close)}?" if close else f"choose from {', '.join(known)}"
        raise ConfigError(f"unknown recipe field: {shorten(unknown)} ({hint})")

    @classmethod
    def _expanded(cls, values: Mapping[str, Any], *, old: bool = True) -> dict[str, Any]:
        """Values with shorthands expanded and, if `old`, the field names of earlier versions replaced."""
        values = _renamed(values) if old else dict(values)
        if "epochs" in values and "steps" not in values:
            values["steps"] = 0  # otherwise a file's steps would override the command line's epochs
        return values

    @classmethod
    def _placed(cls, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Values of a recipe file; its relative paths are resolved where that leads to an existing file."""
        placed = dict(values)
        for name in (entry.name for entry in fields(cls) if setting_of(entry).is_path):
            value = values.get(name)
            if isinstance(value, str) and value and os.path.exists(path := folder / os.path.expanduser(value)):
                placed[name] = str(path)
        if tasks := values.get("evaluate"):
            placed["evaluate"] = [_placed_task(task, folder) for task in _tasks(tasks)]
        return placed

    @classmethod
    def _read(cls, name: str, value: Any, entry: "Field[Any]") -> Any:
        """The value of one field, converted to its type; recipes override this for fields with a special notation."""
        if name == "evaluate":
            return _tasks(value)
        return typed(name, value, type(entry.default))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a dict for YAML and JSON; `from_dict` restores an equal recipe."""
        return asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Fields whose value in another recipe (from `to_dict`) changes the result: "name other -> this one"."""
        own = json.loads(json.dumps(self.to_dict()))
        # Fields that an older recipe does not have get their defaults.
        defaults = {e.name: e.default for e in fields(self) if e.default is not MISSING}
        other = {**json.loads(json.dumps(defaults)), **self._expanded(other)}
        can_change = {entry.name for entry in fields(self) if setting_of(entry).can_change}
        names = sorted((set(own) | set(other)) - can_change)
        return [f"{n} {quoted(other.get(n))} -> {quoted(own.get(n))}" for n in names if own.get(n) != other.get(n)]


def _tasks(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | os.PathLike) for name in names):
        raise ConfigError(f"evaluate must be names of tasks such as arc_easy; got {quoted(value)}")
    return tuple(name for entry in names if (name := str(entry).strip()))


def _placed_task(name: str, folder: Path) -> str:
    """A task's name; the path of a task file starts at this folder where that leads to an existing file."""
    path = folder / os.path.expanduser(name)
    return str(path) if name.endswith((".yaml", ".yml")) and os.path.exists(path) else name


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under their current field names; if a file has both names, the old one stays, an unknown field."""
    named = {
        name if _OLD_NAMES.get(name, name) in values else _OLD_NAMES.get(name, name): value
        for name, value in values.items()
    }
    return {
        name: _OLD_VALUES.get((name, value), value) if isinstance(value, str) else value
        for name, value in named.items()
    }
