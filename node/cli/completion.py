"""Shell completion for bash, zsh and fish, written from the classes of the commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import tyro

from ..run_files.docstrings import meanings

MAX_MEANING: Final = 70
"""Characters."""

Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True, slots=True)
class Option:
    """Of a command. `names`: as written on the command line, none for what stands there without a name;
    `choices`: words that may follow; `is_file`: a path may; neither, nor a flag: anything. `is_repeated`: of
    those without a name, there may be many."""

    names: tuple[str, ...]
    choices: tuple[str, ...]
    is_file: bool
    is_flag: bool
    meaning: str
    is_repeated: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """`options` with and without names, in the order in which they were declared."""

    name: str
    meaning: str
    options: tuple[Option, ...]

    def named(self) -> list[Option]:
        return [option for option in self.options if option.names]

    def unnamed(self) -> list[Option]:
        return [option for option in self.options if not option.names]


def commands_of(union: Any) -> list[Command]:
    """What `tyro.cli` makes of the same union of annotated classes."""
    return sorted((_command(kind) for kind in _classes(union)), key=lambda command: command.name)


def completion(shell: Shell, commands: Sequence[Command]) -> str:
    """The script that makes this shell complete `thinwire`."""
    write: Mapping[Shell, Callable[[Sequence[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return write[shell](commands)


# ------------------------------------------------------------------------------------ what is there


def _classes(union: Any) -> list[tuple[str, type]]:
    """Names and classes of the commands."""
    if get_origin(union) is Annotated:
        kind, *marks = get_args(union)
        names = [mark.name for mark in marks if hasattr(mark, "name")]
        is_command = isinstance(kind, type) and is_dataclass(kind)
        return [(str(names[0]), kind)] if is_command else _classes(kind)
    return [found for inner in get_args(union) for found in _classes(inner)]


def _command(named: tuple[str, type]) -> Command:
    name, kind = named
    hints = get_type_hints(kind, include_extras=True)
    texts = meanings(kind)
    options = [option for f in fields(kind) for option in _options(f.name, hints[f.name], f.default, texts)]
    return Command(name, _first_sentence(kind.__doc__ or ""), (*options, _HELP))


_HELP: Final = Option(("-h", "--help"), (), False, True, "Show the help")


def _options(name: str, hint: Any, default: Any, texts: Mapping[str, str]) -> list[Option]:
    if inner := _classes(hint):
        return _options_of_any([_command(named) for named in inner])
    marks = getattr(hint, "__metadata__", ())
    kinds = _kinds(hint)
    choices = tuple(str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
    given = [mark.name for mark in marks if getattr(mark, "name", None)]
    word = f"--{(given or [name])[0].replace('_', '-')}"
    aliases = tuple(alias for mark in marks for alias in getattr(mark, "aliases", None) or ())
    meaning = _first_sentence(texts.get(name, ""))
    if tyro.conf.Positional in marks:
        is_repeated = get_origin(get_args(hint)[0]) is tuple
        return [Option((), choices, Path in kinds, False, meaning, is_repeated)]
    is_flag = kinds == [bool]
    options = [Option((*aliases, word), choices, Path in kinds, is_flag, meaning)]
    if is_flag and tyro.conf.FlagCreatePairsOff not in marks and default is not MISSING:
        options.append(Option((f"--no-{word[2:]}",), (), False, True, f"Not: {meaning}"))
    return options


def _options_of_any(commands: Sequence[Command]) -> list[Option]:
    """Of commands inside of a command: their names, and what any of them takes."""
    found = {option.names: option for command in commands for option in command.named()}
    names = tuple(command.name for command in commands)
    return [Option((), names, False, False, "Which"), *(o for o in found.values() if o != _HELP)]


def _kinds(hint: Any) -> list[Any]:
    """The types inside of a hint, without None, markers and tuples."""
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return [hint]
    inner = [kind for part in get_args(hint) if part is not Ellipsis for kind in _kinds(part)]
    return inner or ([] if hint is NoneType else [hint])


def _first_sentence(text: str) -> str:
    """In one line of a menu."""
    plain = " ".join(text.split()).replace("`", "")
    first = re.split(r"(?<=[a-z)]{2})[.;] ", plain, maxsplit=1)[0].rstrip(".")
    return first if len(first) <= MAX_MEANING else f"{first[: MAX_MEANING - 3].rstrip()}..."


# -------------------------------------------------------------------------------------- for shells


def _bash(commands: Sequence[Command]) -> str:
    cases = "\n".join(_bash_case(command) for command in commands)
    names = " ".join(command.name for command in commands)
    return f"""\
