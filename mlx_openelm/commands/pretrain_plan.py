"""What `pretrain` says before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .terminal import mib, say, write_error

if TYPE_CHECKING:
    from ..training.plan import Plan

_LITTLE = 2  # tokens per parameter below which a model learns little more than words


def describe(plan: Plan) -> None:
    """Print the model, the data, the steps, and about how much memory and time they take, with warnings."""
    recipe, model, memory = plan.recipe, plan.recipe.model, plan.memory
    about = "" if plan.is_exact else "about "
    shape = f"{recipe.steps:,} of {_count(recipe.batch_size, 'row')} of {recipe.sequence_length:,} tokens"
    left = f" for the {recipe.steps - plan.steps_taken:,} steps left" if plan.steps_taken else ""
    lines = {
        "model": f"{model.num_parameters:,} parameters, {model.num_transformer_layers} layers, "
        f"vocabulary {model.vocab_size:,}",
        "data": f"{about}{plan.num_tokens:,} tokens, {_count(plan.num_documents, 'document')}, "
        f"{_count(plan.num_files, 'file')}",
        "held out": f"{about}{plan.held_out_tokens:,} tokens, {_count(plan.held_out_documents, 'document')}",
        "steps": f"{shape}: {plan.tokens_of_run:,} tokens, {_rounded(plan.epochs)} epochs",
        "rate": f"{recipe.learning_rate:g} after {_count(recipe.warmup_steps, 'warm-up step')}, {recipe.schedule}, "
        f"{recipe.dtype}",
        "memory": f"about {mib(memory.peak_bytes)} beside Python and MLX; this machine has {mib(memory.limit_bytes)}",
        "time": f"about {duration(plan.seconds)}{left}; a trial made "
        f"{plan.tokens_per_second * plan.num_processes:,.0f} tokens/s",
    }
    for name, text in lines.items():
        write_error(f"{name:<9} {text}")
    _warn(plan)


def _warn(plan: Plan) -> None:
    if not plan.memory.fits:
        say("warning: not enough memory; try a smaller --micro-batch-size, or --gradient-checkpointing")
    if plan.is_exact and not plan.held_out_documents:
        say(
            "warning: no document is held out for validation; separate documents by lines of <|endoftext|>, or raise "
            "--validation-share"
        )
    per_parameter = plan.tokens_of_run / plan.recipe.model.num_parameters
    if per_parameter < _LITTLE:
        say(
            f"warning: {_rounded(per_parameter)} tokens per parameter are few, 20 are usual; use more text, more steps "
            "or a smaller model"
        )


def duration(seconds: float) -> str:
    """A time that is roughly known, in a unit that suits it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    if seconds < 48 * 3600:
        return f"{_rounded(seconds / 3600)} hours"
    return f"{round(seconds / 86400):,} days"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
