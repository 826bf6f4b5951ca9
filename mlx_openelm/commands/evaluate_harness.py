"""`openelm-mlx evaluate --harness`: tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import EvaluationError
from .interrupts import INTERRUPTED
from .terminal import say, write

if TYPE_CHECKING:
    import mlx.core as mx

    from ..evaluation.harness_run import HarnessOptions
    from ..model.openelm import OpenELM
    from ..tokenizer.tokenizer import Tokenizer


def refuse_with_harness(protocol: str, **values: object) -> None:
    """Refuse options that only this package's own tasks have.

    Raises:
        EvaluationError: naming the first one that is set.
    """
    unused = [name for name, value in values.items() if value] + ["protocol"] * (protocol != "current")
    if unused:
        raise EvaluationError(f"`{unused[0]}` does not apply to tasks that lm-eval runs; leave it or `harness` out")


def evaluate_with_harness(
    tasks: Sequence[str],
    folder: Path | None,
    options: HarnessOptions,
    load: Callable[[], tuple[OpenELM, Tokenizer, mx.distributed.Group]],
    output: Path | None,
    *,
    name: str,
    adapter: str | None,
    as_json: bool,
) -> None:
    """Run tasks and print lm-eval's tables, or its results as JSON.

    Args:
        folder: with task files; `None`: lm-eval's own tasks.
        load: loads the model.
        output: the folder for results.
        name, adapter: as typed.
    """
    from ..evaluation.harness_run import HarnessTasks, evaluate_harness, harness_json, harness_notes, harness_table
    from ..evaluation.run import Subject
    from ..evaluation.run_folder import check_run_folder
    from ..files.paths import user_path

    if output is not None:
        check_run_folder(user_path(output))
    if folder is None:
        say("lm-eval reads its list of tasks, which takes a while; with --data DIR it reads only the task files there")
    prepared = HarnessTasks(tasks, folder)
    model, tokenizer, group = load()
    try:
        subject = Subject(model, tokenizer, name, adapter)
        results = evaluate_harness(subject, prepared, options, output=output, group=group)
    except KeyboardInterrupt:
        raise stopped(output) from None
    if group.rank():
        return
    write(harness_json(results) if as_json else harness_table(results), end="" if as_json else "\n")
    for note in harness_notes(results):
        say(f"warning: {note}")
    if output is not None:
        say(f"results are in {output}")


def stopped(output: Path | None) -> typer.Exit:
    """Say that an evaluation was interrupted, and what continues it; the exit."""
    kept = f"; the same command continues it, all scores so far are in {output}" if output else ""
    say(f"interrupted{kept}")
    return typer.Exit(INTERRUPTED)
