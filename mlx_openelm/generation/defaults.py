"""How a model wants its text sampled, as its `generation_config.json` says."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SamplingError, quoted
from ..model.openelm import OpenELM
from .sampling import SamplingConfig

_SAMPLED = ("temperature", "top_p", "top_k", "min_p")  # count only where `do_sample` is true, as in transformers


def given_sampling(**fields: Any) -> dict[str, Any]:
    """Those of the fields of a `SamplingConfig` that are not `None`, checked before there is a model.

    Raises:
        SamplingError: if one is out of range.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    SamplingConfig(**given)
    return given


def sampling_of(written: Mapping[str, Any], where: str | Path) -> SamplingConfig:
    """The sampling that a model asks for. Without `do_sample`, only its `repetition_penalty` counts.

    Args:
        written: what its `generation_config.json` says of it, as in `Source.sampling`.
        where: that file, for messages.
    Raises:
        ConfigError: if a value is not a number or out of range.
    """
    names = ("repetition_penalty", *(_SAMPLED if written.get("do_sample") is True else ()))
    wanted = {key: written[key] for key in names if written.get(key) is not None}
    for key, value in wanted.items():
        if isinstance(value, bool) or not isinstance(value, int if key == "top_k" else int | float):
            raise ConfigError(f"{where}: {key} must be a number; got {quoted(value)}")
    if written.get("do_sample") is True:
        wanted.setdefault("temperature", 1.0)
    try:
        return SamplingConfig(**wanted)
    except SamplingError as error:
        raise ConfigError(f"{where}: {error}") from error


def default_sampling(model: OpenELM, **given: Any) -> SamplingConfig:
    """The sampling that a model asks for, or greedy decoding, with the given fields of `SamplingConfig` changed."""
    return replace(model.sampling or SamplingConfig(), **given)
