"""Folders of training runs: what they stand for where a model or checkpoints are expected."""

import json

import pytest

from mlx_openelm.errors import SourceError, TrainingError
from mlx_openelm.hub import model_folder
from mlx_openelm.runs import checkpoint_folder, checkpoints_to_average, newest_state, read_state, trained_model


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    for step, best in ((5, 5), (10, 10), (15, 10), (20, 10)):
        folder = checkpoint_folder(run, step)
        folder.mkdir(parents=True)
        state = {"step": step, "best_step": best, "recipe": {"keep_checkpoints": 3}}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "config.json").write_text("{}")
    return run


def test_a_run_stands_for_its_best_checkpoint(run):
    best = checkpoint_folder(run, 10)
    assert trained_model(run) == model_folder(run) == model_folder(str(run)) == best
    assert model_folder(best) == best
    (run / "config.json").write_text("{}")
    assert model_folder(run) == run


@pytest.mark.parametrize(
    "damage", [{"metric": 3}, {"metric": {"name": 3}}, {"best_evaluation": [1]}, {"best_evaluation": {"sciq": "high"}}]
)
def test_a_state_with_a_damaged_evaluation_is_not_read(run, damage):
    path = checkpoint_folder(run, 20) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(TrainingError, match=r"state\.json: (metric|best_evaluation)"):
        read_state(path.parent)


def test_an_adapter_does_not_stand_for_a_checkpoint(run):
    (run / "adapter_config.json").write_text("{}")
    assert trained_model(run) == run


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SourceError, match="is a training run without a checkpoint"):
        model_folder(tmp_path)


def test_the_last_checkpoints_are_averaged_as_many_as_the_run_keeps(run):
    assert checkpoints_to_average([run]) == [checkpoint_folder(run, step) for step in (10, 15, 20)]
    assert checkpoints_to_average(["a", "b"]) == ["a", "b"]


def test_what_cannot_be_averaged_is_refused(run, tmp_path):
    with pytest.raises(TrainingError, match="is not a training run; give its folder, or two checkpoints or more"):
        checkpoints_to_average([checkpoint_folder(run, 5)])
    (checkpoint_folder(run, 20) / "adapter_config.json").write_text("{}")
    with pytest.raises(TrainingError, match="is an adapter"):
        checkpoints_to_average([run])
    single = tmp_path / "single"
    checkpoint_folder(single, 1).mkdir(parents=True)
    (checkpoint_folder(single, 1) / "state.json").write_text('{"step": 1, "recipe": {}}')
    with pytest.raises(TrainingError, match="has one checkpoint; an average needs two or more"):
        checkpoints_to_average([single])


def test_the_newest_state_that_can_be_read_counts(run, tmp_path):
    (checkpoint_folder(run, 20) / "state.json").write_text("{")
    assert newest_state(run)["step"] == 15
    with pytest.raises(TrainingError, match=r"missing does not exist"):
        newest_state(tmp_path / "missing")
    with pytest.raises(TrainingError, match="is not the folder of a training run"):
        newest_state(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(TrainingError, match="has no checkpoint to resume from"):
        newest_state(tmp_path)
