"""Every choice that depends on the device, and how to replace it."""

import dataclasses

import mlx.core as mx
import pytest

from mlx_openelm.errors import ConfigError
from mlx_openelm.machine import device
from mlx_openelm.machine.device import Choices, choices, compute_streams, on_cpu, reads_tokens_first, replaced_choices


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
