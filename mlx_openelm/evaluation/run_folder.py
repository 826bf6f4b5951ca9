"""The folder of an evaluation: scores, from which an interrupted run continues, and results.

scores.jsonl         a score per prompt
results.json         the report
items/TASK.jsonl     how each item was answered
results.csv, table.md
lm-eval/             results and samples in the shape of lm-eval's files
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import EvaluationError, shorten
from ..files.lock import lock_folder
from ..files.output import output_file, write_file
from ..files.paths import exists, is_folder, user_path
from .items import ItemResult
from .lm_eval_files import lm_eval_names, lm_eval_results, lm_eval_samples
from .report import EvaluationReport
from .result_files import ITEMS, RESULTS, read_report, report_files
from .score_file import ScoreFile

SCORES = "scores"
_ENDING = ".jsonl"
_LM_EVAL = "lm-eval"
_OURS = ".openelm-mlx"  # begins the names of locks
_TABLE, _CSV = "table.md", "results.csv"


class RunFolder:
    """The folder of an evaluation, while it runs."""

    def __init__(self, folder: Path, rank: int):
        self.path = folder
        self._rank = rank
        self._start = datetime.now(timezone.utc)

    def scores(self, about: Mapping[str, Any]) -> ScoreFile:
        """The scores that are known, and where this process adds its own.

        Args:
            about: what they depend on; see `ScoreFile`.
        Raises:
            EvaluationError: if they are of another model.
        """
        own = self.path / (SCORES + (f"-{self._rank}" if self._rank else "") + _ENDING)
        others = [path for path in sorted(self.path.glob(f"{SCORES}*{_ENDING}")) if path != own]
        return ScoreFile(own, about, others)

    @contextmanager
    def samples(self, report: EvaluationReport, label: str) -> Iterator["SampleWriter"]:
        """Writes the samples of a task, in the shape of lm-eval's.

        Args:
            report: with results of all tasks that will be evaluated, which may be empty.
            label: of the task in this report.
        """
        if self._rank:
            yield SampleWriter(None)
            return
        path = self.path / _LM_EVAL / lm_eval_names(report, self._start)[label]
        with output_file(path, overwrite=True) as output, output.replaced() as file:
            yield SampleWriter(file)

    def write(self, report: EvaluationReport) -> EvaluationReport:
        """Write the report, and return it together with what the folder held of other tasks.

        Results stay if protocol and limit are the same and their task was not evaluated now.
        """
        if self._rank:
            return report
        names = lm_eval_names(report, self._start)
        seconds = (datetime.now(timezone.utc) - self._start).total_seconds()
        theirs = json.dumps(lm_eval_results(report, self._start, seconds), indent=2) + "\n"
        joined = _joined(read_report(self.path), report) if exists(self.path / RESULTS) else report
        contents = {f"{_LM_EVAL}/{names['']}": theirs, _CSV: joined.to_csv(), _TABLE: joined.to_markdown()}
        for name, content in (*contents.items(), *report_files(joined)):
            write_file(self.path / name, content, overwrite=True)
        return joined


class SampleWriter:
    """Writes the samples of a task to a file, or nowhere."""

    def __init__(self, file: BinaryIO | None):
        self._file = file

    def __call__(self, result: ItemResult) -> ItemResult:
        """Write an item, and return it."""
        if self._file is not None:
            for line in lm_eval_samples([result]):
                self._file.write(line.encode())
        return result


@contextmanager
def open_run(output: str | Path | None, rank: int = 0) -> Iterator[RunFolder | None]:
    """The folder of an evaluation, locked by the first process; `None` without one.

    Raises:
        EvaluationError: if the folder holds anything else.
        OutputError: if it is in use, or cannot be written.
    """
    if output is None:
        yield None
        return
    path = user_path(output)
    check_run_folder(path)
    if rank:
        yield RunFolder(path, rank)
        return
    with lock_folder(path, ITEMS) as folder:
        yield RunFolder(folder.path, rank)


def check_run_folder(path: Path) -> None:
    """Check that an evaluation may write into a folder.

    Raises:
        EvaluationError: if it is a file, or holds anything else than an evaluation.
    """
    if exists(path) and not is_folder(path):
        raise EvaluationError(f"{path} is a file; `output` must be a folder")
    if not exists(path) or any(exists(path / name) for name in (SCORES + _ENDING, RESULTS)):
        return
    others = [entry.name for entry in path.iterdir() if not entry.name.startswith(_OURS)]
    if others:
        raise EvaluationError(
            f"{path} is not the folder of an evaluation, it contains {shorten(sorted(others))}; choose another `output`"
        )


def _joined(before: EvaluationReport, now: EvaluationReport) -> EvaluationReport:
    if (before.protocol, before.limit) != (now.protocol, now.limit):
        return now
    new = {(result.task, result.shots) for result in now.results}
    kept = [result for result in before.results if (result.task, result.shots) not in new]
    groups = {group.task for group in now.groups}
    members = {result.task for result in now.results}
    old = [group for group in before.groups if group.task not in groups and not members & set(group.members)]
    return replace(now, results=(*kept, *now.results), groups=(*old, *now.groups))
