"""`openelm-mlx tune`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..training.tune_recipe import TuneRecipe
from .options import Json, examples
from .processes import join_processes
from .progress import TrainingView, report_finished, resumable
from .recipe_options import Resume, RunToResume, recipe_options, run_folder, tune_recipe
from .streams import clean, has_styles, styled
from .terminal import mib, print_json, say, write, write_error

if TYPE_CHECKING:
    from ..data.dataset import Example, ExampleSet
    from ..tokenizer.tokenizer import Tokenizer
    from ..training.memory import StepMemory
    from ..training.run import TrainingResult
    from ..training.tune import Tuning

EXAMPLES = examples(
    "openelm-mlx tune --data answers.jsonl --validation 0.05 --output my-adapter",
    "openelm-mlx tune -m OpenELM-270M --data ARC-Easy --method dora --rank 16 --gradient-checkpointing -o arc",
    "openelm-mlx tune -m OpenELM-270M --config commonsense --data commonsense_170k.json -o commonsense",
    "openelm-mlx tune -m OpenELM-1_1B --method dpo --data pairs.jsonl --dry-run -o polite",
)


@recipe_options(TuneRecipe)
def tune(
    run: RunToResume = None,
    output: Annotated[
        Path | None,
        Option("--output", "-o", help="Folder for the adapter, its checkpoints and metrics.", metavar="DIR"),
    ] = None,
    config: Annotated[
        str | None,
        Option(help="YAML recipe, or commonsense, instruct-270M, -450M, -1.1B or -3B.", metavar="FILE_OR_NAME"),
    ] = None,
    resume: Resume = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show examples, steps and memory, then exit.")] = False,
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Fine-tune a model: LoRA, DoRA, full fine-tuning, or DPO on preference pairs.

    The result is the adapter with the best validation loss. Options override the --config recipe.
    """
    from ..training.run import TrainingCallback, run_tuning
    from ..training.tune import prepare_tuning

    folder = None if dry_run and not resume else run_folder(run, output, resume)
    recipe = tune_recipe(config, given, folder if resume else None)
    group = join_processes()
    is_first = group.rank() == 0
    if dry_run:
        tuning = prepare_tuning(recipe)
        memory = _show(tuning, group.size(), quiet=as_json or not is_first)
        if as_json and is_first:
            print_json({"recipe": tuning.recipe.to_dict(), "memory": memory.to_dict(), **_counts(tuning)})
        return
    assert folder is not None, "only a dry run has none"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that a shutdown loses nothing
    view = TrainingView() if is_first else TrainingCallback()
    prepared: list[Tuning] = []

    def show(tuning: Tuning) -> None:
        prepared.append(tuning)
        _show(tuning, group.size(), quiet=as_json or not is_first)
        if isinstance(view, TrainingView):
            view.unit = "pairs" if tuning.recipe.objective == "dpo" else "trained tokens"

    with resumable("tune", folder), view:
        result = run_tuning(recipe, folder, resume, group, view, show)
    if is_first and not prepared:
        report_finished("tune", result, as_json)
    elif is_first:
        _report(result, prepared[0], as_json)


def _counts(tuning: Tuning) -> dict[str, Any]:
    return {
        "format": tuning.train.format,
        "examples": len(tuning.train.examples),
        "validation_examples": len(tuning.held_out.examples) if tuning.held_out else 0,
        "cut": tuning.train.num_cut,
        "dropped": tuning.train.num_dropped,
        "broken": tuning.train.num_broken,
        "trained_parameters": tuning.num_parameters,
    }


def _show(tuning: Tuning, num_processes: int, quiet: bool) -> StepMemory:
    """Print what is about to run, with one example as the model will see it, and the memory that it needs."""
    from ..training.memory import tuning_memory

    memory = tuning_memory(tuning, num_processes)
    if not quiet:
        _describe(tuning, num_processes)
        needed, limit = mib(memory.peak_bytes), mib(memory.limit_bytes)
        say(f"memory: about {needed}, plus Python and MLX themselves; this machine has {limit}")
    if not memory.fits:
        say(
            "warning: this exceeds the available memory; try --gradient-checkpointing, or a smaller --batch-size or "
            "--max-length"
        )
    return memory


def _describe(tuning: Tuning, num_processes: int) -> None:
    recipe, counts = tuning.recipe, _counts(tuning)
    held_out = f"{counts['validation_examples']:,} for validation"
    say(f"{_described(tuning.train)}, {held_out}; first example, with the trained tokens marked:")
    for side in tuning.train.examples[0].sequences:
        write_error(_marked(side, tuning.tokenizer))
    total = tuning.model.config.num_parameters
    kind = f"{recipe.method}, rank {recipe.rank}, scale {recipe.adapter.scale:g}" if recipe.adapter else "full"
    of_all = f"of {total:,} parameters" if recipe.method == "full" else f"parameters; the model has {total:,}"
    say(f"trains {tuning.num_parameters:,} {of_all} ({kind}), {recipe.objective}")
    rows = recipe.batch_size * recipe.grad_accumulation_steps
    shared = f" on {num_processes} processes" if num_processes > 1 else ""
    say(f"{recipe.steps:,} steps of {rows:,} examples{shared}; {tuning.rows.steps_per_epoch:,} steps per epoch")


def _described(found: ExampleSet) -> str:
    more = [
        f"{count:,} {what}"
        for count, what in (
            (found.num_cut, "cut"),
            (found.num_dropped, "dropped: too long or no answer left; --max-prompt shortens prompts"),
            (found.num_broken, "broken lines skipped"),
        )
        if count
    ]
    return f"{len(found.examples):,} examples in {found.format} format" + (f" ({', '.join(more)})" if more else "")


def _marked(example: Example, tokenizer: Tokenizer) -> str:
    from ..data.dataset import marked

    if has_styles(sys.stderr):
        styles = {True: ("green", "bold"), False: ("dim",)}
        stretches = [styled(text, *styles[answer], stream=sys.stderr) for text, answer in marked(example, tokenizer)]
    else:
        stretches = [clean(f"[[{text}]]" if answer else text) for text, answer in marked(example, tokenizer)]
    return "".join(stretches)


def _report(result: TrainingResult, tuning: Tuning, as_json: bool) -> None:
    before, loss, output = result.validation_loss_before, result.validation_loss, result.folder
    if as_json:
        print_json(
            {
                "adapter": str(output),
                "step": result.step,
                "validation_loss_before": before,
                "validation_loss": loss,
                "last": result.metrics.to_dict() if result.metrics else None,
                **_counts(tuning),
            }
        )
        return
    if result.stopped_early and result.metrics is not None:
        write(f"stopped after step {result.metrics.step:,}: the validation loss stopped improving")
    if result.metrics is None:
        write(f"{output}: nothing left to train")
    if loss is not None:
        compared = f", {before:.4f} before tuning" if before is not None else ""
        write(f"{output}: adapter from step {result.step:,} with the best validation loss: {loss:.4f}{compared}")
        if before is not None and loss >= before:
            say("warning: the validation loss did not improve; try a lower --learning-rate")
    else:
        write(f"{output}: adapter from step {result.step:,}")
    write(f"try it: openelm-mlx generate -m {tuning.recipe.model} --adapter {output} --prompt ...")
