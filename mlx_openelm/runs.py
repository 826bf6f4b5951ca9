"""The folder of a training run: its checkpoints, their state, and which one is the best."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .errors import SourceError, TrainingError, quoted
from .files.fields import Fields
from .files.json_file import read_json_lines, read_json_object
from .files.paths import exists, is_folder, user_path

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation_"  # in a line of metrics, before the names of figures
_NAME = re.compile(r"step-(\d{8})")


def checkpoint_folder(run: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def checkpoint_folders(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted(path for path in (run / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the best metric or validation loss; without either, the last one that can be read."""
    folders = checkpoint_folders(run)
    for newest in reversed(folders):
        try:
            best = read_state(newest).get("best_step")
        except TrainingError:  # damaged: resuming starts from an earlier one
            continue
        named = checkpoint_folder(run, best) if best is not None else newest
        return named if named in folders else newest
    return None


class SavedStep(NamedTuple):
    """A checkpoint of a run."""

    step: int
    validation_loss: float | None  # None if this step was not validated
    is_best: bool


def saved_steps(run: Path) -> list[SavedStep]:
    """The checkpoints of a run, oldest first, with their validation losses as far as its metrics can be read."""
    losses: dict[int, float] = {}
    with suppress(TrainingError):
        for line in read_json_lines(run / METRICS, TrainingError):
            if (loss := line.number("validation_loss", None)) is not None:
                losses[line.whole("step")] = loss
    best = best_checkpoint(run)
    steps = [(step_of(folder), folder == best) for folder in checkpoint_folders(run)]
    return [SavedStep(step, losses.get(step), is_best) for step, is_best in steps]


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training run, whatever it was that was trained."""
    return is_folder(folder / CHECKPOINTS) or exists(folder / METRICS)


def trained_model(folder: Path) -> Path:
    """The model folder of a run: its best checkpoint; any other folder as it is.

    Raises:
        SourceError: if the run has no checkpoint yet.
    """
    if not is_run(folder) or exists(folder / "config.json") or exists(folder / "adapter_config.json"):
        return folder
    if (best := best_checkpoint(folder)) is None:
        raise SourceError(f"{folder} is a training run without a checkpoint that can be read")
    return best


def checkpoints_to_average(sources: Sequence[str | Path]) -> list[str | Path]:
    """The checkpoints that are meant: several as they are; of one run, the last ones, as many as it keeps.

    Raises:
        TrainingError: if there are fewer than two, or they are adapters.
    """
    if len(sources) != 1:
        return list(sources)
    run = user_path(sources[0])
    if not is_run(run):
        raise TrainingError(f"{run} is not a training run; give its folder, or two checkpoints or more")
    keep = newest_state(run).table("recipe").whole("keep_checkpoints", 0)
    folders: list[str | Path] = [*checkpoint_folders(run)[-keep:]]
    if exists(run / "adapter_config.json") or exists(Path(folders[-1]) / "adapter_config.json"):
        raise TrainingError(f"{run} is an adapter; only the checkpoints of whole models can be averaged")
    if len(folders) < 2:
        raise TrainingError(f"{run} has one checkpoint; an average needs two or more")
    return folders


def newest_state(run: Path) -> Fields:
    """The state of the newest checkpoint of a run that can be read.

    Raises:
        TrainingError: if there is none.
    """
    for folder in reversed(checkpoint_folders(run)):
        try:
            return read_state(folder)
        except TrainingError:  # damaged: resuming starts from an earlier one
            continue
    if not exists(run):
        raise TrainingError(f"{run} does not exist")
    if not is_run(run):
        raise TrainingError(f"{run} is not the folder of a training run")
    kind = "readable checkpoint" if checkpoint_folders(run) else "checkpoint to resume from"
    raise TrainingError(f"{run} has no {kind}; start without `resume`")


def read_state(checkpoint: Path) -> Fields:
    """State of a checkpoint: step, recipe, what is best so far.

    Raises:
        TrainingError: if it is damaged.
    """
    state = read_json_object(checkpoint / "state.json", TrainingError)
    state.whole("step")
    for name in ("best_step", "tokens", "worse"):
        state.whole(name, None)
    state.number("best_loss", None)
    state.text("folder", None)
    metric, figures = state.table("metric"), state.table("best_evaluation")
    for name in metric:
        metric.text(name)
    for name in figures:
        figures.number(name)
    state.table("recipe")
    pending = state.table("pending")
    if pending and pending.whole("step") != state["step"]:
        raise TrainingError(f"{state.where}: pending must be of step {state['step']}; got {quoted(pending['step'])}")
    return state


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's `metrics.jsonl`.

    Raises:
        TrainingError: if there are none, or one is damaged.
    """
    path = run / METRICS if is_folder(run) else run
    if not exists(path):
        raise TrainingError(f"{run} is not a training run: {path.name} is missing")
    lines: list[dict[str, Any]] = []
    for line in read_json_lines(path, TrainingError):
        for name in ("step", "tokens"):
            line.whole(name)
        for name in ("learning_rate", "gradient_norm", "tokens_per_second"):
            line.number(name)
        for name in ("loss", "validation_loss", *(name for name in line if name.startswith(EVALUATION))):
            line.number(name, None)
        lines.append(line)
    if not lines:
        raise TrainingError(f"{path} is empty; there is nothing to plot yet")
    return lines
