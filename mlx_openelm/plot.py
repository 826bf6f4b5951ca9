"""Plots of training runs, layer-wise designs, benchmarks and evaluations, drawn with matplotlib, 800 pixels wide."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from .cache.config import CacheConfig
from .config import OpenELMConfig
from .errors import OutputError
from .files.output import OutputFile
from .files.paths import open_regular
from .model.design import Design
from .packages import optional_package
from .runs import EVALUATION, read_metrics

_PROGRAM = "openelm-mlx"
_MARK = f"Software\0{_PROGRAM}".encode()  # in the beginning of its PNG files
_INCHES = (8.0, 6.4)
_DOTS_PER_INCH = 100
_TITLE, _LABEL = 75, 30  # characters that fit in a line of a title, and beside an axis
_SMOOTHED = 40  # points, from which a smoothed line says more than the points
_MOST_EVALUATED = 9  # lines
_LAYERWISE, _UNIFORM, _PALE = "#1f77b4", "#d95f02", "#b8cfe4"


def plot_run(run: Path, picture: OutputFile) -> None:
    """Plot loss, learning rate, gradient norm, speed and evaluations over the steps of a run, from its `metrics.jsonl`.

    Args:
        picture: file to write; its suffix selects the format.
    Raises:
        TrainingError: if the run has no metrics, or they are damaged.
        OutputError: if the file cannot be written.
    """
    lines = read_metrics(run)
    held_out = [(line["step"], line["validation_loss"]) for line in lines if line["validation_loss"] is not None]
    evaluated = [line for line in lines if _evaluation(line)]
    lines = [line for line in lines if line["loss"] is not None] or lines
    with _figure(picture, *((3, 2, 1.5 * _INCHES[1]) if evaluated else (2, 2))) as (figure, axes):
        pairs = "accuracy" in lines[-1]
        unit = "pairs" if pairs else "tokens"
        _title(figure, f"Training run {run.resolve().name}: {lines[-1]['tokens']:,} {unit} seen")
        loss, rate, norm, speed = axes.flat[:4]
        _draw_loss(loss, lines, held_out, "preference loss" if pairs else "nats per token")
        entries = [*zip(*loss.get_legend_handles_labels(), strict=True)]
        if evaluated:
            evaluation = figure.add_subplot(axes[2, 0].get_gridspec()[2, :])
            entries += _draw_evaluation(evaluation, evaluated)
            for unused in axes[2]:
                unused.remove()
        figure.legend(*zip(*entries, strict=True), loc="outside lower center", ncols=3, frameon=False)
        others = {"learning_rate": rate, "gradient_norm": norm, "tokens_per_second": speed}
        for name, axis in others.items():
            _draw_line(axis, [line["step"] for line in lines], [line[name] for line in lines], color=_LAYERWISE)
        rate.set(title="Learning rate", ylabel="learning rate")
        norm.set(title="Gradient norm, before clipping", ylabel="norm")
        norms = [line["gradient_norm"] for line in lines if line["gradient_norm"] > 0]
        if norms and max(norms) > 10 * min(norms):
            norm.set_yscale("log", subs=(2, 5))
            norm.yaxis.set_minor_formatter("{x:g}")
        speed.set(title="Speed since the last start", ylabel=f"{unit} per second")
        speed.set_ylim(0, 1.1 * max(1, *(line["tokens_per_second"] for line in lines)))
        for axis in figure.axes:
            axis.yaxis.set_major_formatter("{x:,g}")
            axis.xaxis.set_major_formatter("{x:,g}")
            axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
            if len(lines) == 1:
                axis.set_xticks([lines[0]["step"]])
            axis.set_xlabel("step")


def _draw_loss(axis: Any, lines: Sequence[Mapping[str, Any]], held_out: Sequence[Any], unit: str) -> None:
    """Training and held-out loss; many points have a smoothed line too."""
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    if len(lines) < _SMOOTHED:
        _draw_line(axis, steps, losses, color=_LAYERWISE, label="training")
    else:
        axis.plot(steps, losses, ".-", color=_PALE, markersize=2, linewidth=0.8, label="training")
        axis.plot(steps, _smooth(losses), color=_LAYERWISE, label="training, smoothed")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color=_UNIFORM, markersize=3, label="held-out")
    axis.set(title="Loss", ylabel=unit)


def _evaluation(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line's evaluation by name."""
    return {name.removeprefix(EVALUATION): value for name, value in line.items() if name.startswith(EVALUATION)}


