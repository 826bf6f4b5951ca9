import json

import pytest
import yaml

from conftest import GOLDEN, GOLDEN_CASES
from mlx_openelm import PRESETS, OpenELMError, config_from_dict, read_config
from mlx_openelm.conversion.read.config import read_config_file
from mlx_openelm.errors import ConfigError


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_what_was_read_is_written_back_equal(case):
    config = read_config_file(GOLDEN / case / "config.json")
    assert config_from_dict(config.to_dict()) == config
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("size", PRESETS)
def test_per_layer_lists_follow_from_the_multipliers(size):
    values = PRESETS[size].to_dict()
    for name in ("num_query_heads", "num_kv_heads"):
        del values[name]
    values["ffn_multipliers"] = [0.5, 4.0]
    assert config_from_dict(values) == PRESETS[size]


def test_corenet_yaml_is_read(tmp_path):
    section = {"model_name": "OpenELM-270M", "vocab_size": 32128, "max_context_length": 1024}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({"model": {"language_modeling": {"general_gpt": section}}, "stats": {}}))
    config = read_config_file(path)
    assert (config.vocab_size, config.max_context_length, config.model_dim) == (32128, 1024, 1280)


def test_configuration_of_apples_mlx_port_is_read():
    values = {"model_name": "OpenELM-450M", "vocab_size": 32000, "max_context_length": 2048}
    assert config_from_dict(values) == PRESETS["450M"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sliding_window": 512}, "sliding_window"),
        ({"model_type": "llama"}, "model_type"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ({"head_dim": "64"}, "head_dim"),
        ({"head_dim": True}, "head_dim"),
        ({"head_dim": 63, "qkv_multipliers": None}, "head_dim"),
        ({"num_query_heads": [12, 12]}, "num_query_heads"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"activation_fn_name": "tanh"}, "activation_fn_name"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"eos_token_id": 40000}, "eos_token_id"),
        ({"num_transformer_layers": 0}, "num_transformer_layers"),
        ({"num_gqa_groups": 0}, "num_gqa_groups"),
        ({"model_dim": None}, "model_dim"),
    ],
)
def test_what_could_change_the_result_is_refused_by_name(change, named):
    values = {**PRESETS["270M"].to_dict(), **change}
    with pytest.raises(ConfigError, match=named):
        config_from_dict(values)


@pytest.mark.parametrize(
    "change",
    [
        {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
        {"max_length": 20, "temperature": 0.7, "top_k": 50, "do_sample": True},
        {"tokenizer_class": "LlamaTokenizer", "problem_type": None, "torchscript": False, "use_bfloat16": False},
        {"unsloth_version": "2025.1", "unsloth_fixed": True, "_attn_implementation_autoset": True, "is_decoder": True},
        {"pruned_heads": {}, "layer_types": None, "task_specific_params": None, "something_of_tomorrow": None},
        {"hidden_size": 1280, "num_hidden_layers": 16, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 10000},
        {"pretraining_tp": 1, "is_encoder_decoder": False, "add_cross_attention": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_keys_of_other_libraries_that_cannot_change_the_result_do_not_matter(change):
    assert config_from_dict({**PRESETS["270M"].to_dict(), **change}) == PRESETS["270M"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 1281}, "hidden_size is 1281, but model_dim is 1280"),
        ({"hidden_size": [1280]}, "hidden_size"),
        ({"num_hidden_layers": 17}, "num_hidden_layers"),
        ({"rope_theta": 500000.0}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_scaling": {"type": ["default"]}}, "rope_scaling"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"layer_types": ["sliding_attention"] * 16}, "layer_types"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ],
)
def test_other_names_must_agree(change, said):
    with pytest.raises(ConfigError, match=said):
        config_from_dict({**PRESETS["270M"].to_dict(), **change})


def test_harmless_keys_are_passed_over():
    values = {**PRESETS["270M"].to_dict(), "auto_map": {"AutoModel": "x"}, "initializer_range": 0.02, "use_cache": True}
    assert config_from_dict(values) == PRESETS["270M"]


def test_a_file_its_folder_and_a_preset_can_be_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["270M"].to_dict()))
    assert read_config(tmp_path / "config.json") == read_config(str(tmp_path)) == read_config("270M")
    with pytest.raises(ConfigError, match=r"missing\.json cannot be read"):
        read_config(tmp_path / "missing.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"model_name": "GPT-2"}'])
def test_damaged_files_are_refused_with_their_name(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(OpenELMError, match=r"config\.json"):
        read_config_file(path)
