"""Every choice that depends on the device, and how to replace it."""

import dataclasses
import re
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_openelm.errors import ConfigError
from mlx_openelm.machine import device
from mlx_openelm.machine.device import (
    Choices,
    backend_in_use,
    choices,
    compute_streams,
    device_name,
    gpu_name,
    limited_cache,
    memory_limit_bytes,
    on_cpu,
    peak_memory_bytes,
    reads_tokens_first,
    replaced_choices,
    rounds_float32,
    wired_memory,
)
from mlx_openelm.machine.doctor import _wired_limit
from mlx_openelm.machine.hardware import chip_name


@pytest.fixture
def environment(monkeypatch):
    """Sets the environment variable as if before the start."""

    def set_to(value):
        monkeypatch.setenv("OPENELM_MLX_CHOICES", value)
        device._from_environment.cache_clear()

    yield set_to
    device._from_environment.cache_clear()


class TestVersion:
    @pytest.mark.parametrize("version", ["0.32.1", "0.32.10", "0.33.0.dev20261101+abc", "1.0"])
    def test_new_enough(self, version):
        device._check_version(version)

    @pytest.mark.parametrize("version", ["0.32.0", "0.9.99", "0.30"])
    def test_too_old(self, version):
        with pytest.raises(ImportError, match=rf"version {version} is installed, but 0\.32\.1 or newer is needed"):
            device._check_version(version)

    def test_the_requirement_of_the_package_is_the_same(self):
        required = re.findall(r'"mlx(?:\[\w+\])?>=([\d.]+)', (Path(__file__).parents[1] / "pyproject.toml").read_text())
        assert required == [device._OLDEST_MLX] * 3


class TestReplacedChoices:
    def test_another_backend_brings_its_own(self):
        with replaced_choices(backend="cuda"):
            assert (choices().backend, choices().exact_slices, on_cpu()) == ("cuda", True, False)
            assert compute_streams() == (mx.default_stream(mx.default_device()),)

    def test_only_one_of_them(self):
        before = choices()
        with replaced_choices(attention_block=3):
            assert choices() == dataclasses.replace(before, attention_block=3)
        assert choices() == before

    def test_contexts_within_contexts_add_up(self):
        with replaced_choices(backend="metal"), replaced_choices(tokens_first=True):
            assert (choices().backend, choices().tokens_first) == ("metal", True)

    def test_an_error_within_does_not_stay(self):
        before = choices()
        with pytest.raises(KeyError), replaced_choices(attention_block=3):
            raise KeyError
        assert choices() == before


class TestEnvironment:
    def test_replaces_choices(self, environment):
        environment("tokens_first=1, attention_block=64")
        assert (choices().tokens_first, choices().attention_block) == (True, 64)

    def test_gives_way_to_a_context(self, environment):
        environment("attention_block=64")
        with replaced_choices(attention_block=3):
            assert choices().attention_block == 3

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("token_first=1", "unknown choice 'token_first'"),
            ("backend=cuda", "unknown choice 'backend'"),
            ("tokens_first", "tokens_first must be 0 or 1; got ''"),
            ("tokens_first=yes", "tokens_first must be 0 or 1; got 'yes'"),
            ("attention_block=0", "from 1 to"),
            ("attention_block=-1", "from 1 to"),
            ("attention_block=99999", "from 1 to"),
        ],
    )
    def test_what_is_wrong_is_named(self, environment, value, message):
        environment(value)
        with pytest.raises(ConfigError, match=message):
            choices()


class TestReadsTokensFirst:
    @pytest.mark.parametrize(("backend", "kv_bytes", "found"), [("metal", 1 << 20, False), ("metal", 1 << 27, True)])
    def test_where_copying_takes_longer_than_waiting(self, backend, kv_bytes, found):
        with replaced_choices(backend=backend):
            assert reads_tokens_first(kv_bytes) == found

    @pytest.mark.parametrize("backend", ["cpu", "cuda"])
    def test_not_where_nothing_is_copied(self, backend):
        with replaced_choices(backend=backend):
            assert not reads_tokens_first(1 << 40)

    @pytest.mark.parametrize("chosen", [False, True])
    def test_as_chosen(self, chosen):
        with replaced_choices(backend="metal", tokens_first=chosen):
            assert reads_tokens_first(1 << 40) == chosen


