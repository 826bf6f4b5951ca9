"""Memory bandwidth: the probe of `openelm-mlx bench` beside a plain C reader, NumPy, and MLX's own operations.

All take turns, on arrays that no cache holds and on smaller ones, in several runs with new arrays.

python benchmarks/bandwidth.py
"""

import argparse
import ctypes
import mmap
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import report

from mlx_openelm.machine.bandwidth import LARGE_BYTES, BandwidthProbe, usable_cores
from mlx_openelm.machine.device import compute_streams

SIZES = {"256 MiB": LARGE_BYTES, "16 MiB": 16 << 20, "4 MiB": 4 << 20, "1 MiB": 1 << 20}
PROBE = "probe of bench"
REFERENCES = "C, pages of 2 MiB", "NumPy"
ALLOWED = 0.2
_READER = Path(__file__).parent / "read_memory.c"
_SOURCE_BYTES = 4  # of a float
_PASSES = 3  # of each in a turn, as many as a sample of the probe has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="for each size in a run")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as folder:
        reader = compile_reader(Path(folder))
        runs = []
        for number in range(options.runs):
            print(f"run {number + 1} of {options.runs}", file=sys.stderr)
            runs.append({name: measure(reader, size, options.seconds) for name, size in SIZES.items()})
    names = list(runs[0][next(iter(SIZES))])
    rows = [["", *SIZES]]
    rows += [[name, *(" ".join(f"{run[size][name]:.1f}" for run in runs) for size in SIZES)] for name in names]
    ratios = {size: [run[size][PROBE] / max(run[size][name] for name in REFERENCES) for run in runs] for size in SIZES}
    rows.append(["probe over the best reference", *(" ".join(f"{r:.2f}" for r in ratios[size]) for size in SIZES)])
    rows = [list(row) for row in rows]
    report("bandwidth", rows, {"gb_per_second": runs, "ratios": ratios})
    off = [ratio for ratio in ratios["256 MiB"] if abs(ratio - 1) > ALLOWED]
    if off:
        raise SystemExit(f"the probe is more than {ALLOWED:.0%} from the best reference in {len(off)} runs")


def compile_reader(folder: Path) -> Callable[[np.ndarray[Any, Any], int], None]:
    """The C reader as a function of an array and the number of times to read it."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("a C compiler is needed")
    library = folder / "read_memory.so"
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, "-o", str(library), str(_READER)], check=True)
    function = ctypes.CDLL(str(library)).read_memory
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]
    function.restype = ctypes.c_float

    def read(array: np.ndarray[Any, Any], repeats: int) -> None:
        function(array.ctypes.data, array.size, usable_cores(), repeats)

    return read


def measure(reader: Callable[[np.ndarray[Any, Any], int], None], nbytes: int, seconds: float) -> dict[str, float]:
    """GB/s of each way to read an array of this size: the best of all turns."""
    probe = BandwidthProbe(nbytes)
    ways = readers(reader, nbytes)
    repeats = max(1, LARGE_BYTES // nbytes)
    best = dict.fromkeys([*ways, PROBE], 0.0)
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for name, read in ways.items():
            for _ in range(_PASSES):
                started = time.perf_counter()
                read(repeats)
                best[name] = max(best[name], nbytes * repeats / (time.perf_counter() - started) / 1e9)
        best[PROBE] = probe.sample(0) / 1e9
    return best


def readers(reader: Callable[[np.ndarray[Any, Any], int], None], nbytes: int) -> dict[str, Callable[[int], object]]:
    """Functions that read an array a given number of times."""
    cores = usable_cores()
    count = nbytes // _SOURCE_BYTES
    large_pages = np.ones(count, np.float32)  # NumPy asks Linux for them
    small_pages = np.frombuffer(without_large_pages(nbytes), np.float32)
    parts = np.split(large_pages, cores)
    streams = compute_streams()
    matrices = [mx.ones((count // len(streams) // 1024, 1024)) for _ in streams]
    vector = mx.ones((1, 1024))
    mx.eval(matrices, vector)
    pool = ThreadPoolExecutor(cores)

    def numpy_max(repeats: int) -> None:
        list(pool.map(lambda part: [part.max() for _ in range(repeats)], parts))

    def mlx(operation: Callable[[mx.array, mx.Stream], mx.array]) -> Callable[[int], None]:
        return lambda repeats: mx.eval(
            [operation(part, stream) for part, stream in zip(matrices, streams, strict=True) for _ in range(repeats)]
        )

    return {
        "C, pages of 4 KiB": lambda repeats: reader(small_pages, repeats),
        "C, pages of 2 MiB": lambda repeats: reader(large_pages, repeats),
        "NumPy": numpy_max,
        "MLX, vector times matrix": mlx(lambda part, stream: mx.matmul(vector, part.T, stream=stream)),
        "MLX, maximum": mlx(lambda part, stream: mx.max(part, stream=stream)),
    }


def without_large_pages(nbytes: int) -> mmap.mmap:
    """Memory that was written, in pages of the usual size."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory.write(np.ones(nbytes // _SOURCE_BYTES, np.float32).tobytes())
    return memory


if __name__ == "__main__":
    main()
