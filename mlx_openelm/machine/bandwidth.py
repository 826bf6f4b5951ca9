"""How fast this machine reads memory: the limit of decoding, which reads all weights for every token."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from .device import backend_in_use

LARGE_BYTES = 1 << 28  # an array that does not fit into caches
SAMPLE_SECONDS = 0.15
_SMALLEST_PART = 4096  # bytes that a core reads at least
_PASS_BYTES = 1 << 28  # to read at least in a pass, so that starting it takes little of its time
_GPU_PASS_SECONDS = 0.02  # likewise; a GPU reads from 50 GB/s to several TB/s
_MOST_REPEATS = 256
_COLUMNS = 1024


class BandwidthProbe:
    """Reads an array again and again, by all cores or the GPU, and keeps the best speed seen.

    One reading says little: other programs, and on a shared machine its other guests, use the memory too. So take a
    sample between the runs that are compared with it.

    Args:
        nbytes: size of the array. One that fits into a cache shows the speed of that cache.
    """

    def __init__(self, nbytes: float = LARGE_BYTES):
        self.nbytes = int(min(max(nbytes, _SMALLEST_PART), LARGE_BYTES))
        self.best = 0.0  # bytes per second
        self._read: Callable[[], int] | None = None  # of the CPU, which keeps its array

    def sample(self, seconds: float = SAMPLE_SECONDS) -> float:
        """Read for this time, but at least three times; gives the best so far, in bytes per second.

        The array of a GPU is freed afterwards, because it would count as memory of what is measured next.
        """
        if backend_in_use() == "cpu":
            self._read = self._read or _cpu_reader(self.nbytes)
            self._time([self._read], seconds)
        else:
            self._time(_gpu_readers(self.nbytes), seconds)
            mx.clear_cache()
        return self.best

    def _time(self, reads: Sequence[Callable[[], int]], seconds: float) -> None:
        for read in reads:
            ends = time.perf_counter() + seconds / len(reads)
            passes = 0
            while passes < 3 or time.perf_counter() < ends:
                started = time.perf_counter()
                moved = read()
                self.best = max(self.best, moved / (time.perf_counter() - started))
                passes += 1


def _cpu_reader(nbytes: int) -> Callable[[], int]:
    """One pass of all cores, by NumPy: it is vectorized everywhere, and asks Linux for large pages.

    Without large pages the CPU spends a third to half of the time on finding pages. MLX's own reductions read at a
    third of the speed.
    """
    cores = usable_cores()
    count = max(nbytes // cores, _SMALLEST_PART) // 4
    repeats = max(1, round(_PASS_BYTES / (4 * count * cores)))
    # Written, because all pages that never were are one page of zeros. Repeated by a stride of 0, to stay in one call.
    parts = [np.broadcast_to(np.ones(count, np.int32), (repeats, count)) for _ in range(cores)]
    threads = ThreadPoolExecutor(cores, thread_name_prefix="openelm-mlx-bandwidth")
    moved = 4 * count * cores * repeats

    def read() -> int:
        list(threads.map(np.max, parts))
        return moved

    return read


def _gpu_readers(nbytes: int) -> list[Callable[[], int]]:
    """Passes of a GPU: a copy (reads and writes count), a matrix-vector product, and a maximum.

    Which one is fastest depends on the machine. A pass repeats it until starting it takes little of the time.
    """
    rows = max(1, nbytes // (4 * _COLUMNS))
    array = mx.ones((rows, _COLUMNS), mx.float32)
    vector = mx.ones((1, _COLUMNS), mx.float32)
    mx.eval(array, vector)

    def copies(repeats: int) -> list[mx.array]:
        copied = array
        for _ in range(repeats):
            copied = copied + 1
        return [copied]

    kinds: list[tuple[Callable[[int], list[mx.array]], int]] = [
        (copies, 2 * array.nbytes),
        (lambda repeats: [vector @ array.T for _ in range(repeats)], array.nbytes),
        (lambda repeats: [mx.max(array) for _ in range(repeats)], array.nbytes),
    ]
    return [_repeated(graph, moved) for graph, moved in kinds]


def _repeated(graph: Callable[[int], list[mx.array]], moved: int) -> Callable[[], int]:
    repeats = 1
    while repeats < _MOST_REPEATS:
        started = time.perf_counter()
        mx.eval(graph(repeats))
        if time.perf_counter() - started > _GPU_PASS_SECONDS:
            break
        repeats *= 2

    def read() -> int:
        mx.eval(graph(repeats))
        return moved * repeats

    return read


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
