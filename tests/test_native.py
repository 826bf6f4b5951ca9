import os
import subprocess
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings, strategies as st
from test_quantization import EVERY_QUANTIZATION

from conftest import assert_close
from mlx_openelm.machine import native as machine
from mlx_openelm.machine.native import native_description, native_kernels, native_problem
from mlx_openelm.model.cpu_layers import CPUQuantizedLinear, plain_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    kernels = native_kernels()

installed = pytest.mark.skipif(kernels is None, reason="openelm-mlx-native is not installed")
cpu = mx.Device(mx.cpu)


@pytest.fixture(autouse=True)
def on_the_cpu():
    with mx.stream(cpu):
        yield


@pytest.fixture(params=["avx512", "avx2", "neon", "plain"])
def instructions(request):
    """Each set of kernels that this processor can run."""
    if kernels is None:
        pytest.skip("openelm-mlx-native is not installed")
    before = kernels.instructions()
    try:
        kernels.set_instructions(request.param)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    yield
    kernels.set_instructions(before)


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def packed(rows, columns, quantization, dtype=mx.float32):
    options = quantization.to_dict()
    matrix = normal(rows, columns, seed=1).astype(dtype)
    return mx.quantize(matrix, **options), options


def unpacked(parts, options):
    """The matrix in float32, as MLX unpacks it with scales in float32."""
    wide = (part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part for part in parts)
    return mx.dequantize(*wide, **options, dtype=mx.float32)


def exact(x, parts, options):
    """The product in float64."""
    return (x.astype(mx.float64) @ unpacked(parts, options).astype(mx.float64).T).astype(mx.float32)


