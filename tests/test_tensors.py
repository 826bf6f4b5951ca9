import json
import os

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_openelm import file_values, tensors
from mlx_openelm.errors import WeightsError
from mlx_openelm.tensors import LazyTensor, checked_cast, is_buffer, read_safetensors, write_safetensors


def lazy(array):
    return LazyTensor(array.shape, array.dtype, lambda start, stop: array[start:stop])


ARRAYS = {
    "a": mx.arange(6, dtype=mx.float32).reshape(2, 3),
    "b": mx.array([1.5, -2.0], dtype=mx.bfloat16),
    "c": mx.array([[3.0]], dtype=mx.float16),
    "d": mx.array([7, 8], dtype=mx.uint32),
    "empty": mx.zeros((0, 3)),
}


def write(path, arrays=ARRAYS):
    with open(path, "wb") as file:
        write_safetensors(file, {name: lazy(array) for name, array in arrays.items()}, {"format": "mlx"})
    return path


def test_what_was_written_is_read(tmp_path):
    found = read_safetensors(write(tmp_path / "x.safetensors"))
    assert {name: tensor.shape for name, tensor in found.items()} == {n: a.shape for n, a in ARRAYS.items()}
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert mx.array_equal(found[name].read(), array)
        assert mx.array_equal(found[name].read(), array)  # a second time too


def test_mlx_reads_what_was_written(tmp_path):
    arrays, metadata = mx.load(str(write(tmp_path / "x.safetensors")), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert all(mx.array_equal(arrays[name], array) for name, array in ARRAYS.items())


def test_the_safetensors_package_reads_and_writes_the_same(tmp_path):
    plain = {name: ARRAYS[name] for name in ("a", "c", "d")}
    found = load_file(write(tmp_path / "x.safetensors", plain))
    assert all(np.array_equal(found[name], np.array(array)) for name, array in plain.items())
    save_file({"w": np.ones((2, 2), np.float32)}, tmp_path / "y.safetensors")
    assert mx.array_equal(read_safetensors(tmp_path / "y.safetensors")["w"].read(), mx.ones((2, 2)))


def test_tensors_that_are_no_rows_in_memory_are_written_right(tmp_path):
    turned = mx.arange(6, dtype=mx.float32).reshape(2, 3).T
    path = write(tmp_path / "x.safetensors", {"a": turned, "part": mx.arange(10)[2:5].astype(mx.float32)})
    assert mx.array_equal(mx.load(str(path))["a"], turned)
    assert mx.load(str(path))["part"].tolist() == [2, 3, 4]


def test_mapping_reads_nothing_yet():
    def read_rows(start, stop):
        raise AssertionError("read too early")

    mapped = LazyTensor((2, 3), mx.float32, read_rows).map(lambda a: a, mx.float16).first_rows(1)
    assert (mapped.shape, mapped.dtype, mapped.nbytes) == ((1, 3), mx.float16, 6)


@pytest.mark.parametrize("block_bytes", [1, 24, 100, 10_000])
def test_blocks_of_any_size_make_the_same_file(tmp_path, monkeypatch, block_bytes):
    array = mx.random.normal((50, 6), key=mx.random.key(0))
    whole = write(tmp_path / "whole.safetensors", {"tall": array, **ARRAYS}).read_bytes()
    monkeypatch.setattr(tensors, "_BLOCK_BYTES", block_bytes)
    assert write(tmp_path / "blocks.safetensors", {"tall": array, **ARRAYS}).read_bytes() == whole
    found = read_safetensors(tmp_path / "blocks.safetensors")["tall"]
    assert [stop for _, stop in found.blocks()][-1] == 50
    assert mx.array_equal(mx.concatenate([found.read_rows(*rows) for rows in found.blocks()]), array)


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.95])
def test_truncated_files_are_refused(tmp_path, share):
    path = write(tmp_path / "x.safetensors")
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(WeightsError, match=r"x\.safetensors"):
        read_safetensors(path)


