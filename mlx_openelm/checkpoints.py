"""Checkpoints of a run: written to the side and renamed, so that one that exists is whole."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .config import OpenELMConfig
from .errors import OutputError, TrainingError
from .optimizer import Moments, Tensors
from .tokenizer import Tokenizer
from .tokenizer_files import write_tokenizer

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on."""

    parameters: Tensors
    moments: Moments
    state: dict[str, Any]  # step, recipe, fingerprint of the corpus, best validation loss


def checkpoint_folders(run: Path) -> list[Path]:
    """Checkpoints of a run, the oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name))


def save_checkpoint(run: Path, config: OpenELMConfig, tokenizer: Tokenizer, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, which is a model folder too, and remove the oldest but the last `keep` and the best.

    Raises:
        OutputError: if it cannot be written; those before stay.
    """
    folder = run / "checkpoints" / f"step-{checkpoint.state['step']:08d}"
    staging = folder.with_name(f".{folder.name}.partial")
    moments = {f"first.{name}": m for name, m in checkpoint.moments.first.items()}
    moments |= {f"second.{name}": m for name, m in checkpoint.moments.second.items()}
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        mx.save_safetensors(str(staging / "model.safetensors"), checkpoint.parameters, {"format": "mlx"})
        mx.save_safetensors(str(staging / "optimizer.safetensors"), {**moments, "steps": checkpoint.moments.steps})
        (staging / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        (staging / "state.json").write_text(json.dumps(checkpoint.state, indent=2) + "\n")
        write_tokenizer(tokenizer, staging)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError where the disk is full
        shutil.rmtree(staging, ignore_errors=True)
        raise OutputError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    best = checkpoint.state.get("best_step")
    for old in checkpoint_folders(run)[:-keep]:
        if old.name != f"step-{best:08d}" if best is not None else True:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        TrainingError: if it is damaged.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        parameters: Any = mx.load(str(folder / "model.safetensors"))
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