def assert_same(found, expected):
    """Equal within 1e-5 of the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == mx.float32
    assert mx.abs(found - expected).max().item() <= 1e-5 * mx.abs(expected).max().item()


@pytest.mark.parametrize("quantization", EVERY_QUANTIZATION, ids=str)
def test_products_are_mlxs_within_rounding(instructions, quantization):
    parts, options = packed(37, 384, quantization)
    for rows in (1, 5, 70):
        x = normal(rows, 384)
        found = kernels.quantized_matmul(x, *parts, **options)
        assert_same(found, mx.quantized_matmul(x, *parts, **options))
        assert_same(found, exact(x, parts, options))


@installed
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(EVERY_QUANTIZATION), st.integers(1, 70), st.integers(1, 9), st.integers(1, 50),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
)  # fmt: skip
def test_any_sizes_and_types_of_scales(quantization, rows, groups, inputs, dtype):
    with mx.stream(cpu):
        columns = groups * max(quantization.group_size, 32)
        parts, options = packed(rows, columns, quantization, dtype)
        x = normal(inputs, columns)
        assert_same(kernels.quantized_matmul(x, *parts, **options), exact(x, parts, options))
        wanted = mx.array([[0, rows - 1], [rows // 2, 0]])
        taken = kernels.quantized_rows(wanted, *parts, **options)
        assert_close(taken, unpacked([part[wanted] for part in parts], options), 1e-6)


@pytest.mark.parametrize("quantization", [*EVERY_QUANTIZATION, None], ids=str)
def test_a_row_is_equal_to_the_bit_in_any_batch(instructions, quantization):
    x = normal(kernels.largest_batch, 640)
    if quantization is None:
        weight = normal(50, 640, seed=1)
        multiply = lambda x: kernels.matmul_transposed(x, weight)  # noqa: E731
    else:
        parts, options = packed(50, 640, quantization)
        multiply = lambda x: kernels.quantized_matmul(x, *parts, **options)  # noqa: E731
    together = multiply(x)
    for start, rows in ((0, 1), (9, 1), (2, 2), (5, 3), (1, 4), (20, 7), (3, 16), (1, 31)):
        assert mx.array_equal(multiply(x[start : start + rows]), together[start : start + rows])


@pytest.mark.parametrize("quantization", EVERY_QUANTIZATION, ids=str)
def test_large_tiny_and_non_finite_inputs(instructions, quantization):
    parts, options = packed(37, 640, quantization)
    multiply = lambda x: kernels.quantized_matmul(x, *parts, **options)  # noqa: E731
    x = normal(3, 640)
    x[0, 7] = 3000.0  # one element that the others must not vanish beside
    x[1] *= 1e-20
    x[2] *= 1e15
    for row in range(3):
        assert_same(multiply(x)[row], exact(x[row : row + 1], parts, options)[0])
    assert mx.array_equal(multiply(mx.zeros((2, 640))), mx.zeros((2, 37)))
    for value in (mx.nan, mx.inf):
        x[1, 5] = value
        found = multiply(x)
        assert not mx.isfinite(found[1]).any().item()
        assert mx.isfinite(found[0]).all().item()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (33, 100), (64, 1280)])
def test_float32_products_of_any_size(instructions, rows, columns):
    weight = normal(rows, columns, seed=1)
    for inputs in (1, 6, 50):
        x = normal(inputs, columns)
        expected = (x.astype(mx.float64) @ weight.astype(mx.float64).T).astype(mx.float32)
        assert_close(kernels.matmul_transposed(x, weight), expected, 2e-6 * columns**0.5 * 4)


@pytest.mark.parametrize("quantization", EVERY_QUANTIZATION, ids=str)
def test_inputs_of_8_bits_are_an_option_with_a_stated_error(instructions, quantization):
    parts, options = packed(37, 640, quantization)
    x = normal(kernels.largest_batch + 30, 640)
    expected = exact(x, parts, options)
    found = kernels.quantized_matmul(x, *parts, **options, activations="int8")
    assert mx.abs(found - expected).square().mean().item() ** 0.5 <= 0.01 * expected.square().mean().item() ** 0.5
    few = x[: kernels.largest_batch]  # decoding stays exact
    exactly = kernels.quantized_matmul(few, *parts, **options)
    assert mx.array_equal(kernels.quantized_matmul(few, *parts, **options, activations="int8"), exactly)
    with pytest.raises(ValueError, match="activations must be float32 or int8; got 'int4'"):
        kernels.quantized_matmul(x, *parts, **options, activations="int4")


@installed
def test_norms_are_mlxs():
    for shape in ((1280,), (3, 4, 71), (1, 8)):
        x, weight = normal(*shape), normal(shape[-1], seed=2)
        for scale in (weight, None):
            assert_close(kernels.rms_norm(x, scale, 1e-6), mx.fast.rms_norm(x, scale, 1e-6), 1e-5)
    assert kernels.rms_norm(mx.zeros((0, 8)), None, 1e-6).shape == (0, 8)
    x, weight = normal(3, 64), normal(64, seed=2)
    for argument in (0, 1):
        by = lambda f: mx.grad(lambda x, w: f(x, w, 1e-6).square().sum(), argument)(x, weight)  # noqa: B023, E731
        assert_close(by(kernels.rms_norm), by(mx.fast.rms_norm), 1e-4)


@installed
def test_several_axes_none_and_no_rows():
    parts, options = packed(8, 64, EVERY_QUANTIZATION[0])
    for shape in ((64,), (2, 3, 64), (0, 64), (2, 0, 64)):
        assert kernels.quantized_matmul(normal(*shape), *parts, **options).shape == (*shape[:-1], 8)


@installed
def test_views_are_read_in_their_order():
    parts, options = packed(16, 128, EVERY_QUANTIZATION[0])
    x = normal(128, 6).T
    halves = [part[::2] for part in parts]
    found = kernels.quantized_matmul(x[1::2], *halves, **options)
    assert_same(found, mx.quantized_matmul(x[1::2], *halves, **options))
    table = normal(128, 12).T
    assert_close(kernels.matmul_transposed(x, table), x @ table.T, 1e-4)


@installed
def test_products_in_a_compiled_function():
    parts, options = packed(48, 128, EVERY_QUANTIZATION[0])
    weight = normal(128, 96, seed=2)

    def step(x):  # without operations that MLX would have to compile
        twice = [kernels.quantized_matmul(x, *parts, **options) for _ in range(2)]
        return kernels.matmul_transposed(mx.concatenate(twice, axis=-1), weight)

    compiled = mx.compile(step)
    for rows in (1, 3, 40):
        x = normal(rows, 128)
        assert_close(compiled(x), step(x), 1e-3)


@installed
@pytest.mark.parametrize("quantization", EVERY_QUANTIZATION, ids=str)
def test_gradients_are_mlxs(quantization):
    parts, options = packed(40, 256, quantization)
    x, cotangent = normal(3, 256), normal(3, 40, seed=3)
    gradient = lambda f: mx.grad(lambda x: (f(x, *parts, **options) * cotangent).sum())(x)  # noqa: E731
    assert_same(gradient(kernels.quantized_matmul), gradient(mx.quantized_matmul))


@installed
def test_gradients_of_large_matrices_scales_and_float32_weights():
    parts, options = packed(3000, 512, EVERY_QUANTIZATION[0])
    x = normal(2, 512)
    found, expected = (mx.grad(lambda x, f=f: f(x, *parts, **options).square().sum())(x)
                       for f in (kernels.quantized_matmul, mx.quantized_matmul))  # fmt: skip
    assert_same(found, expected)
    by_scales = [mx.grad(lambda s, f=f: f(x, parts[0], s, parts[2], **options).sum())(parts[1])
                 for f in (kernels.quantized_matmul, mx.quantized_matmul)]  # fmt: skip
    assert_same(*by_scales)
    weight = normal(30, 512, seed=2)
    for argument in (0, 1):
        found = mx.grad(lambda x, w: kernels.matmul_transposed(x, w).square().sum(), argument)(x, weight)
        assert_same(found, mx.grad(lambda x, w: (x @ w.T).square().sum(), argument)(x, weight))


@installed
def test_vectorized_and_forward_derivatives_are_mlxs():
    parts, options = packed(40, 128, EVERY_QUANTIZATION[0])
    x, tangent = normal(3, 4, 128), normal(3, 4, 128, seed=5)
    multiply = lambda f: lambda x: f(x, *parts, **options)  # noqa: E731
    ours, mlxs = multiply(kernels.quantized_matmul), multiply(mx.quantized_matmul)
    assert_close(mx.vmap(ours)(x), ours(x), 1e-4)
    assert_same(mx.jvp(ours, [x], [tangent])[1][0], mx.jvp(mlxs, [x], [tangent])[1][0])


@installed
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8; got 7"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128; got 48"),
        ({"mode": "int4"}, "unknown mode 'int4'"),
        ({"mode": "mxfp4"}, "mxfp4 needs 4 bits and groups of 32"),
        ({"bits": 8}, "do not fit together"),
        ({"x": normal(2, 64).astype(mx.float16)}, "x must be float32"),
        ({"x": normal(2, 32)}, r"x must have shape \(..., 64\); got \(2, 32\)"),
        ({"w": normal(2, 64)}, "w must be a matrix of uint32"),
        ({"biases": None}, "affine needs biases"),
        ({"scales": mx.zeros((8, 1), mx.uint8)}, "scales must be float32, float16 or bfloat16"),
        ({"biases": mx.zeros((8, 1), mx.float16)}, "biases must have the shape and type of the scales"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    parts = dict(zip(("w", "scales", "biases"), mx.quantize(normal(8, 64), 64, 4), strict=True))
    given = {"x": normal(2, 64), **parts, "group_size": 64, "bits": 4, "mode": "affine", **change}
    with pytest.raises(ValueError, match=said):
        kernels.quantized_matmul(**given)


@installed
def test_threads_and_instructions_can_be_chosen():
    before = kernels.threads()
    parts, options = packed(200, 640, EVERY_QUANTIZATION[0])
    x = normal(3, 640)
    expected = kernels.quantized_matmul(x, *parts, **options)
    mx.eval(expected)
    try:
        for threads in (1, 3):
            kernels.set_threads(threads)
            assert kernels.threads() == threads
            assert mx.array_equal(kernels.quantized_matmul(x, *parts, **options), expected)
    finally:
        kernels.set_threads(before)
    with pytest.raises(ValueError, match="from 1 to 1,024; got 0"):
        kernels.set_threads(0)
    with pytest.raises(ValueError, match="no kernels named 'sse'"):
        kernels.set_instructions("sse")


def other_package(folder, code):
    package = folder / "openelm_mlx_native"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}


def test_a_package_that_cannot_be_loaded_is_named_and_not_used(tmp_path):
    line = "openelm-mlx-native was built for MLX 1, but 2 is installed"
    code = "from mlx_openelm.machine.native import *; print(native_kernels(), native_description(), native_problem())"
    done = subprocess.run([sys.executable, "-c", code], env=other_package(tmp_path, f"raise ImportError({line!r})"),
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == f"None None {line}"
    assert f"RuntimeWarning: openelm-mlx-native is not used: {line}" in done.stderr


@installed
def test_a_build_for_another_mlx_refuses_to_load(tmp_path):
    environment = other_package(tmp_path, Path(kernels.__file__).read_text(encoding="utf-8"))
    (tmp_path / "openelm_mlx_native" / "_built.py").write_text('mlx_version = "0.1"\n')
    done = subprocess.run([sys.executable, "-c", "import openelm_mlx_native"], env=environment, capture_output=True,
                          text=True)  # fmt: skip
    line = f"ImportError: openelm-mlx-native was built for MLX 0.1, but {mx.__version__} is installed"
    assert done.stderr.strip().splitlines()[-1].startswith(line)


def test_it_can_be_turned_off(monkeypatch):
    fresh = machine.native_kernels.__wrapped__
    monkeypatch.setenv(machine.VARIABLE, "off")
    assert fresh() is None
    monkeypatch.setenv(machine.VARIABLE, "fast")
    with pytest.raises(machine.ConfigError, match="must be on, off or int8; got 'fast'"):
        fresh()


def test_layers_compute_with_it_where_it_is_installed():
    linear = nn.Linear(64, 8, bias=False)
    model = nn.Sequential(linear, nn.Linear(8, 4))
    plain_layers(model)
    assert (type(model.layers[0]) is nn.Linear) == (kernels is None)
    model.layers[0].weight = linear.weight
    x = normal(2, 64)
    assert_close(model.layers[0](x), x @ linear.weight.T, 1e-5)
    assert model(x).shape == (2, 4)
    layer = CPUQuantizedLinear(64, 8, bias=False)
    assert_close(layer(x), mx.quantized_matmul(x, layer.weight, layer.scales, layer.biases), 1e-5)
    assert (native_description() is None) == (kernels is None)
    assert native_problem() is None
