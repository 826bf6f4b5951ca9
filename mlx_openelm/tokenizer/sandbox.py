"""Jinja templates from files: they run no code, and what they write and how long they take is limited.

Jinja is imported on first use. Every function raises Jinja's own errors, or what a template's expressions raise.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from types import FrameType

    from jinja2 import Environment, Template

LARGEST_TEXT = 1 << 24  # characters of a rendered text
_LARGEST_RANGE = 100_000  # numbers that one rendering may loop over
_LONGEST_SECONDS = 5  # of one rendering, which takes a few thousandths
_GROWING = ("center", "ljust", "rjust", "zfill", "replace", "expandtabs", "format", "format_map", "join")
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)")  # a field of 10,000 characters or more
_WIDE_FIELD = re.compile(r"\{[^{}]*(\d{5}|\{)")  # the same for `format`


def new_sandbox(**options: Any) -> Environment:
    """An environment whose templates reach nothing but the values that they are given.

    Args:
        options: those of Jinja's environments, such as `trim_blocks`.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "+", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [_size(value) for value in (left, right)]
            is_long = operator == "*" and sizes[0] * sizes[1] > LARGEST_TEXT
            is_long |= operator == "+" and sum(sizes) > LARGEST_TEXT
            is_long |= operator == "%" and isinstance(left, str) and _WIDE.search(left) is not None
            if operator == "**" or is_long:
                refuse("the result would be too large")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, /, *args: Any, **named: Any) -> Any:
            owner = getattr(function, "__self__", None)
            if isinstance(owner, str | bytes) and getattr(function, "__name__", "") in _GROWING:
                _check_growth(owner, args)
            return super().call(context, function, *args, **named)

        def wrap_str_format(self, value: Any) -> Any:
            wrapper = super().wrap_str_format(value)
            return None if wrapper is None else _limited(wrapper, value.__self__)

    environment = Sandbox(**options)
    for name in ("center", "indent", "wordwrap", "replace"):
        environment.filters[name] = _limited(environment.filters[name])
    environment.globals.pop("lipsum", None)
    environment.globals["raise_exception"] = refuse
    return environment


def compiled(environment: Environment, text: str) -> Callable[[Mapping[str, Any]], str]:
    """A function that renders a template many times: its names are in one dict, which Jinja copies for each rendering.

    The time of a template without statements is not limited, because what it does ends with its text.
    """
    template = environment.from_string(text)
    template.globals = dict(template.globals)
    has_statements = environment.block_start_string in text
    return lambda values: render(template, values, is_limited=has_statements)


def compiled_expression(environment: Environment, text: str) -> Callable[[Mapping[str, Any]], Any]:
    """A function that computes an expression from values by name; it raises an error for a name that has none."""
    expression: Any = environment.compile_expression(text, undefined_to_none=False)
    expression._template.globals = dict(expression._template.globals)

    def compute(values: Mapping[str, Any]) -> Any:
        found = expression(values)
        if isinstance(found, environment.undefined):
            str(found)  # raises the error that says which name is undefined
        return found

    return compute


def render(template: Template, values: Mapping[str, Any], *, is_limited: bool = True) -> str:
    """The text of a template; `is_limited`: in a limited time, which takes some time to watch."""
    parts: list[str] = []
    size = 0
    with _limited_time() if is_limited else nullcontext():
        for part in template.generate({"range": _limited_range(), **values}):
            parts.append(part)
            size += len(part)
            if size > LARGEST_TEXT:
                refuse(f"it writes more than {LARGEST_TEXT:,} characters")
    return "".join(parts)


@contextmanager
def _limited_time() -> Iterator[None]:
    """Within this context, code of templates is stopped after a few seconds."""
    before = sys.gettrace()
    deadline = time.monotonic() + _LONGEST_SECONDS

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > deadline:
            refuse(f"it takes longer than {_LONGEST_SECONDS} seconds")
        return watch if frame.f_code.co_filename == "<template>" else None

    try:
        sys.settrace(watch)
        yield
    finally:
        sys.settrace(before)


def refuse(message: str) -> NoReturn:
    """Stop the rendering with an error; templates call it as `raise_exception`."""
    from jinja2 import TemplateError

    raise TemplateError(message)


def _size(value: Any) -> int:
    """How large a value of a template is: the length of a text or list, otherwise a number's own size."""
    if isinstance(value, str | bytes | list | tuple):
        return len(value)
    return abs(value) if isinstance(value, int) else 1


def _check_growth(text: str | bytes, args: Iterable[Any]) -> None:
    """Refuse to fill a text up, or to replace parts of it, beyond the limit."""
    factors = [_size(value) for value in args if isinstance(value, int | str | bytes)]
    if max(len(text), 1) * max([*factors, 1]) > LARGEST_TEXT or _WIDE_FIELD.search(str(text)):
        refuse("the result would be too large")


def _limited(function: Any, *before: Any) -> Any:
    """A function that may fill a text up, with a limit; the text is the first of `before` and its arguments."""

    def limited(*args: Any, **named: Any) -> Any:
        values = (*before, *args, *named.values())
        text, *others = [value for value in values if isinstance(value, str | int)] or [""]
        _check_growth(str(text), others)
        return function(*args, **named)

    return update_wrapper(limited, function)


def _limited_range() -> Any:
    left = _LARGEST_RANGE

    def limited(*bounds: int) -> range:
        nonlocal left
        numbers = range(*bounds)
        left -= len(numbers)
        if left < 0:
            refuse(f"it loops over more than {_LARGEST_RANGE:,} numbers")
        return numbers

    return limited
