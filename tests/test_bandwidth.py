import threading

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm.machine import bandwidth
from mlx_openelm.machine.bandwidth import LARGE_BYTES, BandwidthProbe


class Clock:
    """A clock that passes of known durations move."""

    def __init__(self, durations):
        self.now = 0.0
        self.durations = iter(durations)

    def perf_counter(self):
        return self.now

    def read(self):
        self.now += next(self.durations)
        return 100


def test_the_best_of_all_passes_and_samples_counts(monkeypatch):
    clock = Clock([2.0, 1.0, 4.0, 0.5, 5.0, 5.0])
    monkeypatch.setattr(bandwidth, "time", clock)
    monkeypatch.setattr(bandwidth, "backend_in_use", lambda: "cpu")
    monkeypatch.setattr(bandwidth, "_cpu_reader", lambda nbytes: clock.read)
    probe = BandwidthProbe()
    assert probe.sample(seconds=0) == 100.0  # three passes; the second took a second
    assert probe.sample(seconds=6) == 200.0  # three more, because the time was over by then
    assert clock.now == 17.5


def test_the_array_has_the_size_asked_for_up_to_what_no_cache_holds():
    assert BandwidthProbe().nbytes == LARGE_BYTES
    assert BandwidthProbe(1e12).nbytes == LARGE_BYTES
    assert BandwidthProbe(1_000_000.5).nbytes == 1_000_000
    assert BandwidthProbe(1).nbytes > 1


@pytest.mark.parametrize("nbytes", [1 << 26, 1 << 20, 5000])
def test_all_cores_read_arrays_that_were_written(nbytes, monkeypatch):
    seen = []
    monkeypatch.setattr(bandwidth, "_PASS_BYTES", 1 << 22)
    monkeypatch.setattr(bandwidth, "usable_cores", lambda: 3)
    largest = np.max
    monkeypatch.setattr(np, "max", lambda part: seen.append((threading.current_thread().name, part)) or largest(part))
    moved = bandwidth._cpu_reader(nbytes)()
    parts = [part for _, part in seen]
    assert len(parts) == 3
    assert all(part.min() == 1 for part in parts)
    assert moved == sum(part.size * part.itemsize for part in parts) >= 1 << 21
    in_memory = sum(part.strides[1] * part.shape[1] for part in parts)
    assert in_memory == pytest.approx(max(nbytes, 3 * 4096), rel=0.01)
    assert all(name.startswith("openelm-mlx-bandwidth") for name, _ in seen)


def test_a_probe_gives_a_speed_and_no_array_of_mlx_stays():
    before = mx.get_active_memory()
    assert 1e8 < BandwidthProbe(1 << 22).sample(seconds=0) < 1e14
    assert mx.get_active_memory() == before


def test_the_passes_of_a_gpu_count_what_they_move(monkeypatch):
    monkeypatch.setattr(bandwidth, "_GPU_PASS_SECONDS", 0)
    monkeypatch.setattr(bandwidth, "backend_in_use", lambda: "metal")
    assert [read() for read in bandwidth._gpu_readers(1 << 20)] == [2 << 20, 1 << 20, 1 << 20]
    before = mx.get_active_memory()
    assert BandwidthProbe(1 << 20).sample(seconds=0) > 0
    assert mx.get_active_memory() == before


def test_the_passes_of_a_gpu_are_repeated_until_starting_them_hardly_counts(monkeypatch):
    clock = Clock([0.001, 0.002, 0.03, 0.04])
    monkeypatch.setattr(bandwidth, "time", clock)
    monkeypatch.setattr(bandwidth, "_GPU_PASS_SECONDS", 0.02)
    asked = []
    read = bandwidth._repeated(lambda repeats: asked.append(repeats) or [mx.array(clock.read())], 10)
    assert asked == [1, 2, 4]
    assert read() == 40
