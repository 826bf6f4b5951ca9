"""Writes `docs/benchmarks.md`, and the table in the README, from the results under `benchmarks/results/`.

python benchmarks/tables.py
"""

import re

from common import ROOT
from sections.evaluation import parity, scores
from sections.metal import launches
from sections.native import native
from sections.speed import bandwidth, batch, blas_start, cold_start, context, decode, decode_host, sizes, speculate
from sections.storage import convert, load, text_memory
from sections.training import train_cache, train_memory, tune, tune_arc, tune_memory, update

INTRODUCTION = """# Benchmarks

Each figure is a ratio of medians: the peer runs on the same folder in the same run, in turn (A B A B). The scripts
under `benchmarks/` make their own models with random weights, so that anyone can run them; `make bench` runs them all.
This page is written by `benchmarks/tables.py` from `benchmarks/results/`.

Nothing here ran on Apple silicon. Absolute numbers are those of the small machine named below each table.
"""


def main() -> None:
    sections = [cold_start(), decode(), decode_host(), sizes(), batch(), convert(), tune()]
    more = [
        native(),
        bandwidth(),
        blas_start(),
        load(),
        launches(),
        speculate(),
        context(),
        text_memory(),
        train_memory(),
        update(),
        train_cache(),
    ]
    more += [tune_memory(), tune_arc(), scores(), parity()]
    document = "\n".join([INTRODUCTION, *(section for section, _ in sections), *more])
    (ROOT / "docs" / "benchmarks.md").write_text(document, encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = "\n".join(["| | openelm-mlx | mlx-lm |", "|---|---|---|", *(row for _, row in sections)])
    pattern = r"(<!-- measured -->\n).*?(\n<!-- end -->)"
    readme = re.sub(pattern, lambda found: found[1] + rows + found[2], readme, flags=re.DOTALL)
    (ROOT / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
