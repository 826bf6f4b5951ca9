"""`OpenELMConfig`, the shape of an OpenELM, and the four published sizes (`conversion/read/config.py` reads files).

Layer-wise scaling (OpenELM paper, arXiv:2404.14619, section 2) gives each layer its own number of heads and its own FFN
width. Both follow from multipliers for the first and the last layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from .errors import ConfigError, quoted

ACTIVATIONS = ("swish", "gelu", "relu")

# Properties of every OpenELM, by the key of a Hugging Face configuration that could set another value.
FIXED_SETTINGS = {
    "model_type": "openelm",
    "normalization_layer_name": "rms_norm",
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
}


# Widths over model_dim in the first and the last layer of the published models.
QKV_MULTIPLIERS = (0.5, 1.0)
FFN_MULTIPLIERS = (0.5, 4.0)


_LARGEST = {  # far beyond any model, so that a damaged file is refused before anything is allocated
    "num_transformer_layers": 10_000,
    "model_dim": 1 << 20,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_context_length": 1 << 30,
    "num_gqa_groups": 1 << 16,
    "ffn_dim_divisor": 1 << 20,
    "rope_max_length": 1 << 30,
    "num_query_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "qkv_multipliers": 10_000,
    "ffn_multipliers": 10_000,
}
_SIZES = (
    *("num_transformer_layers", "model_dim", "head_dim", "vocab_size", "max_context_length"),
    *("num_gqa_groups", "ffn_dim_divisor", "rope_max_length"),
)
_LARGEST_ROPE_BASE = 1e15
_LARGEST_WIDTH = 1 << 30  # of a matrix; MLX counts in 32 bits


@dataclass(frozen=True)
class OpenELMConfig:
    """The shape of one OpenELM.

    `num_query_heads`, `num_kv_heads`, `ffn_multipliers` and `ffn_dims` have one value per layer. Configurations compare
    by value, and `config_from_dict(config.to_dict()) == config`.

    Raises:
        ConfigError: if a value is invalid or the values contradict one another.
    """

    num_transformer_layers: int
    model_dim: int
    head_dim: int
    num_query_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    ffn_multipliers: tuple[float, ...]
    vocab_size: int = 32000
    max_context_length: int = 2048
    num_gqa_groups: int = 4
    qkv_multipliers: tuple[float, ...] | None = None  # first and last layer, if the heads follow from them
    ffn_dim_divisor: int = 256
    ffn_with_glu: bool = True
    activation_fn_name: str = "swish"
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    rope_freq_constant: float = 10000.0
    rope_max_length: int = 4096
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2  # each of several ends a text

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_token_id", _one_or_several(self.eos_token_id))
        for name in _SIZES:
            check_size(name, getattr(self, name))
        if not 1 < self.rope_freq_constant <= _LARGEST_ROPE_BASE:
            base = quoted(self.rope_freq_constant)
            raise ConfigError(f"rope_freq_constant must be above 1 and at most {_LARGEST_ROPE_BASE:g}; got {base}")
        for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers"):
            values = getattr(self, name)
            if len(values) != self.num_transformer_layers:
                raise ConfigError(
                    f"{name} has {len(values)} values, but num_transformer_layers is {self.num_transformer_layers}"
                )
            for value in values:
                check_size(name, value)
        for layer, (queries, keys) in enumerate(zip(self.num_query_heads, self.num_kv_heads, strict=True)):
            if queries % keys:
                raise ConfigError(
                    f"layer {layer} has {queries} query heads, which is not a multiple of its {keys} key-value heads"
                )
        heads = zip(self.num_query_heads, self.num_kv_heads, strict=True)
        widths = ((queries + 2 * keys) * self.head_dim for queries, keys in heads)
        for layer, (width, ffn_dim) in enumerate(zip(widths, self.ffn_dims, strict=True)):
            if max(width, 2 * ffn_dim) > _LARGEST_WIDTH:
                raise ConfigError(
                    f"layer {layer} is {max(width, ffn_dim):,} wide; at most {_LARGEST_WIDTH:,} is possible"
                )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary position embeddings; got {self.head_dim}")
        if self.activation_fn_name not in ACTIVATIONS:
            raise ConfigError(
                f"unknown activation_fn_name {quoted(self.activation_fn_name)} (choose from {', '.join(ACTIVATIONS)})"
            )
        for name, tokens in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for token in tokens:
                if not 0 <= token < self.vocab_size:
                    raise ConfigError(f"{name} is {quoted(token)}, but the vocabulary has {self.vocab_size} entries")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, at least one."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def with_eos(self, *tokens: int, only: bool = False) -> "OpenELMConfig":
        """The configuration with more ids that end a text; if `only` is true, with these alone."""
        return replace(self, eos_token_id=(*(() if only else self.eos_token_ids), *tokens))

    @cached_property
    def ffn_dims(self) -> tuple[int, ...]:
        """FFN width of each layer."""
        return tuple(make_divisible(m * self.model_dim, self.ffn_dim_divisor) for m in self.ffn_multipliers)

    @cached_property
    def layer_parameters(self) -> tuple[int, ...]:
        """Number of parameters of each layer."""
        qk_norms = 2 * self.head_dim if self.normalize_qk_projections else 0
        matrices = 3 if self.ffn_with_glu else 2
        return tuple(
            self.model_dim * (2 * queries + 2 * keys) * self.head_dim
            + self.model_dim * matrices * ffn_dim
            + 2 * self.model_dim
            + qk_norms
            for queries, keys, ffn_dim in zip(self.num_query_heads, self.num_kv_heads, self.ffn_dims, strict=True)
        )

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the model; tied ones count once."""
        embeddings = 1 if self.share_input_output_layers else 2
        return sum(self.layer_parameters) + embeddings * self.vocab_size * self.model_dim + self.model_dim

    @classmethod
    def layerwise(
        cls,
        num_transformer_layers: int,
        model_dim: int,
        head_dim: int,
        qkv_multipliers: Sequence[float] = QKV_MULTIPLIERS,
        ffn_multipliers: Sequence[float] = FFN_MULTIPLIERS,
        num_gqa_groups: int = num_gqa_groups,
        ffn_dim_divisor: int = ffn_dim_divisor,
        **rest: Any,
    ) -> "OpenELMConfig":
        """A model whose widths grow from the first layer to the last.

        Args:
            qkv_multipliers: width of the queries divided by `model_dim`, in the first and in the last layer; one value
                for a uniform model.
            ffn_multipliers: FFN width divided by `model_dim`, in the first and in the last layer; one value for a
                uniform model, or one per layer.
            rest: other fields of `OpenELMConfig`.
        Raises:
            ConfigError: if a value is invalid.
        Source: layer-wise scaling, OpenELM paper (arXiv:2404.14619), section 2.
        """
        check_size("num_transformer_layers", num_transformer_layers)
        check_size("ffn_dim_divisor", ffn_dim_divisor)
        heads_per_layer = query_heads(num_transformer_layers, model_dim, head_dim, qkv_multipliers, num_gqa_groups)
        return cls(
            num_transformer_layers=num_transformer_layers,
            model_dim=model_dim,
            head_dim=head_dim,
            num_query_heads=heads_per_layer,
            num_kv_heads=tuple(heads // num_gqa_groups for heads in heads_per_layer),
            ffn_multipliers=per_layer("ffn_multipliers", ffn_multipliers, num_transformer_layers),
            num_gqa_groups=num_gqa_groups,
            qkv_multipliers=tuple(float(m) for m in qkv_multipliers),
            ffn_dim_divisor=ffn_dim_divisor,
            **rest,
        )

    @classmethod
    def preset(cls, name: str) -> "OpenELMConfig":
        """A published model: `270M`, `450M`, `1.1B`, `3B`, or a full name like `apple/OpenELM-1_1B-Instruct`.

        Raises:
            ConfigError: if there is no such model.
        """
        size = name.split("/")[-1].removesuffix("-Instruct").removeprefix("OpenELM-").replace("_", ".").upper()
        if size not in PRESETS:
            raise ConfigError(f"{quoted(name)} is not a published model (choose from {', '.join(PRESETS)})")
        return PRESETS[size]

    def to_dict(self) -> dict[str, Any]:
        """The configuration in Hugging Face format, without keys that need remote code.

        `config_from_dict` turns it into an equal configuration, also after a round trip through JSON.
        `ffn_multipliers`, `num_query_heads` and `num_kv_heads` are lists with one value per layer, as stock mlx-lm
        requires.
        """
        written = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.qkv_multipliers is None:
            del written["qkv_multipliers"]
        return {
            "model_type": FIXED_SETTINGS["model_type"],
            "architectures": ["OpenELMForCausalLM"],
            **{name: list(value) if isinstance(value, tuple) else value for name, value in written.items()},
            "normalization_layer_name": FIXED_SETTINGS["normalization_layer_name"],
            "tie_word_embeddings": self.share_input_output_layers,
        }


def _one_or_several(tokens: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """Ids without repetition, in their order; a single one as a number."""
    if not isinstance(tokens, tuple | list):
        return tokens
    if not tokens:
        raise ConfigError("eos_token_id is an empty list")
    several = tuple(dict.fromkeys(tokens))
    return several if len(several) > 1 else several[0]


def make_divisible(value: float, divisor: int) -> int:
    """Round to the nearest multiple of `divisor`, at least one; to the next higher one if that loses over a tenth."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def check_size(name: str, value: float) -> None:
    """Refuse a number that is not positive, not finite, or far beyond any model.

    Raises:
        ConfigError: naming it.
    """
    if not value > 0:
        raise ConfigError(f"{name} must be positive; got {quoted(value)}")
    if not value <= _LARGEST[name]:
        raise ConfigError(f"{name} must be at most {_LARGEST[name]:,}; got {quoted(value)}")


def per_layer(name: str, multipliers: Sequence[float], num_layers: int) -> tuple[float, ...]:
    """One multiplier per layer, from one for all, two for the first and the last layer, or one per layer.

    Raises:
        ConfigError: if there is any other number of multipliers.
    """
    if len(multipliers) == num_layers and num_layers != 2:
        return tuple(float(m) for m in multipliers)
    return _linear(name, multipliers, num_layers)


def query_heads(
    num_layers: int, model_dim: int, head_dim: int, qkv_multipliers: Sequence[float], num_gqa_groups: int
) -> tuple[int, ...]:
    """Query heads of each layer: `model_dim` times the multiplier, rounded to whole groups of heads.

    Raises:
        ConfigError: if there are not one or two multipliers.
    """
    sizes = {"num_transformer_layers": num_layers, "model_dim": model_dim, "head_dim": head_dim}
    for name, size in {**sizes, "num_gqa_groups": num_gqa_groups}.items():
        check_size(name, size)
    multipliers = _linear("qkv_multipliers", qkv_multipliers, num_layers)
    return tuple(make_divisible(m * model_dim, head_dim * num_gqa_groups) // head_dim for m in multipliers)


def _linear(name: str, multipliers: Sequence[float], num_layers: int) -> tuple[float, ...]:
    """One multiplier per layer, interpolated linearly from first to last and rounded to two decimals."""
    if len(multipliers) not in (1, 2):
        raise ConfigError(
            f"{name} has {len(multipliers)} values; expected one for all layers, or two for the first and last layer"
        )
    for value in multipliers:
        check_size(name, value)
    first, last = multipliers[0], multipliers[-1]
    steps = max(num_layers - 1, 1)
    return tuple(round(first + (last - first) * layer / steps, 2) for layer in range(num_layers))


PRESETS = {
    "270M": OpenELMConfig.layerwise(num_transformer_layers=16, model_dim=1280, head_dim=64),
    "450M": OpenELMConfig.layerwise(num_transformer_layers=20, model_dim=1536, head_dim=64),
    "1.1B": OpenELMConfig.layerwise(num_transformer_layers=28, model_dim=2048, head_dim=64),
    "3B": OpenELMConfig.layerwise(num_transformer_layers=36, model_dim=3072, head_dim=128),
}
