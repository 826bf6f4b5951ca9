import json

import pytest

from conftest import draw, refused, run
from mlx_openelm import PRESETS, config_from_dict, read_config
from mlx_openelm.errors import ConfigError, MissingPackageError, OutputError
from mlx_openelm.model.design import design, fit, parse_count, parse_multipliers, uniform_counterpart
from mlx_openelm.model.openelm import parameter_shapes


@pytest.mark.parametrize("size", PRESETS)
def test_the_published_models_come_out_exactly(size):
    assert fit(parse_count(size)) == PRESETS[size]


@pytest.mark.parametrize("vocab_size", [4096, 32000])
@pytest.mark.parametrize("wanted", ["5M", "20M", "60M", "200M", "700M", "2B", "7B"])
def test_any_budget_is_met_with_usual_proportions(wanted, vocab_size):
    config = fit(parse_count(wanted), vocab_size=vocab_size)
    assert config.num_parameters == pytest.approx(parse_count(wanted), rel=0.06)
    assert 20 <= config.model_dim / config.num_transformer_layers <= 160


@pytest.mark.parametrize("change", [{}, {"share_input_output_layers": False}, {"ffn_with_glu": False}])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameters_are_counted_as_the_network_has_them(tiny_config, change, qk_norm):
    values = {**tiny_config.to_dict(), **change, "normalize_qk_projections": qk_norm}
    del values["tie_word_embeddings"]
    config = config_from_dict(values)
    shapes = parameter_shapes(config)
    sizes = {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in shapes.items()}
    assert config.num_parameters == sum(sizes.values())
    for layer, counted in enumerate(config.layer_parameters):
        assert counted == sum(size for name, size in sizes.items() if f".layers.{layer}." in name)


@pytest.mark.parametrize("size", PRESETS)
def test_the_uniform_model_has_equal_layers_and_as_many_parameters(size):
    uniform = uniform_counterpart(PRESETS[size])
    assert len(set(uniform.ffn_dims)) == len(set(uniform.num_query_heads)) == 1
    assert uniform.num_parameters == pytest.approx(PRESETS[size].num_parameters, rel=0.002)
    assert uniform.model_dim == PRESETS[size].model_dim
    assert config_from_dict(uniform.to_dict()) == uniform


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.1B", 1_100_000_000), ("270m", 270_000_000), ("40k", 40_000), ("5_000_000", 5_000_000), ("3G", 3_000_000_000)],
)
def test_numbers_of_parameters(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "-3M", "1.2.3B", "many", "0"])
def test_what_is_no_number_of_parameters(text):
    with pytest.raises(ConfigError, match="number of parameters"):
        parse_count(text)


def test_multipliers():
    assert parse_multipliers("--qkv", "0.5:1.0") == (0.5, 1.0)
    assert parse_multipliers("--qkv", "2") == (2.0,)
    for text in ("", "1:2:3", "a", "0:1", "nan", "-1"):
        with pytest.raises(ConfigError, match="--qkv"):
            parse_multipliers("--qkv", text)


def test_a_budget_below_the_embedding_is_refused():
    with pytest.raises(ConfigError, match="vocabulary of 32,000"):
        fit(1_000_000)


class TestCommand:
    def test_the_line_that_follows_works_as_typed_or_says_what_it_stands_for(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        out = run("design", "--params", "1M", "--save", "a.json")[1]
        assert out.endswith('--data "TEXTS/*.txt" --output run, with your texts in place of TEXTS\n')
        (tmp_path / "examples" / "stories").mkdir(parents=True)
        (tmp_path / "examples" / "stories" / "one.txt").touch()
        out = run("design", "--params", "1M", "--save", "b.json")[1]
        assert out.endswith('--model b.json --data "examples/stories/*.txt" --output run\n')

    def test_table(self):
        status, text, _ = run("design", "--params", "270M")
        assert status == 0
        assert "271,527,168" in text
        assert "2,896" in text  # the uniform model's FFN
        assert "16,128" in text  # KV bytes of a token

    def test_json(self):
        found = json.loads(run("design", "--params", "270M", "--json")[1])
        assert found["layerwise"]["parameters"] == 271_527_168
        assert found["layerwise"]["kv_bytes_per_token"] == 16_128
        assert [layer["ffn_dim"] for layer in found["layerwise"]["layers"]] == list(PRESETS["270M"].ffn_dims)
        assert sum(layer["kv_bytes_per_token"] for layer in found["layerwise"]["layers"]) == 16_128

    @pytest.mark.parametrize("uniform", [False, True])
    def test_what_is_saved_can_be_trained(self, tmp_path, uniform):
        shape = ["--layers", 4, "--model-dim", 128, "--head-dim", 16, "--gqa", 2, "--vocab", 400]
        more = ["--uniform"] if uniform else []
        assert run("design", *shape, "--save", tmp_path / "config.json", *more)[0] == 0
        config = read_config(tmp_path / "config.json")
        assert (len(set(config.ffn_dims)) == 1) == uniform
        assert config.vocab_size == 400

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "either --params"),
            (["--params", "1B", "--layers", "3"], "either --params"),
            (["--layers", "3"], "either --params"),
            (["--params", "lots"], "number of parameters"),
            (["--params", "1B", "--qkv", "x"], "--qkv"),
            (["--params", "1B", "--gqa", "0"], "--gqa must be positive; got 0"),
            (["--params", "1M", "--vocab", "32000"], "the nearest has"),
            (["--params", "270M", "--save", f"{__file__}/config.json"], "cannot be written"),
            (["--params", "270M", "--plot", "picture.frob"], "picture.frob cannot be written"),
        ],
    )
    def test_mistakes_are_one_line(self, arguments, said):
        assert said in refused("design", *arguments)


def test_pictures_are_drawn(tmp_path):
    from mlx_openelm.plot import plot_design

    found = design(PRESETS["270M"])
    draw(plot_design, found, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes()[16:24] == (800).to_bytes(4, "big") + (640).to_bytes(4, "big")
    draw(plot_design, found, tmp_path / "a.svg")
    assert "uniform" in (tmp_path / "a.svg").read_text()
    with pytest.raises(OutputError, match="cannot be written"):
        draw(plot_design, found, tmp_path / "a.svg" / "b.png")


def test_pictures_say_what_they_need(tmp_path, monkeypatch):
    import sys

    from mlx_openelm.plot import plot_design

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        MissingPackageError, match="plots need matplotlib, which is not installed: `pip install matplotlib`"
    ):
        draw(plot_design, design(PRESETS["270M"]), tmp_path / "a.png")
