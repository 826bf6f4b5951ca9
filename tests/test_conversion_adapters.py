import json
import math
import os
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conftest import GOLDEN, assert_close, random_model, refused, run, write_folder
from mlx_openelm import convert, load_model
from mlx_openelm.conversion import convert as conversion
from mlx_openelm.conversion.adapters import forms as adapters_module
from mlx_openelm.conversion.adapters.corenet import AlphaWarning
from mlx_openelm.conversion.adapters.forms import convert_adapter, open_adapter
from mlx_openelm.conversion.read.torch_file import read_torch_file
from mlx_openelm.errors import AdapterError, ConfigError, OutputError, OutputExistsError
from mlx_openelm.files.manifest import MANIFEST
from mlx_openelm.model.adapters import SavedAdapter, about_base, apply_adapter, read_adapter, write_adapter
from mlx_openelm.model.lora import LINEAR_TARGETS, adapter_paths
from mlx_openelm.quantization import matrix_shape
from torch_writer import Tensor, save

TIED = GOLDEN / "tied_gqa2"
TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
EMBEDDING = "transformer.token_embeddings"
QKV_0, PROJ_2 = "transformer.layers.0.attn.qkv_proj", "transformer.layers.2.ffn.proj_2"

KINDS = {
    "lora": {"method": "lora", "rank_stabilized": False},
    "rslora": {"method": "lora", "rank_stabilized": True},
    "dora": {"method": "dora", "rank_stabilized": False},
}


def random_adapter(model, ranks, method="lora", rank_stabilized=False, alpha=6.0, seed=0):
    """An adapter with random values on these paths; row lengths of `random_model` are near 1."""
    rng = np.random.default_rng(seed)
    modules, tensors = dict(model.named_modules()), {}
    for path, rank in ranks.items():
        rows, columns = matrix_shape(modules[path])
        inputs, outputs = (rows, columns) if path == EMBEDDING else (columns, rows)
        tensors[f"{path}.lora_a"] = rng.normal(size=(inputs, rank)) * inputs**-0.5
        tensors[f"{path}.lora_b"] = rng.normal(size=(rank, outputs)) * 0.2
        if method == "dora":
            tensors[f"{path}.m"] = rng.uniform(0.7, 1.3, rows)
    rank = max(ranks.values())
    return SavedAdapter(
        method,
        alpha / (math.sqrt(rank) if rank_stabilized else rank),
        {name: mx.array(values.astype(np.float32)) for name, values in tensors.items()},
        0.1,
        alpha,
        rank_stabilized,
        about_base("tiny", model.config),
    )


def written(folder, adapter):
    folder.mkdir(parents=True)
    write_adapter(folder, adapter)
    return folder


def everywhere(model, rank=4):
    return dict.fromkeys(adapter_paths(model, LINEAR_TARGETS), rank)


def logits(model, adapter):
    """What a fresh copy of a model gives with an adapter."""
    copy = type(model)(model.config)
    copy.update(model.parameters())
    copy.eval()
    apply_adapter(copy, adapter)
    return copy(TOKENS)


def assert_same(found, expected):
    assert sorted(found.tensors) == sorted(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert mx.array_equal(found.tensors[name], tensor), name
    for name in ("method", "dropout", "alpha", "rank_stabilized"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.scale == pytest.approx(expected.scale)


def peft_folder(folder, tensors=None, old=False, **changes):
    """What PEFT writes for LoRA of rank 4 on two matrices of the tiny model; `None` leaves a key out."""
    rng = np.random.default_rng(1)
    if tensors is None:
        tensors = {}
        for path, (rows, columns) in {QKV_0: (256, 128), PROJ_2: (128, 384)}.items():
            tensors[f"{path}.lora_A.weight"] = rng.normal(size=(4, columns))
            tensors[f"{path}.lora_B.weight"] = rng.normal(size=(rows, 4))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "proj_2"], "bias": "none"}
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    arrays = {
        name if name.startswith("base_model") else f"base_model.model.{name}": np.asarray(values, np.float32)
        for name, values in tensors.items()
    }
    store(folder, arrays, old)
    return folder


def store(folder, arrays, old=False):
    """Write the tensors of a PEFT adapter in place of those in its folder."""
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    if old:
        save(folder / "adapter_model.bin", {n: Tensor(a, str(a.dtype)) for n, a in arrays.items()})
    else:
        mx.save_safetensors(str(folder / "adapter_model.safetensors"), {n: mx.array(a) for n, a in arrays.items()})


