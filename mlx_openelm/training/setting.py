"""What a recipe says about each of its fields: help, limits and type."""

import math
import os
from dataclasses import Field, dataclass, field, replace
from typing import Any

from ..errors import ConfigError, quoted

_LARGEST = 2**31 - 1
_TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list"}


@dataclass(frozen=True)
class Setting:
    """Metadata of a recipe field, besides its type and default.

    Attributes:
        help: one sentence, for `--help`.
        group: heading under which `--help` shows it.
        choices: allowed values; empty: any.
        shorthands: further allowed values, which also set other fields.
        at_least, above, below, at_most: limits of a number; every number has an upper one.
        is_path: whether relative paths in a recipe file are relative to the file's folder.
        can_change: whether a run may be resumed with another value, because the result stays the same.
        escapes: whether the option understands escapes such as \\n, which a shell passes on as they are typed.
    """

    help: str
    group: str
    choices: tuple[str, ...] = ()
    shorthands: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float = _LARGEST
    is_path: bool = False
    can_change: bool = False
    escapes: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError if a value is not allowed."""
        if self.choices and value not in self.choices:
            named = ", ".join((*self.choices, *self.shorthands))
            raise ConfigError(f"unknown {name} {quoted(value)} (choose from {named})")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be finite; got {quoted(value)}")
        too_small = self.at_least is not None and value < self.at_least
        if self.at_least is not None and self.below is not None and (too_small or value >= self.below):
            raise ConfigError(f"{name} must be at least {self.at_least} and below {self.below}; got {quoted(value)}")
        if too_small:
            raise ConfigError(
                f"{name} must not be negative; got {quoted(value)}"
                if self.at_least == 0
                else f"{name} must be at least {self.at_least}; got {quoted(value)}"
            )
        if isinstance(value, int | float) and value > self.at_most:
            raise ConfigError(f"{name} must be at most {self.at_most:,}; got {quoted(value)}")
        if self.above is not None and not value > self.above:
            raise ConfigError(
                f"{name} must be positive; got {quoted(value)}"
                if self.above == 0
                else f"{name} must be above {self.above}; got {quoted(value)}"
            )


def setting(default: Any, help: str, group: str, **details: Any) -> Any:
    """A recipe field; `details` are further attributes of `Setting`. A dict default is copied for each recipe."""
    metadata = {"setting": Setting(help, group, **details)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def changed(recipe: Any, name: str, default: Any, **details: Any) -> Any:
    """A field of another recipe with a new default; `details` replace attributes of its `Setting`."""
    inherited = setting_of(recipe.__dataclass_fields__[name])
    return field(default=default, metadata={"setting": replace(inherited, **details)})


def setting_of(entry: "Field[Any]") -> Setting:
    """The `Setting` of a recipe field."""
    found: Setting = entry.metadata["setting"]
    return found


def typed(name: str, value: Any, kind: type) -> Any:
    """The value of a field as its type; the numbers of a YAML file may be text.

    Raises:
        ConfigError: if it has another type.
    """
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):  # YAML reads 1e-6 as text
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if kind is str and value is None:
        return ""
    if kind is str and isinstance(value, os.PathLike):
        return str(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} must be {_TYPES[kind]}; got {quoted(value)}")
    return value
