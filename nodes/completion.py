"""`mesh completion bash|zsh|fish`: what the Tab key offers, as a script of the shell's own.

Rules: 1. Commands and flags are written into the script; names of nodes are asked for when Tab is
pressed (`mesh completion names`). 2. A name was chosen by somebody else: no shell evaluates it.
3. The scripts need bash 3.2, zsh 5 or fish 3, and nothing else.
"""

import shlex
from collections.abc import Iterator
from typing import Final

from nodes.grammar import Flag, Grammar, Value

SHELLS: Final = ("bash", "zsh", "fish")


def script(shell: str, grammar: Grammar) -> str:
    """The script that one shell reads."""
    makers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return makers[shell](grammar)


def _paths(grammar: Grammar, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Grammar]]:
    """Every command with its words, the whole first."""
    yield " ".join(path), grammar
    for name, inner in grammar.commands.items():
        yield from _paths(inner, (*path, name))


BASH: Final = """\
# Completion of the mesh command for bash; in ~/.bashrc: eval "$(mesh completion bash)"
_mesh_names() {
    local name
    while IFS= read -r name; do
        [[ $name == "$cur"* ]] && COMPREPLY+=("$(printf '%q' "$name")")
    done < <(mesh completion names 2>/dev/null)
}
_mesh_directories() {
    local name
    while IFS= read -r name; do COMPREPLY+=("$(printf '%q' "$name")/"); done < <(compgen -d -- "$cur")
}
_mesh_words() { COMPREPLY+=($(compgen -W "$1" -- "$cur")); }
_mesh() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    local path="" word i place=0 value=0
    COMPREPLY=()
    if [[ $cur == "=" ]]; then cur=""
    elif [[ $prev == "=" ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        [[ $word == "=" ]] && continue
        if ((value)); then value=0; continue; fi
        case "$path $word" in
@VALUES@
        *" -"*) ;;
@COMMANDS@
        *) place=$((place + 1)) ;;
        esac
    done
    case "$path $prev" in
@ANSWERS@
    esac
    if [[ $cur != -* ]]; then
        case "$path/$place" in
@PLACES@
        esac
        ((${#COMPREPLY[@]})) && return
    fi
    case "$path" in
@FLAGS@
    esac
}
complete -o default -F _mesh mesh
"""


def _bash(grammar: Grammar) -> str:
    values, commands, answers, places, flags = [], [], [], [], []
    for path, inner in _paths(grammar):
        spelled: list[str] = []
        for flag in inner.flags:
            spelled += flag.spellings
            if flag.value is None:
                continue
            at = "|".join(f'"{path} {spelling}"' for spelling in flag.spellings)
            if not flag.optional:
                values.append(f"        {at}) value=1 ;;")
                answers.append(f"    {at}) {_bash_offer(flag.value)}; return ;;")
        for name in inner.commands:
            commands.append(
                f'        "{path} {name}") path="{f"{path} {name}".strip()}" place=0 ;;'
            )
        if inner.commands:
            places.append(f'        "{path}/0") _mesh_words "{" ".join(inner.commands)}" ;;')
        for number, value in enumerate(inner.places):
            rank = "*" if number == len(inner.places) - 1 else str(number)
            offer = _bash_offer(value)
            leave = "; return" if value.kind in ("file", "text") else ""  # bash offers files then
            places.append(f'        "{path}/"{rank}) {offer}{leave} ;;')
        flags.append(f'    "{path}") _mesh_words "{" ".join(spelled)}" ;;')
    filled = BASH
    for mark, lines in (
        ("@VALUES@", values),
        ("@COMMANDS@", commands),
        ("@ANSWERS@", answers),
        ("@PLACES@", places),
        ("@FLAGS@", flags),
    ):
        filled = filled.replace(mark, "\n".join(lines))
    return filled


def _bash_offer(value: Value) -> str:
    match value.kind:
        case "node":
            return "_mesh_names"
        case "directory":
            return "_mesh_directories"
        case "words":
            return f'_mesh_words "{" ".join(value.words)}"'
    return ":"