def test_every_backend_has_choices_of_its_own_name():
    assert all(isinstance(found, Choices) for found in device._DEFAULTS.values())
    assert all(found.backend == name for name, found in device._DEFAULTS.items())


CPU_INFO = {"device_name": "Apple M3", "architecture": "arm64"}  # all that MLX says about a CPU
GPU_INFO = {
    "metal": {"device_name": "Apple M3 Max", "max_recommended_working_set_size": 96 << 30, "memory_size": 128 << 30},
    "cuda": {"device_name": "NVIDIA H100", "total_memory": 80 << 30, "free_memory": 1 << 30},
}


@pytest.fixture
def machine(monkeypatch):
    """What MLX says on a machine with this GPU and this default device, and the wired limits that are set."""

    def become(gpu, default):
        def info(about=None):
            about = default if about is None else about
            return CPU_INFO if mx.Device(mx.cpu) == about else GPU_INFO[gpu]

        wired = []

        def set_wired_limit(limit):
            wired.append(limit)
            return 7

        monkeypatch.setattr(mx, "default_device", lambda: default)
        monkeypatch.setattr(mx, "device_info", info)
        monkeypatch.setattr(mx.metal, "is_available", lambda: gpu == "metal")
        monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
        monkeypatch.setattr(mx, "synchronize", lambda: None)
        monkeypatch.setattr(mx, "get_peak_memory", lambda: 5)
        return wired

    return become


class TestWhatMLXSays:
    """`mx.device_info` describes the default device unless told otherwise, and says little about a CPU."""

    def test_metal(self, machine):
        wired = machine("metal", mx.Device(mx.gpu))
        assert (backend_in_use(), gpu_name(), chip_name()) == ("metal", "Apple M3 Max", "Apple M3 Max")
        assert (device_name(), memory_limit_bytes(), peak_memory_bytes()) == ("Apple M3 Max (Metal)", 96 << 30, 5)
        with wired_memory():
            assert wired == [96 << 30]
        assert wired == [96 << 30, 7]

    @pytest.mark.parametrize("gpu", ["metal", "cuda", None])
    def test_the_cpu_beside_any_gpu(self, machine, monkeypatch, gpu):
        wired = machine(gpu, mx.Device(mx.cpu))
        monkeypatch.setattr(device, "physical_memory_bytes", lambda: 1000)
        assert (backend_in_use(), gpu_name(), device_name(), memory_limit_bytes()) == ("cpu", None, "CPU", 900)
        assert chip_name() not in ("Apple M3 Max", "NVIDIA H100", "GPU")
        assert peak_memory_bytes() > 1 << 20  # of the process
        assert _wired_limit() is None
        with wired_memory():
            pass
        assert wired == []

    def test_cuda(self, machine):
        wired = machine("cuda", mx.Device(mx.gpu, 1))
        assert (backend_in_use(), chip_name(), device_name()) == ("cuda", "NVIDIA H100", "NVIDIA H100 (CUDA)")
        assert memory_limit_bytes() == 80 << 30
        with wired_memory():
            pass
        assert wired == []

    def test_replaced_choices_move_nothing(self, machine):
        machine(None, mx.Device(mx.cpu))
        with replaced_choices(backend="metal"):
            assert (on_cpu(), backend_in_use(), device_name()) == (False, "cpu", "CPU")
            assert memory_limit_bytes() > 0
            with wired_memory():
                pass


