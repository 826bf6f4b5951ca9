"""Mutated PyTorch files: whatever is in them, the reader gives tensors or says what is wrong."""

import random
import signal
import sys
import tracemalloc
import zipfile
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest

from conftest import GOLDEN
from mlx_openelm.conversion.read.torch_file import read_torch_file
from mlx_openelm.errors import TorchFileError
from torch_writer import Call, Global, Tensor, save

SECONDS = 5
SMALL_CHANGE = 256 * 1024  # bytes that Python's own objects take, whatever the file
FORBIDDEN = {"exec", "compile", "os.system", "os.exec", "os.mkdir", "subprocess.Popen", "pickle.find_class", "import"}
_events = []
_watching = False


def _audit(event, arguments):
    if _watching and event in FORBIDDEN:
        _events.append((event, arguments))


sys.addaudithook(_audit)


@contextmanager
def nothing_runs():
    """Fails if Python runs, imports or unpickles anything meanwhile, or if it takes too long."""
    global _watching

    def too_long(*_):
        raise AssertionError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    _events.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not _events


def mutate(data, rng):
    """A few changes of the kinds that happen to files, and that people make on purpose."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        place = rng.randrange(len(data) or 1)
        if rng.random() < 0.3:  # the table of contents stands at the end
            place = max(0, len(data) - rng.randrange(1, 400))
        length = min(rng.choice([1, 1, 2, 4, 8, 64]), len(data) - place)
        kind = rng.randrange(7)
        if kind == 0 and length:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            data[place : place + length] = b"\xff" * length
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = rng.randbytes(length)
        elif kind == 5:
            other = rng.randrange(len(data) or 1)
            data[place:place] = data[other : other + length]
        elif rng.random() < 0.2:
            del data[place:]
    return bytes(data)


def originals(folder):
    """Files of several builds: real ones, and small ones in which a mutation hits something that matters."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    model = {"a.weight": Tensor(values), "b": Tensor(values, key="0", shape=(3, 2), strides=(1, 3))}
    training = {
        "model_state_dict": {**model, "n": Tensor(np.array([1]), "int64")},
        "opts": Call(Global("argparse", "Namespace")),
        "list": [1, 2.5, (None, True), "text"],
    }
    return [
        GOLDEN / "untied_mha_noglu" / "corenet_checkpoint.pt",
        save(folder / "plain.pt", model),
        save(folder / "training.pt", training),
    ]


def rewrite(source, target, rng):
    """The same archive around a mutated description, its checksums right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            raw = old.read(info)
            if info.filename.endswith("data.pkl"):
                raw = mutate(raw, rng)
            new.writestr(info.filename, raw)


def survive(path):
    """Read a file wholly; gives whether it could be read."""
    limit = 2 * path.stat().st_size + SMALL_CHANGE
    readable, peak = read_wholly(path)
    if peak > limit:  # a table of Python's own may have grown just then, which it does once
        readable, peak = read_wholly(path)
    assert peak <= limit, f"{peak:,} bytes for a file of {path.stat().st_size:,}"
    return readable


def read_wholly(path):
    """Whether a file could be read, and the memory that it took in bytes."""
    tracemalloc.reset_peak()
    mx.reset_peak_memory()
    before = tracemalloc.get_traced_memory()[0] + mx.get_active_memory()
    try:
        with nothing_runs():
            for tensor in read_torch_file(path).values():
                mx.eval(tensor.read())
        readable = True
    except TorchFileError as error:
        assert str(path) in str(error)
        readable = False
    return readable, tracemalloc.get_traced_memory()[1] + mx.get_peak_memory() - before


def fuzz(folder, count, seed):
    rng = random.Random(seed)
    files = originals(folder)
    for path in files:
        assert survive_warm(path)
    readable = 0
    tracemalloc.start()
    try:
        for number in range(count):
            source = rng.choice(files)
            path = folder / "mutated.pt"
            if rng.random() < 0.5:
                path.write_bytes(mutate(source.read_bytes(), rng))
            else:
                rewrite(source, path, rng)
            try:
                readable += survive(path)
            except BaseException:
                path.rename(folder / f"seed-{seed}-number-{number}.pt")
                raise
    finally:
        tracemalloc.stop()
    assert 0 < readable < count  # the mutations are neither all harmless nor all deadly


def survive_warm(path):
    """Read once unwatched: what Python imports at the first use is no business of the file's."""
    return bool([mx.eval(tensor.read()) for tensor in read_torch_file(path).values()])


def test_300_mutated_files(tmp_path):
    fuzz(tmp_path, 300, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_20_000_mutated_files(tmp_path, seed):
    fuzz(tmp_path, 2000, seed)
