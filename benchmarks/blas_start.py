"""What finding OpenBLAS costs at the start of a command, and what it brings: with it against OPENELM_MLX_BLAS=off.

python benchmarks/blas_start.py [--rounds 15]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial

from common import in_turn, report, summary

from mlx_openelm.machine.blas import VARIABLE, installed_blas

_LOADING = """
import time
from mlx_openelm.machine.blas import load_fast_blas
start = time.perf_counter()
assert load_fast_blas()
print(time.perf_counter() - start)
"""
GENERATE = ("generate", "--prompt", "Once upon a time there was", "--max-tokens", "1")


def command(setting: str, *words: str) -> tuple[float, str]:
    """Seconds and output of a command."""
    start = time.perf_counter()
    output = started(setting, "-m", "mlx_openelm", *words)
    return time.perf_counter() - start, output


def started(setting: str, *words: str) -> str:
    """Output of Python in a new process, with no library preloaded."""
    environment = {**os.environ, VARIABLE: setting}
    environment.pop("LD_PRELOAD", None)
    return subprocess.run(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def one_token(setting: str) -> float:
    """Seconds from the start of a command to its end, with one token in between."""
    return command(setting, *GENERATE)[0]


def loading() -> float:
    """Seconds that finding and loading the library take by themselves, in a new process."""
    return float(started("", "-c", _LOADING))


def matmul(setting: str) -> float:
    """GFLOP/s of float32 matrix products, as `doctor` measures them."""
    return float(json.loads(command(setting, "doctor", "--json")[1])["float32_matmul_gflops"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    library = next(installed_blas(), None)
    if library is None:
        raise SystemExit("no fast BLAS is installed")
    settings = {"found": "", "off": "off"}
    seconds = in_turn(
        {name: partial(one_token, setting) for name, setting in settings.items()},
        arguments.rounds,
    )
    gflops = in_turn({name: partial(matmul, setting) for name, setting in settings.items()}, 3)
    alone = summary([loading() for _ in range(arguments.rounds)])
    start = {name: summary(figures) for name, figures in seconds.items()}
    products = {name: summary(figures) for name, figures in gflops.items()}
    ratios = {
        "start": start["found"]["median"] / start["off"]["median"],
        "matmul": products["found"]["median"] / products["off"]["median"],
    }
    rows = [["", "one token, seconds (median)", "min", "max", "float32 products, GFLOP/s"]]
    for name, s in start.items():
        cells = [f"{s['median']:.3f}", f"{s['min']:.3f}", f"{s['max']:.3f}", f"{products[name]['median']:.1f}"]
        rows.append([name, *cells])
    rows.append(["ratio", f"{ratios['start']:.3f}", "", "", f"{ratios['matmul']:.1f}"])
    rows.append(["loading it alone", f"{alone['median']:.4f}", f"{alone['min']:.4f}", f"{alone['max']:.4f}", ""])
    report(
        "blas_start",
        rows,
        {"loading": alone, "library": library.name, "seconds": start, "gflops": products, "ratios": ratios},
    )


if __name__ == "__main__":
    main()
