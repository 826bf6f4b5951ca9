"""What a model's files may hold besides its weights, under which names, and what is refused."""

import json
import math
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import SMALL_CONFIG, assert_close, random_model, run, write_folder
from mlx_openelm import OpenELMError, convert, load_model, merge
from mlx_openelm.conversion import source as source_module
from mlx_openelm.conversion.describe import describe
from mlx_openelm.conversion.open import open_source
from mlx_openelm.conversion.source import plain_name
from mlx_openelm.errors import ConfigError, QuantizationError, WeightsError
from torch_writer import Tensor, save

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
EMBEDDING = "transformer.token_embeddings.weight"
NORM = "transformer.norm.weight"
QKV = "transformer.layers.1.attn.qkv_proj"


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL_CONFIG)


@pytest.fixture
def folder(tmp_path, model):
    return write_folder(tmp_path / "model", model)


def change(folder, function):
    """Rewrite the weights of a folder after a function has changed the arrays."""
    arrays = load_file(folder / "model.safetensors")
    arrays = function(arrays) or arrays
    save_file(arrays, folder / "model.safetensors")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class TestNames:
    @pytest.mark.parametrize(
        "prefix",
        ["_orig_mod.", "module.", "model.", "base_model.model.", "module._orig_mod.", "base_model.model.model.module."],
    )
    def test_prefixes_of_other_libraries_do_not_matter(self, folder, model, prefix):
        change(folder, lambda arrays: {prefix + name: array for name, array in arrays.items()})
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)

    def test_a_wrapped_module_does_not_matter(self, folder, model):
        change(folder, lambda arrays: {n.replace(".attn.", "._orig_mod.attn.module."): a for n, a in arrays.items()})
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)

    def test_the_network_without_its_output_is_read(self, folder, model):
        change(folder, lambda arrays: {name.removeprefix("transformer."): array for name, array in arrays.items()})
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)

    def test_two_tensors_for_one_name_are_refused(self, folder):
        change(folder, lambda arrays: {**arrays, f"module.{NORM}": arrays[NORM] + 1})
        with pytest.raises(WeightsError, match=f"two tensors for {NORM}; one is called "):
            load_model(folder)

    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "x.transformer.norm.weight", "model.", ""])
    def test_other_names_stay(self, name):
        assert plain_name(name) == name


BUFFERS = {
    "transformer.causal_mask": np.triu(np.full((4, 4), -np.inf, np.float32)),
    "transformer.position_ids": np.arange(8),
    "transformer.attention_mask": np.ones((4, 4), bool),
    "transformer.layers.0.attn.bias": np.ones((4, 4), np.uint8),
    "transformer.layers.0.attn.pos_embedding.inv_freq": np.ones(4),
    "transformer.cos_cached": np.ones((4, 4), np.float16),
    "num_batches_tracked": np.array(3),
}


class TestBuffers:
    def test_in_safetensors_do_not_matter(self, folder, model):
        change(folder, lambda arrays: {**arrays, **BUFFERS})
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)

    def test_in_torch_files_do_not_matter(self, folder, model, tmp_path):
        arrays = load_file(folder / "model.safetensors")
        tensors = {name: Tensor(array) for name, array in arrays.items()}
        tensors |= {name: Tensor(array, str(array.dtype)) for name, array in BUFFERS.items()}
        tensors["transformer.freqs_cis"] = Tensor(np.ones(4, np.complex64), "complex64")
        assert_close(load_model(save(tmp_path / "x.pt", tensors), config=folder)(TOKENS), model(TOKENS), 1e-5)

    @pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, bool])
    def test_integers_are_no_weights(self, folder, tmp_path, kind):
        arrays = load_file(folder / "model.safetensors")
        bad = arrays[NORM].astype(kind)
        tensors = {name: Tensor(array) for name, array in arrays.items()}
        tensors[NORM] = Tensor(bad, str(bad.dtype))
        change(folder, lambda arrays: {**arrays, NORM: bad})
        for source in (folder, save(tmp_path / "x.pt", tensors)):
            with pytest.raises(WeightsError, match=f"{NORM} has type .*; weights must be floating-point numbers"):
                load_model(source, config=folder)

    def test_an_unknown_tensor_of_floats_is_refused(self, folder):
        change(folder, lambda arrays: {**arrays, f"{QKV}.bias": np.zeros(4, np.float32)})
        with pytest.raises(WeightsError, match=f"unexpected: {QKV}.bias"):
            load_model(folder)


