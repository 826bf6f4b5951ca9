import json

import pytest

from conftest import draw, refused, run
from mlx_openelm.errors import OutputError, TrainingError
from mlx_openelm.plot import plot_run, read_metrics


def write_run(folder, steps=30):
    folder.mkdir(parents=True)
    lines = [
        {
            "step": step,
            "loss": 8 / step,
            "learning_rate": 1e-3,
            "gradient_norm": 1 / step,
            "tokens": 1000 * step,
            "tokens_per_second": 2000.0,
            "validation_loss": 8 / step + 0.1 if step % 10 == 0 else None,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_is_drawn_with_its_units(tmp_path):
    draw(plot_run, write_run(tmp_path / "stories"), tmp_path / "run.svg")
    drawn = (tmp_path / "run.svg").read_text()  # text is drawn as shapes, with the words in comments
    for words in ("Training run stories", "nats per token", "tokens per second", "held-out", "learning rate", "step"):
        assert f"<!-- {words}" in drawn, words


def test_a_run_without_validation_is_drawn(tmp_path):
    draw(plot_run, write_run(tmp_path / "stories", steps=2), tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_damage_is_named(tmp_path):
    with pytest.raises(TrainingError, match="not a training run"):
        read_metrics(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    with pytest.raises(TrainingError, match="is empty"):
        read_metrics(tmp_path)
    for text in ('{"step": 1', '{"step": 1}', "[]", "3"):
        path.write_text(text + "\n")
        with pytest.raises(TrainingError, match=r"metrics\.jsonl, line 1"):
            read_metrics(tmp_path)


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(OutputError, match=r"run\.frob cannot be written"):
        draw(plot_run, write_run(tmp_path / "stories"), tmp_path / "run.frob")


def test_the_command_says_what_it_wrote(tmp_path):
    folder = write_run(tmp_path / "stories")
    status, out, err = run("plot", folder)
    assert (status, out, err) == (0, f"{folder / 'metrics.png'}\n", "")
    drawn = (folder / "metrics.png").read_bytes()
    assert "already exists" in refused("plot", folder)
    assert (folder / "metrics.png").read_bytes() == drawn
    assert run("plot", folder, "--force")[0] == 0
    assert "not a training run" in refused("plot", tmp_path / "missing")
