"""`openelm-mlx evaluate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..hub import BUILT_IN_MODEL
from .options import Adapter, Dtype, Force, Json, Model, NeededTokenizer, Revision, examples
from .streams import is_terminal
from .tables import write_table, write_text
from .terminal import counting_bars, print_json, say, write

if TYPE_CHECKING:
    import mlx.core as mx

    from ..evaluation.report import EvaluationReport
    from ..evaluation.run import EvaluationCallback, PreparedTask
    from ..evaluation.table import ResultTable
    from ..model.openelm import OpenELM
    from ..tokenizer.tokenizer import Tokenizer

EXAMPLES = examples(
    "openelm-mlx evaluate -m OpenELM-270M --tasks zero-shot --protocol paper --output 270M-zero-shot",
    "openelm-mlx evaluate -m OpenELM-270M --tasks arc_easy,piqa --data tasks --limit 100",
    "openelm-mlx evaluate -m OpenELM-270M-4bit --tasks zero-shot --output 4bit --compare 270M-zero-shot",
    "openelm-mlx evaluate -m OpenELM-270M --adapter lora --tasks commonsense --data dataset --output lora-run",
    "openelm-mlx evaluate -m OpenELM-270M --harness --tasks lambada_openai,wikitext --output 270M-others",
)


def evaluate(
    context: typer.Context,
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            "-t",
            help="Tasks, groups (mmlu), suites (zero-shot, openllm, llm360, commonsense) or task files; repeatable.",
            metavar="NAME,...",
        ),
    ],
    model: Model = BUILT_IN_MODEL,
    adapter: Adapter = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with TASK/test.json, .jsonl or .parquet; default: the hub's.", metavar="DIR"),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="Prompts of lm-eval today, or of the paper: current or paper.", metavar="P")
    ] = "current",
    shots: Annotated[
        int | None, typer.Option(help="Solved examples before each question; default: the task's.", metavar="N")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate the first N items of each task.", metavar="N")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for results; a run that was killed continues.", metavar="RUN"),
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="Compare with this run, item by item.", metavar="RUN")] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw the results: .png, .svg or .pdf.", metavar="FILE")
    ] = None,
    harness: Annotated[
        bool,
        typer.Option("--harness", help="Run tasks of lm-eval, of any kind; --data: folder of its task files."),
    ] = False,
    use_chat: Annotated[
        bool, typer.Option("--chat", help="With --harness: put prompts into the chat template.")
    ] = False,
    force: Force = False,
    emulate_bfloat16: Annotated[
        bool,
        typer.Option("--emulate-bf16", help="Also round scores as they were when the models were published."),
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens the model reads; default: its context.", metavar="N")
    ] = None,
    max_truncated: Annotated[
        float, typer.Option(help="Share of a task's prompts that may exceed the context.", metavar="SHARE")
    ] = 0.25,
    memory: Annotated[
        int | None,
        typer.Option(
            help="Working memory beside weights, keys and values, in MiB; default: 64 on a CPU.", metavar="MIB"
        ),
    ] = None,
    dtype: Dtype = "auto",
    tokenizer: NeededTokenizer = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a model on multiple-choice tasks, as lm-eval does, and on those of the paper's adapters.

    Scores are kept in --output: the same command continues a run that was interrupted, and other tasks join it.
    """
    from ..errors import EvaluationError
    from ..evaluation.comparison import compare as compare_runs
    from ..evaluation.harness_run import HarnessOptions
    from ..evaluation.picture import draw_picture
    from ..evaluation.result_files import read_report
    from ..evaluation.run import EvaluationOptions, Subject, evaluate_prepared, prepare
    from ..evaluation.run_folder import check_run_folder
    from ..evaluation.scorer import ScorerConfig
    from ..files.output import output_file
    from ..files.paths import user_path
    from ..plot import check_picture
    from .evaluate_harness import evaluate_with_harness, refuse_with_harness, stopped

    memory_bytes = None if memory is None else memory << 20
    scoring = ScorerConfig(max_length, memory_bytes, emulate_bfloat16=emulate_bfloat16)
    load_all = partial(_load, model, dtype=dtype, tokenizer=tokenizer, revision=revision, adapter=adapter)
    if harness:
        refuse_with_harness(protocol, compare=compare, picture=picture, emulate_bfloat16=emulate_bfloat16)
        run_tasks = HarnessOptions(shots, limit, use_chat, scoring)
        evaluate_with_harness(tasks, data, run_tasks, load_all, output, name=model, adapter=adapter, as_json=as_json)
        return
    if use_chat:
        raise EvaluationError("`use_chat` requires `harness`")
    options = EvaluationOptions(data, protocol, shots, limit, max_truncated, scoring)
    other = None if compare is None else read_report(user_path(compare))
    if output is not None:
        check_run_folder(user_path(output))
    if picture is not None:
        check_picture(picture)
    drawn = None if picture is None else context.with_resource(output_file(picture, overwrite=force))
    prepared = prepare(tasks, options)
    network, tokens, group = load_all()
    is_first = group.rank() == 0
    with _progress(prepared, is_first) as callback:
        try:
            report = evaluate_prepared(
                Subject(network, tokens, model, adapter),
                prepared,
                options,
                output=output,
                group=group,
                callback=callback,
                command=shlex.join(["openelm-mlx", *sys.argv[1:]]),
            )
        except KeyboardInterrupt:
            raise stopped(output) from None
    if not is_first:
        return
    comparison = None if other is None else compare_runs(other, report)
    if drawn is not None:
        draw_picture(report, drawn)
    if as_json:
        print_json({**report.to_dict(), **({"comparison": comparison.to_dict()} if comparison else {})})
    else:
        _print_report(report)
        if comparison is not None:
            write("")
            _print_table(comparison.table())
    if output is not None:
        say(f"results are in {output}")


