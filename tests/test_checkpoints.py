"""Checkpoints: what is kept, what is the best, and where a run may begin."""

import json
import os

import mlx.core as mx
import pytest

from mlx_openelm.errors import TrainingError
from mlx_openelm.runs import METRICS, best_checkpoint, checkpoint_folder, checkpoint_folders, read_state
from mlx_openelm.tensors import save_arrays
from mlx_openelm.training.checkpoints import (
    Checkpoint,
    check_fresh,
    check_output,
    load_checkpoint,
    mark_begun,
    save_checkpoint,
)
from mlx_openelm.training.optimizer import Moments


def saved(run, step, best_step=None, keep=3):
    parameters = {"a": mx.full((2, 2), step), "b": mx.zeros((3,))}
    moments = Moments(
        {name: p + 1 for name, p in parameters.items()},
        {name: p + 2 for name, p in parameters.items()},
        mx.array(step),
    )
    checkpoint = Checkpoint(parameters, moments, {"step": step, "best_step": best_step, "best_loss": 1.5})

    def write(folder, parameters):
        save_arrays(folder / "model.safetensors", parameters, {})

    return save_checkpoint(run, checkpoint, write, keep)


def steps(run):
    return [read_state(folder)["step"] for folder in checkpoint_folders(run)]


def test_a_checkpoint_comes_back(tmp_path):
    folder = saved(tmp_path, 5)
    assert folder == checkpoint_folder(tmp_path, 5)
    loaded = load_checkpoint(folder)
    assert loaded.parameters["a"].tolist() == [[5, 5], [5, 5]]
    assert loaded.moments.first["a"].tolist() == [[6, 6], [6, 6]]
    assert loaded.moments.second["b"].tolist() == [2, 2, 2]
    assert (loaded.moments.steps.item(), loaded.state["step"]) == (5, 5)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        saved(tmp_path, step, best_step=min(step, 2), keep=2)
    assert steps(tmp_path) == [2, 5, 6]
    assert best_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 2)


def test_without_a_validation_the_last_is_the_best(tmp_path):
    assert best_checkpoint(tmp_path) is None
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    assert best_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 2)


def test_if_the_best_is_gone_the_last_takes_its_place(tmp_path):
    saved(tmp_path, 4, best_step=1)
    assert best_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 4)


def test_other_names_are_not_checkpoints(tmp_path):
    saved(tmp_path, 1)
    for name in ("step-2", "step-000000003", "step-00000004.old", "damaged-step-00000001"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize(
    "damage", ["state", "no state", "parameters", "optimizer", "moments", "surplus", "nan", "step"]
)
def test_a_damaged_one_is_named(tmp_path, damage):
    folder = saved(tmp_path, 1)
    if damage == "state":
        (folder / "state.json").write_text("{")
    elif damage == "no state":
        (folder / "state.json").unlink()
    elif damage == "parameters":
        (folder / "model.safetensors").unlink()
    elif damage == "optimizer":
        (folder / "optimizer.safetensors").write_bytes(b"damaged")
    elif damage == "surplus":
        with open(folder / "optimizer.safetensors", "ab") as file:
            file.write(b"\0")
    elif damage == "nan":
        kept = mx.load(str(folder / "model.safetensors"))
        save_arrays(
            folder / "model.safetensors", {name: array * mx.array(float("nan")) for name, array in kept.items()}, {}
        )
    elif damage == "moments":
        save_arrays(folder / "optimizer.safetensors", {"steps": mx.array(1)}, {})
    else:
        (folder / "state.json").write_text(json.dumps({"step": "1"}))
    with pytest.raises(TrainingError, match="step-00000001 is damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "adapter_config.json", METRICS])
def test_a_run_does_not_begin_over_what_belongs_to_others(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(TrainingError, match=name):
        check_fresh(tmp_path)


def test_a_run_may_begin_again_if_it_left_no_checkpoint(tmp_path):
    check_fresh(tmp_path)
    mark_begun(tmp_path)
    (tmp_path / METRICS).write_text("{}")
    check_fresh(tmp_path)
    saved(tmp_path, 1)
    with pytest.raises(TrainingError, match="already contains checkpoints"):
        check_fresh(tmp_path)
    with pytest.raises(TrainingError, match="already contains checkpoints"):
        check_output(tmp_path, resume=False)
    check_output(tmp_path, resume=True)


def test_nothing_can_be_resumed_without_a_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        check_output(tmp_path, resume=True)
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(TrainingError, match="is a file"):
        check_fresh(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": -1}, "step must be a number from 0"),
        ({"step": 2.0}, "step must be a whole number"),
        ({"best_step": []}, "best_step must be a whole number"),
        ({"best_loss": "x" * 10**5}, "best_loss must be a number; got 'xxx"),
        ({"tokens": 10**400}, "tokens must be a finite number"),
        ({"worse": True}, "worse must be a whole number"),
        ({"recipe": []}, "recipe must be an object"),
        ({"pending": {"step": 7}}, "pending must be of step 2; got 7"),
        ({"pending": {"a": 1}}, "pending: step is missing"),
    ],
)
def test_a_state_that_cannot_be_right_is_one_line_and_the_one_before_is_the_best(tmp_path, change, problem):
    saved(tmp_path, 1)
    folder = saved(tmp_path, 2)
    (folder / "state.json").write_text(json.dumps({**read_state(folder), **change}))
    with pytest.raises(TrainingError) as raised:
        read_state(folder)
    assert problem in str(raised.value)
    assert len(str(raised.value)) < 300 + len(str(tmp_path))
    assert best_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_fifo_in_a_checkpoint_is_not_waited_for(tmp_path, name):
    folder = saved(tmp_path, 1)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(TrainingError, match="a FIFO, not a regular file"):
        load_checkpoint(folder)
