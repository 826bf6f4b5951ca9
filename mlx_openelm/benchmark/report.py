"""Benchmark results as a table, CSV, Markdown or JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..plot import percent
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
    "of the limit",
    "watts",
)
NUM_KEYS = 7  # columns that say what was measured


@dataclass(frozen=True)
class BenchReport:
    """All results of one benchmark."""

    results: tuple[Result, ...]
    bandwidth: float  # of the memory, in bytes per second
    machine: dict[str, Any]

    @classmethod
    def of(cls, results: Sequence[Result], bandwidth: float, machine: dict[str, Any]) -> "BenchReport":
        """A report with the limits of all results computed from the same bandwidth.

        Args:
            bandwidth: the best that reading memory gave, in bytes per second. If decoding read faster, that counts.
        """
        first = [result.limited_by(bandwidth) for result in results]
        raised = [of.limit_bytes_per_second for of in first if of.limit_was_raised and not of.fits_in_cache]
        memory = max([bandwidth, *raised])
        return cls(tuple(result.limited_by(memory) for result in results), memory, machine)

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

    def notes(self) -> list[str]:
        """What there is to know about the limits: which models fit in a cache, and where decoding beat the probe."""
        lines = []
        for what, results in self._by_weights().items():
            cached = [result for result in results if result.fits_in_cache]
            if cached:
                size = _range([result.bytes_per_step / 2**20 for result in cached], "MiB")
                speed = _range([result.limit_bytes_per_second / 1e9 for result in cached], "GB/s")
                lines.append(f"{what}: the {size} read for a token fit in a cache; the limit is its {speed}")
            raised = [result.limit_bytes_per_second / 1e9 for result in results if result.limit_was_raised]
            if raised:
                speed = _range(raised, "GB/s")
                lines.append(f"{what}: decoding read faster than the probe, so the limit was raised to {speed}")
        return lines

    def _by_weights(self) -> dict[str, list[Result]]:
        found: dict[str, list[Result]] = {}
        for result in self.results:
            found.setdefault(f"{result.model}, {weights_label(result.dtype, result.bits)}", []).append(result)
        return found

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


def _range(values: Sequence[float], unit: str) -> str:
    ends = dict.fromkeys(f"{value:,.1f}" for value in (min(values), max(values)))
    return f"{' to '.join(ends)} {unit}"


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
                percent(figures.bandwidth_share),
                "" if figures.watts is None else f"{figures.watts:.1f}",
            ]
        )
    if ratios := result.ratios():
        numbers = [f"{ratios[name]:.2f}" for name in ("prefill", "decode", "first_token", "peak_memory")]
        rows.append([*[""] * len(about), "ratio", *numbers, "", ""])
    return rows
