"""Every check of the self-test on tiny networks: it passes, and it finds the fault that it is there for."""

import sys
from dataclasses import replace

import mlx.core as mx
import pytest
from host_kernels import HostKernels
from mlx.utils import tree_map

from conftest import FixedProbe
from mlx_openelm.benchmark import measure
from mlx_openelm.cache.kv_cache import KVCache, StepCache
from mlx_openelm.cache.layouts import QuantizedKV, RotatingKV
from mlx_openelm.generation import engine
from mlx_openelm.generation.sampling import Sampler
from mlx_openelm.kernels import fused as kernels
from mlx_openelm.machine import compiler
from mlx_openelm.machine.device import choices, replaced_choices
from mlx_openelm.model import cpu_layers, fused_attention
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.self_test import fused, logits, memory, open_choices, samples, speed, suite
from mlx_openelm.self_test.check import Skip
from mlx_openelm.self_test.runner import run_checks
from mlx_openelm.self_test.session import Extent, Session
from mlx_openelm.training.gradients import LayerwiseBackward

EXTENT = Extent(
    sampled_sizes=("tiny",),
    trained_size="tiny",
    steps=6,
    greedy_tokens=12,
    memory_tokens=40,
    sizes=("tiny",),
    compared_sizes=("tiny",),
    prompt_tokens=8,
    measured_tokens=4,
    contexts=(8,),
    rounds=1,
)


@pytest.fixture
def tiny(monkeypatch, tiny_config):
    """The self-test with a tiny network in place of the published ones."""
    config = replace(tiny_config, max_context_length=2048)
    for module in (samples, logits, fused, speed):
        monkeypatch.setattr(module, "PRESETS", {"tiny": config})
    samples.sample_arrays.cache_clear()
    monkeypatch.setattr(Session, "memory", FixedProbe(1e9))
    monkeypatch.setattr(measure, "BandwidthProbe", lambda nbytes: FixedProbe(1e9))
    monkeypatch.setattr(memory, "_ALLOWED", 1 << 13)


def found(*names, extent=EXTENT):
    """Outcomes of the checks with these words in their names, by name."""
    report = run_checks(suite.selected(suite.all_checks(extent), names), Session(extent))
    return {row.name: row.outcome for row in report.rows}


def status(*names, extent=EXTENT):
    """The one status of these checks."""
    (one,) = {outcome.status for outcome in found(*names, extent=extent).values()}
    return one


@pytest.mark.usefixtures("tiny")
class TestSound:
    def test_on_the_cpu_everything_passes_that_applies(self):
        outcomes = found()
        assert {name: o.found for name, o in outcomes.items() if o.status == "failed"} == {}
        assert {name for name, outcome in outcomes.items() if outcome.status == "skipped"} == {
            "CPU's logits, widths of tiny",
            "fused kernels",
            "fused_kernels, both ways the same",
            "fused_kernels on and off, tiny after 8",
        }
        assert outcomes["speed, tiny"].figures["figures"]["openelm-mlx"]["decode_tokens_per_second"]["median"] > 0
        timed = outcomes["tokens_first on and off, tiny after 8"].figures
        assert timed["figures"].keys() == {"tokens_first=1", "tokens_first=0"}
        assert timed["default"] is False

    def test_another_device_is_compared_with_the_cpu(self, monkeypatch):
        monkeypatch.setattr(Session, "is_on_cpu", False)
        assert status("CPU's logits") == "passed"

    def test_products_of_tf32_are_named_with_what_to_set(self, monkeypatch):
        monkeypatch.setattr(Session, "has_exact_products", False)
        outcome = found("float32 products")["float32 products"]
        assert (outcome.status, outcome.found) == ("measured", "TF32")
        assert "MLX_ENABLE_TF32=0" in outcome.advice

    def test_what_does_not_fit_is_skipped(self, monkeypatch):
        monkeypatch.setattr(speed, "memory_limit_bytes", lambda: 1000)
        assert found("speed, tiny")["speed, tiny"].found.startswith("needs ")

    def test_what_takes_too_long_is_skipped(self, monkeypatch):
        monkeypatch.setattr(Session, "memory", FixedProbe(1.0))
        with pytest.raises(Skip, match="would take about"):
            speed.random_of_size("tiny", None, speed.Case(8, 4), 2, Session(EXTENT))


def scaled(function, factor=1.05):
    """A function whose floating-point results are wrong by 5 %."""

    def wrong(*args, **options):
        return tree_map(
            lambda x: x * factor if isinstance(x, mx.array) and x.dtype == mx.float32 else x, function(*args, **options)
        )

    return wrong


def compiled_wrongly(patch):
    patch.setattr(compiler.mx, "compile", scaled)


def wrong_positions(patch):
    before = StepCache.positions.fget
    patch.setattr(StepCache, "positions", property(lambda cache: before(cache) + 1))


