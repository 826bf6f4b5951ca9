import json

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_openelm import tensors
from mlx_openelm.errors import WeightsError
from mlx_openelm.tensors import LazyTensor, read_safetensors, write_safetensors


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
        ({"a": {**ENTRY, "dtype": "I64"}}, "I64"),
        ({}, "24|ends? at"),
    ],
)
def test_headers_that_contradict_the_file_are_refused(tmp_path, header, said):
    with pytest.raises(WeightsError, match=said):
        read_safetensors(with_header(tmp_path / "x.safetensors", header))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match="none"):
        read_safetensors(tmp_path / "none.safetensors")


def test_a_full_disk_is_reported():
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match=r"[Nn]o space"):
        write_safetensors(file, {"a": lazy(ARRAYS["a"])}, {})
