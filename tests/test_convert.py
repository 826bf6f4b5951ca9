import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_openelm import corenet_name
from test_quantization import EVERY_QUANTIZATION

from conftest import GOLDEN, GOLDEN_CASES, assert_close, random_model, write_folder
from mlx_openelm import OpenELMError, Quantization, convert, load, load_model
from mlx_openelm.conversion.open import open_source
from mlx_openelm.conversion.write import folder as output
from mlx_openelm.errors import (
    ConfigError,
    DiskSpaceError,
    OutputExistsError,
    SourceError,
    TokenizerError,
    WeightsError,
)
from mlx_openelm.quantization import PackedTensor
from mlx_openelm.tensors import read_safetensors
from torch_writer import Tensor, save

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def arrays_of(folder):
    return mx.load(str(folder / "model.safetensors"))


def corenet_file(path, model, padding=0, noise=0.0):
    """A model as CoreNet saves it."""
    tensors = {}
    for number, (name, array) in enumerate(tree_flatten(model.parameters())):
        values = np.array(array)
        if name in ("transformer.token_embeddings.weight", "lm_head.weight"):
            values = np.concatenate([values, np.full((padding, values.shape[1]), 7, np.float32)])
        tensors[corenet_name(name)] = Tensor(values + noise * (1 + number))
    return save(path, {"model_state_dict": tensors, "epoch": 1})


def apple_folder(folder, model, quantization=None, padding=0):
    """What Apple's MLX port wrote: CoreNet's names, linear layers quantized, the embedding in full."""
    folder.mkdir()
    arrays = {}
    for name, array in tree_flatten(model.parameters()):
        if "embeddings" in name:
            array = mx.concatenate([array, mx.zeros((padding, array.shape[1]))])
        elif quantization and array.ndim == 2:
            parts = quantization.quantize(array)
            arrays.update({f"{corenet_name(name).removesuffix('.weight')}.{part}": a for part, a in parts.items()})
            continue
        arrays[corenet_name(name)] = array
    mx.save_safetensors(str(folder / "weights.safetensors"), arrays)
    config = {"model_name": "OpenELM-270M", "vocab_size": 400, "max_context_length": 256}
    if quantization:
        config["quantization"] = {"group_size": quantization.group_size, "bits": quantization.bits}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def config_file(tmp_path, tiny_config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config.to_dict()))
    return path


