import os
import pickle

import mlx.core as mx
import numpy as np
import pytest

from conftest import GOLDEN, GOLDEN_CASES
from mlx_openelm.conversion.read.torch_file import read_torch_file
from mlx_openelm.errors import TorchFileError
from mlx_openelm.tensors import read_safetensors
from torch_writer import Call, Global, Raw, Tensor, describe, save

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


def read_all(path):
    return {name: np.array(tensor.read().astype(mx.float32)) for name, tensor in read_torch_file(path).items()}


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_values_are_those_of_the_safetensors_file(case):
    torch = read_torch_file(GOLDEN / case / "corenet_checkpoint.pt")
    other = read_safetensors(GOLDEN / case / "model.safetensors")
    assert len(torch) == len(other)
    for name, tensor in torch.items():
        twin = other.get(f"transformer.{name}") or other["lm_head.weight"]
        rows = twin.shape[0]
        assert mx.array_equal(tensor.read()[:rows], twin.read()), name


@pytest.mark.parametrize(
    "nest",
    [
        lambda model: model,
        lambda model: {"model_state_dict": model, "epoch": 3, "optim_state_dict": {"state": [model]}},
        lambda model: {"iterations": 5000, "ema": {"a": Tensor(VALUES)}, "model": model},
        lambda model: {"anything": {"nested": model}, "loss": 2.5},
    ],
    ids=["plain", "training", "other-key", "largest"],
)
def test_the_model_is_found_wherever_it_lies(tmp_path, nest):
    model = {"a": Tensor(VALUES), "b": Tensor(VALUES + 1), "c": Tensor(VALUES + 2)}
    found = read_all(save(tmp_path / "x.pt", nest(model)))
    assert sorted(found) == ["a", "b", "c"]
    assert np.array_equal(found["b"], VALUES + 1)


def test_wrappers_leave_no_prefix(tmp_path):
    model = {"module.a.weight": Tensor(VALUES), "_orig_mod.layers.0._fsdp_wrapped_module.b": Tensor(VALUES)}
    assert sorted(read_all(save(tmp_path / "x.pt", model))) == ["a.weight", "layers.0.b"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_types(tmp_path, dtype):
    found = read_torch_file(save(tmp_path / "x.pt", {"a": Tensor(VALUES.astype(dtype), dtype)}))["a"]
    assert found.dtype == (mx.float16 if dtype == "float16" else mx.float32)
    assert found.read().dtype == found.dtype
    assert np.array_equal(np.array(found.read()), VALUES)


def test_bfloat16(tmp_path):
    raw = np.array(mx.array(VALUES).astype(mx.bfloat16).view(mx.uint16))
    found = read_torch_file(save(tmp_path / "x.pt", {"a": Tensor(raw, "bfloat16")}))["a"]
    assert found.dtype == mx.bfloat16
    assert mx.array_equal(found.read(), mx.array(VALUES).astype(mx.bfloat16))


def test_integers_are_left_out(tmp_path):
    model = {"a": Tensor(VALUES), "steps": Tensor(np.array([7]), "int64")}
    assert list(read_all(save(tmp_path / "x.pt", model))) == ["a"]


def test_views_share_a_storage(tmp_path):
    model = {
        "whole": Tensor(VALUES, key="0"),
        "transposed": Tensor(VALUES, key="0", shape=(4, 3), strides=(1, 4)),
        "last row": Tensor(VALUES, key="0", offset=8, shape=(4,), strides=(1,)),
        "expanded": Tensor(VALUES, key="0", offset=5, shape=(2, 2), strides=(0, 0)),
    }
    found = read_all(save(tmp_path / "x.pt", model))
    assert np.array_equal(found["transposed"], VALUES.T)
    assert np.array_equal(found["last row"], VALUES[2])
    assert np.array_equal(found["expanded"], np.full((2, 2), 5.0))


def test_settings_beside_the_weights_are_passed_over(tmp_path):
    extras = {
        "opts": Call(Global("argparse", "Namespace")),
        "path": Call(Global("pathlib", "PosixPath"), ("a", "b")),
        "size": Call(Global("torch", "Size"), ((3, 4),)),
        "type": Global("torch", "bfloat16"),
        "device": Call(Global("torch", "device"), ("cuda", 0)),
    }
    assert list(read_all(save(tmp_path / "x.pt", {"model": {"a": Tensor(VALUES)}, **extras}))) == ["a"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_call_outside_the_list_is_named_and_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "x.pt", {}, pickle=pickle.dumps({"a": Evil()}, protocol))
    with pytest.raises(TorchFileError, match=r"posix\.mkdir|os\.mkdir|nt\.mkdir"):
        read_torch_file(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.nn.modules.linear", "Linear"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"),
        ("collections", "OrderedDict.fromkeys"),
    ],
)
def test_names_outside_the_list_are_refused(tmp_path, module, name):
    path = save(tmp_path / "x.pt", {"a": Tensor(VALUES), "b": Call(Global(module, name), ("1",))})
    with pytest.raises(TorchFileError, match=f"{module}.{name}"):
        read_torch_file(path)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(VALUES, shape=(3, 5)),
        Tensor(VALUES, shape=(100_000, 100_000)),
        Tensor(VALUES, offset=1),
        Tensor(VALUES, shape=(2**40,), strides=(0,)),
        Tensor(VALUES, shape=(3,), strides=(2**40,)),
        Tensor(VALUES, shape=(3, -4)),
        Tensor(VALUES, shape=(3, 4), strides=(4,)),
        Tensor(VALUES, offset=2**70),
    ],
)
def test_tensors_beyond_their_values_are_refused(tmp_path, tensor):
    with pytest.raises(TorchFileError, match=r"x\.pt"):
        read_torch_file(save(tmp_path / "x.pt", {"a": tensor}))


