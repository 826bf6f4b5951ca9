import json
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from conftest import (
    ADAPTED_CONFIG as CONFIG,
    ADAPTER_TOKENS as TOKENS,
    ADAPTERS as METHODS,
    assert_close,
    random_model,
    write_folder,
)
from mlx_openelm import generate_tokens, load_model
from mlx_openelm.conversion.adapters.forms import open_adapter
from mlx_openelm.conversion.open import open_source
from mlx_openelm.errors import AdapterError, WeightsError
from mlx_openelm.merging import write_merged
from mlx_openelm.model.adapters import about_base, read_adapter, save_adapter
from mlx_openelm.model.lora import (
    adapter_parameters,
    add_adapter,
)
from mlx_openelm.tensors import save_arrays


class TestSaved:
    @pytest.fixture
    def adapter(self, tmp_path):
        model = random_model(CONFIG)
        add_adapter(model, METHODS["dora"])
        (tmp_path / "adapter").mkdir()
        tensors = adapter_parameters(model)
        save_adapter(tmp_path / "adapter", tensors, "dora", METHODS["dora"], about_base("base", CONFIG))
        return tmp_path / "adapter"

    def test_for_another_model_names_the_widths(self, adapter, tmp_path):
        wider = random_model(replace(CONFIG, ffn_multipliers=(1.0, 4.0)))
        folder = write_folder(tmp_path / "wider", wider)
        said = r"another model: transformer.layers.1.ffn.proj_1.lora_b .*\(4, 256\); .*needs \(4, 512\).*2 layers"
        with pytest.raises(AdapterError, match=said):
            load_model(folder, adapter=adapter)
        with pytest.raises(AdapterError, match=said):
            write_merged(open_source([folder]), open_adapter(adapter), tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def test_incomplete_or_damaged(self, adapter, tmp_path):
        folder = write_folder(tmp_path / "base", random_model(CONFIG))
        tensors = mx.load(str(adapter / "adapters.safetensors"))
        name = "transformer.layers.0.attn.qkv_proj.lora_b"
        mx.save_safetensors(str(adapter / "adapters.safetensors"), {n: t for n, t in tensors.items() if n != name})
        with pytest.raises(AdapterError, match=f"{name} is missing"):
            load_model(folder, adapter=adapter)
        (adapter / "adapters.safetensors").write_bytes(b"damaged")
        with pytest.raises(AdapterError, match="damaged"):
            load_model(folder, adapter=adapter)
        (adapter / "adapter_config.json").unlink()
        with pytest.raises(AdapterError, match="is not an adapter"):
            load_model(folder, adapter=adapter)
        with pytest.raises(AdapterError):
            load_model(folder, adapter=Path("missing"))


def test_full_tensors_take_the_places_of_the_models_own(tmp_path):
    model = random_model(CONFIG)
    folder = write_folder(tmp_path / "base", model)
    other = dict(tree_flatten(random_model(CONFIG, seed=1).parameters()))
    tensors = {name: a for name, a in other.items() if name.startswith("transformer.layers.1.")}
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", tensors, "full", None, about_base("base", CONFIG))
    expected = random_model(CONFIG)
    expected.update(tree_unflatten(list(tensors.items())))
    tokens = mx.array(TOKENS)
    loaded = load_model(folder, adapter=tmp_path / "adapter", dtype=mx.float32)
    assert_close(loaded(tokens), expected(tokens), 1e-5)
    write_merged(open_source([folder]), open_adapter(tmp_path / "adapter"), tmp_path / "merged")
    assert_close(load_model(tmp_path / "merged")(tokens), expected(tokens), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": ["x"]}, "base must be an object"),
        ({"base": 3}, "base must be an object; got 3"),
        ({"lora_parameters": {"scale": 10**400}}, "lora_parameters.scale must be a finite number"),
        ({"lora_parameters": {"scale": float("nan")}}, "lora_parameters.scale must be a finite number"),
        ({"lora_parameters": {"scale": 1.0, "dropout": "x" * 1000}}, r"dropout must be a number; got 'x+\.\.\.x+'"),
        ({"lora_parameters": {"scale": 1e7}}, "scale must be a number from -1,000,000 to 1,000,000; got 1"),
        ({"lora_parameters": {}}, "scale is missing"),
        ({"alpha": 1e39}, "alpha must be a finite number"),
        ({"alpha": True}, "alpha must be a number"),
        ({"fine_tune_type": "x" * 1000}, "unknown fine_tune_type"),
    ],
)
def test_settings_that_cannot_be_right_are_one_short_error(tmp_path, change, message):
    model = random_model(CONFIG)
    add_adapter(model, METHODS["lora"])
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", adapter_parameters(model), "lora", METHODS["lora"], about_base("base", CONFIG))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError, match=message) as found:
        read_adapter(tmp_path / "adapter")
    assert len(str(found.value)) < 300 + len(str(tmp_path))