def _draw_evaluation(axis: Any, lines: Sequence[Mapping[str, Any]]) -> list[tuple[Any, str]]:
    """A line for each figure, the one that counts first; returns what a legend shows."""
    names = list(dict.fromkeys(name for line in lines for name in _evaluation(line)))
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    entries = []
    for number, name in enumerate(names[:_MOST_EVALUATED]):
        points = [(line["step"], value) for line in lines if (value := _evaluation(line).get(name)) is not None]
        width = 2 if number == 0 else 1
        drawn = axis.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=width, color=f"C{number}")
        entries.append((drawn[0], fill(name, _LABEL)))
    axis.set(title="Evaluation", ylabel=fill(names[0], _LABEL))
    return entries


def _draw_line(axis: Any, steps: Sequence[int], values: Sequence[float], **style: Any) -> None:
    """A line, with its points marked if there are few: one alone would not show."""
    axis.plot(steps, values, "o-" if len(steps) < _SMOOTHED else "-", markersize=3, linewidth=1.2, **style)


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
            f"{_millions(design.layerwise)} in {len(layers)} layers of width {design.layerwise.model_dim:,}"
        )
        titles = ("Query heads", "FFN width", "Million parameters")
        for axis, title, values, uniform in zip(
            axes, titles, _columns(design.layerwise), _columns(design.uniform), strict=True
        ):
            axis.bar(layers, values, color=_LAYERWISE, label=f"layer-wise, {_millions(design.layerwise)}")
            axis.step(
                [-0.5, *(layer + 0.5 for layer in layers)],
                [uniform[0], *uniform],
                color=_UNIFORM,
                linewidth=2,
                label=f"uniform, {_millions(design.uniform)}",
            )
            axis.set(ylabel=title, xlim=(-0.7, len(layers) - 0.3), ylim=(0, 1.08 * max(*values, *uniform)))
            axis.yaxis.set_major_formatter("{x:,g}")
            axis.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        axes[-1].set_xlabel("layer")


