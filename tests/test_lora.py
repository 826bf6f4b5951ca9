from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from conftest import (
    ADAPTED_CONFIG as CONFIG,
    ADAPTER_TOKENS as TOKENS,
    ADAPTERS as METHODS,
    assert_close,
    random_model,
    write_folder,
)
from mlx_openelm import load_model
from mlx_openelm.conversion.adapters.forms import open_adapter
from mlx_openelm.conversion.convert import convert
from mlx_openelm.conversion.open import open_source
from mlx_openelm.data.batch import TokenBatch, make_batch, target_mask
from mlx_openelm.errors import AdapterError, ConfigError
from mlx_openelm.machine.device import replaced_choices
from mlx_openelm.merging import write_merged
from mlx_openelm.model.adapters import about_base, save_adapter
from mlx_openelm.model.lora import (
    EMBEDDING_TARGET,
    LINEAR_TARGETS,
    AdapterConfig,
    adapter_parameters,
    adapter_paths,
    adapters,
    add_adapter,
    cache_scales,
)
from mlx_openelm.training.gradients import gradients_of
from mlx_openelm.training.loss import CrossEntropy
from mlx_openelm.training.pretrain_recipe import PretrainRecipe
from mlx_openelm.training.trainer import Trainer

BASES = ["float32", "bfloat16", 2, 3, 4, 5, 6, 8, "mxfp4", "nvfp4"]


