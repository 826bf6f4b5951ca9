"""`openelm-mlx tune`."""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from ..files.names import resolved
from ..training.tune_recipe import TuneRecipe
from .options import Dtype, Json, Model, TokenizerOption, examples
from .processes import join_processes
from .progress import training_view
from .terminal import INTERRUPTED, fail, mib, print_json, say

if TYPE_CHECKING:
    from ..data.dataset import Example, ExampleSet
    from ..tokenizer.tokenizer import Tokenizer
    from ..training.memory import TuningMemory
    from ..training.tune import Tuning

EXAMPLES = examples(
    "openelm-mlx tune --data answers.jsonl --validation 0.05 --output my-adapter",
    "openelm-mlx tune -m OpenELM-270M --data ARC-Easy --method dora --rank 16 --gradient-checkpointing -o arc",
    "openelm-mlx tune -m OpenELM-270M --config commonsense --data commonsense_170k.json -o commonsense",
    "openelm-mlx tune -m OpenELM-1_1B --method dpo --data pairs.jsonl --dry-run -o polite",
)


def tune(
    context: typer.Context,
    output: Annotated[Path, Option("--output", "-o", help="Folder for the adapter and its run.", metavar="DIR")],
    config: Annotated[
        str | None,
        Option(help="YAML recipe, or commonsense, instruct-270M, -450M, -1.1B or -3B.", metavar="FILE_OR_NAME"),
    ] = None,
    model: Model = TuneRecipe.model,
    data: Annotated[
        str, Option("--data", "-d", help="Data file, or folder with train and valid files.", metavar="FILE_OR_DIR")
    ] = TuneRecipe.data,
    method: Annotated[
        str, Option(help="lora, dora or full; on pairs: dpo (with LoRA), dora+dpo or full+dpo.", metavar="M")
    ] = TuneRecipe.method,
    rank: Annotated[int, Option(help="Rank of the adapter.", metavar="R")] = TuneRecipe.rank,
    alpha: Annotated[
        float, Option(help="LoRA alpha; the adapter is scaled by alpha / rank.", metavar="A")
    ] = TuneRecipe.alpha,
    rank_stabilised: Annotated[bool, Option("--rank-stabilised", help="Scale by alpha / sqrt(rank) instead.")] = False,
    dropout: Annotated[float, Option(help="Dropout on the adapter's inputs.", metavar="P")] = TuneRecipe.dropout,
    targets: Annotated[
        str, Option(help="Matrices that get an adapter; token_embeddings also works.", metavar="NAMES")
    ] = ",".join(TuneRecipe.targets),
    layers: Annotated[int, Option(help="Train only the last N layers; 0: all.", metavar="N")] = TuneRecipe.layers,
    epochs: Annotated[float, Option(help="Passes over the training data.", metavar="E")] = TuneRecipe.epochs,
    steps: Annotated[int, Option(help="Optimizer steps, instead of --epochs.", metavar="N")] = TuneRecipe.steps,
    batch_size: Annotated[
        int, Option("--batch-size", "-b", help="Examples per batch.", metavar="B")
    ] = TuneRecipe.batch_size,
    grad_accumulation_steps: Annotated[
        int, Option(help="Batches per optimizer step.", metavar="K")
    ] = TuneRecipe.grad_accumulation_steps,
    learning_rate: Annotated[float, Option(help="Peak learning rate.", metavar="L")] = TuneRecipe.learning_rate,
    schedule: Annotated[
        str, Option(help="Learning rate after warm-up: cosine, linear or constant.", metavar="S")
    ] = TuneRecipe.schedule,
    warmup_steps: Annotated[
        int, Option(help="Warm-up steps; 0: 3% of all steps.", metavar="N")
    ] = TuneRecipe.warmup_steps,
    weight_decay: Annotated[
        float, Option(help="Weight decay, on matrices only.", metavar="W")
    ] = TuneRecipe.weight_decay,
    max_grad_norm: Annotated[
        float, Option(help="Gradient norm to clip at; 0: no clipping.", metavar="C")
    ] = TuneRecipe.max_grad_norm,
    max_length: Annotated[
        int, Option(help="Maximum tokens per example; 0: the model's context length.", metavar="T")
    ] = TuneRecipe.max_length,
    max_prompt: Annotated[
        int, Option(help="Maximum prompt tokens; longer prompts lose their beginning; 0: no limit.", metavar="T")
    ] = TuneRecipe.max_prompt,
    too_long: Annotated[
        str, Option(help="What to do with longer examples: cut or drop.", metavar="W")
    ] = TuneRecipe.too_long,
    pack: Annotated[
        bool, Option("--pack", help="Pack several examples into a row; they do not attend to one another.")
    ] = False,
    train_on: Annotated[
        str, Option(help="Tokens in the loss: completion or all.", metavar="WHAT")
    ] = TuneRecipe.train_on,
    columns: Annotated[
        str, Option(help="Field names in the data, such as prompt=question,completion=answer.", metavar="NAMES")
    ] = "",
    validation: Annotated[
        str, Option(help="Validation file, or share of the examples to hold out.", metavar="FILE|SHARE")
    ] = TuneRecipe.validation,
    validate_every: Annotated[int, Option(help="Steps between validations.", metavar="N")] = TuneRecipe.validate_every,
    log_every: Annotated[int, Option(help="Steps between logged metrics.", metavar="N")] = TuneRecipe.log_every,
    checkpoint_every: Annotated[
        int, Option(help="Steps between checkpoints.", metavar="N")
    ] = TuneRecipe.checkpoint_every,
    early_stop: Annotated[
        int, Option(help="Stop after N validations without improvement; 0: never.", metavar="N")
    ] = TuneRecipe.early_stop,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Recompute layers in the backward pass: less memory, more time.")
    ] = False,
    beta: Annotated[
        float, Option(help="DPO beta; larger values stay closer to the reference model.", metavar="B")
    ] = TuneRecipe.beta,
    preference_loss: Annotated[
        str, Option(help="DPO loss: sigmoid or hinge.", metavar="L")
    ] = TuneRecipe.preference_loss,
    sample_prompt: Annotated[
        str, Option(help="Text to continue at each validation.", metavar="TEXT")
    ] = TuneRecipe.sample_prompt,
    dtype: Dtype = TuneRecipe.dtype,
    tokenizer: TokenizerOption = None,
    seed: Annotated[
        int, Option(help="Random seed: example order, adapter initialization, dropout.", metavar="N")
    ] = TuneRecipe.seed,
    resume: Annotated[bool, Option("--resume", help="Resume from the last checkpoint.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show examples, steps and memory, then exit.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model: LoRA, DoRA, full fine-tuning, or DPO on pairs of answers.

    The result is the adapter with the best validation loss. Set other recipe fields in a --config file.
    """
    recipe = _recipe(config, _given(context, config), gradient_checkpointing)

    from ..training.checkpoints import run_lock, together
    from ..training.memory import tuning_memory
    from ..training.tune import best_checkpoint, check_output, prepare_tuning
    from ..training.tune import tune as run

    group = join_processes()
    main = group.rank() == 0

    def prepare() -> tuple[Tuning, TuningMemory]:
        tuning = prepare_tuning(recipe)
        memory = tuning_memory(tuning, group.size())
        if main and not as_json:
            _show(tuning, group.size())
            needed, limit = mib(memory.peak_bytes), mib(memory.limit_bytes)
            say(f"memory: about {needed}, plus Python and MLX themselves; this machine has {limit}")
        if main and not memory.fits:
            say("warning: this does not fit; try --gradient-checkpointing, or a smaller --batch-size or --max-length")
        return tuning, memory

    if dry_run:
        tuning, memory = prepare()
        if as_json and main:
            print_json({"recipe": tuning.recipe.to_dict(), "memory": memory.to_dict(), **_counts(tuning)})
        return

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that a shutdown loses nothing
    last = first = None
    try:
        with run_lock(output, group) as locked:
            together(group, lambda: check_output(locked.path, resume))
            tuning, _ = prepare()
            with training_view(tuning.recipe.steps, main, "pairs" if recipe.objective == "dpo" else "tokens") as view:
                on_message = say if main else lambda message: None
                figures = run(tuning, locked, resume=resume, group=group, on_step=view.moved, on_message=on_message)
                with closing(figures):
                    for metrics in figures:
                        view.show(metrics)
                        last = metrics
                        first = metrics.validation_loss if metrics.step == 0 else first
    except KeyboardInterrupt:
        saved = best_checkpoint(resolved(output)) is not None
        fail(
            f"interrupted; use --resume to continue {output}" if saved else "interrupted before the first checkpoint",
            INTERRUPTED,
        )
    if main:
        _report(tuning, output, first, last, as_json)


def _given(context: typer.Context, config: str | None) -> dict[str, Any]:
    """Recipe fields given on the command line; only these override a recipe file."""
    kinds = {"COMMANDLINE"} if config else {"COMMANDLINE", "ENVIRONMENT"}
    known = {entry.name for entry in fields(TuneRecipe)}
    sources = {name: context.get_parameter_source(name) for name in context.params if name in known}
    return {name: context.params[name] for name, source in sources.items() if source and source.name in kinds}


def _recipe(config: str | None, given: dict[str, Any], recompute_layers: bool) -> TuneRecipe:
    """The recipe from a file, with the given fields replaced."""
    if recompute_layers:
        given["recompute_layers"] = True
    if "method" in given:
        kinds = given["method"].split("+")
        given["objective"] = "dpo" if "dpo" in kinds else "likelihood"
        given["method"] = "+".join(kind for kind in kinds if kind != "dpo") or TuneRecipe.method
    if "epochs" in given and "steps" not in given:
        given["steps"] = 0  # else the steps of the file would take precedence
    changes = TuneRecipe.from_dict(given)
    if config is None:
        return changes
    return replace(TuneRecipe.from_file(TuneRecipe.named(config)), **{name: getattr(changes, name) for name in given})


def _counts(tuning: Tuning) -> dict[str, Any]:
    return {
        "kind": tuning.train.kind,
        "examples": len(tuning.train.examples),
        "held_out": len(tuning.held_out.examples) if tuning.held_out else 0,
        "cut": tuning.train.num_cut,
        "dropped": tuning.train.num_dropped,
        "broken": tuning.train.num_broken,
        "trained_parameters": tuning.num_parameters,
    }


def _show(tuning: Tuning, processes: int) -> None:
    """Print what is about to run, with one example as the model will see it."""
    recipe, counts = tuning.recipe, _counts(tuning)
    say(f"{_described(tuning.train)}, {counts['held_out']:,} held out; the first one, with trained tokens marked:")
    for side in tuning.train.examples[0].sides:
        typer.echo(_marked(side, tuning.tokenizer), err=True)
    total = tuning.model.config.num_parameters
    kind = f"{recipe.method}, rank {recipe.rank}, scale {recipe.adapter.scale:g}" if recipe.adapter else "full"
    of_all = f"of {total:,} parameters" if recipe.method == "full" else f"parameters; the model has {total:,}"
    say(f"trains {tuning.num_parameters:,} {of_all} ({kind}), {recipe.objective}")
    rows = recipe.batch_size * recipe.grad_accumulation_steps
    shared = f" on {processes} processes" if processes > 1 else ""
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
    return f"{len(found.examples):,} examples in {found.kind} format" + (f" ({', '.join(more)})" if more else "")


def _marked(example: Example, tokenizer: Tokenizer) -> str:
    from ..data.dataset import marked

    if sys.stderr.isatty():
        styles: dict[bool, dict[str, Any]] = {True: {"fg": "green", "bold": True}, False: {"dim": True}}
        stretches = [typer.style(text, **styles[answer]) for text, answer in marked(example, tokenizer)]
    else:
        stretches = [f"[[{text}]]" if answer else text for text, answer in marked(example, tokenizer)]
    return "".join(stretches)


def _report(tuning: Tuning, output: Path, first: float | None, last: Any, as_json: bool) -> None:
    import json

    from ..training.tune import best_checkpoint

    best = best_checkpoint(resolved(output))
    state = json.loads((best / "state.json").read_text(encoding="utf-8")) if best is not None else {}
    step, kept = state.get("step"), state.get("best_loss")
    if as_json:
        print_json(
            {
                "adapter": str(output),
                "step": step,
                "held_out_loss_before": first,
                "held_out_loss": kept,
                "last": last.to_dict() if last else None,
                **_counts(tuning),
            }
        )
        return
    if last is not None and last.step < tuning.recipe.steps:
        typer.echo(f"stopped after step {last.step:,}: the validation loss stopped improving")
    if last is None:
        typer.echo(f"{output}: nothing left to train")
    if step is not None and kept is not None:
        before = f", {first:.4f} before tuning" if first is not None else ""
        typer.echo(f"{output}: adapter of step {step:,} with the best validation loss: {kept:.4f}{before}")
        if first is not None and kept >= first:
            say("warning: the validation loss did not improve; try a lower --learning-rate")
    elif step is not None:
        typer.echo(f"{output}: adapter of step {step:,}")
    typer.echo(f"try it: openelm-mlx generate -m {tuning.recipe.model} --adapter {output} --prompt ...")
