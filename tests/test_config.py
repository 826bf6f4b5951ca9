import json

import pytest

from mlx_openelm import PRESETS, OpenELMConfig, config_from_dict
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


def test_written_configuration_asks_for_no_remote_code():
    assert "auto_map" not in PRESETS["270M"].to_dict()


def test_defaults_are_those_of_the_published_models():
    config = OpenELMConfig(1, 64, 32, (2,), (2,), (1.0,))
    assert (config.vocab_size, config.max_context_length, config.rope_max_length) == (32000, 2048, 4096)
    assert (config.num_gqa_groups, config.ffn_dim_divisor, config.rope_freq_constant) == (4, 256, 10000.0)
    assert (config.bos_token_id, config.eos_token_id, config.activation_fn_name) == (1, 2, "swish")
    assert config.ffn_with_glu
    assert config.normalize_qk_projections
    assert config.share_input_output_layers
    scaled = OpenELMConfig.layerwise(3, 1024, 64)
    assert scaled.qkv_multipliers == (0.5, 1.0)
    assert scaled.ffn_multipliers == (0.5, 2.25, 4.0)
    assert (scaled.num_query_heads, scaled.num_kv_heads) == ((8, 12, 16), (2, 3, 4))
    assert scaled.ffn_dims == (512, 2304, 4096)


SMALL = {
    "num_transformer_layers": 2,
    "model_dim": 64,
    "head_dim": 32,
    "num_query_heads": (2, 4),
    "num_kv_heads": (1, 2),
    "ffn_multipliers": (1.0, 2.0),
    "vocab_size": 10,
    "ffn_dim_divisor": 16,
}


