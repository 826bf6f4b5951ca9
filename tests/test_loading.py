import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from conftest import SMALL_CONFIG, assert_close, random_model, write_folder
from mlx_openelm import OpenELM, OpenELMConfig, Tokenizer, convert, hub, load, load_model
from mlx_openelm.errors import ConfigError, SourceError, TokenizerError, WeightsError
from mlx_openelm.machine.device import replaced_choices


@pytest.fixture
def asked_for(monkeypatch, tiny_folder):
    """A hub that gives one folder for every repository, and remembers which revisions were asked for."""
    asked = []

    def download(repo_id, revision):
        asked.append((repo_id, revision))
        return tiny_folder

    monkeypatch.setattr(hub, "_download", download)
    return asked


def test_a_revision_is_asked_for_of_the_model_and_of_a_tokenizer_by_name(asked_for):
    load("some/model", revision="v1")
    load("some/model", tokenizer="some/tokenizer", revision="v2")
    assert asked_for == [("some/model", "v1"), ("some/model", "v2"), ("some/tokenizer", "v2")]


def test_no_tokenizer_is_refused_for_the_reason_it_is_missing(tiny_folder):
    with pytest.raises(TokenizerError, match=r"^`tokenizer=none` leaves the tokenizer out"):
        load(tiny_folder, tokenizer="none")
    convert(tiny_folder, tiny_folder.parent / "bare", tokenizer="none")
    with pytest.raises(TokenizerError, match="bare has no tokenizer; set `tokenizer`"):
        load(tiny_folder.parent / "bare")


def test_a_model_and_its_tokenizer(tiny_folder):
    model, tokenizer = load(tiny_folder)
    assert isinstance(model, OpenELM)
    assert isinstance(tokenizer, Tokenizer)
    alone = load_model(tiny_folder, dtype=mx.float32)
    tokens = mx.array([tokenizer.encode("the fox")])
    assert mx.array_equal(alone(tokens), load_model(tiny_folder, dtype=mx.float32)(tokens))


def test_a_model_that_is_not_there(tmp_path):
    for loads in (load, load_model):
        with pytest.raises(SourceError, match="does not exist"):
            loads(tmp_path / "nowhere")


class TestEndOfText:
    """Ids that end a text are in `config.json`, in `generation_config.json`, and those of the tokenizer's settings."""

    @pytest.mark.parametrize(
        ("config", "generation", "expected"),
        [
            (2, None, (2,)),
            ([2, 84], None, (2, 84)),
            ([84], None, (84, 2)),  # the tokenizer's own is 2
            (2, [2, 84], (2, 84)),
            (84, 85, (84, 85, 2)),
            (None, 84, (84, 2)),
            (None, None, (2,)),
        ],
    )
    def test_all_of_them_are_kept(self, tmp_path, tiny_folder, config, generation, expected):
        folder = shutil.copytree(tiny_folder, tmp_path / "source")
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "eos_token_id": config}))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "top_p": 0.9}))
        convert(folder, tmp_path / "out")
        for place in (folder, tmp_path / "out"):
            assert load(place)[0].config.eos_token_ids == expected
        written = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
        assert (tuple(written) if isinstance(written, list) else (written,)) == expected

    def test_without_any_the_tokenizer_s_counts_alone(self, tmp_path, tiny_folder):
        """The default of a configuration, 2, may be any character of another vocabulary."""
        folder = shutil.copytree(tiny_folder, tmp_path / "source")
        values = json.loads((folder / "config.json").read_text())
        values.pop("eos_token_id", None)
        (folder / "config.json").write_text(json.dumps(values))
        name = Tokenizer(folder / "tokenizer.model").pieces()[398]
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        convert(folder, tmp_path / "out")
        for place in (folder, tmp_path / "out"):
            assert load(place)[0].config.eos_token_ids == (398,)

    @pytest.mark.parametrize("value", ["2", [2, "x"], [2.0], {}, True, 40000, [-1]])
    def test_a_damaged_entry_is_refused(self, tmp_path, tiny_folder, value):
        folder = shutil.copytree(tiny_folder, tmp_path / "source")
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ConfigError, match="eos_token_id"):
            load(folder)


