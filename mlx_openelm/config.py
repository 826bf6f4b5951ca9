"""What an OpenELM is: `OpenELMConfig`, the four published models, and the dialects that configurations are written in.

Layer-wise scaling (OpenELM paper, arXiv:2404.14619, section 2) gives each layer its own number of heads and its own FFN
width. A configuration says so by two multipliers, from which the widths follow; some files spell the widths out too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import ConfigError, shorten

ACTIVATIONS = ("swish", "gelu", "relu")

# Keys of Hugging Face configurations that cannot change what the network computes.
_IGNORED_KEYS = {
    "_name_or_path": "where a file came from",
    "architectures": "the class of another library",
    "auto_map": "code of another library, which is never run",
    "bos_token": "the tokenizer's",
    "chunk_size_feed_forward": "how another library splits its work",
    "dtype": "each tensor says its own type",
    "eos_token": "the tokenizer's",
    "initializer_range": "only for fresh weights, where CoreNet's own rule holds",
    "license": "a note",
    "openelm_mlx_version": "who wrote it",
    "output_attentions": "what another library returns",
    "output_hidden_states": "what another library returns",
    "pad_token_id": "nothing is padded with it",
    "padding_index": "nothing is padded with it",
    "quantization": "read where weights are",
    "quantization_config": "a copy of `quantization` for other libraries",
    "return_dict": "what another library returns",
    "torch_dtype": "each tensor says its own type",
    "transformers_version": "another library's version",
    "use_cache": "how another library generates",
}

# Keys that matter only if they hold something else than what every OpenELM is.
_ONLY_VALUE = {
    "model_type": "openelm",
    "normalization_layer_name": "rms_norm",
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
}


@dataclass(frozen=True)
class OpenELMConfig:
    """The shape of one OpenELM.

    `num_query_heads`, `num_kv_heads`, `ffn_multipliers` and `ffn_dims` hold one value a layer. Equality is by value,
    and `OpenELMConfig.from_dict(config.to_dict()) == config`.

    Raises:
        ConfigError: if the values contradict one another.
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
    qkv_multipliers: tuple[float, ...] | None = None  # the two ends, where the heads follow from them
    ffn_dim_divisor: int = 256
    ffn_with_glu: bool = True
    activation_fn_name: str = "swish"
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    rope_freq_constant: float = 10000.0
    rope_max_length: int = 4096
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self) -> None:
        for name in ("num_transformer_layers", "model_dim", "head_dim", "vocab_size", "max_context_length"):
            _check_positive(name, getattr(self, name))
        for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers"):
            values = getattr(self, name)
            if len(values) != self.num_transformer_layers:
                raise ConfigError(
                    f"{name} lists {len(values)} layers and num_transformer_layers is {self.num_transformer_layers}"
                )
            for value in values:
                _check_positive(name, value)
        for layer, (queries, keys) in enumerate(zip(self.num_query_heads, self.num_kv_heads, strict=True)):
            if queries % keys:
                raise ConfigError(
                    f"layer {layer} has {queries} query heads, which {keys} key/value heads do not divide"
                )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        if self.activation_fn_name not in ACTIVATIONS:
            raise ConfigError(f"activation_fn_name is {self.activation_fn_name!r}; known are {', '.join(ACTIVATIONS)}")
        for name in ("bos_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ConfigError(f"{name} is {getattr(self, name)} and the vocabulary has {self.vocab_size} entries")

    @cached_property
    def ffn_dims(self) -> tuple[int, ...]:
        """FFN width of each layer."""
        return tuple(make_divisible(m * self.model_dim, self.ffn_dim_divisor) for m in self.ffn_multipliers)

    @cached_property
    def layer_parameters(self) -> tuple[int, ...]:
        """How many numbers each layer holds."""
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
        """How many numbers the model holds, tied ones counted once."""
        embeddings = 1 if self.share_input_output_layers else 2
        return sum(self.layer_parameters) + embeddings * self.vocab_size * self.model_dim + self.model_dim

    @classmethod
    def layerwise(
        cls,
        num_transformer_layers: int,
        model_dim: int,
        head_dim: int,
        qkv_multipliers: Sequence[float] = (0.5, 1.0),
        ffn_multipliers: Sequence[float] = (0.5, 4.0),
        num_gqa_groups: int = 4,
        ffn_dim_divisor: int = 256,
        **rest: Any,
    ) -> "OpenELMConfig":
        """A model whose widths grow from the first layer to the last.

        Args:
            qkv_multipliers: width of the queries over `model_dim` in the first and in the last layer; one value for a
                uniform model.
            ffn_multipliers: FFN width over `model_dim` likewise, or one value a layer.
        Source: layer-wise scaling, OpenELM paper (arXiv:2404.14619), section 2.
        """
        _check_positive("num_transformer_layers", num_transformer_layers)
        _check_positive("num_gqa_groups", num_gqa_groups)
        _check_positive("ffn_dim_divisor", ffn_dim_divisor)
        query_heads = _query_heads(num_transformer_layers, model_dim, head_dim, qkv_multipliers, num_gqa_groups)
        return cls(
            num_transformer_layers=num_transformer_layers,
            model_dim=model_dim,
            head_dim=head_dim,
            num_query_heads=query_heads,
            num_kv_heads=tuple(heads // num_gqa_groups for heads in query_heads),
            ffn_multipliers=_per_layer("ffn_multipliers", ffn_multipliers, num_transformer_layers),
            num_gqa_groups=num_gqa_groups,
            qkv_multipliers=tuple(float(m) for m in qkv_multipliers),
            ffn_dim_divisor=ffn_dim_divisor,
            **rest,
        )

    @classmethod
    def preset(cls, name: str) -> "OpenELMConfig":
        """A published model: `270M`, `450M`, `1.1B` or `3B`, also by a name like `apple/OpenELM-1_1B-Instruct`.

        Raises:
            ConfigError: if there is no such model.
        """
        size = name.split("/")[-1].removesuffix("-Instruct").removeprefix("OpenELM-").replace("_", ".").upper()
        if size not in PRESETS:
            raise ConfigError(f"{name!r} is none of the published models ({', '.join(PRESETS)})")
        return PRESETS[size]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OpenELMConfig":
        """Read the Hugging Face dialect or that of Apple's MLX port.

        Every key is used, ignored by name, or refused.

        Raises:
            ConfigError: naming the key and what is wrong with it.
        """
        if "model_name" in values:
            return _from_model_name(values)
        return _from_hugging_face(values)

    @classmethod
    def from_file(cls, path: Path) -> "OpenELMConfig":
        """Read a `config.json`, or a CoreNet training configuration in YAML.

        Raises:
            ConfigError: if the file cannot be read, or for what `from_dict` raises, with the file's name.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        try:
            values = _corenet_section(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
            if not isinstance(values, dict):
                raise ConfigError("it holds no table of settings")
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The Hugging Face dialect, with per-layer lists and nothing that asks for remote code.

        `ffn_multipliers` is written one value a layer and `num_query_heads`, `num_kv_heads` in full, which is the form
        that stock mlx-lm needs.
        """
        written = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.qkv_multipliers is None:
            del written["qkv_multipliers"]
        return {
            "model_type": _ONLY_VALUE["model_type"],
            "architectures": ["OpenELMForCausalLM"],
            **{name: list(value) if isinstance(value, tuple) else value for name, value in written.items()},
            "normalization_layer_name": _ONLY_VALUE["normalization_layer_name"],
            "tie_word_embeddings": self.share_input_output_layers,
        }


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`: at least one, and one more where rounding lost over a tenth."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} is {value}; it has to be positive")


def _linear(name: str, multipliers: Sequence[float], num_layers: int) -> tuple[float, ...]:
    """One multiplier a layer, linear between the two ends and rounded to two decimals."""
    if len(multipliers) not in (1, 2):
        raise ConfigError(f"{name} has {len(multipliers)} values; one for all layers or two for the ends are possible")
    first, last = multipliers[0], multipliers[-1]
    steps = max(num_layers - 1, 1)
    return tuple(round(first + (last - first) * layer / steps, 2) for layer in range(num_layers))


def _per_layer(name: str, multipliers: Sequence[float], num_layers: int) -> tuple[float, ...]:
    if len(multipliers) == num_layers and num_layers != 2:
        return tuple(float(m) for m in multipliers)
    return _linear(name, multipliers, num_layers)


def _query_heads(
    num_layers: int, model_dim: int, head_dim: int, qkv_multipliers: Sequence[float], num_gqa_groups: int
) -> tuple[int, ...]:
    multipliers = _linear("qkv_multipliers", qkv_multipliers, num_layers)
    return tuple(make_divisible(m * model_dim, head_dim * num_gqa_groups) // head_dim for m in multipliers)


def _from_model_name(values: Mapping[str, Any]) -> OpenELMConfig:
    """The form of Apple's MLX port and of CoreNet: a published model's name, and what was changed about it."""
    known = {"model_name", "vocab_size", "max_context_length", *_IGNORED_KEYS}
    _refuse_unknown(set(values) - known)
    config = OpenELMConfig.preset(_read("model_name", values["model_name"], str))
    changed = {name: _read(name, values[name], int) for name in ("vocab_size", "max_context_length") if name in values}
    return replace(config, **changed)


def _corenet_section(text: str) -> dict[str, Any]:
    """The settings of the language model in a CoreNet training configuration, `model.language_modeling.general_gpt`."""
    import yaml

    try:
        section = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    for key in ("model", "language_modeling", "general_gpt"):
        section = section.get(key) if isinstance(section, dict) else None
    if not isinstance(section, dict) or "model_name" not in section:
        raise ConfigError("model.language_modeling.general_gpt.model_name is missing; is this a CoreNet configuration?")
    return section


def _from_hugging_face(values: Mapping[str, Any]) -> OpenELMConfig:
    for name, only in _ONLY_VALUE.items():
        if name in values and values[name] != only:
            raise ConfigError(f"{name} is {values[name]!r}; an OpenELM has {only!r}")
    read: dict[str, Any] = {}
    for field in fields(OpenELMConfig):
        if values.get(field.name) is not None:
            read[field.name] = _read(field.name, values[field.name], _KINDS[field.name])
    _refuse_unknown({*values} - {*_KINDS, *_IGNORED_KEYS, *_ONLY_VALUE, "tie_word_embeddings"})
    missing = {"num_transformer_layers", "model_dim", "head_dim", "ffn_multipliers"} - set(read)
    if missing:
        raise ConfigError(f"{shorten(sorted(missing))} is missing")
    num_layers = read["num_transformer_layers"]
    _check_positive("num_transformer_layers", num_layers)
    read["ffn_multipliers"] = _per_layer("ffn_multipliers", read["ffn_multipliers"], num_layers)
    _add_heads(read)
    config = OpenELMConfig(**read)
    if values.get("tie_word_embeddings", config.share_input_output_layers) != config.share_input_output_layers:
        raise ConfigError("tie_word_embeddings and share_input_output_layers contradict one another")
    return config


def _add_heads(read: dict[str, Any]) -> None:
    """Heads per layer, from the lists or from the multipliers; where both are given they have to agree."""
    groups = read.get("num_gqa_groups", OpenELMConfig.num_gqa_groups)
    _check_positive("num_gqa_groups", groups)
    if "qkv_multipliers" in read:
        shape = read["num_transformer_layers"], read["model_dim"], read["head_dim"]
        query_heads = _query_heads(*shape, read["qkv_multipliers"], groups)
        if read.setdefault("num_query_heads", query_heads) != query_heads:
            raise ConfigError(f"num_query_heads is not what qkv_multipliers {list(read['qkv_multipliers'])} give")
    if "num_query_heads" not in read:
        raise ConfigError("num_query_heads is missing, and so is qkv_multipliers, from which it would follow")
    read.setdefault("num_kv_heads", tuple(heads // groups for heads in read["num_query_heads"]))


def _refuse_unknown(names: set[str]) -> None:
    if names:
        raise ConfigError(f"{shorten(sorted(names))} is not a known setting, and ignoring it could change the result")


_KINDS: dict[str, Any] = {
    "num_transformer_layers": int,
    "model_dim": int,
    "head_dim": int,
    "num_query_heads": [int],
    "num_kv_heads": [int],
    "ffn_multipliers": [float],
    "vocab_size": int,
    "max_context_length": int,
    "num_gqa_groups": int,
    "qkv_multipliers": [float],
    "ffn_dim_divisor": int,
    "ffn_with_glu": bool,
    "activation_fn_name": str,
    "normalize_qk_projections": bool,
    "share_input_output_layers": bool,
    "rope_freq_constant": float,
    "rope_max_length": int,
    "bos_token_id": int,
    "eos_token_id": int,
}


def _read(name: str, value: Any, kind: Any) -> Any:
    """`value` as the kind of its key: a list kind takes one number for a list of one; floats take integers."""
    if isinstance(kind, list):
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple(_read(name, entry, kind[0]) for entry in entries)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} is {value!r}; {kind.__name__} expected")
    return value


PRESETS = {
    "270M": OpenELMConfig.layerwise(num_transformer_layers=16, model_dim=1280, head_dim=64),
    "450M": OpenELMConfig.layerwise(num_transformer_layers=20, model_dim=1536, head_dim=64),
    "1.1B": OpenELMConfig.layerwise(num_transformer_layers=28, model_dim=2048, head_dim=64),
    "3B": OpenELMConfig.layerwise(num_transformer_layers=36, model_dim=3072, head_dim=128),
}