class TestCoreNet:
    @pytest.mark.parametrize("method", ["lora", "dora"])
    def test_command_and_load_give_the_golden_logits(self, tmp_path, method):
        arguments = ["--config", TIED / "config.json", "--alpha", "16", "--dtype", "float32", "--tokenizer", "none"]
        status, out, err = run("convert", TIED / f"corenet_{method}.pt", "-o", tmp_path / "out", *arguments)
        assert (status, err) == (0, "")
        assert f"adapter: {tmp_path / 'out' / 'adapter'}\n" in out
        model = load_model(tmp_path / "out", adapter=tmp_path / "out" / "adapter", dtype=mx.float32)
        input_ids = mx.load(str(TIED / "expected.safetensors"))["input_ids"]
        expected = mx.load(str(TIED / f"expected_{method}.safetensors"))["logits"]
        assert_close(model(input_ids), expected, 2e-5)
        assert "--alpha 16" in (tmp_path / "out" / "README.md").read_text()

    @pytest.mark.parametrize("method", ["lora", "dora"])
    def test_base_is_that_of_the_plain_checkpoint(self, tmp_path, method):
        for name in ("checkpoint", method):
            alpha = None if name == "checkpoint" else 16
            convert(
                TIED / f"corenet_{name}.pt", tmp_path / name, tokenizer="none", quantize=4, group_size=32, alpha=alpha
            )
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("checkpoint", method)]
        assert files[0] == files[1]

    def test_the_checkpoint_itself_is_an_adapter(self):
        model = load_model(TIED, dtype=mx.float32)
        with pytest.warns(AlphaWarning, match="assuming the rank, 8.*`alpha`"):
            adapter = open_adapter(TIED / "corenet_lora.pt", vocab_size=160)
        assert (adapter.alpha, adapter.scale) == (8, 1)
        apply_adapter(model, replace(adapter, scale=2.0))
        input_ids = mx.load(str(TIED / "expected.safetensors"))["input_ids"]
        assert_close(model(input_ids), mx.load(str(TIED / "expected_lora.safetensors"))["logits"], 2e-5)

    def test_padding_rows_are_cut_as_those_of_the_base(self, tmp_path):
        for keep, rows in ((False, 160), (True, 192)):
            folder = tmp_path / str(keep)
            convert(TIED / "corenet_lora.pt", folder, alpha=16, tokenizer="none", keep_padding=keep)
            adapter = read_adapter(folder / "adapter")
            assert adapter.tensors[f"{EMBEDDING}.lora_a"].shape == (rows, 8)
            assert load_model(folder, adapter=folder / "adapter").config.vocab_size == rows

    def test_alpha_is_the_rank_where_nothing_says_it(self, tmp_path):
        arguments = ["--config", TIED / "config.json", "--tokenizer", "none"]
        status, _, err = run("convert", TIED / "corenet_lora.pt", "-o", tmp_path / "out", *arguments)
        assert status == 0
        assert err.startswith("openelm-mlx: warning: corenet_lora.pt does not contain the alpha of its adapter")
        assert err.count("\n") == 1
        adapter = read_adapter(tmp_path / "out" / "adapter")
        assert (adapter.alpha, adapter.scale) == (8, 1)

    def test_an_error_leaves_nothing(self, tmp_path, monkeypatch):
        def stop(folder, adapter):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(conversion, "write_adapter", stop)
        with pytest.raises(OutputError, match="No space left"):
            convert(TIED / "corenet_lora.pt", tmp_path / "out", alpha=16, tokenizer="none")
        assert os.listdir(tmp_path) == []

    def test_alpha_without_an_adapter_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="`alpha` is for"):
            convert(TIED / "corenet_checkpoint.pt", tmp_path / "out", alpha=16, tokenizer="none")

    @pytest.mark.parametrize("alpha", [0, -1, math.inf, math.nan])
    def test_impossible_alpha_is_refused(self, tmp_path, alpha):
        with pytest.raises(AdapterError, match="alpha must be"):
            convert(TIED / "corenet_lora.pt", tmp_path / "out", alpha=alpha, tokenizer="none")

    def test_no_other_command_takes_it_for_a_model(self):
        assert "holds a model and an adapter" in refused("info", TIED / "corenet_lora.pt")
        with pytest.raises(AdapterError, match="holds a model and an adapter"):
            load_model(TIED / "corenet_lora.pt")

    def test_a_checkpoint_without_an_adapter_is_none(self):
        with pytest.raises(AdapterError, match="holds no adapter"):
            open_adapter(TIED / "corenet_checkpoint.pt")

    def test_a_checkpoint_goes_with_its_model(self, tmp_path):
        with pytest.raises(AdapterError, match="convert it as a model"):
            convert_adapter(TIED / "corenet_lora.pt", tmp_path / "out", to="peft")

    @pytest.mark.parametrize(
        ("name", "instead", "error"),
        [
            ("layers.0.attn.out_proj.lora_B.lora.weight", None, "layers.0.attn.out_proj has no lora_b"),
            ("layers.0.attn.out_proj.lora_A.lora.weight", "x.lora_A.lora.weight", "an adapter on transformer.x"),
            ("layers.0.attn.out_proj.lora_A.lora.weight", "layers.0.attn.out_proj.lora_A.b.weight", "several adapters"),
            ("token_embeddings.lora_embedding_A.lora", "token_embeddings.lora_A.lora.weight", "not match the layer"),
        ],
    )
    def test_other_adapters_are_refused(self, tmp_path, name, instead, error):
        tensors = {key: Tensor(np.array(t.read())) for key, t in read_torch_file(TIED / "corenet_lora.pt").items()}
        values = tensors.pop(name)
        if instead:
            tensors[instead] = values
        path = save(tmp_path / "x.pt", tensors)
        with pytest.raises(AdapterError, match=error):
            convert(path, tmp_path / "out", config=TIED / "config.json", alpha=1, tokenizer="none")