class TestEverySourceLeadsToTheSameTensors:
    def check(self, folder, model):
        expected = dict(tree_flatten(model.parameters()))
        found = arrays_of(folder)
        assert sorted(found) == sorted(expected)
        assert all(mx.array_equal(found[name], array) for name, array in expected.items())

    def test_huggingface(self, tmp_path, tiny_folder, tiny_model):
        convert(tiny_folder, tmp_path / "out", dtype="float32")
        self.check(tmp_path / "out", tiny_model)

    def test_huggingface_in_shards(self, tmp_path, tiny_folder, tiny_model, monkeypatch):
        monkeypatch.setattr(output, "SHARD_BYTES", 300_000)
        convert(tiny_folder, tmp_path / "sharded", dtype="float32")
        index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 2
        assert not (tmp_path / "sharded" / "model.safetensors").exists()
        sizes = {name: array.nbytes for name, array in tree_flatten(tiny_model.parameters())}
        for shard in set(index["weight_map"].values()):
            held = [sizes[name] for name, place in index["weight_map"].items() if place == shard]
            assert sum(held) <= 300_000 or len(held) == 1
        assert index["metadata"]["total_size"] == sum(sizes.values())
        monkeypatch.undo()
        convert(tmp_path / "sharded", tmp_path / "out", dtype="float32")
        self.check(tmp_path / "out", tiny_model)

    @pytest.mark.parametrize("padding", [0, 112])
    def test_corenet(self, tmp_path, config_file, tiny_model, tokenizer_path, padding):
        path = corenet_file(tmp_path / "x.pt", tiny_model, padding)
        convert(path, tmp_path / "out", dtype="float32", tokenizer=tokenizer_path)
        self.check(tmp_path / "out", tiny_model)

    def test_average_of_several(self, tmp_path, config_file, tiny_model):
        paths = [corenet_file(tmp_path / f"{n}.pt", tiny_model, noise=n / 1024) for n in (-1, 0, 4)]
        convert(paths, tmp_path / "out", dtype="float32", tokenizer="none")
        found = arrays_of(tmp_path / "out")
        for number, (name, array) in enumerate(tree_flatten(tiny_model.parameters())):
            assert_close(found[name], array + (1 + number) / 1024, 1e-6)

    def test_average_of_folders(self, tmp_path, tiny_config, tokenizer):
        models = [random_model(tiny_config, seed) for seed in range(3)]
        folders = [write_folder(tmp_path / f"{n}", model, tokenizer) for n, model in enumerate(models)]
        convert(folders, tmp_path / "out", dtype="float32")
        found = arrays_of(tmp_path / "out")
        for name, array in tree_flatten(models[0].parameters()):
            others = [dict(tree_flatten(model.parameters()))[name] for model in models[1:]]
            assert_close(found[name], (array + others[0] + others[1]) / 3, 1e-6)
        assert load(tmp_path / "out")[1] is not None

    def test_apples_mlx_port(self, tmp_path, config_file, tiny_model):
        folder = apple_folder(tmp_path / "apple", tiny_model, padding=112)
        convert(folder, tmp_path / "out", dtype="float32", config=config_file, tokenizer="none")
        self.check(tmp_path / "out", tiny_model)

    def test_apples_mlx_port_in_4_bits(self, tmp_path, config_file, tiny_model):
        quantization = Quantization(4, 64)
        folder = apple_folder(tmp_path / "apple", tiny_model, quantization)
        convert(folder, tmp_path / "out", dtype="float32", config=config_file, tokenizer="none")
        found = open_source([tmp_path / "out"]).tensors
        for name, array in tree_flatten(tiny_model.parameters()):
            if array.ndim == 2 and "embeddings" not in name:
                assert found[name].quantization == quantization
                array = quantization.dequantize(quantization.quantize(array), mx.float32)
                assert mx.array_equal(found[name].dequantize().read(), array)
            else:
                assert mx.array_equal(found[name].read(), array)

    def test_a_folder_that_was_converted_before(self, tmp_path, tiny_folder, tiny_model):
        convert(tiny_folder, tmp_path / "once", dtype="float32")
        convert(tmp_path / "once", tmp_path / "out", dtype="float32")
        self.check(tmp_path / "out", tiny_model)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_both_golden_forms_give_the_same_folder(tmp_path, case):
    for form, source in (("hf", GOLDEN / case), ("pt", GOLDEN / case / "corenet_checkpoint.pt")):
        convert(source, tmp_path / form, tokenizer="none", quantize=8, group_size=32)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "pt" / name).read_bytes()


def test_padding_stays_if_asked_for(tmp_path, config_file, tiny_model, tokenizer_path):
    path = corenet_file(tmp_path / "x.pt", tiny_model, padding=112)
    result = convert(path, tmp_path / "out", tokenizer=tokenizer_path, keep_padding=True)
    assert result.config.vocab_size == 512
    assert arrays_of(tmp_path / "out")["transformer.token_embeddings.weight"].shape[0] == 512
    model, tokenizer = load(tmp_path / "out")
    assert (model.config.vocab_size, tokenizer.vocab_size) == (512, 400)