def test_damage_in_the_values_is_seen_when_they_are_read(tmp_path):
    path = save(tmp_path / "x.pt", {"a": Tensor(VALUES)})
    raw = bytearray(path.read_bytes())
    raw[raw.index(VALUES.tobytes()) + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(TorchFileError, match="checksum"):
        read_torch_file(path)["a"].read()


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, share):
    raw = (GOLDEN / "tied_gqa2" / "corenet_checkpoint.pt").read_bytes()
    path = tmp_path / "x.pt"
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(TorchFileError, match=r"x\.pt"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<!doctype html><html>", "HTML"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
        (b"\x20\x00\x00\x00\x00\x00\x00\x00{}", "safetensors"),
        (b"\x00" * 100, "not a PyTorch file"),
    ],
)
def test_other_files_are_told_what_they_are(tmp_path, start, said):
    path = tmp_path / "x.pt"
    path.write_bytes(start)
    with pytest.raises(TorchFileError, match=said):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compression": 8}, "compressed"),
        ({"leave_out": ("data.pkl",)}, r"data\.pkl"),
        ({"leave_out": ("data/0",)}, "missing"),
        ({"extra": {"constants.pkl": b""}}, "TorchScript"),
        ({"extra": {"byteorder": b"big"}}, "big-endian"),
    ],
)
def test_other_archives_are_told_what_they_are(tmp_path, options, said):
    with pytest.raises(TorchFileError, match=said):
        read_torch_file(save(tmp_path / "x.pt", {"a": Tensor(VALUES)}, **options))


def test_a_record_before_the_file_is_refused(tmp_path):
    """The directory's own offset, pushed up, moves every record the other way."""
    path = save(tmp_path / "x.pt", {"a": Tensor(VALUES)})
    raw = bytearray(path.read_bytes())
    place = raw.rindex(b"PK\x05\x06") + 16
    raw[place : place + 4] = (int.from_bytes(raw[place : place + 4], "little") + 500).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(TorchFileError, match="not where it should be"):
        read_torch_file(path)


def test_keys_that_never_stop_hashing_are_left_alone(tmp_path):
    nested = Raw(b")" + b"2\x86" * 80)  # a tuple of a tuple twice, and so on: its hash would take 2^80 steps
    path = save(tmp_path / "x.pt", {}, pickle=b"\x80\x02}(" + nested.opcodes + b"K\x01u.")
    with pytest.raises(TorchFileError, match="no named tensors"):
        read_torch_file(path)


def test_names_that_never_stop_printing_are_refused(tmp_path):
    path = save(tmp_path / "x.pt", {}, pickle=b"\x80\x02)" + b"2\x86" * 80 + b"2\x93.")
    with pytest.raises(TorchFileError, match="damaged"):
        read_torch_file(path)


def test_a_description_without_tensors_is_refused(tmp_path):
    with pytest.raises(TorchFileError, match="no named tensors"):
        read_torch_file(save(tmp_path / "x.pt", {"epoch": 1}))


@pytest.mark.torch
def test_the_writer_is_read_by_pytorch(tmp_path):
    """The files of these tests are what PyTorch takes for its own."""
    torch = pytest.importorskip("torch")
    path = save(tmp_path / "x.pt", {"a": Tensor(VALUES), "n": 3})
    assert torch.equal(torch.load(path)["a"], torch.tensor(VALUES))
    assert describe({"n": 3}).endswith(b".")