def test_matrices_have_two_axes(tmp_path):
    model = random_model(CONFIG)
    add_adapter(model, METHODS["lora"])
    (tmp_path / "adapter").mkdir()
    tensors = adapter_parameters(model)
    name = next(iter(tensors))
    save_adapter(tmp_path / "adapter", tensors, "lora", METHODS["lora"], {})
    save_arrays(tmp_path / "adapter" / "adapters.safetensors", {**tensors, name: tensors[name][0]}, {})
    with pytest.raises(AdapterError, match=f"{name} must be a matrix"):
        read_adapter(tmp_path / "adapter")


def saved_with(tmp_path, method, **changed):
    """A saved adapter with other values for its tensors whose names end so."""
    model = random_model(CONFIG)
    add_adapter(model, METHODS[method])
    (tmp_path / "adapter").mkdir()
    tensors = adapter_parameters(model)
    for name, array in tensors.items():
        end = name.rpartition(".")[2]
        tensors[name] = changed[end](array) if end in changed else array
    save_adapter(tmp_path / "adapter", adapter_parameters(model), method, METHODS[method], about_base("base", CONFIG))
    save_arrays(tmp_path / "adapter" / "adapters.safetensors", tensors, {})
    return tmp_path / "adapter"


@pytest.mark.parametrize("end", ["lora_a", "lora_b", "m"])
@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.bool_, mx.complex64])
def test_only_floating_point_numbers_are_an_adapter(tmp_path, end, dtype):
    folder = saved_with(tmp_path, "dora", **{end: lambda array: array.astype(dtype)})
    with pytest.raises(AdapterError, match=f"{end} has type {str(dtype).split('.')[-1]}"):
        read_adapter(folder)


@pytest.mark.parametrize("end", ["lora_a", "lora_b", "m"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, end, value):
    folder = saved_with(tmp_path, "dora", **{end: lambda array: mx.full(array.shape, value)})
    with pytest.raises(AdapterError, match=f"{end} contains NaN or infinity"):
        read_adapter(folder)


def test_a_rank_of_zero_is_refused(tmp_path):
    folder = saved_with(tmp_path, "lora", lora_a=lambda a: a[:, :0], lora_b=lambda b: b[:0])
    with pytest.raises(AdapterError, match=r"lora_a of shape \(\d+, 0\) is empty"):
        read_adapter(folder)


@pytest.mark.parametrize("change", [{"dropout": 1.0}, {"dropout": -0.5}])
def test_a_dropout_that_cannot_be_right_is_refused(tmp_path, change):
    folder = saved_with(tmp_path, "lora")
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    values["lora_parameters"].update(change)
    path.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="dropout must be at least 0 and below 1"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("method", "changed", "dtype"),
    [
        ("lora", {"lora_b": 1e5}, mx.float16),  # beyond float16
        ("lora", {"lora_a": 1e30, "lora_b": 1e30}, mx.float32),  # their product is beyond float32
        ("dora", {"lora_a": 1e15, "lora_b": 1e15}, mx.float32),  # the norm of a row is
    ],
)
def test_values_that_overflow_are_never_silent(tmp_path, method, changed, dtype):
    base = write_folder(tmp_path / "base", random_model(CONFIG))
    folder = saved_with(tmp_path, method, **{end: lambda a, v=v: mx.full(a.shape, v) for end, v in changed.items()})
    with pytest.raises(WeightsError, match=r"beyond the range|logits are not finite"):
        list(generate_tokens(load_model(base, adapter=folder, dtype=dtype), [1, 2, 3], max_tokens=2))
    with pytest.raises(WeightsError, match="beyond the range"):
        write_merged(open_source([base]), open_adapter(folder), tmp_path / "merged", dtype=dtype)
    assert not (tmp_path / "merged").exists()


def test_trained_matrices_that_overflow_are_refused(tmp_path):
    base = write_folder(tmp_path / "base", random_model(CONFIG))
    (tmp_path / "adapter").mkdir()
    tensors = {"transformer.norm.weight": mx.full((CONFIG.model_dim,), 1e5)}
    save_adapter(tmp_path / "adapter", tensors, "full", None, about_base("base", CONFIG))
    with pytest.raises(WeightsError, match=r"norm\.weight has values beyond the range of float16"):
        load_model(base, adapter=tmp_path / "adapter", dtype=mx.float16)
    save_arrays(tmp_path / "adapter" / "adapters.safetensors", {n: a.astype(mx.int32) for n, a in tensors.items()}, {})
    with pytest.raises(AdapterError, match=r"norm\.weight has type int32"):
        load_model(base, adapter=tmp_path / "adapter")


def test_progress_of_a_merge_ends_at_its_total(tmp_path, tokenizer):
    """The total is that of what is written, not of the source."""
    from mlx_openelm import Quantization, merge

    config = replace(CONFIG, max_context_length=128)
    model = random_model(config)
    write_folder(tmp_path / "base", model)
    add_adapter(model, METHODS["lora"])
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", adapter_parameters(model), "lora", METHODS["lora"], about_base("base", config))
    written, measured = [], []
    result = merge(
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "merged",
        quantization=Quantization.of(4, 32, None),
        tokenizer="none",
        on_progress=lambda *progress: written.append(progress),
        on_measuring=lambda *progress: measured.append(progress),
    )
    assert written[-1] == (result.output_bytes, result.output_bytes)
    assert {total for _, total in written} == {result.output_bytes}
    assert measured == [(done, 8) for done in range(9)]
