import pytest

from mlx_openelm import PRESETS, OpenELMConfig
from mlx_openelm.config import make_divisible

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
