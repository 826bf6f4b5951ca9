import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from test_quantization import EVERY_QUANTIZATION

from conftest import assert_close, random_model
from mlx_openelm.model import cpu_layers as cpu
from mlx_openelm.model.cpu_layers import CPUQuantizedEmbedding, CPUQuantizedLinear, quantized_layers


@pytest.fixture(scope="module")
def streams():
    return mx.default_stream(mx.cpu), *(mx.new_stream(mx.cpu) for _ in range(6))


@pytest.fixture(params=[1, 2, 3, 7], ids="{} cores".format)
def cores(request, monkeypatch, streams):
    monkeypatch.setattr(cpu, "compute_streams", lambda: streams[: request.param])
    monkeypatch.setattr(cpu, "_SMALLEST_SHARE", 1)


@pytest.mark.parametrize("inputs", [1, 3, 40])
@pytest.mark.parametrize("quantization", EVERY_QUANTIZATION, ids=str)
def test_products_are_those_of_mlxs_own_layers(cores, quantization, inputs):
    x = mx.random.normal((1, inputs, 128), key=mx.random.key(0))
    options = quantization.to_dict()
    with mx.stream(mx.cpu):
        stock = nn.QuantizedLinear.from_linear(nn.Linear(128, 50, bias=False), **options)
        ours = CPUQuantizedLinear(128, 50, bias=False, **options)
        ours.load_weights(tree_flatten(stock.parameters()))
        assert_close(ours(x), stock(x), 2e-5)
        stock = nn.QuantizedEmbedding.from_embedding(nn.Embedding(50, 128), **options)
        ours = CPUQuantizedEmbedding(50, 128, mx.float32, **options)
        ours.load_weights(tree_flatten(stock.parameters()))
        assert_close(ours.as_linear(x), stock.as_linear(x), 2e-5)
        assert_close(ours(mx.array([3, 49])), stock(mx.array([3, 49])), 0)


def test_layers_that_are_not_named_stay(tiny_config):
    model = random_model(tiny_config)
    quantized_layers(model, {"transformer.layers.1.ffn.proj_2": EVERY_QUANTIZATION[0]}, mx.float32)
    quantized = [path for path, module in model.named_modules() if isinstance(module, nn.QuantizedLinear)]
    assert quantized == ["transformer.layers.1.ffn.proj_2"]


def test_gradients_reach_the_input(cores):
    layer = CPUQuantizedLinear(64, 40, bias=False)
    x = mx.random.normal((2, 64), key=mx.random.key(1))
    found = mx.grad(lambda x: layer(x).sum())(x)
    expected = mx.dequantize(layer.weight, layer.scales, layer.biases).sum(0)
    assert_close(found, mx.stack([expected] * 2), 1e-4)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_vectors_of_floating_point_modes_have_the_type_of_the_network(mode):
    ours = CPUQuantizedEmbedding(8, 64, mx.float32, mode=mode, group_size=16 if mode == "nvfp4" else 32,
                                 bits=8 if mode == "mxfp8" else 4)  # fmt: skip
    assert ours(mx.array([3])).dtype == mx.float32
