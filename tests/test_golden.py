"""The stored results of the built-in model. Run as a script, this makes them again, on the CPU."""

import mlx.core as mx
import pytest

from conftest import assert_close
from mlx_openelm import load
from mlx_openelm.errors import SourceError
from mlx_openelm.self_test import golden
from mlx_openelm.self_test.golden import GOLDEN_FILE, MODEL_FOLDER, make_golden, read_golden, write_golden

PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play with her toys in the park."


def made():
    """The results of the model that is in the package now."""
    network, tokenizer = load(MODEL_FOLDER, dtype=mx.float32)
    return make_golden(network, tokenizer.encode(PROMPT))


def test_it_belongs_to_the_model_in_the_package():
    """If this fails, the model was replaced: run `python tests/test_golden.py`."""
    stored, expected = read_golden(), made()
    assert mx.array_equal(stored.tokens, expected.tokens)
    assert mx.array_equal(stored.greedy, expected.greedy)
    assert_close(stored.logits, expected.logits, atol=1e-3)  # float32, of another BLAS


def test_its_greedy_text_has_no_near_ties():
    """So that rounding on another device cannot change it."""
    stored = read_golden()
    network, _ = load(MODEL_FOLDER, dtype=mx.float32)
    tokens = mx.concatenate([stored.tokens, stored.greedy])
    logits = mx.sort(network(tokens[None])[0, stored.tokens.size - 1 : -1], axis=-1)
    assert (logits[:, -1] - logits[:, -2]).min().item() > 0.02


def test_other_weights_are_noticed(monkeypatch):
    monkeypatch.setattr(golden, "weights_hash", lambda: "another")
    with pytest.raises(SourceError, match="belong to other weights"):
        read_golden()


def test_what_is_written_can_be_read(tmp_path, monkeypatch):
    stored = read_golden()
    monkeypatch.setattr(golden, "GOLDEN_FILE", tmp_path / "new" / "golden.safetensors")
    with pytest.raises(SourceError, match="are missing"):
        read_golden()
    write_golden(stored)
    assert mx.array_equal(read_golden().logits, stored.logits)


def test_it_is_small():
    assert GOLDEN_FILE.stat().st_size < 200_000


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    write_golden(made())
