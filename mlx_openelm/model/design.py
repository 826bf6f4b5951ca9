"""Designing a model: depth and widths for a parameter budget, and a uniform model of the same size for comparison.

Layer-wise scaling (OpenELM paper, arXiv:2404.14619, section 2) moves parameters from the first layers to the last. The
uniform model has the same depth, width and total attention, and an FFN width that matches the number of parameters: the
two models differ only in where their parameters are.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..cache.config import kv_bytes_per_layer, kv_cache_bytes
from ..config import FFN_MULTIPLIERS, QKV_MULTIPLIERS, OpenELMConfig, make_divisible
from ..errors import ConfigError

_ASPECT = 79  # model_dim over depth: 73 to 85 in the four published models
_PRECISION = 20  # weight of a relative error in the budget, compared with one in the aspect ratio
_DEPTHS = (*range(2, 16), *range(16, 101, 4))  # layers; the published models have multiples of 4
_VOCABULARIES = ((20_000_000, 4096), (100_000_000, 16_384))  # below so many parameters; Llama's beyond
_UNIFORM_DIVISOR = 8  # of the uniform FFN width; fine enough to match the number of parameters


@dataclass(frozen=True)
class Design:
    """A layer-wise scaled model, and the uniform model of the same size."""

    layerwise: OpenELMConfig
    uniform: OpenELMConfig

    def to_dict(self) -> dict[str, Any]:
        """Both configurations with figures for each layer, for JSON."""
        return {"layerwise": _figures(self.layerwise), "uniform": _figures(self.uniform)}


def parse_count(text: str) -> int:
    """Parse `1.1B`, `270M`, `40k` or a plain number.

    Raises:
        ConfigError: if the text is none of these, or the number is not positive.
    """
    found = re.fullmatch(r"(\d+(?:[._]\d+)*)\s*([kKmMbBgG]?)", text.strip())
    if not found:
        raise ConfigError(f"not a number of parameters: {text!r} (examples: 1.1B, 270M, 5000000)")
    number = found[1].replace("_", "")
    try:
        count = round(float(number) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}[found[2].lower()])
    except ValueError:
        raise ConfigError(f"not a number of parameters: {text!r} (examples: 1.1B, 270M, 5000000)") from None
    if count < 1:
        raise ConfigError(f"the number of parameters must be positive; got {text!r}")
    return count


def parse_multipliers(name: str, text: str) -> tuple[float, ...]:
    """Parse `0.5:1.0`, for the first and the last layer, or one number for all.

    Raises:
        ConfigError: if the text is neither, or a number is not between 0 and 1,000.
    """
    try:
        values = tuple(float(part) for part in text.split(":"))
    except ValueError:
        values = ()
    if len(values) not in (1, 2) or not all(0 < value < 1000 for value in values):
        raise ConfigError(f"{name} must be the values of the first and the last layer, such as 0.5:1.0; got {text!r}")
    return values


def usual_vocabulary(num_parameters: int) -> int:
    """A vocabulary size that leaves a model of this size most of its parameters for layers."""
    return next((size for limit, size in _VOCABULARIES if num_parameters < limit), OpenELMConfig.vocab_size)


def design(config: OpenELMConfig) -> Design:
    """Pair a configuration with its uniform counterpart."""
    return Design(config, uniform_counterpart(config))


def fit(
    num_parameters: int,
    *,
    qkv_multipliers: Sequence[float] = QKV_MULTIPLIERS,
    ffn_multipliers: Sequence[float] = FFN_MULTIPLIERS,
    head_dim: int | None = None,
    num_gqa_groups: int = OpenELMConfig.num_gqa_groups,
    **rest: Any,
) -> OpenELMConfig:
    """The model with about this number of parameters that comes closest to the proportions of the published models.

    Args:
        head_dim: by default 32 below a width of 512, 64 up to 2,048 and 128 beyond.
        rest: other fields of the configuration, such as `vocab_size`.
    Raises:
        ConfigError: if no model comes within 25 % of the number.
    """

    def candidate(depth: int, width: int) -> OpenELMConfig:
        return OpenELMConfig.layerwise(
            depth,
            width,
            head_dim or _head_dim(width),
            qkv_multipliers,
            ffn_multipliers,
            num_gqa_groups,
            256 if width >= 1024 else 64,
            **rest,
        )

    found = []
    for depth in _DEPTHS:
        for width in _widths(head_dim, num_gqa_groups):
            config = candidate(depth, width)
            found.append(config)
            if config.num_parameters > num_parameters:
                break
    best = min(found, key=lambda config: _penalty(config, num_parameters))
    if _distance(best, num_parameters) > 0.25:
        raise ConfigError(
            f"no model has about {num_parameters:,} parameters with a vocabulary of {best.vocab_size:,}; the nearest "
            f"has {best.num_parameters:,}; try another vocabulary size"
        )
    return best


def uniform_counterpart(config: OpenELMConfig) -> OpenELMConfig:
    """The model of equal layers with the same depth, width, total attention and number of parameters."""
    groups = config.num_gqa_groups
    mean_heads = sum(config.num_query_heads) / config.num_transformer_layers
    heads = max(groups, round(mean_heads / groups) * groups)

    def with_ffn(ffn_dim: int) -> OpenELMConfig:
        layers = config.num_transformer_layers
        return replace(
            config,
            num_query_heads=(heads,) * layers,
            num_kv_heads=(heads // groups,) * layers,
            qkv_multipliers=None,
            ffn_multipliers=(ffn_dim / config.model_dim,) * layers,
            ffn_dim_divisor=_UNIFORM_DIVISOR,
        )

    # The number of parameters is linear in the FFN width.
    one, two = (with_ffn(_UNIFORM_DIVISOR * count).num_parameters for count in (1, 2))
    wanted = 1 + (config.num_parameters - one) / (two - one)
    return with_ffn(max(_UNIFORM_DIVISOR, make_divisible(wanted * _UNIFORM_DIVISOR, _UNIFORM_DIVISOR)))


def _figures(config: OpenELMConfig) -> dict[str, Any]:
    columns = {
        "query_heads": config.num_query_heads,
        "kv_heads": config.num_kv_heads,
        "ffn_dim": config.ffn_dims,
        "parameters": config.layer_parameters,
        "kv_bytes_per_token": kv_bytes_per_layer(config),
    }
    layers = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {
        "config": config.to_dict(),
        "layers": layers,
        "parameters": config.num_parameters,
        "kv_bytes_per_token": kv_cache_bytes(config, 1),
    }


def _head_dim(width: int) -> int:
    return 32 if width < 512 else 64 if width <= 2048 else 128


def _widths(head_dim: int | None, num_gqa_groups: int) -> Iterator[int]:
    """Widths that are multiples of a group of heads, in ascending order."""
    width = 0
    while width < 16384:
        width += num_gqa_groups * (head_dim or _head_dim(width + 1))
        yield width


def _distance(config: OpenELMConfig, num_parameters: int) -> float:
    return abs(config.num_parameters / num_parameters - 1)


def _penalty(config: OpenELMConfig, num_parameters: int) -> float:
    """How far a model is from the budget and from the usual aspect ratio."""
    aspect = config.model_dim / config.num_transformer_layers
    return abs(math.log(aspect / _ASPECT)) + _PRECISION * _distance(config, num_parameters)
