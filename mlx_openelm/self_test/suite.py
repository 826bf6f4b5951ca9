"""All checks, in the order in which they run: what is cheap and fundamental first, large networks last."""

from collections.abc import Sequence

from ..errors import ConfigError
from . import decoding, fused, logits, memory, open_choices, quantized, speed, training
from .check import Check
from .session import Extent


def all_checks(extent: Extent) -> list[Check]:
    """The checks of a whole self-test."""
    return [
        *logits.checks(),
        *fused.checks(),
        *decoding.checks(),
        *open_choices.equality_checks(),
        *quantized.checks(),
        *training.checks(),
        *memory.checks(),
        *open_choices.speed_checks(extent.compared_sizes, extent.contexts),
        *speed.checks(extent.sizes),
    ]


def selected(checks: list[Check], words: Sequence[str]) -> list[Check]:
    """The checks with one of these words in their name; all checks without words.

    Raises:
        ConfigError: if a word is in no name.
    """
    for word in words:
        if not any(word in check.name for check in checks):
            names = ", ".join(check.name for check in checks)
            raise ConfigError(f"`only`: no check has {word!r} in its name (choose from {names})")
    return [check for check in checks if not words or any(word in check.name for word in words)]
