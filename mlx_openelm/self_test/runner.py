"""Runs checks one after the other, whatever they raise."""

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from ..errors import MemoryLimitError, one_line
from .check import FAILED, SKIPPED, Check, Outcome, Skip
from .report import Report, Row, about_machine
from .session import Session

_PACKAGE = Path(__file__).parents[1]
_DEEPEST = 12  # frames of an error that are kept


def run_checks(
    checks: Sequence[Check],
    session: Session,
    on_report: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run all checks. A check that raises counts as failed, and the next one still runs.

    Args:
        on_report: called before each check with what is known so far.

    Returns:
        The report, also after Ctrl-C.
    """
    machine = about_machine(session.diagnosis)
    rows: list[Row] = []
    running: str | None = None
    try:
        for check in checks:
            running = check.name
            on_report(Report(tuple(rows), machine, running))
            started = time.perf_counter()
            outcome = _outcome(check, session)
            rows.append(Row(check.name, outcome, time.perf_counter() - started))
            mx.clear_cache()
    except KeyboardInterrupt:
        return Report(tuple(rows), machine, running, is_interrupted=True)
    return Report(tuple(rows), machine)


def _outcome(check: Check, session: Session) -> Outcome:
    if check.is_optional and session.seconds_left <= 0:
        return Outcome(SKIPPED, f"the time of {session.extent.seconds:,.0f} s is used up")
    try:
        return check.run(session)
    except (Skip, MemoryLimitError) as reason:
        return Outcome(SKIPPED, one_line(reason))
    except Exception as error:  # the next check may still tell something
        return Outcome(FAILED, f"{type(error).__name__}: {one_line(error)}", figures={"at": _places(error)})


def _places(error: BaseException) -> list[str]:
    """Where in this package an error came from, such as "cache/layouts.py:41 in write"."""
    return [
        f"{Path(frame.filename).relative_to(_PACKAGE)}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_PACKAGE)
    ][-_DEEPEST:]
