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
    assert {"name", "place", "folder", "parameters", "storage", "nbytes", "last_used"} == found[0].keys()
    assert "four" in [model["name"] for model in found]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["purge"], "list and remove are what `models` does; got 'purge'"),
        (["remove"], "needs the names of models"),
        (["list", "four"], "unexpected argument 'four'"),
        (["remove", "fourth", "--yes"], "fourth is not among the models on this machine"),
        (["remove", "four"], "asks first, and stdin is not a terminal; use --yes"),
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