def _millions(config: OpenELMConfig) -> str:
    return f"{config.num_parameters / 1e6:,.1f} million parameters"


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
    machine = report["machine"]
    labels, shared = _bench_labels(results)
    lines = sum(max(label.count("\n") + 1, len(names)) for label in labels)
    with _figure(picture, 1, 1, 1.7 + 0.3 * lines + 0.15 * len(results)) as (figure, axis):
        where = f"{machine['chip']}, {machine['device']}, memory {report['bandwidth_gb_per_second']:,.1f} GB/s"
        _title(figure, "\n".join(filter(None, [where, shared])))
        handles = [_draw_bench(axis, results, number, name) for number, name in enumerate(names)]
        for place, result in enumerate(results):
            limit = result["limit_tokens_per_second"]
            axis.vlines(limit, place - 0.42, place + 0.42, colors="black", linestyles="dotted")
        handles += axis.plot([], [], color="black", linestyle="dotted")
        axis.set_yticks(range(len(results)), labels, fontsize=8)
        longest = max(
            max(
                result["limit_tokens_per_second"],
                *(figures["decode_tokens_per_second"]["max"] for figures in result["figures"].values()),
            )
            for result in results
        )
        axis.set(xlabel="decoding speed, tokens per second", xlim=(0, 1.25 * longest), ylim=(len(results) - 0.5, -0.5))
        entries = [*names, "limit of the memory or cache (100%)"]
        figure.legend(handles, entries, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _draw_bench(axis: Any, results: Sequence[Mapping[str, Any]], number: int, name: str) -> Any:
    """The bars of one contestant, with speed and share of the limit beside them; returns what a legend shows."""
    height = 0.8 / len(results[0]["figures"])
    bars = None
    for place, result in enumerate(results):
        figures = result["figures"][name]
        reached = figures["decode_tokens_per_second"]
        y = place - 0.4 + (number + 0.5) * height
        error = [[reached["median"] - reached["min"]], [reached["max"] - reached["median"]]]
        color = _LAYERWISE if number == 0 else _UNIFORM
        bars = axis.barh(y, reached["median"], height * 0.9, xerr=error, color=color, capsize=2)
        axis.annotate(
            f"{reached['median']:,.1f} ({percent(figures['bandwidth_share'])})",
            (reached["max"], y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},  # over the line of a limit
        )
    return bars


def _bench_labels(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """Model, weights, and the settings in which results differ, of each; and the settings that all share."""
    settings = []
    for result in results:
        case = result["case"]
        rows = f"{case['batch_size']} row" + "s" * (case["batch_size"] > 1)
        lengths = f"{case['prompt_tokens']:,} + {case['max_tokens']:,} tokens"
        settings.append((lengths, rows, _cache_label(CacheConfig(**case["cache"]))))
    shared = [len(set(of)) == 1 for of in zip(*settings, strict=True)]
    labels = []
    for result, of in zip(results, settings, strict=True):
        weights = f"{result['bits']} bits" if result["bits"] else result["dtype"]
        own = [text for text, is_shared in zip(of, shared, strict=True) if not is_shared]
        parts = [part.replace(" ", "\N{NO-BREAK SPACE}") for part in (weights, *own)]
        labels.append("\n".join([fill(result["model"], _LABEL), fill(", ".join(parts), _LABEL)]))
    return labels, ", ".join(text for text, is_shared in zip(settings[0], shared, strict=True) if is_shared)


def _cache_label(cache: CacheConfig) -> str:
    return f"window {cache.window:,}" if cache.window else f"KV {cache.bits} bits" if cache.bits else "unquantized KV"


def percent(share: float) -> str:
    """A share in percent, with a decimal if it is small."""
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def is_own_picture(path: Path) -> bool:
    """Whether a PNG file was drawn here."""
    try:
        with open_regular(path) as file:
            return _MARK in file.read(1024)
    except OSError:
        return False


class Accuracy(NamedTuple):
    """A bar of `plot_accuracies`; all values in percent.

    Attributes:
        label: what it is the accuracy of.
        value: the accuracy; NaN is drawn as nothing.
        stderr: its standard error.
        published: the published accuracy.
        majority: the accuracy of always choosing the same position.
    """

    label: str
    value: float
    stderr: float | None = None
    published: float | None = None
    majority: float | None = None


def plot_accuracies(title: str, bars: Sequence[Accuracy], picture: OutputFile) -> None:
    """Plot accuracies as bars with their standard errors, beside what was published and the majority class.

    Args:
        picture: file to write; its suffix selects the format.
    Raises:
        OutputError: if the file cannot be written.
    """
    labels = [fill(bar.label, _LABEL) for bar in bars]
    lines = sum(label.count("\n") + 1 for label in labels)
    with _figure(picture, 1, 1, 1.9 + 0.2 * lines + 0.15 * len(bars)) as (figure, axis):
        _title(figure, title)
        handles: dict[str, Any] = {}
        for place, bar in enumerate(bars):
            name = "accuracy, with its standard error"
            handles[name] = axis.barh(place, bar.value, 0.6, xerr=bar.stderr, color=_LAYERWISE, capsize=2)
            for value, name, color, style in (
                (bar.published, "published", _UNIFORM, "solid"),
                (bar.majority, "always the most frequent position", "black", "dotted"),
            ):
                if value is not None:
                    handles[name] = axis.vlines(value, place - 0.42, place + 0.42, colors=color, linestyles=style)
            for value, where, color in ((bar.value, 109, _LAYERWISE), (bar.published, 121, _UNIFORM)):
                text = "" if value is None else f"{value:.2f}" if math.isfinite(value) else "no number"
                axis.text(where, place, text, color=color, fontsize=8, ha="right", va="center")
        axis.set_yticks(range(len(bars)), labels, fontsize=8)
        axis.set(xlabel="percent", xlim=(0, 123), ylim=(len(bars) - 0.5, -0.5))
        axis.set_xticks(range(0, 101, 20))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _columns(config: OpenELMConfig) -> tuple[list[float], ...]:
    return (
        list(config.num_query_heads),
        list(config.ffn_dims),
        [parameters / 1e6 for parameters in config.layer_parameters],
    )


def _title(figure: Any, text: str) -> None:
    """A title in as many lines as it needs."""
    figure.suptitle("\n".join(fill(line, _TITLE) for line in text.split("\n")))


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
            kind = picture.name.suffix.lstrip(".").lower() or "png"
            figure.savefig(file, format=kind, metadata={"Software": _PROGRAM} if kind == "png" else None)
        except ValueError as error:  # an unsupported file suffix
            raise OutputError(f"{picture.name} cannot be written: {str(error).split(' (')[0]}") from error


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """A running mean over a window of `share` of all values."""
    width = max(1, round(len(values) * share))
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]
