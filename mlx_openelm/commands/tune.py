"""`openelm-mlx tune`."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..errors import ConfigError
from ..training.tune_recipe import TuneRecipe
from .options import Json, examples
from .processes import join_processes
from .progress import TrainingView, judge, report_finished, resumable
from .recipe_options import Resume, RunToResume, describe_metric, recipe_options, run_folder, task_metric, tune_recipe
from .streams import clean, has_styles, styled
from .terminal import mib, print_json, say, step_bar, write, write_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..data.dataset import Example, ExampleSet
    from ..evaluation.task_metric import TaskMetric
    from ..tokenizer.tokenizer import Tokenizer
    from ..training.held_out import HeldOutLoss
    from ..training.memory import StepMemory
    from ..training.run import TrainingResult
    from ..training.tune import Tuning

EXAMPLES = examples(
    "openelm-mlx tune --data answers.jsonl --validation 0.05 --output my-adapter",
    "openelm-mlx tune -m OpenELM-270M --data ARC-Easy --method dora --rank 16 --gradient-checkpointing -o arc",
    "openelm-mlx tune -m OpenELM-270M --config commonsense --data commonsense_170k.json -o commonsense",
    "openelm-mlx tune -m OpenELM-270M --data ARC-Easy --evaluate arc_easy,arc_challenge --evaluate-limit 500 -o arc",
    "openelm-mlx tune -m OpenELM-1_1B --data chat.jsonl --chat-template openelm -o chat-adapter",
    "openelm-mlx tune -m OpenELM-1_1B --adapter chat-adapter --method dpo --data pairs.jsonl -o polite",
    "openelm-mlx tune -m OpenELM-1_1B --adapter polite --test test.jsonl",
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

    The result is the adapter with the best validation loss, or with --evaluate, the most accurate one on these tasks.
    Options override the --config recipe. With --test and without --data, nothing is trained: the model is measured on
    the test file, with its --adapter.
    """
    from ..training.run import TrainingCallback, run_tuning
    from ..training.tune import prepare_tuning

    recipe = tune_recipe(config, given) if not resume else None
    if recipe is not None and recipe.test and not recipe.data:
        if recipe.evaluate:
            raise ConfigError(
                "tasks are evaluated during training, which needs `data`; `openelm-mlx evaluate` measures a model"
            )
        _measure(recipe, as_json)
        return
    folder = None if dry_run and not resume else run_folder(run, output, resume)
    recipe = recipe or tune_recipe(config, given, folder)
    group = join_processes()
    is_first = group.rank() == 0
    metric = task_metric(recipe, group)
    if dry_run:
        tuning = prepare_tuning(recipe, has_metric=metric is not None)
        memory = _show(tuning, group.size(), metric, quiet=as_json or not is_first)
        if as_json and is_first:
            print_json({"recipe": tuning.recipe.to_dict(), "memory": memory.to_dict(), **_counts(tuning)})
        return
    assert folder is not None, "only a dry run has none"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that a shutdown loses nothing
    view = TrainingView() if is_first else TrainingCallback()
    prepared: list[Tuning] = []

    def show(tuning: Tuning) -> None:
        prepared.append(tuning)
        _show(tuning, group.size(), metric, quiet=as_json or not is_first)
        if isinstance(view, TrainingView):
            view.unit = "pairs" if tuning.recipe.objective == "dpo" else "trained tokens"

    with resumable("tune", folder), view:
        result = run_tuning(recipe, folder, resume, group, view, show, metric)
    if is_first and not prepared:
        report_finished("tune", result, as_json)
    elif is_first:
        _report(result, prepared[0], as_json)


def _counts(tuning: Tuning) -> dict[str, Any]:
    return {
        "format": tuning.train.format,
        "examples": len(tuning.train.examples),
        "validation_examples": len(tuning.held_out.examples) if tuning.held_out else 0,
        "test_examples": len(tuning.test.examples) if tuning.test else 0,
        "prompt_style": tuning.train.example_format.style,
        "cut": tuning.train.num_cut,
        "dropped": tuning.train.num_dropped,
        "left_out": dict(tuning.train.left_out),
        "longest": tuning.train.longest,
        "broken": tuning.train.num_broken,
        "trained_parameters": tuning.num_parameters,
    }


def _show(tuning: Tuning, num_processes: int, metric: TaskMetric | None, quiet: bool) -> StepMemory:
    """Print what is about to run, with one example as the model will see it, and the memory that it needs."""
    from ..training.memory import tuning_memory

    memory = tuning_memory(tuning, num_processes)
    if not quiet:
        _describe(tuning, num_processes)
        describe_metric(metric, tuning.recipe)
        parts = [("model", memory.weights_bytes), ("gradients and optimizer", memory.state_bytes)]
        parts += [("activations", memory.activation_bytes), ("Python and data", memory.process_bytes)]
        say(f"memory: about {mib(memory.total_bytes)} of {mib(memory.limit_bytes)}")
        say("; ".join(f"{what} {mib(nbytes)}" for what, nbytes in parts if nbytes))
    if not memory.fits:
        say(
            "warning: this exceeds the available memory; try --gradient-checkpointing, or a smaller --batch-size or "
            "--max-length"
        )
    return memory


