"""`openelm-mlx completion`: a script that completes commands, options and values on Tab, without starting Python."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .completion_scripts import bash_script, fish_script, zsh_script
from .options import examples
from .terminal import write

EXAMPLES = examples(
    "openelm-mlx completion bash > ~/.local/share/bash-completion/completions/openelm-mlx",
    'openelm-mlx completion zsh > "${fpath[1]}/_openelm-mlx"',
    "openelm-mlx completion fish > ~/.config/fish/completions/openelm-mlx.fish",
)
_SCRIPTS = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}


def completion(
    shell: Annotated[str, typer.Argument(help="Shell to complete in: bash, zsh or fish.", metavar="bash|zsh|fish")],
) -> None:
    """Print a script for Tab completion. Write it where the shell looks for it, then open a new terminal."""
    if shell not in _SCRIPTS:
        raise ConfigError(f"{shell!r} is not a shell that can be completed in; choose bash, zsh or fish")
    write(_SCRIPTS[shell](described_commands()), end="")


@dataclass(frozen=True)
class Value:
    """What an option or argument takes."""

    name: str  # shown while it is completed
    words: tuple[str, ...] = ()
    files: str = ""  # `files`, `folders`, or nothing


@dataclass(frozen=True)
class Completed:
    """An option, with all its spellings."""

    spellings: tuple[str, ...]
    help: str
    value: Value | None  # None: it takes none
    is_repeatable: bool


@dataclass(frozen=True)
class CompletedCommand:
    """A command with its options and the value of its arguments."""

    name: str
    help: str
    options: tuple[Completed, ...]
    argument: Value | None


def described_commands() -> list[CompletedCommand]:
    """All commands, from the program itself."""
    from .app import all_commands
    from .stand_ins import stand_ins

    try:
        words = _words()
    except ImportError:  # the names are known without the packages that compute
        with stand_ins():
            words = _words()
    return [_described(name, command, words) for name, command in all_commands().items()]


def _described(name: str, command: Any, words: dict[str, tuple[str, ...]]) -> CompletedCommand:
    options = [Completed(("--help", "-h"), "Show this message and exit.", None, False)]
    argument = None
    for parameter in command.params:
        value = _value(name, parameter, words)
        if parameter.param_type_name == "argument":
            argument = argument or value
        else:
            spellings = (*parameter.opts, *parameter.secondary_opts)
            taken = None if parameter.is_flag else value
            options.append(Completed(spellings, parameter.help or "", taken, parameter.multiple))
    return CompletedCommand(name, re.split(r"(?<=\.) |\n", command.help)[0], tuple(options), argument)


def _value(command: str, parameter: Any, words: dict[str, tuple[str, ...]]) -> Value:
    metavar = (parameter.metavar or parameter.name).upper()
    keys = [f"{command} {parameter.name}", *([parameter.name] if parameter.param_type_name == "option" else [])]
    known = next((_FILES[key] for key in keys if key in _FILES), None)
    guessed = "folders" if "DIR" in metavar else "files" if "FILE" in metavar else ""
    listed = next((words[key] for key in keys if key in words), ())
    return Value(metavar.strip("."), listed, guessed if known is None else known)


_FILES = {  # what takes paths though its metavar does not say so; arguments with their command
    **dict.fromkeys(
        ("model", "draft_model", "evaluate_data", "info model", "plot run", "average sources", "models names"),
        "folders",
    ),
    **dict.fromkeys(
        ("adapter", "data", "validation", "tokenizer", "chat_template", "save", "convert sources"), "files"
    ),
}


def _words() -> dict[str, tuple[str, ...]]:
    """Words for options, by the name of their parameter, with the command where they belong to it alone."""
    from dataclasses import fields

    from ..config import PRESETS
    from ..conversion.adapters.forms import FORMS
    from ..conversion.local_models import built_in_models
    from ..quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, MODES
    from ..training.pretrain import PretrainRecipe
    from ..training.setting import setting_of
    from ..training.tune_recipe import TuneRecipe

    recipes: dict[str, type[PretrainRecipe] | type[TuneRecipe]] = {"pretrain": PretrainRecipe, "tune": TuneRecipe}
    choices = {
        f"{command} {entry.name}": setting_of(entry).choices
        for command, recipe in recipes.items()
        for entry in fields(recipe)
    }
    named = {
        f"{command} config": tuple(sorted(path.stem for path in recipe.folder.glob("*.yaml")))
        for command, recipe in recipes.items()
    }
    numbers = {"quantize": AFFINE_BITS, "group_size": AFFINE_GROUP_SIZES, "kv_bits": (4, 8)}
    return {
        **{name: found for name, found in choices.items() if found},
        **{name: tuple(map(str, values)) for name, values in numbers.items()},
        **dict.fromkeys(("model", "draft_model", "info model"), tuple(path.name for path in built_in_models())),
        **named,
        "pretrain model": tuple(PRESETS),
        "tune method": ("lora", "dora", "full", "dpo", "dora+dpo", "full+dpo"),
        "config": tuple(PRESETS),
        "preset": tuple(PRESETS),
        "dtype": ("auto", "float16", "bfloat16", "float32"),
        "mode": MODES,
        "to": FORMS,
        "tokenizer": ("none",),
        "chat_template": ("openelm",),
        "kv": ("full", "8", "4"),
        "against": ("mlx-lm",),
        "models action": ("list", "remove"),
        "completion shell": tuple(_SCRIPTS),
    }
