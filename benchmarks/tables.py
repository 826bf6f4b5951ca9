"""Write `docs/benchmarks.md`, and the table of the README, from the results under `benchmarks/results/`.

python benchmarks/tables.py
"""

import json
import re
from typing import Any

from common import RESULTS, ROOT

INTRODUCTION = """# Benchmarks

Each figure is a ratio of medians: the peer runs on the same folder in the same run, in turn (A B A B). The scripts
under `benchmarks/` make their own models with random weights, so that anyone can run them; `make bench` runs them all.
This page is written by `benchmarks/tables.py` from `benchmarks/results/`.

Nothing here ran on Apple silicon. Absolute numbers are those of the small machine named below each table.
"""


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def where(run: dict[str, Any]) -> str:
    machine = run["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    blas = f", {machine['preloaded']} preloaded" if machine["preloaded"] else ""
    return (
        f"{machine['date']}, {machine['device']} of a {machine['system']} machine with {machine['cores']} cores{blas}; "
        f"Python {machine['python']}, {versions}; commit {machine['commit']}.\n\n`{machine['command']}`"
    )


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cold_start() -> tuple[str, str]:
    run = result("cold_start")
    rows = [[name, f"{s['median']:.2f}", f"{s['min']:.2f} to {s['max']:.2f}"] for name, s in run["seconds"].items()]
    text = table(["", "seconds", "from to"], [*rows, ["ratio", f"**{run['ratio']:.2f}**", ""]])
    section = f"## First token of a cold process\n\n270M with random weights in 4 bits.\n\n{text}\n\n{where(run)}\n"
    seconds = [f"{s['median']:.1f} s" for s in run["seconds"].values()]
    return section, f"| first token of a cold process, 270M in 4 bits, CPU | {seconds[0]} | {seconds[1]} |"


def decode() -> tuple[str, str]:
    run = result("decode")
    rates = run["tokens_per_second"]
    rows = [[name, f"{s['median']:.2f}", f"{s['min']:.2f} to {s['max']:.2f}"] for name, s in rates.items()]
    text = table(["", "tokens/s", "from to"], [*rows, ["ratio", f"**{run['ratio']:.1f}**", ""]])
    note = (
        "270M with random weights in 4 bits, with the defaults of both. mlx-lm computes in the stored bfloat16, for\n"
        "which MLX's CPU backend has no fast path; this package computes in float32 there and on all cores."
    )
    values = [f"{s['median']:.1f} tokens/s" for s in rates.values()]
    return f"## Decoding on a CPU\n\n{note}\n\n{text}\n\n{where(run)}\n", (
        f"| decoding with defaults, 270M in 4 bits, CPU | {values[0]} | {values[1]} |"
    )


def convert() -> tuple[str, str]:
    run = result("convert")
    seconds, peak = run["seconds"], run["peak_memory_mib"]
    rows = [[name, f"{seconds[name]['median']:.1f}", f"{peak[name]['median']:,.0f}"] for name in seconds]
    ratios = run["ratios"]
    rows += [["ratio", f"**{ratios['seconds']:.2f}**", f"**{ratios['peak_memory']:.2f}**"]]
    text = table(["", "seconds", "peak memory, MiB"], rows)
    title = f"## Converting {run['model']} in {run['dtype']} to 4 bits"
    values = [f"{seconds[name]['median']:.1f} s, {peak[name]['median']:,.0f} MiB" for name in seconds]
    return f"{title}\n\n{text}\n\n{where(run)}\n", f"| converting 1.1B to 4 bits, CPU | {values[0]} | {values[1]} |"


def train_memory() -> str:
    run = result("train_memory")
    peak, process, seconds = run["peak_memory_mib"], run["process_memory_mib"], run["seconds"]
    rows = [
        [name, *(f"{figures[name]['median']:,.0f}" for figures in (peak, process)), f"{seconds[name]['median']:.1f}"]
        for name in peak
    ]
    text = table(["", "arrays, MiB", "growth of the process, MiB", "seconds"], rows)
    shape = run["shape"]
    note = (
        f"Loss and gradients of {shape['sequence']:,} tokens in float32, vocabulary {shape['vocab']:,}, "
        f"{shape['layers']} layers of\nwidth {shape['model_dim']}. Whole logits are computed with MLX's own means. "
        f"With layers recomputed, the chunked\nloss takes **{run['ratio']:.2f}** of the memory of whole logits."
    )
    return f"## Memory of a training step\n\n{note}\n\n{text}\n\n{where(run)}\n"


def main() -> None:
    sections = [cold_start(), decode(), convert()]
    document = "\n".join([INTRODUCTION, *(section for section, _ in sections), train_memory()])
    (ROOT / "docs" / "benchmarks.md").write_text(document, encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = "\n".join(["| | openelm-mlx | mlx-lm |", "|---|---|---|", *(row for _, row in sections)])
    pattern = r"(<!-- measured -->\n).*?(\n<!-- end -->)"
    readme = re.sub(pattern, lambda found: found[1] + rows + found[2], readme, flags=re.DOTALL)
    (ROOT / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
