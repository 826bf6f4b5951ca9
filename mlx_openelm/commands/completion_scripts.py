"""Completion scripts for bash, zsh and fish: commands, options and values are written into them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .completion import Completed, CompletedCommand, Value

_GLOBAL = {  # options before a command, which take no values
    "--help": "Show this message and exit.",
    "-h": "Show this message and exit.",
    "--version": "Show the version and exit.",
    "-V": "Show the version and exit.",
    "--verbose": "Also show versions, device, files and times.",
    "-v": "Also show versions, device, files and times.",
    "--quiet": "Show only results, warnings and errors.",
}

_BASH = """\
# Completion of openelm-mlx in bash, also in version 3.2 of macOS, without starting Python.
_openelm_mlx_words() { COMPREPLY+=($(compgen -W "$1" -- "$cur")); }

_openelm_mlx_paths() { # -f: files, -d: folders
    local path
    compopt -o filenames 2>/dev/null
    while IFS= read -r path; do COMPREPLY+=("$path"); done < <(compgen "$1" -- "$cur")
}

_openelm_mlx() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command="" index
    COMPREPLY=()
    if [[ $cur == "=" ]]; then # --option=value comes as three words
        cur=""
    elif [[ $prev == "=" ]]; then
        prev=${COMP_WORDS[COMP_CWORD-2]}
    fi
    for ((index = 1; index < COMP_CWORD; index++)); do
        if [[ ${COMP_WORDS[index]} != -* ]]; then command=${COMP_WORDS[index]}; break; fi
    done
    case $command in
    "")
        if [[ $cur == -* ]]; then _openelm_mlx_words "@options@"; else _openelm_mlx_words "@commands@"; fi
        ;;
@cases@
    esac
}

complete -F _openelm_mlx openelm-mlx
"""


def bash_script(commands: Sequence[CompletedCommand]) -> str:
    """The script for bash."""
    cases = "\n".join(line for command in commands for line in _bash_command(command))
    names = " ".join(command.name for command in commands)
    return _BASH.replace("@options@", " ".join(_GLOBAL)).replace("@commands@", names).replace("@cases@", cases)


def _bash_command(command: CompletedCommand) -> Iterable[str]:
    yield f"    {command.name})"
    yield "        case $prev in"
    for option in command.options:
        if option.value is not None:
            yield f"        {' | '.join(option.spellings)}) {_bash_value(option.value)} return ;;"
    yield "        esac"
    words = " ".join(spelling for option in command.options for spelling in option.spellings)
    yield "        if [[ $cur == -* ]]; then"
    yield f'            _openelm_mlx_words "{words}"'
    if command.argument is not None:
        yield "        else"
        yield f"            {_bash_value(command.argument)}"
    yield "        fi"
    yield "        ;;"


def _bash_value(value: Value) -> str:
    parts = [f'_openelm_mlx_words "{" ".join(value.words)}";'] if value.words else []
    parts += [f"_openelm_mlx_paths {'-d' if value.files == 'folders' else '-f'};"] if value.files else []
    return " ".join(parts) or ":;"


_ZSH = """\
#compdef openelm-mlx
# Completion of openelm-mlx in zsh, without starting Python.
_openelm-mlx() {
  local curcontext=$curcontext state line
  local -a commands
  typeset -A opt_args
  _arguments -C @options@ '1:command:->command' '*::argument:->arguments'
  case $state in
  command)
    commands=(
@commands@
    )
    _describe command commands
    ;;
  arguments)
    case $line[1] in
@cases@
    esac
    ;;
  esac
}

if [[ ${funcstack[1]} == _openelm-mlx ]]; then
  _openelm-mlx "$@"
else
  compdef _openelm-mlx openelm-mlx
