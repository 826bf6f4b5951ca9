"""What `openelm-mlx doctor` prints of a self-test, and the file that it writes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import typer

from ..files.output import output_file
from .interrupts import INTERRUPTED, uninterrupted
from .streams import console, is_terminal
from .tables import write_text
from .terminal import say, write

if TYPE_CHECKING:
    from ..self_test.report import Report, Row

FILE = Path("openelm-mlx-self-test.json")
_HEADINGS = ("check", "found", "allowed", "status", "seconds")
_WIDTHS = (44, 64, 10, 8, 7)
_FAILED = 1  # exit status


def run_self_test(only: Sequence[str], output: Path, force: bool, as_json: bool) -> None:
    """Run the checks with one of these words in their names, or all; print a table and write the file."""
    from ..self_test.runner import run_checks
    from ..self_test.session import Extent, Session
    from ..self_test.suite import all_checks, selected

    extent = Extent.of_device()
    checks = selected(all_checks(extent), only)
    with output_file(output, overwrite=force) as file:
        table = _Table(silent=as_json)

        def show(report: Report) -> None:
            table.show(report)
            with uninterrupted():
                file.write(report.to_json())  # before each check, because an error of a GPU may end the process

        report = run_checks(checks, Session(extent), show)
        show(report)
    if as_json:
        write(report.to_json(), end="")
    else:
        _print_end(report, output)
    if not report.is_complete:
        say(f"interrupted; {output} contains the {len(report.rows)} checks so far")
        raise typer.Exit(INTERRUPTED)
    if report.has_failed:
        raise typer.Exit(_FAILED)


class _Table:
    """Prints the name of a check when it begins and the rest of its row when it ends.

    In a terminal that is too narrow for a row, what was found has a line of its own. In a still narrower one, all but
    the name has.
    """

    def __init__(self, silent: bool):
        self._silent = silent
        self._done = 0
        self._begun: str | None = None
        width = console().width if is_terminal(sys.stdout) else sys.maxsize
        self._is_narrow = width < _total(_WIDTHS)
        self._is_very_narrow = width < _total([_WIDTHS[0], *_WIDTHS[3:]])
        if not silent:
            self._print(_HEADINGS, 0)

    def show(self, report: Report) -> None:
        """Print what is new in a report."""
        if self._silent:
            return
        for row in report.rows[self._done :]:
            self._print(_cells(row), 1)
            self._done, self._begun = self._done + 1, None
        if report.running != self._begun and report.running is not None:
            self._begun = report.running
            write(report.running if self._is_very_narrow else f"{report.running:<{_WIDTHS[0]}}", end="")
        if report.is_interrupted:
            write("")

    def _print(self, cells: Sequence[str], first: int) -> None:
        """Print the cells of a row from the first one on; numbers at the right."""
        widths: Sequence[int] = _WIDTHS
        name, found, allowed, status, seconds = cells
        if self._is_very_narrow:
            rest = [f"{status} in {seconds} s", found] if first else [status, seconds, found]
            write("" if first else name)
            write_text(f"  {', '.join([*rest, f'allowed: {allowed}'] if allowed and first else rest)}", "  ")
            return
        if self._is_narrow:
            cells, widths = [cells[0], *cells[3:]], [_WIDTHS[0], *_WIDTHS[3:]]
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
        padded[-1] = cells[-1].rjust(widths[-1])
        write(("  " if first else "") + "  ".join(padded[first:]))
        if self._is_narrow:
            text = f"{found}; allowed: {allowed}" if allowed and first else found
            write(fill(text, console().width, initial_indent="  ", subsequent_indent="  "))


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _cells(row: Row) -> tuple[str, ...]:
    outcome = row.outcome
    return row.name, outcome.found, outcome.allowed, outcome.status, f"{row.seconds:.1f}"


def _print_end(report: Report, output: Path) -> None:
    from ..self_test.check import FAILED

    counts = ", ".join(f"{count} {status}" for status, count in sorted(report.counts.items()))
    write(f"\n{counts or 'no checks'} in {sum(row.seconds for row in report.rows):,.0f} s")
    for advice in report.advice:
        write_text(f"* {advice}", "  ")
    failed = [row.name for row in report.rows if row.outcome.status == FAILED]
    if failed:
        write_text(
            f"* what this package computes on this machine may be wrong; please report it. Failed: {', '.join(failed)}",
            "  ",
        )
    write_text(
        f"\n{output} contains all figures and no personal data: versions, chip, memory, and what is above.\n"
        "Please attach it to an issue of the project, also if everything passed."
    )
