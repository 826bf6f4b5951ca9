"""Checks and their outcomes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .session import Session

Numbers = mx.array | np.ndarray
PASSED, FAILED, SKIPPED, MEASURED = "passed", "failed", "skipped", "measured"


@dataclass(frozen=True)
class Outcome:
    """What a check found."""

    status: str  # passed, failed, skipped, or measured: figures that nothing can be compared with
    found: str  # on one line
    allowed: str = ""  # the tolerance
    figures: Mapping[str, Any] = field(default_factory=dict)  # for JSON
    advice: str = ""  # what the user can do about it


@dataclass(frozen=True)
class Check:
    """A check by name. It may raise any exception, and `Skip` where it does not apply."""

    name: str
    run: Callable[[Session], Outcome]
    is_optional: bool = False  # whether it is skipped once the time is used up


class Skip(Exception):
    """A check does not apply to this machine; the text says why."""


@dataclass(frozen=True)
class Comparison:
    """The difference of two results, as a share of the largest expected value, and what rounding may explain."""

    what: str
    difference: float  # infinite if a value is not finite
    allowed: float

    @classmethod
    def of(
        cls, what: str, found: mx.array | np.ndarray, expected: mx.array | np.ndarray, allowed: float
    ) -> "Comparison":
        """Compare two arrays of one shape.

        Raises:
            ValueError: if their shapes differ, or there is nothing to compare with.
        """
        one, other = as_numpy(found), as_numpy(expected)
        if one.shape != other.shape:
            raise ValueError(f"{what}: found the shape {one.shape}, expected {other.shape}")
        scale = float(np.abs(other).max())
        if not 0 < scale < np.inf:
            raise ValueError(f"{what}: the largest expected value is {scale}")
        difference = float(np.abs(one - other).max()) / scale
        return cls(what, difference if np.isfinite(difference) else float("inf"), allowed)

    @property
    def share(self) -> float:
        """The difference as a share of what is allowed; above 1 is too much."""
        return self.difference / self.allowed


def as_numpy(array: Numbers) -> np.ndarray:
    """An array of any type as float32 on the host."""
    return np.array(array.astype(mx.float32) if isinstance(array, mx.array) else array, np.float32)


def judged(comparisons: Sequence[Comparison], advice: str = "") -> Outcome:
    """Passed if no difference is too large; names the worst one.

    Args:
        advice: for a failure.
    """
    worst = max(comparisons, key=lambda one: one.share)
    passed = worst.share <= 1
    return Outcome(
        PASSED if passed else FAILED,
        f"differs by {worst.difference:.1e} ({worst.what})",
        f"{worst.allowed:.1e}",
        {"differences": {one.what: {"found": one.difference, "allowed": one.allowed} for one in comparisons}},
        "" if passed else advice,
    )
