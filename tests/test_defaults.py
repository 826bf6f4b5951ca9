"""What a model's generation_config.json says about sampling."""

import json

import pytest

from mlx_openelm import Chat, SamplingConfig, convert, generate, generate_batch, load, load_model
from mlx_openelm.errors import ConfigError, SamplingError
from mlx_openelm.generation.defaults import default_sampling, given_sampling, sampling_of

GREEDY = SamplingConfig()


@pytest.fixture
def asking(tiny_folder):
    """A model whose folder asks for a strong penalty."""
    (tiny_folder / "generation_config.json").write_text('{"repetition_penalty": 5.0, "do_sample": false}')
    return tiny_folder


def test_the_penalty_counts_in_any_case_and_the_rest_where_the_model_samples():
    values = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 2}
    assert sampling_of({}, "x") == GREEDY
    assert sampling_of(values, "x") == SamplingConfig(repetition_penalty=1.1)
    found = sampling_of({"do_sample": True, **values}, "x")
    assert found == SamplingConfig(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    assert sampling_of({"do_sample": True}, "x") == SamplingConfig(temperature=1.0)


def test_what_is_given_goes_before(tiny_model, asking):
    assert default_sampling(tiny_model, seed=3) == SamplingConfig(seed=3)
    assert default_sampling(load_model(asking), seed=3) == SamplingConfig(repetition_penalty=5.0, seed=3)
    assert default_sampling(load_model(asking), repetition_penalty=1.0) == GREEDY
    assert given_sampling(temperature=None, seed=3) == {"seed": 3}
    with pytest.raises(SamplingError, match="top_p"):
        given_sampling(top_p=3.0)


def test_python_samples_as_the_model_asks_unless_it_is_told_otherwise(asking):
    model, tokenizer = load(asking)
    asked = SamplingConfig(repetition_penalty=5.0)
    assert model.sampling == load_model(asking).sampling == asked
    wanted = generate(model, tokenizer, "Once", max_tokens=12, sampling=asked)
    plain = generate(model, tokenizer, "Once", max_tokens=12, sampling=GREEDY)
    assert generate(model, tokenizer, "Once", max_tokens=12) == wanted != plain
    assert [done.text for _, done in generate_batch(model, tokenizer, ["Once"], max_tokens=12)] == [wanted]


def test_a_chat_does_too(asking, chat_tokenizer):
    model = load_model(asking)
    assert Chat(model, chat_tokenizer).sampling == SamplingConfig(repetition_penalty=5.0)
    assert Chat(model, chat_tokenizer, sampling=GREEDY).sampling == GREEDY


def test_conversion_keeps_it(tmp_path, asking):
    convert(asking, tmp_path / "converted", tokenizer="none")
    assert load_model(tmp_path / "converted").sampling == SamplingConfig(repetition_penalty=5.0)
    written = json.loads((tmp_path / "converted" / "generation_config.json").read_text())
    assert (written["repetition_penalty"], written["do_sample"]) == (5.0, False)


@pytest.mark.parametrize("value", ["high", True, -1, [1]])
def test_a_value_that_cannot_be_is_an_error_with_the_file(asking, value):
    (asking / "generation_config.json").write_text(json.dumps({"repetition_penalty": value}))
    with pytest.raises(ConfigError, match=r"tiny/generation_config.json: .*repetition_penalty"):
        load_model(asking)