class TestTypes:
    @pytest.mark.parametrize(
        ("stored", "asked", "written"),
        [
            (mx.float32, "auto", mx.bfloat16),
            (mx.float16, "auto", mx.float16),
            (mx.bfloat16, "auto", mx.bfloat16),
            (mx.bfloat16, "float16", mx.float16),
            (mx.float16, "float32", mx.float32),
        ],
    )
    def test_of_the_written_tensors(self, tmp_path, tiny_model, stored, asked, written):
        folder = write_folder(tmp_path / "in", tiny_model, dtype=stored)
        result = convert(folder, tmp_path / "out", dtype=asked, tokenizer="none")
        assert {array.dtype for array in arrays_of(tmp_path / "out").values()} == {written}
        assert f"mlx.core.{result.dtype}" == str(written)

    def test_values_beyond_float16_are_refused(self, tmp_path, tiny_config):
        model = random_model(tiny_config)
        model.transformer.norm.weight = model.transformer.norm.weight * 1e6
        folder = write_folder(tmp_path / "in", model)
        with pytest.raises(WeightsError, match="beyond the range of float16"):
            convert(folder, tmp_path / "out", dtype="float16", tokenizer="none")

    def test_float16_of_the_3b_model_warns(self, tmp_path, tiny_config):
        config = replace(tiny_config, model_dim=3072, ffn_multipliers=(0.05,) * 3, qkv_multipliers=None)
        folder = write_folder(tmp_path / "in", random_model(config))
        result = convert(folder, tmp_path / "out", dtype="float16", tokenizer="none")
        assert any("overflow float16" in warning for warning in result.warnings)


class TestQuantizing:
    @pytest.mark.parametrize("quantization", EVERY_QUANTIZATION, ids=str)
    def test_embeddings_and_every_layer(self, tmp_path, tiny_folder, tiny_model, quantization):
        arguments = {"quantize": quantization.bits, "group_size": quantization.group_size, "mode": quantization.mode}
        result = convert(tiny_folder, tmp_path / "out", dtype="float32", **arguments)
        assert result.quantization == quantization
        assert result.not_quantized == ()
        tensors = open_source([tmp_path / "out"]).tensors
        for name, array in tree_flatten(tiny_model.parameters()):
            if array.ndim == 2:
                parts = quantization.quantize(array)
                assert all(mx.array_equal(tensors[name].parts[part].read(), parts[part]) for part in parts), name
        size = (tmp_path / "out" / "model.safetensors").stat().st_size
        assert abs(size - result.output_bytes) < 20_000
        assert result.bits_per_weight == pytest.approx(result.output_bytes * 8 / result.num_parameters)

    def test_widths_that_do_not_fit_are_left_alone_and_reported(self, tmp_path):
        result = convert(GOLDEN / "untied_mha_noglu", tmp_path / "out", tokenizer="none", quantize=4, group_size=128)
        assert result.not_quantized
        tensors = open_source([tmp_path / "out"]).tensors
        for name, tensor in tensors.items():
            is_left = len(tensor.shape) == 2 and not isinstance(tensor, PackedTensor)
            assert is_left == (name in result.not_quantized)
        assert mx.all(mx.isfinite(load_model(tmp_path / "out")(TOKENS))).item()

    def test_the_same_again_changes_nothing(self, tmp_path, tiny_folder):
        convert(tiny_folder, tmp_path / "one", quantize=4)
        convert(tmp_path / "one", tmp_path / "two", quantize=4)
        convert(tmp_path / "one", tmp_path / "three")
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")]
        assert files[0] == files[1] == files[2]

    def test_other_bits_and_full_matrices_from_a_quantized_folder(self, tmp_path, tiny_folder, tiny_model):
        convert(tiny_folder, tmp_path / "eight", quantize=8, dtype="float32")
        assert convert(tmp_path / "eight", tmp_path / "four", quantize=4).quantization == Quantization(4, 64)
        assert convert(tmp_path / "eight", tmp_path / "full", dequantize=True).quantization is None
        model = load_model(tmp_path / "full", dtype=mx.float32)
        assert_close(model(TOKENS), tiny_model(TOKENS), 0.15)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"quantize": 7}, "got 7"),
            ({"quantize": 4, "group_size": 48}, "48"),
            ({"group_size": 64}, "`group_size` requires"),
            ({"mode": "fp8"}, "fp8"),
            ({"quantize": 4, "dequantize": True}, "mutually exclusive"),
            ({"dtype": "int8"}, "int8"),
        ],
    )
    def test_what_cannot_be_had_is_refused_before_anything_is_written(self, tmp_path, tiny_folder, arguments, error):
        with pytest.raises(OpenELMError, match=error):
            convert(tiny_folder, tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="session")