# bash completion for thinwire: source <(thinwire completion bash)
_thinwire() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words="" files=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{names} --help --version" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [ -n "$files" ] && [ "${{word#-}}" = "$word" ]; then
        local IFS=$'\\n'
        compopt -o filenames 2>/dev/null
        COMPREPLY+=($(compgen -f -- "$word"))
    fi
}}
complete -F _thinwire thinwire
"""


def _bash_case(command: Command) -> str:
    lines = [f"        {command.name})", '            case "$before" in']
    for option in command.named():
        if not option.is_flag:
            then = f'words="{" ".join(option.choices)}"' if option.choices else _bash_files(option)
            lines.append(f"                {'|'.join(option.names)}) {then} ;;")
    names = [name for option in command.named() for name in option.names]
    words = [*(word for option in command.unnamed() for word in option.choices), *names]
    files = "files=yes" if any(option.is_file for option in command.unnamed()) else ""
    lines.append(f'                *) words="{" ".join(words)}" {files} ;;')
    return "\n".join([*lines, "            esac ;;"])


def _bash_files(option: Option) -> str:
    return "files=yes" if option.is_file else ":"


def _zsh(commands: Sequence[Command]) -> str:
    cases = "\n".join(_zsh_case(command) for command in commands)
    described = "\n".join("        " + _zsh_described(command) for command in commands)
    return f"""\
#compdef thinwire
# zsh completion for thinwire: thinwire completion zsh > a folder of $fpath, as _thinwire
_thinwire() {{
    local -a commands
    commands=(
{described}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    local command="$words[2]"
    (( CURRENT-- ))
    shift words
    case "$command" in
{cases}
    esac
}}
if [ "$funcstack[1]" = "_thinwire" ]; then _thinwire "$@"; else compdef _thinwire thinwire; fi
"""


def _zsh_described(command: Command) -> str:
    return _quoted(f"{command.name}:{_escaped(command.meaning, ':')}")


def _zsh_case(command: Command) -> str:
    specs = [_quoted(spec) for option in command.options for spec in _zsh_specs(option)]
    return f"        {command.name}) _arguments {' '.join(specs)} ;;"


def _zsh_specs(option: Option) -> list[str]:
    if not option.names:
        many = "*:" if option.is_repeated else "::"
        return [f"{many}{_escaped(option.meaning or 'value', ':')}:{_zsh_action(option)}"]
    after = "" if option.is_flag else f":value:{_zsh_action(option)}"
    return [f"{name}[{_escaped(option.meaning, '[]:')}]{after}" for name in option.names]


def _zsh_action(option: Option) -> str:
    if option.choices:
        return f"({' '.join(option.choices)})"
    return "_files" if option.is_file else " "


def _fish(commands: Sequence[Command]) -> str:
    lines = [
        "# fish completion for thinwire: thinwire completion fish > ~/.config/fish/completions/thinwire.fish",
        "complete -c thinwire -f",
    ]
    for command in commands:
        first = f"complete -c thinwire -n __fish_use_subcommand -a {command.name}"
        lines.append(f"{first} -d {_quoted(command.meaning, fish=True)}")
        inside = f"complete -c thinwire -n '__fish_seen_subcommand_from {command.name}'"
        lines += [f"{inside} {_fish_option(option)}" for option in command.options if _completes(option)]
    return "\n".join(lines) + "\n"


def _completes(option: Option) -> bool:
    return bool(option.names or option.choices or option.is_file)


def _fish_option(option: Option) -> str:
    parts = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    if not option.is_flag and option.names:
        parts.append("-r")
    if option.choices:
        parts.append(f"-a {_quoted(' '.join(option.choices), fish=True)}")
    if option.is_file:
        parts.append("-F")
    return " ".join([*parts, f"-d {_quoted(option.meaning, fish=True)}"])


def _quoted(text: str, *, fish: bool = False) -> str:
    """In single quotes."""
    if fish:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return "'" + text.replace("'", "'\\''") + "'"


def _escaped(text: str, special: str) -> str:
    return "".join(f"\\{c}" if c in special or c == "\\" else c for c in text)