def with_header(path, header, data=b"\0" * 24):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def part(length, start):
    return {"dtype": "F32", "shape": [length], "data_offsets": [start, start + 4 * length]}


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "not JSON"),
        (b"[1]", "no|not a table"),
        ({"a": {"dtype": "F32"}}, "malformed"),
        ({"a": {**ENTRY, "shape": [2, -3]}}, "malformed"),
        ({"a": {**ENTRY, "shape": [2, 4]}}, "bytes 0 to 24"),
        ({"a": {**ENTRY, "data_offsets": [8, 32]}}, "bytes 8 to 32"),
        ({"a": {**ENTRY, "dtype": "F8_E4M3"}}, "F8_E4M3"),
        ({"a": {**ENTRY, "dtype": "I64"}}, "bytes 0 to 24"),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, "malformed"),
        ({"a": {**ENTRY, "dtype": {}}}, "malformed"),
        ({"a": {**ENTRY, "shape": [2.0, 3]}}, "malformed"),
        ({"a": {**ENTRY, "shape": [True, 6]}}, "malformed"),
        ({"a": {**ENTRY, "shape": "23"}}, "malformed"),
        ({"a": {**ENTRY, "shape": [10**30, 3]}}, "bytes 0 to 24"),
        ({"a": {**ENTRY, "data_offsets": [0, 10**30]}}, "bytes 0 to 10"),
        ({"a": {**ENTRY, "data_offsets": [-24, 0]}}, "malformed"),
        ({"a": {**ENTRY, "data_offsets": [24, 0]}}, "bytes 24 to 0"),
        ({"a": {**ENTRY, "data_offsets": [0, 24, 0]}}, "malformed"),
        ({"a": [1]}, "malformed"),
        ({"a": None}, "malformed"),
        (b'{"a": 1e999}', "malformed"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 24]}}', "not JSON"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        (b'{"a": ' * 100_000, "not JSON"),
        (b'{"\xff": 1}', "not JSON"),
        ({"a": ENTRY, "b": ENTRY}, "a and b overlap"),
        ({"b": part(2, 12), "a": part(4, 0)}, "a and b overlap"),
        ({"a": part(2, 0), "b": part(2, 16)}, "no tensor covers the 8 bytes before b"),
        ({"a": part(4, 8)}, "no tensor covers the 8 bytes before a"),
        ({"a": part(4, 0)}, "end at"),
        (json.dumps({"a": ENTRY})[:-1].encode() + b', "a": ' + json.dumps(ENTRY).encode() + b"}", "a twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [6], "data_offsets": [0, 24]}}', "dtype twice"),
        ({"x" * 100_000 + "\x1b[2J": {**ENTRY, "shape": []}}, "^.{1,400}$"),
        ({}, "24|ends? at"),
    ],
    ids=range(34),
)
def test_headers_that_contradict_the_file_are_refused(tmp_path, header, said):
    with pytest.raises(WeightsError, match=said):
        read_safetensors(with_header(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("stated", [0, 1, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_a_header_whose_length_is_wrong_is_refused(tmp_path, stated):
    path = write(tmp_path / "x.safetensors")
    path.write_bytes(stated.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(WeightsError, match=r"x\.safetensors"):
        read_safetensors(path)


def test_a_header_above_the_limit_is_not_parsed(tmp_path):
    path = with_header(tmp_path / "x.safetensors", b'{"a": ' + b" " * tensors._LARGEST_HEADER_BYTES + b"0}")
    with pytest.raises(WeightsError, match="more than 4,000,000"):
        read_safetensors(path)


def test_the_order_and_the_metadata_of_a_header_do_not_matter(tmp_path):
    entries = {
        "b": part(2, 12),
        "none": part(0, 12),
        "a": part(3, 0),
        "c": part(1, 20),
        "__metadata__": {"format": "pt"},
    }
    values = np.arange(6, dtype=np.float32)
    found = read_safetensors(with_header(tmp_path / "x.safetensors", entries, values.tobytes()))
    assert list(found) == ["b", "none", "a", "c"]
    assert {name: tensor.read().tolist() for name, tensor in found.items()} == {
        **{"a": [0, 1, 2], "b": [3, 4], "c": [5]},
        "none": [],
    }


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (2, 3), (-1, 1), (1, 0), (3, 3), (0, 1 << 40)])
def test_rows_beyond_the_end_are_never_another_tensors(tmp_path, start, stop):
    found = read_safetensors(write(tmp_path / "x.safetensors", {"a": mx.zeros((2, 3)), "secret": mx.ones((40, 3))}))[
        "a"
    ]
    for tensor in (found, found.map(lambda rows: rows), found.first_rows(2)):
        with pytest.raises(WeightsError, match="with 2 rows"):
            tensor.read_rows(start, stop)
    with pytest.raises(WeightsError, match="with 1 rows"):
        found.first_rows(1).read_rows(0, 2)
    with pytest.raises(WeightsError, match="with 2 rows"):
        found.first_rows(3).read()


OTHERS = {
    "float64": np.array([[1.5, -2.25], [1e-300, 3e38]]),
    "int64": np.array([1, -2]),
    "int32": np.array([1, -2], np.int32),
    "uint16": np.array([1, 65535], np.uint16),
    "int8": np.array([1, -2], np.int8),
    "bool": np.array([True, False]),
    "scalar": np.array(7, np.int64),
}


def test_every_type_is_read(tmp_path):
    save_file(OTHERS, tmp_path / "x.safetensors")
    found = read_safetensors(tmp_path / "x.safetensors")
    for name, array in OTHERS.items():
        expected = array.astype(np.float32) if name == "float64" else array
        assert np.array_equal(np.array(found[name].read()), expected), name
        assert found[name].read().dtype == found[name].dtype
    assert found["float64"].dtype == mx.float32
    assert mx.array_equal(found["float64"].read_rows(1, 2), found["float64"].read()[1:])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([1.0, np.nan]), "NaN or infinity"),
        (np.array([1.0, -np.inf]), "NaN or infinity"),
        (np.array([1.0, 1e39]), "beyond the range of float32"),
        (np.array([1.0, np.inf], np.float32), "NaN or infinity"),
        (np.array([1.0, np.nan], np.float16), "NaN or infinity"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite_are_refused_when_read(tmp_path, values, said):
    save_file({"w": values}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=f"w .*{said}"):
        read_safetensors(tmp_path / "x.safetensors")["w"].read()


@pytest.mark.parametrize(
    ("value", "dtype", "to"),
    [
        (65520.0, mx.float32, mx.float16),
        (1e5, mx.bfloat16, mx.float16),
        (3.4e38, mx.float32, mx.bfloat16),
        (-3.4e38, mx.float32, mx.bfloat16),
    ],
)
def test_a_cast_that_overflows_is_refused(value, dtype, to):
    with pytest.raises(WeightsError, match=f"w has values beyond the range of {str(to).split('.')[-1]}"):
        checked_cast("w", mx.array([0.0, value], dtype), to)
    assert mx.all(mx.isfinite(checked_cast("w", mx.array([0.0, 0.6 * value], dtype), to))).item()


@pytest.mark.parametrize("to", [mx.float32, mx.bfloat16, mx.float16])
def test_a_cast_keeps_what_fits(to):
    for array in (
        mx.zeros((0, 3)),
        mx.array([1.5, -65504.0]),
        mx.array([[2.0]], mx.bfloat16),
        mx.array(3.0, mx.float16),
    ):
        assert mx.array_equal(checked_cast("w", array, to, computed=True), array.astype(to))


def test_what_was_computed_is_checked_in_any_type():
    with pytest.raises(WeightsError, match="beyond the range of float32"):
        checked_cast("w", mx.array([1e38]) * 10, mx.float32, computed=True)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("transformer.position_ids", mx.int64, True),
        ("transformer.layers.0.attn.bias", mx.bool_, True),
        ("transformer.layers.0.attn.pos_embedding.inv_freq", mx.float32, True),
        ("transformer.causal_mask", mx.float16, True),
        ("transformer.freqs_cis", mx.complex64, True),
        ("transformer.norm.weight", mx.int64, False),
        ("transformer.norm.weight", mx.float32, False),
        ("lm_head.scales", mx.uint8, False),
        ("transformer.layers.0.attn.qkv_proj.bias", mx.float32, False),
    ],
)
def test_what_a_buffer_is(name, dtype, expected):
    assert is_buffer(name, dtype) == expected


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match="none"):
        read_safetensors(tmp_path / "none.safetensors")


