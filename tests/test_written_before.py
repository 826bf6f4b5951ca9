"""What commit f5f6042 wrote, before names in files changed, is read and continued as it would have been then."""

import json
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

from conftest import GOLDEN, assert_close, run
from mlx_openelm import generate, load, load_model
from mlx_openelm.runs import checkpoint_folders

BEFORE = GOLDEN / "written_before"
ROUNDING = 1e-5  # of eight steps in float32 on another processor; on the machine that made them the bits are equal


@pytest.fixture
def place(tmp_path):
    return shutil.copytree(BEFORE, tmp_path / "before")


def resumed(place, *words):
    done = subprocess.run(
        [sys.executable, "-m", "mlx_openelm", *words, "--resume"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("words", "result", "expected"),
    [
        (["pretrain", "--config", "pretrain.yaml", "-o", "pretrain_run"], "model.safetensors", "expected_pretrain"),
        (["tune", "--config", "tune.yaml", "-o", "tune_run"], "adapters.safetensors", "expected_tune"),
    ],
    ids=["pretrain", "tune"],
)
def test_a_run_is_resumed(place, words, result, expected):
    said = resumed(place, *words)
    assert "step 5 of 8" in said
    assert "step 4 of 8:" not in said
    last = checkpoint_folders(place / words[-1])[-1]
    assert last.name == "step-00000008"
    found, wanted = mx.load(str(last / result)), mx.load(str(place / f"{expected}.safetensors"))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert_close(found[name], array, ROUNDING)
    steps = [json.loads(line)["step"] for line in (place / words[-1] / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*([0] if words[0] == "tune" else []), *range(1, 9)]


def test_an_adapter_is_loaded(place):
    model, tokenizer = load(place / "model", adapter=place / "tune_run", dtype=mx.float32)
    plain = load_model(place / "model", dtype=mx.float32)
    assert generate(model, tokenizer, "The fox", max_tokens=6) != generate(plain, tokenizer, "The fox", max_tokens=6)


def test_a_prompt_cache_is_reused(place):
    words = ["generate", "-m", place / "model", "--dtype", "float32", "-p", "The fox", "-n", 6, "--json"]
    status, out, err = run(*words, "--prompt-cache", place / "prompt_cache")
    assert status == 0, err
    found = json.loads(out)
    assert found["stats"]["reused_tokens"] == found["stats"]["prompt_tokens"] - 1
    assert found["tokens"] == [271] * 6