def load_with_mlx_lm():
    return pytest.importorskip("mlx_lm.utils").load_model


class TestStockMLXLM:
    """Stock mlx-lm reads the folders and computes the same."""

    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("quantization", [None, *EVERY_QUANTIZATION], ids=str)
    def test_logits(self, tmp_path, tiny_config, load_with_mlx_lm, quantization, tied):
        model = random_model(replace(tiny_config, share_input_output_layers=tied))
        folder = write_folder(tmp_path / "in", model)
        q = quantization
        arguments = {"quantize": q.bits, "group_size": q.group_size, "mode": q.mode} if q else {}
        convert(folder, tmp_path / "out", dtype="float32", tokenizer="none", **arguments)
        ours = load_model(tmp_path / "out", dtype=mx.float32)
        stock, _ = load_with_mlx_lm(tmp_path / "out")
        assert_close(ours(TOKENS), stock(TOKENS), 2e-5)

    def test_golden_logits(self, tmp_path, load_with_mlx_lm):
        convert(GOLDEN / "tied_gqa2/corenet_checkpoint.pt", tmp_path / "out", dtype="float32", tokenizer="none")
        stock, _ = load_with_mlx_lm(tmp_path / "out")
        expected = mx.load(str(GOLDEN / "tied_gqa2" / "expected.safetensors"))
        assert_close(stock(expected["input_ids"]), expected["logits"], 2e-5)

    def test_text(self, tmp_path, tiny_folder, tokenizer):
        mlx_lm = pytest.importorskip("mlx_lm")
        convert(tiny_folder, tmp_path / "out", quantize=8, dtype="float32")
        stock, stock_tokenizer = mlx_lm.load(str(tmp_path / "out"))
        from mlx_openelm import generate

        ours, own_tokenizer = load(tmp_path / "out", dtype=mx.float32)
        expected = generate(ours, own_tokenizer, "Once upon a time", max_tokens=12)
        assert mlx_lm.generate(stock, stock_tokenizer, "Once upon a time", max_tokens=12) == expected


