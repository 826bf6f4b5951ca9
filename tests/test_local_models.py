"""The models on this machine: what is listed, and what is removed."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from conftest import refused, run
from mlx_openelm import convert
from mlx_openelm.commands.models import _used
from mlx_openelm.conversion.local_models import BUILT_IN, CACHE, FOLDER, local_models, remove_model
from mlx_openelm.errors import OutputError, SourceError


def cached(cache, name, folder):
    """A repository in the hub's cache, as its client lays it out: links to blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir() if folder else ():
        shutil.copyfile(path, repository / "blobs" / path.name)
        os.symlink(f"../../blobs/{path.name}", snapshot / path.name)
    return repository


@pytest.fixture
def machine(tmp_path, tiny_folder, monkeypatch):
    """Three models in the current folder, two in the cache, and others that are none."""
    from huggingface_hub import constants

    cache, place = tmp_path / "cache", tmp_path / "here"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    place.mkdir()
    monkeypatch.chdir(place)
    convert(tiny_folder, "four", quantize=4)
    convert(tiny_folder, "owner/sixteen", dtype="bfloat16")
    shutil.copytree(tiny_folder, "foreign")
    for name, config in (("llama", {"model_type": "llama"}), (".hidden", {}), ("broken", None)):
        Path(name).mkdir()
        Path(name, "config.json").write_text("{" if config is None else json.dumps(config))
    cached(cache, "apple/OpenELM-270M", tiny_folder)
    config_alone = cached(cache, "apple/OpenELM-3B", None) / "snapshots" / "0123abc" / "config.json"
    shutil.copyfile(tiny_folder / "config.json", config_alone)
    cached(cache, "meta-llama/Llama-2-7b-hf", Path("llama"))
    (cache / "models--no--snapshot").mkdir()
    return tmp_path


def test_all_places_are_listed_and_nothing_but_openelm(machine):
    found = [(model.name, model.place, model.storage) for model in local_models() if model.place != BUILT_IN]
    assert found == [
        ("apple/OpenELM-270M", CACHE, "32-bit"),
        ("apple/OpenELM-3B", CACHE, "incomplete"),
        ("foreign", FOLDER, "32-bit"),
        ("four", FOLDER, "4-bit affine"),
        ("owner/sixteen", FOLDER, "bfloat16"),
    ]
    assert "openelm-tiny" in [model.name for model in local_models() if model.place == BUILT_IN]
    assert {model.name for model in local_models("owner") if model.place == FOLDER} == {"owner/sixteen"}
    assert {model.name for model in local_models("four") if model.place == FOLDER} == {"four"}
    with pytest.raises(SourceError, match="nowhere is not a folder"):
        local_models("nowhere")


@pytest.fixture
def trained(machine):
    """An adapter, and the runs of a model and of an adapter that was not completed."""
    for step, best in ((5, 5), (10, 5)):
        folder = Path(f"run/checkpoints/step-{step:08d}")
        shutil.copytree("four", folder)
        state = {"step": step, "best_step": best, "tokens": 90, "recipe": {"steps": 20}}
        (folder / "state.json").write_text(json.dumps(state))
    Path("run/metrics.jsonl").write_text('{"step": 5, "validation_loss": 2.5}\n{"step": 7, "validation_loss": 3}\n{')
    for place, values in (("chat", {"fine_tune_type": "dora"}), ("peft", {"peft_type": "LORA"})):
        Path(place).mkdir()
        Path(place, "adapter_config.json").write_text(json.dumps(values))
        Path(place, "adapters.safetensors").write_bytes(b"1234")
    shutil.copytree("chat", "begun/checkpoints/step-00000003")
    Path("begun/checkpoints/step-00000003/state.json").write_text('{"step": 3, "recipe": {}}')
    Path("empty/checkpoints").mkdir(parents=True)
    Path("odd").mkdir()
    Path("odd/adapter_config.json").write_text("[")


@pytest.mark.usefixtures("trained")
def test_adapters_and_runs_in_a_folder_are_listed_by_what_they_stand_for():
    found = {model.name: model for model in local_models() if model.kind != "model"}
    assert {name: (model.kind, model.storage) for name, model in found.items()} == {
        "begun": ("run", "run, step 3"),
        "chat": ("adapter", "dora adapter"),
        "peft": ("adapter", "lora adapter"),
        "run": ("run", "run, step 5"),
    }
    assert found["chat"].parameters is None
    assert found["run"].parameters == next(model.parameters for model in local_models() if model.name == "four")
    assert found["run"].nbytes == sum(path.stat().st_size for path in Path("run").rglob("*") if path.is_file())
    assert {model.name for model in local_models("run") if model.place == FOLDER} == {"run"}
    with pytest.raises(OutputError, match="run is a training run; remove its folder yourself"):
        remove_model(found["run"])
    status, out, err = run("models", COLUMNS="40")
    assert (status, err) == (0, "")
    assert "\n  chat\n    dora adapter, " in out
    assert max(map(len, out.splitlines())) <= 40