class TestIndex:
    """`model.safetensors.index.json` names files of its folder and no others."""

    def folder(self, tmp_path, places):
        folder = write_folder(tmp_path / "model", random_model(SMALL_CONFIG))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return folder

    @pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../x.safetensors", "..", "sub/x", ""])
    def test_names_that_lead_elsewhere_are_refused(self, tmp_path, name):
        with pytest.raises(WeightsError, match="which is not a file of its folder"):
            load_model(self.folder(tmp_path, {"a": name}))

    def test_a_stale_index_beside_whole_weights_does_not_matter(self, tmp_path):
        folder = self.folder(tmp_path, {"a": "model-00001-of-00002.safetensors"})
        assert load_model(folder).config == SMALL_CONFIG
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        with pytest.raises(WeightsError, match=r"model-00001-of-00002\.safetensors is missing; download it again"):
            load_model(folder)


class TestDtype:
    """The type to compute in: float32 on the CPU, on a GPU that which `convert` writes."""

    @pytest.mark.parametrize(
        ("stored", "on_gpu"), [(mx.float32, mx.bfloat16), (mx.bfloat16, mx.bfloat16), (mx.float16, mx.float16)]
    )
    def test_follows_from_the_device_and_the_stored_type(self, tmp_path, stored, on_gpu):
        folder = write_folder(tmp_path / "model", random_model(SMALL_CONFIG), dtype=stored)
        with replaced_choices(backend="metal"):
            assert dtypes(load_model(folder)) == {on_gpu}
            assert dtypes(load_model(folder, dtype=mx.float32)) == {mx.float32}
        with replaced_choices(backend="cpu"):
            assert dtypes(load_model(folder)) == {mx.float32}
            assert dtypes(load_model(folder, dtype=mx.float16)) == {mx.float16}

    def test_on_a_gpu_a_folder_and_what_convert_makes_of_it_are_the_same(self, tmp_path, tiny_folder):
        convert(tiny_folder, tmp_path / "converted")
        with replaced_choices(backend="metal"):
            loaded, converted = (load_model(folder) for folder in (tiny_folder, tmp_path / "converted"))
        one, other = (dict(tree_flatten(model.parameters())) for model in (loaded, converted))
        assert one.keys() == other.keys()
        assert all(mx.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("quantized", [{"quantize": 4}, {"quantize": 3, "group_size": 32}, {"mode": "mxfp4"}])
def test_quantized_layers_of_a_gpu_are_mlx_s_own(tmp_path, tiny_folder, quantized):
    convert(tiny_folder, tmp_path / "quantized", dtype="float32", **quantized)
    tokens = mx.array([[5, 17, 200]])
    with replaced_choices(backend="cpu"):
        expected = load_model(tmp_path / "quantized")(tokens)
    with replaced_choices(backend="metal"):
        model = load_model(tmp_path / "quantized", dtype=mx.float32)
    assert isinstance(model.transformer.layers[0].attn.qkv_proj, nn.QuantizedLinear)
    assert isinstance(model.transformer.token_embeddings, nn.QuantizedEmbedding)
    assert_close(model(tokens), expected, 1e-4)


def dtypes(model):
    """The types of a network's parameters."""
    return {array.dtype for _, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize(("stored", "dtype"), [(mx.bfloat16, mx.float32), (mx.float32, mx.bfloat16)])
def test_loading_holds_the_result_and_the_values_of_one_tensor(tmp_path, stored, dtype):
    """Were all tensors read before the first is cast, a 16-bit network would take twice its size more."""
    config = OpenELMConfig.layerwise(8, 256, 64, vocab_size=400, max_context_length=64)
    folder = write_folder(tmp_path / "model", random_model(config), dtype=stored)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(folder, dtype=dtype)
    peak = mx.get_peak_memory() - before
    arrays = [array for _, array in tree_flatten(model.parameters())]
    largest = max(array.size for array in arrays)
    assert peak <= 1.05 * sum(array.nbytes for array in arrays) + largest * (stored.size + dtype.size)
