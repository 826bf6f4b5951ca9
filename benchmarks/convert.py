"""Time and peak memory of converting a full-size model to 4 bits: openelm-mlx against mlx-lm.

python benchmarks/convert.py [--size 1.1B] [--dtype float32] [--rounds 3]
"""

import argparse
import shutil
import sys
from pathlib import Path

from common import Run, model_folder, report, run, summary

from mlx_openelm.machine.device import DTYPES


def measure(source: Path, size: str, dtype: str, rounds: int) -> None:
    target = source.parent / "converted"
    ours: list[str | Path] = [
        sys.executable,
        "-m",
        "mlx_openelm",
        "convert",
        source,
        "--output",
        target,
        "--quantize",
        "4",
    ]
    peer: list[str | Path] = [
        sys.executable,
        "-m",
        "mlx_lm",
        "convert",
        "--hf-path",
        source,
        "--mlx-path",
        target,
        "-q",
    ]
    runs: dict[str, list[Run]] = {"openelm-mlx": [], "mlx-lm": []}
    for _ in range(rounds):
        for name, command in (("openelm-mlx", ours), ("mlx-lm", peer)):
            shutil.rmtree(target, ignore_errors=True)
            runs[name].append(run(command))
            print(f"  {name}: {runs[name][-1].seconds:.1f} s", file=sys.stderr)
    seconds = {name: summary([r.seconds for r in done]) for name, done in runs.items()}
    peak = {name: summary([r.peak_bytes / 2**20 for r in done]) for name, done in runs.items()}
    ratios = {
        "seconds": seconds["openelm-mlx"]["median"] / seconds["mlx-lm"]["median"],
        "peak_memory": peak["openelm-mlx"]["median"] / peak["mlx-lm"]["median"],
    }
    rows = [["", "seconds (median)", "peak memory, MiB (median)"]]
    rows += [[name, f"{seconds[name]['median']:.1f}", f"{peak[name]['median']:,.0f}"] for name in runs]
    rows += [["ratio", f"{ratios['seconds']:.2f}", f"{ratios['peak_memory']:.2f}"]]
    report(
        "convert", rows, {"model": size, "dtype": dtype, "seconds": seconds, "peak_memory_mib": peak, "ratios": ratios}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.1B")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="type of the source's tensors")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with model_folder(arguments.size, DTYPES[arguments.dtype]) as source:
        measure(source, arguments.size, arguments.dtype, arguments.rounds)


if __name__ == "__main__":
    main()