class TestCoreNetConfiguration:
    """The form of Apple's own `peft_configs/openelm_lora_270M.yaml`."""

    def entry(self, regex, **changes):
        params = {"adapter_name": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "init_lora_weights": True}
        return {"regex": regex, "module_type": "linear", "params": {**params, "use_dora": False, **changes}}

    def write(self, path, *entries):
        model = {"language_modeling": {"general_gpt": {"model_name": "OpenELM-270M"}}}
        if entries:
            model["lora"] = {"use_lora": True, "config": entries}
        path.write_text(json.dumps({"model": model}))  # JSON is YAML
        return path

    def open(self, path, checkpoint="corenet_lora.pt"):
        return adapters_module.read_corenet_adapter(TIED / checkpoint, config=path)

    def test_says_alpha_and_dropout(self, tmp_path):
        adapter = self.open(self.write(tmp_path / "x.yaml", self.entry(".*"), self.entry("never", lora_alpha=3)))
        assert (adapter.alpha, adapter.scale, adapter.dropout, adapter.method) == (16, 2, 0.1, "lora")

    def test_dora_with_plain_lora_on_the_embedding(self, tmp_path):
        entries = self.entry(".*token_embedding.*"), self.entry(".*proj.*", use_dora=True)
        assert self.open(self.write(tmp_path / "x.yaml", *entries), "corenet_dora.pt").method == "dora"

    def test_one_scale_stands_for_several(self, tmp_path):
        entries = self.entry(".*token_embedding.*", lora_alpha=24), self.entry(".*proj.*", use_rslora=True)
        adapter = self.open(self.write(tmp_path / "x.yaml", *entries))
        plain = self.open(self.write(tmp_path / "y.yaml", self.entry(".*")))
        assert (adapter.alpha, adapter.scale) == (None, 16 / math.sqrt(8))
        for path, scale in ((EMBEDDING, 3.0), (QKV_0, 16 / math.sqrt(8))):
            expected = plain.tensors[f"{path}.lora_b"] * scale
            assert_close(adapter.tensors[f"{path}.lora_b"] * adapter.scale, expected, 1e-6)

    def test_without_a_section_alpha_is_the_rank(self, tmp_path):
        with pytest.warns(AlphaWarning):
            assert self.open(self.write(tmp_path / "x.yaml")).scale == 1

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"r": 4}, "has rank 8, but the configuration says 4"),
            ({"use_dora": True}, "use_dora is True"),
            ({"lora_alpha": 0}, "lora_alpha must be a positive number; got 0"),
            ({"lora_alpha": "16"}, "lora_alpha must be a number; got '16'"),
            ({"beta": 1}, "unknown settings: beta"),
        ],
    )
    def test_that_does_not_fit_is_refused(self, tmp_path, changes, error):
        with pytest.raises(AdapterError, match=error):
            self.open(self.write(tmp_path / "x.yaml", self.entry(".*", **changes)))

    def test_with_a_broken_section_is_refused(self, tmp_path):
        for entry, error in (
            (self.entry(".*embedding.*"), "no pattern of the configuration"),
            (self.entry("("), "unsupported regular expression"),
            ({"params": {"r": 8, "lora_alpha": 1}}, "regex is missing"),
            ("text", "config must be a list of dict"),
        ):
            with pytest.raises(AdapterError, match=error):
                self.open(self.write(tmp_path / "x.yaml", entry))


