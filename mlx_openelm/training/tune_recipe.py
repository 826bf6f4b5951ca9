"""How a model is fine-tuned: the fields of the recipe and their defaults."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ConfigError
from ..hub import BUILT_IN_MODEL
from ..machine.device import DTYPES
from ..model.adapters import METHODS
from ..model.lora import LINEAR_TARGETS, AdapterConfig
from .dpo import PREFERENCE_LOSSES
from .recipe import Recipe

OBJECTIVES = ("likelihood", "dpo")
RECIPES = Path(__file__).parents[1] / "assets" / "recipes" / "tune"


@dataclass(frozen=True, kw_only=True)
class TuneRecipe(Recipe):
    """Everything that decides what fine-tuning computes.

    Raises:
        ConfigError: naming the field, if a value is impossible.
    """

    model: str = BUILT_IN_MODEL  # folder, hub id or built-in model
    data: str = ""  # file, or folder with files called train, valid and test
    tokenizer: str = ""  # file, folder or hub id; by default the model's own
    method: str = "lora"
    objective: str = "likelihood"  # or "dpo", of pairs of answers
    rank: int = 8
    alpha: float = 16.0  # alpha / rank is what the adapter's product is multiplied by
    dropout: float = 0.0  # of the adapter's input
    rank_stabilised: bool = False  # alpha / sqrt(rank) instead
    targets: tuple[str, ...] = LINEAR_TARGETS
    layers: int = 0  # that many from the end on; 0: all
    epochs: float = 1.0
    steps: int = 0  # 0: as many as the epochs have
    batch_size: int = 4  # rows, or pairs, that all processes compute at once
    grad_accumulation_steps: int = 1  # such batches in a step
    max_length: int = 0  # tokens of an example; 0: the model's context
    max_prompt: int = 0  # tokens before the answer, of which the last ones are kept; 0: all
    too_long: str = "cut"  # or "drop"
    train_on: str = "completion"  # the loss of answers; "all": of every token
    pack: bool = False  # several examples in a row, which do not see one another
    indent: int = 0  # of instructions; Apple's own code has 16 spaces there
    columns: dict[str, str] = field(default_factory=dict)  # field of an example: its name in the data
    validation: str = ""  # file, or share of the training examples; by default what the folder holds
    beta: float = 0.01  # of dpo: how far a preference may go
    preference_loss: str = "sigmoid"  # or "hinge"
    learning_rate: float = 1e-4
    warmup_steps: int = 0  # 0: `warmup_share` of all
    warmup_share: float = 0.03
    beta2: float = 0.999
    weight_decay: float = 0.0
    dtype: str = "auto"  # float32 on the CPU, elsewhere the model's own
    validate_first: bool = True
    validate_every: int = 100
    checkpoint_every: int = 100

    folder: ClassVar[Path] = RECIPES
    # What the model and the examples are is told by their fingerprints, wherever they lie.
    free: ClassVar[frozenset[str]] = Recipe.free | {"epochs", "data", "validation", "model", "tokenizer"}
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        **Recipe._choices,
        "dtype": ("auto", *DTYPES),
        "method": METHODS,
        "objective": OBJECTIVES,
        "too_long": ("cut", "drop"),
        "train_on": ("completion", "all"),
        "preference_loss": PREFERENCE_LOSSES,
    }
    _positive: ClassVar[tuple[str, ...]] = (
        *(name for name in Recipe._positive if name != "steps"),
        *("rank", "grad_accumulation_steps", "epochs", "beta", "alpha"),
    )
    _not_negative: ClassVar[tuple[str, ...]] = (
        *Recipe._not_negative,
        *("steps", "layers", "max_length", "max_prompt", "indent"),
    )
    _shares: ClassVar[tuple[str, ...]] = (*Recipe._shares, "dropout", "warmup_share")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length == 1:
            raise ConfigError("max_length must be at least 2; got 1")
        if self.pack and self.objective == "dpo":
            raise ConfigError("pack and dpo are mutually exclusive: the two answers of a pair are separate rows")

    @classmethod
    def _read(cls, name: str, value: Any, default: Any, folder: Path) -> Any:
        if name == "targets":
            names = value.split(",") if isinstance(value, str) else value
            if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
                raise ConfigError(f"targets must be names such as qkv_proj; got {value!r}")
            return tuple(n.strip().split(".")[-1] for n in names)  # mlx-lm says attn.qkv_proj
        if name == "columns":
            if isinstance(value, str) and "=" in value:
                value = dict(pair.split("=", 1) for pair in value.split(",") if "=" in pair)
            if not isinstance(value, dict):
                raise ConfigError("columns must be a table such as prompt=question,completion=answer")
            return {str(key).strip(): str(column).strip() for key, column in value.items()}
        if name == "validation" and isinstance(value, float | int):
            return str(value)
        if name in ("data", "model", "tokenizer", "validation") and value and (folder / str(value)).exists():
            return str(folder / value)
        return super()._read(name, value, default, folder)

    @property
    def warmup(self) -> int:
        """Steps until the largest learning rate."""
        return self.warmup_steps or round(self.warmup_share * self.steps)

    @property
    def adapter(self) -> AdapterConfig | None:
        """The adapter that is trained, if it is one."""
        if self.method == "full":
            return None
        return AdapterConfig(
            self.method, self.rank, self.alpha, self.dropout, self.rank_stabilised, self.targets, self.layers
        )
