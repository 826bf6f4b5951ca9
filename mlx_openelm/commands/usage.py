"""What the command line says about words it does not know: what was typed, and what that is called here."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

# Commands of other programs: what to use here instead.
_COMMANDS_ELSEWHERE = {
    **dict.fromkeys(("lora", "dora", "finetune", "fine-tune", "sft"), "`openelm-mlx tune`"),
    "train": "`openelm-mlx pretrain` to train from scratch, or `openelm-mlx tune` to fine-tune",
    "dpo": "`openelm-mlx tune --method dpo`",
    **dict.fromkeys(("fuse", "merge-adapter"), "`openelm-mlx merge`"),
    **dict.fromkeys(
        ("serve", "server"), "`mlx_lm.server --model FOLDER` of mlx-lm: it reads the folders that `convert` writes"
    ),
    **dict.fromkeys(("quantize", "quant"), "`openelm-mlx convert MODEL --quantize 4`"),
    **dict.fromkeys(("download", "pull", "get", "fetch"), "`openelm-mlx convert apple/OpenELM-270M`"),
    **dict.fromkeys(("complete", "gen", "prompt"), "`openelm-mlx generate`"),
    "run": "`openelm-mlx generate`, or `openelm-mlx chat`",
    **dict.fromkeys(("benchmark", "perf", "speed"), "`openelm-mlx bench`"),
    **dict.fromkeys(("eval", "evaluation", "lm-eval", "lm_eval", "perplexity", "ppl"), "`openelm-mlx evaluate`"),
    **dict.fromkeys(("list", "ls", "cache"), "`openelm-mlx models`"),
    **dict.fromkeys(("remove", "rm", "delete"), "`openelm-mlx models remove`"),
    **dict.fromkeys(("show", "inspect", "describe"), "`openelm-mlx info`"),
    **dict.fromkeys(("check", "test", "self-test", "env"), "`openelm-mlx doctor`"),
    "version": "`openelm-mlx --version`",
}
# Options of other programs. One of these counts only for a command that has the option it leads to.
_OPTIONS_ELSEWHERE = {
    **dict.fromkeys(("--model-path", "--model-name", "--base-model", "--checkpoint", "--hf-path"), "--model"),
    **dict.fromkeys(
        ("--output-dir", "--output-path", "--out", "--mlx-path", "--save-path", "--save", "--dest"), "--output"
    ),
    **dict.fromkeys(("--max-new-tokens", "--num-tokens", "--n-predict", "--n", "--length"), "--max-tokens"),
    **dict.fromkeys(("--system-prompt", "--system-message"), "--system"),
    **dict.fromkeys(("--adapter-path", "--adapter-file", "--lora", "--adapters"), "--adapter"),
    "--prompt-cache-file": "--prompt-cache",
    **dict.fromkeys(("--ignore-chat-template", "--no-chat-template", "--no-chat"), "--raw"),
    "--use-default-chat-template": "--chat",
    "--repeat-penalty": "--repetition-penalty",
    "--repetition-context-size": "--repetition-context",
    **dict.fromkeys(("--extra-eos-token", "--stop-sequence", "--stop-words"), "--stop"),
    **dict.fromkeys(("--num-draft", "--draft-tokens", "--draft-max"), "--num-draft-tokens"),
    **dict.fromkeys(("--q-bits", "--bits", "--nbits", "--quant", "--4bit"), "--quantize"),
    "--q-group-size": "--group-size",
    "--q-mode": "--mode",
    **dict.fromkeys(("--iters", "--num-steps", "--max-steps", "--iterations"), "--steps"),
    **dict.fromkeys(("--fine-tune-type", "--train-type", "--train-mode", "--type"), "--method"),
    **dict.fromkeys(("--num-layers", "--lora-layers"), "--layers"),
    **dict.fromkeys(("--grad-checkpoint", "--grad-checkpointing"), "--gradient-checkpointing"),
    **dict.fromkeys(("--max-seq-length", "--max-seq-len", "--cutoff-len", "--block-size"), "--max-length"),
    **dict.fromkeys(("--seq-length", "--seq-len"), "--sequence-length"),
    **dict.fromkeys(("--steps-per-report", "--logging-steps", "--report-every"), "--log-every"),
    **dict.fromkeys(("--steps-per-eval", "--eval-steps", "--eval-every", "--eval-interval"), "--validate-every"),
    **dict.fromkeys(("--save-every", "--save-steps", "--save-interval"), "--checkpoint-every"),
    "--val-batches": "--validation-rows",
    **dict.fromkeys(("--valid", "--val", "--eval-data", "--validation-data"), "--validation"),
    "--resume-adapter-file": "--adapter",
    "--mask-prompt": "--train-on",
    "--lr": "--learning-rate",
    **dict.fromkeys(("--num-epochs", "--num-train-epochs", "--epoch"), "--epochs"),
    **dict.fromkeys(("--lora-rank", "--lora-r"), "--rank"),
    "--lora-alpha": "--alpha",
    "--lora-dropout": "--dropout",
    **dict.fromkeys(("--dataset", "--train-data", "--train-file"), "--data"),
    **dict.fromkeys(
        ("--gradient-accumulation-steps", "--grad-accum", "--grad-accum-steps"), "--grad-accumulation-steps"
    ),
    **dict.fromkeys(("--file", "--input-file", "--prompts"), "--input"),
    **dict.fromkeys(("--overwrite", "--clobber"), "--force"),
    **dict.fromkeys(("--debug", "--trace"), "--verbose"),
    "--silent": "--quiet",
    "--output": "--save",
    **dict.fromkeys(("--run", "--resume-from", "--resume-from-checkpoint"), "--resume"),
    "--precision": "--dtype",
}
# What the first argument of a command is called, by its parameter, and the options that someone may try instead.
_ARGUMENTS = {
    "model": ("model", ("--model", "-m", "--run")),
    "sources": ("source", ("--model", "-m", "--source", "--run", "--hf-path")),
    "run": ("run", ("--run", "--model", "-m", "--input")),
}
_NUMBERS = {"int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number"}


def unknown_command(name: str, names: Iterable[str]) -> str:
    """The message about a command that does not exist."""
    if name.lower() in _COMMANDS_ELSEWHERE:
        return f"No such command {name!r}; use {_COMMANDS_ELSEWHERE[name.lower()]}"
    similar = _similar(name.lower(), names, 1, 0.6)
    return f"No such command {name!r}" + (f"; did you mean {similar[0]!r}?" if similar else "")


def usage_message(error: Any, arguments: Sequence[str], all_commands: Callable[[], Mapping[str, Any]]) -> str:
    """The message of a usage error of Typer's, which quotes what was typed and says what may have been meant.

    Args:
        all_commands: gives the commands by name; they are loaded only for an option before the name of a command.
    """
    option, context = str(getattr(error, "option_name", None) or ""), error.ctx
    command = context.info_name if context is not None and context.parent is not None else None
    if type(error).__name__ == "NoSuchOption":
        hint = _instead(option, context.command, arguments) if command is not None else _after(option, all_commands())
        return f"No such option: {option}{hint}"
    if extra := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)\.?", error.format_message()):
        hint = "; give a text with --prompt" if command == "generate" else ""
        return f"unexpected argument {extra[1]!r}{hint}"
    typed = _typed(error)
    if typed is not None and (parameter := getattr(error, "param", None)) is not None:
        spellings = [spelling for spelling in parameter.opts if spelling.startswith("--")] or parameter.opts
        kind = error.__cause__.errors()[0]["type"]
        if kind in _NUMBERS:
            return f"{spellings[0]} must be {_NUMBERS[kind]}; got {typed!r}"
        return f"{error.format_message()}; got {typed!r}"
    message = error.format_message().rstrip(".")
    given = next((argument for argument in arguments if option and argument.startswith(f"{option}=")), None)
    return f"{message}; got {given!r}" if given is not None else message


def spellings(command: Any) -> list[str]:
    """Spellings of all options of a command."""
    return [spelling for parameter in command.params for spelling in (*parameter.opts, *parameter.secondary_opts)]


def _after(option: str, commands: Mapping[str, Any]) -> str:
    """A hint about an option before the name of a command."""
    holder = next((name for name, command in commands.items() if option in spellings(command)), None)
    return f"; an option follows its command, as in `openelm-mlx {holder} {option}`" if holder else ""


def _instead(option: str, command: Any, typed: Sequence[str]) -> str:
    """A hint about an option that a command does not have, from all that was typed."""
    known = spellings(command)
    plain = option.lower().replace("_", "-")
    meant = list(_called_here(plain))
    for candidate in meant:
        if candidate in known:
            return f"; use {candidate}"
    if (what := _without_option(meant, command)) is not None:
        return f"; give the {what} without an option, as in `openelm-mlx {command.name} {_after_option(option, typed)}`"
    similar = _similar(option, [name for name in known if name.startswith("--")], 3, 0.7)
    if not similar:
        similar = sorted(name for name in known if len(option) > 3 and name.startswith(option))[:3]
    return f"; did you mean {' or '.join(similar)}?" if similar else ""


def _called_here(option: str) -> Iterator[str]:
    """Spellings that this package may have for an option of another program, and the option itself."""
    seen = [option]
    while (known := _OPTIONS_ELSEWHERE.get(seen[-1])) is not None and known not in seen:
        seen.append(known)
        yield known
    yield option


def _without_option(meant: Sequence[str], command: Any) -> str | None:
    """What a command takes as its first argument, if one of these options means that; else `None`."""
    first = next((parameter.name for parameter in command.params if parameter.param_type_name == "argument"), None)
    return _ARGUMENTS[first][0] if first in _ARGUMENTS and set(_ARGUMENTS[first][1]) & set(meant) else None


def _after_option(option: str, typed: Sequence[str]) -> str:
    """The value that was typed after an option, for a shell; a name in capitals if there is none."""
    words = [
        part
        for word in typed
        for part in ((option, word[len(option) + 1 :]) if word.startswith(f"{option}=") else (word,))
    ]
    value = next((after for before, after in pairwise(words) if before == option), "-")
    return shlex.quote(value) if not value.startswith("-") else option.lstrip("-").upper()


def _similar(word: str, words: Iterable[str], count: int, cutoff: float) -> list[str]:
    import difflib

    return difflib.get_close_matches(word, list(words), count, cutoff)


def _typed(error: Any) -> str | None:
    """What was typed for a value that Typer's validation refused; `None` where the message quotes it already."""
    found = getattr(error.__cause__, "errors", None)
    entries = found() if callable(found) else []
    typed = entries[0].get("input") if entries else None
    if typed is None or re.search(re.escape(repr(typed)), error.format_message()):
        return None
    return str(typed)