def _load(
    model: str, dtype: str, tokenizer: str | None, revision: str | None, adapter: str | None
) -> tuple[OpenELM, Tokenizer, mx.distributed.Group]:
    """The model and its tokenizer, and the processes that share the work."""
    from ..loading import dtype_named, load
    from .processes import join_processes
    from .text_view import loading

    group = join_processes()
    with loading(model, tokenizer, adapter) if group.rank() == 0 else nullcontext():
        found = load(model, dtype=dtype_named(dtype), tokenizer=tokenizer, revision=revision, adapter=adapter)
    return *found, group


def _print_report(report: EvaluationReport) -> None:
    adapter = f" with {report.adapter}" if report.adapter else ""
    write_text(f"{report.model}{adapter}, {report.dtype}, protocol {report.protocol}")
    _print_table(report.table())


def _print_table(table: ResultTable) -> None:
    if table.shared:
        write_text(", ".join(table.shared))
    write_table(table.headings, table.sections, left=table.left, num_keys=table.num_keys)
    for note in table.notes:
        write_text(note)


@contextmanager
def _progress(tasks: Sequence[PreparedTask], is_first: bool) -> Iterator[EvaluationCallback]:
    """A bar over the items of all tasks, with the name of the current one; without a terminal, a line per task."""
    from ..evaluation.run import EvaluationCallback

    if not is_first:
        yield EvaluationCallback()
        return
    if not is_terminal(sys.stderr):
        yield _lines()
        return
    with counting_bars(transient=True) as progress:
        yield _bar(tasks, progress)


def _lines() -> EvaluationCallback:
    from ..evaluation.results import TaskResult
    from ..evaluation.run import EvaluationCallback

    class Lines(EvaluationCallback):
        def on_result(self, result: TaskResult) -> None:
            say(f"{result.task}: {result.num_items:,} items, {result.metric} {100 * result.main.value:.2f}")

    return Lines()


def _bar(tasks: Sequence[PreparedTask], progress: Any) -> EvaluationCallback:
    from ..evaluation.run import EvaluationCallback

    bar = progress.add_task("", total=sum(task.num_items for task in tasks))

    class Bar(EvaluationCallback):
        def on_task(self, task: str, num_items: int) -> None:
            progress.update(bar, description=f"items of {task}")

        def on_items(self, num_items: int) -> None:
            progress.advance(bar, num_items)

    return Bar()
