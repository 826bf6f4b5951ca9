"""Every choice that depends on the device, and how to replace it."""

import dataclasses

import mlx.core as mx
import pytest

from mlx_openelm.errors import ConfigError
from mlx_openelm.machine import device
from mlx_openelm.machine.device import (
    Choices,
    choices,
    compute_streams,
    limited_cache,
    memory_limit_bytes,
    on_cpu,
    replaced_choices,
    wired_memory,
)


@pytest.fixture
def environment(monkeypatch):
    """Sets the environment variable as if before the start."""

    def set_to(value):
        monkeypatch.setenv("OPENELM_MLX_CHOICES", value)
        device._from_environment.cache_clear()

    yield set_to
    device._from_environment.cache_clear()


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
        with pytest.raises(ValueError), replaced_choices(attention_block=3):
            raise ValueError
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


def test_every_backend_has_choices_of_its_own_name():
    assert all(isinstance(found, Choices) for found in device._DEFAULTS.values())
    assert all(found.backend == name for name, found in device._DEFAULTS.items())


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
    def test_is_an_eighth_of_the_memory_within_the_context_alone(self, memory):
        with limited_cache():
            assert memory.cache == memory_limit_bytes() // 8
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
            assert memory.cache == memory_limit_bytes() // 8
            context.__exit__(None, None, None)
        assert memory.cache == 15 << 30