@pytest.mark.parametrize("layers", [3, 10_000])
def test_a_configuration_with_more_layers_is_refused_before_anything_is_built(folder, monkeypatch, layers):
    widths = {"num_query_heads": [4] * layers, "num_kv_heads": [2] * layers, "ffn_multipliers": [1.0] * layers}
    change_config(folder, num_transformer_layers=layers, qkv_multipliers=None, **widths)
    monkeypatch.setattr(source_module, "parameter_shapes", lambda config: pytest.fail("built"))
    with pytest.raises(WeightsError, match=rf"missing: transformer.layers.2 .* is {layers:,}, and .* 2 layers"):
        open_source([folder])


class TestTiedOutput:
    def test_that_equals_the_embedding_does_not_matter(self, folder, model):
        change(folder, lambda arrays: {**arrays, "lm_head.weight": arrays[EMBEDDING].copy()})
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)

    def test_that_equals_the_embedding_in_another_type_does_not_matter(self, folder, model):
        change(folder, lambda arrays: {**arrays, "lm_head.weight": arrays[EMBEDDING].astype(np.float64)})
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)

    @pytest.mark.parametrize("damage", ["one value", "fewer rows"])
    def test_that_differs_is_refused_before_anything_is_written(self, folder, tmp_path, damage):
        def add(arrays):
            output = arrays[EMBEDDING].copy()
            output[-1, -1] += 0.5
            return {**arrays, "lm_head.weight": output if damage == "one value" else output[:-1]}

        change(folder, add)
        with pytest.raises(WeightsError, match=r"lm_head\.weight differs .* share_input_output_layers"):
            convert(folder, tmp_path / "out", tokenizer="none")
        assert not (tmp_path / "out").exists()

    def test_of_an_untied_model_is_used(self, tmp_path):
        model = random_model(replace(SMALL_CONFIG, share_input_output_layers=False))
        folder = write_folder(tmp_path / "untied", model)
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)


class TestTorchFolders:
    """Folders whose weights are `pytorch_model.bin`, as older versions of transformers wrote them."""

    def torch_folder(self, folder, shards=1, index=True):
        arrays = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = ["pytorch_model.bin"]
        if shards > 1:
            names = [f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin" for number in range(shards)]
        places = {tensor: names[number % shards] for number, tensor in enumerate(arrays)}
        for name in names:
            save(folder / name, {n: Tensor(array) for n, array in arrays.items() if places[n] == name})
        if shards > 1 and index:
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
        return folder

    @pytest.mark.parametrize(("shards", "index"), [(1, False), (2, True), (2, False)])
    def test_are_read_and_converted(self, folder, model, tmp_path, shards, index):
        self.torch_folder(folder, shards, index)
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)
        convert(folder, tmp_path / "out", tokenizer="none", dtype="float32")
        assert_close(load_model(tmp_path / "out")(TOKENS), model(TOKENS), 1e-5)

    def test_a_missing_shard_is_named(self, folder):
        self.torch_folder(folder, 2)
        (folder / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(WeightsError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
            load_model(folder)

    def test_an_index_that_leads_elsewhere_is_refused(self, folder):
        self.torch_folder(folder, 2)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
        with pytest.raises(WeightsError, match="not a file of its folder"):
            load_model(folder)

    def test_safetensors_are_preferred(self, folder, model):
        save(folder / "pytorch_model.bin", {"a": Tensor(np.ones(3, np.float32))})
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)


class TestShards:
    def test_beside_a_whole_file_do_not_matter(self, folder, model):
        arrays = load_file(folder / "model.safetensors")
        for number in (1, 2):
            part = {n: a for place, (n, a) in enumerate(arrays.items()) if place % 2 == number - 1}
            save_file(part, folder / f"model-{number:05d}-of-00002.safetensors")
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)
        (folder / "model.safetensors").unlink()
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)