def _describe(tuning: Tuning, num_processes: int) -> None:
    recipe, counts = tuning.recipe, _counts(tuning)
    parts = [f"{len(tuning.train.examples):,} examples in {_in_format(tuning.train)}"]
    parts += [f"{counts['validation_examples']:,} for validation"]
    parts += [f"{counts['test_examples']:,} to test"] if tuning.test else []
    for found in filter(None, (tuning.train, tuning.held_out, tuning.test)):
        for line in _left_out(found, recipe.max_length):
            say(line)
    say(f"{', '.join(parts)}; the first example, with the trained tokens marked:")
    for side in tuning.train.examples[0].sequences:
        write_error(_marked(side, tuning.tokenizer))
    if tuning.train.num_meeting * 2 > len(tuning.train.examples):
        say("warning: prompts and answers meet without a space; --separator puts text between them, such as '\\n'")
    total = tuning.model.config.num_parameters
    kind = (
        f"{recipe.method}, rank {recipe.rank}, scale {recipe.adapter_config.scale:g}"
        if recipe.adapter_config
        else "full"
    )
    of_all = f"of {total:,} parameters" if recipe.method == "full" else f"parameters; the model has {total:,}"
    say(f"trains {tuning.num_parameters:,} {of_all} ({kind}), {recipe.objective}")
    rows = recipe.batch_size * recipe.grad_accumulation_steps
    shared = f" on {num_processes} processes" if num_processes > 1 else ""
    say(f"{recipe.steps:,} steps of {rows:,} examples{shared}; {tuning.rows.steps_per_epoch:,} steps per epoch")


def _in_format(found: ExampleSet) -> str:
    style = found.example_format.style
    usual = replace(found.example_format, prompt_style="").style
    return f"{found.format} format" + (f", presented in {style} style" if style != usual else "")


def _left_out(found: ExampleSet, max_length: int) -> list[str]:
    """Lines about the records of a file that are not used as they are, each cause with its number."""
    lines = []
    total = len(found.examples) + found.num_dropped
    if found.left_out:
        causes = "; ".join(f"{count:,} {cause}" for cause, count in found.left_out.items())
        lines.append(f"{found.path.name}: left out {found.num_dropped:,} of {total:,} examples: {causes}")
    if found.num_cut:
        lines.append(f"{found.path.name}: {found.num_cut:,} examples were cut to {max_length:,} tokens")
    if lines and found.longest > max_length:
        lines[-1] += f"; the longest has {found.longest:,} tokens (--max-length, --max-prompt)"
    if found.num_broken:
        lines.append(f"{found.path.name}: {found.num_broken:,} broken lines were skipped")
    return lines


def _measure(recipe: TuneRecipe, as_json: bool) -> None:
    """Measure a model on a test file, without training."""
    from ..training.held_out import held_out_loss

    with step_bar("testing") as update:
        found = held_out_loss(recipe, update)
    if as_json:
        print_json(found.to_dict())
    else:
        _print_loss(found)


def _print_loss(found: HeldOutLoss) -> None:
    more = [f"perplexity {found.perplexity:,.2f}"] if found.perplexity is not None else []
    more += [f"{name} {value:.4f}" for name, value in found.more.items()]
    what = "examples" if found.perplexity is not None else "pairs"
    counted = f"{found.num_tokens:,} tokens of {found.num_examples:,} {what}"
    write(f"{found.path}: loss {found.loss:.4f}, {', '.join(more)} ({counted})")


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
                "evaluation_before": result.evaluation_before,
                "evaluation": result.evaluation,
                "last": result.metrics.to_dict() if result.metrics else None,
                "test": result.test.to_dict() if result.test else None,
                **_counts(tuning),
            }
        )
        return
    if result.stopped_early and result.metrics is not None:
        write(f"stopped after step {result.metrics.step:,}: {judge(result)} stopped improving")
    if result.metrics is None:
        write(f"{output}: nothing left to train")
    if result.evaluation is not None:
        _report_evaluation(result, result.evaluation)
    elif loss is not None:
        compared = f", {before:.4f} before tuning" if before is not None else ""
        write(f"{output}: adapter from step {result.step:,} with the best validation loss: {loss:.4f}{compared}")
        if before is not None and loss >= before:
            say("warning: the validation loss did not improve; try a lower --learning-rate")
    else:
        write(f"{output}: adapter from step {result.step:,}")
    if result.test is not None:
        _print_loss(result.test)
    asking = "chat" if tuning.train.example_format.style == "chat" else "generate"
    prompt = "" if asking == "chat" else ' --prompt "..."'
    write(f"try it: openelm-mlx {asking} --model {tuning.recipe.model} --adapter {output}{prompt}")


def _report_evaluation(result: TrainingResult, evaluation: Mapping[str, float]) -> None:
    name, value = next(iter(evaluation.items()))
    before = (result.evaluation_before or {}).get(name)
    compared = f", {before:.4f} before tuning" if before is not None else ""
    write(f"{result.folder}: adapter from step {result.step:,} with the best {name}: {value:.4f}{compared}")
    if before is not None and value <= before:
        say(f"warning: {name} did not improve; try another --learning-rate or more --steps")
