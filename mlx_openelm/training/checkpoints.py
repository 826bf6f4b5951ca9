"""Checkpoints of a run; one that exists is complete."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import OpenELMError, TrainingError, one_line
from ..files.lock import LockedFolder, lock_folder
from ..files.names import resolved
from ..files.output import output_file, output_folder, remove_folder, write_file
from ..files.paths import exists, is_folder
from ..runs import METRICS, checkpoint_folder, checkpoint_folders, read_state
from ..tensors import read_safetensors, save_arrays
from .optimizer import Moments, Tensors

PARAMETER_FILES = ("model.safetensors", "adapters.safetensors")
WriteParameters = Callable[[Path, Tensors], None]

_BEGUN = ".openelm-mlx.begun"  # marks the folder of a run that has no checkpoint yet


@dataclass(frozen=True)
class Checkpoint:
    """Everything needed to resume a run."""

    parameters: Tensors
    moments: Moments
    state: dict[str, Any]  # step, recipe, data fingerprint, what is best so far


def check_output(run: Path, resume: bool) -> None:
    """Check that a run may use this folder, before anything is loaded.

    Raises:
        TrainingError: if the folder belongs to another run, or has no checkpoint to resume from.
    """
    if not resume:
        check_fresh(run)
    elif not checkpoint_folders(run):
        raise TrainingError(f"{run} has no checkpoint to resume from; start without `resume`")


def check_fresh(run: Path) -> None:
    """Check that a new run would overwrite nothing in this folder.

    Raises:
        TrainingError: if it contains another run, a model or an adapter.
    """
    if checkpoint_folders(run):
        raise TrainingError(
            f"{run} already contains checkpoints; use `resume` to continue from them, or choose another `output`"
        )
    for path in (*sorted(run.glob("*.safetensors")), run / "config.json", run / "adapter_config.json"):
        if exists(path):
            raise TrainingError(f"{run} contains {path.name} of a model or an adapter; choose another `output`")
    if exists(run / METRICS) and not exists(run / _BEGUN):
        raise TrainingError(f"{run} contains the {METRICS} of another run; choose another `output`")
    if exists(run / "checkpoints") and not is_folder(run / "checkpoints"):
        raise TrainingError(f"{run / 'checkpoints'} is a file; choose another `output`")


def mark_begun(run: Path) -> None:
    """Mark the folder as this run's until it has a checkpoint."""
    if not exists(run / _BEGUN):
        write_file(run / _BEGUN, "")


def clear_begun(run: Path) -> None:
    """Remove the mark once the run has saved a checkpoint, or if it wrote nothing."""
    if exists(run / _BEGUN):
        with output_file(run / _BEGUN, overwrite=True) as mark:
            mark.remove()


@contextmanager
def run_lock(run: Path | LockedFolder, group: mx.distributed.Group) -> Iterator[LockedFolder]:
    """Lock the folder of a run against other runs; if the run has several processes, the first one holds the lock.

    Args:
        run: its folder, or a lock from this function, which is passed through.
    Raises:
        OutputLockedError: if another run is writing to the folder.
    """
    if isinstance(run, LockedFolder):
        yield run
        return
    with ExitStack() as held:

        def enter() -> LockedFolder:
            if group.rank() == 0:
                return held.enter_context(lock_folder(run, "checkpoints", "corpus"))
            return LockedFolder(run, resolved(run))

        yield together(group, enter)


_T = TypeVar("_T")


def together(group: mx.distributed.Group, action: Callable[[], _T]) -> _T:
    """Run an action that may fail in one process; if it does, the others fail too instead of waiting.

    Raises:
        OpenELMError: the action's own error, or a `TrainingError` in the other processes.
    """
    failure: OpenELMError | None = None
    try:
        result = action()
    except OpenELMError as error:
        failure = error
    if group.size() > 1:
        failed = mx.distributed.all_sum(mx.array(float(failure is not None)))
        if failure is None and float(np.array(failed)):
            raise TrainingError("another process of the run failed; see its error message")
        mx.eval(failed)
    if failure is not None:
        raise failure
    return result


def save_checkpoint(run: Path, checkpoint: Checkpoint, write: WriteParameters, keep: int) -> Path:
    """Write a checkpoint, then remove old ones except for the last `keep` and the best.

    Args:
        write: writes the parameters into a folder, as a model or an adapter.
    Raises:
        OutputError: if it cannot be written; earlier checkpoints are kept.
    """
    folder = checkpoint_folder(run, checkpoint.state["step"])
    moments = {f"first.{name}": m for name, m in checkpoint.moments.first.items()}
    moments |= {f"second.{name}": m for name, m in checkpoint.moments.second.items()}
    with output_folder(folder, overwrite=True) as output, output.replaced(durable=True) as staging:
        write(staging, checkpoint.parameters)
        save_arrays(staging / "optimizer.safetensors", {**moments, "steps": checkpoint.moments.steps}, {})
        (staging / "state.json").write_text(json.dumps(checkpoint.state, indent=2) + "\n", encoding="utf-8")
    clear_begun(run)
    remove_old_checkpoints(run, keep, checkpoint.state.get("best_step"))
    return folder


def remove_old_checkpoints(run: Path, keep: int, best_step: int | None) -> None:
    """Remove all checkpoints except for the last `keep`, the best, and those that a user changed."""
    for old in checkpoint_folders(run)[:-keep]:
        if best_step is None or old != checkpoint_folder(run, best_step):
            remove_folder(old)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        TrainingError: if it is damaged.
    """
    try:
        state = read_state(folder)
        name = next((name for name in PARAMETER_FILES if exists(folder / name)), PARAMETER_FILES[0])
        parameters, saved = (
            {tensor: lazy.read() for tensor, lazy in read_safetensors(folder / file).items()}
            for file in (name, "optimizer.safetensors")
        )
        moments = Moments(
            {name: saved[f"first.{name}"] for name in parameters},
            {name: saved[f"second.{name}"] for name in parameters},
            saved["steps"],
        )
        if folder != checkpoint_folder(folder.parent.parent, state["step"]):
            raise TrainingError(f"its state.json says step {state['step']}")
    except Exception as error:  # damaged files raise errors of many kinds
        raise TrainingError(f"{folder} is damaged: {one_line(error)}") from error
    return Checkpoint(parameters, moments, state)


def check_parameters(checkpoint: Checkpoint, wanted: Tensors, folder: Path) -> None:
    """Make sure that a checkpoint has the parameters of a run, with their moments.

    Raises:
        TrainingError: naming the first that is missing or has another shape.
    """
    for name, own in wanted.items():
        moments = checkpoint.moments.first.get(name), checkpoint.moments.second.get(name)
        for array in (checkpoint.parameters.get(name), *moments):
            if array is None or array.shape != own.shape or array.dtype != mx.float32:
                raise TrainingError(f"{folder} is damaged or from another model: {name} does not fit")
