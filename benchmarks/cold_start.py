"""Time to the first token of a new process: openelm-mlx against mlx-lm.

python benchmarks/cold_start.py [--model FOLDER] [--rounds 5]
"""

import argparse
import sys
from pathlib import Path

from common import in_turn, model_folder, report, run, summary

from mlx_openelm import convert


def measure(folder: Path, rounds: int) -> None:
    prompt = "Permission is hereby granted"
    ours: list[str | Path] = [
        sys.executable,
        "-m",
        "mlx_openelm",
        "generate",
        "-m",
        folder,
        "--prompt",
        prompt,
        "--max-tokens",
        "1",
    ]
    peer: list[str | Path] = [
        sys.executable,
        "-m",
        "mlx_lm",
        "generate",
        "--model",
        folder,
        "--prompt",
        prompt,
        "-m",
        "1",
    ]
    figures = in_turn(
        {"openelm-mlx": lambda: run(ours).seconds, "mlx-lm": lambda: run(peer).seconds},
        rounds,
    )
    medians = {name: summary(seconds) for name, seconds in figures.items()}
    ratio = medians["openelm-mlx"]["median"] / medians["mlx-lm"]["median"]
    rows = [["", "seconds (median)", "min", "max"]]
    rows += [[name, f"{s['median']:.2f}", f"{s['min']:.2f}", f"{s['max']:.2f}"] for name, s in medians.items()]
    report("cold_start", [*rows, ["ratio", f"{ratio:.3f}", "", ""]], {"seconds": medians, "ratio": ratio})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a converted folder; by default 270M with random weights in 4 bits")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.model:
        measure(arguments.model, arguments.rounds)
        return
    with model_folder("270M") as source:
        measure(convert(source, source.parent / "converted", quantize=4).folder, arguments.rounds)


if __name__ == "__main__":
    main()
