"""`openelm-mlx bench`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import BenchError
from ..files.output import output_file
from .interrupts import INTERRUPTED
from .options import Adapter, Force, Json, Revision, examples
from .streams import clean, console, is_terminal
from .terminal import print_json, say, write

if TYPE_CHECKING:
    from ..benchmark.measure import Result
    from ..benchmark.report import BenchReport
    from ..cache.config import CacheConfig
    from ..model.openelm import OpenELM

EXAMPLES = examples(
    "openelm-mlx bench --preset 1.1B --quantize 4",
    "openelm-mlx bench --preset 270M,1.1B --dtype bfloat16 --quantize 0,4,8 --against mlx-lm",
    "openelm-mlx bench -m OpenELM-1_1B --prompt-tokens 128,512 --batch-size 1,8 --kv full,8,4",
    "openelm-mlx bench --preset 270M --paper --plot limits.png --output results.json",
)


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Model folder, hub id or built-in model; repeatable.", metavar="M"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Published sizes, with random weights: 270M,450M,1.1B,3B.", metavar="SIZES")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type to compute in: auto, float16, bfloat16 or float32.", metavar="D")
    ] = "auto",
    quantize: Annotated[
        str, typer.Option(help="Bits per weight of a --preset; 0: not quantized.", metavar="BITS")
    ] = "0",
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths in tokens.", metavar="N,...")] = "512",
    tokens: Annotated[
        str, typer.Option("--tokens", "-n", help="Completion lengths in tokens.", metavar="N,...")
    ] = "128",
    batch_size: Annotated[str, typer.Option(help="Sequences decoded at once.", metavar="N,...")] = "1",
    kv: Annotated[str, typer.Option(help="KV caches: full, 8 or 4 (bits), or window:N.", metavar="KIND,...")] = "full",
    rounds: Annotated[int, typer.Option(help="Measured rounds, after one warm-up round.", metavar="N")] = 3,
    against: Annotated[
        str | None, typer.Option(help="Peer to compare with, in alternating runs: mlx-lm.", metavar="PEER")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Use the prompt of the OpenELM paper and generate 1,024 tokens.")
    ] = False,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the decoding step; default: where it pays off."),
    ] = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write all results to.", metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Image of tokens per second against the bandwidth limit.", metavar="FILE"),
    ] = None,
    force: Force = False,
    adapter: Adapter = None,
    revision: Revision = None,
) -> None:
    """Measure tokens per second, time to first token, peak memory, and how close decoding is to the bandwidth limit."""
    from ..benchmark.bench import bench_cases, check_cases
    from ..benchmark.measure import PAPER_CASE, Case
    from ..benchmark.report import BenchReport
    from ..machine.device import wired_memory
    from ..machine.hardware import describe, memory_bandwidth
    from ..plot import check_picture, plot_bench

    if as_json + as_csv + as_markdown > 1:
        raise BenchError("--json, --csv and --markdown are mutually exclusive")
    lengths = (_numbers("--prompt-tokens", prompt_tokens), _numbers("--tokens", tokens, least=2))
    if paper:
        lengths = ([PAPER_CASE.prompt_tokens], [PAPER_CASE.max_tokens])
    kinds = [_kind(name) for name in _split(kv)]
    cases = [Case(*values) for values in product(*lengths, _numbers("--batch-size", batch_size), kinds)]
    check_cases(cases, against, rounds)
    networks = _networks(model or [], preset, dtype, _numbers("--quantize", quantize, least=0), adapter, revision)
    with ExitStack() as claims:
        figures, picture = (
            None if path is None else claims.enter_context(output_file(path, overwrite=force))
            for path in (output, plot)
        )
        if plot is not None:
            check_picture(plot)
        bandwidth = memory_bandwidth()
        results: list[Result] = []
        interrupted = False
        try:
            with _progress() as moved, wired_memory():
                for name, network in networks:
                    for result in bench_cases(
                        network,
                        cases,
                        name=name,
                        bandwidth=bandwidth,
                        against=against,
                        rounds=rounds,
                        compiled=compiled,
                        paper=paper,
                        on_round=partial(_show_round, moved, name, rounds),
                    ):
                        results.append(result)
        except KeyboardInterrupt:
            if not results:
                raise
            interrupted = True
            say(f"interrupted; showing the {len(results)} results so far")
        report = BenchReport(tuple(results), bandwidth, describe(shlex.join(["openelm-mlx", *sys.argv[1:]])))
        if as_json:
            print_json(report.to_dict())
        elif as_csv:
            write(report.to_csv(), end="")
        elif as_markdown:
            write(report.to_markdown(), end="")
        else:
            _print_table(report)
        if figures is not None:
            figures.write(report.to_json())
        if picture is not None:
            plot_bench(report.to_dict(), picture)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _show_round(show: Callable[[str], None], name: str, rounds: int, who: str, number: int) -> None:
    show(f"{name}: {who}, round {number} of {rounds}")


def _networks(
    models: Sequence[str],
    preset: str | None,
    dtype: str,
    bits: Sequence[int],
    adapter: str | None,
    revision: str | None,
) -> Iterator[tuple[str, OpenELM]]:
    """Names and networks, only one in memory at a time."""
    import mlx.core as mx

    from ..benchmark.models import random_network
    from ..config import OpenELMConfig
    from ..hub import BUILT_IN_MODEL
    from ..loading import dtype_named, load_model
    from ..machine.device import compute_dtype
    from ..quantization import Quantization

    sizes = _split(preset or "")
    configs = {size: OpenELMConfig.preset(size) for size in sizes}
    chosen = dtype_named(dtype)
    if adapter and sizes:
        raise BenchError("--adapter requires --model; it cannot be used with --preset")
    if not sizes and any(bits):
        raise BenchError("--quantize requires --preset; quantize a model with `openelm-mlx convert --quantize`")
    quantizations = [Quantization(bits=number) if number else None for number in bits]

    def networks() -> Iterator[tuple[str, OpenELM]]:
        for name in models or ([] if sizes else [BUILT_IN_MODEL]):
            yield Path(name).name, load_model(name, dtype=chosen, adapter=adapter, revision=revision)
        for size, quantization in product(sizes, quantizations):
            yield size, random_network(configs[size], chosen or compute_dtype(mx.bfloat16), quantization)

    return networks()


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str, least: int = 1) -> list[int]:
    parts = _split(text)
    if not parts or not all(part.isdecimal() and int(part) >= least for part in parts):
        raise BenchError(f"{option} takes comma-separated numbers of at least {least}; got {text!r}")
    return [int(part) for part in parts]


def _kind(name: str) -> CacheConfig:
    from ..cache.config import CacheConfig

    if name == "full":
        return CacheConfig()
    if name in ("4", "8"):
        return CacheConfig(bits=int(name))
    kind, _, size = name.partition(":")
    if kind == "window" and size.isdecimal():
        return CacheConfig(window=int(size))
    raise BenchError(f"--kv must be full, 8, 4 or window:N; got {name!r}")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows the current measurement when stderr is a terminal."""
    if not is_terminal(sys.stderr):
        yield lambda text: None
        return
    from rich.text import Text

    with console(stderr=True).status("measuring memory bandwidth") as status:
        yield lambda text: status.update(Text(clean(text)))


def _print_table(report: BenchReport) -> None:
    from rich.table import Table

    from ..benchmark.report import HEADINGS

    rows = report.rows()
    machine = report.machine
    shared = report.shared()
    where = (
        f"{machine['chip']}, {machine['device']}, {report.bandwidth / 1e9:,.1f} GB/s, MLX {machine['versions']['mlx']}"
        + (f", BLAS {machine['blas']}" if machine["blas"] else "")
    )
    what = ", ".join(f"{HEADINGS[column]} {value}" for column, value in shared.items())
    table = Table(title=clean(f"{where}\n{what}"), title_justify="left")
    compared = any(len(result.figures) > 1 for result in report.results)
    hidden = {*shared, *([] if compared else [HEADINGS.index("")])}
    shown = [c for c in range(len(HEADINGS)) if c not in hidden and any(row[c] for row in rows)]
    for column in shown:
        table.add_column(HEADINGS[column], justify="left" if column in (0, 1, 5, 6) else "right", no_wrap=column == 8)
    for row in rows:
        table.add_row(*(clean(row[column]) for column in shown))
    console().print(table)