class TestFloat64:
    def test_is_converted_to_the_target_type(self, folder, model, tmp_path):
        change(folder, lambda arrays: {name: array.astype(np.float64) for name, array in arrays.items()})
        assert_close(load_model(folder)(TOKENS), model(TOKENS), 1e-5)
        convert(folder, tmp_path / "out", tokenizer="none")
        arrays = mx.load(str(tmp_path / "out" / "model.safetensors"))
        assert {array.dtype for array in arrays.values()} == {mx.bfloat16}
        assert mx.array_equal(arrays[NORM], model.transformer.norm.weight.astype(mx.bfloat16))

    @pytest.mark.parametrize(
        ("value", "dtype", "said"),
        [(1e39, "float32", "float32"), (3.4e38, "bfloat16", "bfloat16"), (7e4, "float16", "float16")],
    )
    def test_values_beyond_the_target_type_are_refused(self, folder, tmp_path, value, dtype, said):
        def grow(arrays):
            arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
            arrays[NORM][3] = value
            return arrays

        change(folder, grow)
        with pytest.raises(WeightsError, match=f"{NORM} has values beyond the range of {said}"):
            convert(folder, tmp_path / "out", tokenizer="none", dtype=dtype)
        assert not (tmp_path / "out").exists()
        with pytest.raises(WeightsError, match=f"{NORM} has values beyond the range of {said}"):
            load_model(folder, dtype=getattr(mx, dtype))


def test_an_average_that_overflows_is_refused(folder, tmp_path):
    def grow(arrays):
        arrays[NORM][0] = 3e38

    change(folder, grow)
    shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(WeightsError, match=f"{NORM} has values beyond the range of float32"):
        convert([folder, tmp_path / "other"], tmp_path / "out", dtype="float32", tokenizer="none")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, tiny_config):
    place = tmp_path_factory.mktemp("quantized")
    write_folder(place / "full", random_model(tiny_config))
    for name, arguments in {"affine": {"quantize": 4, "group_size": 32}, "mxfp4": {"mode": "mxfp4"}}.items():
        convert(place / "full", place / name, tokenizer="none", **arguments)
    return place


ENTRIES = {
    "group size": {"group_size": 64, "bits": 4, "mode": "affine"},
    "bits": {"group_size": 32, "bits": 8, "mode": "affine"},
    "a float": {"group_size": 32, "bits": 4.0, "mode": "affine"},
    "a boolean": {"group_size": 32, "bits": True},
    "a text": {"group_size": "32", "bits": 4},
    "mode": {"mode": "mxfp4"},
    "another mode": {"mode": "nvfp4", "bits": 4, "group_size": 16},
    "a mode that is a list": {"group_size": 32, "bits": 4, "mode": ["affine"]},
    "defaults": {},
    "a matrix": {"group_size": 32, "bits": 4, QKV: {"group_size": 64, "bits": 4}},
    "a matrix that is not quantized": {"group_size": 32, "bits": 4, QKV: False},
    "a matrix by a text": {"group_size": 32, "bits": 4, QKV: "4 bits"},
    "a list": [4, 32],
}