@pytest.mark.usefixtures("trained")
def test_info_lists_the_checkpoints_of_a_run():
    out = run("info", "run")[1]
    assert "checkpoints  step  5: validation loss 2.5000, the one in use\n" in out
    assert out.endswith("step 10: not validated\n")
    assert json.loads(run("info", "run", "--json")[1])["checkpoints"] == [
        {"step": 5, "validation_loss": 2.5, "is_best": True},
        {"step": 10, "validation_loss": None, "is_best": False},
    ]


def test_sizes_and_last_use_are_those_of_the_files(machine):
    folder = Path("four")
    os.utime(folder / "model.safetensors", (1_700_000_000, 1_750_000_000))
    model = next(model for model in local_models() if model.name == "four")
    assert model.nbytes == sum(path.stat().st_size for path in folder.rglob("*"))
    assert model.last_used.timestamp() == 1_700_000_000
    assert next(model for model in local_models() if model.storage == "incomplete").last_used is None


def test_only_what_this_package_wrote_is_removed(machine):
    found = {model.name: model for model in local_models()}
    with pytest.raises(OutputError, match="foreign holds files that openelm-mlx did not write"):
        remove_model(found["foreign"])
    Path("four/notes.txt").touch()
    with pytest.raises(OutputError, match="four holds files"):
        remove_model(found["four"])
    with pytest.raises(SourceError, match="belongs to the package"):
        remove_model(found["openelm-tiny"])
    remove_model(found["owner/sixteen"])
    assert list(Path("owner").iterdir()) == []
    remove_model(found["apple/OpenELM-270M"])
    assert {path.name for path in (machine / "cache").iterdir()} == {
        "models--apple--OpenELM-3B",
        "models--meta-llama--Llama-2-7b-hf",
        "models--no--snapshot",
    }


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_the_list_fits_the_terminal(machine, columns):
    status, out, err = run("models", COLUMNS=str(columns))
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= columns
    for text in ("built in:", "openelm-tiny", "apple/OpenELM-270M", "owner/sixteen", "4-bit affine", "used today"):
        assert text in out


def test_the_list_as_json(machine):
    found = json.loads(run("models", "--json")[1])
    assert {"name", "place", "folder", "parameters", "storage", "nbytes", "last_used", "kind"} == found[0].keys()
    assert "four" in [model["name"] for model in found]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["owner"], "unknown action 'owner' (choose from list, remove); to list the models in a folder: openelm-mlx"),
        (["remove"], "which models? give their names, as `openelm-mlx models` lists them"),
        (["list", "four"], "unexpected argument 'four'; give a folder with --folder"),
        (["remove", "fourth", "--yes"], "fourth is not a model on this machine; `openelm-mlx models` lists them"),
        (["remove", "four"], "stdin is not a terminal, so nobody can be asked first; use --yes"),
        (["remove", "four", "openelm-tiny", "--yes"], "openelm-tiny belongs to the package"),
        (["--folder", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_mistakes_are_one_line_and_remove_nothing(machine, arguments, message):
    assert message in refused("models", *arguments)
    assert Path("four").is_dir()


def answered(answer, *arguments):
    """What a person sees who types this answer, and the status."""
    main, other = pty.openpty()
    words = [sys.executable, "-m", "mlx_openelm", "models", "remove", *arguments]
    process = subprocess.Popen(words, stdin=other, stdout=other, stderr=other)
    os.close(other)
    os.write(main, answer)
    seen = b""
    while True:
        try:
            seen += os.read(main, 65536)
        except OSError:
            break
        if not seen:
            break
    os.close(main)
    return process.wait(timeout=60), seen.decode()


@pytest.mark.parametrize(("answer", "removed"), [(b"y\n", True), (b"\n", False), (b"no\n", False), (b"\x04", False)])
def test_a_person_is_asked_first(machine, answer, removed):
    status, seen = answered(answer, "four", "--quiet")
    assert re.search(r"four: [\d.]+ MiB in the folder: four\r\nRemove it\? \[y/N\] ", seen)
    assert (status, Path("four").exists()) == ((0, False) if removed else (1, True))


def test_with_yes_nobody_is_asked(machine):
    status, out, err = run("models", "remove", "./four/", "apple/OpenELM-270M", "--yes")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"four: removed, .* MiB freed\napple/OpenELM-270M: removed, .* MiB freed\n", out)
    assert not Path("four").exists()


def test_last_use_is_told_in_days():
    now = datetime(2026, 3, 31, 12)
    told = [_used(now - timedelta(days=days), now) for days in (0, 1, 2, 30, 31)]
    assert told == ["used today", "used yesterday", "used 2 days ago", "used 30 days ago", "used 2026-02-28"]
    assert _used(None) == "never used"
