"""Checkpoints of a run: written to the side and renamed, so that one that exists is whole."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import OutputError, TrainingError
from .optimizer import Moments, Tensors

PARAMETER_FILES = ("model.safetensors", "adapters.safetensors")
WriteParameters = Callable[[Path, Tensors], None]

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on."""

    parameters: Tensors
    moments: Moments
    state: dict[str, Any]  # step, recipe, fingerprint of the data, best validation loss


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoint_folders(run: Path) -> list[Path]:
    """Checkpoints of a run, the oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name))


def check_fresh(run: Path) -> None:
    """Make sure that a run may begin in this folder.

    Raises:
        TrainingError: if another one has left checkpoints there.
    """
    if checkpoint_folders(run):
        raise TrainingError(f"{run} holds checkpoints already; --resume goes on with them, or name another --output")


def save_checkpoint(run: Path, checkpoint: Checkpoint, write: WriteParameters, keep: int) -> Path:
    """Write a checkpoint, and remove the oldest but the last `keep` and the best.

    Args:
        write: puts the parameters into a folder, in a form that they can be used in.
    Raises:
        OutputError: if it cannot be written; those before stay.
    """
    folder = checkpoint_folder(run, checkpoint.state["step"])
    staging = folder.with_name(f".{folder.name}.partial")
    moments = {f"first.{name}": m for name, m in checkpoint.moments.first.items()}
    moments |= {f"second.{name}": m for name, m in checkpoint.moments.second.items()}
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write(staging, checkpoint.parameters)
        mx.save_safetensors(str(staging / "optimizer.safetensors"), {**moments, "steps": checkpoint.moments.steps})
        (staging / "state.json").write_text(json.dumps(checkpoint.state, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError where the disk is full
        shutil.rmtree(staging, ignore_errors=True)
        raise OutputError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    best = checkpoint.state.get("best_step")
    for old in checkpoint_folders(run)[:-keep]:
        if best is None or old != checkpoint_folder(run, best):
            shutil.rmtree(old, ignore_errors=True)
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        TrainingError: if it is damaged.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        name = next(name for name in PARAMETER_FILES if (folder / name).exists())
        parameters: Any = mx.load(str(folder / name))
        saved: Any = mx.load(str(folder / "optimizer.safetensors"))
        moments = Moments(
            {name: saved[f"first.{name}"] for name in parameters},
            {name: saved[f"second.{name}"] for name in parameters},
            saved["steps"],
        )
        mx.eval(parameters, moments)
        assert type(state["step"]) is int
    except Exception as error:  # damage shows in many ways
        raise TrainingError(f"{folder} is damaged: {' '.join(str(error).split())[:200]}") from error
    return Checkpoint(parameters, moments, state)