fi
"""


def zsh_script(commands: Sequence[CompletedCommand]) -> str:
    """The script for zsh: for a folder of `fpath`, or to source after `compinit`."""
    options = " ".join(_quoted(f"{name}[{_zsh_text(help)}]") for name, help in _GLOBAL.items())
    names = "\n".join(f"      {_quoted(f'{command.name}:{_zsh_text(command.help)}')}" for command in commands)
    cases = "\n".join(line for command in commands for line in _zsh_command(command))
    return _ZSH.replace("@options@", options).replace("@commands@", names).replace("@cases@", cases)


def _zsh_command(command: CompletedCommand) -> Iterable[str]:
    yield f"    {command.name})"
    specs = [spec for option in command.options for spec in _zsh_option(option)]
    if command.argument is not None:
        specs.append(f"*:{_zsh_text(command.argument.name)}:{_zsh_action(command.argument)}")
    lines = "".join(f" \\\n        {_quoted(spec)}" for spec in specs)
    yield f"      _arguments -s -S{lines}"
    yield "      ;;"


def _zsh_option(option: Completed) -> Iterable[str]:
    for spelling in option.spellings:
        before = "*" if option.is_repeatable else f"({' '.join(option.spellings)})"
        help = f"[{_zsh_text(option.help)}]"
        if option.value is None:
            yield f"{before}{spelling}{help}"
        else:
            ending = "=" if spelling.startswith("--") else "+"
            yield f"{before}{spelling}{ending}{help}:{_zsh_text(option.value.name)}:{_zsh_action(option.value)}"


def _zsh_action(value: Value) -> str:
    paths = {"": "", "files": "_files", "folders": "_files -/"}[value.files]
    if not value.words:
        return paths or " "
    words = " ".join(value.words)
    return f"{{compadd -- {words}; {paths}}}" if paths else f"({words})"


def _zsh_text(text: str) -> str:
    """Text without what ends a description in a specification of `_arguments`."""
    return "".join(f"\\{character}" if character in "\\[]:" else character for character in " ".join(text.split()))


_FISH = """\
# Completion of openelm-mlx in fish, without starting Python.
function __openelm_mlx_command --description 'Whether this is the command; without a name, whether there is none yet'
    set -l words (commandline --cut-at-cursor --tokenize --current-process)
    for word in $words[2..-1]
        if not string match --quiet -- '-*' $word
            test "$word" = "$argv[1]"
            return
        end
    end
    test -z "$argv[1]"
end

complete --command openelm-mlx --no-files
"""


def fish_script(commands: Sequence[CompletedCommand]) -> str:
    """The script for fish."""
    lines = []
    for name, help in _GLOBAL.items():
        kind = "--long-option" if name.startswith("--") else "--short-option"
        lines.append(_fish_line("", f"{kind} {name.lstrip('-')}", help))
    for command in commands:
        lines.append(_fish_line("", f"--arguments {command.name}", command.help))
    for command in commands:
        if command.argument is not None:
            lines.append(_fish_line(command.name, _fish_value(command.argument), ""))
        for option in command.options:
            names = [
                f"{'--long-option' if name.startswith('--') else '--short-option'} {name.lstrip('-')}"
                for name in option.spellings
            ]
            taken = [] if option.value is None else [_fish_value(option.value)]
            if option.value is not None:
                taken.append("--require-parameter" if option.value.files == "files" else "--exclusive")
            lines.append(_fish_line(command.name, " ".join(filter(None, names + taken)), option.help))
    return _FISH + "".join(f"{line}\n" for line in lines)


def _fish_line(command: str, what: str, help: str) -> str:
    about = f" --description {_fish_text(help)}" if help else ""
    condition = f"__openelm_mlx_command {command}".rstrip()
    return f"complete --command openelm-mlx --condition '{condition}' {what}{about}"


def _fish_value(value: Value) -> str:
    parts = list(value.words)
    parts += ["(__fish_complete_directories)"] if value.files == "folders" else []
    words = f"--arguments {_fish_text(' '.join(parts))}" if parts else ""
    return " ".join(filter(None, (words, "--force-files" if value.files == "files" else "")))


def _fish_text(text: str) -> str:
    return "'" + " ".join(text.split()).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _quoted(text: str) -> str:
    """A word in single quotes, as POSIX shells read it."""
    return "'" + text.replace("'", "'\\''") + "'"
