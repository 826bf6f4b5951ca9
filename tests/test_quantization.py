import mlx.core as mx
import pytest

from conftest import assert_close
from mlx_openelm import Quantization
from mlx_openelm.errors import ConfigError, QuantizationError
from mlx_openelm.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_MODES, join_packed, pack
from mlx_openelm.tensors import LazyTensor

EVERY_QUANTIZATION = [Quantization(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES] + [
    Quantization(bits, group, mode) for mode, (bits, group) in FLOAT_MODES.items()
]
MATRIX = mx.random.normal((16, 256), key=mx.random.key(5))


def lazy(array):
    return LazyTensor(array.shape, array.dtype, lambda start, stop: array[start:stop])


@pytest.mark.parametrize("quantization", EVERY_QUANTIZATION, ids=str)
class TestEveryWidthAndMode:
    def test_plan_says_what_mlx_gives(self, quantization):
        parts = quantization.quantize(MATRIX)
        planned = quantization.plan(MATRIX.shape, MATRIX.dtype)
        assert {name: (part.shape, part.dtype) for name, part in parts.items()} == planned

    def test_error_shrinks_with_the_bits(self, quantization):
        back = quantization.dequantize(quantization.quantize(MATRIX), mx.float32)
        if quantization.mode == "affine":
            spread = mx.unflatten(MATRIX, 1, (-1, quantization.group_size))
            step = (spread.max(-1) - spread.min(-1)) / (2**quantization.bits - 1)
            wrong = mx.unflatten(mx.abs(back - MATRIX), 1, (-1, quantization.group_size)).max(-1)
            assert mx.all(wrong <= 1.01 * step).item()  # half a step, and more where MLX lets the grid hold 0
        else:
            allowed = {"mxfp4": 0.3, "mxfp8": 0.1, "nvfp4": 0.2}[quantization.mode]
            assert (mx.linalg.norm(back - MATRIX) / mx.linalg.norm(MATRIX)).item() < allowed

    def test_a_packed_tensor_is_the_matrix(self, quantization):
        packed = pack(lazy(MATRIX), quantization)
        assert packed.shape == MATRIX.shape
        parts = {name: part.read() for name, part in packed.parts.items()}
        assert packed.nbytes == sum(part.nbytes for part in parts.values())
        assert_close(packed.dequantize().read(), quantization.dequantize(parts, mx.float32), 0)

    def test_it_survives_being_written_down(self, quantization):
        assert Quantization.from_dict(quantization.to_dict()) == quantization

    def test_shapes_tell_it(self, quantization):
        if quantization.mode != "affine":
            pytest.skip("modes other than affine are named in config.json")
        packed = pack(lazy(MATRIX), quantization)
        tensors = {f"m.{part}": tensor for part, tensor in packed.parts.items()}
        assert join_packed(tensors, {"m.weight": MATRIX.shape}, None)["m.weight"].quantization == quantization


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), (4, 64, "affine")),
        ((8,), (8, 64, "affine")),
        ((None, 32), (4, 32, "affine")),
        ((None, None, "mxfp4"), (4, 32, "mxfp4")),
        ((8, None, "mxfp8"), (8, 32, "mxfp8")),
        ((4, 16, "nvfp4"), (4, 16, "nvfp4")),
    ],
)
def test_what_is_left_open_follows_from_the_mode(arguments, expected):
    assert Quantization.of(*arguments) == Quantization(*expected)


@pytest.mark.parametrize(
    ("bits", "group_size", "mode", "named"),
    [
        (0, None, None, "got 0"),
        (1, 64, None, "got 1"),
        (7, None, None, "got 7"),
        (16, None, None, "got 16"),
        (4, 16, None, "16"),
        (4, 256, None, "256"),
        (4, 64, "nf4", "nf4"),
        (8, None, "mxfp4", "mxfp4"),
        (4, 64, "nvfp4", "nvfp4"),
    ],
)
def test_what_mlx_does_not_take_is_refused(bits, group_size, mode, named):
    with pytest.raises(QuantizationError, match=named):
        Quantization.of(bits, group_size, mode)


def test_widths_that_the_group_does_not_divide_do_not_fit():
    assert Quantization(4, 64).fits((3, 128))
    assert not Quantization(4, 64).fits((3, 96))
    assert not Quantization(4, 64).fits((128,))


def test_exceptions_stand_under_their_matrix():
    packed = {f"m.{n}": t for n, t in pack(lazy(MATRIX), Quantization(8, 32)).parts.items()}
    written = {"bits": 4, "group_size": 64, "m": {"bits": 8, "group_size": 32}}
    assert join_packed(packed, {}, written)["m.weight"].quantization == Quantization(8, 32)


def test_entries_that_cannot_be_read_are_refused():
    with pytest.raises(ConfigError, match="9"):
        Quantization.from_dict({"bits": 9, "group_size": 64})


def test_quantizing_happens_once_a_matrix():
    reads = []

    def read(start, stop):
        reads.append((start, stop))
        return MATRIX[start:stop]

    packed = pack(LazyTensor(MATRIX.shape, MATRIX.dtype, read), Quantization())
    for part in packed.parts.values():
        part.read()
    assert reads == [(0, 16)]