class TestFolder:
    def test_holds_what_people_look_for(self, tmp_path, tiny_folder):
        convert(tiny_folder, tmp_path / "out", quantize=4)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            ".openelm-mlx.json",
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
        ]
        card = (tmp_path / "out" / "README.md").read_text()
        assert "openelm-mlx convert tiny --quantize 4" in card
        assert str(tmp_path) not in card

    def test_without_a_tokenizer_the_network_alone_is_loaded(self, tmp_path, tiny_folder):
        convert(tiny_folder, tmp_path / "out", tokenizer="none")
        with pytest.raises(TokenizerError, match="has no tokenizer"):
            load(tmp_path / "out")
        assert load_model(tmp_path / "out").config.vocab_size == 400
        convert(tmp_path / "out", tmp_path / "again")
        assert not (tmp_path / "again" / "tokenizer.model").exists()

    def test_the_card_gives_every_argument_that_decides_what_is_written(
        self, tmp_path, tiny_folder, tiny_model, tokenizer_path
    ):
        checkpoint = corenet_file(tmp_path / "a.pt", tiny_model, padding=112)
        convert(
            checkpoint,
            tmp_path / "out",
            config=tiny_folder / "config.json",
            tokenizer=tokenizer_path,
            keep_padding=True,
            revision="v1",
            dtype="float16",
            quantize=4,
            group_size=32,
        )
        command = (tmp_path / "out" / "README.md").read_text().split("```")[1].strip()
        assert command == (
            "openelm-mlx convert a.pt --quantize 4 --group-size 32 --dtype float16 --config config.json "
            "--tokenizer tokenizer.model --keep-padding --revision v1"
        )

    def test_existing_output_is_kept_without_force(self, tmp_path, tiny_folder):
        convert(tiny_folder, tmp_path / "out")
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        with pytest.raises(OutputExistsError, match="force"):
            convert(tiny_folder, tmp_path / "out", quantize=4)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        convert(tiny_folder, tmp_path / "out", quantize=4, force=True)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() != before

    def test_a_small_disk_is_noticed_before_writing(self, tmp_path, tiny_folder, monkeypatch):
        monkeypatch.setattr(output.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
        with pytest.raises(DiskSpaceError, match="MiB free"):
            convert(tiny_folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_memory_stays_near_the_largest_tensor(self, tmp_path, tiny_config):
        config = replace(tiny_config, vocab_size=20_000)
        folder = write_folder(tmp_path / "in", random_model(config))
        largest = max(t.nbytes for t in read_safetensors(folder / "model.safetensors").values())
        total = sum(t.nbytes for t in read_safetensors(folder / "model.safetensors").values())
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        convert(folder, tmp_path / "out", quantize=4, tokenizer="none")
        assert mx.get_peak_memory() - before < 2.5 * largest < 1.2 * 2.5 * total


class TestBadSources:
    """Each is told in words, and leaves nothing behind."""

    def refused(self, tmp_path, source, error, match, **arguments):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(error, match=match):
            convert(source, tmp_path / "out", tokenizer="none", **arguments)
        assert sorted(tmp_path.iterdir()) == before

    def test_missing_file(self, tmp_path):
        self.refused(tmp_path, tmp_path / "x.pt", SourceError, "does not exist")
        self.refused(tmp_path, str(tmp_path / "x"), SourceError, "does not exist")

    def test_empty_folder(self, tmp_path):
        (tmp_path / "in").mkdir()
        self.refused(tmp_path, tmp_path / "in", SourceError, r"no config\.json")

    def test_no_configuration(self, tmp_path, tiny_model):
        path = corenet_file(tmp_path / "x.pt", tiny_model)
        self.refused(tmp_path, path, ConfigError, "`config` to 270M")

    def test_configuration_of_another_size(self, tmp_path, tiny_model):
        path = corenet_file(tmp_path / "x.pt", tiny_model)
        self.refused(tmp_path, path, WeightsError, "missing: .*transformer.layers.3", config="270M")

    def test_tensor_missing(self, tmp_path, tiny_folder):
        self.change(tiny_folder, lambda arrays: arrays.pop("transformer.layers.1.ffn.proj_2.weight"))
        self.refused(tmp_path, tiny_folder, WeightsError, r"missing: transformer.layers.1.ffn.proj_2.weight")

    def test_tensor_unexpected(self, tmp_path, tiny_folder):
        self.change(tiny_folder, lambda arrays: arrays.update({"transformer.layers.9.norm.weight": mx.ones(3)}))
        self.refused(tmp_path, tiny_folder, WeightsError, r"unexpected: transformer.layers.9.norm.weight")

    def test_tensor_of_another_shape(self, tmp_path, tiny_folder):
        self.change(tiny_folder, lambda arrays: arrays.update({"transformer.norm.weight": mx.ones(3)}))
        self.refused(tmp_path, tiny_folder, WeightsError, r"transformer.norm.weight has shape \(3,\).*\(128,\)")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_tensor_with_nan(self, tmp_path, tiny_folder, value):
        bad = mx.ones(128)
        bad[5] = value
        self.change(tiny_folder, lambda arrays: arrays.update({"transformer.norm.weight": bad}))
        self.refused(tmp_path, tiny_folder, WeightsError, r"norm\.weight contains NaN")
        with pytest.raises(WeightsError, match=r"norm\.weight contains NaN"):
            load(tiny_folder)

    def test_truncated_weights(self, tmp_path, tiny_folder):
        path = tiny_folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
        self.refused(tmp_path, tiny_folder, WeightsError, "damaged or incomplete")

    def test_missing_shard(self, tmp_path, tiny_folder, monkeypatch):
        monkeypatch.setattr(output, "SHARD_BYTES", 300_000)
        convert(tiny_folder, tmp_path / "in", tokenizer="none")
        next((tmp_path / "in").glob("model-00002-of-*")).unlink()
        self.refused(tmp_path, tmp_path / "in", WeightsError, "incomplete: model-00002")

    def test_vocabulary_too_large_for_the_tokenizer(self, tmp_path, config_file, tiny_model, tokenizer_path):
        path = corenet_file(tmp_path / "x.pt", tiny_model, padding=800)
        with pytest.raises(ConfigError, match=r"1,200 entries, but the tokenizer has 400"):
            convert(path, tmp_path / "out", tokenizer=tokenizer_path)

    def test_checkpoints_of_different_models(self, tmp_path, config_file, tiny_model):
        one = corenet_file(tmp_path / "1.pt", tiny_model)
        other = corenet_file(tmp_path / "2.pt", tiny_model, padding=112)
        self.refused(tmp_path, [one, other], WeightsError, "cannot be averaged")

    def test_folders_of_different_models(self, tmp_path, tiny_folder, tiny_config):
        other = write_folder(tmp_path / "other", random_model(replace(tiny_config, ffn_with_glu=False)))
        self.refused(tmp_path, [tiny_folder, other], WeightsError, "cannot be averaged")

    @staticmethod
    def change(folder, function):
        arrays = mx.load(str(folder / "model.safetensors"))
        function(arrays)
        mx.eval(arrays)
        mx.save_safetensors(str(folder / "new.safetensors"), arrays)
        (folder / "new.safetensors").rename(folder / "model.safetensors")


_SLOW_CONVERSION = """
import sys, time
from mlx_openelm import convert
print("ready", flush=True)
convert(sys.argv[1], sys.argv[2], force=True, tokenizer=sys.argv[3],
        on_progress=lambda *_: time.sleep(0.005))
print("done", flush=True)
"""


class TestInterruption:
    @pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
    def test_a_process_killed_at_any_moment_leaves_the_whole_folder_or_none(self, tmp_path, tiny_folder, replacing):
        """Twenty processes in all, killed at random between their first and their last step."""
        source, target = tmp_path / "tiny", tmp_path / "out" / "model"
        target.parent.mkdir()
        tokenizer = str(tiny_folder / "tokenizer.model")
        if replacing:
            convert(source, target, quantize=4)
        rng = random.Random(replacing)
        finished = 0
        for _ in range(10):
            process = subprocess.Popen(
                [sys.executable, "-c", _SLOW_CONVERSION, source, target, tokenizer], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            finished += "done" in process.communicate()[0]
            if target.exists():
                model, tokens = load(target, dtype=mx.float32)
                assert mx.all(mx.isfinite(model(TOKENS))).item()
                assert tokens.vocab_size == 400
                assert len(list(target.iterdir())) == 8
            else:
                assert not replacing
        assert finished < 10
        convert(source, target, force=True)
        assert os.listdir(target.parent) == ["model"]  # the next conversion clears what was left

    def test_an_error_half_way_leaves_nothing(self, tmp_path, tiny_folder):
        def stop(name, done, total):
            if done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(tiny_folder, tmp_path / "out" / "model", on_progress=stop)
        assert sorted(os.listdir(tmp_path)) == ["tiny"]