class OneBatch:
    """Data of one batch, again and again."""

    rows_per_step = 2
    rows_per_entry = 1
    fingerprint = "one"

    def step(self, step, first=0, count=None):
        segments = np.zeros_like(TOKENS)
        return TokenBatch(TOKENS, segments, target_mask(segments, False))

    def validation(self, first, stride):
        return [self.step(0)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Model folders of one network in every form."""
    root = tmp_path_factory.mktemp("bases")
    whole = write_folder(root / "whole", random_model(CONFIG))
    folders = {}
    for kind in BASES:
        folder = root / str(kind)
        options = {"dtype": "float32"}
        if kind == "bfloat16":
            options = {"dtype": kind}
        elif isinstance(kind, int):
            options |= {"quantize": kind, "group_size": 32}
        elif kind != "float32":
            options |= {"mode": kind}
        convert(whole, folder, tokenizer="none", **options)
        folders[kind] = folder
    return folders


def trainer_of(model, config, dtype="float32", learning_rate=0.01, dropout=0.0):
    recipe = PretrainRecipe(model=CONFIG, steps=8, batch_size=2, sequence_length=16, warmup_steps=0,
                            learning_rate=learning_rate, weight_decay=0.0, dtype=dtype, z_loss=0.0)  # fmt: skip
    return Trainer(recipe, model, adapter_parameters(model), OneBatch(), CrossEntropy(), dropout=dropout > 0)


def dtype_of(kind):
    return mx.bfloat16 if kind == "bfloat16" else mx.float32


@pytest.mark.parametrize("where", ["linear", "embedding"])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_on_every_base_learns_is_kept_and_merges(bases, tmp_path, method, kind, where):
    targets = LINEAR_TARGETS if where == "linear" else (EMBEDDING_TARGET,)
    config = replace(METHODS[method], targets=targets)
    model = load_model(bases[kind], dtype=dtype_of(kind))
    tokens = mx.array(TOKENS)
    plain = model(tokens)
    add_adapter(model, config)
    model.eval()
    assert mx.array_equal(model(tokens), plain)  # a fresh adapter changes nothing

    trainer = trainer_of(model, config, "bfloat16" if kind == "bfloat16" else "float32")
    before = trainer.validation()["loss"]
    for _ in range(3):
        trainer.take_step()
    assert trainer.validation()["loss"] < before - 0.01

    base_name = str(bases[kind])
    save_adapter(tmp_path, trainer.parameters, config.method, config, about_base(base_name, CONFIG))
    tuned = trainer.current_model().eval()(tokens)
    loaded = load_model(bases[kind], dtype=dtype_of(kind), adapter=tmp_path)
    tolerance = 0.03 * mx.abs(plain).max().item() if kind == "bfloat16" else 2e-5
    assert_close(loaded(tokens), tuned, tolerance)
    assert mx.abs(tuned - plain).max().item() > 10 * tolerance or kind == "bfloat16"

    write_merged(open_source([bases[kind]]), open_adapter(tmp_path), tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype=dtype_of(kind))
    assert_close(merged(tokens), tuned, tolerance)
    assert merged.config.share_input_output_layers == (where == "linear")


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("recompute", [False, True], ids=["at once", "layers"])
@pytest.mark.parametrize("bits", [None, 4])
def test_gradients_are_those_of_finite_differences(bases, method, recompute, bits):
    """Of DoRA in the direction of its magnitudes alone: the length of the sum counts as a constant."""
    model = load_model(bases[bits or "float32"])
    add_adapter(model, replace(METHODS[method], targets=(*LINEAR_TARGETS, EMBEDDING_TARGET)))
    parameters = {
        name: p + 0.1 * mx.random.normal(p.shape, key=mx.random.key(number))
        for number, (name, p) in enumerate(adapter_parameters(model).items())
    }
    model.train()
    batch = make_batch(OneBatch().step(0))
    gradients = gradients_of(model, CrossEntropy(), mx.float32, recompute)
    _, found = gradients(parameters, batch)
    for number, (name, p) in enumerate(parameters.items()):
        if method == "dora" and not name.endswith(".m"):
            continue
        direction = mx.random.normal(p.shape, key=mx.random.key(100 + number))
        direction = direction / mx.linalg.norm(direction)
        step = 0.02
        values = [gradients({**parameters, name: p + sign * step * direction}, batch)[0][0].item() for sign in (1, -1)]
        measured = (values[0] - values[1]) / (2 * step)
        assert mx.sum(found[name] * direction).item() == pytest.approx(measured, rel=0.02, abs=0.02), name


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_memory_savers_change_no_gradient(bases, method, dropout):
    model = load_model(bases[4])
    config = replace(METHODS[method], dropout=dropout, targets=(*LINEAR_TARGETS, EMBEDDING_TARGET))
    add_adapter(model, config)
    parameters = {name: p + 0.1 for name, p in adapter_parameters(model).items()}
    model.train()
    batch = make_batch(OneBatch().step(0)) | ({"dropout": mx.random.key(1)} if dropout else {})
    (sums, expected), (other, found) = (
        gradients_of(model, CrossEntropy(), mx.float32, recompute)(parameters, batch) for recompute in (False, True)
    )
    assert np.array(other) == pytest.approx(np.array(sums), rel=1e-5)
    for name in parameters:
        largest = mx.abs(expected[name]).max().item()
        assert largest > 0
        assert_close(found[name], expected[name], 1e-4 * max(1.0, largest))


def test_dora_by_hand():
    """One output of weights (3, 4) with m = 10: the row keeps its direction and has the length 10."""
    linear = nn.Linear(2, 1, bias=False)
    linear.weight = mx.array([[3.0, 4.0]])
    from mlx_openelm.model.lora import LoRALinear

    layer = LoRALinear(linear, 1, 2.0, magnitude=True)
    assert layer.m.tolist() == [5.0]
    layer.m = mx.array([10.0])
    assert_close(layer(mx.array([[1.0, 1.0]])), mx.array([[14.0]]), 1e-6)
    layer.lora_a, layer.lora_b = mx.array([[1.0], [2.0]]), mx.array([[2.5]])  # w + 2 * 2.5 * (1, 2) = (8, 14)
    assert_close(layer(mx.array([[1.0, 1.0]])), mx.array([[10 * 22 / (8**2 + 14**2) ** 0.5]]), 1e-5)
    layer.cache_scales()
    assert_close(layer.eval()(mx.array([[1.0, 1.0]])), mx.array([[10 * 22 / (8**2 + 14**2) ** 0.5]]), 1e-5)


def test_scale_follows_from_alpha_and_rank():
    assert AdapterConfig(rank=8, alpha=32.0).scale == 4.0
    assert AdapterConfig(rank=16, alpha=32.0, rank_stabilized=True).scale == 8.0


def test_dropout_differs_by_step_and_repeats_with_the_seed(bases):
    def losses(seed):
        model = load_model(bases["float32"])
        config = replace(METHODS["lora"], dropout=0.5)
        add_adapter(model, config)
        model.update(tree_unflatten([(n, p + 0.1) for n, p in adapter_parameters(model).items()]))
        trainer = trainer_of(model, config, learning_rate=1e-9, dropout=0.5)
        trainer.recipe = replace(trainer.recipe, seed=seed)
        return [trainer.take_step()["loss"] for _ in range(3)]

    first = losses(0)
    assert len(set(first)) == 3
    assert losses(0) == first
    assert losses(1) != first


def test_only_the_last_layers_get_an_adapter():
    model = random_model(CONFIG)
    assert adapter_paths(model, ("qkv_proj", "proj_2"), 1) == [
        "transformer.layers.1.attn.qkv_proj",
        "transformer.layers.1.ffn.proj_2",
    ]
    assert len(adapter_paths(model, LINEAR_TARGETS)) == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": ("q_proj",)}, r"q_proj matches no matrix \(choose from qkv_proj, .*token_embeddings\)"),
        ({"targets": ()}, "an empty list of targets matches no matrix"),
        ({"layers": 3}, "layers must be at most 2, .*got 3"),
    ],
)
def test_targets_that_match_nothing_are_refused(change, said):
    with pytest.raises(AdapterError, match=said):
        add_adapter(random_model(CONFIG), replace(AdapterConfig(), **change))


@pytest.mark.parametrize("change", [{"rank": 0}, {"dropout": 1.0}, {"layers": -1}, {"method": "other"}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(AdapterConfig(), **change)


def test_a_settled_adapter_gives_the_same(bases):
    model = load_model(bases[4])
    add_adapter(model, replace(METHODS["dora"], targets=(*LINEAR_TARGETS, EMBEDDING_TARGET)))
    model.update(tree_unflatten([(n, p + 0.05) for n, p in adapter_parameters(model).items()]))
    model.eval()
    tokens = mx.array(TOKENS)
    before = model(tokens)
    cache_scales(model)
    assert_close(model(tokens), before, 2e-5)


@pytest.mark.parametrize("where", ["linear", "embedding"])
def test_a_row_of_zeros_stays_one(tmp_path, where):
    model = random_model(CONFIG)
    path = "transformer.layers.0.attn.qkv_proj" if where == "linear" else "transformer.token_embeddings"
    weight = dict(tree_flatten(model.parameters()))[f"{path}.weight"]
    model.update(tree_unflatten([(f"{path}.weight", mx.where(mx.arange(weight.shape[0])[:, None] == 5, 0, weight))]))
    folder = write_folder(tmp_path / "base", model)
    tokens = mx.array([[1, 5, 7]])
    plain = model.eval()(tokens)
    config = replace(METHODS["dora"], targets=LINEAR_TARGETS if where == "linear" else (EMBEDDING_TARGET,))
    add_adapter(model, config)
    assert mx.array_equal(model.eval()(tokens), plain)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", adapter_parameters(model), "dora", config, {})
    write_merged(open_source([folder]), open_adapter(tmp_path / "adapter"), tmp_path / "merged")
    assert_close(load_model(tmp_path / "merged")(tokens), plain, 2e-5)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_vectors_of_stock_quantized_embeddings_are_not_rounded(bases, mode):
    """As on a GPU, where MLX's own layers are used: they give bfloat16 in these modes."""
    with replaced_choices(backend="metal"):
        model = load_model(bases[mode], dtype=mx.float32)
    add_adapter(model, replace(METHODS["dora"], targets=(EMBEDDING_TARGET,)))
    (_, adapter), *_ = adapters(model)
    adapter.lora_b = adapter.lora_b + 0.123456789
    found = adapter.eval()(mx.array([3]))
    assert found.dtype == mx.float32
    assert not mx.array_equal(found.astype(mx.bfloat16).astype(mx.float32), found)
