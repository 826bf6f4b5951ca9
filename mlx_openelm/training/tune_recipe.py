"""The recipe of fine-tuning and its settings."""

from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..data.dataset import TOO_LONG, TRAIN_ON, ExampleOptions
from ..errors import ConfigError, quoted
from ..hub import BUILT_IN_MODEL
from ..machine.device import DTYPES
from ..model.adapters import TUNING_METHODS
from ..model.lora import LARGEST_RANK, AdapterConfig
from ..tokenizer.example_format import COLUMNS_EXAMPLE, LARGEST_INDENT, PROMPT_STYLES, ExampleFormat, parse_columns
from .dpo import PREFERENCE_LOSSES
from .recipe import Recipe
from .setting import changed, setting

AUTO = "auto"  # the prompt style follows from the rest
OBJECTIVES = ("cross-entropy", "dpo")
_WITH_DPO = ("dpo", *(f"{method}+dpo" for method in TUNING_METHODS if method != AdapterConfig.method))
RECIPES = Path(__file__).parents[1] / "assets" / "recipes" / "tune"

_DATA = "Model and data"
_ADAPTER = "Method"
_EXAMPLES = "Examples"


@dataclass(frozen=True, kw_only=True)
class TuneRecipe(Recipe):
    """Everything that determines the result of fine-tuning.

    `method` may also be `dpo`, `dora+dpo` or `full+dpo`, which sets `objective` too.

    Raises:
        ConfigError: naming the field, if a value is invalid.
    """

    # The result depends on the contents of the model and the data, which are hashed, not on their location.
    model: str | Path = setting(
        BUILT_IN_MODEL, "Model folder, hub id or built-in model.", _DATA, is_path=True, can_change=True
    )
    tokenizer: str | Path = setting(
        "", "Tokenizer file, folder or hub id; default: the model's.", _DATA, is_path=True, can_change=True
    )
    chat_template: str | Path = setting(
        "",
        "Chat template: openelm (CoreNet's), or a file; default: the model's.",
        _DATA,
        is_path=True,
        can_change=True,
    )
    adapter: str | Path = setting(
        "", "Adapter to start from, such as an earlier run's.", _DATA, is_path=True, can_change=True
    )
    data: str | Path = setting(
        "", "Data file, or folder with train and valid files.", _DATA, is_path=True, can_change=True
    )
    validation: str | float | Path = setting(
        "", "Validation file, or share of the examples to hold out.", _DATA, is_path=True, can_change=True
    )
    test: str | Path = setting(
        "",
        "Test file, measured at the end; without data: measured alone, with the adapter.",
        _DATA,
        is_path=True,
        can_change=True,
    )
    columns: dict[str, str] = setting({}, f"Field names in the data, such as {COLUMNS_EXAMPLE}.", _DATA)
    method: str = setting(
        AdapterConfig.method,
        "lora, dora or full; on preference pairs: dpo (with LoRA), dora+dpo or full+dpo.",
        _ADAPTER,
        choices=TUNING_METHODS,
        shorthands=_WITH_DPO,
    )
    objective: str = setting(
        "cross-entropy", "Training objective, set by the dpo methods.", _ADAPTER, choices=OBJECTIVES
    )
    rank: int = setting(AdapterConfig.rank, "Rank of the adapter.", _ADAPTER, above=0, at_most=LARGEST_RANK)
    alpha: float = setting(AdapterConfig.alpha, "LoRA alpha; the adapter is scaled by alpha / rank.", _ADAPTER, above=0)
    rank_stabilized: bool = setting(
        AdapterConfig.rank_stabilized, "Rank-stabilized LoRA: scale by alpha / sqrt(rank).", _ADAPTER
    )
    dropout: float = setting(AdapterConfig.dropout, "Dropout on the adapter's inputs.", _ADAPTER, at_least=0, below=1)
    targets: tuple[str, ...] = setting(
        AdapterConfig.targets, "Matrices that get an adapter; token_embeddings is also supported.", _ADAPTER
    )
    layers: int = setting(AdapterConfig.layers, "Train only the last N layers; 0: all.", _ADAPTER, at_least=0)
    beta: float = setting(0.01, "DPO beta; larger values stay closer to the reference model.", _ADAPTER, above=0)
    preference_loss: str = setting("sigmoid", "DPO loss.", _ADAPTER, choices=PREFERENCE_LOSSES)
    max_length: int = setting(0, "Maximum tokens per example; 0: the model's context length.", _EXAMPLES, at_least=0)
    max_prompt: int = setting(
        ExampleOptions.max_prompt,
        "Maximum prompt tokens; longer prompts are cut at the start; 0: no limit.",
        _EXAMPLES,
        at_least=0,
    )
    too_long: str = setting(ExampleOptions.too_long, "What to do with longer examples.", _EXAMPLES, choices=TOO_LONG)
    train_on: str = setting(ExampleOptions.train_on, "Tokens that count in the loss.", _EXAMPLES, choices=TRAIN_ON)
    pack: bool = setting(False, "Pack several examples into a row; they do not attend to one another.", _EXAMPLES)
    prompt_style: str = setting(
        AUTO,
        "How prompts are presented: plain, as an instruction, in the chat template, or auto, as the records' format "
        "and a given chat template say.",
        _EXAMPLES,
        choices=(AUTO, *PROMPT_STYLES),
    )
    separator: str = setting(
        ExampleFormat.separator, "Text between prompt and completion; \\n: a new line.", _EXAMPLES, escapes=True
    )
    indent: int = setting(
        ExampleFormat.indent,
        "Spaces to indent the lines of the instruction template; Apple's code uses 16.",
        _EXAMPLES,
        at_least=0,
        at_most=LARGEST_INDENT,
    )
    epochs: float = setting(
        1.0, "Passes over the training data, if no steps are given.", "Optimizer", above=0, can_change=True
    )
    steps: int = changed(
        Recipe, "steps", 0, help="Optimizer steps; 0: determined by the epochs.", above=None, at_least=0
    )
    batch_size: int = changed(Recipe, "batch_size", 4, help="Examples, or pairs, per batch, across all processes.")
    grad_accumulation_steps: int = setting(1, "Batches per optimizer step.", "Optimizer", above=0, at_most=65_536)
    learning_rate: float = changed(Recipe, "learning_rate", 1e-4)
    warmup_steps: int = changed(Recipe, "warmup_steps", 0, help="Warm-up steps; 0: a share of all steps.")
    warmup_share: float = setting(
        0.03, "Warm-up as a share of all steps, if no warm-up steps are given.", "Optimizer", at_least=0, below=1
    )
    beta2: float = changed(Recipe, "beta2", 0.999)
    weight_decay: float = changed(Recipe, "weight_decay", 0.0)
    dtype: str = changed(
        Recipe,
        "dtype",
        "auto",
        help="Type to compute in: auto, float16, bfloat16 or float32. auto: float32 on a CPU, otherwise "
        "the model's, but bfloat16 for float32.",
        choices=("auto", *DTYPES),
    )
    validate_first: bool = changed(Recipe, "validate_first", True)
    validate_every: int = changed(Recipe, "validate_every", 100)
    checkpoint_every: int = changed(Recipe, "checkpoint_every", 100)

    folder: ClassVar[Path] = RECIPES

    def __post_init__(self) -> None:
        asked = self.method
        object.__setattr__(self, "method", self._method_alone(asked))
        if self.method != asked:
            object.__setattr__(self, "objective", "dpo")
        super().__post_init__()
        if self.max_length == 1:
            raise ConfigError("max_length must be at least 2; got 1")
        if self.pack and self.objective == "dpo":
            raise ConfigError("pack and dpo are mutually exclusive: the two answers of a pair are separate rows")

    @staticmethod
    def _method_alone(value: Any) -> Any:
        """A method without the `dpo` that sets the objective too."""
        methods = value.split("+") if isinstance(value, str) else []
        if "dpo" not in methods:
            return value
        methods.remove("dpo")
        return "+".join(methods) or AdapterConfig.method

    @classmethod
    def _read(cls, name: str, value: Any, entry: "Field[Any]") -> Any:
        if name == "method":
            value = cls._method_alone(value)
        if name == "targets":
            names = value.split(",") if isinstance(value, str) else value
            if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
                raise ConfigError(f"targets must be names such as qkv_proj; got {quoted(value)}")
            return tuple(n.strip().split(".")[-1] for n in names)  # mlx-lm writes attn.qkv_proj
        if name == "columns":
            if isinstance(value, str):
                value = parse_columns(value)
            if not isinstance(value, dict):
                raise ConfigError(f"columns must be a mapping such as {COLUMNS_EXAMPLE}; got {quoted(value)}")
            return {str(key).strip(): str(column).strip() for key, column in value.items()}
        if name == "validation" and isinstance(value, float | int) and not isinstance(value, bool):
            return str(value)
        return super()._read(name, value, entry)

    @property
    def warmup(self) -> int:
        """Number of steps until the peak learning rate."""
        return self.warmup_steps or round(self.warmup_share * self.steps)

    @property
    def adapter_config(self) -> AdapterConfig | None:
        """Configuration of the trained adapter; None for full fine-tuning."""
        if self.method == "full":
            return None
        return AdapterConfig(
            self.method, self.rank, self.alpha, self.dropout, self.rank_stabilized, self.targets, self.layers
        )