PARTS = {
    "biases missing": lambda a: a.pop(f"{QKV}.biases"),
    "scales missing": lambda a: a.pop(f"{QKV}.scales"),
    "scales with one axis": lambda a: a.update({f"{QKV}.scales": a[f"{QKV}.scales"].reshape(-1)}),
    "scales without axes": lambda a: a.update({f"{QKV}.scales": a[f"{QKV}.scales"][0, 0]}),
    "fewer scales": lambda a: a.update({f"{QKV}.scales": a[f"{QKV}.scales"][:-1]}),
    "fewer biases": lambda a: a.update({f"{QKV}.biases": a[f"{QKV}.biases"][:, :-1]}),
    "fewer rows": lambda a: a.update({f"{QKV}.weight": a[f"{QKV}.weight"][:-1]}),
    "fewer words": lambda a: a.update({f"{QKV}.weight": a[f"{QKV}.weight"][:, :-1]}),
    "one axis": lambda a: a.update({f"{QKV}.weight": a[f"{QKV}.weight"].reshape(-1)}),
    "weight of floats": lambda a: a.update({f"{QKV}.weight": a[f"{QKV}.weight"].astype(mx.float32)}),
    "weight of bytes": lambda a: a.update({f"{QKV}.weight": a[f"{QKV}.weight"].view(mx.uint8)}),
    "weight of signed words": lambda a: a.update({f"{QKV}.weight": a[f"{QKV}.weight"].view(mx.int32)}),
    "scales of integers": lambda a: a.update({f"{QKV}.scales": a[f"{QKV}.scales"].astype(mx.int32)}),
    "scales of bytes": lambda a: a.update({f"{QKV}.scales": a[f"{QKV}.scales"].astype(mx.uint8)}),
    "biases of integers": lambda a: a.update({f"{QKV}.biases": a[f"{QKV}.biases"].astype(mx.int8)}),
    "a norm with scales": lambda a: a.update({"transformer.norm.scales": mx.ones((1, 4))}),
    "biases of an unquantized matrix": lambda a: a.update({"transformer.norm.biases": mx.ones((1, 4))}),
    "the embedding with fewer rows": lambda a: a.update(
        {f"transformer.token_embeddings.{p}": a[f"transformer.token_embeddings.{p}"][:-1] for p in ("scales",)}
    ),
}


BAD_SCALES = {
    "NaN": ("affine", lambda s: set_first(s, math.nan), None, "NaN or infinity"),
    "infinity": ("affine", lambda s: set_first(s, math.inf), None, "NaN or infinity"),
    "a product beyond float32": ("affine", lambda s: set_first(s.astype(mx.float32), 3e38), None, "float32"),
    "a product beyond float16": ("affine", lambda s: set_first(s, 6e4), "float16", "float16"),
    "NaN in eight bits": ("mxfp4", lambda s: set_first(s, 255), None, "NaN, or values beyond"),
    "a product beyond float32 in eight bits": ("mxfp4", lambda s: set_first(s, 254), None, "beyond the range"),
    "a product beyond float16 in eight bits": ("mxfp4", lambda s: set_first(s, 142), "float16", "float16"),
}