class TestPeft:
    @pytest.mark.parametrize("kind", KINDS)
    def test_there_and_back_gives_the_same_tensors(self, tmp_path, tiny_model, kind):
        adapter = random_adapter(tiny_model, everywhere(tiny_model), **KINDS[kind])
        self.check(tmp_path, adapter)

    def test_there_and_back_with_the_embedding(self, tmp_path, tiny_model):
        self.check(tmp_path, random_adapter(tiny_model, {EMBEDDING: 3, QKV_0: 3}))

    def check(self, tmp_path, adapter):
        convert_adapter(written(tmp_path / "ours", adapter), tmp_path / "peft", to="peft")
        convert_adapter(tmp_path / "peft", tmp_path / "back")
        assert_same(open_adapter(tmp_path / "peft"), adapter)
        assert_same(open_adapter(tmp_path / "back"), adapter)

    @pytest.mark.parametrize("kind", KINDS)
    def test_ranks_that_differ(self, tmp_path, tiny_model, kind):
        ranks = {**everywhere(tiny_model), QKV_0: 2, PROJ_2: 7}
        adapter = random_adapter(tiny_model, ranks, **KINDS[kind])
        convert_adapter(written(tmp_path / "ours", adapter), tmp_path / "peft", to="peft")
        assert_same(open_adapter(tmp_path / "peft"), replace(adapter, alpha=None, rank_stabilized=False))

    def test_names_and_shapes_are_those_of_peft(self, tmp_path, tiny_model):
        adapter = random_adapter(tiny_model, {QKV_0: 4}, "dora")
        convert_adapter(written(tmp_path / "ours", adapter), tmp_path / "peft", to="peft")
        found = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))
        place = f"base_model.model.{QKV_0}"
        assert {name: tensor.shape for name, tensor in found.items()} == {
            f"{place}.lora_A.weight": (4, 128),
            f"{place}.lora_B.weight": (256, 4),
            f"{place}.lora_magnitude_vector": (256,),
        }
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        assert (config["target_modules"], config["use_dora"]) == ([QKV_0], True)

    def test_targets_of_all_layers_are_named_by_their_ends(self, tmp_path, tiny_model):
        ranks = {EMBEDDING: 4, **dict.fromkeys(adapter_paths(tiny_model, ["qkv_proj", "proj_1"]), 4)}
        convert_adapter(written(tmp_path / "ours", random_adapter(tiny_model, ranks)), tmp_path / "peft", to="peft")
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        assert config["target_modules"] == ["proj_1", "qkv_proj", "token_embeddings"]

    def test_what_the_numbers_mean(self, tmp_path):
        config = {"rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.05}
        adapter = open_adapter(peft_folder(tmp_path / "one", **config))
        assert (adapter.method, adapter.scale, adapter.alpha, adapter.dropout) == ("lora", 2, 8, 0.05)
        adapter = open_adapter(peft_folder(tmp_path / "two", use_rslora=True))
        assert (adapter.scale, adapter.rank_stabilized) == (4, True)

    def test_one_scale_stands_for_several(self, tmp_path):
        plain = open_adapter(peft_folder(tmp_path / "one"))
        patterns = {"alpha_pattern": {r"layers\.2.*proj_2": 2, "qkv": 99}}
        adapter = open_adapter(peft_folder(tmp_path / "two", **patterns))
        assert adapter.scale == 2
        for path, scale in ((QKV_0, 2), (PROJ_2, 0.5)):
            product = [a.tensors[f"{path}.lora_a"] @ a.tensors[f"{path}.lora_b"] for a in (plain, adapter)]
            assert_close(product[1] * adapter.scale, product[0] * scale, 1e-5)

    def test_old_file_and_old_name_of_magnitudes(self, tmp_path):
        tensors = {
            f"{QKV_0}.lora_A.weight": np.ones((4, 128)),
            f"{QKV_0}.lora_B.weight": np.ones((256, 4)),
            f"{QKV_0}.lora_magnitude_vector.weight": np.ones(256),
        }
        for old in (False, True):
            adapter = open_adapter(peft_folder(tmp_path / str(old), tensors, old, use_dora=True))
            assert adapter.ranks == {QKV_0: (4, True)}

    def test_settings_that_are_not_set_do_no_harm(self, tmp_path):
        values = {"future_option": False, "loftq_config": {}, "layer_replication": [], "modules_to_save": []}
        assert open_adapter(peft_folder(tmp_path / "x", init_lora_weights="gaussian", **values)).scale == 2

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_biases_that_the_file_does_not_contain_do_no_harm(self, tmp_path, bias):
        plain, other = (open_adapter(peft_folder(tmp_path / name, bias=name)) for name in ("none", bias))
        assert_same(other, plain)

    def test_biases_in_the_file_are_refused(self, tmp_path):
        tensors = {f"{QKV_0}.lora_A.weight": (4, 128), f"{QKV_0}.lora_B.weight": (256, 4), f"{QKV_0}.bias": (256,)}
        folder = peft_folder(tmp_path / "x", {name: np.ones(shape) for name, shape in tensors.items()}, bias="all")
        with pytest.raises(AdapterError, match=rf"{QKV_0}\.bias is not a tensor of an adapter"):
            open_adapter(folder)

    @pytest.mark.parametrize("old", [False, True], ids=["safetensors", "bin"])
    @pytest.mark.parametrize(
        ("prefix", "adapter_name"),
        [
            ("base_model.model.", ".default"),
            ("base_model.model.", ".my_adapter"),
            ("base_model.model.module.", ""),
            ("_orig_mod.base_model.model.", ".default"),
            ("base_model.model._orig_mod.", ""),
            ("base_model.model.model.", ""),
            ("", ""),
        ],
    )
    def test_names_with_other_prefixes_and_the_adapters_name(self, tmp_path, old, prefix, adapter_name):
        pair = {"lora_A.weight": np.ones((4, 128)), "lora_B.weight": np.full((256, 4), 2.0)}
        plain = open_adapter(peft_folder(tmp_path / "plain", {f"{QKV_0}.{end}": a for end, a in pair.items()}))
        folder = peft_folder(tmp_path / "named")
        names = {f"{prefix}{QKV_0}.{end.replace('.', adapter_name + '.')}": a for end, a in pair.items()}
        store(folder, {name: array.astype(np.float32) for name, array in names.items()}, old)
        assert_same(open_adapter(folder), plain)

    def test_the_embedding_of_a_named_adapter(self, tmp_path):
        pair = {"lora_embedding_A": np.ones((4, 400)), "lora_embedding_B": np.ones((128, 4))}
        folder = peft_folder(tmp_path / "x", {f"token_embeddings.{name}.default": a for name, a in pair.items()})
        assert open_adapter(folder).ranks == {EMBEDDING: (4, False)}

    def test_several_adapters_in_a_file_are_refused(self, tmp_path):
        tensors = {
            f"{QKV_0}.lora_{part}.{name}.weight": np.ones(shape)
            for part, shape in (("A", (4, 128)), ("B", (256, 4)))
            for name in ("default", "other")
        }
        with pytest.raises(AdapterError, match="several adapters: default, other"):
            open_adapter(peft_folder(tmp_path / "x", tensors))

    @pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
    @pytest.mark.parametrize("old", [False, True], ids=["safetensors", "bin"])
    def test_integers_are_no_adapter(self, tmp_path, old, dtype):
        folder = peft_folder(tmp_path / "x")
        values = {f"{QKV_0}.lora_A.weight": np.ones((4, 128), dtype), f"{QKV_0}.lora_B.weight": np.ones((256, 4))}
        store(folder, values, old)
        with pytest.raises(AdapterError, match=f"{QKV_0}.lora_a has type {dtype}"):
            open_adapter(folder)

    @pytest.mark.parametrize("shape", [(0, 128), (4, 0), (128,), (2, 2, 128), ()])
    def test_matrices_of_no_rank_are_refused(self, tmp_path, shape):
        folder = peft_folder(tmp_path / "x", r=shape[0] if shape else 4)
        values = {
            f"{QKV_0}.lora_A.weight": np.ones(shape),
            f"{QKV_0}.lora_B.weight": np.ones((256, shape[0] if shape else 4)),
        }
        store(folder, {name: array.astype(np.float32) for name, array in values.items()}, False)
        with pytest.raises(AdapterError):
            open_adapter(folder)

    @pytest.mark.parametrize(
        "changes",
        [
            {"lora_alpha": math.nan},
            {"lora_alpha": math.inf},
            {"lora_alpha": 1e39},
            {"lora_alpha": 10**400},
            {"alpha_pattern": {"qkv_proj": 1e300}},
            {"alpha_pattern": {"qkv_proj": math.nan}},
            {"lora_dropout": math.nan},
        ],
    )
    def test_numbers_that_cannot_be_right_are_one_short_error(self, tmp_path, changes):
        with pytest.raises(AdapterError, match="must be") as found:
            open_adapter(peft_folder(tmp_path / "x", **changes))
        assert len(str(found.value)) < 200 + len(str(tmp_path))

    def test_a_scale_that_overflows_its_matrix_is_refused(self, tmp_path):
        tensors = {
            f"{path}.lora_{part}.weight": np.full(shape, 1e38)
            for path, shapes in {QKV_0: ((4, 128), (256, 4)), PROJ_2: ((4, 384), (128, 4))}.items()
            for part, shape in zip("AB", shapes, strict=True)
        }
        with pytest.raises(AdapterError, match="lora_b has values beyond the range of float32"):
            open_adapter(peft_folder(tmp_path / "x", tensors, alpha_pattern={"proj_2": 1e6}))

    @pytest.mark.parametrize(
        ("key", "value", "error"),
        [
            ("peft_type", "IA3", "only LORA"),
            ("bias", "some", "unknown choice of biases"),
            ("fan_in_fan_out", True, "fan_in_fan_out is True"),
            ("modules_to_save", ["lm_head"], "whole matrices were trained"),
            ("init_lora_weights", "pissa", "a changed base"),
            ("init_lora_weights", "loftq", "a changed base"),
            ("trainable_token_indices", [3], "single rows"),
            ("layer_replication", [[0, 2]], "are replicated"),
            ("lora_bias", True, "biases were trained"),
            ("use_qalora", True, "a method other than LoRA"),
            ("target_parameters", ["x"], "adapters on parameters"),
            ("ensure_weight_tying", True, "applied to a tied output too"),
            ("future_option", True, "not a known setting"),
            ("r", 5, "has rank 4, but .* says 5"),
            ("lora_alpha", 0, "lora_alpha must be a positive number; got 0"),
            ("lora_alpha", "8", "lora_alpha must be a positive number; got '8'"),
            ("lora_dropout", 2, "lora_dropout must be at least 0 and below 1; got 2"),
            ("rank_pattern", {"qkv_proj": 2}, "has rank 4, but .* says 2"),
            ("rank_pattern", {"(": 2}, "unsupported regular expression"),
            ("alpha_pattern", {"qkv_proj": -1}, "lora_alpha must be a positive number; got -1"),
            ("alpha_pattern", [3], "must be an object"),
            ("use_dora", True, "no DoRA magnitudes"),
            ("use_dora", 1, "use_dora must be true or false"),
            ("use_rslora", -1, "use_rslora must be true or false"),
        ],
    )
    def test_what_would_compute_something_else_is_refused(self, tmp_path, key, value, error):
        with pytest.raises(AdapterError, match=error):
            open_adapter(peft_folder(tmp_path / "x", **{key: value}))

    @pytest.mark.parametrize(
        ("tensors", "config", "error"),
        [
            ({}, {}, "no tensors"),
            ({"lm_head.lora_A.weight": (4, 8), "lm_head.lora_B.weight": (9, 4)}, {}, "an adapter on lm_head"),
            ({f"{QKV_0}.lora_A.weight": (4, 8)}, {}, "qkv_proj has no lora_b"),
            ({f"{QKV_0}.lora_A.weight": (4, 8), f"{QKV_0}.lora_B.weight": (8, 3)}, {}, "cannot be multiplied"),
            ({f"{EMBEDDING}.base_layer.weight": (4, 8)}, {}, "is not a tensor of an adapter"),
            ({f"{EMBEDDING}.lora_A.weight": (4, 8)}, {}, "does not match the layer type"),
            ({f"{QKV_0}.lora_embedding_A": (4, 8)}, {}, "does not match the layer type"),
            ({"base_model.qkv_proj.lora_A.weight": (4, 8)}, {}, "is not a tensor of an adapter"),
        ],
    )
    def test_other_tensors_are_refused(self, tmp_path, tensors, config, error):
        tensors = {name: np.ones(shape) for name, shape in tensors.items()}
        with pytest.raises(AdapterError, match=error):
            open_adapter(peft_folder(tmp_path / "x", tensors, **config))

    def test_dora_on_the_embedding_means_something_else(self, tmp_path, tiny_model):
        tensors = {
            f"{EMBEDDING}.lora_embedding_A": np.ones((4, 400)),
            f"{EMBEDDING}.lora_embedding_B": np.ones((128, 4)),
            f"{EMBEDDING}.lora_magnitude_vector": np.ones(128),
        }
        with pytest.raises(AdapterError, match="a norm for each column"):
            open_adapter(peft_folder(tmp_path / "x", tensors, use_dora=True))
        ours = written(tmp_path / "ours", random_adapter(tiny_model, {EMBEDDING: 4}, "dora"))
        with pytest.raises(AdapterError, match="a norm for each column"):
            convert_adapter(ours, tmp_path / "peft", to="peft")

    def test_magnitudes_and_use_dora_go_together(self, tmp_path):
        pair = {f"{QKV_0}.lora_A.weight": np.ones((4, 128)), f"{QKV_0}.lora_B.weight": np.ones((256, 4))}
        with pytest.raises(AdapterError, match="use_dora is false"):
            open_adapter(peft_folder(tmp_path / "x", {**pair, f"{QKV_0}.lora_magnitude_vector": np.ones(256)}))

    def test_dora_beside_plain_lora_cannot_be_said(self, tmp_path, tiny_model):
        adapter = random_adapter(tiny_model, {EMBEDDING: 4, QKV_0: 4}, "dora")
        del adapter.tensors[f"{EMBEDDING}.m"]
        with pytest.raises(AdapterError, match="use_dora applies to all matrices"):
            convert_adapter(written(tmp_path / "ours", adapter), tmp_path / "out", to="peft")

    def test_full_fine_tuning_cannot_be_said(self, tmp_path, tiny_model):
        adapter = SavedAdapter("full", 1.0, {"transformer.norm.weight": mx.ones(128)})
        with pytest.raises(AdapterError, match="no format for full fine-tuning"):
            convert_adapter(written(tmp_path / "ours", adapter), tmp_path / "out", to="peft")


@pytest.mark.torch
class TestAgainstPeft:
    """PEFT itself, on the same network in PyTorch; last run with peft 0.21.2, torch 2.13.0, transformers 5.24.0.

    The network is tied, and the embedding has an adapter: under PEFT the output reads the base embedding, as here.
    """

    @pytest.fixture
    def peft(self):
        pytest.importorskip("torch")
        return pytest.importorskip("peft")

    def network(self, model):
        from torch_openelm import OpenELM

        return OpenELM(model.config, {name: np.array(array) for name, array in tree_flatten(model.parameters())})

    def logits(self, network):
        import torch

        with torch.no_grad():
            return network(input_ids=torch.tensor(np.array(TOKENS), dtype=torch.int64)).numpy()

    @pytest.mark.parametrize("places", ["all", "some"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_written(self, tmp_path, tiny_model, peft, kind, places):
        embedding = {} if kind == "dora" else {EMBEDDING: 4}
        ranks = {**everywhere(tiny_model), **embedding} if places == "all" else {QKV_0: 4, PROJ_2: 2, **embedding}
        adapter = random_adapter(tiny_model, ranks, **KINDS[kind])
        convert_adapter(written(tmp_path / "ours", adapter), tmp_path / "peft", to="peft")
        network = self.network(tiny_model)
        assert_close(self.logits(network), tiny_model(TOKENS), 2e-5)
        network = peft.PeftModel.from_pretrained(network, str(tmp_path / "peft"))
        assert_close(self.logits(network), logits(tiny_model, adapter), 5e-5)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_read(self, tmp_path, tiny_model, peft, kind):
        import torch

        config = peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=[*LINEAR_TARGETS, *([] if kind == "dora" else ["token_embeddings"])],
            exclude_modules=["transformer.layers.1.ffn.proj_1"],
            rank_pattern={"qkv_proj": 3},
            alpha_pattern={r"layers\.2\.ffn\.proj_.": 10},
            use_rslora=kind == "rslora",
            use_dora=kind == "dora",
        )
        network = peft.get_peft_model(self.network(tiny_model), config)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(torch.rand_like(parameter) + 0.5)
                elif "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5 * 0.3)
        network.eval()
        network.save_pretrained(str(tmp_path / "peft"))
        adapter = open_adapter(tmp_path / "peft")
        assert_close(logits(tiny_model, adapter), self.logits(network), 5e-5)


@pytest.fixture(scope="session")
def stock():
    """Stock mlx-lm: the model of a folder with the adapter of another."""
    load_with_mlx_lm = pytest.importorskip("mlx_lm.utils").load_model
    from mlx_lm.tuner.utils import load_adapters

    def open_both(model, adapter):
        network = load_adapters(load_with_mlx_lm(model)[0], str(adapter))
        network.eval()
        return network

    return open_both


class TestStockMLXLM:
    """Stock mlx-lm 0.32.2 reads what is written for it, and computes the same."""

    @pytest.mark.parametrize("bits", [None, 4], ids=["float32", "4-bit"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_logits(self, tmp_path, tiny_model, tiny_folder, stock, kind, bits):
        ranks = {"transformer.layers.1.attn.qkv_proj": 4, "transformer.layers.1.ffn.proj_1": 4, PROJ_2: 4}
        self.check(tmp_path, tiny_folder, random_adapter(tiny_model, ranks, **KINDS[kind]), stock, bits)

    def test_ranks_that_differ(self, tmp_path, tiny_model, tiny_folder, stock):
        self.check(tmp_path, tiny_folder, random_adapter(tiny_model, {QKV_0: 2, PROJ_2: 5}, "dora"), stock)

    @pytest.mark.parametrize(("kind", "bits"), [("lora", None), ("lora", 4), ("rslora", None), ("dora", None)])
    def test_with_the_embedding_of_an_untied_model(self, tmp_path, tiny_config, stock, kind, bits):
        model = random_model(replace(tiny_config, share_input_output_layers=False))
        folder = write_folder(tmp_path / "untied", model)
        ranks = {EMBEDDING: 4, PROJ_2: 4}
        self.check(tmp_path, folder, random_adapter(model, ranks, **KINDS[kind]), stock, bits)

    def test_with_an_adapter_of_unknown_depth(self, tmp_path, tiny_model, tiny_folder, stock):
        """One from PEFT does not say how many layers its model has; this one has none on the last."""
        adapter = replace(random_adapter(tiny_model, {QKV_0: 4}), base={})
        self.check(tmp_path, tiny_folder, adapter, stock)

    def check(self, tmp_path, folder, adapter, stock, bits=None):
        convert(folder, tmp_path / "model", dtype="float32", tokenizer="none", quantize=bits)
        result = convert_adapter(written(tmp_path / "ours", adapter), tmp_path / "out", to="mlx-lm")
        assert result.warnings == ()
        ours = load_model(tmp_path / "model", adapter=tmp_path / "ours", dtype=mx.float32)
        assert_close(stock(tmp_path / "model", tmp_path / "out")(TOKENS), ours(TOKENS), 1e-4)

    def test_a_difference_on_a_tied_model_is_said(self, tmp_path, tiny_model, tiny_folder, stock):
        adapter = written(tmp_path / "ours", random_adapter(tiny_model, {EMBEDDING: 4}))
        status, _, err = run("convert", "--adapter", adapter, "--to", "mlx-lm", "--output", tmp_path / "out")
        assert status == 0
        assert err == (
            "openelm-mlx: warning: stock mlx-lm applies the adapter of token_embeddings to a tied output too: "
            "its results differ\n"
        )
        convert(tiny_folder, tmp_path / "model", dtype="float32", tokenizer="none")
        ours = load_model(tmp_path / "model", adapter=tmp_path / "out", dtype=mx.float32)
        assert mx.abs(ours(TOKENS) - stock(tmp_path / "model", tmp_path / "out")(TOKENS)).max() > 0.01

    def test_plain_lora_on_the_embedding_beside_dora_is_said(self, tmp_path, tiny_config, stock):
        model = random_model(replace(tiny_config, share_input_output_layers=False))
        folder = write_folder(tmp_path / "untied", model)
        adapter = random_adapter(model, {EMBEDDING: 4, QKV_0: 4}, "dora")
        del adapter.tensors[f"{EMBEDDING}.m"]
        result = convert_adapter(written(tmp_path / "ours", adapter), tmp_path / "out", to="mlx-lm")
        assert [warning.split(":")[0] for warning in result.warnings] == [
            "stock mlx-lm treats plain LoRA on token_embeddings as DoRA"
        ]
        convert(folder, tmp_path / "model", dtype="float32", tokenizer="none")
        ours = load_model(tmp_path / "model", adapter=tmp_path / "out", dtype=mx.float32)
        assert mx.abs(ours(TOKENS) - stock(tmp_path / "model", tmp_path / "out")(TOKENS)).max() > 0.01

    def test_two_methods_on_linear_layers_are_refused(self, tmp_path, tiny_model):
        adapter = random_adapter(tiny_model, {QKV_0: 4, PROJ_2: 4}, "dora")
        del adapter.tensors[f"{QKV_0}.m"]
        with pytest.raises(AdapterError, match="only one method for all"):
            convert_adapter(written(tmp_path / "ours", adapter), tmp_path / "out", to="mlx-lm")

    def test_its_own_adapters_are_read(self, tmp_path, tiny_model, tiny_folder, stock):
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import load_model as load_with_mlx_lm

        convert(tiny_folder, tmp_path / "model", dtype="float32", tokenizer="none")
        network = load_with_mlx_lm(tmp_path / "model")[0]
        network.freeze()
        parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0}
        linear_to_lora_layers(network, 2, {**parameters, "keys": None})
        trained = {
            name: mx.random.normal(a.shape, key=mx.random.key(a.size)) * 0.1
            for name, a in tree_flatten(network.trainable_parameters())
        }
        network.load_weights(list(trained.items()), strict=False)
        (tmp_path / "theirs").mkdir()
        mx.save_safetensors(str(tmp_path / "theirs" / "adapters.safetensors"), trained)
        values = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "iters": 100}
        (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(values))
        ours = load_model(tmp_path / "model", adapter=tmp_path / "theirs", dtype=mx.float32)
        assert_close(ours(TOKENS), network(TOKENS), 1e-4)


class TestCommand:
    def test_converts_an_adapter(self, tmp_path, tiny_model):
        adapter = written(tmp_path / "ours", random_adapter(tiny_model, {QKV_0: 4, PROJ_2: 4}))
        status, out, err = run("convert", "--adapter", adapter, "--to", "peft", "--output", tmp_path / "out", "--json")
        assert (status, err) == (0, "")
        assert json.loads(out) == {
            "folder": str(tmp_path / "out"),
            "form": "peft",
            "method": "lora",
            "num_matrices": 2,
            "warnings": [],
        }

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ([], "give a SOURCE, or an adapter"),
            (["--adapter", "x", "--to", "peft"], "requires --adapter, --to and --output"),
            (["--adapter", "x", "--output", "y"], "requires --adapter, --to and --output"),
            (["model", "--to", "peft", "--output", "y"], "requires --adapter, --to and --output"),
            (["model", "--adapter", "x", "--to", "peft", "--output", "y"], "cannot be used with --adapter: SOURCE"),
            (
                ["-a", "x", "--to", "peft", "-o", "y", "-q", "4", "--alpha", "1"],
                "cannot be used with --adapter: --quantize, --alpha",
            ),
            (["-a", "x", "--to", "gguf", "-o", "y"], "unknown adapter format 'gguf'"),
            (["-a", "no/where", "--to", "peft", "-o", "y"], "no/where does not exist"),
        ],
    )
    def test_refuses(self, arguments, error):
        assert error in refused("convert", *arguments)