def test_a_full_disk_is_reported():
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match=r"[Nn]o space"):
        write_safetensors(file, {"a": lazy(ARRAYS["a"])}, {})


class TestLargeTensors:
    """MLX reads them into its own memory, and threads check them; what that cannot read is read as small ones are."""

    @pytest.fixture(autouse=True)
    def large(self, monkeypatch):
        monkeypatch.setattr(file_values, "_LARGE_BYTES", 64)
        monkeypatch.setattr(file_values, "_BLOCK", 7)
        monkeypatch.setattr(file_values, "_BLOCKS_ALONE", 3)

    @pytest.fixture
    def by_mlx(self, monkeypatch):
        """Makes reading any other way an error."""
        monkeypatch.setattr(np, "fromfile", None)

    @pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8])
    def test_are_read_by_mlx(self, tmp_path, by_mlx, dtype):
        array = (mx.random.normal((37, 11), key=mx.random.key(0)) * 3).astype(dtype)
        mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": array[:30], "b": array})
        found = read_safetensors(tmp_path / "x.safetensors")
        assert found["b"].read().dtype == dtype
        assert mx.array_equal(found["b"].read(), array)
        assert mx.array_equal(found["a"].read(), array[:30])

    def test_the_header_is_read_once_for_all_of_them(self, tmp_path, by_mlx, monkeypatch):
        """Reading it for each would take a time that grows with the square of their number."""
        mx.save_safetensors(str(tmp_path / "x.safetensors"), {f"layer{n}": mx.full((10, 10), n) for n in range(5)})
        read, load = [], mx.load
        monkeypatch.setattr(mx, "load", lambda *path, **options: read.append(path) or load(*path, **options))
        found = read_safetensors(tmp_path / "x.safetensors")
        assert [found[f"layer{n}"].read()[9, 9].item() for n in range(5)] == list(range(5))
        assert len(read) == 1
        assert found["layer3"].read()[0, 0].item() == 3  # again

    def test_the_next_one_is_read_ahead_if_they_are_wanted_in_the_order_of_the_file(self, tmp_path, monkeypatch):
        mx.save_safetensors(str(tmp_path / "x.safetensors"), {f"layer{n}": mx.full((10, 10), n) for n in range(5)})
        ahead, queue = [], mx.async_eval
        monkeypatch.setattr(mx, "async_eval", lambda array: ahead.append(array) or queue(array))
        for in_order in (True, False):
            found = read_safetensors(tmp_path / "x.safetensors")
            ahead.clear()
            for name in found if in_order else reversed(found):
                assert found[name].read()[0, 0].item() == int(name.removeprefix("layer"))
            assert len(ahead) == (4 if in_order else 0)

    def test_rows_alone_are_not(self, tmp_path):
        array = mx.random.normal((37, 11), key=mx.random.key(0))
        mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": array})
        assert mx.array_equal(read_safetensors(tmp_path / "x.safetensors")["a"].read_rows(2, 36), array[2:36])

    @pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
    @pytest.mark.parametrize("value", [mx.nan, -mx.inf])
    def test_nan_and_infinity_are_found(self, tmp_path, by_mlx, dtype, value):
        array = mx.ones((30, 10))
        array[29, 9] = value
        mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": array.astype(dtype)})
        with pytest.raises(WeightsError, match="a contains NaN or infinity"):
            read_safetensors(tmp_path / "x.safetensors")["a"].read()

    def test_float64_is_read_another_way(self, tmp_path):
        values = np.arange(100, dtype=np.float64)
        save_file({"a": values}, tmp_path / "x.safetensors")
        assert np.array_equal(np.array(read_safetensors(tmp_path / "x.safetensors")["a"].read()), values)

    def test_a_file_that_became_shorter(self, tmp_path):
        save_file({"a": np.zeros(1000, np.float32)}, tmp_path / "x.safetensors")
        tensor = read_safetensors(tmp_path / "x.safetensors")["a"]
        os.truncate(tmp_path / "x.safetensors", 3000)
        with pytest.raises(WeightsError, match="was truncated while it was read"):
            tensor.read()

    def test_a_file_that_became_shorter_while_mlx_read_it(self, tmp_path, monkeypatch):
        """Should MLX not say so, the size afterwards does."""
        save_file({"a": np.zeros(1000, np.float32)}, tmp_path / "x.safetensors")
        tensor = read_safetensors(tmp_path / "x.safetensors")["a"]
        evaluate = mx.eval

        def cut(*arrays):
            evaluate(*arrays)
            os.truncate(tmp_path / "x.safetensors", 3000)

        monkeypatch.setattr(mx, "eval", cut)
        with pytest.raises(WeightsError, match="was truncated while it was read"):
            tensor.read()

    def test_another_file_in_its_place(self, tmp_path):
        save_file({"a": np.zeros(1000, np.float32)}, tmp_path / "x.safetensors")
        tensor = read_safetensors(tmp_path / "x.safetensors")["a"]
        save_file({"a": np.zeros(900, np.float32)}, tmp_path / "x.safetensors")
        with pytest.raises(WeightsError, match="was truncated while it was read"):
            tensor.read()
