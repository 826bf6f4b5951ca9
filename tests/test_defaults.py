"""What a model's generation_config.json says about sampling."""

import json

import pytest

from mlx_openelm import SamplingConfig, convert
from mlx_openelm.errors import ConfigError, SamplingError
from mlx_openelm.generation.defaults import sampling_of


def written(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_without_a_file_the_defaults_hold(tmp_path):
    assert sampling_of(tmp_path, temperature=None, seed=3) == SamplingConfig(seed=3)


def test_the_penalty_counts_in_any_case_and_the_rest_where_the_model_samples(tmp_path):
    values = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 2}
    assert sampling_of(written(tmp_path, **values)) == SamplingConfig(repetition_penalty=1.1)
    found = sampling_of(written(tmp_path, do_sample=True, **values))
    assert found == SamplingConfig(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    assert sampling_of(written(tmp_path, do_sample=True)) == SamplingConfig(temperature=1.0)


def test_what_is_given_goes_before(tmp_path):
    folder = written(tmp_path, do_sample=True, temperature=0.7, repetition_penalty=1.1)
    assert sampling_of(folder, temperature=0.0, repetition_penalty=1.0) == SamplingConfig()


def test_conversion_and_merging_keep_it(tmp_path, tiny_folder):
    (tiny_folder / "generation_config.json").write_text(
        '{"repetition_penalty": 1.3, "do_sample": false, "eos_token_id": 2}'
    )
    convert(tiny_folder, tmp_path / "converted", tokenizer="none")
    assert sampling_of(tmp_path / "converted") == SamplingConfig(repetition_penalty=1.3)


@pytest.mark.parametrize("value", ["high", True, -1, [1]])
def test_a_value_that_cannot_be_is_an_error_with_the_file(tmp_path, value):
    with pytest.raises(ConfigError, match=r"generation_config.json: .*repetition_penalty"):
        sampling_of(written(tmp_path, repetition_penalty=value))
    with pytest.raises(SamplingError, match="top_p"):
        sampling_of(tmp_path, top_p=3.0)
