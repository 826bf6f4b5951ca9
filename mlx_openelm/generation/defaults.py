"""How a model wants its text sampled, as its `generation_config.json` says."""

from pathlib import Path
from typing import Any

from ..errors import ConfigError, SamplingError, quoted
from ..files.json_file import read_json_object
from .sampling import SamplingConfig

_FILE = "generation_config.json"
_SAMPLED = ("temperature", "top_p", "top_k", "min_p")  # count only where `do_sample` is true, as in transformers


def given_sampling(**fields: Any) -> dict[str, Any]:
    """Those of the fields of a `SamplingConfig` that are not `None`, checked before there is a model.

    Raises:
        SamplingError: if one is out of range.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    SamplingConfig(**given)
    return given


def sampling_of(folder: Path, **given: Any) -> SamplingConfig:
    """The sampling for a model folder: what is given and not `None`, else what the folder's file says.

    Without `do_sample`, only the file's `repetition_penalty` counts.

    Args:
        given: fields of `SamplingConfig`.
    Raises:
        SamplingError: if a given value is out of range.
        ConfigError: if a value in the file is.
    """
    chosen = given_sampling(**given)
    path = folder / _FILE
    written = read_json_object(path, ConfigError, optional=True)
    names = ("repetition_penalty", *(_SAMPLED if written.get("do_sample") is True else ()))
    wanted = {name: written[name] for name in names if written.get(name) is not None}
    for name, value in wanted.items():
        if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else int | float):
            raise ConfigError(f"{path}: {name} must be a number; got {quoted(value)}")
    if written.get("do_sample") is True:
        wanted.setdefault("temperature", 1.0)
    try:
        SamplingConfig(**wanted)
    except SamplingError as error:
        raise ConfigError(f"{path}: {error}") from error
    return SamplingConfig(**{**wanted, **chosen})
