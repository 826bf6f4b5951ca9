"""Objects from JSON and YAML files: limits for all values, and fields that are read with their types."""

from collections.abc import Collection
from typing import Any, TypeVar

from ..errors import OpenELMError, quoted

DEEPEST = 64  # levels of nesting
LARGEST_NUMBER = 1e38  # of numbers in files; what float32 can hold
_LARGEST_COUNT = 2**63 - 1
_REQUIRED: Any = ...  # the default of a field that must be there

_T = TypeVar("_T")


class Fields(dict[str, Any]):
    """An object of a file, whose fields are read one by one with type and range.

    Each reader takes a `default` for a field that is missing or null; without one (`...`), the field is required.

    Attributes:
        where: what messages begin with, such as the file's name.
        error: class of the errors.
    """

    def __init__(self, values: dict[str, Any], where: str, error: type[OpenELMError]):
        super().__init__(values)
        self.where = where
        self.error = error

    def text(self, name: str, default: Any = _REQUIRED, choices: Collection[str] = ()) -> Any:
        """A string, one of `choices` if there are any."""
        value = self._typed(name, str, "text", default)
        if choices and name in self and value not in choices:
            raise self.error(f"{self.where}: unknown {name} {quoted(value)} (choose from {', '.join(choices)})")
        return value

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or false."""
        return self._typed(name, bool, "true or false", default)

    def whole(self, name: str, default: Any = _REQUIRED, at_least: int = 0, at_most: int = _LARGEST_COUNT) -> Any:
        """An integer within limits."""
        value = self._typed(name, int, "a whole number", default)
        return self._within(name, value, at_least, at_most)

    def number(
        self, name: str, default: Any = _REQUIRED, at_least: float = -LARGEST_NUMBER, at_most: float = LARGEST_NUMBER
    ) -> Any:
        """A finite float within limits, which the file may write as an integer."""
        value = self.get(name)
        if type(value) is int:
            value = self._within(name, value, at_least, at_most)
            return float(value)
        value = self._typed(name, float, "a number", default)
        return self._within(name, value, at_least, at_most)

    def table(self, name: str) -> "Fields":
        """An object; an empty one, if the field is missing or null."""
        value = self._typed(name, dict, "an object", {})
        return Fields(value, f"{self.where}: {name}", self.error)

    def list_of(self, name: str, kind: type[_T], default: Any = _REQUIRED) -> Any:
        """A list with entries of one type."""
        value = self._typed(name, list, "a list", default)
        if value is not default and not all(type(entry) is kind for entry in value):
            raise self.error(f"{self.where}: {name} must be a list of {kind.__name__}; got {quoted(value)}")
        return value

    def _typed(self, name: str, kind: type, expected: str, default: Any) -> Any:
        value = self.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if value is None and name not in self:
            raise self.error(f"{self.where}: {name} is missing")
        if not isinstance(value, kind) or (kind is int and type(value) is bool):
            raise self.error(f"{self.where}: {name} must be {expected}; got {quoted(value)}")
        return value

    def _within(self, name: str, value: Any, at_least: float, at_most: float) -> Any:
        if isinstance(value, int | float) and not at_least <= value <= at_most:
            limits = f"from {at_least:,} to {at_most:,}"
            raise self.error(f"{self.where}: {name} must be a number {limits}; got {quoted(value)}")
        return value


def check_values(values: Any, where: str, error: type[OpenELMError]) -> Any:
    """Check the limits of everything that was read from a file, and return it.

    Raises:
        OpenELMError: as `error`, naming the field, for a number that is not finite or beyond `LARGEST_NUMBER`, a lone
            surrogate, a name that is not text, or nesting deeper than `DEEPEST`.
    """
    found = _problem(values, DEEPEST)
    if found is not None:
        names, problem = found
        field = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).lstrip(".")
        raise error(f"{where}: {_shortened(field)} {problem}" if field else f"{where} {problem}")
    return values


def _problem(value: Any, levels: int) -> tuple[tuple[str | int, ...], str] | None:
    """The names that lead to the first value beyond the limits, and what is wrong with it."""
    if isinstance(value, str):
        return None if _is_unicode(value) else ((), "contains a lone surrogate")
    if isinstance(value, int | float):
        return None if abs(value) <= LARGEST_NUMBER else ((), "must be a finite number of at most 1e38")
    if not isinstance(value, dict | list):
        return None
    if levels == 0:
        return (), f"has more than {DEEPEST} levels of nesting"
    for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict) and not (isinstance(name, str) and _is_unicode(name)):
            return (), f"has a name that is not text: {quoted(name)}"
        found = _problem(entry, levels - 1)
        if found is not None:
            return (name, *found[0]), found[1]
    return None


def _shortened(field: str) -> str:
    return field if len(field) <= 60 else f"{field[:25]}...{field[-25:]}"


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode(errors="surrogateescape")  # names of files may hold bytes that are not UTF-8
    except UnicodeEncodeError:
        return False
    return True
