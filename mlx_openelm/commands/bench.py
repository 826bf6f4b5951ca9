"""`openelm-mlx bench`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BenchError
from ..files.output import output_file
from .interrupts import INTERRUPTED
from .options import Adapter, Force, Json, Revision, examples
from .streams import clean, console, is_terminal
from .tables import write_parts, write_table, write_text
from .terminal import print_json, say, write

if TYPE_CHECKING:
    from ..benchmark.measure import Case, Result
    from ..benchmark.report import BenchReport
    from ..cache.config import CacheConfig
    from ..machine.bandwidth import BandwidthProbe
    from ..model.openelm import OpenELM

_LONG_CONTEXT = 1 << 20  # tokens, before the context of a model is known
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
    prompt_tokens: Annotated[
        str | None,
        typer.Option(help="Prompt lengths in tokens; default: 512, or less in a short context.", metavar="N,..."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            "-n",
            help="Completion lengths in tokens; default: 128, or less in a short context.",
            metavar="N,...",
        ),
    ] = None,
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
    if as_json + as_csv + as_markdown > 1:
        raise BenchError("--json, --csv and --markdown are mutually exclusive")
    with _Status("loading") as status, ExitStack() as claims:  # a sign first: loading modules takes a while
        from ..benchmark.bench import check_cases
        from ..benchmark.report import BenchReport
        from ..machine.bandwidth import BandwidthProbe
        from ..machine.hardware import describe
        from ..plot import check_picture, plot_bench

        grid = _Grid(
            _numbers("--prompt-tokens", prompt_tokens) if prompt_tokens else [None],
            _numbers("--tokens", tokens, least=2) if tokens else [None],
            _numbers("--batch-size", batch_size),
            [_kind(name) for name in _split(kv)],
            paper,
        )
        check_cases(grid.cases(), against, rounds)
        bits = _numbers("--quantize", quantize, least=0)
        networks = _networks(model or [], preset, dtype, bits, adapter, revision, status.show)
        figures, picture = (
            None if path is None else claims.enter_context(output_file(path, overwrite=force))
            for path in (output, plot)
        )
        if plot is not None:
            check_picture(plot)
        memory = BandwidthProbe()
        results: list[Result] = []
        options = {"against": against, "rounds": rounds, "compiled": compiled, "paper": paper}
        is_complete = _measure(networks, grid, memory, status.show, results, options)
        status.stop()
        report = BenchReport.of(results, memory.best, describe(shlex.join(["openelm-mlx", *sys.argv[1:]])))
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
    if not is_complete:
        raise typer.Exit(INTERRUPTED)


@dataclass(frozen=True)
class _Grid:
    """All combinations of these values; a length that is not given, `None`, depends on the model."""

    prompt_tokens: Sequence[int | None]
    max_tokens: Sequence[int | None]
    batch_sizes: Sequence[int]
    caches: Sequence[CacheConfig]
    paper: bool

    def cases(self, context: int = _LONG_CONTEXT) -> list[Case]:
        """The cases for a model with this context."""
        from ..benchmark.measure import PAPER_CASE, Case, default_lengths

        if self.paper:
            lengths = [(PAPER_CASE.prompt_tokens, PAPER_CASE.max_tokens)]
        else:
            lengths = [default_lengths(context, *given) for given in product(self.prompt_tokens, self.max_tokens)]
        return [Case(*of, size, cache) for of, size, cache in product(lengths, self.batch_sizes, self.caches)]


def _measure(
    networks: Iterable[tuple[str, OpenELM]],
    grid: _Grid,
    memory: BandwidthProbe,
    show: Callable[[str], None],
    results: list[Result],
    options: Mapping[str, Any],
) -> bool:
    """Append results as they are measured; whether Ctrl-C did not end it."""
    from ..benchmark.bench import bench_cases
    from ..machine.device import wired_memory

    try:
        with wired_memory():
            for name, network in networks:

                def show_round(who: str, number: int, name: str = name) -> None:
                    which = f"round {number} of {options['rounds']}" if number else "warm-up"
                    show(f"{name}: {who}, {which}" if options["against"] else f"{name}: {which}")

                cases = grid.cases(network.config.max_context_length)
                for result in bench_cases(network, cases, name=name, memory=memory, on_round=show_round, **options):
                    results.append(result)
    except KeyboardInterrupt:
        if not results:
            raise
        say(f"interrupted; showing the {len(results)} results so far")
        return False
    return True


def _networks(
    models: Sequence[str],
    preset: str | None,
    dtype: str,
    bits: Sequence[int],
    adapter: str | None,
    revision: str | None,
    show: Callable[[str], None],
) -> Iterator[tuple[str, OpenELM]]:
    """Names and networks, only one in memory at a time; shows which one is being loaded."""
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
            show(f"loading {name}")
            yield Path(name).name, load_model(name, dtype=chosen, adapter=adapter, revision=revision)
        for size, quantization in product(sizes, quantizations):
            how = "random weights" + (f" in {quantization.bits} bits" if quantization else "")
            show(f"creating {size} with {how}")
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


class _Status:
    """One line on stderr, if it is a terminal, that says what is happening and how long it has taken."""

    def __init__(self, text: str):
        self._text = text
        self._live: Any = None

    def __enter__(self) -> _Status:
        if is_terminal(sys.stderr):
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
            self._live = Progress(*columns, console=console(stderr=True), transient=True)
            self._live.add_task(self._text, total=None)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._live is not None:
            self._live.update(self._live.task_ids[0], description=clean(text))

    def stop(self) -> None:
        """Remove the line."""
        if self._live is not None:
            self._live.stop()


def _print_table(report: BenchReport) -> None:
    from ..benchmark.report import HEADINGS, NUM_KEYS

    machine, shared, rows = report.machine, report.shared(), report.rows()
    where = [machine["chip"], machine["device"], f"memory {report.bandwidth / 1e9:,.1f} GB/s"]
    where += [f"BLAS {machine['blas']}"] if machine["blas"] else []
    where += [f"native kernels {machine['native']}"] if machine.get("native") else []
    write_parts([*where, f"MLX {machine['versions']['mlx']}"])
    write_parts([f"{HEADINGS[column]} {value}" for column, value in shared.items()])
    compared = any(len(result.figures) > 1 for result in report.results)
    hidden = {*shared, *([] if compared else [HEADINGS.index("")])}
    shown = [c for c in range(len(HEADINGS)) if c not in hidden and any(row[c] for row in rows)]
    num_keys = sum(column < NUM_KEYS for column in shown)
    write("")
    write_table(
        [HEADINGS[column] for column in shown],
        [[[row[column] for column in shown] for row in rows]],
        left=[at for at, column in enumerate(shown) if column in (0, 1, 5, 6)],
        num_keys=num_keys,
    )
    for number, note in enumerate(report.notes()):
        write_text(f"* {note}" if number else f"\n* {note}", "  ")