class TestQuantizedParts:
    """Parts that contradict the `quantization` of config.json are refused when the model is opened."""

    @pytest.mark.parametrize("case", ENTRIES)
    def test_wrong_entries(self, quantized, tmp_path, case):
        folder = shutil.copytree(quantized / "affine", tmp_path / "model")
        change_config(folder, quantization=ENTRIES[case])
        self.refused_everywhere(folder, tmp_path, (ConfigError, QuantizationError))

    @pytest.mark.parametrize("case", PARTS)
    def test_wrong_parts(self, quantized, tmp_path, case):
        folder = shutil.copytree(quantized / "affine", tmp_path / "model")
        self.rewrite(folder, PARTS[case])
        self.refused_everywhere(folder, tmp_path, (QuantizationError, WeightsError))

    def test_biases_in_a_mode_without_them(self, quantized, tmp_path):
        folder = shutil.copytree(quantized / "mxfp4", tmp_path / "model")
        self.rewrite(folder, lambda a: a.update({f"{QKV}.biases": mx.ones(a[f"{QKV}.scales"].shape)}))
        self.refused_everywhere(folder, tmp_path, QuantizationError)

    def test_the_command_says_it_in_one_line(self, quantized, tmp_path):
        folder = shutil.copytree(quantized / "affine", tmp_path / "model")
        change_config(folder, quantization=ENTRIES["group size"])
        status, _, err = run("info", folder)
        assert status == 2
        assert err.count("\n") == 1
        assert "needs floats of shape (400, 2)" in err

    def test_an_entry_with_defaults_of_its_mode_is_read(self, quantized, tmp_path):
        folder = shutil.copytree(quantized / "mxfp4", tmp_path / "model")
        expected = load_model(folder, dtype=mx.float32)(TOKENS)
        change_config(folder, quantization={"mode": "mxfp4"})
        assert_close(load_model(folder, dtype=mx.float32)(TOKENS), expected, 1e-5)

    def test_other_types_of_scales_are_read(self, quantized, tmp_path):
        """Any of the floating-point types, as converters write them; both parts need not have the same."""
        folder = shutil.copytree(quantized / "affine", tmp_path / "model")
        expected = load_model(folder, dtype=mx.float32)(TOKENS)
        self.rewrite(folder, lambda a: a.update({n: v.astype(mx.float32) for n, v in a.items() if "scales" in n}))
        assert_close(load_model(folder, dtype=mx.float32)(TOKENS), expected, 1e-5)
        convert(folder, tmp_path / "full", dequantize=True, tokenizer="none", dtype="float32")
        assert_close(load_model(tmp_path / "full")(TOKENS), expected, 2e-2)
        convert(folder, tmp_path / "again", tokenizer="none")
        assert_close(load_model(tmp_path / "again", dtype=mx.float32)(TOKENS), expected, 1e-5)

    @pytest.mark.parametrize("case", BAD_SCALES)
    def test_scales_of_values_that_are_not_finite_are_refused(self, quantized, tmp_path, case):
        mode, damage, dtype, said = BAD_SCALES[case]
        folder = shutil.copytree(quantized / mode, tmp_path / "model")
        self.rewrite(folder, lambda a: a.update({f"{QKV}.scales": damage(a[f"{QKV}.scales"])}))
        with pytest.raises(WeightsError, match=f"{QKV}.*{said}"):
            load_model(folder, dtype=getattr(mx, dtype or "float32"))
        for dequantize in (False, True):
            with pytest.raises(WeightsError, match=f"{QKV}.*{said}"):
                convert(folder, tmp_path / "out", dequantize=dequantize, tokenizer="none", dtype=dtype or "float32")
        assert not (tmp_path / "out").exists()

    def rewrite(self, folder, function):
        arrays = mx.load(str(folder / "model.safetensors"))
        function(arrays)
        mx.eval(arrays)
        mx.save_safetensors(str(folder / "new.safetensors"), arrays)
        (folder / "new.safetensors").rename(folder / "model.safetensors")

    def refused_everywhere(self, folder, tmp_path, error):
        """By whatever opens a model, and nothing is written."""
        attempts = (
            lambda: describe(open_source([folder])),
            lambda: load_model(folder),
            lambda: convert(folder, tmp_path / "out", tokenizer="none"),
            lambda: convert(folder, tmp_path / "out", tokenizer="none", dequantize=True),
            lambda: convert(folder, tmp_path / "out", tokenizer="none", quantize=8),
            lambda: convert([folder, folder], tmp_path / "out", tokenizer="none"),
            lambda: merge(folder, tmp_path / "adapter", tmp_path / "out", tokenizer="none"),
        )
        for attempt in attempts:
            with pytest.raises(error) as found:
                attempt()
            assert isinstance(found.value, OpenELMError)
            assert "\n" not in str(found.value)
            assert len(str(found.value)) < 400
        assert not (tmp_path / "out").exists()


def set_first(array, value):
    array[0, 0] = value
    return array
