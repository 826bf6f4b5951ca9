import json

import pytest
import yaml

from conftest import GOLDEN, GOLDEN_CASES
from mlx_openelm import PRESETS, OpenELMConfig, OpenELMError
from mlx_openelm.config import make_divisible
from mlx_openelm.errors import ConfigError

# Llama's vocabulary of 32,000, as published with the models.
PUBLISHED_PARAMETERS = {"270M": 271_527_168, "450M": 457_179_136, "1.1B": 1_079_891_456, "3B": 3_036_647_424}


@pytest.mark.parametrize(("size", "expected"), PUBLISHED_PARAMETERS.items())
def test_presets_have_the_published_number_of_parameters(size, expected):
    assert PRESETS[size].num_parameters == expected


def test_widths_follow_the_paper():
    config = PRESETS["270M"]
    assert config.num_query_heads == (12, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16, 16, 20, 20, 20, 20)
    assert config.num_kv_heads == (3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5)
    assert config.ffn_multipliers[:3] == (0.5, 0.73, 0.97)
    assert config.ffn_dims[0] == 768  # 640 is nearer to 512 but would lose more than a tenth
    assert config.ffn_dims[-1] == 5120


@pytest.mark.parametrize(("value", "expected"), [(1, 8), (11.9, 16), (12, 16), (19.9, 24), (16, 16), (17.5, 16)])
def test_make_divisible_loses_at_most_a_tenth(value, expected):
    assert make_divisible(value, 8) == expected


@pytest.mark.parametrize("name", ["1.1B", "OpenELM-1_1B", "apple/OpenELM-1_1B-Instruct"])
def test_presets_go_by_many_names(name):
    assert OpenELMConfig.preset(name) == PRESETS["1.1B"]


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_what_was_read_is_written_back_equal(case):
    config = OpenELMConfig.from_file(GOLDEN / case / "config.json")
    assert OpenELMConfig.from_dict(config.to_dict()) == config
    assert OpenELMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("size", PRESETS)
def test_per_layer_lists_follow_from_the_multipliers(size):
    values = PRESETS[size].to_dict()
    for name in ("num_query_heads", "num_kv_heads"):
        del values[name]
    values["ffn_multipliers"] = [0.5, 4.0]
    assert OpenELMConfig.from_dict(values) == PRESETS[size]


def test_written_configuration_asks_for_no_remote_code():
    assert "auto_map" not in PRESETS["270M"].to_dict()


def test_corenet_yaml_is_read(tmp_path):
    section = {"model_name": "OpenELM-270M", "vocab_size": 32128, "max_context_length": 1024}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({"model": {"language_modeling": {"general_gpt": section}}, "stats": {}}))
    config = OpenELMConfig.from_file(path)
    assert (config.vocab_size, config.max_context_length, config.model_dim) == (32128, 1024, 1280)


def test_configuration_of_apples_mlx_port_is_read():
    values = {"model_name": "OpenELM-450M", "vocab_size": 32000, "max_context_length": 2048}
    assert OpenELMConfig.from_dict(values) == PRESETS["450M"]


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
        OpenELMConfig.from_dict(values)


def test_harmless_keys_are_passed_over():
    values = {**PRESETS["270M"].to_dict(), "auto_map": {"AutoModel": "x"}, "initializer_range": 0.02, "use_cache": True}
    assert OpenELMConfig.from_dict(values) == PRESETS["270M"]


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"model_name": "GPT-2"}'])
def test_damaged_files_are_refused_with_their_name(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(OpenELMError, match=r"config\.json"):
        OpenELMConfig.from_file(path)