class TestTF32:
    """MLX computes float32 products in TF32 where the GPU can, unless it is told not to."""

    @pytest.fixture(autouse=True)
    def by_default(self, monkeypatch):
        monkeypatch.delenv("MLX_ENABLE_TF32")  # the tests set it, so that all GPUs give the same

    @pytest.mark.parametrize(
        ("architecture", "system", "expected"),
        [
            ("applegpu_g17g", "26.2", True),  # M5
            ("applegpu_g17s", "27.0.1", True),
            ("applegpu_g17g", "26.1.9", False),
            ("applegpu_g16s", "26.2", False),  # M4
            ("applegpu_g17p", "26.2", False),  # of a phone
            ("applegpu_g18p", "26.2", True),
            ("", "26.2", False),
        ],
    )
    def test_metal(self, machine, monkeypatch, architecture, system, expected):
        machine("metal", mx.Device(mx.gpu))
        monkeypatch.setitem(GPU_INFO["metal"], "architecture", architecture)
        monkeypatch.setattr(device.platform, "mac_ver", lambda: (system, ("", "", ""), "arm64"))
        assert rounds_float32() == expected
        monkeypatch.setenv("MLX_ENABLE_TF32", "0")
        assert not rounds_float32()

    @pytest.mark.parametrize(("major", "expected"), [(7, False), (8, True), (9, True)])
    def test_cuda(self, machine, monkeypatch, major, expected):
        machine("cuda", mx.Device(mx.gpu))
        monkeypatch.setitem(GPU_INFO["cuda"], "compute_capability_major", major)
        assert rounds_float32() == expected

    def test_the_cpu(self, machine):
        machine("cuda", mx.Device(mx.cpu))
        assert not rounds_float32()


def test_the_document_says_the_choices_of_every_backend():
    document = (Path(__file__).parents[1] / "docs" / "engine.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \|", document, re.MULTILINE)
    said = {name: values for name, *values in rows}
    words = {True: "yes", False: "no", None: "auto"}
    for field in dataclasses.fields(Choices):
        if field.name != "backend":
            values = [getattr(device._DEFAULTS[backend], field.name) for backend in ("cpu", "metal", "cuda")]
            assert said.pop(field.name) == [words[v] if v is None or isinstance(v, bool) else str(v) for v in values]
    assert not said


class FakeMemory:
    """The limits of a Mac with 16 GB, which MLX keeps."""

    def __init__(self, monkeypatch):
        self.wired, self.cache, self.synchronized_at = 0, 15 << 30, []
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", lambda *device: {"max_recommended_working_set_size": 10 << 30})
        monkeypatch.setattr(mx, "set_wired_limit", self.set_wired)
        monkeypatch.setattr(mx, "set_cache_limit", self.set_cache)
        monkeypatch.setattr(mx, "synchronize", lambda: self.synchronized_at.append(self.wired))
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))

    def set_wired(self, limit):
        self.wired, before = limit, self.wired
        return before

    def set_cache(self, limit):
        self.cache, before = limit, self.cache
        return before


@pytest.fixture
def memory(monkeypatch):
    return FakeMemory(monkeypatch)


class TestWiredMemory:
    def test_is_set_within_the_context_alone(self, memory):
        with wired_memory():
            assert memory.wired == 10 << 30
        assert memory.wired == 0
        assert memory.synchronized_at == [10 << 30]  # before memory may be moved, nothing computes with it

    def test_stays_until_the_last_of_two_generators_ends(self, memory):
        def generate():
            with wired_memory():
                yield

        first, second = generate(), generate()
        next(first), next(second)
        first.close()  # the other's work may be in flight
        assert (memory.wired, memory.synchronized_at) == (10 << 30, [])
        second.close()
        assert memory.wired == 0

    def test_an_error_restores_it(self, memory):
        with pytest.raises(ZeroDivisionError), wired_memory():
            1 / 0  # noqa: B018
        assert memory.wired == 0

    def test_without_metal_nothing_is_set(self, memory, monkeypatch):
        monkeypatch.setattr(mx.metal, "is_available", lambda: False)
        with wired_memory():
            assert memory.wired == 0


class TestLimitedCache:
    def test_is_a_quarter_of_the_memory_within_the_context_alone(self, memory):
        with limited_cache():
            assert memory.cache == memory_limit_bytes() // 4
        assert memory.cache == 15 << 30

    def test_a_lower_limit_stays(self, memory):
        memory.cache = 1 << 20
        with limited_cache():
            assert memory.cache == 1 << 20
        assert memory.cache == 1 << 20

    def test_stays_until_the_last_of_two_contexts_ends(self, memory):
        contexts = limited_cache(), limited_cache()
        for context in contexts:
            context.__enter__()
        for context in contexts:
            assert memory.cache == memory_limit_bytes() // 4
            context.__exit__(None, None, None)
        assert memory.cache == 15 << 30
