"""Plots of training runs, layer-wise designs and benchmarks, drawn with matplotlib, 800 pixels wide."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .cache.config import CacheConfig
from .config import OpenELMConfig
from .errors import OutputError, TrainingError
from .files.json_file import read_json_lines
from .files.output import OutputFile
from .files.paths import exists, is_folder
from .model.design import Design
from .packages import optional_package

_INCHES = (8.0, 6.4)
_DOTS_PER_INCH = 100
_LAYERWISE, _UNIFORM, _PALE = "#1f77b4", "#d95f02", "#b8cfe4"


def plot_run(run: Path, picture: OutputFile) -> None:
    """Plot loss, learning rate, gradient norm and speed over the steps of a run, from its `metrics.jsonl`.

    Args:
        picture: file to write; its suffix selects the format.
    Raises:
        TrainingError: if the run has no metrics, or they are damaged.
        OutputError: if the file cannot be written.
    """
    lines = read_metrics(run)
    held_out = [(line["step"], line["validation_loss"]) for line in lines if line["validation_loss"] is not None]
    lines = [line for line in lines if line["loss"] is not None] or lines
    steps = [line["step"] for line in lines]
    with _figure(picture, 2, 2) as (figure, axes):
        pairs = "accuracy" in lines[-1]
        counted = f"{lines[-1]['tokens']:,} {'pairs' if pairs else 'tokens'} seen"
        figure.suptitle(f"Training run {run.resolve().name}: {counted}")
        loss, rate, norm, speed = axes.flat
        loss.plot(
            steps, [line["loss"] for line in lines], ".-", color=_PALE, markersize=2, linewidth=0.8, label="training"
        )
        loss.plot(steps, _smooth([line["loss"] for line in lines]), color=_LAYERWISE, label="training, smoothed")
        if held_out:
            loss.plot(*zip(*held_out, strict=True), "o-", color=_UNIFORM, markersize=3, label="held-out")
        loss.set(title="Loss", ylabel="preference loss" if pairs else "nats per token")
        loss.legend()
        rate.plot(steps, [line["learning_rate"] for line in lines], color=_LAYERWISE)
        rate.set(title="Learning rate", ylabel="learning rate")
        norm.plot(steps, [line["gradient_norm"] for line in lines], color=_LAYERWISE, linewidth=0.8)
        norm.set(title="Gradient norm, before clipping", ylabel="norm", yscale="log")
        norm.yaxis.set_major_formatter("{x:g}")
        norms = [line["gradient_norm"] for line in lines if line["gradient_norm"] > 0]
        within_a_decade = not norms or max(norms) < 10 * min(norms)
        norm.yaxis.set_minor_formatter("{x:g}" if within_a_decade else "")
        speed.plot(steps, [line["tokens_per_second"] for line in lines], color=_LAYERWISE)
        speed.set(
            title="Speed since the last start", ylabel=f"{'pairs' if pairs else 'tokens'} per second", ylim=(0, None)
        )
        for axis in axes.flat:
            axis.set_xlabel("step")


def plot_design(design: Design, picture: OutputFile) -> None:
    """Plot heads, FFN widths and parameters of each layer, for the layer-wise and the uniform model.

    Args:
        picture: file to write; its suffix selects the format.
    Raises:
        OutputError: if the file cannot be written.
    """
    layers = range(design.layerwise.num_transformer_layers)
    with _figure(picture, 3, 1) as (figure, axes):
        figure.suptitle(
            f"{design.layerwise.num_parameters / 1e6:,.1f} million parameters in {len(layers)} layers "
            f"of width {design.layerwise.model_dim:,}"
        )
        titles = ("Query heads", "FFN width", "Million parameters")
        for axis, title, values, uniform in zip(
            axes, titles, _columns(design.layerwise), _columns(design.uniform), strict=True
        ):
            axis.bar(layers, values, color=_LAYERWISE, label="layer-wise")
            axis.step(
                [-0.5, *(layer + 0.5 for layer in layers)],
                [uniform[0], *uniform],
                color=_UNIFORM,
                linewidth=2,
                label=f"uniform, {design.uniform.num_parameters / 1e6:,.1f} million parameters",
            )
            axis.set(ylabel=title, xlim=(-0.7, len(layers) - 0.3))
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend(loc="upper left", fontsize="small")
        axes[-1].set_xlabel("layer")


def check_picture(path: Path) -> None:
    """Make sure that matplotlib can write a file of this type.

    Raises:
        OutputError: if matplotlib does not support the suffix.
        MissingPackageError: if matplotlib is not installed.
    """
    kinds = optional_package("matplotlib.figure", "plots need", "plot").Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise OutputError(f"unsupported image format: {path} (choose from {', '.join(sorted(kinds))})")


def plot_bench(report: Mapping[str, Any], picture: OutputFile) -> None:
    """Plot the decoding speed of each benchmark as a bar in tokens per second, with the limit of memory bandwidth.

    Args:
        report: a benchmark report; see `BenchReport.to_dict`.
        picture: file to write; its suffix selects the format.
    Raises:
        OutputError: if the file cannot be written.
    """
    results = report["results"]
    names = list(results[0]["figures"])
    with _figure(picture, 1, 1, 1.6 + 0.45 * len(names) * len(results) + 0.25 * len(results)) as (figure, axis):
        height = 0.8 / len(names)
        bars: dict[str, Any] = {}
        for place, result in enumerate(results):
            for number, name in enumerate(names):
                reached = result["figures"][name]["decode_tokens_per_second"]
                y = place + (number - (len(names) - 1) / 2) * height
                least, most = reached["median"] - reached["min"], reached["max"] - reached["median"]
                color = _LAYERWISE if number == 0 else _UNIFORM
                bars[name] = axis.barh(
                    y, reached["median"], height * 0.9, xerr=[[least], [most]], color=color, capsize=2
                )
                share = result["figures"][name]["bandwidth_share"]
                axis.annotate(
                    f"{reached['median']:,.1f} ({share:.0%})",
                    (reached["max"], y),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
            limit = result["limit_tokens_per_second"]
            axis.vlines(limit, place - 0.42, place + 0.42, colors="black", linestyles="dotted")
        (limit_line,) = axis.plot([], [], color="black", linestyle="dotted")
        handles = [*(bars[name] for name in names), limit_line]
        axis.set_yticks(range(len(results)), [_bench_label(result, results) for result in results])
        axis.invert_yaxis()
        longest = max(
            max(
                result["limit_tokens_per_second"],
                *(f["decode_tokens_per_second"]["max"] for f in result["figures"].values()),
            )
            for result in results
        )
        axis.set(xlabel="decoding speed, tokens per second", xlim=(0, 1.12 * longest))
        machine = report["machine"]
        figure.suptitle(f"{machine['chip']}, {machine['device']}, {report['bandwidth_gb_per_second']:,.1f} GB/s")
        labels = [*names, "limit of memory bandwidth"]
        axis.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False, fontsize=8
        )


def _bench_label(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """The model of a result, and the settings in which it differs from other results."""
    case = result["case"]
    parts = {
        "weights": f"{result['bits']} bits" if result["bits"] else result["dtype"],
        "prompt": f"{case['prompt_tokens']:,} + {case['max_tokens']:,} tokens",
        "rows": f"{case['batch_size']} row" + "s" * (case["batch_size"] > 1),
        "cache": _cache_label(CacheConfig(**case["cache"])),
    }
    others = [
        (r["bits"] or r["dtype"], (r["case"]["prompt_tokens"], r["case"]["max_tokens"]), r["case"]["batch_size"],
         str(r["case"]["cache"]))
        for r in results
    ]  # fmt: skip
    varies = [len(set(of)) > 1 for of in zip(*others, strict=True)]
    own = [text for text, does in zip(parts.values(), varies, strict=True) if does]
    return "\n".join([result["model"], ", ".join(own)])


def _cache_label(cache: CacheConfig) -> str:
    return f"window {cache.window:,}" if cache.window else f"KV {cache.bits} bits" if cache.bits else "unquantized KV"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's `metrics.jsonl`.

    Raises:
        TrainingError: if there are none, or one is damaged.
    """
    path = run / "metrics.jsonl" if is_folder(run) else run
    if not exists(path):
        raise TrainingError(f"{run} is not a training run: {path.name} is missing")
    lines: list[dict[str, Any]] = []
    for line in read_json_lines(path, TrainingError):
        for name in ("step", "tokens"):
            line.whole(name)
        for name in ("learning_rate", "gradient_norm", "tokens_per_second"):
            line.number(name)
        for name in ("loss", "validation_loss"):
            line.number(name, None)
        lines.append(line)
    if not lines:
        raise TrainingError(f"{path} is empty; there is nothing to plot yet")
    return lines


def _columns(config: OpenELMConfig) -> tuple[list[float], ...]:
    return (
        list(config.num_query_heads),
        list(config.ffn_dims),
        [parameters / 1e6 for parameters in config.layer_parameters],
    )


@contextmanager
def _figure(picture: OutputFile, rows: int, columns: int, inches: float = _INCHES[1]) -> Iterator[Any]:
    """Yield a figure of this height and its axes, then save it; matplotlib's global state is not touched."""
    figures = optional_package("matplotlib.figure", "plots need", "plot")
    figure = figures.Figure(figsize=(_INCHES[0], inches), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(rows, columns, sharex="col" if columns == 1 else False)
    for axis in axes.flat if rows * columns > 1 else [axes]:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    yield figure, axes
    with picture.replaced() as file:
        try:
            figure.savefig(file, format=picture.name.suffix.lstrip(".").lower() or "png")
        except ValueError as error:  # an unsupported file suffix
            raise OutputError(f"{picture.name} cannot be written: {str(error).split(' (')[0]}") from error


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """A running mean over a window of `share` of all values."""
    width = max(1, round(len(values) * share))
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]
