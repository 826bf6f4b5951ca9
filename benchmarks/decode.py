"""Tokens per second after the first token, with the defaults of `openelm-mlx generate` and of `mlx_lm.generate`.

python benchmarks/decode.py [--model FOLDER] [--tokens 32] [--rounds 3]
"""

import argparse
import json
import re
import sys
from pathlib import Path

from common import in_turn, model_folder, report, run, summary

from mlx_openelm import convert


def measure(folder: Path, tokens: int, rounds: int) -> None:
    prompt = "Permission is hereby granted"
    count = ["--max-tokens", str(tokens)]
    ours: list[str | Path] = [
        sys.executable,
        "-m",
        "mlx_openelm",
        "generate",
        "-m",
        folder,
        "--prompt",
        prompt,
        *count,
        "--json",
    ]
    peer: list[str | Path] = [sys.executable, "-m", "mlx_lm", "generate", "--model", folder, "--prompt", prompt, *count]

    def our_rate() -> float:
        return json.loads(run(ours).output)["stats"]["decode_tokens_per_second"]

    def peer_rate() -> float:
        found = re.search(r"Generation: \d+ tokens, ([\d.]+) tokens-per-sec", run(peer).output)
        assert found, "mlx-lm prints its speed in another way now"
        return float(found[1])

    figures = in_turn({"openelm-mlx": our_rate, "mlx-lm": peer_rate}, rounds)
    rates = {name: summary(values) for name, values in figures.items()}
    ratio = rates["openelm-mlx"]["median"] / rates["mlx-lm"]["median"]
    rows = [["", "tokens/s (median)", "min", "max"]]
    rows += [[name, f"{s['median']:.2f}", f"{s['min']:.2f}", f"{s['max']:.2f}"] for name, s in rates.items()]
    figures_out = {"tokens_per_second": rates, "ratio": ratio, "tokens": tokens}
    report("decode", [*rows, ["ratio", f"{ratio:.1f}", "", ""]], figures_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a converted folder; by default 270M with random weights in 4 bits")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.model:
        measure(arguments.model, arguments.tokens, arguments.rounds)
        return
    with model_folder("270M") as source:
        folder = convert(source, source.parent / "converted", quantize=4).folder
        measure(folder, arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    main()
