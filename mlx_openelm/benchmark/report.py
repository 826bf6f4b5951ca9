"""Benchmark results as a table, CSV, Markdown or JSON."""

import csv
import io
import json
from dataclasses import dataclass
from typing import Any

from .measure import Figures, Result

HEADINGS = (
    "model",
    "weights",
    "prompt",
    "completion",
    "batch",
    "KV",
    "",
    "prefill tokens/s",
    "decode tokens/s",
    "first token ms",
    "peak MiB",
    "of bandwidth",
    "watts",
)


@dataclass(frozen=True)
class BenchReport:
    """All results of one benchmark."""

    results: tuple[Result, ...]
    bandwidth: float  # bytes per second
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All results, the bandwidth and the machine, for JSON."""
        return {
            "benchmark": "bench",
            "bandwidth_gb_per_second": self.bandwidth / 1e9,
            "results": [result.to_dict() for result in self.results],
            "machine": self.machine,
        }

    def __repr__(self) -> str:
        lines = [
            f"  {result.model}, {weights_label(result.dtype, result.bits)}, {result.case!r}: "
            f"{who} {figures.decode_tokens_per_second.median:,.1f} tokens/s"
            for result in self.results
            for who, figures in result.figures.items()
        ]
        return "\n".join(["BenchReport(", *lines, ")"])

    def shared(self) -> dict[int, str]:
        """The values that all results have in common, by column of `HEADINGS`."""
        rows = [_about(result) for result in self.results]
        return {column: of[0] for column, of in enumerate(zip(*rows, strict=True)) if len(set(of)) == 1}

    def rows(self) -> list[list[str]]:
        """One row per contestant, and one with the ratios of two, with the columns of `HEADINGS`."""
        return [row for result in self.results for row in _rows(result)]

    def to_csv(self) -> str:
        """Comma-separated values; figures are medians."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(
            ["model", "dtype", "bits", "prompt_tokens", "max_tokens", "batch_size", "cache", "who", *_FIELDS]
        )
        for result in self.results:
            for who, figures in result.figures.items():
                case = result.case
                about = [result.model, result.dtype, result.bits or "", case.prompt_tokens, case.max_tokens]
                writer.writerow([*about, case.batch_size, case.cache.label, who, *_values(figures)])
        return text.getvalue()

    def to_markdown(self) -> str:
        """A Markdown table."""
        lines = [HEADINGS, ["---"] * len(HEADINGS), *self.rows()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def to_json(self) -> str:
        """All results as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


_FIELDS = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "total_tokens_per_second",
    "first_token_seconds",
    "peak_memory_bytes",
    "bandwidth_share",
    "watts",
)


def _values(figures: Figures) -> list[Any]:
    values = [getattr(figures, name) for name in _FIELDS]
    return ["" if value is None else getattr(value, "median", value) for value in values]


def weights_label(dtype: str, bits: int | None) -> str:
    """How weights are stored, such as "4 bits, float32"."""
    return dtype if bits is None else f"{bits} bits, {dtype}"


def _about(result: Result) -> list[str]:
    case = result.case
    return [
        result.model,
        weights_label(result.dtype, result.bits),
        f"{case.prompt_tokens:,}",
        f"{case.max_tokens:,}",
        str(case.batch_size),
        case.cache.label,
    ]


def _rows(result: Result) -> list[list[str]]:
    about = _about(result)
    rows: list[list[str]] = []
    for who, figures in result.figures.items():
        decode = figures.decode_tokens_per_second
        spread = (decode.max - decode.min) / decode.median if decode.median else 0.0
        rows.append(
            [
                *(about if not rows else [""] * len(about)),
                who,
                f"{figures.prefill_tokens_per_second.median:,.1f}",
                f"{decode.median:,.1f}" + (f" ±{spread / 2:.0%}" if decode.max > decode.min else ""),
                f"{figures.first_token_seconds.median * 1e3:,.0f}",
                f"{figures.peak_memory_bytes / 2**20:,.0f}",
                f"{figures.bandwidth_share:.0%}",
                "" if figures.watts is None else f"{figures.watts:.1f}",
            ]
        )
    if ratios := result.ratios():
        numbers = [f"{ratios[name]:.2f}" for name in ("prefill", "decode", "first_token", "peak_memory")]
        rows.append([*[""] * len(about), "ratio", *numbers, "", ""])
    return rows
