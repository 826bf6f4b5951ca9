"""Published sizes with random weights, against what PyTorch computes with them. Minutes, and gigabytes of memory."""

import json
import zlib

import mlx.core as mx
import numpy as np
import pytest

from conftest import GOLDEN
from mlx_openelm import PRESETS, OpenELM
from mlx_openelm.model.openelm import parameter_shapes

REFERENCE = json.loads((GOLDEN / "full_size.json").read_text())


def recipe(name, shape, config):
    """Weights as `full_size.json` tells."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        return mx.array(1 + np.float32(0.1) * values)
    std = shape[1] ** -0.5 if name.endswith(("qkv_proj.weight", "proj_1.weight")) else config.model_dim**-0.5
    if name.endswith(("out_proj.weight", "proj_2.weight")):
        std *= (2 * config.num_transformer_layers) ** -0.5
    return mx.array(values * np.float32(std))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE["models"])
def test_published_sizes_compute_what_pytorch_computes(name):
    config = PRESETS[name.split("-")[-1].replace("_", ".")]
    expected = REFERENCE["models"][name]
    assert config.num_parameters == expected["num_parameters"]
    model = OpenELM(config)
    model.load_weights([(key, recipe(key, shape, config)) for key, shape in parameter_shapes(config).items()])
    logits = model(mx.array([REFERENCE["input_ids"]]))[0]
    assert np.allclose(np.array(mx.logsumexp(logits, axis=-1)), expected["logsumexp"], atol=2e-4)
    last = np.array(logits[-1, mx.array(REFERENCE["columns"])])
    assert np.abs(last - np.array(expected["last_logits_at_columns"])).max() < 2e-4
    assert mx.argmax(logits, axis=-1).tolist() == expected["argmax"]