def wrong_quantized_attention(patch):
    patch.setattr(QuantizedKV, "attend_masked", scaled(QuantizedKV.attend_masked))


def sinks_that_stay(patch):
    patch.setattr(RotatingKV, "_rotated_sinks", lambda self, keys, shift: keys[..., : self.sinks, :])


def rows_without_offsets(patch):
    patch.setattr(KVCache, "row_offsets", property(lambda cache: None))


def wrong_products(patch):
    patch.setattr(cpu_layers, "_multiply", scaled(cpu_layers._multiply))


def wrong_layers(patch):
    patch.setattr(LayerwiseBackward, "_layer_gradients", scaled(LayerwiseBackward._layer_gradients))


def wrong_logits(patch):
    patch.setattr(OpenELM, "logits", scaled(OpenELM.logits))


def wrong_device(patch):
    """As if the device were another one, and wrong."""
    before = OpenELM.logits
    patch.setattr(Session, "is_on_cpu", False)
    patch.setattr(OpenELM, "logits", lambda self, x: (before if compiler._plain else scaled(before))(self, x))


def wrong_choice(patch):
    before = Sampler.choose_rows

    def choose(self, logits, state):
        tokens, *rest = before(self, logits, state)
        return tokens + bool(choices().tokens_first), *rest

    patch.setattr(Sampler, "choose_rows", choose)


def graph_that_grows(patch):
    patch.setattr(engine, "evaluate_step", lambda chosen, cache: mx.async_eval(chosen))


FAULTS = {
    "compiled decoding as plain": compiled_wrongly,
    "cached tokens as whole": wrong_positions,
    "8-bit KV, one by one": wrong_quantized_attention,
    "4-bit KV, one by one": wrong_quantized_attention,
    "KV window, one by one": sinks_that_stay,
    "full KV, one by one": wrong_positions,
    "batched rows as single": rows_without_offsets,
    "quantized weights, 3 bits": wrong_products,
    "quantized weights, nvfp4": wrong_products,
    "full step as the CPU's": compiled_wrongly,
    "LoRA step": compiled_wrongly,
    "layer by layer": wrong_layers,
    "stored logits, float32": wrong_logits,
    "CPU's logits": wrong_device,
    "tokens_first, both ways the same": wrong_choice,
    "memory, KV window with room": graph_that_grows,
}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_by_the_check_for_it(name, monkeypatch):
    FAULTS[name](monkeypatch)
    outcomes = found(name)
    assert {outcome.status for outcome in outcomes.values()} == {"failed"}, outcomes
    assert all("Error" not in outcome.found for outcome in outcomes.values()), outcomes


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("coroutines are Linux's")
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.mark.usefixtures("tiny")
class TestFusedKernels:
    """With the choices of a Mac, and kernels that run on the CPU, which takes them only uncompiled."""

    SHORT = replace(EXTENT, steps=2, greedy_tokens=2)

    @pytest.fixture(autouse=True)
    def mac(self, built, monkeypatch):
        monkeypatch.setattr(mx.fast, "metal_kernel", built)
        monkeypatch.setattr(Session, "dtypes", (mx.float32,))
        kernels.forget_kernels()
        with replaced_choices(backend="metal"), compiler.uncompiled():
            yield
        kernels.forget_kernels()

    def test_that_are_right_pass(self):
        assert status("fused kernels") == "passed"
        assert status("fused_kernels, both", extent=self.SHORT) == "passed"

    def test_that_do_not_compile_are_found(self, monkeypatch):
        def refuse(**options):
            raise RuntimeError("no such instruction")

        monkeypatch.setattr(mx.fast, "metal_kernel", refuse)
        (outcome,) = found("fused kernels").values()
        assert outcome.status == "failed"
        assert "no such instruction" in outcome.figures["reasons"][0]

    def test_that_are_wrong_only_within_a_network_are_found_with_what_to_set(self, monkeypatch):
        monkeypatch.setattr(fused_attention, "normalize_and_rotate", scaled(kernels.normalize_and_rotate, 1.5))
        assert status("fused kernels") == "passed"
        (outcome,) = found("fused_kernels, both", extent=self.SHORT).values()
        assert outcome.status == "failed"
        assert "OPENELM_MLX_CHOICES=fused_kernels=0" in outcome.advice


@pytest.mark.parametrize("on_is_faster", [True, False])
def test_a_default_that_is_slower_is_named_with_what_to_set(tiny, monkeypatch, on_is_faster):
    speeds = iter([120.0, 100.0] if on_is_faster else [100.0, 120.0])
    monkeypatch.setattr(open_choices, "_speed", lambda figures: next(speeds))
    (outcome,) = found("tokens_first on and off").values()
    assert ("OPENELM_MLX_CHOICES=tokens_first=1" in outcome.advice) == on_is_faster
    assert outcome.found.endswith("the default is off")
