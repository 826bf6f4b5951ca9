"""Time and peak memory of loading a full-size model: openelm-mlx, by default and in the stored type, against mlx-lm.

mlx-lm computes in the stored type and does not look for NaN or infinity. On a CPU this package computes in float32 by
default, so that a 16-bit model takes twice the memory; its peak is compared with the size of the network it became.
Each loads in a process of its own; importing the packages is not timed.

python benchmarks/load.py [--size 1.1B] [--dtype bfloat16] [--rounds 3]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import in_turn, model_folder, report, run, summary
from mlx.utils import tree_reduce

from mlx_openelm import load_model
from mlx_openelm.machine.device import DTYPES

OURS, STORED, PEER = "openelm-mlx", "openelm-mlx, stored type", "mlx-lm"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="1.1B")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="type of the folder's tensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", nargs=2, metavar=("CONTESTANT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load_once(arguments.load[0], Path(arguments.load[1]), DTYPES[arguments.dtype])
        return
    with model_folder(arguments.size, DTYPES[arguments.dtype]) as folder:
        measure(folder, arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, STORED, PEER)}

    def load(name: str) -> float:
        finished = run([sys.executable, Path(__file__), "--dtype", arguments.dtype, "--load", name, folder])
        found = json.loads(finished.output.splitlines()[-1])
        done[name].append({**found, "process_bytes": finished.peak_bytes})
        return float(found["seconds"])

    seconds = {k: summary(v) for k, v in in_turn({k: partial(load, k) for k in done}, arguments.rounds).items()}
    sizes = {name: runs[-1]["network_bytes"] for name, runs in done.items()}
    peaks = {
        kind: {name: summary([found[f"{kind}_bytes"] / 2**20 for found in runs[1:]]) for name, runs in done.items()}
        for kind in ("arrays", "process")
    }
    cpu = {name: summary([found["cpu"] for found in runs[1:]]) for name, runs in done.items()}
    above = {kind: {name: peaks[kind][name]["median"] * 2**20 / size for name, size in sizes.items()} for kind in peaks}
    ratio = seconds[STORED]["median"] / seconds[PEER]["median"]
    rows = [["", "seconds", "seconds of all cores", "network, MiB", "peak of arrays", "peak of the process"]]
    rows += [
        [
            name,
            f"{seconds[name]['median']:.2f}",
            f"{cpu[name]['median']:.2f}",
            f"{size / 2**20:,.0f}",
            *(f"{above[kind][name]:.3f} of that" for kind in ("arrays", "process")),
        ]
        for name, size in sizes.items()
    ]
    report(
        "load",
        [*rows, ["stored type over mlx-lm", f"{ratio:.2f}", "", "", "", ""]],
        {
            "model": arguments.size,
            "dtype": arguments.dtype,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "network_bytes": sizes,
            "peak_mib": peaks,
            "peak_over_network": above,
            "ratio": ratio,
        },
    )


def load_once(name: str, folder: Path, stored: mx.Dtype) -> None:
    """Load the folder and print what that took."""
    load: Callable[[], Any]
    if name == PEER:
        from mlx_lm.utils import load_model as load_peer

        load = partial(load_peer, folder)
    else:
        load = partial(load_model, folder, dtype=stored if name == STORED else None)
    mx.reset_peak_memory()
    started, used = time.perf_counter(), time.process_time()
    loaded: Any = load()
    parameters = (loaded[0] if name == PEER else loaded).parameters()
    mx.eval(parameters)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    network_bytes = tree_reduce(lambda total, array: total + array.nbytes, parameters, 0)
    peak = mx.get_peak_memory()
    print(json.dumps({"seconds": seconds, "cpu": used, "arrays_bytes": peak, "network_bytes": network_bytes}))


if __name__ == "__main__":
    main()
