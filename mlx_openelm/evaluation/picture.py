"""The picture of an evaluation."""

from pathlib import Path

from ..files.output import OutputFile, output_file
from ..plot import Accuracy, check_picture, plot_accuracies
from .report import EvaluationReport
from .table import TaskRow


def save_picture(report: EvaluationReport, path: str | Path, *, overwrite: bool = False) -> None:
    """Draw the accuracy of each task with its standard error, its published figure and its majority class.

    Args:
        path: file to write; its suffix selects the format.
    Raises:
        OutputError: if the file exists and may not be replaced, or cannot be written.
        MissingPackageError: if matplotlib is not installed.
    """
    check_picture(Path(path))
    with output_file(path, overwrite=overwrite) as picture:
        draw_picture(report, picture)


def draw_picture(report: EvaluationReport, picture: OutputFile) -> None:
    """The same into a file that is claimed already."""
    rows, published = report.rows(), report.published_averages()
    twice = len({row.result.task for row in rows}) < len(rows)
    bars = [_bar(row, twice) for row in rows]
    for name, average in report.averages().items():
        error = None if average.stderr is None else 100 * average.stderr
        bars.append(Accuracy(name + " (!)" * bool(average.doubtful), 100 * average.value, error, published.get(name)))
    adapter = [f"adapter {Path(report.adapter).name}"] if report.adapter else []
    limit = [] if report.limit is None else [f"the first {report.limit:,} items"]
    about = [*adapter, report.dtype, f"protocol {report.protocol}", *limit]
    plot_accuracies(f"{Path(report.model).name}\n{', '.join(about)}", bars, picture)


def _bar(row: TaskRow, with_shots: bool) -> Accuracy:
    result = row.result
    shots = f", {result.shots}\N{NO-BREAK SPACE}shots" if with_shots else ""
    parts = [problem.replace(" ", "\N{NO-BREAK SPACE}") for problem in result.problems]
    problems = f" ({', '.join(parts)})" if parts else ""
    return Accuracy(
        f"{result.task}{shots}, {result.metric}{problems}",
        100 * result.main.value,
        None if result.main.stderr is None else 100 * result.main.stderr,
        None if row.published is None else row.published.percent,
        None if result.majority is None else 100 * result.majority,
    )