ZSH: Final = """\
# Completion of the mesh command for zsh; in ~/.zshrc, behind compinit: eval "$(mesh completion zsh)"
_mesh_names() {
    local -a found
    found=("${(@f)$(mesh completion names 2>/dev/null)}")
    compadd -- "${(@)found:#}"
}
@FUNCTIONS@
compdef _mesh mesh
"""


def _zsh(grammar: Grammar) -> str:
    functions = []
    for path, inner in _paths(grammar):
        name = "_".join(["_mesh", *path.split()])
        lines = [f"{name}() {{"]
        specs = [spec for flag in inner.flags for spec in _zsh_flag(flag)]
        if inner.commands:
            listed = " ".join(
                shlex.quote(f"{command}:{told.help}") for command, told in inner.commands.items()
            )
            cases = [f"    {command}) {name}_{command} ;;" for command in inner.commands]
            lines += [
                "  local curcontext=$curcontext state line",
                "  local -a commands",
                f"  commands=({listed})",
                "  _arguments -C " + " ".join([*specs, "'1: :->command'", "'*:: :->rest'"]),
                "  case $state in",
                "  command) _describe command commands ;;",
                "  rest)",
                "    case $line[1] in",
                *cases,
                "    esac ;;",
                "  esac",
            ]
        else:
            for number, value in enumerate(inner.places, 1):
                rank = "*" if number == len(inner.places) > 1 else str(number)
                specs.append(f"'{rank}: :{_zsh_offer(value)}'")
            lines.append("  _arguments " + " ".join(specs))
        functions.append("\n".join([*lines, "}"]))
    return ZSH.replace("@FUNCTIONS@", "\n".join(functions))


def _zsh_flag(flag: Flag) -> Iterator[str]:
    help = flag.help.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    alike = " ".join(flag.spellings)
    for spelling in flag.spellings:
        spec = f"({alike}){spelling}[{help}]"
        if flag.value is not None:
            spec += f"{':' * (1 + flag.optional)} :{_zsh_offer(flag.value)}"
        yield shlex.quote(spec)


def _zsh_offer(value: Value) -> str:
    match value.kind:
        case "node":
            return "_mesh_names"
        case "directory":
            return "_files -/"
        case "file":
            return "_files"
        case "words":
            return f"({' '.join(value.words)})"
    return " "


FISH: Final = """\
# Completion of the mesh command for fish: mesh completion fish > ~/.config/fish/completions/mesh.fish
complete -c mesh -f
"""


def _fish(grammar: Grammar) -> str:
    lines = []
    for path, inner in _paths(grammar):
        seen = [f"__fish_seen_subcommand_from {word}" for word in path.split()]
        if not path:
            seen = ["__fish_use_subcommand"]
        elif inner.commands:
            seen.append(f"not __fish_seen_subcommand_from {' '.join(inner.commands)}")
        condition = f"-n {shlex.quote('; and '.join(seen))}"
        for name, told in inner.commands.items():
            lines.append(f"complete -c mesh {condition} -a {name} -d {_fish_quoted(told.help)}")
        for flag in inner.flags:
            words = [
                f"-{'l' if s.startswith('--') else 's'} {s.lstrip('-')}" for s in flag.spellings
            ]
            offer = "" if flag.value is None else _fish_offer(flag.value, optional=flag.optional)
            help = _fish_quoted(flag.help)
            lines.append(f"complete -c mesh {condition} {' '.join(words)}{offer} -d {help}")
        offers = [_fish_offer(place, optional=True) for place in inner.places]
        lines += [f"complete -c mesh {condition}{offer}" for offer in offers if offer]
    return FISH + "\n".join(lines) + "\n"


def _fish_offer(value: Value, *, optional: bool) -> str:
    needs = "" if optional else " -r"
    match value.kind:
        case "node":
            return f"{needs} -f -a '(mesh completion names)'"
        case "directory":
            return f"{needs} -f -a '(__fish_complete_directories)'"
        case "file":
            return f"{needs} -F"
        case "words":
            return f"{needs} -f -a {shlex.quote(' '.join(value.words))}"
    return needs and f"{needs} -f"


def _fish_quoted(text: str) -> str:
    """fish knows two escapes in single quotes, and no '"'"' of other shells."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