class TestFolder:
    @pytest.fixture
    def ours(self, tmp_path, tiny_model):
        return written(tmp_path / "ours", random_adapter(tiny_model, {QKV_0: 4}))

    def test_an_existing_one_stays_without_force(self, tmp_path, ours):
        convert_adapter(ours, tmp_path / "out", to="peft")
        with pytest.raises(OutputExistsError, match="force"):
            convert_adapter(ours, tmp_path / "out")
        convert_adapter(ours, tmp_path / "out", force=True)
        assert sorted(os.listdir(tmp_path / "out")) == [
            MANIFEST,
            "README.md",
            "adapter_config.json",
            "adapters.safetensors",
        ]
        assert sorted(os.listdir(tmp_path)) == ["ours", "out"]

    def test_with_more_than_an_adapter_is_never_replaced(self, tmp_path, ours):
        """A run of `tune` is an adapter with its checkpoints beside it."""
        convert_adapter(ours, tmp_path / "out")
        (tmp_path / "out" / "checkpoints").mkdir()
        with pytest.raises(OutputError, match="checkpoints"):
            convert_adapter(ours, tmp_path / "out", force=True)
        with pytest.raises(OutputError, match="would be a folder"):
            convert_adapter(ours, ours / "adapters.safetensors", force=True)

    def test_an_error_half_way_leaves_nothing(self, tmp_path, ours, monkeypatch):
        def stop(folder, adapter):
            (folder / "adapters.safetensors").write_text("half")
            raise KeyboardInterrupt

        monkeypatch.setattr(adapters_module, "write_adapter", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_adapter(ours, tmp_path / "out")
        assert os.listdir(tmp_path) == ["ours"]

    def test_what_is_no_adapter_is_told(self, tmp_path, tiny_folder):
        for path, error in (
            (tmp_path / "none", "does not exist"),
            (tiny_folder, "holds no adapter: neither adapters.safetensors nor adapter_model.safetensors"),
            (tiny_folder / "model.safetensors", "an adapter is the folder that contains it"),
        ):
            with pytest.raises(AdapterError, match=error):
                open_adapter(path)

    def test_a_damaged_file_is_told(self, tmp_path):
        folder = peft_folder(tmp_path / "x")
        (folder / "adapter_model.safetensors").write_bytes(b"short")
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
            open_adapter(folder)
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(AdapterError, match="not valid JSON"):
            open_adapter(folder)