def test_parameters_are_counted_by_hand():
    layers = (
        64 * (2 * 2 + 2 * 1) * 32 + 64 * 3 * 64 + 2 * 64 + 2 * 32,
        64 * (2 * 4 + 2 * 2) * 32 + 64 * 3 * 128 + 2 * 64 + 2 * 32,
    )
    config = OpenELMConfig(**SMALL)
    assert config.layer_parameters == layers
    assert config.num_parameters == sum(layers) + 10 * 64 + 64
    untied = OpenELMConfig(**SMALL, share_input_output_layers=False)
    assert untied.num_parameters == sum(layers) + 2 * 10 * 64 + 64
    plain = OpenELMConfig(**SMALL, ffn_with_glu=False, normalize_qk_projections=False)
    assert plain.layer_parameters == (layers[0] - 64 * 64 - 2 * 32, layers[1] - 64 * 128 - 2 * 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_dim": 0}, "model_dim must be positive; got 0"),
        ({"num_transformer_layers": -1}, "num_transformer_layers must be positive"),
        ({"head_dim": float("nan")}, "head_dim must be positive"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"max_context_length": 0}, "max_context_length must be positive"),
        ({"num_query_heads": (2,)}, "num_query_heads has 1 values"),
        ({"num_kv_heads": (1, 2, 3)}, "num_kv_heads has 3 values"),
        ({"ffn_multipliers": (1.0, 0.0)}, r"ffn_multipliers must be positive; got 0\.0"),
        ({"num_kv_heads": (1, 3)}, "layer 1 has 4 query heads"),
        ({"head_dim": 33}, "head_dim must be even"),
        ({"activation_fn_name": "relu6"}, "unknown activation_fn_name 'relu6'"),
        ({"bos_token_id": 10}, "bos_token_id is 10"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": (2, 10)}, "eos_token_id is 10"),
        ({"eos_token_id": ()}, "eos_token_id is an empty list"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        OpenELMConfig(**{**SMALL, **change})
    assert OpenELMConfig(**{**SMALL, "bos_token_id": 9, "eos_token_id": 0}).bos_token_id == 9


def test_several_ids_may_end_a_text():
    config = OpenELMConfig(**{**SMALL, "eos_token_id": (2, 5, 2)})
    assert (config.eos_token_id, config.eos_token_ids) == ((2, 5), (2, 5))
    assert config.to_dict()["eos_token_id"] == [2, 5]
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    single = OpenELMConfig(**{**SMALL, "eos_token_id": (2,)})
    assert (single.eos_token_id, single.eos_token_ids, single.to_dict()["eos_token_id"]) == (2, (2,), 2)
    assert single.with_eos(2, 7).eos_token_ids == (2, 7)


def test_multipliers_are_one_two_or_one_a_layer():
    def widths(count, *multipliers):
        return OpenELMConfig.layerwise(count, 64, 32, ffn_multipliers=multipliers, ffn_dim_divisor=1).ffn_multipliers

    assert widths(4, 1.0) == (1.0,) * 4
    assert widths(4, 1.0, 2.0) == (1.0, 1.33, 1.67, 2.0)
    assert widths(4, 1.0, 3.0, 2.0, 5.0) == (1.0, 3.0, 2.0, 5.0)
    assert widths(2, 1.0, 2.0) == (1.0, 2.0)
    assert widths(1, 1.0, 2.0) == (1.0,)
    with pytest.raises(ConfigError, match="ffn_multipliers has 3 values"):
        widths(4, 1.0, 2.0, 3.0)
    with pytest.raises(ConfigError, match="qkv_multipliers has 3 values"):
        OpenELMConfig.layerwise(4, 64, 32, (1.0, 2.0, 3.0))
    for name in ("num_gqa_groups", "ffn_dim_divisor"):
        with pytest.raises(ConfigError, match=f"{name} must be positive"):
            OpenELMConfig.layerwise(2, 64, 32, **{name: 0})
    with pytest.raises(ConfigError, match="num_transformer_layers must be positive"):
        OpenELMConfig.layerwise(0, 64, 32)


def test_what_is_written_is_complete():
    config = OpenELMConfig(**SMALL, share_input_output_layers=False)
    written = config.to_dict()
    assert written["model_type"] == "openelm"
    assert written["architectures"] == ["OpenELMForCausalLM"]
    assert written["normalization_layer_name"] == "rms_norm"
    assert written["tie_word_embeddings"] is False
    assert written["num_query_heads"] == [2, 4]
    assert "qkv_multipliers" not in written
    assert config_from_dict(written) == config
    assert OpenELMConfig.layerwise(2, 64, 32, (0.5, 1.0)).to_dict()["qkv_multipliers"] == [0.5, 1.0]
    with pytest.raises(ConfigError, match="'7B' is not a published model"):
        OpenELMConfig.preset("7B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 0}, "head_dim must be positive; got 0"),
        ({"rope_freq_constant": 10**400}, "rope_freq_constant must be"),
        ({"rope_freq_constant": 1e39}, "rope_freq_constant must be above 1 and at most 1e"),
        ({"rope_freq_constant": 0.0}, r"rope_freq_constant must be above 1 and at most 1e\+15; got 0\.0"),
        ({"rope_freq_constant": -5.0}, "rope_freq_constant must be above 1"),
        ({"rope_freq_constant": float("nan")}, "rope_freq_constant must be above 1 and at most .*; got nan"),
        ({"qkv_multipliers": [float("inf")]}, "qkv_multipliers must be at most 10,000; got inf"),
        ({"qkv_multipliers": [float("nan"), 1.0]}, "qkv_multipliers must be positive; got nan"),
        ({"ffn_multipliers": [1e39, 1e39]}, "ffn_multipliers must be at most"),
        ({"ffn_dim_divisor": 0}, "ffn_dim_divisor must be positive; got 0"),
        ({"num_gqa_groups": 0}, "num_gqa_groups must be positive"),
        ({"num_transformer_layers": 1_000_000_000}, "num_transformer_layers must be at most 10,000; got 1000000000"),
        ({"model_dim": 10**400}, r"model_dim must be at most 1,048,576; got 1000+\.\.\."),
        ({"rope_max_length": -1}, "rope_max_length must be positive"),
        ({"head_dim": 1 << 16, "qkv_multipliers": [4_000.0] * 2, "model_dim": 1 << 20}, "layer 0 is .* wide; at most"),
        ({"ffn_multipliers": [1.0, 10_000.0], "model_dim": 1 << 20}, "layer 1 is 10,485,760,000 wide; at most"),
    ],
)
def test_numbers_of_a_file_have_two_bounds(change, message):
    written = OpenELMConfig.layerwise(2, 64, 32, num_gqa_groups=2, ffn_dim_divisor=16).to_dict()
    for name in ("num_query_heads", "num_kv_heads"):
        del written[name]
    with pytest.raises(ConfigError, match=message) as found:
        config_from_dict({**written, **change})
    assert len(str(found.value)) < 200
